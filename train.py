"""Train IVPT: the eight losses, the recipes, one visible loop (arXiv 2503.06084; DINOv2 stays frozen).

    python train.py                                    # drawn birds, no download, minutes on a laptop
    python train.py --data cub                         # the paper's run: CUB, DINOv2-B/14 reg4, 518 px
    python train.py --data FOLDER                      # any FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE
    torchrun --nproc_per_node=4 train.py --data cub    # the same batch, spread over four GPUs
    python train.py --bench --weights vits14 --image-size 224 --batch-size 8

A run's folder holds config.json (the options), log.jsonl (one object an epoch), last.pt (what --resume and evaluate.py
read) and metrics.json. Exit codes: 0 done; 2 bad input, a full disk or no memory (one line says what); 3 stopped by
SIGINT or SIGTERM and saved: --resume goes on at the very next batch; 4 the loss stayed non-finite and the last good
checkpoint stands; 130 or 143 such a signal where there was nothing to save. torchrun has codes of its own.

Several processes: --batch-size counts the images of one optimiser step over all of them. Every rank sees its slice of
each batch; gradients are averaged. Two terms therefore see their own rank's slice only (and with --accumulate their own
part of it): presence, whose maximum runs over the batch, and the affine view, which is drawn for each. All others are
means over images. log.jsonl holds what rank 0 saw. --resume wants as many processes; --accumulate may change, and the
run with it, by rounding and by the parts that those two terms see.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model as ivpt

# ---------------------------------------------------------------- options
# What a recipe decides; every name is a flag, too. Footnote: the paper's rate of the bias is 2e-4. There a bias after the
# softmax outgrows the shares, and the regions stand still.
RECIPES = {"paper": dict(bias="after", fusion="mlp", tune="none", lr_bias=2e-5, start="noise", distance="euclidean")}
RECIPES["released"] = RECIPES["paper"] | dict(bias="inside", fusion="linear", tune="tokens", lr_bias=2e-4)
RECIPES["tuned"] = RECIPES["paper"] | dict(start="kmeans", distance="scaled")  # ours
# Rates by method: IVPT's are the paper's, the rivals' those of their programs, but for ProtoPNet's last layer. Prompts learn
# like tuned tokens: with 1e-2, one run learnt nothing for four epochs and one gained nothing on a validation split.
METHODS = {"ivpt": dict(lr=1e-2), "vpt-deep": dict(lr=1e-2, lr_prototypes=2e-4),
           "vpt-deep-proto": dict(lr=1e-2, lr_prototypes=2e-4), "protopnet": dict(lr=1e-2, lr_prototypes=3e-3),
           "huang": dict(lr=1e-6, lr_prototypes=3e-3)}
# Options that mean nothing to a method.
MEANINGLESS = {"ivpt": (), "vpt-deep-proto": ("fusion", "no_cross_layer", "no_fusion")}
MEANINGLESS |= dict.fromkeys(("vpt-deep", "protopnet", "huang"), (
    "recipe", "bias", "lr_bias", "fusion", "start", "distance", "prototypes", "no_bias", "no_regions", "no_cross_layer", "no_fusion"))
# What a data set wants where the command line is silent. The rate of IVPT's prototypes is the paper's; the toy has 444 steps to
# move them, where CUB has 9,350.
PRESETS = {
    "toy": dict(weights="toy", image_size=112, pretrain=16, epochs=12, lr_prototypes=5e-4),
    "cub": dict(weights="vitb14_reg4", image_size=518, pretrain=0, epochs=25, lr_prototypes=2e-4),  # and any other
}


def option(default, text, **more):
    return field(default=default, metadata=dict(help=text, **more))


@dataclass
class Options:
    data: str = option("toy", "toy (drawn birds), cub (CUB-200-2011), partimagenet, or a folder of images: see data.py")
    data_root: str = option(None, "folder that holds the data set, or where to put it (~/.cache/ivpt)")
    out: str = option(None, "run folder (runs/DATA)")
    weights: str = option(None, "backbone: vits14, vitb14, vitl14, vitg14, each also with _reg4, or a state dict's file (vitb14_reg4; toy for toy)")
    image_size: int = option(None, "side of the square input in pixels, divisible by the patch (518; 112 for toy)")
    method: str = option("ivpt", "ivpt, or what it is compared with (see model.py)", choices=list(METHODS))
    recipe: str = option("paper", "paper: its text; released: the authors' program; tuned: ours, where regions should follow the bird",
                         choices=list(RECIPES))
    bias: str = option(None, "learnable spatial bias, after the softmax (paper) or inside it (released)", choices=["after", "inside"])
    fusion: str = option(None, "fusion head: MLP (paper) or one Linear (released)", choices=["mlp", "linear"])
    tune: str = option(None, "of the backbone: none (paper), tokens (released: cls, registers, positions), all (one that is not pretrained)", choices=["none", "tokens", "all"])
    start: str = option(None, "prototypes start as noise (paper), or as k-means centres of the frozen patches (tuned)",
                        choices=["noise", "kmeans"])
    distance: str = option(None, "euclidean (paper), or scaled: patches at length sqrt(D), squared distance over sqrt(D), soft shares (tuned)",
                           choices=["euclidean", "scaled"])
    no_bias: bool = option(False, "ablation: no spatial bias", action="store_true")
    no_regions: bool = option(False, "ablation: global attention pools, not the regions", action="store_true")
    no_cross_layer: bool = option(False, "ablation: concepts at the output alone, no prompts", action="store_true")
    no_fusion: bool = option(False, "ablation: every fine concept prompts by itself", action="store_true")
    prototypes: tuple = option((17, 14, 11, 8, 5), "prototypes per concept layer, the background counted", nargs="+", type=int)
    pretrain: int = option(None, "passes before these, in which a ViT without a file learns what a pretrained one knows (0; 16 for toy)")
    epochs: int = option(None, "passes over the training images; the rates halve every four (25; 12 for toy)")
    batch_size: int = option(16, "images in one optimiser step, over all processes and accumulated parts")
    accumulate: int = option(1, "parts each batch is computed in; raise it when memory runs out, on --resume as well")
    lr: float = option(None, "learning rate of class head, grouping, fusion, head LayerNorm, at batch 16 (by method; 1e-2)")
    lr_prototypes: float = option(None, "learning rate of prototypes, prompts, tuned tokens and add-on layers, at batch 16 (by method; 2e-4, 5e-4 for toy)")
    lr_bias: float = option(None, "learning rate of the spatial biases (by recipe); if it is high, regions stop following the bird: see the spread")
    lr_backbone: float = option(2e-4, "learning rate of the backbone where --tune all trains it")
    seed: int = option(42, "seeds weights, order, augmentation and noise")
    amp: bool = option(None, "bf16 autocast (default: where the device has bf16)", action=argparse.BooleanOptionalAction)
    compile: bool = option(False, "torch.compile the step", action=argparse.BooleanOptionalAction)
    device: str = option(None, "cuda or cpu (default: what is there)")
    workers: int = option(None, "loader processes of each process (default: with a GPU its share of the cores, at most 8; 1 without)")
    resume: bool = option(False, "go on where the run in --out stopped", action="store_true")
    overwrite: bool = option(False, "replace the run in --out", action="store_true")
    bench: bool = option(False, "time the plain ViT and one training step, and stop", action="store_true")


def parse(argv=None):
    """Command line -> Options, the blanks filled: what was typed, the method's rates, the data set's preset, then the recipe's.

    The toy ViT has no file: it is pretrained here, and learns along: --tune all, whatever the recipe. Raises ValueError.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in fields(Options):
        kind = {} if "action" in f.metadata or "nargs" in f.metadata else dict(type=f.type)
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" (default {f.default})")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind, **dict(f.metadata, help=text))
    parser.error = data.refuse
    o = Options(**vars(parser.parse_args(argv)))
    preset = PRESETS.get(o.data, PRESETS["cub"])
    for f in fields(Options):
        if f.name in MEANINGLESS[o.method] and getattr(o, f.name) != f.default:
            raise ValueError(f"--{f.name.replace('_', '-')}: means nothing to --method {o.method}; leave it out")
    defaults = RECIPES[o.recipe] | preset | METHODS[o.method] | dict(out=f"runs/{Path(o.data).resolve().name}")
    if (o.weights or defaults["weights"]) == "toy":
        defaults["tune"] = "all"
    for name, value in defaults.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    for name in {"recipe", "bias", "lr_bias", "fusion", "start", "distance"} & {*MEANINGLESS[o.method]}:
        setattr(o, name, None)  # nor does metrics.json tell of it
    o.prototypes = tuple(o.prototypes)
    o.device = o.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_options(o)
    o.amp = has_bf16(o.device) if o.amp is None else o.amp
    if o.workers is None:
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if o.device == "cuda" else 1
        o.workers = min(8, max(1, cores))
    return o


def check_options(o):
    """One line for what cannot work, before anything is read or written."""
    least = dict(pretrain=0, epochs=1, batch_size=1, accumulate=1, image_size=1, seed=0, workers=0)
    rates = dict.fromkeys(("lr", "lr_prototypes", "lr_bias", "lr_backbone"), 0)
    for name, bound in (least | rates).items():
        value = getattr(o, name)
        if value is not None and not bound <= value < 2 ** 31:  # not a number is never in a range
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number of at least {bound}")
    if o.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {o.device}: expected cpu or cuda; choose a GPU by CUDA_VISIBLE_DEVICES")
    evaluate.local_device(o.device)
    if o.resume and o.overwrite:
        raise ValueError("--resume --overwrite: one goes on with the run in --out, the other replaces it; give one of them")
    if o.tune == "tokens" and "recipe" in MEANINGLESS[o.method]:
        raise ValueError("--tune tokens: only --method ivpt and vpt-deep-proto have a rate for them; take none or all")
    if o.method == "protopnet" and o.epochs < 2:
        raise ValueError(f"--epochs {o.epochs}: --method protopnet needs at least 2, the second for its last layer")
    if o.weights == "toy" and o.tune != "all" and not o.bench:
        raise ValueError(f"--tune {o.tune}: the toy ViT has no pretrained file to stay frozen at; take --tune all")
    if o.weights != "toy" and o.pretrain:
        raise ValueError(f"--pretrain {o.pretrain}: {o.weights} is pretrained; leave it out, or take --weights toy")


def has_bf16(device):
    """Whether bf16 is native: Ampere and later, or a CPU with AVX512-BF16 or AMX."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability()[0] >= 8
    tests = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(test() for test in tests if test)


# ---------------------------------------------------------------- the losses
# A is a smoothed attention map (B, K, h, w), the background last; every loss is a scalar, and weighs 1 in IVPT.

def classification(logits, labels):
    """Cross entropy of the mean over concepts of their class scores. logits (B, C), labels (B)."""
    return F.cross_entropy(logits, labels)


def region_consistency(final, fused):
    """L_con: KL(final map, detached || fused map of a prompted layer). Both (B, G + 1, h, w); mean over patches."""
    P, Q = final.detach() + 1e-10, fused + 1e-10
    return (final.detach() * (P.log() - Q.log())).sum(1).mean()


def total_variation(A):
    """(sum |dy| + sum |dx|) / (B h w): regions with short borders."""
    B, _, h, w = A.shape
    return (A.diff(dim=2).abs().sum() + A.diff(dim=3).abs().sum()) / (B * h * w)


def presence(A):
    """1 - mean over concepts of the largest pooled share anywhere in the batch: no concept may die out."""
    pooled = F.avg_pool2d(A[:, :-1], 3, stride=1)  # (B, K-1, h-2, w-2)
    return 1 - pooled.amax(dim=(0, 2, 3)).mean()


def background_presence(A):
    """BCE(max over positions of pool3(A_bg) * M, 1): every image has background, and at its rim."""
    pooled = F.avg_pool2d(A[:, -1], 3, stride=1)  # (B, h-2, w-2)
    y, x = (torch.linspace(-1, 1, side, device=A.device) for side in pooled.shape[1:])
    M = y[:, None] ** 2 + x ** 2
    peak = (pooled * M / M.max()).amax(dim=(1, 2))  # (B)
    return -peak.clamp_min(1e-10).log().mean()  # binary cross entropy with target 1


def entropy(A):
    """Mean over patches of -sum_k A log A: every patch has one owner."""
    return torch.special.entr(A).sum(1).mean()  # 0 log 0 is 0


def equivariance(A, back):
    """1 - mean cosine of a concept's map and its map of the transformed image, moved back. Foreground only."""
    return 1 - F.cosine_similarity(A[:, :-1].flatten(2), back[:, :-1].flatten(2), dim=2).mean()


def orthogonality(features):
    """Mean of (Z Z^T - I)^2, Z the row-normalised features of all K final concepts (B, K, D)."""
    Z = F.normalize(ivpt.wide(features), dim=2)
    with torch.autocast(Z.device.type, enabled=False):
        return (Z @ Z.transpose(1, 2) - torch.eye(Z.shape[1], device=Z.device)).square().mean()


# Those of ProtoPNet (Chen et al. 2019) and of Huang et al. (2023); d2 (B, N, C, m): squared distances of N patches to m
# prototypes of each of C classes.

def cluster(d2, labels):
    """Every image has a patch near a prototype of its class."""
    return d2[torch.arange(len(d2)), :, labels].amin((1, 2)).mean()


def separation(d2, labels):
    """And none near those of other classes: minus the smallest distance."""
    own = F.one_hot(labels, d2.shape[2]).bool()[:, :, None]  # (B, C, 1)
    return -d2.amin(1).masked_fill(own, math.inf).amin((1, 2)).mean()


def last_layer(model):
    """L1 of what prototypes say of other classes than their own."""
    return (model.last * (1 - model.own)).abs().sum()


def alignment(z, shallow, d2, labels, slack=0.1):
    """Where the class's prototypes match best, patches should resemble the same patches in z (B, N, d) as in an early
    block, shallow (B, N, D): mean excess over the slack of |difference of cosines|."""
    peaks = d2[torch.arange(len(d2)), :, labels].argmin(1)  # (B, m)
    cosines = []
    for e in (z, ivpt.wide(shallow)):
        e = F.normalize(e, dim=2)
        with torch.autocast(e.device.type, enabled=False):
            cosines.append(e.gather(1, peaks[..., None].expand(-1, -1, e.shape[2])) @ e.transpose(1, 2))  # (B, m, N)
    return F.relu((cosines[0] - cosines[1]).abs() - slack).mean()


class Objective(nn.Module):
    """One batch to its losses. A module, so that DDP can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, labels, theta):
        """images (B, 3, S, S), labels (B), theta (2, 3) -> {name: the losses and "loss", their sum}, number right."""
        kinds = {ivpt.IVPT: self.ivpt, ivpt.VPTDeep: self.vpt, ivpt.ProtoPNet: self.protopnet}
        losses, logits = kinds[type(self.model)](images, labels, theta)
        losses["loss"] = sum(losses.values())
        return losses, (logits.argmax(1) == labels).sum()

    def vpt(self, images, labels, theta):
        """VPT-Deep has no map to shape."""
        logits = self.model(images).logits
        return {"classification": classification(logits, labels)}, logits

    def protopnet(self, images, labels, theta):
        """The weights are those of the two papers; the alignment's sets in with the first step, not after five epochs."""
        model = self.model
        z, shallow, d2 = model.compare(images)
        logits = model.read(d2, labels).logits
        losses, d2 = {"classification": classification(logits, labels)}, d2.unflatten(2, (model.num_classes, -1))
        if not model.last_only:
            losses |= {"cluster": 0.8 * cluster(d2, labels), "separation": 0.08 * separation(d2, labels)}
            if model.aligned:
                losses["alignment"] = 0.3 * alignment(z, shallow, d2, labels)
        else:
            losses["last_layer"] = 1e-4 * last_layer(model)
        return losses, logits

    def ivpt(self, images, labels, theta):
        """The eight losses: the image, its affine view, and what ties them; every weight is 1."""
        # The view first: it keeps no graph of the backbone, so its memory is free again when the image's graph is built.
        back = [data.unwarp(A, theta) for A in self.model(data.warp(images, theta), backbone_graph=False).attention]
        out = self.model(images)
        maps, L = out.attention, len(out.attention)
        return {
            "classification": classification(out.logits, labels),
            "region_consistency": sum((region_consistency(maps[-1], fused) for fused in out.fused),
                                      start=out.logits.new_zeros(())) / max(1, len(out.fused)),
            "total_variation": sum(map(total_variation, maps)) / L,
            "presence": sum(map(presence, maps)) / L,
            "background_presence": sum(map(background_presence, maps)) / L,
            "entropy": sum(map(entropy, maps)) / L,
            "equivariance": sum(map(equivariance, maps, back)) / L,
            "orthogonality": orthogonality(out.features),
        }, out.logits


# ---------------------------------------------------------------- the optimiser

def make_optimizer(model, o):
    """Adam in four groups; lr scales with the root of the batch size. All are halved every four epochs."""
    groups = {"lr": [], "lr_prototypes": [], "lr_bias": [], "lr_backbone": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith("backbone."):
            groups["lr_backbone" if o.tune == "all" else "lr_prototypes"].append(p)
        elif name.startswith("concepts.") and name.endswith("bias"):
            groups["lr_bias"].append(p)
        elif name.startswith(("concepts.", "free_prompts", "prompts", "add_on.", "vectors")):
            groups["lr_prototypes"].append(p)
        else:
            groups["lr"].append(p)
    scale = (o.batch_size / 16) ** 0.5
    groups = [dict(params=ps, lr=getattr(o, name) * scale) for name, ps in groups.items() if ps]
    optimizer = torch.optim.Adam(groups, fused=True)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)


# ---------------------------------------------------------------- checkpoints

def random_states(device):
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def set_random_states(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def described(dataset):
    """The training images in a few words, by which --resume knows them again, wherever they lie by now."""
    names = "\n".join(str(file.relative_to(dataset.folder)) for file in dataset.files)
    return f"{len(dataset)} images with names of hash {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def load_run(path, o, dataset, world):
    """The checkpoint --resume goes on from, after checking that it is this run's."""
    checkpoint = ivpt.read_checkpoint(path, optimizer=dict, scheduler=dict, epoch=int, step=int, sums=dict, random=list,
                                      images=str)
    free = {"resume", "overwrite", "device", "workers", "data", "data_root", "out", "weights", "amp", "compile", "bench"}
    free |= {"accumulate", "epochs"} if o.method != "protopnet" else {"accumulate"}  # its last stage is counted from the end
    for name, value in asdict(o).items():
        found = checkpoint["options"].get(name)
        if name not in free and found != value:
            raise ValueError(f"--resume: {path} was trained with {name} {found}, now {value}; give the same or another --out")
    if checkpoint["classes"] != dataset.classes:
        raise ValueError(f"--resume: {path} knows {len(checkpoint['classes'])} classes, the data has {len(dataset.classes)} "
                         "or others; take the same data or another --out")
    if checkpoint["images"] != described(dataset):  # another order of batches: within an epoch some would come twice
        raise ValueError(f"--resume: {path} was trained on {checkpoint['images']}, the data has {described(dataset)}; "
                         "take the same data or another --out")
    if len(checkpoint["random"]) != world:
        raise ValueError(f"--resume: {path} was written by {len(checkpoint['random'])} processes, now {world}; use as many")
    return checkpoint


def restore_run(checkpoint, path, optimizer, scheduler, device, rank):
    """What trains the model goes on where it was."""
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        set_random_states(checkpoint["random"][rank], device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--resume: {path}: its optimizer, scheduler or random states are damaged ({type(error).__name__}: "
                         f"{str(error)[:90]}); begin anew with --overwrite") from None


# ---------------------------------------------------------------- the run

def pretrain(backbone, dataset, o, device, chief):
    """Stands in for the file that the toy ViT lacks: cls learns the classes, and every patch to tell its own pixels.

    Without the second, patches tell classes, not parts. Every process does the same; nothing of it is saved before the run's
    first epoch ends.
    """
    D, patch = backbone.width, backbone.patch_size
    head, pixels = nn.Linear(D, len(dataset.classes)).to(device), nn.Linear(D, 3 * patch ** 2).to(device)
    steps = o.pretrain * (len(dataset) // o.batch_size)
    optimizer = torch.optim.Adam([dict(params=backbone.parameters(), lr=1e-3),
                                  dict(params=[*head.parameters(), *pixels.parameters()], lr=3e-3)], fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 40) * (1 - step / steps))
    with tqdm(total=steps, desc="pretraining", disable=None if chief else True, leave=False, unit="step") as progress:
        for epoch in range(o.pretrain):
            dataset.epoch = epoch
            order = epoch_batches(dataset, o, epoch, rank=0, world=1).flatten().tolist()
            for images, labels, *_ in DataLoader(dataset, o.batch_size, sampler=order, num_workers=o.workers):
                images, labels = images.to(device), labels.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=o.amp):
                    tokens = backbone(images)
                    logits, drawn = head(tokens[:, 0]), pixels(tokens[:, backbone.prefix:])
                loss = F.cross_entropy(ivpt.wide(logits), labels)
                loss = loss + F.mse_loss(ivpt.wide(drawn), F.unfold(images, patch, stride=patch).transpose(1, 2))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(backbone.parameters(), 2.0)
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update()


def epoch_batches(dataset, o, epoch, rank, world):
    """This rank's share of an epoch's shuffled batches, a function of the seed alone: (steps, accumulate, images)."""
    steps = len(dataset) // o.batch_size  # the remainder waits for another epoch's shuffle
    seed = 1000 * o.seed + epoch  # another order in every epoch and for every seed
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return order[:steps * o.batch_size].view(steps, o.accumulate, world, -1)[:, :, rank]


def check_run_folder(o):
    """Refuse to lose a run, or to disturb one that has not saved yet: a folder that holds one needs --resume or --overwrite."""
    last = Path(o.out, "last.pt")
    if o.resume and not last.is_file():
        raise FileNotFoundError(f"--resume: {last} is not there; name the run by --out, or begin anew with --overwrite")
    if last.is_file() and not (o.resume or o.overwrite):
        raise ValueError(f"--out {o.out}: holds a run already; go on with --resume, replace it with --overwrite, or name another")
    if any(last.with_name(name).is_file() for name in ("config.json", "log.jsonl")) and not (o.resume or o.overwrite):
        raise ValueError(f"--out {o.out}: holds a run that has saved nothing yet; if it runs no more, replace it with "
                         "--overwrite, or name another")
    return evaluate.writable(last.parent, "--out") / last.name


def fetch(o):
    """Downloads or draws what is missing. Every process asks; a file lock lets the first one do it."""
    if ivpt.weights_url(o.weights):
        ivpt.patch_grid(o.image_size, 14)  # a wrong size is said before a gigabyte is fetched
    data.Images(data.find(o.data, o.data_root), "test", "test", o.image_size)  # what the end needs is known at the start
    evaluate.fetch_weights(o.weights)


def train(o):
    """The run that Options describe. Returns the test metrics, or an exit code where it was stopped."""
    if o.data not in PRESETS:
        data.find(o.data, o.data_root)  # a mistyped folder leaves no run folder behind
    last = check_run_folder(o)
    fetch(o)  # before the processes meet: their patience with each other is shorter than a download
    device = evaluate.local_device(o.device)
    rank, world = evaluate.start_processes(device)
    if o.batch_size % (world * o.accumulate):
        raise ValueError(f"--batch-size {o.batch_size}: expected a multiple of {world} processes x --accumulate {o.accumulate}")
    chief = rank == 0
    folder = data.find(o.data, o.data_root)
    dataset = data.Images(folder, "train", "train", o.image_size, o.seed)
    if len(dataset) < o.batch_size:
        raise ValueError(f"--batch-size {o.batch_size}: more than the {len(dataset)} training images of {folder}; take less")
    if len(dataset.classes) < 2:
        raise ValueError(f"{folder}: one class only; expected at least two to tell apart")

    torch.manual_seed(o.seed)
    model = ivpt.build(asdict(o), len(dataset.classes)).to(device)
    if o.pretrain and not o.resume:
        pretrain(model.backbone, dataset, o, device, chief)
    if o.start == "kmeans" and not o.resume:
        ivpt.start_prototypes(model, data.Images(folder, "train", "test", o.image_size), o.seed)
    optimizer, scheduler = make_optimizer(model, o)
    objective = Objective(model)
    step_module = objective
    if world > 1:  # ProtoPNet's last stage gives the rest no gradient: unused parameters
        step_module = DistributedDataParallel(objective, [device] if device.type == "cuda" else None,
                                              find_unused_parameters=o.method == "protopnet")
    if o.compile:
        step_module = torch.compile(step_module)
    torch.manual_seed(o.seed + rank)  # from here on every rank has noise of its own
    start, done, sums = 0, 0, {}  # epoch, steps done in it, and what they summed up to
    if o.resume:
        checkpoint = load_run(last, o, dataset, world)
        ivpt.restore(model, checkpoint, last)
        restore_run(checkpoint, last, optimizer, scheduler, device, rank)
        start, done, sums = checkpoint["epoch"], checkpoint["step"], checkpoint["sums"]

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if chief:
        print("  ".join(f"{k}={v}" for k, v in asdict(o).items() if v not in (None, False)))
        print(f"{len(dataset)} training images, {len(dataset.classes)} classes; {trained:,} trained parameters of "
              f"{sum(p.numel() for p in model.parameters()):,}; {device}, {world} process{'es' * (world > 1)}")
        ivpt.save(last.with_name("config.json"), json.dumps(asdict(o), indent=1) + "\n")
        log = last.with_name("log.jsonl")
        lines = log.read_text().splitlines(keepends=True) if o.resume and log.is_file() else []
        del lines[start:]  # what a killed run wrote beyond its checkpoint is written again
        ivpt.save(log, "".join(lines))
        for name in () if o.resume else ("last.pt", "metrics.json"):  # --overwrite
            last.with_name(name).unlink(missing_ok=True)

    fingerprint = ivpt.fingerprint(model)

    def save_run(epoch, step, sums):
        states = [random_states(device)]
        if world > 1:
            states = [None] * world
            dist.all_gather_object(states, random_states(device))
        if chief:
            ivpt.save(last, dict(
                format="ivpt", options=asdict(o), classes=dataset.classes, parts=dataset.parts, images=described(dataset),
                epoch=epoch, step=step, sums=sums, model=ivpt.trained_state(model), fingerprint=fingerprint,
                optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), random=states))

    last_stage = o.epochs - min(5, o.epochs // 2) if o.method == "protopnet" else None  # the last layer's first epoch
    stop, bad_in_a_row, steps = [], 0, len(dataset) // o.batch_size
    handlers = {number: signal.signal(number, lambda n, frame: stop.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    with tqdm(total=steps * o.epochs, initial=steps * start + done, disable=None if chief else True, unit="step") as progress:
        for epoch in range(start, o.epochs):
            model.train()
            if last_stage is not None:
                model.last_only = epoch >= last_stage
            dataset.epoch, began = epoch, time.time()
            batches = epoch_batches(dataset, o, epoch, rank, world)[done:]  # (steps to do, accumulate, images)
            loader = iter(DataLoader(dataset, batches.shape[2], sampler=batches.flatten().tolist(), num_workers=o.workers,
                                     pin_memory=device.type == "cuda", worker_init_fn=heed_parent_alone,
                                     generator=torch.Generator()))  # its own: a loader would draw its seed from the noise's
            for step in range(done, steps):
                try:
                    parts = [next(loader) for _ in range(o.accumulate)]
                except (ValueError, OSError) as error:  # an image that cannot be read, before the step has drawn any noise
                    if world > 1:
                        raise  # the other processes are in their step already
                    save_run(epoch, step, sums)
                    raise ValueError(f"{str(error).strip()}; saved {last}: put the image right and --resume") from None
                means = 0  # over the parts: the losses and the accuracy, still on the device
                optimizer.zero_grad(set_to_none=True)
                for part, (images, labels, _, _) in enumerate(parts):
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                    theta = data.sample_affine()  # one view for all images of a part
                    last_part = part == o.accumulate - 1
                    with contextlib.nullcontext() if world == 1 or last_part else step_module.no_sync():
                        with torch.autocast(device.type, torch.bfloat16, enabled=o.amp):
                            losses, correct = step_module(images, labels, theta)
                        (losses["loss"] / o.accumulate).backward()
                    means = means + torch.stack([*losses.values(), 100 * correct / len(labels)]).detach() / o.accumulate
                norm = nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 2.0)
                *means, norm = torch.cat([means, norm[None]]).tolist()  # the only wait for the device in a step
                values = dict(zip([*losses, "train_accuracy"], means))
                bad, stopped = any_rank((not math.isfinite(norm + values["loss"]), stop), device, world)
                if bad:
                    bad_in_a_row += 1
                    names = " ".join(str(dataset.files[i].relative_to(folder)) for i in batches[step - done].flatten())
                    tqdm.write(f"epoch {epoch} step {step}: loss {values['loss']}, gradient norm {norm}: no step taken; "
                               f"images of {folder}: {names}", file=sys.stderr)
                else:
                    bad_in_a_row = 0
                    optimizer.step()
                    sums = {name: sums.get(name, 0) + value for name, value in dict(values, steps=1).items()}
                if bad_in_a_row in (3, steps):
                    kept = f"{last} keeps the last good state" if last.is_file() else "nothing was saved yet"
                    tqdm.write(f"error: {bad_in_a_row} such batches in a row; {kept}; lower --lr, or take --no-amp", file=sys.stderr)
                    return 4
                progress.set_postfix(epoch=epoch, loss=f"{values['loss']:.3f}", refresh=False)
                progress.update()
                if stopped:
                    save_run(epoch, step + 1, sums)
                    if chief:
                        tqdm.write(f"stopped by a signal; saved {last}; go on with --resume", file=sys.stderr)
                    return 3
            line = dict(epoch=epoch, **{k: round(v / sums["steps"], 6) for k, v in sums.items() if k != "steps"},
                        lr=optimizer.param_groups[0]["lr"], seconds=round(time.time() - began, 2))
            if chief:
                lines.append(json.dumps(line) + "\n")
                ivpt.save(log, "".join(lines))
            if epoch + 1 == last_stage:
                model.eval().project(data.Images(folder, "train", "test", o.image_size))
            scheduler.step()
            done, sums = 0, {}
            save_run(epoch + 1, 0, sums)
    # Everything is saved: from here on a signal ends the program, as does one that came with the last step.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for number in stop:
        signal.raise_signal(number)

    recipe = {name: getattr(o, name) for name in evaluate.METHOD}
    metrics = evaluate.evaluate(model.eval(), folder, o.image_size, workers=o.workers, amp=o.amp, seed=o.seed, recipe=recipe)
    if chief:
        print(f"\n{evaluate.table(metrics)}")
        ivpt.save(last.with_name("metrics.json"), json.dumps(metrics, indent=1) + "\n")
        print(f"\npython evaluate.py --ckpt {last} --visualize {last.parent / 'pictures'}")
    return metrics


def any_rank(flags, device, world):
    """Which of the flags are set on any process: all must do the same, or they would wait for each other for ever."""
    flags = torch.tensor([bool(flag) for flag in flags], dtype=torch.int32)
    if world > 1:
        flags = flags.to(device)
        dist.all_reduce(flags)
    return flags.bool().tolist()


def heed_parent_alone(worker):
    """In a loader process: torchrun and batch systems send SIGTERM to it too, but the step at hand needs its images."""
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


# ---------------------------------------------------------------- the benchmark

def bench(o):
    """Milliseconds an image: the plain frozen ViT, one whole training step, their ratio; and peak memory."""
    device = torch.device(o.device)
    torch.manual_seed(o.seed)
    known = ivpt.ARCHITECTURES.get(o.weights.removeprefix("dinov2_"))  # for these random weights serve: no download
    backbone = ivpt.VisionTransformer(**known, image_size=o.image_size) if known else ivpt.load_backbone(o.weights, o.image_size)
    model = ivpt.build(asdict(o), 200, backbone).to(device)
    optimizer, _ = make_optimizer(model, o)
    objective = Objective(model).train()
    objective = torch.compile(objective) if o.compile else objective
    images = torch.randn(o.batch_size, 3, o.image_size, o.image_size, device=device)
    labels = torch.arange(o.batch_size, device=device) % 200

    def forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=o.amp):
            model.backbone(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=o.amp):
            losses, _ = objective(images, labels, data.sample_affine())
        losses["loss"].backward()
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 2.0)
        optimizer.step()

    loaded, trained = memory(device), sum(p.numel() for p in model.parameters() if p.requires_grad)
    times = {"forward": [], "step": []}
    for _ in range(22):  # alternating, so that a busy machine disturbs both alike
        for name, work in (("forward", forward), ("step", step)):
            times[name].append(clock(work, device) * 1000 / o.batch_size)
    forwards, steps = times["forward"][2:], times["step"][2:]  # without the warm-up
    ratio, forward_ms, step_ms = map(median, ([s / f for f, s in zip(forwards, steps)], forwards, steps))
    row = dict(method=o.method, backbone=o.weights, recipe=o.recipe, image_size=o.image_size, batch_size=o.batch_size,
               device=device_name(device), dtype="bf16" if o.amp else "fp32", compile=o.compile, forward_ms_per_image=round(forward_ms, 3),
               step_ms_per_image=round(step_ms, 3), ratio=round(ratio, 3),
               peak_gib_above_model=round(memory(device) - loaded, 3), trained_parameters=trained, loading_ms_per_image=loading(o))
    print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row) + "\n| " + " | ".join(map(str, row.values())) + " |")
    print(json.dumps(row))


def loading(o):
    """Milliseconds an image takes to read and augment, once cached, over all workers; None without data at hand."""
    if o.data in ("cub", "partimagenet") and not o.data_root:
        return None
    dataset = data.Images(data.find(o.data, o.data_root), "train", "train", o.image_size)
    picked = range(min(8 * o.batch_size, len(dataset)))
    for _ in range(2):  # the first pass decodes
        began = time.perf_counter()
        for _ in DataLoader(dataset, o.batch_size, sampler=picked, num_workers=o.workers):
            pass
    return round(1000 * (time.perf_counter() - began) / len(picked), 3)


def clock(work, device):
    """Seconds of one call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def memory(device):
    """Peak GiB so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    try:
        o = parse()
        result = bench(o) if o.bench else train(o)
    except Exception as error:
        if not (line := evaluate.complaint(error, "raise --accumulate, on --resume as well, or begin anew with a lower "
                                                  "--batch-size or --image-size")):
            raise
        result = fail(line)
    except KeyboardInterrupt:
        result = fail("interrupted; what training saved stands, see --resume and evaluate.py --ckpt") + 128
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(result if isinstance(result, int) else 0)


def fail(message):
    print("error:", message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
