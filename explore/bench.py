"""Two benchmarks: a training step beside the plain ViT's forward, and the kernel beside PyTorch.

    python explore/bench.py --data cub --weights vits14 --image-size 224 --batch-size 8
    python explore/bench.py --kernel

The first takes train.py's options and prints a row of a table. A step is train.py's in the first
epoch, without reading images. Named backbones get random weights, so nothing is downloaded. Times
are medians in milliseconds an image. Memory is the peak beyond that of loading the model.

The second compares forms of prototype attention. On a GPU it runs in fp32 and bf16. On a CPU it
runs in fp32, on one thread and one image.
"""
import functools
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import kernels
import model as ivpt
import train

NUM_CLASSES = 200
WARM_UP, ROUNDS = 2, 20
SHAPES = (
    (32, 1369, 768, 17),  # B, N, D, K; ViT-B/14 at 518 pixels
    (32, 256, 384, 17),  # ViT-S/14 at 224
    (8, 1369, 1024, 17),  # ViT-L/14 at 518
    (16, 196, 192, 5))  # ViT-Tiny/16 at 224


# ---- 1. Time and memory --------------------------------------------------------------------------
def seconds(run, device):
    """Wall time of a call until the device has done its work; each call leaves an empty queue."""
    began = time.perf_counter()
    run()
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


# ---- 2. The training step ------------------------------------------------------------------------
def random_backbone(args):
    name = ivpt.backbone_name(args.weights)
    if name in ivpt.ARCHITECTURES:
        return ivpt.VisionTransformer(**ivpt.ARCHITECTURES[name], image_size=args.image_size)
    return ivpt.load_backbone(args.weights, args.image_size)


def make_forward(backbone, images, args):
    """-> a function that runs the plain ViT."""
    plain = torch.compile(backbone) if args.compile else backbone

    def forward():
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            plain(images)

    return forward


def make_step(model, images, args):
    """-> a function that takes a training step, as in train.train."""
    optimizer, _ = train.make_optimizer(model, args)
    compute_losses = torch.compile(model.losses) if args.compile else model.losses
    parameters = [p for p in model.parameters() if p.requires_grad]
    labels = torch.arange(len(images), device=images.device) % NUM_CLASSES

    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            losses, _ = compute_losses(images, labels, data.sample_affine())
        optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()

    return step


def bench_step(args):
    """args: train.Options -> a table's row, a dict."""
    train.check_model(args)
    train.use_cores(args)
    device = data.local_device(args.device)
    torch.manual_seed(args.seed)
    model = ivpt.build(vars(args), NUM_CLASSES, random_backbone(args)).to(device).train()
    model.before_epoch(0, args.epochs)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    forward = make_forward(model.backbone, images, args)
    step = make_step(model, images, args)

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
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))


# ---- 3. The kernel -------------------------------------------------------------------------------
def regions(x, prototypes, bias):
    """a (B, N, K), r (B, N, K), m (B, K), and the divisor of the pooled features (B, K, 1)."""
    logits = F.linear(x, 2 * prototypes, -prototypes.square().sum(1))
    attention = (logits.float().softmax(-1) + bias.T).clamp(min=0)
    won = attention == attention.amax(-1, keepdim=True)
    region = torch.where(won, attention, 0)
    mass = region.sum(1)
    divisor = torch.where(mass > 0, mass, 1).to(x.dtype)
    return attention, region, mass, divisor[..., None]


def two_reads(x, prototypes, bias):
    """The honest rival: two matmuls in the dtype of x, each of which reads x from memory."""
    attention, region, mass, divisor = regions(x, prototypes, bias)
    sums = region.to(x.dtype).mT @ x
    return attention.mT, sums / divisor, mass


def product(x, prototypes, bias):
    """As the equation is often written down: every r_k(n) x_n in memory, a tensor (B, N, K, D)."""
    attention, region, mass, divisor = regions(x, prototypes, bias)
    sums = (region[..., None] * x[:, :, None]).sum(1).to(x.dtype)
    return attention.mT, sums / divisor, mass


def call(form, inputs, backward):
    """The outputs of form, or the gradients of half the sum of their squares."""
    inputs = [t.detach().requires_grad_(backward) for t in inputs]  # a leaf remembers its stream
    outputs = form(*inputs)
    return torch.autograd.grad(outputs, inputs, outputs) if backward else outputs


def kernel_seconds(run, device):
    """The median time of a call. On a GPU x is not in the cache and Python does not count."""
    if device.type == "cpu":
        return median([seconds(run, device) for _ in range(WARM_UP + ROUNDS)][WARM_UP:])
    run()  # compiles
    graph = torch.cuda.CUDAGraph()  # a replay does not wait for Python
    with torch.cuda.graph(graph):
        run()
    return kernels.triton.testing.do_bench(graph.replay, return_mode="median") / 1e3


def kernel_mib(run, device):
    """What a call allocates at its peak, in MiB; nan on a CPU, where the process's peak stays."""
    if device.type == "cpu":
        return math.nan
    torch.cuda.reset_peak_memory_stats()
    before = peak_gib(device)
    run()
    return 1024 * (peak_gib(device) - before)


def bench_shape(B, N, D, K, device, dtype):
    """Prints a line for each form. GB/s: as if x was read once and nothing else was moved. With
    gradients x is read twice at least and dx is written: a third of a copy is their limit where x
    is larger than the cache."""
    inputs = torch.randn(B, N, D), 0.3 * torch.randn(K, D), torch.zeros(K, N)
    inputs = [t.to(device, dtype) for t in inputs]
    x = inputs[0]
    copy_rate = 2 * x.nbytes / kernel_seconds(x.clone, device) / 1e9  # it reads and writes
    print(f"B {B}, N {N}, D {D}, K {K}, {dtype}; a copy of x: {copy_rate:.1f} GB/s")
    forms = dict(ours=kernels.prototype_attention, two_reads=two_reads, product=product)
    if device.type == "cuda":
        torch.compiler.reset()  # else later shapes are compiled for all sizes, or not at all
        forms["compiled"] = torch.compile(two_reads, dynamic=False)
    for name, form in forms.items():
        for kind in ("fwd", "fwd+bwd"):
            run = functools.partial(call, form, inputs, kind == "fwd+bwd")
            elapsed = kernel_seconds(run, device)
            rate = x.nbytes / elapsed / 1e9
            share = 100 * rate / copy_rate
            line = f"  {name:10}{kind:8}{1e6 * elapsed:8.0f} us"
            line += f"{rate:8.1f} GB/s{share:6.0f} % of a copy"
            print(line + f"{kernel_mib(run, device):8.0f} MiB")


def bench_kernel():
    if kernels.triton is None or not torch.cuda.is_available():
        torch.set_num_threads(1)
        print(f"torch {torch.__version__}, CPU")
        for _, N, D, K in SHAPES:
            bench_shape(1, N, D, K, torch.device("cpu"), torch.float32)
        return
    name = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, triton {kernels.triton.__version__}, {name}")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            bench_shape(*shape, torch.device("cuda"), dtype)


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words == ["--kernel"]:
        return bench_kernel()
    if "--kernel" in words:
        raise ValueError("--kernel: expected no other option beside it")
    row = bench_step(train.parse(words))
    print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
    print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    data.run_script(main)
