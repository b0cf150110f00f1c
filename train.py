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

# ----------------------------------------------------------------------------- recipes and options
# The paper's text and the authors' program differ in the bias, the fusion head, what is trained in
# the backbone and, as the text says nothing of it, where prototypes start.
# The text's rate of the bias is 2e-4. Adam moves a bias by at most about its rate a step: at 2e-4,
# halved every four epochs, by 0.6 in 25 epochs of CUB. It would outgrow the shares to which it is
# added, since these sum to 1. So PAPER has a tenth of it.
PAPER = dict(bias_after_softmax=True, fusion_mlp=True, tune="none", start="clusters", lr_bias=2e-5)
RELEASED = dict(bias_after_softmax=False, fusion_mlp=False, tune="tokens", start="noise",
                lr_bias=2e-4)
RECIPES = {"paper": PAPER, "released": RELEASED}

# Presets: what --weights decides. A file has an image size of its own.
TOY_PRESET = dict(image_size=112, pretrain=12, epochs=9)
FILE_PRESET = dict(image_size=None)

# What may be typed beside --resume: the machine, and more epochs.
MAY_CHANGE = {"resume", "out", "device", "workers", "data_root", "amp", "compile", "epochs"}


def option(default, help, **settings):
    return field(default=default, metadata=dict(help=help, **settings))


@dataclass
class Options:
    """The command line, config.json and the options in a checkpoint."""
    # data and run
    data: str = option("toy", "toy (drawn birds), cub (CUB-200-2011) or a folder: see data.py")
    data_root: str = option(None, "folder that holds the data set, or where to put it")
    out: str = option(None, "folder of the run (runs/DATA, runs/DATA_METHOD)")
    resume: bool = option(False, "go on after the last finished epoch of the run in --out, with "
                          "its options; only the machine and a larger --epochs may be typed")
    overwrite: bool = option(False, "replace the run in --out")
    validate: bool = option(False, "train on three of four training images, evaluate on the fourth")
    # model
    method: str = option("ivpt", "ivpt, or another method's name: see methods/")
    recipe: str = option("paper", "the paper's text, but for lr_bias, or its program",
                         choices=list(RECIPES))
    weights: str = option(None, "toy, vits14, vitb14, vitl14, vitg14, each but toy also with "
                          "_reg4, or a file (toy for the toy, else vitb14_reg4)")
    image_size: int = option(518, "side of the input in pixels, a multiple of the patch")
    prototypes: tuple = option(ivpt.PROTOTYPES, "number in each layer, with one for background",
                               nargs="+", type=int)
    start: str = option(None, "where prototypes start", choices=["clusters", "noise"])
    bias_after_softmax: bool = option(None, "add the spatial bias to the shares, not the logits",
                                      action=argparse.BooleanOptionalAction)
    fusion_mlp: bool = option(None, "an MLP makes the prompts, not one Linear",
                              action=argparse.BooleanOptionalAction)
    tune: str = option(None, "what is trained in the backbone", choices=["none", "tokens", "all"])
    no_bias: bool = option(False, "ablation: no spatial bias")
    no_regions: bool = option(False, "ablation: global attention pools instead of regions")
    no_cross_layer: bool = option(False, "ablation: concepts at the output alone, no prompts")
    no_fusion: bool = option(False, "ablation: every fine concept is a prompt of its own")
    # optimisation; rates are those at batch 16 and scale with the root of the batch size
    pretrain: int = option(0, "epochs in which the toy ViT, which has no file, is trained first")
    epochs: int = option(25, "passes over the training images; rates halve every four")
    batch_size: int = option(16, "images of an optimiser step, over all processes")
    lr: float = option(1e-2, "rate of class head, grouping and LayerNorms")
    lr_fusion: float = option(1e-2, "rate of the fusion heads, which make prompts")
    lr_prototypes: float = option(2e-4, "rate of prototypes, tuned tokens; see other methods")
    lr_bias: float = option(None, "rate of the spatial bias: too high, and regions stand still")
    lr_backbone: float = option(2e-4, "rate of the backbone under --tune all")
    seed: int = option(42, "of weights, order, augmentation and noise")
    # machine
    amp: bool = option(None, "bf16 autocast (default: where the device has bf16)",
                       action=argparse.BooleanOptionalAction)
    compile: bool = option(False, "torch.compile the forward and its losses")
    device: str = option(None, "default: what is there", choices=["cuda", "cpu"])
    workers: int = option(None, "loader processes of each process (default: up to 8, CPU 1)")
    # not typed: where each value is from
    sources: dict = None


# ------------------------------------------------------------------------------------ the losses
# A is a smoothed attention map (B, K, h, w), the background last; fused maps are not smoothed.
# Every loss is a scalar of weight 1.
def classification(logits, labels):
    """Cross entropy of the mean over concepts of their class scores. logits (B, C), labels (B,)."""
    return F.cross_entropy(logits, labels)


def region_consistency(final, fused):
    """L_con = KL(final map, detached || fused map), both (B, G + 1, h, w); mean over patches."""
    P, Q = final.detach(), fused
    log_ratio = (P + 1e-10).log() - (Q + 1e-10).log()  # shares can be 0, whose log is not finite
    return (P * log_ratio).sum(1).mean()


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
    """BCE(max over positions of pool3(A_bg) * rim, 1): every image has background near its rim."""
    pooled = F.avg_pool2d(A[:, -1], 3, stride=1)  # (B, h-2, w-2)
    h, w = pooled.shape[1:]
    y = torch.linspace(-1, 1, h, device=A.device)[:, None]
    x = torch.linspace(-1, 1, w, device=A.device)[None, :]
    rim = y ** 2 + x ** 2  # 0 in the middle; 1 in the corners, once divided by its maximum
    peak = (pooled * rim / rim.max()).amax(dim=(1, 2))  # (B,)
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
    # The warped view first: its graph of the blocks is gone before that of the images is built.
    warped_maps = model(data.warp(images, theta), maps_only=True).attention
    maps_back = [data.unwarp(A, theta) for A in warped_maps]
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


ivpt.IVPT.losses = ivpt_losses  # model.Method asks for it; other methods bring their own


# --------------------------------------------------------------------------------- the optimiser
def make_optimizer(model, args):
    """Adam; all rates are halved every four epochs. AdamW, since some methods ask for decay."""
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


# ----------------------------------------------------------------- from the command line to options
def parse(words=None):
    """Command line -> Options. Where the value of an option comes from: see sources, below."""
    parser = data.one_line_parser(
        description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS,
        epilog="Options that are not typed come from the recipe, the method, the weights and the "
               "machine; the run prints them.")
    for f in fields(Options):
        if not f.metadata:
            continue
        settings = dict(f.metadata)
        if f.type is bool:
            settings.setdefault("action", "store_true")
        elif f.type is not str:  # str keeps the parser's own type, which expands ~
            settings.setdefault("type", f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **settings)
    typed = vars(parser.parse_args(words))  # without defaults
    if "prototypes" in typed:
        typed["prototypes"] = tuple(typed["prototypes"])
    check_numbers(typed)
    if "resume" in typed:
        return options_of_run(typed)

    default = {f.name: f.default for f in fields(Options)}
    name = typed.get("method", default["method"])
    method = ivpt.find_method(name)
    unused = set(ivpt.IVPT.accepts) - set(method.accepts)
    for option_name in sorted(unused & typed.keys()):
        raise ValueError(f"--{option_name.replace('_', '-')}: --method {name} does not take it")
    recipe = typed.get("recipe", default["recipe"])
    weights = typed.get("weights", "toy" if typed.get("data", "toy") == "toy" else "vitb14_reg4")
    sources = {  # the first that has an option decides
        "typed": typed,
        "not used": dict.fromkeys(unused),
        f"recipe {recipe}": RECIPES[recipe] if "recipe" in typed else {},
        f"method {name}": method.rates,
        "default recipe": RECIPES["paper"],
        f"weights {weights}": preset(weights),
        "data": dict(weights=weights, out=default_out(typed)),
        "machine": machine(typed),
        "default": default}
    args = Options(sources={})
    del default["sources"]
    for option_name in default:
        source = next(source for source, values in sources.items() if option_name in values)
        setattr(args, option_name, sources[source][option_name])
        args.sources[option_name] = source
    if typed.get("pretrain") and args.weights != "toy":
        raise ValueError(f"--pretrain: --weights {args.weights} is pretrained already")
    return args


def default_out(typed):
    name = Path(typed.get("data", "toy")).resolve().name
    method = typed.get("method", "ivpt")
    return f"runs/{name}" if method == "ivpt" else f"runs/{name}_{method}"


def preset(weights):
    """Options that follow from the backbone."""
    if weights == "toy":
        return TOY_PRESET
    if ivpt.backbone_name(weights) in ivpt.ARCHITECTURES:
        return {}
    return FILE_PRESET


def machine(typed):
    device = typed.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    workers = min(8, data.num_cores()) if device == "cuda" else 1
    return dict(device=device, amp=has_bf16(device), workers=workers)


def check_numbers(typed):
    for name, value in typed.items():
        lowest = 1 if name in ("epochs", "batch_size", "image_size") else 0
        if isinstance(value, (int, float)) and not lowest <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {lowest} or more")


def options_of_run(typed):
    """--resume: the options of the run in --out. Typed ones must agree with it, or may change."""
    path = Path(typed.get("out", default_out(typed)), "last.pt")
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is not there; name the run by --out")
    _, checkpoint = ivpt.load_checkpoint(path)
    stored = checkpoint["options"]
    for name, value in typed.items():
        if name not in MAY_CHANGE:
            check_same(path, name, stored[name], value)
    if typed.get("epochs", math.inf) < checkpoint["epoch"]:
        raise ValueError(f"--epochs {typed['epochs']}: {path} has finished {checkpoint['epoch']}")
    values = {f.name: stored[f.name] for f in fields(Options)}
    values |= typed | dict(out=str(path.parent))
    values["sources"] = stored["sources"] | dict.fromkeys(typed, "typed")
    return Options(**values)


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


def table_of(args):
    """The options that the method takes, a line each: name, value, and where the value is from."""
    lines = []
    for name, source in args.sources.items():
        if source != "not used":
            value = str(getattr(args, name))
            lines.append(f"{name:20}{value:33} {source}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- a run's beginning
def open_run_folder(args):
    """The run's folder, made if need be. A folder that holds a run is not overwritten unasked."""
    out = Path(args.out)
    if (out / "last.pt").is_file() and not (args.resume or args.overwrite):
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
        torch.set_num_threads(max(1, data.num_cores() - args.workers))


def new_model(args, dataset, device):
    """The model before its start. dataset: the training images; a toy ViT is pretrained on them."""
    torch.manual_seed(args.seed)
    backbone = ivpt.load_backbone(args.weights, args.image_size).to(device)
    if args.weights == "toy" and args.pretrain:
        from prepare.toy_vit import pretrain
        pretrain(backbone, dataset, args.pretrain, device, args.amp, args.workers)
    torch.manual_seed(args.seed)  # so the model does not depend on what pretraining drew
    return ivpt.build(asdict(args), len(dataset.classes), backbone).to(device)


def epoch_batches(num_images, args, epoch, rank=0, world=1):
    """This process's share of an epoch's batches: a list of lists of image indices.

    The order depends on seed and epoch alone. Images that fill no batch wait for another epoch.
    """
    generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
    order = torch.randperm(num_images, generator=generator)
    steps = num_images // args.batch_size
    batches = order[:steps * args.batch_size].view(steps, world, -1)
    return batches[:, rank].tolist()


# ---------------------------------------------------------------------------------------- the run
def train(args):
    """The run that the options describe. Returns its metrics, as in metrics.json."""
    # Folder and data. What cannot work is said before anything is downloaded.
    if not args.resume:
        check_model(args)
    out = open_run_folder(args)
    lock = data.claim(out) if os.environ.get("RANK", "0") == "0" else None  # held to the end
    last, log = out / "last.pt", out / "log.jsonl"
    use_cores(args)
    device = data.local_device(args.device)
    rank, world = data.start_processes(device)
    chief = rank == 0
    folder = data.find(args.data, args.data_root)
    split, test_split = ("fit", "val") if args.validate else ("train", "test")
    dataset = open_dataset(args, folder, split, world)
    unaugmented = data.Images(folder, split, "test", args.image_size)
    data.Images(folder, test_split, "test", args.image_size)  # needed at the end: checked now

    # Model and optimiser: new, or as the last finished epoch left them.
    finished = 0
    if args.resume:
        model, checkpoint = ivpt.load_checkpoint(last)
        model.to(device)
        check_same(last, "classes", checkpoint["classes"], dataset.classes)
        check_same(last, "images", checkpoint["images"], len(dataset))
        if model.has_stages:  # they are counted from the last epoch
            check_same(last, "epochs", checkpoint["options"]["epochs"], args.epochs)
        finished = checkpoint["epoch"]
    else:
        model = new_model(args, dataset, device)
        model.start(unaugmented, args)
    if not model.augmented:
        dataset.view = "test"
    optimizer, scheduler = make_optimizer(model, args)
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    share_state(model, world)
    parameters = [p for p in model.parameters() if p.requires_grad]
    compute_losses = torch.compile(model.losses) if args.compile else model.losses
    if chief:
        if not args.resume:  # a new run removes the results of the one that it overwrites
            for name in ("last.pt", "metrics.json", "metrics_val.json"):
                (out / name).unlink(missing_ok=True)
        data.save(out / "config.json", json.dumps(asdict(args), indent=1) + "\n")
        # A run that was killed may have logged one epoch more than it saved.
        lines = log.read_text().splitlines(keepends=True) if finished and log.is_file() else []
        del lines[finished:]
        data.save(log, "".join(lines))
        data.say(table_of(args))
        trained = sum(p.numel() for p in parameters)
        data.say(f"{trained:,} trained parameters, {len(dataset)} images of "
                 f"{len(dataset.classes)} classes, processes: {world}")

    # The loop.
    bad_steps = 0  # in a row
    for epoch in range(finished, args.epochs):
        began = time.time()
        model.train()
        model.before_epoch(epoch, args.epochs)
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
                losses, logits = compute_losses(images, labels, theta)
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
        model.after_epoch(epoch, args.epochs, unaugmented)
        if model.has_stages:
            share_state(model, world)
        line = dict(epoch=epoch + 1)
        names = history[0] if history else ()  # none if every step was skipped
        for name in names:
            values = torch.stack([losses[name] for losses in history])
            line[name] = round(values.mean().item(), 6)
        line["lr"] = optimizer.param_groups[0]["lr"]
        line["seconds"] = round(time.time() - began, 2)
        scheduler.step()
        if chief:
            lines.append(json.dumps(line) + "\n")
            data.save(log, "".join(lines))
            data.save(last, dict(
                options=asdict(args), classes=dataset.classes, images=len(dataset), epoch=epoch + 1,
                model=model.state_dict(), optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict()))
            minutes_left = (args.epochs - epoch - 1) * line["seconds"] / 60
            data.say(f"{json.dumps(line)} {minutes_left:.1f} minutes left")

    # The result.
    metrics_file = out / ("metrics_val.json" if args.validate else "metrics.json")
    metrics = evaluate.evaluate(
        model, folder, args.image_size, workers=args.workers, amp=args.amp, seed=args.seed,
        split=test_split, recipe=evaluate.recipe_of(asdict(args)))
    if chief:
        data.save(metrics_file, json.dumps(metrics, indent=1) + "\n")
        data.say(f"\n{evaluate.table(metrics)}\n")
        next_step = ["python", "evaluate.py", "--ckpt", str(last)]
        next_step += ["--visualize", str(out / "pictures")]
        data.say(shlex.join(next_step))
    return metrics


def main():
    train(parse())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
