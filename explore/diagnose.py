"""Why regions are as they are: lengths, movement and sharpness of every concept layer of a run.

    python explore/diagnose.py --ckpt runs/cub/last.pt

Prints for every layer: the length of patches and prototypes, how far prototypes moved from their
start as noise, the gap between the two largest log shares of a patch, how many concepts win a patch of
an image, and the size of the bias.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import model as ivpt


def patch_lengths(model, images):
    """Mean length of the unprompted patches that each concept layer would see."""
    tokens = model.unprompted(images)
    lengths = [model.normed_patches(tokens).norm(dim=2).mean()]
    for block in model.backbone.blocks[model.num_unprompted:]:
        tokens = block(tokens)
        lengths.append(model.normed_patches(tokens).norm(dim=2).mean())
    return lengths


@torch.inference_mode()
def main():
    parser = data.one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="last.pt of a run of --method ivpt")
    parser.add_argument("--images", type=int, default=40, help="test images to look at")
    args = parser.parse_args()
    model, run = ivpt.load_checkpoint(args.ckpt)
    options = run["options"]
    torch.manual_seed(options["seed"])
    start = ivpt.build(options, len(run["classes"])).concepts  # as they began under --start noise
    folder = data.find(options["data"], options["data_root"])
    dataset = data.Images(folder, "test", "box", options["image_size"])
    chosen = range(0, len(dataset), max(1, len(dataset) // args.images))
    images = torch.stack([dataset[i][0] for i in chosen])
    attention = model(images).attention

    print("layer  |patch|  |prototype|  moved  gap of log shares  concepts an image  bias std / max")
    for l, length in enumerate(patch_lengths(model, images)):
        A, concept = attention[l], model.concepts[l]
        q, q_start, bias = concept.prototypes, start[l].prototypes, concept.bias
        largest = A.clamp(min=1e-12).log().topk(2, dim=1).values  # (B, 2, h, w)
        gap = (largest[:, 0] - largest[:, 1]).median()
        winner = A.argmax(1).flatten(1)  # (B, N)
        present = [(winner == k).any(1).float().mean() for k in range(len(q) - 1)]
        print(f"{l + 1:5d}  {length:7.1f}  {q.norm(dim=1).mean():11.2f}  "
              f"{(q - q_start).norm(dim=1).mean():5.2f}  {gap:17.1f}  {sum(present):17.1f}  "
              f"{bias.std():.4f} / {bias.abs().max():.2f}")


if __name__ == "__main__":
    data.run_script(main)
