"""The gallery: what every concept of a trained model sees, on one HTML page.

    python evaluate.py --ckpt runs/cub/last.pt --visualize pictures  # open pictures/index.html
    python explore/gallery.py --ckpt runs/cub/last.pt --strip regions.jpg --images 1 2 3

Maps are upsampled to the size of the image before the argmax, so regions have smooth borders. A
concept's card shows where its upsampled margin over all others is positive. Colours mean the same
in all layers: each coarse concept, of the last layer, has a hue. A fine concept is a shade of the
coarse concept that it joins most (Output.groups). Background is pale.
"""
import colorsys
import html
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.utils import draw_keypoints, draw_segmentation_masks, make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate


# ---- 1. Pictures -------------------------------------------------------------------------------
def concept_colours(prototypes, parents):
    """-> for each layer K - 1 colours (r, g, b).

    parents: for each prompted layer, the coarse concept that each fine concept joins most. In a
    layer without parents every concept has a hue of its own.
    """
    layers = []
    for l, K in enumerate(prototypes):
        colours = []
        for k in range(K - 1):
            if l < len(parents):
                parent = parents[l][k]
                elder = parents[l][:k].count(parent)  # earlier siblings are darker
                lightness = 0.28 + 0.5 * (elder + 0.5) / parents[l].count(parent)
                colours.append(shade(parent / (prototypes[-1] - 1), lightness))
            else:
                colours.append(shade(k / (K - 1), 0.5))
        layers.append(colours)
    return layers


def shade(hue, lightness):
    """hue and lightness in 0..1 -> (r, g, b) in 0..255."""
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, 0.8))


def concept_names(layer):
    """A layer's metrics -> a name for each concept: the part that it hits in most images.

    Two parts, if it hits the second nearly as often; "" if it hits none or none is annotated.
    """
    names = []
    for parts in layer["parts_hit"] or [[]] * (layer["prototypes"] - 1):
        most = parts[0][1] if parts else 0
        named = [part for part, share in parts[:2] if share > 0.9 * most]
        names.append(" and ".join(named))
    return names


def upsample(maps, side):
    """maps (K, h, w) -> (K, side, side)."""
    return F.interpolate(maps[None].float(), size=(side, side), mode="bicubic")[0]


def paint_regions(picture, maps, colours):
    """picture (3, S, S) uint8, maps (K, h, w), K - 1 colours -> (3, S, S): concepts in colour."""
    winners = upsample(maps, picture.shape[2]).argmax(0)  # (S, S)
    masks = F.one_hot(winners, len(maps)).permute(2, 0, 1).bool()
    grey = picture.float().mean(0)  # its own hues would mix with those of the concepts
    grey = grey.to(torch.uint8).expand(3, -1, -1)
    return draw_segmentation_masks(grey, masks, alpha=0.6, colors=[*colours, (255, 255, 255)])


def panels(picture, points, maps, colours):
    """picture (3, S, S) with its visible key points (M, 3), then the regions of every layer."""
    visible = points[points[:, 2] > 0, :2][None]  # (1, M, 2)
    radius = max(1, picture.shape[2] // 75)
    image = draw_keypoints(picture, visible, colors="black", radius=radius + 1)
    image = draw_keypoints(image, visible, colors="yellow", radius=radius)
    return [image] + [paint_regions(picture, m, c) for m, c in zip(maps, colours)]


def to_image(pictures, columns):
    """Pictures (3, S, S) uint8 -> a PIL image of them, in rows of that many columns."""
    grid = make_grid(torch.stack(pictures), nrow=columns, padding=5, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


# ---- 2. Collected while the model sees the images ----------------------------------------------
class Gallery:
    """images: data.Images in the test view. chosen: indices of the images whose regions we show."""

    def __init__(self, model, images, chosen=None):
        self.images = images
        self.prototypes = model.prototypes
        if chosen is None:
            count = min(24, len(images))
            chosen = np.linspace(0, len(images) - 1, count).astype(int).tolist()
        self.chosen = chosen
        self.examples = {}  # index -> maps [(K, h, w)] of every layer, class, its probability
        # Each concept's nine strongest claims: strength, index, margin (h, w). The strength is its
        # attention, summed over the patches it wins. The margin is its attention minus the largest
        # of the others'.
        self.claims = [[[] for _ in range(K - 1)] for K in model.prototypes]
        self.groups = []  # per prompted layer (K - 1, G), summed over images where a concept wins

    def add(self, output, indices):
        """Takes the Output for a batch in the test view, and the indices (B,) of its images."""
        layers = [maps.float().cpu() for maps in output.attention]  # (B, K, h, w)
        probabilities, classes = output.logits.float().softmax(1).cpu().max(1)
        for i, index in enumerate(indices.tolist()):
            if index in self.chosen:
                maps = [layer[i].clone() for layer in layers]
                self.examples[index] = maps, classes[i].item(), probabilities[i].item()
        if not self.groups:
            self.groups = [torch.zeros(groups.shape[1:]) for groups in output.groups]
        for l, maps in enumerate(layers):
            winners = maps.argmax(1)  # (B, h, w)
            self.add_claims(self.claims[l], maps, winners, indices)
            if l < len(self.groups):
                wins = F.one_hot(winners, self.prototypes[l]).amax((1, 2))  # (B, K), 1: any patch
                groups = output.groups[l].float().cpu()  # (B, K-1, G)
                self.groups[l] += (groups * wins[:, :-1, None]).sum(0)

    def add_claims(self, layer_claims, maps, winners, indices):
        """Keeps the nine strongest claims of every concept of a layer."""
        first, second = maps.topk(2, dim=1).values.unbind(1)
        for k, claims in enumerate(layer_claims):
            won = winners == k
            strength = (maps[:, k] * won).sum((1, 2))
            margin = maps[:, k] - torch.where(won, second, first)
            for i in won.any(2).any(1).nonzero().flatten().tolist():
                claims.append((strength[i].item(), indices[i].item(), margin[i].clone()))
            claims.sort(key=lambda claim: -claim[0])
            del claims[9:]

    def colours(self):
        parents = [groups.argmax(1).tolist() for groups in self.groups]
        return concept_colours(self.prototypes, parents)

    def picture(self, index):
        """-> pixels (3, S, S) uint8 and key points (M, 3)."""
        image, _, points, _ = self.images[index]
        return data.denormalize(image), points

    # ---- 3. Drawn at the end -------------------------------------------------------------------
    def strip(self, indices):
        """A row for each image: its key points, then the regions of every layer."""
        pictures = []
        for index in indices:
            pictures += panels(*self.picture(index), self.examples[index][0], self.colours())
        return to_image(pictures, 1 + len(self.prototypes))

    def sheet(self, claims):
        """Nine images, pale except for the concept's region."""
        tiles = []
        for _, index, margin in claims:
            picture, _ = self.picture(index)
            region = upsample(margin[None], picture.shape[2]) > 0
            pale = 0.3 * picture.float().mean(0) + 150
            tiles.append(torch.where(region, picture, pale.to(torch.uint8)))
        return to_image(tiles, 3)

    def write(self, folder, metrics, log):
        """Writes folder/index.html and folder/pictures. log: path of the run's log.jsonl."""
        pictures = folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for index in self.examples:
            self.strip([index]).save(pictures / f"image_{index}.jpg", quality=88)
        for l, layer_claims in enumerate(self.claims, start=1):
            for k, claims in enumerate(layer_claims, start=1):
                if claims:
                    self.sheet(claims).save(pictures / f"concept_{l}_{k}.jpg", quality=88)
        chips = self.chips(metrics["layers"])
        sections = dict(
            Numbers=f"<pre>{html.escape(evaluate.table(metrics))}</pre>",
            Regions=self.regions_section(chips),
            Concepts=self.concepts_section(metrics["layers"], chips),
            Hierarchy=self.hierarchy_section(chips),
            Training=curves_section(log))
        links = ""
        body = ""
        for title, text in sections.items():
            links += f"<a href='#{title}'>{title}</a> "
            body += f"<h2 id={title}>{title}</h2>{text}"
        (folder / "index.html").write_text(PAGE.format(links=links, body=body), encoding="utf-8")

    def chips(self, layers):
        """The layers' metrics -> for each layer its concepts' numbers, colours and names, as HTML.
        """
        chips = []
        for layer, colours in zip(layers, self.colours()):
            chips.append([])
            for k, name in enumerate(concept_names(layer)):
                name = html.escape(name)
                chips[-1].append(CHIP.format(number=k + 1, colour=colours[k], name=name))
        return chips

    def regions_section(self, chips):
        names = [re.sub(r"^\d+\.", "", name).replace("_", " ") for name in self.images.classes]
        text = REGIONS + "<div class=legend><b>image</b>"
        for l, layer_chips in enumerate(chips, start=1):
            text += f"<div><b>layer {l}</b><br>{''.join(layer_chips)}</div>"
        text += "</div>"
        for index, (_, guess, probability) in sorted(self.examples.items()):
            truth = self.images.labels[index].item()
            _, points = self.picture(index)
            order = points[:, 0].argsort().tolist()
            seen = ", ".join(self.images.parts[m] for m in order if points[m, 2] > 0)
            text += EXAMPLE.format(
                index=index, points=html.escape(seen), guess=html.escape(names[guess]),
                percent=100 * probability, truth=html.escape(names[truth]),
                look="right" if guess == truth else "wrong")
        return text

    def concepts_section(self, layers, chips):
        text = CONCEPTS
        for l, layer in enumerate(layers):
            text += f"<h3>Layer {l + 1}</h3><div class=cards>"
            for k, chip in enumerate(chips[l]):
                if not self.claims[l][k]:
                    text += f"<div>{chip} never wins a patch</div>"
                    continue
                parts = layer["parts_hit"][k] if layer["parts_hit"] else []
                parts = ", ".join(f"{part} {share:.0f} %" for part, share in parts)
                text += CARD.format(
                    l=l + 1, k=k + 1, chip=chip, parts=html.escape(parts),
                    share=100 * layer["wins"][k] / sum(layer["wins"]),
                    spread=layer["peak_spreads"][k])
            text += "</div>"
        return text

    def hierarchy_section(self, chips):
        """A row for each coarse concept: the fine concepts of each layer that join it most."""
        if not self.groups:
            return "<p>This model does not group concepts: no hierarchy.</p>"
        heads = "".join(f"<th>layer {l + 1}" for l in range(len(self.groups)))
        text = f"{HIERARCHY}<tr><th>layer {len(chips)}{heads}"
        for g, chip in enumerate(chips[-1]):
            text += "<tr><td>" + self.thumbnail(len(chips) - 1, g, chip, "")
            for l, groups in enumerate(self.groups):
                text += "<td>"
                parents = groups.argmax(1).tolist()
                for k, parent in enumerate(parents):
                    if parent == g and self.claims[l][k]:
                        share = 100 * groups[k, g] / groups[k].sum()
                        text += self.thumbnail(l, k, chips[l][k], f"{share:.0f} %")
        return text + "</table>"

    def thumbnail(self, l, k, chip, note):
        """A concept's strongest image, its chip and a note."""
        image = ""
        if self.claims[l][k]:
            image = f"<img src='pictures/concept_{l + 1}_{k + 1}.jpg' alt=''>"
        return f"<div class=first><div>{image}</div>{chip} {note}</div>"


def curves_section(log):
    """A small curve for every number in log.jsonl, as SVG."""
    curves = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the run was killed while it wrote this line
        for name, value in row.items():
            if name != "epoch" and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append(value)
    text = "<div class=cards>"
    for name, values in curves.items():
        low, high = min(values), max(values)
        points = ""
        for i, value in enumerate(values):
            x = 5 + 190 * i / max(1, len(values) - 1)
            y = 75 - 65 * (value - low) / ((high - low) or 1)
            points += f"{x:.1f},{y:.1f} "
        text += CURVE.format(name=html.escape(name), last=values[-1], points=points, low=low,
                             high=high, count=len(values))
    return text + "</div>"


PAGE = """<!doctype html><meta charset=utf-8><title>IVPT</title><style>
body {{ font: 15px/1.5 sans-serif; color: #222; max-width: 1180px; margin: auto; padding: 9px }}
figure {{ margin: 0 0 14px }}
img {{ display: block; width: 100% }}
pre {{ overflow-x: auto }}
i {{ display: inline-block; min-width: 20px; margin: 1px; border-radius: 3px; text-align: center;
    color: white; text-shadow: 0 0 2px black; font: 12px/18px sans-serif }}
td, th {{ border-top: 1px solid #ddd; text-align: left; vertical-align: top; padding: 4px }}
text {{ font-size: 11px }}
polyline {{ fill: none; stroke: #2563a8 }}
.right {{ color: #17663a }}
.wrong {{ color: #a32020 }}
.legend {{ position: sticky; top: 0; background: white; padding: 6px 0 }}
.legend span {{ display: none }}
.legend {{ display: grid; gap: 5px; grid-auto-flow: column; grid-auto-columns: 1fr }}
.cards {{ display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)) }}
.first {{ display: inline-block; width: 76px; margin: 3px; font-size: 12px; vertical-align: top }}
.first div {{ height: 76px; overflow: hidden }}
.first img {{ width: 300% }}
</style><h1>What each concept sees</h1>{links}{body}
"""
REGIONS = """<p>Each image with its key points, then the regions of every layer. Background is pale.
Each concept of the last layer has a hue; a fine concept is a shade of the one it joins most. If a
model does not group concepts, colours start afresh in every layer. Hover over a row for the names
of its key points, over a number for the name of its concept.</p>"""
CHIP = "<i style='background:rgb{colour}' title='{name}'>{number}</i><span> {name}</span>"
EXAMPLE = """<figure><img src='pictures/image_{index}.jpg' alt=''
title='From left to right: {points}'>image {index}: predicted <b>{guess}</b> ({percent:.0f} %),
<span class={look}>true class {truth}</span></figure>"""
CONCEPTS = """<p>The nine images in which each concept is strongest, with its region in colour.
Below, the three parts it hits most often, in percent of the images that show the part. A part is
hit if it lies within 36 of 224 pixels of the peak of the concept's map. The first part names the
concept, together with the second if that is hit nearly as often. A small spread of the peaks means
that the concept looks at one fixed spot. If every class has prototypes of its own, concept 1 is the
first prototype of the image's class.</p>"""
CARD = """<figure><img src='pictures/concept_{l}_{k}.jpg' alt=''><b>{chip}</b><br>{parts}<br>
<small>{share:.3g} % of patches, peak spread {spread:.0f} px</small></figure>"""
HIERARCHY = """<p>Each concept of the last layer, then the fine concepts of every layer that join it
most. The percentage is the mean grouping over the images in which they win a patch.</p><table>"""
CURVE = """<figure>{name} <b>{last:.4g}</b><svg viewBox='0 0 200 96'><polyline points='{points}'/>
<text x='5' y='92'>{low:.3g} to {high:.3g}, {count} epochs</text></svg></figure>"""


# ---- 4. A few rows as one picture, for README.md -----------------------------------------------
@torch.inference_mode()
def main(argv=None):
    parser = data.one_line_parser(description="Draw all layers' regions for a few test images.")
    parser.add_argument("--ckpt", required=True, help="last.pt of a run")
    parser.add_argument("--strip", required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--images", type=int, nargs="+", default=[0, 1, 2], metavar="N",
                        help="numbers of test images, as in the gallery")
    args = parser.parse_args(argv)
    model, checkpoint = evaluate.load_run(args.ckpt)
    images = evaluate.load_images(checkpoint)
    if not 0 <= min(args.images) <= max(args.images) < len(images):
        raise ValueError(f"--images {args.images}: expected numbers from 0 to {len(images) - 1}")
    gallery = Gallery(model, images, args.images)
    amp = checkpoint["options"]["amp"]
    for batch, labels, _, indices in tqdm(DataLoader(images, 32), leave=False, disable=None):
        output = evaluate.forward(model, batch, labels, amp)
        gallery.add(output, indices)  # all images count for the groups, so for the colours
    gallery.strip(args.images).save(args.strip, quality=88)


if __name__ == "__main__":
    data.run_script(main)
