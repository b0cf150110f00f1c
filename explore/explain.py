"""Why an image got its class: the likeliest classes, every concept's vote, all layers' regions.

    python explore/explain.py --ckpt runs/cub/last.pt bird.jpg folder_of_images --out pictures
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
from explore.gallery import concept_colours, concept_names, panels, to_image

GREY = (128, 128, 128)


class Explanation(NamedTuple):
    classes: dict  # name -> percent, the five likeliest
    votes: list    # (name of a concept, its vote, its colour)
    maps: list     # (K, h, w) of every layer
    colours: list  # of every layer: (r, g, b) of K - 1 concepts


@torch.inference_mode()
def explain(model, image, class_names, amp=False, names=None):
    """image (3, S, S) normalised -> Explanation. names: concept_names of every layer.

    A concept's vote is its score for the likeliest class minus its score for the second, divided by
    the number of votes. A positive vote speaks for the likeliest class. The votes sum to the margin
    between the two logits. If the concepts of all layers vote, the ten strongest votes are listed
    and the others summed; a vote of cls, of --method parts-cls, is listed last. If every class has
    prototypes of its own, those of all other classes count as one vote. A concept that wins no
    patch of the image may vote, too; its name says that it is absent.
    """
    output = evaluate.forward(model, image[None], amp=amp)
    logits = output.logits[0].float()
    percents = 100 * logits.softmax(0)
    order = logits.argsort(descending=True, stable=True).tolist()
    classes = {class_names[c]: percents[c].item() for c in order[:5]}

    maps = [layer[0].cpu() for layer in output.attention]
    parents = [groups[0].argmax(1).tolist() for groups in output.groups]
    colours = concept_colours(model.prototypes, parents)
    winner, runner_up = order[:2]
    votes = []
    if output.concept_logits is not None:
        scores = output.concept_logits[0].float()  # (concepts that vote, C)
        values = (scores[:, winner] - scores[:, runner_up]) / len(scores)
        votes = concept_votes(values.tolist(), maps, colours, names)
        if model.class_specific:
            margin = (logits[winner] - logits[runner_up]).item()
            votes.append(("prototypes of other classes", margin - total(votes), GREY))
    return Explanation(classes, votes, maps, colours)


def concept_votes(values, maps, colours, names):
    """values: votes of the concepts of all layers, or of the last layer's -> (name, vote, colour).
    """
    all_layers = len(values) > len(colours[-1])
    concepts = []  # of every layer: (name, colour)
    for l, layer in enumerate(colours):
        winners = maps[l].argmax(0)  # (h, w)
        for k, colour in enumerate(layer):
            name = f"concept {k + 1}"
            if all_layers:
                name = f"layer {l + 1}, {name}"
            if names and names[l][k]:
                name += f", {names[l][k]}"
            if not (winners == k).any():
                name += ", absent here"
            concepts.append((name, colour))
    voters = concepts[-len(values):]
    votes = [(name, vote, colour) for (name, colour), vote in zip(voters, values)]
    further = values[len(voters):]  # of --method parts-cls
    if all_layers and len(votes) > 10:
        votes.sort(key=lambda vote: abs(vote[1]), reverse=True)
        votes, others = votes[:10], votes[10:]
        votes.append((f"all other concepts ({len(others)})", total(others), GREY))
    votes += [("the cls token, which no region explains", vote, GREY) for vote in further]
    return votes


def total(votes):
    return sum(vote for _, vote, _ in votes)


def describe(explanation):
    """The explanation as lines of text; the votes come last."""
    lines = []
    for name, percent in explanation.classes.items():
        lines.append(f"{percent:5.1f} %  {name}")
    if explanation.votes:
        margin = total(explanation.votes)
        lines.append(f"votes for the first class over the second, {margin:+.2f} in total:")
    else:
        lines.append("no votes: this method's concepts do not score the classes")
    for name, vote, _ in explanation.votes:
        lines.append(f"{vote:+6.2f}  {name}")
    return lines


def draw(picture, explanation):
    """picture (3, S, S) uint8 -> PIL image: regions, then text; votes in their concept's colour."""
    row = panels(picture, torch.zeros(0, 3), explanation.maps, explanation.colours)
    strip = to_image(row, columns=len(row))
    lines = describe(explanation)
    colours = ["black"] * (len(lines) - len(explanation.votes))
    colours += [colour for _, _, colour in explanation.votes]
    height = strip.height + 22 * len(lines) + 8
    sheet = Image.new("RGB", (max(480, strip.width), height), "white")
    sheet.paste(strip)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for i, line in enumerate(lines):
        pen.text((8, strip.height + 22 * i), line, colours[i], font)
    return sheet


def find_images(paths):
    """Files and folders -> the files, and all images in the folders that are not hidden."""
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        for file in sorted(path.rglob("*")):
            hidden = any(word[0] in ".@" for word in file.relative_to(path).parts)
            if file.suffix.lower() in data.SUFFIXES and file.is_file() and not hidden:
                files.append(file)
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no image there")
    return files


def explain_files(model, paths, checkpoint, amp, run, out=None):
    """Explains images, and all images in folders: prints the text and draws out/NUMBER_NAME.png.

    run: the checkpoint's folder. If evaluate.py left metrics.json there, concepts have names.
    Numbers go on where drawings are there already. Raises ValueError at the end where images were
    damaged.
    """
    files = find_images(paths)
    names = None
    metrics_file = run / "metrics.json"
    if metrics_file.is_file():
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        names = [concept_names(layer) for layer in metrics["layers"]]
    out = Path(out or run / "explained")
    number, damaged = 0, []
    for file in files:
        try:
            image = data.read_image(file, upright=True)
        except ValueError as error:
            damaged.append(str(error))
            continue
        out.mkdir(parents=True, exist_ok=True)
        number += 1
        while any(out.glob(f"{number}_*.png")):
            number += 1
        image = data.to_tensor(data.test_view(image, checkpoint["options"]["image_size"]))
        explanation = explain(model, image, checkpoint["classes"], amp, names)
        target = out / f"{number}_{file.stem}.png"
        draw(data.denormalize(image), explanation).save(target)
        text = "\n".join(describe(explanation))
        data.say(f"{file}, drawn in {target}\n{text}\n")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(files)} images: {'; '.join(damaged)}")


def main(argv=None):
    parser = data.one_line_parser(description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--out", help="folder for the pictures (explained/, beside --ckpt)")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    amp = checkpoint["options"]["amp"]
    explain_files(model, args.images, checkpoint, amp, Path(args.ckpt).parent, args.out)


if __name__ == "__main__":
    data.run_script(main)
