"""Train IVPT: the recipes, the eight losses and one visible loop (arXiv 2503.06084).

    python train.py                                  # drawn birds: no download, minutes on a laptop
    python train.py --data cub                       # the paper's run: DINOv2-B/14 reg4, 518 px
    python train.py --data FOLDER --image-size 224   # FOLDER/train/CLASS/IMAGE, FOLDER/test/...
    python train.py --resume --out runs/cub          # go on, with that run's options
    torchrun --nproc_per_node=4 train.py --data cub  # the same batch, spread over four GPUs

A run's folder (--out) receives config.json (the options), log.jsonl (one object an epoch), last.pt
(what --resume and evaluate.py read) and metrics.json. Bad input ends with one line and exit code 2.

With several processes --batch-size counts the images of one step over all of them. Two losses then
differ from those of one process: presence, whose maximum runs over the images of a process, and
equivariance, whose affine map each process draws. log.jsonl holds the losses of process 0.
"""
import argparse
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model as ivpt

# ------------------------------------------------------------------------------ recipes and presets
# The paper's text and the authors' program differ in the bias, the fusion head and what is trained.
# PAPER's lr_bias is ours. Adam moves a bias by at most about its rate a step: at the text's 2e-4 by
# 0.6 in 25 epochs of CUB. It would outgrow the shares to which it is added, since these sum to 1.
PAPER = dict(bias="after", fusion="mlp", tune="none", lr_bias=2e-5, lr_fusion=1e-2, start="noise",
             distance="euclidean", votes="coarse")
RELEASED = PAPER | dict(bias="inside", fusion="linear", tune="tokens", lr_bias=2e-4)
# Ours: concepts follow parts, and all of them vote. See docs/tuned.md.
TUNED = PAPER | dict(start="kmeans", distance="relative", votes="all", lr_fusion=1e-5)
RECIPES = {"paper": PAPER, "released": RELEASED, "tuned": TUNED}

# The data set's preset. What the command line leaves open is filled in from here.
PRESET = dict(recipe="tuned", weights="vitb14_reg4", image_size=518, pretrain=0, epochs=25, lr=1e-2,
              lr_prototypes=2e-4, lr_backbone=2e-4)
CUB_PRESET = PRESET | dict(recipe="paper")
TOY_PRESET = PRESET | dict(weights="toy", image_size=112, pretrain=12, epochs=9,
                           lr_backbone=5e-5)

# What may differ when a run goes on.
MAY_CHANGE = {"resume", "overwrite", "device", "workers", "data", "data_root", "out", "weights",
              "amp", "compile", "epochs"}


def number_or_auto(text):
    return text if text == "auto" else int(text)


def option(default, help, **more):
    return field(default=default, metadata=dict(help=help, **more))


@dataclass
class Options:
    """The command line, config.json and the options in a checkpoint."""
    # data and run
    data: str = option("toy", "toy (drawn birds), cub (CUB-200-2011) or a folder: see data.py")
    data_root: str = option(None, "folder that holds the data set, or where to put it")
    out: str = option(None, "folder of the run (runs/DATA)")
    resume: bool = option(False, "go on after the last finished epoch of the run in --out; "
                         "what is not typed is as in that run")
    overwrite: bool = option(False, "replace the run in --out")
    validate: bool = option(False, "train on three of four training images, evaluate on the fourth")
    # model
    method: str = option("ivpt", "ivpt, or a baseline's name: see baselines/")
    recipe: str = option(None, "the paper's text (default of cub and baselines), "
                         "its program, or ours (default of all other data)",
                         choices=list(RECIPES))
    weights: str = option(None, "toy, vits14, vitb14, vitl14, vitg14, each but toy also with "
                         "_reg4, or a file")
    image_size: int = option(None, "side of the input in pixels, a multiple of the patch")
    prototypes: tuple = option(ivpt.PROTOTYPES, "number in each layer, with one for background; "
                               "auto: as many as the data has", nargs="+", type=number_or_auto)
    bias: str = option(None, "after or inside the softmax", choices=["after", "inside"])
    fusion: str = option(None, "head of the fusion", choices=["mlp", "linear"])
    tune: str = option(None, "what learns in the backbone", choices=["none", "tokens", "all"])
    start: str = option(None, "where prototypes start", choices=["noise", "kmeans"])
    distance: str = option(None, "of patches and prototypes", choices=["euclidean", "relative"])
    votes: str = option(None, "which concepts vote, and how", choices=["coarse", "all"])
    no_bias: bool = option(False, "ablation: no spatial bias")
    no_regions: bool = option(False, "ablation: global attention pools instead of regions")
    no_cross_layer: bool = option(False, "ablation: concepts at the output alone, no prompts")
    no_fusion: bool = option(False, "ablation: every fine concept is a prompt of its own")
    # optimisation; rates are those at batch 16 and scale with the root of the batch size
    pretrain: int = option(None, "epochs in which the toy ViT, which has no file, learns first")
    epochs: int = option(None, "passes over the training images; rates halve every four")
    batch_size: int = option(16, "images of an optimiser step, over all processes")
    lr: float = option(None, "rate of class head, grouping and LayerNorms")
    lr_fusion: float = option(None, "rate of the fusion heads, which make prompts")
    lr_prototypes: float = option(None, "rate of prototypes, tuned tokens and a baseline's prompts")
    lr_bias: float = option(None, "rate of the spatial bias: too high, and regions stand still")
    lr_backbone: float = option(None, "rate of the backbone under --tune all")
    seed: int = option(42, "of weights, order, augmentation and noise")
    # machine
    amp: bool = option(None, "bf16 autocast (default: where the device has bf16)",
                       action=argparse.BooleanOptionalAction)
    compile: bool = option(False, "torch.compile the forward and its losses")
    device: str = option(None, "default: what is there", choices=["cuda", "cpu"])
    workers: int = option(None, "loader processes of each process (default: up to 8, CPU 1)")


def parse(argv=None):
    """Command line -> Options with every blank filled. Raises ValueError or OSError, one line."""
    parser = data.one_line_parser(
        description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Options):
        settings = dict(f.metadata)
        if f.type is bool:
            settings.setdefault("action", "store_true")
        elif f.type is not str:  # str keeps the parser's own type, which expands ~
            settings.setdefault("type", f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **settings)
    typed = vars(parser.parse_args(argv))  # without defaults
    args = Options(**typed)
    fill_blanks(args)
    if args.resume:
        take_run_options(args, typed)
    if "auto" in args.prototypes and args.prototypes != ivpt.AUTO:
        raise ValueError("--prototypes: expected numbers, or auto alone")
    if args.distance == "relative" and (args.method, args.start) != ("ivpt", "kmeans"):
        raise ValueError("--distance relative needs --method ivpt --start kmeans, which finds the "
                         "objects; or take --distance euclidean")
    for name, value in vars(args).items():
        lowest = 1 if name in ("epochs", "batch_size", "image_size") else 0
        if isinstance(value, (int, float)) and not lowest <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {lowest} or more")
    return args


def fill_blanks(args):
    """What was not typed comes from recipe and preset, and for a baseline from its own rates."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = min(8, os.cpu_count()) if device == "cuda" else 1
    preset = {"toy": TOY_PRESET, "cub": CUB_PRESET}.get(args.data, PRESET)
    if args.method != "ivpt":  # our recipe is for IVPT
        preset = preset | dict(recipe="paper")
    defaults = RECIPES[args.recipe or preset["recipe"]] | preset
    defaults |= dict(device=device, amp=has_bf16(device), workers=workers)
    defaults["out"] = f"runs/{Path(args.data).resolve().name}"
    if args.method != "ivpt":
        from baselines import METHODS
        if args.method not in METHODS:
            raise ValueError(f"--method {args.method}: expected ivpt, {', '.join(METHODS)}")
        defaults |= METHODS[args.method].rates | dict(start="noise", distance="euclidean")
        defaults["out"] += f"_{args.method}"
    weights = args.weights or preset["weights"]
    if weights == "toy":  # little trained, so it learns along
        defaults |= dict(tune="all", image_size=TOY_PRESET["image_size"])
    elif ivpt.backbone_name(weights) not in ivpt.ARCHITECTURES:
        defaults["image_size"] = None  # check_model takes that of the file
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.prototypes = tuple(args.prototypes)


def take_run_options(args, typed):
    """--resume: what was not typed is as in the run; what was must agree, or may change."""
    path = Path(args.out) / "last.pt"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is not there; name the run by --out")
    for name, then in ivpt.read_checkpoint(path)["options"].items():
        if name in typed and name not in MAY_CHANGE:
            check_same(path, name, then, getattr(args, name))
        elif name not in typed and name != "out":  # the folder may have been moved
            setattr(args, name, then)


def check_same(path, name, then, now):
    """One line where a run would not go on as it began."""
    if now != then:
        raise ValueError(f"--resume: {path} was trained with {name} {then}, now {now}; "
                         "give the same, or another --out")


def has_bf16(device):
    """Whether the device computes in bf16 itself: Ampere and later, AVX512-BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ------------------------------------------------------------------------------------ the losses
# A is a smoothed attention map (B, K, h, w), the background last. Every loss is a scalar; weight 1.
def classification(logits, labels):
    """Cross entropy of the mean over concepts of their class scores. logits (B, C), labels (B,)."""
    return F.cross_entropy(logits, labels)


def region_consistency(final, fused):
    """L_con = KL(final map, detached || fused map), both (B, G + 1, h, w); mean over patches."""
    P = final.detach() + 1e-10
    Q = fused + 1e-10
    return (final.detach() * (P.log() - Q.log())).sum(1).mean()


def total_variation(A):
    """(sum |dy| + sum |dx|) / (B h w): regions with short borders."""
    B, K, h, w = A.shape
    dy = A.diff(dim=2).abs().sum()
    dx = A.diff(dim=3).abs().sum()
    return (dy + dx) / (B * h * w)


def presence(A):
    """1 - mean over concepts of their largest pooled share in the batch: no concept may die out."""
    pooled = F.avg_pool2d(A[:, :-1], 3, stride=1)  # (B, K-1, h-2, w-2)
    return 1 - pooled.amax(dim=(0, 2, 3)).mean()


def background_presence(A):
    """BCE(max over positions of pool3(A_bg) * M, 1): every image has background, and at its rim."""
    pooled = F.avg_pool2d(A[:, -1], 3, stride=1)  # (B, h-2, w-2)
    h, w = pooled.shape[1:]
    y = torch.linspace(-1, 1, h, device=A.device)[:, None]
    x = torch.linspace(-1, 1, w, device=A.device)[None, :]
    M = y ** 2 + x ** 2
    peak = (pooled * M / M.max()).amax(dim=(1, 2))  # (B,)
    return -peak.clamp_min(1e-10).log().mean()  # binary cross entropy with target 1


def entropy(A):
    """Mean over patches of -sum_k A log A: every patch has one owner."""
    return torch.special.entr(A).sum(1).mean()  # entr(0) is 0


def equivariance(A, A_back):
    """1 - mean cosine of a concept's map and its map of the transformed image, moved back."""
    concepts = A[:, :-1].flatten(2)  # (B, K-1, h*w)
    moved_back = A_back[:, :-1].flatten(2)
    cosines = F.cosine_similarity(concepts, moved_back, dim=2)  # (B, K-1)
    return 1 - cosines.mean()


def orthogonality(features):
    """Mean of (Z Z^T - I)^2, Z the last layer's features (B, G + 1, D), rows of length 1."""
    Z = F.normalize(ivpt.to_float32(features), dim=2)
    identity = torch.eye(Z.shape[1], device=Z.device)
    with torch.autocast(Z.device.type, enabled=False):
        return (Z @ Z.transpose(1, 2) - identity).square().mean()


def mean_over_layers(loss, *maps):
    """The mean of loss(map of layer 1, ...), loss(map of layer 2, ...); 0 without layers."""
    values = [loss(*layer) for layer in zip(*maps)]
    return sum(values) / len(values) if values else torch.zeros(())


def ivpt_losses(model, images, labels, theta):
    """The eight losses of IVPT on one batch.

    images (B, 3, S, S), labels (B,), theta (2, 3) the affine map T of the equivariance loss.
    Returns a dict of the eight scalars and "loss", their sum; and the logits (B, C).
    """
    # The warped view needs no graph of the backbone: every map sees detached patches.
    warped = model(data.warp(images, theta), backbone_graph=False)
    maps_back = [data.unwarp(A, theta) for A in warped.attention]
    out = model(images)
    maps = out.attention
    final = [maps[-1]] * len(out.fused)
    losses = {
        "classification": classification(out.logits, labels),
        "region_consistency": mean_over_layers(region_consistency, final, out.fused),
        "total_variation": mean_over_layers(total_variation, maps),
        "presence": mean_over_layers(presence, maps),
        "background_presence": mean_over_layers(background_presence, maps),
        "entropy": mean_over_layers(entropy, maps),
        "equivariance": mean_over_layers(equivariance, maps, maps_back),
        "orthogonality": orthogonality(out.features),
    }
    losses["loss"] = sum(losses.values())
    return losses, out.logits


def method_losses(model, images, labels, theta):
    """IVPT's losses (a baseline that is built on IVPT weighs some), or a baseline's own."""
    if not isinstance(model, ivpt.IVPT):
        losses, logits = model.losses(images, labels)
        losses["loss"] = sum(losses.values())
        return losses, logits
    losses, logits = ivpt_losses(model, images, labels, theta)
    if hasattr(model, "loss_weights"):
        losses = {name: weight * losses[name] for name, weight in model.loss_weights.items()}
        losses["loss"] = sum(losses.values())
    return losses, logits


# --------------------------------------------------------------------------------- the optimiser
def parameter_groups(model, args):
    """IVPT's parameters, with their rates at batch 16."""
    fusions = [*model.fusions.named_parameters()]
    prompt_heads = [p for name, p in fusions if ".head." in name]
    groupings = [p for name, p in fusions if ".head." not in name]  # and the norms beside them
    class_heads = [*model.classifier.parameters(), *model.votes.parameters()]
    decay = 0.5 if args.votes == "all" else 0.0  # ours: docs/tuned.md
    tuned = [p for p in model.backbone.parameters() if p.requires_grad]
    return [
        dict(params=[*model.norm.parameters(), *groupings], lr=args.lr),
        dict(params=prompt_heads, lr=args.lr_fusion),
        dict(params=class_heads, lr=args.lr, weight_decay=decay),
        dict(params=[concept.prototypes for concept in model.concepts], lr=args.lr_prototypes),
        dict(params=[concept.bias for concept in model.concepts], lr=args.lr_bias),
        dict(params=tuned, lr=args.lr_backbone if args.tune == "all" else args.lr_prototypes)]


def make_optimizer(model, args):
    """Adam; all rates are halved every four epochs. Only groups that ask for it decay (AdamW)."""
    if args.method == "ivpt":
        groups = parameter_groups(model, args)
    else:
        groups = model.parameter_groups(args)
    for group in groups:
        group["lr"] *= (args.batch_size / 16) ** 0.5
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)


def average_gradients(parameters, world):
    """The mean over all processes. Those without a gradient have none in any process."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


def share_state(model, world):
    """All processes go on as the first: a GPU's sums may differ by a rounding."""
    if world > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


# ------------------------------------------------------------------------------- a run's beginning
def open_run_folder(args):
    """The run's folder, made if need be. A folder that holds a run is not overwritten unasked."""
    out = Path(args.out)
    if (out / "config.json").is_file() and not (args.resume or args.overwrite):
        raise ValueError(f"--out {out} holds a run; take --resume, --overwrite or another folder")
    out.mkdir(parents=True, exist_ok=True)
    return out


def check_model(args):
    """ValueError where options and backbone do not fit, before a download. Fills image_size."""
    name = ivpt.backbone_name(args.weights)
    if name in ivpt.ARCHITECTURES:
        architecture = ivpt.ARCHITECTURES[name]
        with torch.device("meta"):  # shapes without values
            backbone = ivpt.VisionTransformer(**architecture, image_size=args.image_size)
    else:
        backbone = ivpt.load_backbone(args.weights, args.image_size)
    args.image_size = backbone.image_size
    ivpt.build(asdict(args), 2, backbone)


def open_dataset(args, folder, split, world):
    """The training images of the run. Raises ValueError where no batch can be made of them."""
    dataset = data.Images(folder, split, "train", args.image_size, args.seed)
    if len(dataset.classes) < 2:
        raise ValueError(f"{folder}: one class only; expected two or more to tell apart")
    if len(dataset) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size}: {folder} has {len(dataset)} training "
                         "images; take less")
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of the {world} "
                         "processes")
    return dataset


def use_cores(args):
    """On a CPU every loader process keeps a core to itself: threads that wait for one are slow."""
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() - args.workers))


def epoch_batches(num_images, args, epoch, rank=0, world=1):
    """This process's share of an epoch's batches: a list of lists of image indices.

    The order depends on seed and epoch alone. Images that fill no batch wait for another epoch.
    """
    generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
    order = torch.randperm(num_images, generator=generator)
    steps = num_images // args.batch_size
    batches = order[:steps * args.batch_size].view(steps, world, -1)
    return batches[:, rank].tolist()


def resume_run(path, args, dataset, model, optimizer, scheduler):
    """Puts a run back where its last finished epoch left it. Returns how many are finished."""
    checkpoint = ivpt.read_checkpoint(path)
    check_same(path, "classes", checkpoint["classes"], dataset.classes)
    check_same(path, "images", checkpoint["images"], len(dataset))
    if hasattr(model, "after_epoch"):  # stages are counted from the last epoch
        check_same(path, "epochs", checkpoint["options"]["epochs"], args.epochs)
    ivpt.restore(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"])
    return checkpoint["epoch"]


# ---------------------------------------------------------------------------------------- the run
def train(args):
    """The run that the options describe. Returns its metrics, as in metrics.json."""
    # Data and model. A folder that holds a run is refused before anything is downloaded.
    out = open_run_folder(args)
    log = out / "log.jsonl"
    check_model(args)
    use_cores(args)
    device = evaluate.local_device(args.device)
    rank, world = evaluate.start_processes(device)
    chief = rank == 0
    folder = data.find(args.data, args.data_root)
    split, test_split = ("fit", "val") if args.validate else ("train", "test")
    dataset = open_dataset(args, folder, split, world)
    unaugmented = data.Images(folder, split, "test", args.image_size)
    data.Images(folder, test_split, "test", args.image_size)  # needed at the end: checked now
    torch.manual_seed(args.seed)
    model = ivpt.build(asdict(args), len(dataset.classes)).to(device)
    if not args.resume:
        if args.weights == "toy" and args.pretrain:
            from prepare.toy_vit import pretrain
            pretrain(model.backbone, dataset, args.pretrain, device, args.amp, args.workers)
            ivpt.tune_backbone(model.backbone, args.tune)  # what stays frozen is frozen again
        if args.prototypes == ivpt.AUTO and args.method == "ivpt":
            counts = ivpt.count_prototypes(model, unaugmented, args.seed)
            args.prototypes = ivpt.PROTOTYPES[:-len(counts)] + counts  # --no-cross-layer: one
            model = ivpt.build(asdict(args), len(dataset.classes), model.backbone).to(device)
        if args.start == "kmeans" and args.method == "ivpt":
            ivpt.start_prototypes(model, unaugmented, args.seed)
        if hasattr(model, "start"):  # a baseline that starts from the images
            model.start(unaugmented)
    optimizer, scheduler = make_optimizer(model, args)
    finished = 0
    if args.resume:
        finished = resume_run(out / "last.pt", args, dataset, model, optimizer, scheduler)
    elif chief:  # --overwrite
        for name in ("last.pt", "metrics.json", "metrics_val.json"):
            (out / name).unlink(missing_ok=True)
    share_state(model, world)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fingerprint = ivpt.fingerprint(model)  # of what stays frozen
    if chief:
        ivpt.save(out / "config.json", json.dumps(asdict(args), indent=1) + "\n")
        # A run that was killed may have logged one epoch more than it saved.
        lines = log.read_text().splitlines(keepends=True)[:finished] if finished else []
        log.write_text("".join(lines))
        trained = sum(p.numel() for p in parameters)
        precision = "bf16" if args.amp else "fp32"
        data.say(f"{args.method}, recipe {args.recipe}, prototypes {args.prototypes}: "
                 f"{trained:,} trained parameters, "
                 f"{len(dataset)} images of {len(dataset.classes)} classes")
        data.say(f"{device}, {precision}, processes: {world}")

    # The loop.
    compute_losses = torch.compile(method_losses) if args.compile else method_losses
    bad_steps = 0  # in a row
    for epoch in range(finished, args.epochs):
        began = time.time()
        model.train()
        if hasattr(model, "set_epoch"):  # a baseline with stages
            model.set_epoch(epoch, args.epochs)
        dataset.epoch = epoch
        torch.manual_seed((1000 * args.seed + epoch) * 1000 + rank)  # a resumed run draws the same
        batches = epoch_batches(len(dataset), args, epoch, rank, world)
        # The loader has a generator of its own, or it would draw its seed from the model's noise.
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.workers,
                            pin_memory=args.device == "cuda", generator=torch.Generator())
        history = []  # one dict of losses a step
        progress = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=None if chief else True)
        for images, labels, _, indices in progress:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            theta = data.sample_affine()  # one affine map for all images
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                losses, logits = compute_losses(model, images, labels, theta)
            optimizer.zero_grad()
            losses["loss"].backward()
            if world > 1:
                average_gradients(parameters, world)
            norm = nn.utils.clip_grad_norm_(parameters, 2.0)
            if not norm.isfinite():
                bad_steps += 1
                print(f"epoch {epoch + 1}: gradient norm {norm.item()}, no step taken on images "
                      f"{indices.tolist()}", file=sys.stderr)
                if bad_steps == 3:
                    raise ValueError("three non-finite gradients; lower --lr, or take --no-amp")
                continue
            bad_steps = 0
            optimizer.step()
            losses["train_accuracy"] = 100 * (logits.argmax(1) == labels).float().mean()
            history.append({name: value.detach() for name, value in losses.items()})

        # The epoch's end: a line in the log, the checkpoint.
        if hasattr(model, "after_epoch"):
            model.after_epoch(epoch, args.epochs, unaugmented)
            share_state(model, world)
        line = dict(epoch=epoch + 1)
        for name in history[0] if history else ():
            values = torch.stack([losses[name] for losses in history])
            line[name] = round(values.mean().item(), 6)
        line["lr"] = optimizer.param_groups[0]["lr"]
        line["seconds"] = round(time.time() - began, 2)
        scheduler.step()
        if chief:
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            ivpt.save(out / "last.pt", dict(
                options=asdict(args), classes=dataset.classes, images=len(dataset), epoch=epoch + 1,
                model=ivpt.trained_state(model), fingerprint=fingerprint,
                optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict()))
            minutes_left = (args.epochs - epoch - 1) * line["seconds"] / 60
            data.say(f"{json.dumps(line)} {minutes_left:.1f} minutes left")

    # The result.
    recipe = {name: getattr(args, name) for name in evaluate.METHOD}
    metrics_file = out / ("metrics_val.json" if args.validate else "metrics.json")
    metrics = evaluate.evaluate(
        model, folder, args.image_size, workers=args.workers, amp=args.amp, seed=args.seed,
        split=test_split, recipe=recipe)
    if chief:
        ivpt.save(metrics_file, json.dumps(metrics, indent=1) + "\n")
        data.say(f"\n{evaluate.table(metrics)}\n")
        next_step = ["python", "evaluate.py", "--ckpt", str(out / "last.pt")]
        next_step += ["--visualize", str(out / "pictures")]
        if args.validate:
            next_step += ["--split", "val"]
        data.say(shlex.join(next_step))
    return metrics


def main():
    train(parse())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
