"""Evaluate and explain IVPT (ICLR 2026, arXiv 2503.06084): accuracy, consistency, stability, what each concept sees.

    python evaluate.py --ckpt runs/toy/last.pt                                   # the table, and metrics.json beside it
    python evaluate.py --ckpt runs/toy/last.pt --visualize runs/toy/pictures     # and a gallery: open its index.html
    python evaluate.py --ckpt runs/toy/last.pt --image bird.jpg                  # why this image got its class
    torchrun --nproc_per_node=4 evaluate.py --ckpt runs/cub/last.pt              # the same numbers from four GPUs

On whole-numbered annotations like CUB's, parts are hit as in the original program but for boxes over the image's rim: see
view "box" of data.Images.
"""
import argparse
import colorsys
import contextlib
import html
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import data
import model as ivpt

FRAME, HALF_SIZE, THRESHOLD = 224, 36, 0.8  # side of the metrics' frame, half a region, consistent from here on
# What metrics.json tells of a run's method:
METHOD = "method recipe bias fusion tune start distance no_bias no_regions no_cross_layer no_fusion".split()
NOISE_STD, NOISE_CLIP, RANDOM_DRAWS = 0.2, 0.25, 10  # of the noise on the normalised image; of the random control


# ---- 1. The metrics: from maps to peaks, from peaks to hit parts, from hits to percentages ---------------------------
def find_peaks(maps):
    """maps (n, K, h, w) -> (n, K, 2): x, y of each map's first maximum, row by row, once upsampled to FRAME x FRAME.
    That is the argmax of U = Wy A Wx', bicubic with half-pixel centres, in fp64 and rounded to fp32, so that equal patches
    tie exactly. The rest saves time: the rows of Wx sum to 1 with at most `negative` below zero, so row y of U stays under
    max + negative (max - min) of (Wy A)[y]. A row bounded below the best row's maximum cannot hold the peak and is not
    computed; few are."""
    n, K, h, w = maps.shape
    if n > 8:                                                               # what fits the cache is faster
        return torch.cat([find_peaks(part) for part in maps.split(8)])
    eyes = (torch.eye(side, dtype=torch.float64, device=maps.device)[None, None] for side in (h, w))
    Wy, Wx = (F.interpolate(eye, (FRAME, eye.shape[3]), mode="bicubic")[0, 0] for eye in eyes)       # (FRAME, side)
    rows = maps.double().flatten(0, 1).transpose(1, 2) @ Wy.T                                        # (n K, w, FRAME)
    high, low, negative = rows.amax(1), rows.amin(1), -Wx.clamp(max=0).sum(1).min()
    bound = high + negative * (high - low) + 1e-12 * high.abs()             # the last term: fp64's own rounding
    every = torch.arange(n * K, device=maps.device)
    best = (rows[every, :, bound.argmax(1)] @ Wx.T).float().amax(1)
    left = bound.float() >= best[:, None]                                                            # (n K, FRAME)
    values = torch.full_like(bound, -torch.inf, dtype=torch.float32)
    values[left] = (rows.transpose(1, 2)[left] @ Wx.T).float().amax(1)
    y = values.argmax(1)                                                    # argmax returns the first of a tie
    return torch.stack(((rows[every, :, y] @ Wx.T).float().argmax(1), y), 1).view(n, K, 2)


def hits_of(peaks, keypoints, half_size=HALF_SIZE):
    """peaks (n, K, 2), keypoints (n, M, 3) in the frame -> bool (n, K, M): the visible parts within each peak's region,
    peak +- half_size clipped to [0, FRAME], ends inclusive."""
    points = keypoints[:, None, :, :2]                                                                   # (n, 1, M, 2)
    near = (points - peaks[:, :, None].to(points)).abs() <= half_size
    return (near & (points >= 0) & (points <= FRAME)).all(3) & (keypoints[:, None, :, 2] > 0)


def part_hits(attention, keypoints, half_size=HALF_SIZE):
    """attention (n, K, h, w), foreground maps; keypoints (n, M, 3) x, y, visible in the 224 frame -> bool (n, K, M)."""
    return hits_of(find_peaks(attention).to(keypoints.device), keypoints, half_size)


def per_class(values, labels):
    """values (n, ...) -> fp64 sums over the images of every class that has any (C, ...), and the class sizes (C,)."""
    labels = torch.as_tensor(labels, device=values.device)
    if not len(labels):
        raise ValueError("consistency, stability: no images, expected one or more; pass the hits of a test set")
    classes, slot, sizes = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, slot, values.double()), sizes


def consistency(hits, visible, labels):
    """Percent of (class, prototype) pairs that keep to one part (Huang et al. 2023): in at least 80 % of the class's
    images that show the part it is hit. hits (n, K, M), visible (n, M), labels (n,). Classes without images do not
    count; a part never visible is never kept to."""
    hit, _ = per_class(hits.bool() & visible.bool()[:, None], labels)                                  # (C, K, M)
    seen, _ = per_class(visible.bool(), labels)                                                             # (C, M)
    share = hit / seen[:, None].clamp(min=1)                                # 4 / 5 rounds as 0.8 does: >= is exact
    return 100 * (share >= THRESHOLD).any(2).double().mean().item()


def stability(hits, noisy_hits, labels):
    """Percent of a class's images whose set of hit parts survives the noise, averaged over (class, prototype) pairs.
    hits, noisy_hits (n, K, M), labels (n,). An image without visible parts is unchanged, as in the original."""
    same, sizes = per_class((hits == noisy_hits).all(2), labels)                                            # (C, K)
    return 100 * (same / sizes[:, None]).mean().item()


def agreement(counts):
    """Counts (regions, parts) -> normalised mutual information (arithmetic mean of entropies) and adjusted Rand index
    (Hubert and Arabie 1985), percent; (None, None) for under two samples."""
    counts, total = counts.double(), counts.sum().item()
    if total < 2:
        return None, None
    tables = counts, counts.sum(1), counts.sum(0)                           # (regions, parts), (regions,), (parts,)
    H_both, H_region, H_part = (-torch.special.xlogy(c / total, c / total).sum().item() for c in tables)
    both, region, part = ((c * (c - 1) / 2).sum().item() for c in tables)   # pairs of samples that share a cell
    expected, most, H = region * part / (total * (total - 1) / 2), (region + part) / 2, H_region + H_part
    nmi = 200 * max(0, H - H_both) / H if H > 0 else 100.0                  # one region and one part: they agree
    return nmi, 100 * (both - expected) / (most - expected) if most != expected else 100.0


# ---- 2. The three views of a test image ------------------------------------------------------------------------------
class Views(Dataset):
    """A test image as the classifier sees it, and cropped to its box without and with noise. The noise depends on
    (seed, index) alone: batch size, workers and order change nothing."""

    def __init__(self, folder, split, image_size, seed, grid):
        self.test, self.box = (data.Images(folder, split, view, image_size) for view in ("test", "box"))
        self.seed, self.grid, self.size = seed, grid, image_size

    def __len__(self):
        return len(self.test)

    def __getitem__(self, index):
        file = self.test.read(index)                                        # decoded once for all views
        (image, label, points, _), (clean, _, box_points, _) = self.test.item(index, file), self.box.item(index, file)
        noise = np.random.default_rng((self.seed, index)).standard_normal(clean.shape, np.float32) * NOISE_STD
        noisy = clean + torch.from_numpy(noise).clamp_(-NOISE_CLIP, NOISE_CLIP)
        h, w = self.grid
        x, y = (points[:, :2].T * torch.tensor(((w,), (h,))) / self.size).long()
        patch = torch.where(points[:, 2] > 0, y.clamp(max=h - 1) * w + x.clamp(max=w - 1), -1)     # of each key point
        return dict(image=image, clean=clean, noisy=noisy, label=label, points=box_points, patch=patch,
                    inside=self.inside(index, file.size), index=index)

    def inside(self, index, size):
        """The patches of the test view whose centre is in the box, in an image of that size: (N,) 0 or 1."""
        x, y, w, h = self.test.boxes[index].tolist()
        low, high = data.test_points(np.array(((x, y), (x + w, y + h))), size, self.size)                  # in the view
        centres = ((np.arange(side) + 0.5) * self.size / side for side in self.grid)               # of rows, of columns
        rows, columns = ((low[axis] <= centre) & (centre <= high[axis]) for axis, centre in zip((1, 0), centres))
        return torch.from_numpy(np.outer(rows, columns)).flatten().long()


# ---- 3. What is kept of a concept layer: peaks and counts, never the maps --------------------------------------------
class Tally:
    """Of K prototypes, background last, on a grid (h, w), with M parts. owners: 1, or where every class has prototypes of
    its own, which take turns in the maps, the number of classes."""

    def __init__(self, K, grid, M, owners=1):
        self.peaks = []                                                     # of (2, B, K-1, 2): clean and noisy
        self.maps = torch.zeros(owners, K - 1, *grid, dtype=torch.float64)  # sums over each owner's images
        self.patches = torch.zeros(2, K, dtype=torch.long)                  # outside and inside the box, by winner
        self.at_points = torch.zeros(K, M, dtype=torch.long)                # region x part at the key points

    def add(self, attention, clean, noisy, inside, patch, labels):
        """Maps (B, K, h, w) of the three views; inside (B, N), patch (B, M) and labels (B) as Views has them."""
        region, (K, M) = attention.argmax(1).flatten(1).cpu(), self.at_points.shape                         # (B, N)
        self.patches += torch.bincount((inside * K + region).flatten(), minlength=2 * K).view(2, K)
        cells = (region.gather(1, patch.clamp(min=0)) * M + torch.arange(M))[patch >= 0]    # of the table region x part
        self.at_points += torch.bincount(cells, minlength=K * M).view(K, M)
        self.peaks.append(torch.stack([find_peaks(maps[:, :-1]).cpu() for maps in (clean, noisy)]))
        self.maps.index_add_(0, labels % len(self.maps), clean[:, :-1].double().cpu())

    def summary(self, keypoints, labels, parts, seed):
        """The layer's metrics and controls. keypoints (n, M, 3) in the box view's frame.
        constant_location: each map replaced by its mean over the test images, one spot for all of them. (A prototype that
        one class has for itself is seen in that class's images alone, here and for the spread.)
        random_location: peaks drawn anew for every image. foreground: share of patches won by a concept.
        winning: share of concepts, the background not among them, that win any patch. peak_spreads: per concept, root
        mean square distance of its peaks from their mean; peak_spread: the mean of these. nmi, ari: the region at a
        visible key point against its part, over all of the test view, background counting as a region: the variant of
        Choudhury et al. (2021) and van der Klis et al. (2023) for birds, which have key points and no part masks, so
        that no other patch has a true part. parts_hit: per concept, the three parts it hits in most images, each with the
        share of the images that show it. What is None has its reason in reasons()."""
        peaks, noisy_peaks = torch.cat(self.peaks, 1)                                                     # (n, K-1, 2)
        n, concepts, _ = peaks.shape
        owner, rows = labels % len(self.maps), peaks.double().flatten(1)                                          # (n,)
        sums = torch.zeros(len(self.maps), rows.shape[1], dtype=torch.float64).index_add_(0, owner, rows)
        sizes = owner.bincount(minlength=len(self.maps)).clamp(min=1)[:, None]
        spread = (rows - (sums / sizes)[owner]).square().view(n, concepts, 2).sum(2).mean(0).sqrt()
        won, (outside, inside) = self.patches[:, :-1].sum(1), self.patches.sum(1)
        result = dict(
            prototypes=concepts + 1, foreground=percent(won.sum(), outside + inside), wins=self.patches.sum(0).tolist(),
            foreground_inside=percent(won[1], inside), foreground_outside=percent(won[0], outside),
            winning=percent((self.patches[:, :-1].sum(0) > 0).sum(), concepts),
            peak_spread=spread.mean().item(), peak_spreads=spread.tolist(), **dict.fromkeys(PART_METRICS))
        visible = keypoints[:, :, 2] > 0                                                                    # (n, M)
        if not visible.any():
            return result
        hits, noisy_hits = hits_of(peaks, keypoints), hits_of(noisy_peaks, keypoints)                    # (n, K-1, M)
        constant = hits_of(find_peaks(self.maps / sizes[..., None, None])[owner], keypoints)
        rng = np.random.default_rng(seed)
        drawn = (hits_of(torch.from_numpy(rng.integers(0, FRAME, peaks.shape)), keypoints) for _ in range(RANDOM_DRAWS))
        chance = np.mean([consistency(random, visible, labels) for random in drawn]).item()
        score, spot = consistency(hits, visible, labels), consistency(constant, visible, labels)
        count = hits.sum(0).double()                                                                        # (K-1, M)
        shares = 100 * count / visible.sum(0).clamp(min=1)
        best = (count + shares / 101).argsort(dim=1, descending=True, stable=True)[:, :3]   # equal counts: by their share
        nmi, ari = agreement(self.at_points)
        if len(self.maps) > 1:                                              # prototype k is another one in every class
            nmi, ari, best = None, None, best[:0]
        return result | dict(
            consistency=score, stability=stability(hits, noisy_hits, labels), constant_location=spot,
            over_constant=score - spot, random_location=chance, nmi=nmi, ari=ari,
            parts_hit=[[[parts[m], row[m].item()] for m in top if row[m]] for row, top in zip(shares, best)] or None)


PART_METRICS = "consistency stability constant_location over_constant random_location nmi ari parts_hit".split()
NO_PARTS = "the data has no key points (in CUB's layout: parts/parts.txt)"


def reasons(layer, parts, of_classes):
    """Why metrics of a layer, and so of every one, are None: {name: reason}; None where none is."""
    why = dict.fromkeys(PART_METRICS, "no key point is visible in any test image" if parts else NO_PARTS)
    if layer["consistency"] is not None:
        why |= dict.fromkeys(("nmi", "ari", "parts_hit"), "every class has prototypes of its own" if of_classes else
                             "fewer than two key points are visible in the test views")
    why |= dict(foreground_inside="no patch has its centre in a box",
                foreground_outside="no patch has its centre outside a box; in data without boxes all is inside")
    return {name: reason for name, reason in why.items() if layer[name] is None} or None


def percent(part, whole):
    return 100 * float(part) / float(whole) if whole else None


def join_ranks(correct, keypoints, tallies, world):
    """What every process counted on its run of images: as if one had seen them all in their order."""
    shards = [None] * world
    dist.all_gather_object(shards, (correct, keypoints, tallies))
    correct, keypoints, tallies = zip(*shards)
    for whole, *others in zip(*tallies):                                    # a layer's tally of every process
        for name in vars(whole):                                            # lists of peaks, tables of counts: all add
            setattr(whole, name, sum((getattr(tally, name) for tally in others), getattr(whole, name)))
    return sum(correct), torch.cat(keypoints), tallies[0]


# ---- 4. The evaluation: one pass, three forwards an image ------------------------------------------------------------
def checked(output):
    """The model's output. ValueError where its logits or maps are not finite: argmax would take NaN for a peak."""
    named = {f"the maps of layer {l}": maps for l, maps in enumerate(output.attention, 1)} | dict(logits=output.logits)
    for name, values in named.items():
        if not values.sum().isfinite():
            raise ValueError(f"{name}: not finite (NaN or infinite), expected numbers; try --no-amp, or train it again")
    return output


@torch.inference_mode()
def evaluate(model, folder, image_size, batch_size=32, workers=0, amp=False, seed=0, split="test", progress=True,
             recipe=None, gallery=None):
    """Accuracy, and every concept layer's metrics, on a split of a folder of data -> dict, as in metrics.json. The part
    metrics take two forwards, of the box without and with noise; accuracy and what is said of regions take a third, of
    the uncropped view: the classifier learnt from such, and only there is an outside of the box.
    amp: bf16 autocast. progress: bar and timing on the terminal. recipe: names the method in the protocol. gallery: a
    Gallery, shown every batch. What the data cannot give is None, and "unavailable" says why. Raises ValueError where
    the model's output is not finite."""
    device, training = next(model.parameters()).device, model.training
    views = Views(folder, split, image_size, seed, model.grid)
    parts, n, correct, keypoints, model_seconds, metric_seconds = views.test.parts, len(views), 0, [], 0.0, 0.0
    of_classes = isinstance(model, ivpt.ProtoPNet)                          # prototypes of the class take turns in the maps
    tallies = [Tally(K, model.grid, len(parts), model.num_classes if of_classes else 1) for K in model.prototypes]
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    progress = progress and rank == 0
    if progress and not parts:
        print("warning:", NO_PARTS, file=sys.stderr)
    mine = Subset(views, range(n * rank // world, n * (rank + 1) // world))  # every image counted once
    for batch in tqdm(DataLoader(mine, batch_size, num_workers=workers), split, disable=None if progress else True, leave=False):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            own = (batch["label"].to(device),) if of_classes else ()        # choose the maps shown, not the prediction
            outputs = [checked(model(batch[view].to(device), *own)) for view in ("image", "clean", "noisy")]
        correct += (outputs[0].logits.argmax(1).cpu() == batch["label"]).sum().item()   # waits for the device, too
        forwards = time.perf_counter()
        for tally, *maps in zip(tallies, *(output.attention for output in outputs)):
            tally.add(*maps, batch["inside"], batch["patch"], batch["label"])
        keypoints.append(batch["points"])
        counted = time.perf_counter()
        model_seconds, metric_seconds = model_seconds + forwards - began, metric_seconds + counted - forwards
        if gallery:
            gallery.add(outputs[0], batch)
            gallery.seconds += time.perf_counter() - counted
    model.train(training)
    began, keypoints = time.perf_counter(), torch.cat(keypoints or [torch.empty(0, len(parts), 3)])
    if world > 1:
        correct, keypoints, tallies = join_ranks(correct, keypoints, tallies, world)
    layers = [tally.summary(keypoints, views.test.labels, parts, (seed, i)) for i, tally in enumerate(tallies)]
    metric_seconds += time.perf_counter() - began
    if progress:
        print(f"{n} images: forwards {model_seconds:.1f} s, metrics {metric_seconds:.1f} s "
              f"({percent(metric_seconds, model_seconds):.1f} %)")
    head = max(0, len(layers) - 3)                       # the released program reports the third layer from the end
    return dict(
        accuracy=100 * correct / n, layers=layers, unavailable=reasons(layers[0], parts, of_classes),
        headline=dict(layer=head, consistency=layers[head]["consistency"], stability=layers[head]["stability"]),
        protocol=dict(recipe=recipe, data=Path(folder).name, split=split, images=n, classes=len(views.test.classes),
                      classes_with_images=len(views.test.labels.unique()), parts=len(parts), image_size=image_size,
                      grid=list(model.grid), prototypes=list(model.prototypes), headline_layer=head, amp=bool(amp),
                      frame=FRAME, half_size=HALF_SIZE, threshold=THRESHOLD, upsampling="bicubic, half-pixel centres",
                      seed=seed, noise_std=NOISE_STD, noise_clip=NOISE_CLIP, random_draws=RANDOM_DRAWS))


COLUMNS = (("K", "prototypes", "d"), ("consist", "consistency", ".1f"), ("const.loc", "constant_location", ".1f"),
           ("random", "random_location", ".1f"), ("beats c.", "over_constant", "+.1f"), ("stable", "stability", ".1f"),
           ("spread", "peak_spread", ".0f"), ("winning", "winning", ".0f"), ("fg", "foreground", ".1f"),
           ("fg in", "foreground_inside", ".1f"), ("fg out", "foreground_outside", ".1f"), ("NMI", "nmi", ".1f"),
           ("ARI", "ari", ".1f"))
LEGEND = """* the headline. const.loc: consistency of one fixed spot, the peak of each prototype's mean map; random: of
random spots; beats c.: consistency above const.loc. stable: stability; a spot that never moves has 100. spread: root
mean square distance of a concept's peaks from their mean, px of 224, averaged over the concepts. winning: concepts
that win any patch, the background not among them. fg, fg in, fg out: patches won by concepts, in all, inside and
outside the box. NMI, ARI: regions against parts at the visible key points. All in percent, but K and spread."""


def table(metrics):
    """For the terminal and for the gallery."""
    text = f"accuracy {metrics['accuracy']:.1f} % on {metrics['protocol']['images']} images\n layer"
    text += "".join(f"{title:>10}" for title, *_ in COLUMNS)
    for i, layer in enumerate(metrics["layers"]):
        cells = ("-" if layer[key] is None else format(layer[key], form) for _, key, form in COLUMNS)
        text += f"\n{i + 1:>5}{' *'[i == metrics['headline']['layer']]}" + "".join(f"{cell:>10}" for cell in cells)
    why = metrics["unavailable"] or {}
    notes = (f"\nnot available: {', '.join(name for name in why if why[name] == reason)}:\n{reason}"
             for reason in dict.fromkeys(why.values()))
    return f"{text}\n{LEGEND}{''.join(notes)}"


# ---- 5. Pictures: regions in colour, concepts in the spotlight -------------------------------------------------------
COLOURS = 255 * np.array([colorsys.hsv_to_rgb((k * 3 + k // 8 / 2) % 8 / 8, 0.85 - k // 16 / 9, (0.95, 0.6)[k // 8 % 2])
                          for k in range(64)])                              # concept k has COLOURS[k % 64]
CSS = ["rgb({:.0f},{:.0f},{:.0f})".format(*colour) for colour in COLOURS]
CHIP = "<i style='background:{}'></i>".format


def enlarge(region, S):
    """(h, w) -> (S, S)."""
    return region[np.arange(S) * region.shape[0] // S][:, np.arange(S) * region.shape[1] // S]


def paint(picture, region, K):
    """picture (S, S, 3), region (h, w) of winners -> image: every concept in its colour, the background pale."""
    region, grey = enlarge(region, len(picture)), picture.mean(2, keepdims=True)  # or its hues mix in
    result = np.where((region < K - 1)[..., None], 0.45 * grey + 0.55 * COLOURS[region % 64], 0.3 * grey + 178)
    return Image.fromarray(result.astype(np.uint8))


def spotlight(picture, mask, k):
    """The patches that concept k claims, mask (h, w), framed in its colour; the rest grey."""
    mask, frame = enlarge(mask, len(picture)), max(1, len(picture) // 75)
    inner = np.all([mask & np.roll(mask, shift, axis) for shift in (-frame, frame) for axis in (0, 1)], 0)
    result = np.where(mask[..., None], picture, 0.3 * picture.mean(2, keepdims=True) + 90)
    result[mask & ~inner] = COLOURS[k % 64]
    return Image.fromarray(result.astype(np.uint8)).resize((112, 112), Image.Resampling.LANCZOS)


def strip(picture, regions, prototypes, size, points=()):
    """picture (S, S, 3) with its visible key points (M, 3), then the regions of every layer, in one row."""
    image, r = Image.fromarray(picture), len(picture) / 75
    for x, y, _ in (point for point in points if point[2]):
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill="#ffd400", outline="black")
    panels = [image, *(paint(picture, region, K) for region, K in zip(regions, prototypes))]
    row = Image.new("RGB", (len(panels) * (size + 6) - 6, size), "white")
    for i, panel in enumerate(panels):
        row.paste(panel.resize((size, size), Image.Resampling.LANCZOS), (i * (size + 6), 0))
    return row


# ---- 6. The gallery: gathered while evaluating, drawn after ----------------------------------------------------------
class Gallery:
    """What the pages need of a pass over the test set: a few images' regions, each prototype's nine strongest claims,
    the mean grouping. Its size does not depend on the number of test images."""

    def __init__(self, model, images, examples=24):
        self.of_classes = isinstance(model, ivpt.ProtoPNet)
        self.prototypes, self.examples = model.prototypes, {}               # index -> regions, prediction, probability
        self.chosen = set(np.linspace(0, images - 1, min(examples, images)).astype(int).tolist())
        self.best = [(torch.zeros(K - 1, 0), torch.zeros(K - 1, 0).long(), torch.zeros(K - 1, 0, *model.grid).bool())
                     for K in model.prototypes]                             # strength, index, patches of each claim
        self.groups, self.seconds = [], 0.0                                 # (K-1, G) sums of each prompted layer

    def add(self, output, batch):
        """A claim is a prototype's attention, summed over the patches it wins. Groups of empty regions do not count."""
        regions = [a.argmax(1).cpu() for a in output.attention]                                             # (B, h, w)
        self.groups = self.groups or [torch.zeros(group.shape[1:], dtype=torch.float64) for group in output.groups]
        for l, (a, region) in enumerate(zip(output.attention, regions)):
            K = a.shape[1] - 1
            won = region == torch.arange(K)[:, None, None, None]                                       # (K-1, B, h, w)
            claim = (a[:, :K].float().cpu().transpose(0, 1) * won).sum((2, 3)), batch["index"].expand(K, -1), won
            strength, index, patches = (torch.cat(pair, 1) for pair in zip(self.best[l], claim))
            order, rows = strength.argsort(dim=1, descending=True, stable=True)[:, :9], torch.arange(K)[:, None]
            self.best[l] = strength[rows, order], index[rows, order], patches[rows, order]
            if l < len(self.groups):
                self.groups[l] += (output.groups[l].double().cpu() * won.any(3).any(2).T[..., None]).sum(0)
        chances, guesses = output.logits.float().softmax(1).cpu().max(1)
        for i, index in enumerate(batch["index"].tolist()):
            if index in self.chosen:
                self.examples[index] = [r[i].numpy() for r in regions], int(guesses[i]), float(chances[i])

    def draw(self, folder, dataset):
        """The pictures: nine tiles for each prototype, a strip for each example. dataset: the test view."""
        def picture(index):
            image, _, points, _ = dataset[index]
            return data.denormalize(image).permute(1, 2, 0).numpy(), points.tolist()

        for l, (strength, index, patches) in enumerate(self.best):
            for k, rank in (strength > 0).nonzero().tolist():
                tile = spotlight(picture(index[k, rank])[0], patches[k, rank].numpy(), k)
                tile.save(folder / f"concept_{l + 1}_{k + 1}_{rank}.jpg", quality=88)
        for index, (regions, _, _) in self.examples.items():
            pixels, points = picture(index)
            strip(pixels, regions, self.prototypes, 190, points).save(folder / f"image_{index}.jpg", quality=88)

    def write(self, folder, metrics, dataset, log):
        """folder/index.html and its pictures. dataset: the test view; log: the run's log.jsonl."""
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.draw(folder / "pictures", dataset)
        sections = dict(Numbers=f"<pre>{html.escape(table(metrics))}</pre>", Regions=self.regions(dataset),
                        Concepts=self.concepts(metrics["layers"]), Hierarchy=self.hierarchy(), Training=curves(log))
        links = "".join(f"<a href='#{title}'>{title}</a>" for title in sections)
        body = "".join(f"<section id={title}><h2>{title}</h2>{text}</section>" for title, text in sections.items())
        (folder / "index.html").write_text(
            f"<!doctype html><meta charset=utf-8><title>IVPT</title><style>{STYLE}</style>"
            f"<h1>What each concept sees</h1><nav>{links}</nav>{body}\n", encoding="utf-8", errors="replace")

    def regions(self, dataset):
        names = [html.escape(re.sub(r"^\d+\.", "", name).replace("_", " ")) for name in dataset.classes]
        chips = "".join(f"{CHIP(CSS[k % 64])}{k + 1} " for k in range(max(self.prototypes) - 1))
        heads = "".join(f"<b>layer {l + 1}</b>" for l in range(len(self.best)))
        text = ("<p>The image with its key points, then the regions of every layer. Every patch goes to the concept "
                "that claims it most; pale is background. Numbers and colours start afresh in every layer. "
                + "Rest the pointer on a row to read the names of its key points." * bool(dataset.parts) + "</p>"
                + "<p>The data has no key points: no dots, and no part names below.</p>" * (not dataset.parts)
                + f"<div class=legend>Concepts: {chips}<div><b>image</b>{heads}</div></div>")
        for index, (_, guess, chance) in sorted(self.examples.items()):
            truth = int(dataset.labels[index])
            look, mark = ("right", "✓") if guess == truth else ("wrong", "✗")
            _, _, points, _ = dataset[index]
            seen = ", ".join(dataset.parts[m] for m in points[:, 0].argsort() if points[m, 2])
            title = f"title='From left to right: {html.escape(seen)}'" * bool(seen)
            text += (f"<figure><img src='pictures/image_{index}.jpg' alt='' {title}>predicted <b>{names[guess]}</b> "
                     f"({100 * chance:.0f} %) <span class={look}>{mark} truly {names[truth]}</span></figure>")
        return text

    def concepts(self, layers):
        text = ("<p>The nine test images in which each prototype claims most: its patches in colour. Below, the three "
                "parts that it hits in most images; behind a part, in how many of the images that show it the metrics' "
                "window covers it, the 73 x 73 of the box's 224 x 224 pixels around the peak of the concept's map, "
                "whatever its region. A small spread: one fixed spot.</p>"
                + "<p>Every class has prototypes of its own: concept 1 is the first one of the image's class.</p>" * self.of_classes)
        for l, layer in enumerate(layers, 1):
            silent = ", ".join(str(k + 1) for k, won in enumerate(layer["wins"][:-1]) if not won)
            text += f"<h3>Layer {l}</h3>" + f"<p>Never win a patch: {silent}.</p>" * bool(silent) + "<div class=cards>"
            for k in np.flatnonzero(layer["wins"][:-1]):
                parts = ", ".join(f"{part}\u00a0{share:.0f}\u00a0%" for part, share in (layer["parts_hit"] or {k: ()})[k])
                tiles = "".join(f"<img src='pictures/concept_{l}_{k + 1}_{rank}.jpg' alt=''>"
                                for rank in range((self.best[l - 1][0][k] > 0).sum()))
                wins, spread = 100 * layer["wins"][k] / sum(layer["wins"]), layer["peak_spreads"][k]
                text += (f"<figure><div class=tiles>{tiles}</div>{CHIP(CSS[k % 64])}<b>{k + 1}</b> {html.escape(parts)}"
                         f"<br><small>{wins:.3g} % of patches, peak spread {spread:.0f} px</small></figure>")
            text += "</div>"
        return text

    def hierarchy(self):
        trees = "".join(f"<div><h3>Layer {l + 1}</h3>{self.tree(l)}</div>" for l in range(len(self.groups)))
        if not trees:
            return "<p>This model groups nothing: no hierarchy.</p>"
        return ("<p>How a layer's fine concepts (left) flow into the last layer's coarse ones (right): mean grouping"
                " over images where a concept wins a patch, its largest in percent; flows of 5 % or less are not drawn."
                f"</p><div class='cards trees'>{trees}</div>")

    def tree(self, l):
        """SVG: the fine concepts that ever win, by the coarse one they join most; curves as wide as their weights."""
        weight = (self.groups[l] / self.groups[l].sum(1, keepdim=True).clamp(min=1e-9)).numpy()             # (K-1, G)
        G, svg, order = weight.shape[1], "", sorted(np.flatnonzero(weight.any(1)), key=lambda k: weight[k].argmax())
        height = max(44 * len(order), 60 * G)
        middle = [height * (g + 0.5) / G for g in range(G)]
        for y, k in zip(range(22, height, 44), order):
            for g in np.flatnonzero(weight[k] > 0.05):
                svg += (f"<path d='M66 {y}C125 {y} 125 {middle[g]} 184 {middle[g]}' style='stroke:{CSS[g % 64]};"
                        f"stroke-width:{12 * weight[k, g]:.1f};opacity:{0.3 + 0.6 * weight[k, g]:.2f}'/>")
            svg += self.thumbnail(l, k, 26, y, 40, 6) + f"<text x='70' y='{y - 9}'>{100 * weight[k].max():.0f}</text>"
        svg += "".join(self.thumbnail(len(self.groups), g, 184, y, 56, 246) for g, y in enumerate(middle))
        return f"<svg viewBox='0 0 264 {height}'>{svg}</svg>"

    def thumbnail(self, l, k, x, y, size, label_x):
        """A concept's strongest claim, if it has any, framed in its colour, centred on the line y."""
        top, won = y - size / 2, bool(self.best[l][0][k].any())
        image = f"<image x='{x}' y='{top}' width='{size}' href='pictures/concept_{l + 1}_{k + 1}_0.jpg'/>"
        return (image * won + f"<path d='M{x} {top}h{size}v{size}h-{size}z' style='stroke:{CSS[k % 64]}'/>"
                f"<text x='{label_x}' y='{y + 4}'>{k + 1}</text>")


def curves(log):
    """Small multiples of every finite number in log.jsonl, as SVG, one step a row; torn lines are left out."""
    rows, text = [], ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError, AttributeError, OverflowError):
            rows.append({key: value for key, value in json.loads(line).items()
                         if isinstance(value, (int, float)) and math.isfinite(value)})
    for key in dict.fromkeys(key for row in rows for key in row if key != "epoch"):
        points = [(5 + 190 * i / max(1, len(rows) - 1), row[key]) for i, row in enumerate(rows) if key in row]
        values = [value for _, value in points]
        low, span = min(values), max(values) - min(values) or 1
        path = " ".join(f"{x:.1f},{75 - 65 * (value - low) / span:.1f}" for x, value in points)
        text += (f"<figure>{html.escape(key.replace('_', ' '))} <b>{values[-1]:.4g}</b><svg viewBox='0 0 200 96'>"
                 f"<path d='M{path}h0' style='stroke:#2563a8'/><text x='5' y='92'>{low:.3g} to {max(values):.3g}</text>"
                 f"<text x='195' y='92' text-anchor='end'>epochs 1 to {len(rows)}</text></svg></figure>")
    note = "Bold: the last value; below: the range." if rows else "No numbers in the run's log.jsonl: no curves."
    return f"<p>{note}</p><div class=cards>{text}</div>"


STYLE = """body{font:15px/1.5 sans-serif;color:#222;background:#fafafa;max-width:1180px;margin:auto;padding:9px}
h2{border-top:1px solid #ddd;padding-top:20px;margin-top:36px}h3{margin:22px 0 6px}nav a{margin-right:16px}
small,text{color:#555;fill:#555;font-size:12px}figure{margin:0 0 14px}img{display:block;width:100%}
i{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 4px 0 8px}pre{font-size:12px;overflow-x:auto}
.right{color:#17663a}.wrong{color:#a32020}.tiles{display:grid;gap:4px;grid-template-columns:repeat(3,1fr)}
.legend{position:sticky;top:0;background:#fafafa;padding:6px 0 2px}path{fill:none;stroke-width:2;stroke-linecap:round}
.legend div{display:grid;gap:6px;grid-auto-flow:column;grid-auto-columns:1fr}.trees text{font-size:8px}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(260px,1fr))}
.cards figure{background:#fff;border:1px solid #ddd;border-radius:8px;padding:8px;margin:0}
.trees{grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr))}"""


# ---- 7. One image explained ------------------------------------------------------------------------------------------
@torch.inference_mode()
def explain(model, image, classes, amp=False):
    """image (3, S, S) normalised -> top [(class, percent)], the five likeliest; votes [G]; regions [(h, w)] by layer.
    A coarse concept's vote is its score of the winner less that of the runner-up, over G: above zero it speaks for the
    winner, below zero against it, and the votes sum to the margin between the two logits. ProtoPNet's votes are those of
    the winner's own prototypes; a last one, of all the others, completes the sum. amp: bf16 autocast."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        output = checked(model(image[None].to(device)))
    chances, order = output.logits[0].float().softmax(0).sort(descending=True, stable=True)
    scores = output.logits[:0] if output.concept_logits is None else output.concept_logits[0].float()       # (G, C)
    votes = (scores[:, order[0]] - scores[:, order[:2][-1]]) / max(1, len(scores))
    if isinstance(model, ivpt.ProtoPNet):
        margin = (output.logits[0, order[0]] - output.logits[0, order[:2][-1]]).float()
        votes = torch.cat([votes, (margin - votes.sum())[None]])
    return ([(classes[c], 100 * chance) for c, chance in zip(order[:5].tolist(), chances.tolist())], votes.tolist(),
            [a[0].argmax(0).cpu().numpy() for a in output.attention])


def words(top, votes, regions, prototypes):
    """The explanation as text."""
    text = "".join(f"{rank}. {name}  {chance:.1f} %\n" for rank, (name, chance) in enumerate(top, 1))
    for l, (region, K) in enumerate(zip(regions, prototypes), 1):
        share = np.bincount(region.flatten(), minlength=K) * 100 / region.size
        won = ", ".join(f"{k + 1} ({share[k]:.0f} %)" for k in share[:-1].argsort()[::-1] if share[k])
        text += f"layer {l}: concepts {won or 'none'}; background {share[-1]:.0f} %\n"
    if not votes:
        return text + "its prompts do not vote: the classes are read from the cls token"
    text += f"votes of the last layer's concepts for {top[0][0]} against {top[:2][-1][0]}, in all {sum(votes):+.2f}:\n"
    names = [f"concept {g}" for g in range(1, prototypes[-1])] + ["other classes' prototypes"]
    return text + "\n".join(f"{name} {vote:+.2f}" for name, vote in zip(names, votes))


def draw_explanation(picture, top, votes, regions, prototypes):
    """The picture, the regions of every layer, the explanation, bars beside the votes, the colours' numbers."""
    row, text = strip(picture, regions, prototypes, 224), words(top, votes, regions, prototypes)
    lines = text.count("\n") + 1
    sheet = Image.new("RGB", (row.width + 40, 300 + 22 * lines), "white")
    sheet.paste(row, (20, 20))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for l in range(len(prototypes)):
        draw.text((250 + 230 * l, 1), f"layer {l + 1}", "black", font)
    for k in range(max(prototypes) - 1):
        x, y = 20 + 45 * k, 270 + 22 * lines
        draw.rectangle((x, y, x + 15, y + 15), tuple(COLOURS[k % 64].astype(int)))
        draw.text((x + 20, y - 2), str(k + 1), "black", font)
    for i, line in enumerate(text.split("\n")):
        draw.text((20, 260 + 22 * i), line, "black", font)
    for g, vote in enumerate(votes):
        y, length = 262 + 22 * (lines - len(votes) + g), 250 * vote / (max(map(abs, votes)) or 1)
        draw.rectangle((450 + min(0, length), y, 450 + max(0, length), y + 15), tuple(COLOURS[g % 64].astype(int)))
    return sheet


def explain_files(model, files, classes, image_size, amp, folder):
    """Explain every file; the pictures go into `folder`, or beside the images where it is None."""
    files, targets = [Path(file) for file in files], []
    images = [data.resize_short(data.read_image(file, upright=True), image_size) for file in files]
    for file, crop in zip(files, (data.centre_crop(image, image_size) for image in images)):
        target = writable(folder or file.parent, "--visualize") / f"{file.stem}_explained.png"
        while target in targets:                                            # a.jpg and a.png, or a.jpg of two folders
            target = target.with_stem(f"{target.stem}_{len(targets) + 1}")
        targets.append(target)
        result = *explain(model, data.to_tensor(crop), classes, amp), model.prototypes
        draw_explanation(np.asarray(crop), *result).save(target)
        print(f"\n{file}, drawn in {target}\n{words(*result)}")


# ---- 8. The command line ---------------------------------------------------------------------------------------------
def writable(folder, what):
    """The folder, made if need be. ValueError, before any work, where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{what} {folder}: cannot be written ({error.strerror}); expected a folder of yours") from None


def local_device(kind):
    """This process's device under torchrun: the CPU, or a GPU of its own. kind: cpu or cuda."""
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if kind == "cuda" and local >= found:
        raise ValueError(f"device cuda: {found} GPUs found; take the CPU (train.py --device cpu), or start fewer processes")
    return torch.device(kind, local if kind == "cuda" else None)


def start_processes(device):
    """torchrun's environment -> (rank, world); one process alone is rank 0 of 1. For train.py, too."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world


def fetch_weights(name):
    """Downloads a named backbone that is not there. Unlike torch.hub it resumes, tries again, and locks others out."""
    url = ivpt.weights_url(name)
    if url and not ivpt.weights_file(url).is_file():
        data.download(url, ivpt.weights_file(url), load=lambda file: ivpt.read_torch_file(file, "weights"))


def complaint(error, memory):
    """An exception as a line for the user; None for a bug of ours, which keeps its traceback. memory: what helps where it
    ran out. A loader process hands its exception on with the traceback before it."""
    lines = (str(error).strip() or repr(error)).splitlines()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):  # a CPU's words
        return f"out of memory ({lines[0][:90]}); {memory}"
    if isinstance(error, (ValueError, OSError)):
        return re.sub(r"^\w+Error: ", "", lines[-1])
    if "DataLoader worker (pid" in str(error):                              # killed
        return f"{lines[-1]}; if memory ran out, lower --workers"
    return "another process has ended; its own line says why" if "by peer" in str(error) else None


def run(o):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (o.visualize or o.image):
        raise ValueError("--visualize, --image: one process draws; start this without torchrun")
    for name, least in (("batch_size", 1), ("workers", 0), ("seed", 0)):
        if getattr(o, name) is not None and getattr(o, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)}: expected {least} or more")
    home, out = Path(o.ckpt).parent, writable(Path(o.visualize), "--visualize") if o.visualize else None
    model, checkpoint = ivpt.load_checkpoint(o.ckpt, o.weights, fetch_weights)
    device = local_device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    trained, classes, size = checkpoint["options"], checkpoint["classes"], checkpoint["options"]["image_size"]
    amp, seed = (trained[key] if vars(o)[key] is None else vars(o)[key] for key in ("amp", "seed"))
    if o.image:
        return explain_files(model, o.image, classes, size, amp, out)
    writable(home, "--ckpt")                                                # metrics.json goes there
    if out:
        writable(out / "pictures", "--visualize")
    root = o.data_root or (trained["data_root"] if o.data in (None, trained["data"]) else None)
    folder = data.find(o.data or trained["data"], root)
    dataset = data.Images(folder, "test", "test", size)
    if dataset.classes != classes:
        raise ValueError(f"{folder}: found {len(dataset.classes)} classes, expected the {len(classes)} of {o.ckpt}; "
                         "name its data by --data and --data-root")
    gallery = Gallery(model, len(dataset)) if out else None
    recipe = {key: trained.get(key) for key in METHOD}
    rank, _ = start_processes(device)                                       # nothing is fetched from here on
    metrics = evaluate(model, folder, size, o.batch_size, o.workers, amp, seed, recipe=recipe, gallery=gallery)
    if rank:
        return
    print(f"\n{table(metrics)}")
    ivpt.save(home / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    if gallery:
        began = time.perf_counter() - gallery.seconds
        gallery.write(out, metrics, dataset, home / "log.jsonl")
        print(f"gallery gathered and drawn in {time.perf_counter() - began:.1f} s: {out / 'index.html'}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--ckpt", required=True, help="last.pt of a run")
    p.add_argument("--visualize", metavar="DIR", help="write a gallery of every concept: DIR/index.html")
    p.add_argument("--image", metavar="FILE", nargs="+", help="explain these images instead of evaluating")
    p.add_argument("--weights", help="the backbone's file, where it is not where training found it")
    p.add_argument("--data", help="toy, cub, partimagenet or a folder; default: what the checkpoint was trained on")
    p.add_argument("--data-root", help="folder of the data; default: as in training")
    p.add_argument("--batch-size", type=int, default=32, help="images a forward; changes no number")
    p.add_argument("--workers", type=int, default=0, help="processes that read images; changes no number")
    p.add_argument("--seed", type=int, help="of the noise and of the random-location control; default: as in training")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast; default: as in training")
    p.error, code = data.refuse, 2
    try:
        return run(p.parse_args(argv))
    except Exception as error:
        if not (reason := complaint(error, "lower --batch-size")):
            raise
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print("error:", reason, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                                # a terminal may lack a file name's letters
    main()
