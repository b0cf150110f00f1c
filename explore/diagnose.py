"""Why regions are as they are: lengths, movement and sharpness of every concept layer of a run.

    python explore/diagnose.py --ckpt runs/cub/last.pt

Prints for every layer: the mean length of patches (without prompts) and of prototypes, how far
prototypes are from this seed's noise (their start, unless --start kmeans), the median gap between
the two largest log shares of a patch, how many concepts win a patch of an image, the bias.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import data
import model as ivpt


def patch_lengths(model, images):
    """Mean length of patches as each concept layer meets them, here without prompts."""
    lengths = []
    tokens = model.unprompted(images)
    blocks = [*model.backbone.blocks[model.num_unprompted:], torch.nn.Identity()]
    for concept, block in zip(model.concepts, blocks):
        patches = concept.prepare(model.normed_patches(tokens))  # (B, N, D)
        lengths.append(patches.norm(dim=2).mean())
        tokens = block(tokens)
    return lengths


@torch.inference_mode()
def main():
    parser = data.one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="last.pt of a run of --method ivpt")
    parser.add_argument("--images", type=int, default=40, help="how many images to look at")
    args = parser.parse_args()
    model, run = ivpt.load_checkpoint(args.ckpt)
    options = run["options"]
    if not isinstance(model, ivpt.IVPT):
        raise ValueError(f"--ckpt {args.ckpt}: --method {options['method']} has no concept layers")
    torch.manual_seed(options["seed"])
    start = ivpt.build(options, len(run["classes"])).concepts  # as they began under --start noise
    folder = data.find(options["data"], options["data_root"])
    split = "val" if options["validate"] else "test"
    dataset = data.Images(folder, split, "box", options["image_size"])
    count = max(1, min(args.images, len(dataset)))
    chosen = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    images = torch.stack([dataset[i][0] for i in chosen])
    attention = model(images).attention

    columns = ("layer", "patch", "prototype", "moved", "log gap", "concepts", "bias std", "bias max")
    print("".join(f"{name:>10}" for name in columns))
    for l, length in enumerate(patch_lengths(model, images)):
        concept = model.concepts[l]
        prototypes, bias = concept.prototypes, concept.bias
        moved = prototypes - start[l].prototypes
        A = attention[l]  # (B, K, h, w)
        first, second = A.log().topk(2, dim=1).values.unbind(1)
        winner = A.argmax(1).flatten(1)  # (B, N)
        num_concepts = 0.0  # that win a patch of an image, on average
        for k in range(A.shape[1] - 1):
            num_concepts += (winner == k).any(1).float().mean()
        values = [l + 1, length]
        values += [prototypes.norm(dim=1).mean(), moved.norm(dim=1).mean()]
        values += [(first - second).median(), num_concepts]
        values += [bias.std(), bias.abs().max()]
        print("".join(f"{float(value):10.4g}" for value in values))


if __name__ == "__main__":
    data.run_script(main)
