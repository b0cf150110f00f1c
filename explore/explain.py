"""Why an image got its class: the likeliest classes, each concept's vote, the regions of all layers.

    python explore/explain.py --ckpt runs/cub/last.pt bird.jpg folder_of_images --out pictures
"""
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets.folder import is_image_file
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
from explore.gallery import concept_colours, panels


class Explanation(NamedTuple):
    classes: list   # (name, percent), the five likeliest
    votes: list     # (name, vote), of the coarse concepts
    maps: list      # (K, h, w) of every layer
    colours: list   # of every layer, K - 1 of (r, g, b)


@torch.inference_mode()
def explain(model, image, class_names, amp=False):
    """image (3, S, S) normalised -> Explanation.

    A coarse concept's vote is its score of the winner less that of the runner-up, over G. Above zero
    it speaks for the winner. The votes sum to the margin between the two logits. Where every class
    has prototypes of its own, those of the other classes have one vote together.
    """
    predicted = evaluate.forward(model, image[None], amp=amp)
    logits = predicted.logits[0].float()
    probabilities = logits.softmax(0)
    order = logits.argsort(descending=True, stable=True).tolist()
    classes = [(class_names[c], 100 * probabilities[c].item()) for c in order[:5]]
    winner, runner_up = order[0], order[min(1, len(order) - 1)]
    votes = []
    if predicted.concept_logits is not None:
        scores = predicted.concept_logits[0].float()  # (G, C)
        differences = (scores[:, winner] - scores[:, runner_up]) / len(scores)
        votes = [(f"concept {g}", vote) for g, vote in enumerate(differences.tolist(), start=1)]
    if model.class_specific:
        margin = (logits[winner] - logits[runner_up]).item()
        votes.append(("prototypes of other classes", margin - sum(vote for _, vote in votes)))
    maps = [maps[0].float().cpu() for maps in predicted.attention]
    parents = [groups[0].argmax(1).tolist() for groups in predicted.groups]
    return Explanation(classes, votes, maps, concept_colours(model.prototypes, parents))


def describe(explanation):
    """The explanation as lines of text."""
    lines = []
    for rank, (name, percent) in enumerate(explanation.classes, start=1):
        lines.append(f"{rank}. {name}  {percent:.1f} %")
    if not explanation.votes:
        return lines + ["No votes: the classes are read from the cls token."]
    total = sum(vote for _, vote in explanation.votes)
    lines.append(f"Votes for the first class against the second, {total:+.2f} in all:")
    return lines + [f"{name}  {vote:+.2f}" for name, vote in explanation.votes]


def draw(picture, explanation):
    """picture (3, S, S) uint8 -> PIL image: the regions of all layers, the text, a bar a vote."""
    row = panels(picture, torch.zeros(0, 3), explanation.maps, explanation.colours)
    grid = make_grid(torch.stack(row), nrow=len(row), padding=5, pad_value=255)
    lines = describe(explanation)
    side, line_height = picture.shape[2], 22
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + line_height * (len(lines) + 1)), "white")
    sheet.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    largest = max((abs(vote) for _, vote in explanation.votes), default=0) or 1
    first_vote = len(lines) - len(explanation.votes)
    for i, line in enumerate(lines):
        y = grid.shape[1] + line_height * i
        pen.text((10, y), line, "black", font)
        if i >= first_vote:
            g = i - first_vote
            length = side / 2 * explanation.votes[g][1] / largest
            colours = [*explanation.colours[-1], (128, 128, 128)]
            left, right = sorted((1.8 * side, 1.8 * side + length))
            pen.rectangle((left, y + 2, right, y + 17), colours[g])
    return sheet


def explain_files(model, paths, checkpoint, amp, out):
    """Explains images, and all images of folders: prints the text, draws out/NAME.png."""
    files = []
    for path in map(Path, paths):
        files += sorted(filter(is_image_file, map(str, path.iterdir()))) if path.is_dir() else [path]
    out.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(map(Path, files), start=1):
        image = data.read_image(file, upright=True)
        image = data.to_tensor(data.test_view(image, checkpoint["options"]["image_size"]))
        explanation = explain(model, image, checkpoint["classes"], amp)
        target = out / f"{number}_{file.stem}.png"
        draw(data.denormalize(image), explanation).save(target)
        print(f"\n{file}, drawn in {target}", *describe(explanation), sep="\n")


def main(argv=None):
    parser = data.one_line_parser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--out", help="folder of the pictures; default: explained, in the run's")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    out = Path(args.out or Path(args.ckpt).parent / "explained")
    explain_files(model, args.paths, checkpoint, checkpoint["options"]["amp"], out)


if __name__ == "__main__":
    data.run_script(main)
