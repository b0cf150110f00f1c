"""Times the plain ViT's forward and one training step, alternating; prints a table row.

    python explore/bench.py --data cub --weights vits14 --image-size 224 --batch-size 8

Takes train.py's options. Named backbones get random weights, so nothing is downloaded. Times are
medians in milliseconds an image; memory is the peak beyond that of loading the model. A step is
train.py's without reading images.
"""
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
import model as ivpt
import train

NUM_CLASSES = 200
WARM_UP, ROUNDS = 2, 20


def random_backbone(args):
    name = args.weights.removeprefix("dinov2_")
    if name in ivpt.ARCHITECTURES:
        return ivpt.VisionTransformer(**ivpt.ARCHITECTURES[name], image_size=args.image_size)
    return ivpt.load_backbone(args.weights, args.image_size)


def seconds(work, device):
    """Seconds of one call until the device has done its work; each call leaves an empty queue."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gib(device):
    """Peak memory so far: the allocator's on a GPU, the process's on a CPU; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)  # macOS counts bytes, Linux KiB


def bench(args):
    train.check_model(args)
    train.use_cores(args)
    device = evaluate.local_device(args.device)
    torch.manual_seed(args.seed)
    model = ivpt.build(asdict(args), NUM_CLASSES, random_backbone(args)).to(device).train()
    optimizer, _ = train.make_optimizer(model, args)
    compute_losses = torch.compile(train.method_losses) if args.compile else train.method_losses
    plain = torch.compile(model.backbone) if args.compile else model.backbone
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % NUM_CLASSES
    parameters = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    def forward():
        with torch.no_grad(), autocast:
            plain(images)

    def step():
        with autocast:
            losses, _ = compute_losses(model, images, labels, data.sample_affine())
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()

    loaded = peak_gib(device)
    forwards, steps = [], []
    for _ in range(WARM_UP + ROUNDS):  # alternating: a busy machine disturbs both alike
        forwards.append(1000 * seconds(forward, device) / args.batch_size)
        steps.append(1000 * seconds(step, device) / args.batch_size)
    forwards, steps = forwards[WARM_UP:], steps[WARM_UP:]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return dict(method=args.method, recipe=args.recipe, weights=args.weights,
                image_size=args.image_size, batch_size=args.batch_size, device=name,
                threads=torch.get_num_threads(), torch=torch.__version__,
                dtype="bf16" if args.amp else "fp32", compile=args.compile,
                forward_ms=round(median(forwards), 3), step_ms=round(median(steps), 3),
                ratio=round(median(s / f for s, f in zip(steps, forwards)), 3),
                peak_gib_above_model=round(peak_gib(device) - loaded, 3),
                trained_parameters=sum(p.numel() for p in parameters))


def main():
    row = bench(train.parse())
    print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
    print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    data.run_script(main)
