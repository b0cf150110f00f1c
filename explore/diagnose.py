"""Why regions are as they are: each concept layer of a run as a line of numbers.

    python explore/diagnose.py --ckpt runs/cub/last.pt

    patch      mean length of the patches as prototypes meet them, in the unprompted ViT
    prototype  mean length of the prototypes
    moved      their mean distance from the noise as which they started (--start noise)
    log gap    median gap between the two largest log shares of a patch: near 0, it is undecided
    concepts   how many win at least one patch, mean over the images
    bias std   standard deviation of the spatial bias; bias max: its largest absolute value
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import model as ivpt

COLUMNS = ("layer", "patch", "prototype", "moved", "log gap", "concepts", "bias std", "bias max")


def diagnose(model, checkpoint, dataset):
    """-> for each concept layer a dict of COLUMNS.

    Raises ValueError where the method's prototypes are not clusters of patches.
    """
    loader = DataLoader(dataset, len(dataset))
    images, *_ = next(iter(loader))  # all of them
    attention = evaluate.forward(model, images).attention
    samples = model.sample_regions(dataset, checkpoint["options"]["seed"])  # may change the model
    noise = starting_noise(model, checkpoint)
    state = model.state_dict()
    names = [name for name in state if name.endswith(".prototypes")]  # one a layer
    rows = []
    for l, name in enumerate(names):
        patches, *_ = samples[l]
        bias = state.get(name.replace("prototypes", "bias"))
        row = measure(attention[l], patches, state[name], bias)
        if noise is not None:
            moved = state[name] - noise[name]
            row["moved"] = moved.norm(dim=1).mean()
        rows.append(dict(row, layer=l + 1))
    return rows


def starting_noise(model, checkpoint):
    """The state dict of the model as it started, or None if it did not start as noise."""
    options = checkpoint["options"]
    if options["start"] != "noise":
        return None
    torch.manual_seed(options["seed"])
    new = ivpt.build(options, len(checkpoint["classes"]), model.backbone)
    return new.to(model.backbone.cls_token.device).state_dict()


def measure(A, patches, prototypes, bias):
    """Shares A (B, K, h, w), patches (n, D), prototypes (K, D), bias (K, N) or None -> a layer's
    dict of COLUMNS; None stays where there is nothing to measure."""
    row = dict.fromkeys(COLUMNS)
    row["patch"] = patches.norm(dim=1).mean()
    row["prototype"] = prototypes.norm(dim=1).mean()
    largest = A.log().topk(2, dim=1).values  # (B, 2, h, w)
    row["log gap"] = (largest[:, 0] - largest[:, 1]).median()
    winners = A.argmax(1).flatten(1)  # (B, N)
    wins = F.one_hot(winners, A.shape[1]).amax(1)  # (B, K), 1: any patch
    num_concepts = wins[:, :-1].sum(1)  # (B)
    row["concepts"] = num_concepts.float().mean()
    if bias is not None:
        row["bias std"] = bias.std()
        row["bias max"] = bias.abs().max()
    return row


@torch.inference_mode()
def main(argv=None):
    parser = data.one_line_parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--images", type=int, default=40, help="how many test images to look at")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    split = "val" if checkpoint["options"]["validate"] else "test"
    images = evaluate.load_images(checkpoint, split=split)
    count = max(1, min(args.images, len(images)))
    chosen = torch.linspace(0, len(images) - 1, count).long().tolist()
    rows = diagnose(model, checkpoint, Subset(images, chosen))
    print("".join(f"{name:>10}" for name in COLUMNS))
    for row in rows:
        line = ""
        for value in row.values():
            number = "-" if value is None else f"{float(value):.4g}"
            line += f"{number:>10}"
        print(line)


if __name__ == "__main__":
    data.run_script(main)
