"""Evaluate IVPT (ICLR 2026, arXiv 2503.06084): accuracy, consistency, stability, their controls.

    python evaluate.py --ckpt runs/cub/last.pt                       # table, and RUN/metrics.json
    python evaluate.py --ckpt runs/cub/last.pt --visualize pictures  # and pictures/index.html
    python evaluate.py --ckpt runs/cub/last.pt --image bird.jpg      # why it got its class
    torchrun --nproc_per_node=4 evaluate.py --ckpt runs/cub/last.pt  # the same from four GPUs

Consistency and stability are those of Huang et al. 2023 (arXiv 2212.05946), for every layer. On
CUB the hit test matches their code, except where a box leaves the image. With fractional
annotations results differ slightly: their code truncates them. Letters in shapes: see model.py.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import data
import model as ivpt

FRAME = 224         # peaks and key points are compared in a square of this side, pixels
HALF_SIZE = 36      # the region around a peak reaches this far to every side
THRESHOLD = 0.8     # share of images in which a consistent prototype hits its part
NOISE_STD, NOISE_CLIP = 0.2, 0.25  # of the noise on the normalised image
RANDOM_DRAWS = 10   # the random control is a mean over these
PART_METRICS = ("consistency", "stability", "constant_location", "over_constant",
                "random_location", "comprehensiveness", "parts_hit")  # None without key points


# ---- 1. The metrics: maps -> peaks -> hit parts -> percentages ---------------------------------
def upsampling_matrix(side):
    """(FRAME, side) fp64: bicubic upsampling of a column, with half-pixel centres."""
    identity = torch.eye(side, dtype=torch.float64)
    return F.interpolate(identity[None, None], size=(FRAME, side), mode="bicubic")[0, 0]


def find_peaks(maps):
    """maps (n, K, h, w) -> (n, K, 2): x, y of each map's maximum once upsampled to FRAME x FRAME,
    the first one row by row. fp64 rounded to fp32 lets equal patches tie exactly."""
    n, K, h, w = maps.shape
    rows = upsampling_matrix(h).to(maps.device)
    columns = upsampling_matrix(w).T.to(maps.device)
    first = []
    for small in maps.flatten(0, 1):  # one map at a time stays in a CPU's cache
        full = rows @ small.double() @ columns  # (FRAME, FRAME)
        first.append(full.float().argmax())
    first = torch.stack(first).view(n, K)
    return torch.stack([first % FRAME, first // FRAME], dim=2)


def hits_of(peaks, keypoints, half_size=HALF_SIZE):
    """peaks (n, K, 2), keypoints (n, M, 3) in the frame -> bool (n, K, M): the visible parts that
    lie in each prototype's region, peak +- half_size clipped to [0, FRAME], ends inclusive."""
    points = keypoints[:, None, :, :2]  # (n, 1, M, 2)
    visible = keypoints[:, None, :, 2] > 0
    near = (points - peaks[:, :, None]).abs() <= half_size
    in_frame = (points >= 0) & (points <= FRAME)
    return (near & in_frame).all(3) & visible


def part_hits(attention, keypoints, half_size=HALF_SIZE):
    """hits_of the peaks of foreground maps (n, K, h, w)."""
    return hits_of(find_peaks(attention).to(keypoints.device), keypoints, half_size)


def class_sums(values, labels):
    """values (n, ...), labels (n,) -> fp64 sums over each class that has images, (C, ...)."""
    labels = torch.as_tensor(labels, device=values.device)
    if len(labels) == 0:
        raise ValueError("consistency, stability: no images, expected the hits of a test set")
    classes, position = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), *values.shape[1:], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, position, values.double())


def consistency(hits, visible, labels):
    """Percent of (class, prototype) pairs that keep to one part: the prototype hits it in at least
    80 % of the class's images that show it. hits (n, K, M), visible (n, M), labels (n,)."""
    visible = visible.bool()
    hit = class_sums(hits.bool() & visible[:, None], labels)  # (C, K, M)
    seen = class_sums(visible, labels)  # (C, M)
    share = hit / seen[:, None].clamp(min=1)
    consistent = (share >= THRESHOLD).any(2)  # (C, K)
    return 100 * consistent.double().mean().item()


def stability(hits, noisy_hits, labels):
    """Percent of a class's images in which noise leaves a prototype's set of hit parts unchanged,
    averaged over (class, prototype) pairs. As in Huang et al.'s code, a prototype that hits nothing
    both times counts as unchanged. hits, noisy_hits (n, K, M), labels (n,)."""
    unchanged = (hits == noisy_hits).all(2)  # (n, K)
    images = class_sums(torch.ones_like(unchanged), labels)
    share = class_sums(unchanged, labels) / images  # (C, K)
    return 100 * share.mean().item()


def distinctiveness(peaks):
    """peaks (n, K, 2) -> percent: 100 less the mean overlap (intersection over union) of the
    regions of two prototypes in an image (Zhu et al., arXiv 2503.10247). None for one prototype."""
    K = peaks.shape[1]
    if K == 1:
        return None
    side = 2 * HALF_SIZE  # here regions are not clipped, as in Zhu et al.'s code
    offset = (peaks[:, :, None] - peaks[:, None]).abs()  # (n, K, K, 2)
    shared = (side - offset).clamp(min=0).prod(3)
    overlap = shared / (2 * side ** 2 - shared)  # (n, K, K)
    first, second = torch.triu_indices(K, K, offset=1)  # every pair once
    return 100 - 100 * overlap[:, first, second].mean().item()


def comprehensiveness(hits, visible):
    """Percent of the visible parts that some prototype hits. hits (n, K, M), visible (n, M). Zhu et
    al. compare maps with a mask of the object instead, which CUB's lists do not hold."""
    return 100 * (hits.any(1).sum() / visible.sum()).item()


# ---- 2. The three views of a test image --------------------------------------------------------
class Views(Dataset):
    """A test image as the classifier sees it, and cropped to its box without and with noise.
    The noise depends on (seed, index) alone: batch size, workers and order change nothing."""

    def __init__(self, folder, split, image_size, seed, grid):
        self.test = data.Images(folder, split, "test", image_size)
        self.box = data.Images(folder, split, "box", image_size, frame=FRAME)
        self.image_size, self.seed, self.grid = image_size, seed, grid

    def __len__(self):
        return len(self.test)

    def __getitem__(self, index):
        picture = self.test.read(index)  # decoded once for all views
        image, label, _, _ = self.test.item(index, picture)
        clean, _, keypoints, _ = self.box.item(index, picture)
        rng = np.random.default_rng((self.seed, index))
        noise = NOISE_STD * torch.from_numpy(rng.standard_normal(clean.shape, np.float32))
        noisy = clean + noise.clamp(-NOISE_CLIP, NOISE_CLIP)
        inside = self.inside_box(index, picture.size)
        return dict(image=image, clean=clean, noisy=noisy, inside=inside, label=label,
                    keypoints=keypoints, index=index)

    def inside_box(self, index, size):
        """bool (h, w): the patches of the test view whose centre is in the box of the image.
        size: width and height of its file."""
        x, y, width, height = self.test.boxes[index].tolist()
        corners = np.array([[x, y], [x + width, y + height]])
        (left, top), (right, bottom) = data.test_points(corners, size, self.image_size)
        h, w = self.grid
        centre_y = (torch.arange(h) + 0.5) * self.image_size / h
        centre_x = (torch.arange(w) + 0.5) * self.image_size / w
        in_rows = (centre_y >= top) & (centre_y <= bottom)
        in_columns = (centre_x >= left) & (centre_x <= right)
        return in_rows[:, None] & in_columns


# ---- 3. One pass over the images, three forwards each ------------------------------------------
def forward(model, images, labels=None, amp=False):
    """-> Output of a batch. Where every class has prototypes of its own, its maps are those of the
    labels, or without labels those of the predictions. Raises ValueError where it is not finite:
    argmax would take NaN for a peak."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        if model.class_specific and labels is not None:
            output = model(images.to(device), labels.to(device))
        else:
            output = model(images.to(device))
    total = output.logits.sum() + sum(maps.sum() for maps in output.attention)
    if not total.isfinite():
        raise ValueError("the model's output is not finite; try --no-amp, or train it again")
    return output


def collect(model, views, owners, batch_size, workers, amp, gallery):
    """One pass over this process's share of the n images -> a list of dicts of tensors, one of the
    whole model, then one a layer. What belongs to another process's images is 0, so that the sum
    over the processes is the whole. owners: see evaluate."""
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    n = len(views)
    begin = n * rank // world
    end = n * (rank + 1) // world
    loader = DataLoader(Subset(views, range(begin, end)), batch_size, num_workers=workers)

    correct = torch.tensor(0)
    keypoints = torch.zeros(n, len(views.test.parts), 3)
    num_owners = int(owners.max()) + 1
    layers = []
    for K in model.prototypes:
        layers.append(dict(
            peaks=torch.zeros(n, K - 1, 2, dtype=torch.long),
            noisy_peaks=torch.zeros(n, K - 1, 2, dtype=torch.long),
            won_inside=torch.zeros(K, dtype=torch.long),  # patches won inside the box
            won_outside=torch.zeros(K, dtype=torch.long),
            map_sums=torch.zeros(num_owners, K - 1, *model.grid, dtype=torch.float64)))
    hide = True if rank else None  # None: hidden where no terminal shows it
    for batch in tqdm(loader, leave=False, disable=hide):
        index, labels, inside = batch["index"], batch["label"], batch["inside"]
        # The classifier learnt from uncropped views, and only these have an outside of the box.
        image = forward(model, batch["image"], labels, amp)
        clean = forward(model, batch["clean"], labels, amp)
        noisy = forward(model, batch["noisy"], labels, amp)
        correct += (image.logits.argmax(1).cpu() == labels).sum()
        keypoints[index] = batch["keypoints"]
        for l, layer in enumerate(layers):
            K = model.prototypes[l]
            winners = image.attention[l].argmax(1).cpu()  # (B, h, w)
            clean_maps = clean.attention[l][:, :-1]
            noisy_maps = noisy.attention[l][:, :-1]
            layer["peaks"][index] = find_peaks(clean_maps).cpu()
            layer["noisy_peaks"][index] = find_peaks(noisy_maps).cpu()
            layer["won_inside"] += torch.bincount(winners[inside], minlength=K)
            layer["won_outside"] += torch.bincount(winners[~inside], minlength=K)
            layer["map_sums"].index_add_(0, owners[index], clean_maps.double().cpu())
        if gallery:
            gallery.add(image, index)
    return [dict(correct=correct, keypoints=keypoints), *layers]


def add_processes(found):
    """The sums over all processes of what collect returned."""
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    totals = []
    for dicts in zip(*shares):  # the same dict of every process
        totals.append({name: sum(d[name] for d in dicts) for name in dicts[0]})
    return totals


# ---- 4. From what was collected to the metrics -------------------------------------------------
def foreground(wins):
    """wins (K,): patches won, the background last -> percent won by concepts."""
    total = wins.sum().item()
    if total == 0:  # no patch is inside, or none outside
        return None
    return 100 * (total - wins[-1].item()) / total


def peak_spreads(peaks, owners):
    """peaks (n, K-1, 2) -> (K-1,): root mean square distance of each concept's peaks from their
    mean over the images of an owner, pixels of the frame."""
    distances = torch.zeros(peaks.shape, dtype=torch.float64)
    for owner in owners.unique():
        own = peaks[owners == owner].double()
        distances[owners == owner] = own - own.mean(0)
    return distances.square().sum(2).mean(0).sqrt()


def parts_hit(hits, visible, parts):
    """hits (n, K-1, M), visible (n, M) -> for each concept the three parts that it hits in most
    images, a list of [name, percent of the images that show the part]."""
    counts = hits.sum(0).double()  # (K-1, M)
    shares = 100 * counts / visible.sum(0).clamp(min=1)
    result = []
    for count, share in zip(counts.tolist(), shares.tolist()):
        ranking = sorted(zip(count, share, parts), key=lambda hit: hit[:2], reverse=True)
        result.append([[name, percent] for _, percent, name in ranking[:3] if percent > 0])
    return result


def layer_metrics(layer, keypoints, labels, owners, parts, seed):
    """A layer's dict from collect, keypoints (n, M, 3) -> its metrics, a dict.
    A map that looks at one spot in all images is perfectly stable and can be consistent. Two
    controls say what place alone earns. constant_location scores the peak of each prototype's mean
    map over the test images, random_location peaks drawn anew for every image. A prototype that
    follows the object moves its peaks and wins patches inside the box, not outside."""
    peaks = layer["peaks"]  # (n, K-1, 2)
    spreads = peak_spreads(peaks, owners)
    wins = layer["won_inside"] + layer["won_outside"]
    metrics = dict.fromkeys(PART_METRICS)
    metrics.update(
        prototypes=len(wins),
        foreground=foreground(wins),
        foreground_inside=foreground(layer["won_inside"]),
        foreground_outside=foreground(layer["won_outside"]),
        distinctiveness=distinctiveness(peaks),
        winning=100 * (wins[:-1] > 0).sum().item() / (len(wins) - 1),
        wins=wins.tolist(),
        peak_spread=spreads.mean().item(),
        peak_spreads=spreads.tolist())
    visible = keypoints[:, :, 2] > 0
    if not visible.any():
        return metrics

    hits = hits_of(peaks, keypoints)
    noisy_hits = hits_of(layer["noisy_peaks"], keypoints)
    constant_peaks = find_peaks(layer["map_sums"])[owners]  # a sum peaks where the mean does
    score = consistency(hits, visible, labels)
    constant = consistency(hits_of(constant_peaks, keypoints), visible, labels)
    rng = np.random.default_rng(seed)
    random_scores = []
    for _ in range(RANDOM_DRAWS):
        random_peaks = torch.from_numpy(rng.integers(0, FRAME, peaks.shape))
        random_scores.append(consistency(hits_of(random_peaks, keypoints), visible, labels))
    metrics.update(
        consistency=score,
        stability=stability(hits, noisy_hits, labels),
        constant_location=constant,
        over_constant=score - constant,
        comprehensiveness=comprehensiveness(hits, visible),
        random_location=np.mean(random_scores).item())
    if len(layer["map_sums"]) == 1:  # else concept k is another one in every class
        metrics["parts_hit"] = parts_hit(hits, visible, parts)
    return metrics


@torch.inference_mode()
def evaluate(model, folder, image_size, batch_size=32, workers=0, amp=False, seed=0, split="test",
             recipe=None, gallery=None):
    """Accuracy, and the metrics of every concept layer -> dict, as in metrics.json.
    folder, split: what data.Images reads. amp: bf16 autocast. recipe: see recipe_of, for the
    protocol. gallery: explore.gallery.Gallery, which is shown every batch.
    Puts the model into eval mode. Raises ValueError where its output is not finite."""
    views = Views(folder, split, image_size, seed, model.grid)
    labels, parts = views.test.labels, views.test.parts
    # The owner of the prototypes that an image shows: its class, or 0 where all images share them.
    owners = labels if model.class_specific else torch.zeros_like(labels)
    found = collect(model.eval(), views, owners, batch_size, workers, amp, gallery)
    if dist.is_initialized():
        found = add_processes(found)
    totals, *collected = found
    layers = []
    for l, layer in enumerate(collected):
        layers.append(
            layer_metrics(layer, totals["keypoints"], labels, owners, parts, (seed, l)))
    head = max(0, len(layers) - 3)  # the released program reports the third layer from the end
    headline = dict(layer=head, consistency=layers[head]["consistency"],
                    stability=layers[head]["stability"])
    protocol = dict(
        recipe=recipe, data=Path(folder).name, split=split, images=len(views), parts=len(parts),
        classes=len(views.test.classes), classes_with_images=len(labels.unique()),
        image_size=image_size, grid=list(model.grid), amp=bool(amp), seed=seed)
    unavailable = None
    if headline["consistency"] is None:
        unavailable = "No consistency, no stability: the data has no key points (parts/parts.txt)."
    return dict(accuracy=100 * totals["correct"].item() / len(views), headline=headline,
                layers=layers, unavailable=unavailable, protocol=protocol)


def recipe_of(options):
    """What metrics.json says of a run: its method and IVPT's options, None where the method takes
    none. options: a dict."""
    recipe = {name: options.get(name) for name in ("method", *ivpt.IVPT.accepts)}
    if recipe["prototypes"] is not None:
        recipe["prototypes"] = list(recipe["prototypes"])  # JSON has no tuples
    return recipe


ROWS = (  # of the table: name in metrics.json, meaning; percent, if nothing else is said
    ("prototypes", "number, the background included"),
    ("consistency", "concepts that keep to one part, averaged over classes"),
    ("constant_location", "consistency of one fixed spot, the peak of each mean map"),
    ("over_constant", "consistency less constant_location"),
    ("random_location", "consistency of random spots"),
    ("stability", "images in which noise changes no hit; a fixed spot has 100"),
    ("distinctiveness", "100 less the overlap of two concepts' regions"),
    ("comprehensiveness", "visible parts that some concept hits"),
    ("peak_spread", "distance of peaks from their mean, pixels of 224; a fixed spot has 0"),
    ("winning", "concepts that win any patch"),
    ("foreground", "patches won by concepts"),
    ("foreground_inside", "the same inside the box"),
    ("foreground_outside", "the same outside the box"))


def table(metrics):
    """The metrics as text, for the terminal and for the gallery; * marks the headline."""
    num_images = metrics["protocol"]["images"]
    text = f"accuracy {metrics['accuracy']:.1f} % on {num_images} images\n{'layer':20}"
    for l in range(len(metrics["layers"])):
        mark = "*" if l == metrics["headline"]["layer"] else " "
        text += f"{l + 1:7}{mark}"
    for name, meaning in ROWS:
        text += f"\n{name:20}"
        for layer in metrics["layers"]:
            value = "-" if layer[name] is None else round(layer[name], 1)
            text += f"{value:>7} "
        text += f"  {meaning}"
    if metrics["unavailable"]:
        text += f"\n{metrics['unavailable']}"
    return text


# ---- 5. The command line -----------------------------------------------------------------------
def load_run(ckpt):
    """A run's checkpoint -> (model in eval mode on this process's device, checkpoint dict)."""
    model, checkpoint = ivpt.load_checkpoint(ckpt)
    device = data.local_device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), checkpoint


def load_images(checkpoint, name=None, root=None, split="test"):
    """data.Images, test view, of the data a checkpoint was trained on, or of --data."""
    options = checkpoint["options"]
    name = name or options["data"]
    if root is None and name == options["data"]:
        root = options["data_root"]
    folder = data.find(name, root)
    images = data.Images(folder, split, "test", options["image_size"])
    if images.classes != checkpoint["classes"]:
        raise ValueError(f"{folder}: its {len(images.classes)} classes are not the "
                         f"{len(checkpoint['classes'])} of training; name its data by --data")
    return images


def parse(argv):
    parser = data.one_line_parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, help="last.pt of a run")
    add("--visualize", metavar="DIR", help="write a gallery of every concept: DIR/index.html")
    add("--image", metavar="FILE", nargs="+", help="explain these images or folders instead")
    add("--split", choices=("test", "val"),
        help="val: every fourth training image; default: val of a run with --validate, else test")
    add("--data", help="toy, cub or a folder; default: as in training")
    add("--data-root", help="folder of the data; default: as in training")
    add("--batch-size", type=int, default=32, help="images a forward; changes no number")
    add("--workers", type=int, default=0, help="processes that read images; changes no number")
    add("--seed", type=int, help="of noise and random control; default: as in training")
    add("--amp", action=argparse.BooleanOptionalAction, help="bf16; default: as in training")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (args.visualize or args.image):
        raise ValueError("--visualize, --image: one process draws; start this without torchrun")
    run = Path(args.ckpt).parent
    model, checkpoint = load_run(args.ckpt)
    options = checkpoint["options"]
    amp = options["amp"] if args.amp is None else args.amp
    seed = options["seed"] if args.seed is None else args.seed
    if args.image:
        from explore.explain import explain_files
        return explain_files(model, args.image, checkpoint, amp, run, args.visualize)

    split = args.split or ("val" if options.get("validate") else "test")
    images = load_images(checkpoint, args.data, args.data_root, split)
    gallery = None
    if args.visualize:
        from explore.gallery import Gallery
        gallery = Gallery(model, images)
    rank, world = data.start_processes(next(model.parameters()).device)
    metrics = evaluate(model, images.folder, options["image_size"], args.batch_size, args.workers,
                       amp, seed, split, recipe_of(options), gallery)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    name = "metrics.json" if split == "test" else "metrics_val.json"
    data.save(run / name, json.dumps(metrics, indent=1) + "\n")
    data.say(table(metrics))
    if gallery:
        gallery.write(Path(args.visualize), metrics, run / "log.jsonl")
        data.say(f"gallery: {args.visualize}/index.html")


if __name__ == "__main__":
    data.run_script(main)
