"""Why an image got its class: the likeliest ones, each concept's vote, the regions of all layers.

    python explore/explain.py --ckpt runs/cub/last.pt bird.jpg folder_of_images --out pictures
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
from explore.gallery import concept_colours, panels, to_image


class Explanation(NamedTuple):
    classes: dict  # name -> percent, the five likeliest
    votes: dict    # name of a coarse concept -> vote
    maps: list     # (K, h, w) of every layer
    colours: list  # of every layer: (r, g, b) of K - 1 concepts


@torch.inference_mode()
def explain(model, image, class_names, amp=False):
    """image (3, S, S) normalised -> Explanation.

    A coarse concept's vote is its score of the winner less that of the runner-up, over G. Above
    zero it speaks for the winner. The votes sum to the margin between the two logits. Where every
    class has prototypes of its own, those of the other classes have one vote together."""
    output = evaluate.forward(model, image[None], amp=amp)
    logits = output.logits[0].float()
    percents = 100 * logits.softmax(0)
    order = logits.argsort(descending=True, stable=True).tolist()
    classes = {class_names[c]: percents[c].item() for c in order[:5]}

    winner, runner_up = order[:2]
    votes = {}
    if output.concept_logits is not None:
        scores = output.concept_logits[0].float()  # (G, C)
        votes_of_concepts = (scores[:, winner] - scores[:, runner_up]) / len(scores)
        for g, vote in enumerate(votes_of_concepts.tolist(), start=1):
            votes[f"concept {g}"] = vote
    if model.class_specific:
        margin = (logits[winner] - logits[runner_up]).item()
        votes["prototypes of other classes"] = margin - sum(votes.values())
    maps = [layer[0].cpu() for layer in output.attention]
    parents = [groups[0].argmax(1).tolist() for groups in output.groups]
    return Explanation(classes, votes, maps, concept_colours(model.prototypes, parents))


def describe(explanation):
    """The explanation as lines of text; the votes come last."""
    lines = []
    for name, percent in explanation.classes.items():
        lines.append(f"{percent:5.1f} %  {name}")
    if explanation.votes:
        total = sum(explanation.votes.values())
        lines.append(f"votes for the first class against the second, in all {total:+.2f}:")
    else:
        lines.append("no votes: the classes are read from the cls token")
    for name, vote in explanation.votes.items():
        lines.append(f"{vote:+6.2f}  {name}")
    return lines


def draw(picture, explanation):
    """picture (3, S, S) uint8 -> PIL image: regions, then text; a vote has its concept's colour."""
    row = panels(picture, torch.zeros(0, 3), explanation.maps, explanation.colours)
    strip = to_image(row, columns=len(row))
    lines = describe(explanation)
    colours = ["black"] * (len(lines) - len(explanation.votes))
    colours += explanation.colours[-1] + ["grey"]
    size = max(480, strip.width), strip.height + 22 * len(lines) + 8
    sheet = Image.new("RGB", size, "white")
    sheet.paste(strip)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for i, line in enumerate(lines):
        pen.text((8, strip.height + 22 * i), line, colours[i], font)
    return sheet


def explain_files(model, paths, checkpoint, amp, out):
    """Explains images, and all images of folders: prints the text, draws out/NUMBER_NAME.png."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            images = [file for file in path.rglob("*") if file.suffix.lower() in data.SUFFIXES]
            files += sorted(file for file in images if file.name[0] != ".")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no image there")
    out.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files, start=1):
        image = data.read_image(file, upright=True)
        image = data.to_tensor(data.test_view(image, checkpoint["options"]["image_size"]))
        explanation = explain(model, image, checkpoint["classes"], amp)
        target = out / f"{number}_{file.stem}.png"
        draw(data.denormalize(image), explanation).save(target)
        data.say("\n".join([f"{file}, drawn in {target}", *describe(explanation), ""]))


def main(argv=None):
    parser = data.one_line_parser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--out", help="folder of the pictures; default: explained, in the run's")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    out = Path(args.out or Path(args.ckpt).parent / "explained")
    explain_files(model, args.images, checkpoint, checkpoint["options"]["amp"], out)


if __name__ == "__main__":
    data.run_script(main)
