"""The specification of IVPT as tests: oracles written out independently, properties, and one smoke run a script.

    python -m pytest                    # everything; what needs a GPU or real data skips with its reason
    python -m pytest -k "kernels"       # one room: kernels, model, data, train or evaluate
"""
import contextlib
import errno
import fnmatch
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import kernels
import model as ivpt
import train

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"  # real birds and a real ViT where this project is developed; elsewhere those tests skip


needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton cannot be imported here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: run on one to check and time the kernels")
KERNELS_CHIPS = {80: 166912, 89: 101376, 90: 232448, 100: 232448}       # shared memory a program may have, bytes
KERNELS_SHAPES = ((32, 1369, 768, 17), (32, 256, 384, 17), (8, 1369, 1024, 17), (16, 196, 192, 5))


def kernels_problem(B, N, D, K, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    x, q, bias = draw(B, N, D), 0.3 * draw(K, D), 0.3 * draw(K, N)
    grads = draw(B, K, N), draw(B, K, D), draw(B, K)
    return [t.to(device, dtype) for t in (x, q, bias)], [t.to(device) for t in grads]


def kernels_autograd(inputs, grads, dtype, after=True, smoothing=0.0, detach_maps=False):
    """Outputs and gradients of the reference, computed in dtype."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = kernels.prototype_attention_reference(*inputs, after, smoothing=smoothing, detach_maps=detach_maps)
    found = torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
    return [o.detach() for o in outputs], found


def kernels_excess(found, same_precision, exact):
    """Error beyond the rule of the design: at most twice PyTorch's error in the same precision. Eight roundings of the
    largest value (at least 1, the size of the incoming gradients) are granted where PyTorch happens to be exact."""
    def error(a):
        return (a.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    return error(found) - 2 * error(same_precision) - 8 * torch.finfo(torch.float32).eps * scale


# --- Reference alone -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("smoothing", (0.0, 1e-2))
def test_kernels_reference_follows_the_definition_patch_by_patch(after, smoothing):
    (x, q, bias), _ = kernels_problem(2, 6, 4, 3, torch.float64)
    attention, pooled, mass = kernels.prototype_attention_reference(x, q, bias, after, smoothing=smoothing)
    sums, total = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for image, n in itertools.product(range(2), range(6)):
        distance = torch.stack([-(x[image, n] - q[k]).square().sum() for k in range(3)])
        a = distance.softmax(0) + bias[:, n] if after else (distance + bias[:, n]).softmax(0)
        a = a.clamp(min=0)
        a = (a + smoothing) / (a + smoothing).sum() if smoothing else a
        torch.testing.assert_close(attention[image, :, n], a)
        k = int(a.argmax())
        sums[image, k] += a[k] * x[image, n]
        total[image, k] += a[k]
    torch.testing.assert_close(mass, total)
    torch.testing.assert_close(pooled, torch.where(total[..., None] > 0, sums / total[..., None], 0.0))


@pytest.mark.parametrize("after,smoothing", ((True, 0.0), (True, 1e-3), (False, 0.0), (False, 1e-3)))
def test_kernels_reference_and_op_pass_gradcheck_in_fp64(after, smoothing):
    inputs = [t.requires_grad_() for t in kernels_problem(1, 5, 4, 3, torch.float64)[0]]
    assert torch.autograd.gradcheck(
        lambda *a: kernels.prototype_attention_reference(*a, after, smoothing=smoothing), inputs)
    assert torch.autograd.gradcheck(lambda *a: kernels._op(*a, after, smoothing, False), inputs)


def test_kernels_detach_maps_leaves_only_the_averaged_features_their_gradient():
    (x, q, bias), grads = kernels_problem(2, 9, 8, 4, torch.float64)
    _, (dx, dq, db) = kernels_autograd((x, q, bias), grads, torch.float64, detach_maps=True)
    attention, _, mass = kernels.prototype_attention_reference(x, q, bias)
    region = attention * (attention == attention.max(1, keepdim=True).values)                   # (B, K, N)
    weight = torch.where(mass > 0, 1 / mass, 0)[..., None] * region
    torch.testing.assert_close(dx, weight.transpose(1, 2) @ grads[1].double())
    _, full = kernels_autograd((x, q, bias), grads, torch.float64)
    torch.testing.assert_close((dq, db), full[1:])
    assert not torch.allclose(dx, full[0])


def test_kernels_empty_regions_pool_to_zero_and_ties_go_to_the_first():
    x = torch.randn(1, 5, 8)
    q = x[0, :1].repeat(3, 1)                                   # three equal prototypes: every patch is a tie
    attention, pooled, mass = kernels.prototype_attention(x, q, torch.zeros(3, 5))
    torch.testing.assert_close(attention, torch.full((1, 3, 5), 1 / 3))
    torch.testing.assert_close(mass, torch.tensor([[5 / 3, 0, 0]]))
    torch.testing.assert_close(pooled[0, 0], x[0].mean(0))
    assert (pooled[0, 1:] == 0).all()
    attention, pooled, mass = kernels.prototype_attention(x, q, torch.full((3, 5), -2.0))       # the clamp empties all
    assert (attention == 0).all() and (pooled == 0).all() and (mass == 0).all()


def test_kernels_bias_keeps_its_gradient_where_the_softmax_underflows_to_zero():
    """At the start the bias is 0 and far prototypes have a share of exactly 0: the clamp must let the gradient pass."""
    x, q, bias = 50 * torch.eye(2)[None], 50 * torch.eye(2), torch.zeros(2, 2, requires_grad=True)
    attention = kernels.prototype_attention(x, q, bias)[0]
    assert attention.min() == 0
    attention.sum().backward()
    assert (bias.grad == 1).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_kernels_low_precision_input_and_autocast_still_give_fp32_logits(dtype):
    (x, q, bias), _ = kernels_problem(2, 33, 64, 5)
    low = x.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention, pooled, mass = kernels.prototype_attention(low, q, bias)
    expected = kernels.prototype_attention_reference(low.float(), q, bias)
    assert attention.dtype == mass.dtype == torch.float32 and pooled.dtype == dtype
    assert torch.equal(attention, expected[0]) and torch.equal(pooled, expected[1].to(dtype))


def test_kernels_autocast_hands_the_fused_op_its_own_dtype(monkeypatch):
    """LayerNorm gives fp32 under autocast: unlike the reference, the kernels are then fed what a matmul would be."""
    monkeypatch.setattr(kernels, "_fused", lambda x: True)
    monkeypatch.setattr(kernels, "_op", lambda x, *rest: x.dtype)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    for dtype, fed in ((torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        assert kernels.prototype_attention(torch.zeros(2, 5, 8, dtype=dtype), torch.zeros(3, 8), torch.zeros(3, 5)) is fed


@pytest.mark.parametrize("q,bias", (((3, 9), (3, 5)), ((3, 8), (3, 1)), ((3, 8), (2, 5))))
def test_kernels_refuse_shapes_that_a_kernel_would_read_past(q, bias):
    with pytest.raises(ValueError, match="expected"):
        kernels.prototype_attention(torch.zeros(2, 5, 8), torch.zeros(q), torch.zeros(bias))


@pytest.mark.parametrize("B,N", ((0, 7), (2, 0)))
@pytest.mark.parametrize("function", ("public", "op"))
def test_kernels_no_images_or_no_patches(B, N, function):
    inputs = [t.requires_grad_() for t in kernels_problem(B, N, 16, 3)[0]]
    call = kernels.prototype_attention if function == "public" else lambda *a: kernels._op(*a, True, 0.0, False)
    attention, pooled, mass = call(*inputs)
    assert attention.shape == (B, 3, N) and pooled.shape == (B, 3, 16) and (pooled == 0).all() and (mass == 0).all()
    (attention.sum() + pooled.sum() + mass.sum()).backward()
    assert inputs[1].grad.abs().sum() == 0


def test_kernels_reference_makes_no_tensor_larger_than_the_patches():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out
    inputs = [t.requires_grad_() for t in kernels_problem(2, 50, 40, 7)[0]]
    with Largest() as largest:
        sum(o.sum() for o in kernels.prototype_attention_reference(*inputs)).backward()
    assert largest.numel == inputs[0].numel()                   # (B, D, K, N) would have seven times as many


@pytest.mark.parametrize("needed", [n for n in itertools.product((False, True), repeat=3) if any(n)])
def test_kernels_op_on_cpu_gives_the_gradients_asked_for_and_only_those(needed):
    inputs, grads = kernels_problem(2, 9, 12, 5, torch.float64)
    for after, smoothing, detach_maps in itertools.product((True, False), (0.0, 1e-6), (True, False)):
        _, expected = kernels_autograd(inputs, grads, torch.float64, after, smoothing, detach_maps)
        asked = [t.clone().requires_grad_(n) for t, n in zip(inputs, needed)]
        outputs = kernels._op(*asked, after, smoothing, detach_maps)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
        for tensor, gradient, n in zip(asked, expected, needed):
            assert (tensor.grad is not None) == n
            if n:
                torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("used", range(3))
def test_kernels_op_with_one_output_used_only(used):
    inputs = [t.requires_grad_() for t in kernels_problem(2, 9, 12, 5, torch.float64)[0]]
    found = torch.autograd.grad(kernels._op(*inputs, True, 0.0, False)[used].square().sum(), inputs)
    expected = torch.autograd.grad(kernels.prototype_attention_reference(*inputs)[used].square().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_kernels_op_passes_opcheck_and_compiles():
    inputs = [t.requires_grad_() for t in kernels_problem(2, 9, 12, 5)[0]]
    checks = torch.library.opcheck(torch.ops.ivpt.prototype_attention.default, (*inputs, True, 1e-6, False))
    assert len(checks) >= 4 and set(checks.values()) == {"SUCCESS"}
    given = [t.detach() for t in (*inputs, *kernels._op(*inputs, True, 0.0, False))]
    checks = torch.library.opcheck(torch.ops.ivpt.prototype_attention_backward.default, (
        torch.ones_like(given[3]), None, torch.ones_like(given[5]), *given, True, 0.0, False, [True, False, True]))
    assert set(checks.values()) == {"SUCCESS"}
    for function in (kernels.prototype_attention, lambda *a: kernels._op(*a, True, 0.0, False)):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N in ((2, 9), (3, 14)):
            inputs = [t.requires_grad_() for t in kernels_problem(B, N, 12, 5)[0]]
            found, expected = compiled(*inputs), kernels.prototype_attention_reference(*inputs)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*(torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)
                                         for outputs in (found, expected)))


def test_kernels_public_function_compiles_with_inductor():
    inputs, _ = kernels_problem(2, 9, 12, 5)
    with torch.no_grad():
        found = torch.compile(kernels.prototype_attention, fullgraph=True, dynamic=True)(*inputs)
    torch.testing.assert_close(found, kernels.prototype_attention_reference(*inputs))


def test_kernels_without_triton_the_reference_serves():
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels\nassert kernels.triton is None\n"
            "x, q, b = torch.randn(2, 7, 8), torch.randn(3, 8), torch.zeros(3, 7)\n"
            "same = all(map(torch.equal, kernels.prototype_attention(x, q, b),\n"
            "               kernels.prototype_attention_reference(x, q, b)))\nprint('same', same)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(kernels.__file__).parent)
    assert done.returncode == 0 and "same True" in done.stdout, done.stderr


# --- Fast equals reference: the kernels in Triton's interpreter ------------------------------------------------------
# 24 cases cover every K with every N; D, the placement of the bias and the gradients asked for run along, so that
# every pair of values of any two of them meets. fp32: the interpreter has no bf16. One subprocess runs them all, since
# TRITON_INTERPRET must be set before Triton is imported and the compile tests need it unset.
def kernels_matrix():
    asked = [n for n in itertools.product((False, True), repeat=3) if any(n)]
    for i, (K, N) in enumerate(itertools.product((2, 5, 8, 17, 18, 33), (1, 7, 196, 257))):
        D = (32, 192, 384, 100)[(i + i // 4) % 4]
        yield dict(B=1 if N > 100 else 3, N=N, D=D, K=K, after=(i + i // 8) % 2 == 0, smoothing=(0.0, 1e-6)[i // 2 % 2],
                   detach_maps=i % 3 == 2, needed=list(asked[(3 * i + i // 7) % 7]), seed=i)


def kernels_run_case(B, N, D, K, after=True, smoothing=0.0, detach_maps=False, needed=(True, True, True), seed=0,
                     ties=False, change=lambda x, q, bias, grads: (x, q, bias, grads)):
    """Largest excess error of outputs and gradients, whether a second run gives the same bits, sizes of what was not
    asked for. With ties the winner is a matter of rounding: attention and the sum of the masses must agree."""
    inputs, grads = kernels_problem(B, N, D, K, seed=seed)
    *inputs, grads = change(*inputs, grads)
    (exact, exact_grads), (plain, plain_grads) = (
        kernels_autograd(inputs, grads, kind, after, smoothing, detach_maps) for kind in (torch.float64, torch.float32))
    outputs = kernels.launch_forward(*inputs, after, smoothing)
    found = kernels.launch_backward(*grads, *inputs, *outputs, after, smoothing, detach_maps, list(needed))
    again, found_again = outputs, found
    if seed % 4 == 0:                                           # every fourth of the matrix, all of the special cases
        again = kernels.launch_forward(*inputs, after, smoothing)
        found_again = kernels.launch_backward(*grads, *inputs, *again, after, smoothing, detach_maps, list(needed))
    compared = [*zip(outputs, plain, exact)]
    compared += [z for z, n in zip(zip(found, plain_grads, exact_grads), needed) if n]
    if ties:
        compared = [compared[0], [mass.sum(1) for mass in compared[2]]]
    excess = [kernels_excess(*z) for z in compared]
    return dict(excess=excess, repeats=all(map(torch.equal, (*outputs, *found), (*again, *found_again))),
                unasked=sum(g.numel() for g, n in zip(found, needed) if not n))


def kernels_special_cases():
    """Name -> case. change turns the drawn problem into the special one."""
    size = dict(B=2, N=24, D=72, K=5)
    wide = torch.randn(2, 24, 144, generator=torch.Generator().manual_seed(1))

    def strided(x, q, bias, grads):                             # x (B, D, N) and (D, ...) gradients, all transposed
        def turn(t):
            return t.mT.contiguous().mT
        return turn(x), turn(q), turn(bias), (turn(grads[0]), turn(grads[1]), grads[2].T.contiguous().T)
    return {
        "transposed": dict(size, change=strided),
        "slice of a wider tensor": dict(size, change=lambda x, q, b, g: (wide[:, :, 1::2], q, b, g)),
        "expanded gradients": dict(size, change=lambda x, q, b, g: (x, q, b, tuple(t[:1, :1].expand_as(t) for t in g))),
        "ties": dict(size, ties=True, change=lambda x, q, b, g: (x, q[:1].repeat(5, 1), 0 * b, g)),
        "ties, bias inside": dict(size, after=False, ties=True,
                                  change=lambda x, q, b, g: (x, q[:1].repeat(5, 1), 0 * b, g)),
        "empty regions": dict(size, change=lambda x, q, b, g: (x, q, b - torch.tensor([0, 5, 5, 0, 5.])[:, None], g)),
        "all clamped away": dict(size, change=lambda x, q, b, g: (x, q, 0 * b - 2, g)),
        "huge norms": dict(size, change=lambda x, q, b, g: (300 * x, 300 * q, b, g)),
        "many prototypes": dict(B=1, N=24, D=200, K=64),
    }


def kernels_run_interpreted():
    """The subprocess: every case with fp32's cut; some with the cut of 16-bit input, which keeps all on chip."""
    torch.set_num_threads(1)
    results, plan = {}, kernels._plan
    for case in kernels_matrix():
        results[json.dumps(case)] = kernels_run_case(**case)
    for name, case in kernels_special_cases().items():
        results[name] = kernels_run_case(**case)
    kernels._plan = lambda B, N, D, K, size, *rest: plan(B, N, D, K, 2, *rest)
    for N, D, K, after, smoothing in ((70, 192, 5, True, 0.0), (20, 100, 33, False, 1e-6), (20, 384, 17, True, 1e-6)):
        results[f"held {K} {D}"] = kernels_run_case(B=2, N=N, D=D, K=K, after=after, smoothing=smoothing)
    kernels._plan = lambda B, N, D, K, size, products, processors, shared: plan(B, N, D, K, size, products, 4, 1)
    results["nothing on chip, few processors"] = kernels_run_case(B=2, N=40, D=300, K=17)
    kernels._plan = plan
    for i, after in itertools.product(range(3), (True, False)):                         # a NaN must show, not become 0
        inputs = kernels_problem(2, 20, 40, 5)[0]
        inputs[i].view(-1)[7] = math.nan
        found, expected = (function(*inputs, after, smoothing=0.0)[0].isnan() for function in (
            kernels.launch_forward, kernels.prototype_attention_reference))             # who wins such a patch is open
        same = torch.equal(found, expected) and bool(found.any())
        results[f"nan {i} {after}"] = dict(excess=[0.0 if same else 1.0], repeats=True, unasked=0)
    print(json.dumps(results))


@functools.cache
def kernels_interpreted():
    here = Path(__file__)
    path = os.pathsep.join((str(here.parent), str(Path(kernels.__file__).parent)))
    done = subprocess.run([sys.executable, "-c", f"import {here.stem} as t; t.kernels_run_interpreted()"], text=True,
                          capture_output=True, env=os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=path))
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_kernels_interpreted_matrix_is_as_exact_as_pytorch():
    wrong = {name: r["excess"] for name, r in kernels_interpreted().items() if max(r["excess"]) > 0}
    assert not wrong and len(kernels_interpreted()) == 24 + len(kernels_special_cases()) + 4 + 6


@needs_triton
def test_kernels_interpreted_runs_repeat_bit_for_bit():
    assert all(r["repeats"] for r in kernels_interpreted().values())


@needs_triton
def test_kernels_interpreted_compute_no_gradient_that_was_not_asked_for():
    assert all(r["unasked"] == 0 for r in kernels_interpreted().values())


def test_kernels_matrix_covers_every_value_of_the_issue():
    cases = list(kernels_matrix())
    assert {(c["K"], c["N"]) for c in cases} == set(itertools.product((2, 5, 8, 17, 18, 33), (1, 7, 196, 257)))
    for key, values in dict(D=4, after=2, smoothing=2, detach_maps=2).items():
        assert len({c[key] for c in cases}) == values
        assert {(c["K"], c[key]) for c in cases} >= set(itertools.product((2, 17, 33), {c[key] for c in cases}))
    assert len({tuple(c["needed"]) for c in cases}) == 7


# --- Fast equals reference: compiled for real chips, traced for torch.compile -----------------------------------------
# Forward and backward, 12 of the 36 combinations of chip, dtype and shape, so chosen that every pair of chip and dtype,
# chip and shape, dtype and shape occurs, and one consumer card. IVPT_ALL_TARGETS=1 compiles all 36.
def kernels_targets():
    for i, j, k in itertools.product(range(4), range(3), range(3)):
        if k == (i + j) % 3 or os.environ.get("IVPT_ALL_TARGETS"):
            yield (*KERNELS_SHAPES[i], (80, 90, 100)[j], ("bf16", "fp32", "fp16")[k])
    yield (*KERNELS_SHAPES[0], 89, "bf16")                      # a consumer card: less shared memory, smaller tiles


def kernels_compile(target):
    """PTX facts and the cubin's resource usage, of the forward, the backward with all gradients, and (768 wide) dx."""
    B, N, D, K, chip, dtype = target
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    low = {"x_ptr", "q_ptr", "dp_ptr", "pooled_ptr", "dx_ptr"}
    results = {}
    kinds = [(kernels._forward_kernel, 1), (kernels._backward_kernel, 3), (kernels._patch_gradient_kernel, 1)]
    for kernel, products in kinds if D == 768 or os.environ.get("IVPT_ALL_TARGETS") else kinds[:2]:
        cut, _, _, slices = kernels._plan(B, N, D, K, 4 if dtype == "fp32" else 2, products, 132, KERNELS_CHIPS[chip])
        cut |= dict(slices=slices) if slices == 1 else {}       # as a launch does it: an argument of 1 is compiled in
        cut |= dict(AFTER=True, SMOOTH=False, POOLED=True, WANT_DL=True, WANT_H=True, LOGITS=True, BD=64, sxd=1, sqd=1,
                    spd=1, sbn=1, san=1)
        cut["BN"] = 64 if kernel is kernels._patch_gradient_kernel else cut["BN"]
        constants = {name: cut[name] for name in kernel.arg_names if name in cut}
        kind = {True: "*" + dtype, False: "*fp32"}
        signature = {name: "constexpr" if name in constants else kind[name in low] if name.endswith("_ptr") else
                     "fp32" if name == "smoothing" else "i32" for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                   if name not in constants and (name.endswith("_ptr") or name in ("sxb", "sxn", "sqk", "spb", "spk"))}
        options = dict(num_warps=4 if kernel is kernels._patch_gradient_kernel else 8)
        done = kernels.triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                                      target=GPUTarget("cuda", chip, 32), options=options)
        tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = {}
        if tool.exists():
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "kernel.cubin")
                cubin.write_bytes(done.asm["cubin"])
                text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True).stdout
                usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        results[kernel.__name__] = dict(
            usage, shared=done.metadata.shared, atomics=len(re.findall(r"\b(?:atom|red)\.", done.asm["ptx"])),
            tensor_cores=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", done.asm["ptx"])))
    return target, results


@functools.cache
def kernels_compiled():
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        return dict(pool.map(kernels_compile, kernels_targets()))


@needs_triton
def test_kernels_compile_for_every_chip_within_its_shared_memory():
    assert len(kernels_compiled()) >= 13
    for target, results in kernels_compiled().items():
        assert all(0 < r["shared"] <= KERNELS_CHIPS[target[4]] for r in results.values()), (target, results)


@needs_triton
def test_kernels_16_bit_uses_tensor_cores_and_nothing_uses_atomics():
    for target, results in kernels_compiled().items():
        assert all(r["atomics"] == 0 for r in results.values()), (target, results)
        assert target[5] == "fp32" or all(r["tensor_cores"] > 0 for r in results.values()), (target, results)


@needs_triton
def test_kernels_spill_no_register():
    usage = [(t, r) for t, results in kernels_compiled().items() for r in results.values()]
    if not all("STACK" in r for _, r in usage):
        pytest.skip("this Triton brings no cuobjdump to read the cubin's resource usage")
    version = tuple(int(part) for part in kernels.triton.__version__.split(".")[:2])
    allowed = 0 if version >= (3, 9) else 48                    # older: a few registers parked outside the loop
    assert all(r["LOCAL"] == 0 and r["STACK"] <= allowed for _, r in usage), [u for u in usage if u[1]["STACK"]]


@needs_triton
@pytest.mark.parametrize("products,size", list(itertools.product((1, 2, 3), (2, 4))))
def test_kernels_cut_covers_every_patch_and_column_once(products, size):
    for B, N, D, K in itertools.product((1, 3, 32, 70, 500), (1, 31, 196, 1369), (32, 100, 192, 384, 768, 1024, 1536),
                                        (2, 16, 17, 33, 64)):
        cut, spans, span, slices = kernels._plan(B, N, D, K, size, products, 132, 232448)
        assert (spans - 1) * span < N <= spans * span and span % cut["BN"] == 0
        assert slices * cut["POOL"] == -(-D // 128) and cut["HOLD"] in (0, slices * cut["POOL"])
        assert slices == 1 or cut["HOLD"] == 0
        assert spans == 1 or B * spans <= max(132, 5 * 132 + B)      # the (K, D) sums of the spans stay few


class KernelsNoDriver:
    """Stands in for the GPU that torch.compile asks about when it reads which pointers a kernel writes."""
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_kernels_gpu_compiles compiles the real thing")
def test_kernels_launches_can_be_traced_and_torch_knows_what_they_write(monkeypatch):
    """What torch.compile would do on a GPU, up to code generation: trace with symbolic shapes on fake CUDA tensors."""
    from torch._higher_order_ops import triton_kernel_wrap
    monkeypatch.setattr(kernels.triton.runtime.driver, "_active", KernelsNoDriver(), raising=False)
    warned = []
    monkeypatch.setattr(triton_kernel_wrap.log, "warning", lambda *args, **kwargs: warned.append(args))
    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = [torch.empty(4, 50, 128, device="cuda", dtype=torch.bfloat16), torch.empty(17, 128, device="cuda"),
                  torch.empty(17, 50, device="cuda")]

    def both(x, q, bias):
        outputs = torch.ops.ivpt.prototype_attention(x, q, bias, True, 0.0, False)
        return *outputs, *torch.ops.ivpt.prototype_attention_backward(
            outputs[0], outputs[1], None, x, q, bias, *outputs, True, 0.0, False, [True, True, True])
    nodes = make_fx(dispatch_functionalize(both), tracing_mode="symbolic")(*inputs).graph.nodes
    launches = [node for node in nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) == 4 and not warned                    # a warning: "assuming every input is mutated"
    written = [set(node.kwargs["tensors_to_clone"]) for node in launches]
    assert written[0] == {"attention_ptr", "part_ptr", "part_mass_ptr"} and written[1] == {"pooled_ptr", "mass_ptr"}
    assert written[2] == {"dl_ptr", "h_ptr", "part_ptr", "part_sum_ptr"} and written[3] == {"dx_ptr"}
    shapes = [tuple(o.meta["val"].shape) for o in list(nodes)[-1].args[0]]
    assert shapes == [(4, 17, 50), (4, 17, 128), (4, 17), (4, 50, 128), (17, 128), (17, 50)]


# --- Fast equals reference: on a GPU ---------------------------------------------------------------------------------
def kernels_rival(inputs, grads):
    """PyTorch at the same precision: two matmuls in the dtype of x."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = kernels.two_reads(*inputs)
    return outputs, torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])


@needs_gpu
@pytest.mark.parametrize("shape", (*KERNELS_SHAPES, (3, 257, 100, 33), (2, 7, 1536, 64), (2, 196, 1536, 17)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_kernels_gpu_is_as_exact_as_pytorch_and_repeats(shape, dtype):
    inputs, grads = kernels_problem(*shape, device="cuda")
    inputs = [inputs[0].to(dtype), inputs[1].to(dtype), inputs[2]]
    exact, exact_grads = kernels_autograd(inputs, grads, torch.float64)
    rival, rival_grads = kernels_rival(inputs, grads)

    def run():
        own = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = kernels.prototype_attention(*own)
        return *outputs, *torch.autograd.grad(outputs, own, [g.to(o.dtype) for g, o in zip(grads, outputs)])
    found, again = run(), run()
    assert all(map(torch.equal, found, again))
    for f, r, e in zip(found, (*rival, *rival_grads), (*exact, *exact_grads)):
        error, allowed = (f.double() - e).norm(), (r.double() - e).norm()
        rounding = torch.finfo(dtype).eps * e.norm()            # of the result, where PyTorch happens to be exact
        assert error <= 2 * allowed + rounding, (error, allowed)


@needs_gpu
def test_kernels_gpu_compiles():
    compiled = torch.compile(kernels.prototype_attention, fullgraph=True, dynamic=True)
    for B, N in ((2, 196), (3, 257)):
        inputs = [t.requires_grad_() for t in kernels_problem(B, N, 192, 17, device="cuda")[0]]
        torch.testing.assert_close(compiled(*inputs), kernels.prototype_attention(*inputs))
        torch.testing.assert_close(*(torch.autograd.grad(sum(o.square().sum() for o in f(*inputs)), inputs)
                                     for f in (compiled, kernels.prototype_attention)))


@needs_gpu
def test_kernels_gpu_autocast_is_the_op_in_bf16():
    inputs = kernels_problem(2, 196, 192, 17, device="cuda")[0]
    with torch.autocast("cuda", torch.bfloat16):
        found = kernels.prototype_attention(*inputs)
    assert all(map(torch.equal, found, kernels.prototype_attention(inputs[0].bfloat16(), *inputs[1:])))


@needs_gpu
def test_kernels_gpu_peak_memory_is_inputs_and_outputs():
    B, N, D, K = KERNELS_SHAPES[0]
    x, q, bias = kernels_problem(B, N, D, K, device="cuda")[0]
    x, q = x.bfloat16(), q.bfloat16()
    kernels.prototype_attention(x, q, bias)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = kernels.prototype_attention(x, q, bias)
    needed = sum(t.nbytes for t in (x, q, bias, *outputs))
    assert torch.cuda.max_memory_allocated() - before <= sum(o.nbytes for o in outputs) + 0.1 * needed


# ---------------------------------------------------------------- the vision transformer, against an independent one

FAMILIES = {"plain": {}, "registers": dict(registers=4), "swiglu": dict(swiglu=96), "swiglu_registers": dict(swiglu=96, registers=4)}


def tiny_backbone(image_size=70, depth=5, seed=0, **family):
    """A ViT of 2 heads whose every parameter is random, so that no term of the forward can hide."""
    torch.manual_seed(seed)
    backbone = ivpt.VisionTransformer(width=128, depth=depth, patch_size=14, pos_grid=5, image_size=image_size, **family)
    for name, p in backbone.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2 if p.dim() < 2 else 0.08)
    return backbone.eval()


def cubic(t, a):
    t = abs(t)
    return ((a + 2) * t ** 3 - (a + 3) * t ** 2 + 1) if t <= 1 else (a * t ** 3 - 5 * a * t ** 2 + 8 * a * t - 4 * a) if t < 2 else 0.0


def bicubic_matrix(old, new, antialias):
    """Resampling weights (new, old), written out: Keys' cubic (a = -0.75, at scale (new + 0.1) / old, edges repeated),
    or the antialiased one (a = -0.5, stretched when shrinking, renormalised at the edges)."""
    W = np.zeros((new, old))
    for i in range(new):
        if antialias:
            ratio = old / new
            stretch, centre = max(ratio, 1.0), (i + 0.5) * ratio
            for j in range(old):
                W[i, j] = cubic((j + 0.5 - centre) / stretch, -0.5)
            W[i] /= W[i].sum()
        else:
            centre = (i + 0.5) * old / (new + 0.1) - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                W[i, min(max(j, 0), old - 1)] += cubic(centre - j, -0.75)
    return torch.tensor(W)


def oracle_positions(state, h, w):
    pos, side = state["pos_embed"].double()[0], round((state["pos_embed"].shape[1] - 1) ** 0.5)
    grid = pos[1:].view(side, side, -1)
    if (h, w) != (side, side):
        aa = "register_tokens" in state
        grid = torch.einsum("yi,xj,ijd->yxd", bicubic_matrix(side, h, aa), bicubic_matrix(side, w, aa), grid)
    return torch.cat([pos[:1], grid.reshape(h * w, -1)])


def oracle_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"] + state[name + ".bias"]


def oracle_block(x, state, i):
    """One pre-norm block in fp64 from the state dict alone, heads one by one."""
    s = {k.removeprefix(f"blocks.{i}."): v.double() for k, v in state.items() if k.startswith(f"blocks.{i}.")}
    D = x.shape[-1]
    q, k, v = (oracle_norm(x, s, "norm1") @ s["attn.qkv.weight"].T + s["attn.qkv.bias"]).split(D, dim=-1)
    heads = []
    for a in range(0, D, 64):
        weights = (q[..., a:a + 64] @ k[..., a:a + 64].transpose(1, 2) / 8).softmax(-1)
        heads.append(weights @ v[..., a:a + 64])
    x = x + s["ls1.gamma"] * (torch.cat(heads, -1) @ s["attn.proj.weight"].T + s["attn.proj.bias"])
    y = oracle_norm(x, s, "norm2")
    if "mlp.w12.weight" in s:
        gate, value = (y @ s["mlp.w12.weight"].T + s["mlp.w12.bias"]).chunk(2, -1)
        y = (gate * gate.sigmoid() * value) @ s["mlp.w3.weight"].T + s["mlp.w3.bias"]
    else:
        y = y @ s["mlp.fc1.weight"].T + s["mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)) @ s["mlp.fc2.weight"].T + s["mlp.fc2.bias"]
    return x + s["ls2.gamma"] * y


def oracle_embed(images, state, patch=14):
    B, _, H, W = images.shape
    h, w, s = H // patch, W // patch, {k: v.double() for k, v in state.items() if not k.startswith("blocks")}
    rows = []
    for y in range(h):
        for x in range(w):
            tile = images[:, :, y * patch:(y + 1) * patch, x * patch:(x + 1) * patch].double().flatten(1)
            rows.append(tile @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"])
    tokens = torch.cat([s["cls_token"].expand(B, -1, -1), torch.stack(rows, 1)], 1) + oracle_positions(state, h, w)
    registers = s["register_tokens"].expand(B, -1, -1) if "register_tokens" in s else tokens[:, :0]
    return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1), h, w


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(70, 70), (98, 98), (42, 42), (56, 112), (112, 28)], ids=str)
def test_vit_equals_an_independent_forward(family, size):
    """All families; the grid itself, larger, smaller and rectangular: both interpolations. fp32 against fp64."""
    backbone = tiny_backbone(depth=2, **FAMILIES[family])
    images = torch.randn(2, 3, *size)
    state = backbone.state_dict()
    tokens, _, _ = oracle_embed(images, state)
    for i in range(2):
        tokens = oracle_block(tokens, state, i)
    expected = oracle_norm(tokens, {k: v.double() for k, v in state.items() if k.startswith("norm.")}, "norm")
    with torch.no_grad():
        torch.testing.assert_close(backbone(images).double(), expected, atol=2e-4, rtol=1e-4)  # values of size 3, 2 blocks


@pytest.mark.parametrize("name", [n for n in ivpt.ARCHITECTURES if n != "toy"])
def test_state_dict_names_and_shapes_are_metas(name):
    """DESIGN section 4, key by key; built without memory."""
    D, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[name[3]]
    ffn = {"mlp.w12": (8192, 1536), "mlp.w3": (1536, 4096)} if name[3] == "g" else {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), **ffn}
    expected = {"cls_token": (1, 1, D), "pos_embed": (1, 1370, D), "mask_token": (1, D), "norm.weight": (D,), "norm.bias": (D,),
                "patch_embed.proj.weight": (D, 3, 14, 14), "patch_embed.proj.bias": (D,)}
    if name.endswith("_reg4"):
        expected["register_tokens"] = (1, 4, D)
    for i in range(depth):
        for key, shape in block.items():
            expected[f"blocks.{i}.{key}.weight"], expected[f"blocks.{i}.{key}.bias"] = shape, shape[:1]
        for norm in ("norm1", "norm2"):
            expected[f"blocks.{i}.{norm}.weight"] = expected[f"blocks.{i}.{norm}.bias"] = (D,)
        expected[f"blocks.{i}.ls1.gamma"] = expected[f"blocks.{i}.ls2.gamma"] = (D,)
    with torch.device("meta"):
        backbone = ivpt.VisionTransformer(**ivpt.ARCHITECTURES[name], image_size=224)
    assert {k: tuple(v.shape) for k, v in backbone.state_dict().items()} == expected
    assert backbone.blocks[0].attn.heads == D // 64


@pytest.mark.parametrize("family", FAMILIES)
def test_architecture_is_read_off_a_file_and_fp16_becomes_fp32(family, tmp_path):
    backbone = tiny_backbone(depth=3, **FAMILIES[family])
    torch.save({k: v.half() for k, v in backbone.state_dict().items()}, tmp_path / "vit.pth")
    loaded = ivpt.load_backbone(tmp_path / "vit.pth", 70)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for (name, p), q in zip(backbone.named_parameters(), loaded.parameters()):
        assert torch.equal(p.half().float(), q), name


def broken_weights(kind, path):
    state = tiny_backbone(depth=2).state_dict()
    if kind == "garbage":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickle":
        torch.save({"model": Fraction(1, 2)}, path)  # weights_only builds tensors and plain values, no objects
    else:
        state = {"missing": {k: v for k, v in state.items() if k != "blocks.1.ls2.gamma"},
                 "shape": {**state, "blocks.1.mlp.fc1.bias": torch.zeros(3)}, "unknown": {**state, "head.weight": torch.zeros(2, 2)},
                 "other": {"a": torch.zeros(1)}, "number": {**state, "epoch": 3}}[kind]
        torch.save(state, path)


@pytest.mark.parametrize("kind, says", [
    ("garbage", "not a torch file"), ("empty", "empty"), ("truncated", "truncated"), ("pickle", "not a torch file"),
    ("missing", "blocks.1.ls2.gamma"), ("shape", "blocks.1.mlp.fc1.bias"), ("unknown", "head.weight"), ("number", "epoch"), ("other", "DINOv2's names")])
def test_weights_that_do_not_fit_are_named_in_one_line(kind, says, tmp_path):
    broken_weights(kind, tmp_path / "vit.pth")
    with pytest.raises(ValueError) as error:
        ivpt.load_backbone(tmp_path / "vit.pth", 70)
    assert says in str(error.value) and "vit.pth" in str(error.value) and "\n" not in str(error.value)


def test_unknown_backbone_and_odd_sizes_are_refused():
    with pytest.raises(FileNotFoundError, match="vitb14_reg4"):
        ivpt.load_backbone("vitx14", 224)
    with pytest.raises(ValueError, match="at least 3 a side"):
        ivpt.IVPT(tiny_backbone(image_size=28), 3)
    for size in (225, 10, (224, 100)):
        with pytest.raises(ValueError, match="divisible by the patch of 14"):
            ivpt.load_backbone("vits14", size)
    for prototypes in [(5,), (17, 14, 11, 8, 1), (9,) * 9]:
        with pytest.raises(ValueError, match="prototypes"):
            ivpt.IVPT(tiny_backbone(), 3, prototypes)


# ---------------------------------------------------------------- IVPT, against section 3 of the paper written out in fp64

RECIPES = {"paper": dict(bias_after_softmax=True, fusion_mlp=True, tune="none"),
           "released": dict(bias_after_softmax=False, fusion_mlp=False, tune="tokens")}
PROTOTYPES = (7, 6, 5, 4, 4)  # the last: G = 3 concepts and the background


def tiny_ivpt(recipe="paper", family="registers", classes=6, **ablation):
    model = ivpt.IVPT(tiny_backbone(**FAMILIES[family]), classes, PROTOTYPES, **RECIPES[recipe], **ablation)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("backbone."):
                p.copy_(torch.randn(p.shape) * (0.2 if "prototypes" in name else 0.1) + (1 if name.endswith("norm.weight") else 0))
    return model.eval()


def oracle_regions(e, q, b, after, smoothing):
    """Raw a, smoothed a, p and mass of section 3 for one image, patch by patch: e (N, D), q (K, D), b (K, N) in fp64."""
    a = torch.stack([(-(e[n] - q).square().sum(1) + (0 if after else b[:, n])).softmax(0) for n in range(len(e))], 1)  # (K, N)
    a = (a + b).clamp(min=0) if after else a
    smooth = (a + 1e-6) / (a + 1e-6).sum(0)
    a = smooth if smoothing else a  # the head smooths before it pools
    p, mass = torch.zeros(q.shape, dtype=e.dtype), torch.zeros(len(q), dtype=e.dtype)
    for n in range(len(e)):
        k = a[:, n].argmax()
        p[k] += a[k, n] * e[n]
        mass[k] += a[k, n]
    return a, smooth, p / mass.clamp(min=1e-300)[:, None], mass


def oracle_ivpt(model, images):
    """Evaluation of IVPT image by image from parameters alone."""
    P = {k: v.double() for k, v in model.state_dict().items()}
    state = {k.removeprefix("backbone."): v for k, v in P.items() if k.startswith("backbone.")}
    after, depth, L, G = model.concepts[0].bias_after_softmax, len(model.backbone.blocks), len(model.prototypes), model.prototypes[-1] - 1
    tokens, h, w = oracle_embed(images, state)
    prefix, T = tokens.shape[1] - h * w, tokens.shape[1]
    for i in range(depth - L + 1):
        tokens = oracle_block(tokens, state, i)
    attention, groups, fused = [], [], []
    for l in range(L):
        e = oracle_norm(tokens[:, prefix:], state, "norm")
        found = [oracle_regions(x, P[f"concepts.{l}.prototypes"], P[f"concepts.{l}.bias"], after, l == L - 1) for x in e]
        a, smooth, p, mass = (torch.stack(part) for part in zip(*found))
        attention.append(smooth.unflatten(2, (h, w)))
        if l == L - 1:
            break
        S = (p[:, :-1] @ P[f"fusions.{l}.grouping.weight"].T + P[f"fusions.{l}.grouping.bias"]).softmax(-1)
        S[mass[:, :-1] == 0] = 1 / G
        coarse = torch.einsum("bkg,bkd->bgd", S, p[:, :-1]) / S.sum(1)[..., None]
        flat = coarse.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        y = flat.view_as(coarse) * P[f"fusions.{l}.norm.weight"] + P[f"fusions.{l}.norm.bias"]
        head = f"fusions.{l}.head."
        if head + "weight" in P:
            y = y @ P[head + "weight"].T + P[head + "bias"]
        else:
            y = y @ P[head + "0.weight"].T + P[head + "0.bias"]
            y = (y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))) @ P[head + "2.weight"].T + P[head + "2.bias"]
        tokens = oracle_block(torch.cat([tokens, y], 1), state, depth - L + 1 + l)[:, :T]
        groups.append(S)
        coarse = torch.cat([torch.einsum("bkg,bkn->bgn", S, a[:, :-1]), a[:, -1:]], 1)  # of the raw shares
        fused.append((coarse / coarse.sum(1, keepdim=True)).unflatten(2, (h, w)))
    flat = p.flatten(1)
    z = ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True, correction=0) + 1e-5).sqrt()).view_as(p)
    z = z * P["norm.weight"] + P["norm.bias"]
    concept_logits = z[:, :-1] @ P["classifier.weight"].T
    return ivpt.Output(concept_logits.mean(1), concept_logits, attention, groups, fused, z)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ivpt_equals_the_equations(recipe, family):
    model, images = tiny_ivpt(recipe, family), torch.randn(2, 3, 70, 70)
    expected = oracle_ivpt(model, images)
    with torch.no_grad():
        out = model(images)
    assert [A.shape[1] for A in out.attention] == list(PROTOTYPES) and out.features.shape == (2, 4, 128)
    for name in ivpt.Output._fields:
        ours, theirs = getattr(out, name), getattr(expected, name)
        for a, b in zip(ours, theirs) if isinstance(ours, list) else [(ours, theirs)]:
            # fp32 logits of size 100 go into an exponent: 1e-5 of them is 1e-3 of a share
            torch.testing.assert_close(a.double(), b, atol=2e-3, rtol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_maps_are_of_raw_shares_and_so_is_their_loss(recipe):
    """In fp64, since smoothing first would move a share by no more than 1e-6: but the loss takes its logarithm."""
    model, images = tiny_ivpt(recipe, "registers"), torch.randn(2, 3, 70, 70, dtype=torch.float64)
    model.backbone.pos_grid, model.backbone.pos_embed.data = 5, model.backbone.pos_embed.data[:, :26]  # no fp32 interpolation
    model.double()
    out, expected = model(images), oracle_ivpt(model, images)
    found = train.region_consistency(out.attention[-1], out.fused[0])
    wanted = train.region_consistency(expected.attention[-1], expected.fused[0])
    torch.testing.assert_close(out.fused, expected.fused, atol=1e-11, rtol=1e-7)
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-8)
    learners = model.concepts[0].prototypes, model.concepts[0].bias
    raw, _, _ = model.concepts[0](oracle_patches(model, images).detach())
    fused = torch.cat([out.groups[0].transpose(1, 2) @ raw[:, :-1], raw[:, -1:]], 1)
    again = train.region_consistency(out.attention[-1], (fused / fused.sum(1, keepdim=True)).unflatten(2, (5, 5)))
    for a, b in zip(torch.autograd.grad(found, learners, retain_graph=True), torch.autograd.grad(again, learners)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-8)


def oracle_patches(model, images):
    """What the first concept layer sees."""
    tokens = model.backbone.embed(images)
    for block in model.backbone.blocks[:-len(model.fusions)]:
        tokens = block(tokens)
    return model.backbone.norm(tokens[:, model.backbone.prefix:])


def test_maps_sum_to_one_and_empty_regions_group_evenly():
    model = tiny_ivpt()
    with torch.no_grad():
        model.concepts[1].prototypes[2] += 100.0  # nobody is near: an empty region
        out = model(torch.randn(3, 3, 70, 70))
    for A in [*out.attention, *out.fused]:
        torch.testing.assert_close(A.sum(1), torch.ones(3, 5, 5), atol=1e-5, rtol=0)  # fp32 sums
        assert A.min() >= 0
    assert torch.equal(out.groups[1][:, 2], torch.full((3, 3), 1 / 3))


def test_evaluation_is_deterministic_and_training_samples_the_grouping():
    model, images = tiny_ivpt(), torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model(images).logits)
        model.train()
        first, second = model(images), model(images)
    assert not torch.equal(first.groups[0], second.groups[0])
    assert torch.equal(first.attention[0], second.attention[0])  # the first map sees no prompt


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match="grid of"):
        tiny_ivpt()(torch.randn(1, 3, 98, 70))


# ---------------------------------------------------------------- the losses, against the table written out

def random_maps(K=4, B=3, h=6, w=5, seed=0):
    return torch.randn(B, K, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def pool3(A):
    return torch.stack([torch.stack([A[..., y:y + 3, x:x + 3].mean((-1, -2)) for x in range(A.shape[-1] - 2)], -1)
                        for y in range(A.shape[-2] - 2)], -2)


def test_total_variation_presence_and_entropy():
    A = random_maps()
    B, K, h, w = A.shape
    tv = sum((A[:, :, y + 1] - A[:, :, y]).abs().sum() for y in range(h - 1)) + sum(
        (A[..., x + 1] - A[..., x]).abs().sum() for x in range(w - 1))
    torch.testing.assert_close(train.total_variation(A), tv / (B * h * w))
    best = [max(pool3(A)[b, k].max() for b in range(B)) for k in range(K - 1)]
    torch.testing.assert_close(train.presence(A), 1 - sum(best) / (K - 1))
    torch.testing.assert_close(train.entropy(A), -(A * A.log()).sum() / (B * h * w))


def test_background_presence_is_the_bce_of_the_best_place_at_the_rim():
    A = random_maps()
    pooled = pool3(A)[:, -1]  # (B, 4, 3)
    total = 0
    for b in range(3):
        best = max(pooled[b, i, j] * ((2 * i / 3 - 1) ** 2 + (j - 1) ** 2) / 2 for i in range(4) for j in range(3))
        total += F.binary_cross_entropy(best, torch.ones_like(best))
    torch.testing.assert_close(train.background_presence(A), total / 3)


def test_region_consistency_is_kl_and_moves_the_fused_map_only():
    final, fused = random_maps(seed=1).requires_grad_(), random_maps(seed=2).requires_grad_()
    loss = train.region_consistency(final, fused)
    expected = sum((final[b, :, y, x] * (final[b, :, y, x] / fused[b, :, y, x]).log()).sum()
                   for b in range(3) for y in range(6) for x in range(5)) / (3 * 6 * 5)
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=1e-8)  # eps 1e-10
    loss.backward()
    assert final.grad is None and fused.grad.abs().sum() > 0
    assert train.region_consistency(final, final.detach()).abs() < 1e-12


def test_equivariance_and_orthogonality():
    A, back = random_maps(seed=1), random_maps(seed=2)
    cosines = [(A[b, k] * back[b, k]).sum() / (A[b, k].norm() * back[b, k].norm()) for b in range(3) for k in range(3)]
    torch.testing.assert_close(train.equivariance(A, back), 1 - sum(cosines) / 9)
    Z = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = sum((torch.dot(Z[b, i], Z[b, j]) / (Z[b, i].norm() * Z[b, j].norm()) - float(i == j)) ** 2
                   for b in range(2) for i in range(4) for j in range(4)) / 32
    torch.testing.assert_close(train.orthogonality(Z), expected)
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    torch.testing.assert_close(train.classification(logits, labels),
                               -sum(logits[i].log_softmax(0)[labels[i]] for i in range(3)) / 3)


def reached(model, images, term, **more):
    """Which parameters a loss reaches: names shortened to where they live."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    losses, _ = train.Objective(model)(images, torch.tensor([0, 1]), torch.tensor([[0.8, -0.6, 0.1], [0.6, 0.8, 0.0]]))
    losses[term].backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_objective_is_the_table(recipe):
    """All eight terms, weight 1: maps averaged over the five layers, L_con over the four prompted ones."""
    model, images, labels = tiny_ivpt(recipe), torch.randn(3, 3, 70, 70), torch.tensor([0, 4, 2])
    theta = torch.tensor([[0.0, -1.1, 0.1], [1.1, 0.0, -0.05]])
    with torch.no_grad():
        losses, right = train.Objective(model)(images, labels, theta)
        out, view = model(images), model(data.warp(images, theta))
    mean = lambda loss, *lists: sum(loss(*maps) for maps in zip(*lists)) / len(lists[0])  # noqa: E731
    expected = {"classification": F.cross_entropy(out.concept_logits.mean(1), labels),
                "region_consistency": mean(lambda fused: train.region_consistency(out.attention[4], fused), out.fused),
                "equivariance": mean(train.equivariance, out.attention, [data.unwarp(A, theta) for A in view.attention]),
                "orthogonality": train.orthogonality(out.features)}
    for name in ("total_variation", "presence", "background_presence", "entropy"):
        expected[name] = mean(getattr(train, name), out.attention)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(losses["loss"], sum(expected.values()))
    assert set(losses) == {*expected, "loss"} and right == (out.logits.argmax(1) == labels).sum()


def test_grouping_is_a_gumbel_softmax_of_temperature_one(monkeypatch):
    model, seen = tiny_ivpt().train(), []
    gumbel = F.gumbel_softmax
    monkeypatch.setattr(F, "gumbel_softmax", lambda logits, **more: seen.append((logits, more)) or gumbel(logits, **more))
    model(torch.randn(1, 3, 70, 70))
    assert len(seen) == 4 and all(more == dict(tau=1.0) and logits.shape[2] == 3 for logits, more in seen)


def test_a_group_that_nobody_joins_gives_finite_prompts():
    model = tiny_ivpt()
    with torch.no_grad():
        for fusion in model.fusions:
            fusion.grouping.bias[0] = -200.0  # its column of the softmax underflows to exactly 0
        out = model(torch.randn(2, 3, 70, 70))
    assert (out.groups[0].sum(1)[:, 0] == 0).any()  # the case is met: in one image no concept joins group 0
    assert out.logits.isfinite().all()


def test_maps_stay_fp32_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = tiny_ivpt()(torch.randn(2, 3, 70, 70))
    for A in [*out.attention, *out.fused]:
        assert A.dtype == torch.float32
        torch.testing.assert_close(A.sum(1), torch.ones(2, 5, 5), atol=1e-5, rtol=0)  # in bf16 it would be 4e-3


def test_metas_addresses():
    base = "https://dl.fbaipublicfiles.com/dinov2/"
    assert ivpt.weights_url("vitb14_reg4") == base + "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    assert ivpt.weights_url("dinov2_vitg14") == base + "dinov2_vitg14/dinov2_vitg14_pretrain.pth"
    assert ivpt.weights_url("toy") is None and ivpt.weights_url("some/file.pth") is None


def named(model, *patterns):
    return {name for name, _ in model.named_parameters() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def test_gradient_stops():
    """Which parameters each loss reaches; the stop-gradients of section 3, one by one."""
    model, images = tiny_ivpt("paper").train(), torch.randn(2, 3, 70, 70)
    maps, fusion = named(model, "concepts.*"), named(model, "fusions.*.norm.*", "fusions.*.head.*")
    for term in ("total_variation", "presence", "background_presence", "entropy", "equivariance"):
        found = reached(model, images, term)
        assert found <= maps, term  # maps see the patches through sg: nothing but prototypes and biases
        assert {n for n in found if "prototypes" in n} == named(model, "concepts.*.prototypes"), term
    # grouping is learnt from L_con alone; the final map is its target, and does not move
    assert reached(model, images, "region_consistency") == named(model, "concepts.[0-3].*", "fusions.*.grouping.*")
    # classes reach the fusion heads through the prompts, but neither grouping nor the prototypes of prompted layers
    head = named(model, "concepts.4.*", "norm.*", "classifier.*")
    assert reached(model, images, "classification") == fusion | head
    assert reached(model, images, "orthogonality") == fusion | head - {"classifier.weight"}
    # the released recipe tunes tokens, which classes reach and the map losses do not
    released, tokens = tiny_ivpt("released").train(), {"backbone.cls_token", "backbone.register_tokens", "backbone.pos_embed"}
    assert tokens <= reached(released, images, "classification")
    assert not tokens & reached(released, images, "entropy")


def test_the_affine_view_needs_no_graph_of_the_backbone():
    """backbone_graph=False: the same maps, and the same gradients of everything a map can reach."""
    model, images, grads = tiny_ivpt("released"), torch.randn(2, 3, 70, 70), []
    for graph in (True, False):
        model.zero_grad(set_to_none=True)
        out = model(images, backbone_graph=graph)
        sum((A ** 2).sum() for A in out.attention).backward()
        grads.append([p.grad for p in model.concepts.parameters()])
        assert model.backbone.pos_embed.grad is None or model.backbone.pos_embed.grad.abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(*grads))


CUB40 = SHARED / "data" / "CUB_200_2011"
DOTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


# ---- helpers: a small data set in CUB's layout, with a coloured dot at every key point ------------------------------
def write_cub(folder, sizes=((90, 60), (60, 90), (130, 100), (40, 40)), parts=True):
    """Ids are neither contiguous nor in order; the first images are for training, the last is for testing."""
    rng = np.random.default_rng(0)
    lists = {name: [] for name in data.LISTS}
    locations = []
    for i, (width, height) in enumerate(sizes):
        key, name = 17 - 3 * i, f"{i % 2:03d}.Class {i % 2}/image {i}.png"
        image, (v, u) = np.full((height, width, 3), 110.0), np.mgrid[:height, :width] + 0.5     # centres of pixels
        for m, colour in enumerate(DOTS):
            x, y = (rng.uniform(0.15, 0.35, 2) + 0.5 * np.array((m % 2, m // 2))) * (width, height)
            image += (4.5 - np.hypot(u - x, v - y)).clip(0, 1)[..., None] * (np.array(colour) - image)
            locations.append(f"{key} {7 * m + 2} {x:.1f} {y:.1f} {int(m < 3 or i % 2)}")
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.round().astype(np.uint8)).save(folder / "images" / name)
        for table, text in zip(data.LISTS, (name, 5 * (i % 2) + 3, int(i < len(sizes) - 1), "10.5 8.25 20.7 16.9")):
            lists[table].append(f"{key} {text}")
    lists["classes.txt"] = ["3 000.Class 0", "8 001.Class 1"]
    for name, rows in lists.items():
        (folder / name).write_text("\n".join(rows) + "\n")
    if parts:
        (folder / "parts").mkdir()
        (folder / "parts/parts.txt").write_text("2 beak\n9 left wing\n16 right wing\n23 tail\n")
        (folder / "parts/part_locs.txt").write_text("\n".join(locations) + "\n")
    return folder


def assert_on_dots(dataset, margin, tolerance):
    """Every visible key point that is `margin` inside the view has its dot's centre within `tolerance` pixels."""
    checked, S = 0, dataset.image_size
    centres = torch.arange(S) + 0.5
    for image, _, points, _ in dataset:
        pixels = data.denormalize(image).float()
        for colour, (x, y, visible) in zip(DOTS, points.tolist()):
            if visible and min(x, y, S - x, S - y) > margin:
                weight = ((pixels - torch.tensor(colour)[:, None, None]).abs().amax(0) < 75).double()
                seen = torch.stack((weight.sum(0) @ centres.double(), weight.sum(1) @ centres.double())) / weight.sum()
                assert (seen - torch.tensor((x, y))).norm() < tolerance, (dataset.view, x, y, seen)
                checked += 1
    return checked


# ---- the data set ----------------------------------------------------------------------------------------------------
def test_data_layout_of_any_subset(tmp_path):
    folder = write_cub(tmp_path)
    train, test = data.Images(folder, "train", "train", 32), data.Images(folder, "test", "box", 32)
    assert (len(train), len(test)) == (3, 1)
    assert train.classes == ["000.Class 0", "001.Class 1"]
    assert train.parts == ["beak", "left wing", "right wing", "tail"]
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1]
    assert [f.name for f in train.files] == ["image 0.png", "image 1.png", "image 2.png"]
    assert torch.allclose(train.boxes, torch.tensor([10.5, 8.25, 20.7, 16.9]).expand(3, 4))
    assert train.keypoints.shape == (3, 4, 3) and train.keypoints[:, 3, 2].tolist() == [0, 1, 0]


def test_data_parts_may_be_absent(tmp_path):
    dataset = data.Images(write_cub(tmp_path, parts=False), "test", "box", 32)
    assert dataset.parts == [] and dataset.keypoints.shape == (1, 0, 3)
    assert dataset[0][2].shape == (0, 3)


@pytest.mark.skipif(not CUB40.is_dir(), reason="the 40 real CUB classes are not on this machine")
def test_data_real_subset():
    train, test = data.Images(CUB40, "train", "train", 64), data.Images(CUB40, "test", "box", 64)
    assert (len(train), len(test), len(train.classes), len(train.parts)) == (1200, 1090, 40, 15)
    image, label, points, index = test[700]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32 and index == 700
    assert train.labels.bincount().tolist() == [30] * 40
    seen = test.keypoints[..., 2] > 0
    inside = ((test.keypoints[..., :2] - test.boxes[:, None, :2]) / test.boxes[:, None, 2:])[seen]
    assert ((inside > -0.05) & (inside < 1.05)).all(1).float().mean() > 0.99    # the annotators clicked on the bird


def test_data_split_and_view_are_checked(tmp_path):
    with pytest.raises(ValueError, match="expected train or test"):
        data.Images(write_cub(tmp_path), "val", "test", 32)


# ---- views -----------------------------------------------------------------------------------------------------------
def test_data_train_view_moves_keypoints_with_pixels(tmp_path):
    for size, sizes in ((64, ((90, 70), (70, 96), (100, 100), (9, 9))), (120, ((90, 70), (70, 96), (64, 64), (9, 9)))):
        folder = write_cub(tmp_path / str(size), sizes)
        dataset, checked = data.Images(folder, "train", "train", size), 0
        for dataset.epoch in range(12):
            # half a pixel of convention would show as 0.5 px or more; what is left is rounding to pixels and bytes
            checked += assert_on_dots(dataset, margin=10, tolerance=0.35)
        assert checked > 30
        visible = torch.stack([points for _, _, points, _ in dataset])
        outside = ((visible[..., :2] < 0) | (visible[..., :2] >= size)).any(-1)
        assert outside.any() and (visible[..., 2][outside] == 0).all()


def test_data_train_view_equals_the_steps_it_merges(tmp_path, monkeypatch):
    dataset = data.Images(write_cub(tmp_path, ((96, 64), (64, 64), (64, 96), (9, 9))), "train", "train", 64)
    draws, uniform = {}, None
    fake = SimpleNamespace(choice=lambda _: draws["flip"],
                           integers=lambda low, high: np.minimum((20, 0), np.array(high) - 1),
                           uniform=lambda low, high, n=None: draws["shift"] if n else next(uniform))
    monkeypatch.setattr(np.random, "default_rng", lambda key: fake)
    stored = [torch.from_numpy(np.array(data.read_image(f))).permute(2, 0, 1) for f in dataset.files]

    def view(index, **changes):
        nonlocal uniform
        draws.update(dict(flip=1, turn=0.0, scale=1.0, shift=np.zeros(2)), **changes)
        uniform = iter((draws["turn"], draws["scale"]))
        return data.denormalize(dataset[index][0])

    assert torch.equal(view(0), stored[0][:, :, 20:84])                              # the crop alone
    assert torch.equal(view(0, flip=-1), stored[0].flip(2)[:, :, 20:84])             # flip, then crop
    turned = view(1, turn=math.pi / 2).int() - stored[1].rot90(-1, (1, 2)).int()     # clockwise, as y points down
    assert turned.abs().max() <= 1                                                   # Pillow cuts 61.99.. off to 61
    moved = view(2, shift=np.array((10 / 64, 0)))
    assert torch.equal(moved[:, :, 10:], stored[2][:, :64, :54]) and not moved[:, :, :10].any()  # black from outside
    half = view(1, scale=0.5).float()                                                # about the centre
    assert not half[:, :16].any() and (half[:, 17:47, 17:47] - F.avg_pool2d(stored[1].float(), 2)[:, 1:31, 1:31]
                                       ).abs().max() <= 1  # bilinear at pixel corners, rounded


def test_data_augmentation_ranges():
    rng, S = np.random.default_rng(0), 100
    matrices = np.stack([data.augmentation(150, 100, S, rng) for _ in range(4000)])
    linear = matrices[:, :2, :2]
    flips = np.sign(np.linalg.det(linear))
    scales = np.sqrt(np.abs(np.linalg.det(linear)))
    angles = np.degrees(np.arctan2(linear[:, 1, 0] * flips, linear[:, 0, 0] * flips))
    centres = matrices[:, :2] @ (75, 50, 1) - (75, 50)                               # shift minus crop corner
    x, y = centres.T
    for values, low, high in ((scales, 0.8, 1.2), (angles, -90, 90), (x, -80, 30), (y, -20, 20)):
        assert low <= values.min() < low + 0.06 * (high - low) and high - 0.06 * (high - low) < values.max() <= high
    assert abs(flips.mean()) < 0.06  # four standard errors of 4000 coins
    assert np.allclose(linear @ linear.transpose(0, 2, 1), scales[:, None, None] ** 2 * np.eye(2))


def test_data_test_view_is_resize_and_centre_crop(tmp_path):
    from torchvision.transforms import functional as T
    dataset = data.Images(write_cub(tmp_path, ((9, 9), (131, 90))), "test", "test", 64)
    image, label, points, index = dataset[0]
    expected = T.center_crop(T.resize(Image.open(dataset.files[0]), 64), 64)
    assert torch.equal(data.denormalize(image), T.pil_to_tensor(expected))
    assert assert_on_dots(dataset, margin=5, tolerance=0.35) > 0


def test_data_box_view_follows_the_metric(tmp_path):
    folder = write_cub(tmp_path)
    dataset = data.Images(folder, "test", "box", 48)  # image 40 x 40, box 10.5 8.25 20.7 16.9
    image, _, points, _ = dataset[0]
    expected = data.read_image(dataset.files[0]).crop((10, 8, 31, 25)).resize((48, 48), Image.Resampling.BILINEAR)
    assert torch.equal(data.denormalize(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    for (x, y, seen), (u, v, visible) in zip(dataset.keypoints[0].tolist(), points.tolist()):
        assert (u, v, visible) == (math.trunc(224 * (x - 10) / 21), math.trunc(224 * (y - 8) / 17), seen)


@pytest.mark.parametrize("box, corners", [("-7.5 -3 30 20", (-7, -3, 22, 17)), ("30.2 35 80 80.9", (30, 35, 110, 115)),
                                          ("12 13 0 0", (12, 13, 13, 14)), ("39.9 39.9 0.05 9", (39, 39, 40, 48)),
                                          ("60 70 5 5", (60, 70, 65, 75)), ("10.3 0 0.7 1", (10, 0, 11, 1))])
def test_data_boxes_that_overrun_or_are_empty(tmp_path, box, corners):
    folder = write_cub(tmp_path)
    (folder / "bounding_boxes.txt").write_text("\n".join(f"{key} {box}" for key in (17, 14, 11, 8)))
    dataset = data.Images(folder, "test", "box", 16)                                    # its image is 40 x 40
    expected = data.read_image(dataset.files[0]).crop(corners).resize((16, 16), Image.Resampling.BILINEAR)
    image, _, points, _ = dataset[0]
    assert torch.equal(data.denormalize(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert points.isfinite().all()


# ---- the augmentation is a function of (seed, epoch, index) ----------------------------------------------------------
def test_data_augmentation_does_not_depend_on_workers_or_cache(tmp_path, monkeypatch):
    folder, pictures = write_cub(tmp_path), {}
    for name, seed, epoch, workers, cache in (
            ("plain", 3, 5, 0, 0), ("cached", 3, 5, 0, 1 << 30), ("workers", 3, 5, 2, 1 << 30),
            ("epoch", 3, 6, 0, 1 << 30), ("seed", 4, 5, 0, 1 << 30)):
        monkeypatch.setattr(data, "CACHE_BYTES", cache)
        dataset = data.Images(folder, "train", "train", 32, seed)
        assert (dataset.cache is None) == (cache == 0)
        for dataset.epoch in (epoch, epoch):                                         # the second time from the cache
            loader = torch.utils.data.DataLoader(dataset, 3, num_workers=workers)
            (images, labels, points, indices), = loader
        pictures[name] = images
        assert indices.tolist() == [0, 1, 2]
    assert torch.equal(pictures["plain"], pictures["cached"]) and torch.equal(pictures["plain"], pictures["workers"])
    assert all((pictures["plain"] - pictures[other]).abs().amax((1, 2, 3)).min() > 0.5 for other in ("epoch", "seed"))


def test_data_workers_fill_one_cache(tmp_path, monkeypatch):
    dataset = data.Images(write_cub(tmp_path), "train", "train", 32)
    first = [image for image, *_ in torch.utils.data.DataLoader(dataset, num_workers=2)]
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("decoded twice"))
    assert all(torch.equal(a, b[0]) for (a, *_), b in zip(dataset, first))  # this process finds the workers' pixels
    copy = pickle.loads(pickle.dumps(dataset))                                       # what a spawned worker would get
    assert copy.cache is None and len(pickle.dumps(dataset)) < 10_000


# ---- reading images --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "png"),
                                          ("1", "png"), ("I;16", "png"), ("L", "jpg"), ("RGB", "webp")])
def test_data_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(30, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    read = data.read_image(tmp_path / f"x.{suffix}")
    assert read.mode == "RGB" and read.size == (40, 30)
    error = np.abs(np.asarray(read).astype(int) - ramp[..., None])
    assert error.mean() < (90 if mode == "1" else 3)  # JPEG and palette rounding; dithering


def test_data_exif_rotation_is_applied_only_when_asked(tmp_path):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6                                                                 # "turn by 90 degrees"
    image.save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg").size == (40, 30)                      # annotations: pixels as stored
    assert data.read_image(tmp_path / "x.jpg", upright=True).size == (30, 40)


def test_data_one_pixel_images(tmp_path):
    folder = write_cub(tmp_path, ((1, 1), (1, 1), (1, 7), (1, 1)))
    for split, view in itertools.product(("train", "test"), ("train", "test", "box")):
        image, _, points, _ = data.Images(folder, split, view, 28)[-1]
        assert image.shape == (3, 28, 28) and image.isfinite().all() and points.isfinite().all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "html", "gone"])
def test_data_unreadable_image_is_named_in_one_line(tmp_path, damage):
    dataset = data.Images(write_cub(tmp_path), "test", "test", 28)
    file, content = dataset.files[0], dataset.files[0].read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"truncated": content[:len(content) // 2], "empty": b"", "html": b"<html>no</html>"}[damage])
    with pytest.raises(ValueError) as caught:
        dataset[0]
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_data_normalize_and_back():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    expected = (pixels.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    assert np.allclose(data.normalize(pixels).numpy().transpose(0, 2, 3, 1), expected, atol=1e-5)     # fp32 rounding
    assert torch.allclose(data.normalize(pixels / 255), data.normalize(pixels), atol=1e-5)
    assert torch.equal(data.denormalize(data.normalize(pixels)), pixels)


def write_rows(path, row):
    path.write_text("".join(f"{key} {row}\n" for key in (17, 14, 11, 8)))


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage, words", [
    (lambda f: os.rename(f, f"{f}.away"), "images.txt is missing"),
    (lambda f: (f / "classes.txt").unlink(), "classes.txt is missing"),
    (lambda f: (f / "images/001.Class 1/image 1.png").unlink(), "image 1.png is missing"),
    (lambda f: (f / "bounding_boxes.txt").write_text("17 1 2 3\n"), "bounding_boxes.txt"),
    (lambda f: (f / "bounding_boxes.txt").write_text("17 1 2 3 4\n"), "at '14'"),
    (lambda f: (f / "bounding_boxes.txt").write_text("17 1 2 3 x\n"), "'x'"),
    (lambda f: write_rows(f / "bounding_boxes.txt", "1 2 nan 4"), "bounding_boxes.txt: holds nan"),
    (lambda f: write_rows(f / "bounding_boxes.txt", "1 2 3 -inf"), "bounding_boxes.txt: holds nan"),
    (lambda f: write_rows(f / "parts/part_locs.txt", "9 1 nan 1"), "part_locs.txt: holds nan"),
    (lambda f: write_rows(f / "parts/part_locs.txt", "9 1e300 1 1"), "part_locs.txt: holds nan or a number beyond 1e5"),
    (lambda f: (f / "images.txt").write_bytes(b"\xff\xfe\x00"), "images.txt"),
    (lambda f: (f / "image_class_labels.txt").write_text("17 4\n14 3\n11 3\n8 3\n"), "at '4'"),
    (lambda f: (f / "parts/part_locs.txt").write_text("17 99 1 1 1\n"), "at '99'"),
    (lambda f: (f / "parts/part_locs.txt").unlink(), "part_locs.txt"),
    (lambda f: (f / "train_test_split.txt").write_text("17 0\n14 0\n11 0\n8 0\n"), "no image for training")])
def test_data_a_damaged_folder_is_one_clear_line(tmp_path, damage, words):
    folder = write_cub(tmp_path / "CUB_200_2011")
    damage(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        data.Images(folder, "train", "train", 28)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_data_find(tmp_path):
    folder = write_cub(tmp_path / "CUB_200_2011")
    assert data.find("cub", tmp_path) == folder == data.find("cub", folder)
    with pytest.raises(ValueError, match="--data cap"):
        data.find("cap", tmp_path)
    (folder / "classes.txt").unlink()  # a half folder, no archive: hands off
    with pytest.raises(FileNotFoundError, match="classes.txt is missing.*CUB_200_2011.tgz into"):
        data.find("cub", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["CUB_200_2011"]


@pytest.mark.parametrize("left", [*data.LISTS, "images"])
def test_data_half_a_folder_named_directly_is_left_alone(tmp_path, monkeypatch, left):
    monkeypatch.setattr(data, "download", lambda *_, **__: pytest.fail("a download into the folder itself"))
    (tmp_path / left).mkdir()
    with pytest.raises(FileNotFoundError, match="is missing, half unpacked"):
        data.find("cub", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [left]


# ---- other data: part segmentations, and folders of classes ----------------------------------------------------------
def box_polygon(x, y, w, h, backwards=False):
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    return [float(value) for corner in corners[::-1 if backwards else 1] for value in corner]


def write_parts(folder, release="seg", train=4, test=2):
    """PartImageNet's layout: of two synsets each, images of 60 x 48 with a head (two pieces) and a body (bent as an L)."""
    content, rng = {}, np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        images, annotations = [], []
        for i, synset in itertools.product(range(count), ("n02000002", "n01000001")):
            name, key, (dx, dy) = f"{synset}_{i}{split}.JPEG", 40 - len(images), rng.integers(0, 12, 2).tolist()
            path = folder / "images" / split / name if release == "seg" else folder / split / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (48, 60, 3), np.uint8)).save(path, "JPEG")
            images.append(dict(id=key, file_name=name, width=60, height=48))
            body = [8, 18, 28, 18, 28, 22, 14, 22, 14, 34, 8, 34]
            for part, box, segments in (
                    (7, [4, 2, 3, 3], [box_polygon(4 + dx, 2 + dy, 3, 3)]),
                    (7, [20, 4, 9, 5], [box_polygon(20 + dx, 4 + dy, 4, 5), box_polygon(25 + dx, 4 + dy, 4, 2, backwards=True)]),
                    (5, [8, 18, 20, 16], [[value + (dx, dy)[j % 2] for j, value in enumerate(body)]])):
                annotations.append(dict(id=len(annotations), image_id=key, category_id=part, iscrowd=0, segmentation=segments,
                                        area=1, bbox=[box[0] + dx, box[1] + dy, *box[2:]]))
        content[split] = dict(images=images, annotations=annotations, categories=[
            dict(id=9, name="Bird Tail", supercategory="Bird"), dict(id=7, name="Bird Head", supercategory="Bird"),
            dict(id=5, name="Bird Body", supercategory="Bird")])
        path = folder / "annotations" / split / f"{split}.json" if release == "seg" else folder / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content[split]))
    return content


def rewrite(path, change):
    """A JSON of write_parts, changed by hand."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_classes(folder, splits=("train", "test"), train=4, test=2):
    for split, name in itertools.product(splits, ("zebra v1.5", "ant_eater")):
        (folder / split / name).mkdir(parents=True)
        for i in range(train if split == "train" else test):
            noise = np.random.default_rng((i, len(name))).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(noise).save(folder / split / name / f"{i}.{('jpg', 'PNG')[i % 2]}")
    return folder


@pytest.mark.parametrize("release", ["seg", "ood"])
def test_data_key_points_of_segmentations_are_the_centroids_of_their_pixels(tmp_path, monkeypatch, release):
    content = write_parts(tmp_path, release)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened at start-up"))
        train, test = data.Images(tmp_path, "train", "train", 32), data.Images(tmp_path, "test", "box", 32)
    assert (len(train), len(test), test.parts) == (8, 4, ["Bird Tail", "Bird Head", "Bird Body"])
    assert train.classes == test.classes == ["n01000001", "n02000002"] and test.labels.tolist() == [1, 0, 1, 0]
    assert [file.name for file in test.files] == [image["file_name"] for image in content["test"]["images"]]
    for i, image in enumerate(content["test"]["images"]):
        everything = np.zeros((48, 60), bool)
        for m, part in enumerate((9, 7, 5)):
            mask = np.zeros((48, 60), bool)
            for a in content["test"]["annotations"]:
                for polygon in a["segmentation"] if (a["image_id"], a["category_id"]) == (image["id"], part) else ():
                    x, y = np.array(polygon, int).reshape(-1, 2).T
                    mask[y.min():y.max(), x.min():x.max()] = True
                    if len(x) == 6:  # the L
                        mask[y[3]:y.max(), x[3]:x.max()] = False
            v, u = np.nonzero(mask)
            expected = (u.mean() + 0.5, v.mean() + 0.5, 1) if mask.any() else (0, 0, 0)
            assert test.keypoints[i, m].tolist() == pytest.approx(expected, abs=1e-4)       # kept in fp32
            everything |= mask
        v, u = np.nonzero(everything)
        assert test.boxes[i].tolist() == [u.min(), v.min(), u.max() + 1 - u.min(), v.max() + 1 - v.min()]
        x, y, w, h = map(int, test.boxes[i])
        crop = data.read_image(test.files[i]).crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BILINEAR)
        assert torch.equal(data.denormalize(test[i][0]), torch.from_numpy(np.array(crop)).permute(2, 0, 1))
        assert test[i][2][1, :2].tolist() == [math.trunc(224 * (test.keypoints[i, 1, 0].item() - x) / w),
                                              math.trunc(224 * (test.keypoints[i, 1, 1].item() - y) / h)]


def test_data_segmentations_as_odd_as_the_releases(tmp_path):
    """Polygons of one and of two points, a crowd, an image without parts, names that say only "Head"."""
    write_parts(tmp_path)

    def change(content):
        first, second = (image["id"] for image in content["images"][:2])
        content["annotations"] = [
            dict(image_id=first, category_id=9, segmentation=[[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]], bbox=[2, 4, 10, 6]),
            dict(image_id=first, category_id=7, segmentation=dict(counts="0", size=[48, 60]), bbox=[20, 20, 4, 6]),
            dict(image_id=first, category_id=5, segmentation=[box_polygon(0, 0, 60, 48)], bbox=[0, 0, 60, 48], iscrowd=1)]
        for category, name in zip(content["categories"], ("Head", "Body", "Head")):
            category.update(name=name, supercategory="Fish" if category["id"] == 9 else "Bird")
        content["images"][0]["file_name"] = "n02000002\\" + content["images"][0]["file_name"]      # of Windows
        assert second not in [a["image_id"] for a in content["annotations"]]
    rewrite(tmp_path / "annotations/test/test.json", change)
    test = data.Images(tmp_path, "test", "box", 32)
    assert test.parts == ["Fish Head", "Bird Body", "Bird Head"]
    assert test.keypoints[0].tolist() == [[7, 7, 1], [22, 23, 1], [0, 0, 0]] and test.boxes[0].tolist() == [2, 4, 22, 22]
    assert not test.keypoints[1].any()
    whole = data.read_image(test.files[1]).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(data.denormalize(test[1][0]), torch.from_numpy(np.array(whole)).permute(2, 0, 1))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_data_folder_of_classes(tmp_path, monkeypatch, held_out):
    folder = write_classes(tmp_path, ("train", held_out))
    shutil.rmtree(folder / held_out / "ant_eater")                                   # a class without test images
    for rubbish in ("train/ant_eater/Thumbs.db", "train/ant_eater/._0.jpg", "train/.DS_Store"):
        (folder / rubbish).write_text("not an image")
    exif = Image.Exif()
    exif[0x0112] = 6                                                                 # "turn by 90 degrees"
    Image.new("RGB", (50, 20), "red").save(folder / held_out / "zebra v1.5" / "photo.jpeg", exif=exif)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened at start-up"))
        train, test, box = (data.Images(folder, *kind, 32) for kind in (("train", "train"), ("test", "test"), ("test", "box")))
    assert train.classes == test.classes == ["ant_eater", "zebra v1.5"] and train.parts == test.parts == []
    assert train.labels.tolist() == [0] * 4 + [1] * 4 and test.labels.tolist() == [1] * 3
    assert [file.name for file in test.files] == ["0.jpg", "1.PNG", "photo.jpeg"]
    assert test.read(2).size == (20, 50) and test[0][2].shape == box[0][2].shape == (0, 3)
    whole = data.read_image(test.files[1]).resize((32, 32), Image.Resampling.BILINEAR)
    assert torch.equal(data.denormalize(box[1][0]), torch.from_numpy(np.array(whole)).permute(2, 0, 1))
    assert evaluate.Views(folder, "test", 32, 0, (4, 4))[1]["inside"].tolist() == [1] * 16
    assert data.find(str(folder)) == data.find(folder.name, folder.parent) == folder


def test_data_find_partimagenet(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"PartImageNet_Seg.zip from {data.PARTS_URL} and unpack it in {tmp_path}$"):
        data.find("partimagenet", tmp_path)
    write_parts(tmp_path / "PartImageNet")
    write_parts(tmp_path / "mine", "ood")
    assert data.find("partimagenet", tmp_path) == data.find("partimagenet", tmp_path / "PartImageNet") == tmp_path / "PartImageNet"
    assert data.find("partimagenet", tmp_path / "mine") == data.find(str(tmp_path / "mine")) == tmp_path / "mine"
    cub = write_cub(tmp_path / "birds")
    assert data.find("birds", tmp_path) == cub and data.layout(cub) is data.read_cub
    with pytest.raises(ValueError, match="birds2 is no folder; expected toy, cub, partimagenet, or FOLDER/train/CLASS/IMAGE"):
        data.find("birds2", tmp_path)
    with pytest.raises(ValueError, match="images has no train/ in it"):
        data.find(str(cub / "images"))


def in_test(change):
    return lambda f: rewrite(f / "annotations/test/test.json", change)


@pytest.mark.parametrize("write, damage, words", [
    (write_parts, lambda f: (f / "annotations/test/test.json").unlink(), "test.json is missing"),
    (write_parts, lambda f: (f / "annotations/test/test.json").write_bytes(b"PK\x03\x04\xff"), "not PartImageNet's annotations"),
    (write_parts, lambda f: (f / "annotations/test/test.json").write_text('{"imgHeight": 1}'), "COCO's format ('images')"),
    (write_parts, lambda f: (f / "annotations/test/test.json").write_text("[1]"), "not PartImageNet's annotations"),
    (write_parts, lambda f: (f / "annotations/train/train.json").write_text("{"), "train.json: not PartImageNet's annotations"),
    (write_parts, in_test(lambda c: c.update(images=[])), "no image"),
    (write_parts, in_test(lambda c: c.pop("categories")), "at 'categories'"),
    (write_parts, in_test(lambda c: c["images"][0].update(file_name="bird.JPEG")), "bird.JPEG, expected SYNSET_NUMBER.JPEG"),
    (write_parts, in_test(lambda c: c["images"][1].update(file_name="n03_1.JPEG")), "1 of its classes, n03 the first"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(image_id=99)), "does not fit at 99"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(category_id=[1])), "does not fit at"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), "does not fit at"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]])), "does not fit at"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(segmentation=[[1, 2, float("nan"), 2, 5, 5]])), "holds nan"),
    (write_parts, in_test(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 1e9])), "beyond 1e5"),
    (write_parts, lambda f: (f / "images/test/n01000001_0test.JPEG").unlink(), "n01000001_0test.JPEG is missing"),
    (write_classes, lambda f: shutil.rmtree(f / "test"), "no test/ and no val/"),
    (write_classes, lambda f: (f / "test/gnu").mkdir(), "test/gnu: no such class"),
    (write_classes, lambda f: [file.unlink() for file in (f / "test/ant_eater").iterdir()], "test/ant_eater: holds no image"),
    (write_classes, lambda f: [shutil.rmtree(place) for place in (f / "test").iterdir()], "no folder in it")])
def test_data_other_data_damaged_is_one_clear_line(tmp_path, write, damage, words):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError)) as caught:
        data.Images(tmp_path, "test", "test", 28)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---- the affine view -------------------------------------------------------------------------------------------------
def smooth(S, dtype=torch.float32):
    axis = torch.linspace(-1, 1, S + 1, dtype=dtype)[1:] - 1 / S
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    hill = torch.exp(-4 * ((x - 0.2) ** 2 + (y + 0.1) ** 2))
    return torch.stack((hill, 0.5 * hill))[None]


def test_data_affine_is_seeded_and_in_range():
    thetas = torch.stack([data.sample_affine(torch.Generator().manual_seed(s)) for s in range(3000)])
    assert torch.equal(thetas[7], data.sample_affine(torch.Generator().manual_seed(7)))
    scales = torch.linalg.det(thetas[:, :, :2]).sqrt()
    angles = torch.rad2deg(torch.atan2(thetas[:, 1, 0], thetas[:, 0, 0]))
    for values, bound in ((scales - 1.1, 0.3), (angles, 90), (thetas[:, :, 2], 0.22)):
        assert 0.98 * bound < values.max() <= bound * 1.0001 and -bound * 1.0001 <= values.min() < -0.98 * bound
    assert not torch.equal(data.sample_affine(), data.sample_affine())


def test_data_warp_moves_points_by_theta_and_unwarp_brings_them_back():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        theta, image = data.sample_affine(generator), smooth(96, torch.float64)
        warped = data.warp(image, theta)
        y, x = divmod(int(warped[0, 0].argmax()), 96)
        target = theta[:, :2] @ torch.tensor((0.2, -0.1)) + theta[:, 2]              # where the summit should be
        assert (torch.tensor((x + 0.5, y + 0.5)) / 48 - 1 - target).abs().max() < 0.75 / 48  # half a pixel, rounded
        back, inner = data.unwarp(warped, theta), data.unwarp(data.warp(torch.ones_like(image), theta), theta) > 0.999
        assert inner.float().mean() > 0.3
        assert (back - image)[inner].abs().max() < 5e-3                              # interpolated twice at 96 pixels
    assert torch.allclose(data.warp(image, torch.eye(2, 3)), image, rtol=0, atol=1e-12)


def test_data_unwarp_has_a_gradient_and_zeros_outside():
    maps = torch.ones(2, 3, 8, 8, requires_grad=True)
    theta = torch.tensor(((1.0, 0, 0.5), (0, 1.0, 0)))  # a quarter of the side to the right
    back = data.unwarp(maps, theta)
    assert torch.equal(back, (torch.arange(8) < 6).float().expand(2, 3, 8, 8))
    back.sum().backward()
    assert torch.equal(maps.grad, (torch.arange(8) >= 2).float().expand(2, 3, 8, 8))


# ---- the toy birds ---------------------------------------------------------------------------------------------------
@pytest.fixture
def few_birds(monkeypatch):
    monkeypatch.setattr(data, "TOY", {**data.TOY, "train": 3, "test": 2})


def test_data_toy_no_part_gives_a_species_away():
    codes = np.array([[int(digit) for digit in code] for code in data.TOY_SPECIES.values()])
    assert codes.shape == (10, len(data.TOY_LOOKS))
    for column, looks in zip(codes.T, data.TOY_LOOKS.values()):
        assert np.bincount(column, minlength=len(looks)).min() >= 3  # every look in three species or more
    assert min((a != b).sum() for a, b in itertools.combinations(codes, 2)) >= 5


def test_data_toy_is_cub_and_deterministic(tmp_path, few_birds, monkeypatch):
    first, second = data.find("toy", tmp_path / "a"), data.find("toy", tmp_path / "b")
    files = sorted(f.relative_to(first) for f in first.rglob("*") if f.is_file())
    assert len(files) == 50 + 7 and all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    train, test = data.Images(first, "train", "train", 128), data.Images(first, "test", "test", 128)
    assert (len(train), len(test), len(train.classes), train.parts) == (30, 20, 10, list(data.TOY_LOOKS))
    assert train.labels.bincount().tolist() == [3] * 10 and test.labels.bincount().tolist() == [2] * 10
    for dataset in (train, test):
        x, y, w, h = dataset.boxes.T[..., None]
        u, v, seen = dataset.keypoints.unbind(-1)
        assert ((u > x) & (u < x + w) & (v > y) & (v < y + h)).all()  # parts lie in the box, it in the image
        assert (dataset.boxes[:, :2] >= 0).all() and (dataset.boxes[:, :2] + dataset.boxes[:, 2:] <= 128.1).all()
        assert 0.8 < seen.mean() < 1                                                 # some are hidden
    monkeypatch.setattr(data, "draw_toy", lambda folder: pytest.fail("drawn twice"))
    assert data.find("toy", tmp_path / "a") == first
    for change in (lambda patch: patch.setitem(data.TOY, "tilt", 10), lambda patch: patch.setattr(data, "SKY", data.SKY + 1)):
        with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception):   # another drawing is another folder
            change(patch)
            data.find("toy", tmp_path / "a")


def test_data_toy_keypoints_lie_on_their_parts(monkeypatch):
    monkeypatch.setattr(data, "TOY", {**data.TOY, "occluded": 0, "light": 0})
    for c, code in enumerate(data.TOY_SPECIES.values()):
        image, box, points = data.toy_image(code, np.random.default_rng((c, 1)))
        pixels = np.asarray(image).astype(float)
        for (part, looks), digit, (x, y, seen) in zip(data.TOY_LOOKS.items(), code, points):
            near = pixels[max(0, round(y) - 5):round(y) + 5, max(0, round(x) - 5):round(x) + 5].reshape(-1, 3)
            assert seen and np.abs(near - looks[int(digit)]).max(1).min() < 60, (code, part)   # tint, slope and shade


def toy_images(n, monkeypatch, **changes):
    monkeypatch.setattr(data, "TOY", {**data.TOY, "zoom": 1, **changes})             # zoom: nine times as fast
    return [data.toy_image(code, np.random.default_rng((5, i))) for i, code in zip(range(n), itertools.cycle(
        data.TOY_SPECIES.values()))]


def test_data_toy_place_alone_is_not_enough(monkeypatch):
    """In the box's frame no fixed spot is within the metric's 36 pixels of a part in four images of five."""
    birds = toy_images(300, monkeypatch)
    frames = [224 * (points[:, :2] - box[:2]) / box[2:] for _, box, points in birds]
    assert np.stack(frames).min() >= 0 and np.stack(frames).max() <= 224
    beak, crown, tail, leg = (np.array([points[m, :2] for *_, points in birds]) for m in (0, 2, 6, 7))
    (x, y), (u, v) = (beak - tail).T, (leg - crown).T
    assert 0.4 < (x * v > y * u).mean() < 0.6                       # as many look left; 0.1 is 3.5 deviations of a coin
    spots = np.stack(np.meshgrid(np.arange(8, 224, 16), np.arange(8, 224, 16)), -1).reshape(-1, 1, 1, 2)
    hits = (np.abs(np.stack(frames) - spots) <= 36).all(-1).mean(1)                  # (196 spots, 8 parts)
    assert hits.max() < 0.85 and np.median(hits.max(0)) < 0.5


def test_data_toy_light_and_clutter_vary(monkeypatch):
    greenery, leaves = data.greenery, []
    monkeypatch.setattr(data, "greenery", lambda rng, side, near=None: leaves.append(near is None) or greenery(
        rng, side, near))
    plain, lit, counts = toy_images(60, monkeypatch, light=0), toy_images(60, monkeypatch, light=0.12), []
    gains = np.array([np.asarray(b).mean() / np.asarray(a).mean() for (a, *_), (b, *_) in zip(plain, lit)])
    assert 0.87 < gains.min() < 0.91 and 1.09 < gains.max() < 1.13                   # 0.01: bytes, and clipping at 255
    for i, code in zip(range(60), itertools.cycle(data.TOY_SPECIES.values())):
        leaves.clear()
        data.toy_image(code, np.random.default_rng((5, i)))
        counts.append(sum(leaves))
    assert min(counts) == 0 and max(counts) == data.TOY["clutter"] - 1 and len(set(counts)) > 10


# ---- downloads -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def serving(body, *moods):
    """A loopback server with one mood a request, the last one for ever; yields its address and the Ranges asked for."""
    moods, asked = list(moods or ("good",)), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            mood = moods.pop(0) if len(moods) > 1 else moods[0]
            asked.append(self.headers.get("Range"))
            tag = '"old"' if mood == "cut old" else '"new"'
            ranged = asked[-1] and mood != "ignores range" and self.headers.get("If-Range", tag) == tag
            start = int(asked[-1][6:-1]) if ranged else 0
            content = {"html": b"<!DOCTYPE html><p>Please log in", "html with mark": b"\xef\xbb\xbf\r\n<html>",
                       "cut old": body[::-1]}.get(mood, body[start:])
            self.send_response({"gone": 404}.get(mood, 416 if start > len(body) else 206 if start else 200))
            self.send_header("ETag", tag)
            if mood != "cut, of no length":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) * 6 // 10] if mood.startswith("cut") else content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.tgz", asked
    finally:
        server.shutdown()
        server.server_close()


BODY = np.random.default_rng(0).bytes(1_000_000)
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.mark.parametrize("moods, part, asked", [
    (["good"], b"", [None]),
    (["cut", "good"], b"", [None, "bytes=600000-"]),
    (["cut", "ignores range"], b"", [None, "bytes=600000-"]),
    (["good"], BODY[:999_999], ["bytes=999999-"]),                                   # a part from an earlier run
    (["good"], BODY + b"more", ["bytes=1000004-", None]),                            # one that is too long
    (["good"], b"x" * 10, ["bytes=10-", None]),                                      # one of something else
    (["html with mark", "good"], b"", [None, None]), (["html", "good"], b"", [None, None])])
def test_data_download_mends(tmp_path, moods, part, asked):
    if part:
        (tmp_path / "f.tgz.part").write_bytes(part)
    with serving(BODY, *moods) as (url, ranges):
        path = data.download(url, tmp_path / "f.tgz", size=len(BODY), md5=MD5, pause=0)
        assert path.read_bytes() == BODY and ranges == asked
        data.download(url, path, size=len(BODY), md5=MD5)                            # it is there: nobody is asked
        assert ranges == asked
    assert not (tmp_path / "f.tgz.part").exists()


def test_data_download_does_not_go_on_with_another_file(tmp_path):
    """The file changed between two requests, and no sum is known: the part of the old one is given up."""
    with serving(BODY, "cut old", "good") as (url, ranges):
        assert data.download(url, tmp_path / "f.tgz", pause=0).read_bytes() == BODY
    assert ranges == [None, "bytes=600000-"] and sorted(f.name for f in tmp_path.iterdir()) == [".f.tgz.lock", "f.tgz"]


@pytest.fixture
def served_weights(tmp_path, monkeypatch):
    """The bytes of a small ViT's state dict; torch's cache is empty and in tmp_path; no waiting between attempts."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    torch.save(tiny_backbone().state_dict(), tmp_path / "made.pth")
    return (tmp_path / "made.pth").read_bytes()


def script_fails(main, *arguments):
    """What a script's main() says on stderr in its one line, where it ends with code 2."""
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        main()
    line = error.getvalue()
    assert end.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("moods, requests, says", [
    (["cut", "good"], 2, ""), (["cut, of no length", "good"], 2, ""), (["html with mark", "good"], 2, ""),
    (["cut"], 4, "cut off"), (["cut, of no length"], 4, "truncated"), (["html"], 4, "web page")])
def test_scripts_download_weights_whole_or_not_at_all(moods, requests, says, served_weights, bird_root, tmp_path, monkeypatch):
    """train.py and evaluate.py alike; what arrives without a length is whole if it can be loaded."""
    file = tmp_path / "hub" / "checkpoints" / "file.tgz"
    more = [*FEW_BIRDS, "--data-root", bird_root, "--weights", "vits14", "--tune", "none", "--image-size", "70", "--device", "cpu"]
    o = train.parse(list(map(str, more)))
    model = ivpt.build(asdict(o), 10, tiny_backbone())
    ivpt.save(tmp_path / "last.pt", dict(options=asdict(o), classes=["a"] * 10, model=ivpt.trained_state(model),
                                         fingerprint=ivpt.fingerprint(model)))
    for script in ("train", "evaluate"):
        with serving(served_weights, *moods) as (url, asked):
            monkeypatch.setattr(ivpt, "URL", url)
            if not says and script == "train":
                train.fetch(o)
            elif not says:                                                          # it gets as far as the classes
                assert "found 10 classes" in script_fails(evaluate.main, "--ckpt", tmp_path / "last.pt")
            elif script == "train":
                error = script_fails(train.main, *more, "--out", tmp_path / "run")
            else:
                error = script_fails(evaluate.main, "--ckpt", tmp_path / "last.pt")
            assert len(asked) == requests
        if says:
            assert says in error and f"put it at {file}" in error and not file.exists()
        else:
            assert file.read_bytes() == served_weights
            file.unlink()
        file.with_name("file.tgz.part").unlink(missing_ok=True)


def test_load_backbone_alone_keeps_no_broken_file(served_weights, tmp_path, monkeypatch):
    for mood in ("cut", "html", "gone", "good"):
        with serving(served_weights, mood) as (url, _):
            monkeypatch.setattr(ivpt, "URL", url)
            if mood == "good":
                assert ivpt.load_backbone("vits14", 70).grid == (5, 5)
            else:
                with pytest.raises(OSError, match="could not fetch.*--weights") as caught:
                    ivpt.load_backbone("vits14", 70)
                assert "\n" not in str(caught.value) and not list((tmp_path / "hub" / "checkpoints").iterdir())


@pytest.mark.parametrize("mood, requests, words", [("cut", 3, "cut off"), ("html", 3, "web page"), ("gone", 1, "404")])
def test_data_download_gives_up_and_says_what_to_do(tmp_path, mood, requests, words):
    with serving(BODY, mood) as (url, ranges):
        with pytest.raises(OSError, match=words) as caught:
            data.download(url, tmp_path / "f.tgz", md5=MD5, attempts=3, pause=0)
    assert len(ranges) == requests and f"put it at {tmp_path / 'f.tgz'}" in str(caught.value)
    assert not (tmp_path / "f.tgz").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(size=len(BODY) + 1), dict(md5="0" * 32)])
def test_data_download_of_the_wrong_file_is_refused(tmp_path, wrong):
    with serving(BODY) as (url, _), pytest.raises(OSError, match="expected"):
        data.download(url, tmp_path / "f.tgz", **wrong, attempts=2, pause=0)
    assert not (tmp_path / "f.tgz").exists() and not (tmp_path / "f.tgz.part").exists()
    (tmp_path / "f.tgz").write_bytes(BODY)  # put there by hand, never removed by us
    with pytest.raises(ValueError, match="f.tgz: .*expected"):
        data.download("http://127.0.0.1:9/", tmp_path / "f.tgz", **wrong)
    assert (tmp_path / "f.tgz").read_bytes() == BODY


def test_data_download_looks_at_the_free_space_first(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=999_999))
    with serving(BODY) as (url, _), pytest.raises(ValueError, match="GB free"):
        data.download(url, tmp_path / "f.tgz", pause=0)
    assert not (tmp_path / "f.tgz.part").exists()


def test_data_no_place_to_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write there.*--data-root"):
        data.find("toy", tmp_path / "file" / "below")


# ---- archives --------------------------------------------------------------------------------------------------------
def pack(path, source=None, extra=()):
    """A .tgz of `source` as CUB_200_2011/, with further members (name, type, target) that mean harm."""
    with tarfile.open(path, "w:gz") as tar:
        if source:
            tar.add(source, "CUB_200_2011")
        for name, kind, target in extra:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, content = kind, target, b"" if target else b"harm"
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def served_cub(tmp_path, monkeypatch):
    """(folder of the original, data root, archive's bytes); the official address and sum stand for the archive."""
    original = write_cub(tmp_path / "original")
    content = pack(tmp_path / "made.tgz", original)
    monkeypatch.setattr(data, "CUB_MD5", hashlib.md5(content).hexdigest())
    return original, tmp_path / "root", content


def same(a, b):
    files = [sorted(f.relative_to(x) for f in x.rglob("*") if f.is_file()) for x in (a, b)]
    return files[0] == files[1] and all((a / f).read_bytes() == (b / f).read_bytes() for f in files[0])


def test_data_find_downloads_verifies_and_unpacks(served_cub, monkeypatch):
    original, root, content = served_cub
    with serving(content, "cut", "good") as (url, asked):
        monkeypatch.setattr(data, "CUB_URL", url)
        folder = data.find("cub", root)
        assert folder == root / "CUB_200_2011" and same(folder, original)
        assert data.find("cub", root) == folder and len(asked) == 2
    assert not [f.name for f in root.iterdir() if f.name.endswith((".new", ".part"))]


def test_data_half_folder_is_mended_from_the_archive(served_cub):
    original, root, content = served_cub
    folder = write_cub(root / "CUB_200_2011")
    (root / "CUB_200_2011.tgz").write_bytes(content)                                 # a mirror: put there by hand
    (folder / "images.txt").unlink()
    (folder / "images/001.Class 1/image 1.png").write_bytes(b"half")
    (folder / "mine.txt").write_text("keep me")
    assert data.find("cub", root) == folder and (folder / "mine.txt").read_text() == "keep me"
    (folder / "mine.txt").unlink()
    assert same(folder, original)


def test_data_half_the_key_points_are_mended_where_the_archive_lies_beside(served_cub):
    original, root, content = served_cub
    folder = write_cub(root / "CUB_200_2011")
    (folder / "parts" / "part_locs.txt").unlink()
    with pytest.raises(FileNotFoundError, match="parts/part_locs.txt is missing"):
        data.find("cub", root)
    shutil.rmtree(folder / "parts")
    assert data.find("cub", root) == folder and data.Images(folder, "test", "test", 28).parts == []   # a subset without
    (root / "CUB_200_2011.tgz").write_bytes(content)
    assert data.find("cub", root) == folder and same(folder, original)


@pytest.mark.parametrize("name, kind, target", [
    ("CUB_200_2011/../../outside", tarfile.REGTYPE, ""), ("../outside", tarfile.REGTYPE, ""),
    ("CUB_200_2011/link", tarfile.SYMTYPE, "/etc"), ("CUB_200_2011/link", tarfile.SYMTYPE, "images.txt"),
    ("CUB_200_2011/link", tarfile.LNKTYPE, "../../outside"), ("CUB_200_2011/pipe", tarfile.FIFOTYPE, ""),
    ("CUB_200_2011/disk", tarfile.BLKTYPE, "")])
def test_data_harmful_archives_are_refused(served_cub, monkeypatch, name, kind, target):
    original, root, _ = served_cub
    root.mkdir()
    content = pack(root / "CUB_200_2011.tgz", original, [(name, kind, target)])
    monkeypatch.setattr(data, "CUB_MD5", hashlib.md5(content).hexdigest())
    before = sorted(root.parent.iterdir())
    with pytest.raises(ValueError, match="not a sound archive"):
        data.find("cub", root)
    assert sorted(root.parent.iterdir()) == before and not (root / "CUB_200_2011").exists()


def test_data_absolute_paths_stay_inside(tmp_path):
    target = tmp_path / "outside"
    pack(tmp_path / "x.tgz", extra=[(str(target), tarfile.REGTYPE, "")])
    (tmp_path / "in").mkdir()
    data.unpack(tmp_path / "x.tgz", tmp_path / "in", "CUB_200_2011/")
    assert not target.exists() and (tmp_path / "in" / str(target).lstrip("/")).read_bytes() == b"harm"


@pytest.mark.parametrize("damage", [lambda c: c[:len(c) // 2], lambda c: b"", lambda c: b"no archive at all" * 9,
                                    lambda c: c[:300] + bytes(50) + c[350:]])
def test_data_broken_archives_leave_nothing(served_cub, monkeypatch, damage):
    _, root, content = served_cub
    root.mkdir()
    (root / "CUB_200_2011.tgz").write_bytes(damage(content))
    with pytest.raises(ValueError, match="MD5"):                                     # the sum alone would do
        data.find("cub", root)
    monkeypatch.setattr(data, "CUB_MD5", None)
    with pytest.raises(ValueError, match="not a sound archive|not in CUB's layout"):
        data.find("cub", root)
    assert not (root / "CUB_200_2011").exists() and not list(root.glob("*.new"))


def find_in_process(url, md5, root, barrier, queue):
    def download(*args, original=data.download, **options):
        barrier.wait(30)                                    # both have seen that nothing is there
        original(*args, **options)

    def unpack(*args, original=data.unpack):
        with open(f"{root}.unpacked", "a") as file:
            file.write("once ")
        original(*args)

    data.CUB_URL, data.CUB_MD5, data.download, data.unpack = url, md5, download, unpack
    queue.put(str(data.find("cub", root)))


def test_data_two_processes_download_and_unpack_once(served_cub):
    original, root, content = served_cub
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(2)
    with serving(content) as (url, asked):
        workers = [context.Process(target=find_in_process, args=(url, data.CUB_MD5, root, barrier, queue))
                   for _ in range(2)]
        for worker in workers:
            worker.start()
        found = {queue.get(timeout=30) for _ in workers}
        for worker in workers:
            worker.join(30)
    assert found == {str(root / "CUB_200_2011")} and [w.exitcode for w in workers] == [0, 0]
    assert len(asked) == 1 and same(root / "CUB_200_2011", original)
    assert Path(f"{root}.unpacked").read_text() == "once "


def test_data_a_killed_process_leaves_no_lock_and_no_rubbish(tmp_path, few_birds):
    def draw_and_hang(folder):
        (folder / "images").mkdir()
        ready.set()
        signal.pause()

    context = multiprocessing.get_context("fork")
    ready, folder = context.Event(), tmp_path / "toy"
    worker = context.Process(target=data.build, args=(folder, draw_and_hang))
    worker.start()
    assert ready.wait(30) and (tmp_path / ".toy.new/images").is_dir() and not folder.exists()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    data.build(folder, data.draw_toy)
    assert len(data.Images(folder, "test", "box", 28)) == 20 and not (tmp_path / ".toy.new").exists()


def test_data_script_describes_and_draws_a_sheet(tmp_path, few_birds, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--data-root", str(tmp_path), "--sheet", str(tmp_path / "birds.png")])
    data.main()
    assert "30 + 20 images, 10 classes" in capsys.readouterr().out
    assert Image.open(tmp_path / "birds.png").width > 1280


# ---------------------------------------------------------------- training, as a user runs it

FEW_BIRDS = ["--data", "cub", "--weights", "toy", "--tune", "all", "--image-size", "56", "--workers", "0", "--no-amp"]


@pytest.fixture(scope="module")
def bird_root(tmp_path_factory):
    """8 + 2 birds of each toy species, drawn once, as a --data-root: anybody's data in CUB's layout."""
    root = tmp_path_factory.mktemp("birds")
    (root / "CUB_200_2011").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY", dict(data.TOY, train=8, test=2))
        data.draw_toy(root / "CUB_200_2011")
    return root


def options(root, out, *more):
    return train.parse([*FEW_BIRDS, "--data-root", str(root), "--out", str(out), "--epochs", "2", "--device", "cpu", *map(str, more)])


def parameters(run):
    return torch.load(run / "last.pt", weights_only=True)["model"]


def log_of(run):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "log.jsonl").open()]


def ivpt_command(script, *arguments, **more):
    script = script if script == "-m" else ROOT / script
    return subprocess.run([sys.executable, *map(str, (script, *arguments))], capture_output=True, text=True, timeout=240,
                          env=dict(os.environ, OMP_NUM_THREADS="1"), **more)


def one_line_error(result, *says):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for text in says:
        assert text in lines[0], lines[0]


def test_a_run_leaves_what_it_says_and_resumes_bit_for_bit(bird_root, tmp_path, capsys):
    """2 + 2 epochs equal 4: parameters, losses, and the metrics that follow from them."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    metrics = train.train(options(bird_root, straight, "--epochs", 4))
    train.train(options(bird_root, halves, "--epochs", 2))
    resumed = train.train(options(bird_root, halves, "--epochs", 4, "--resume"))
    assert "python evaluate.py --ckpt" in capsys.readouterr().out.splitlines()[-1]
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight).values(), parameters(halves).values()))
    assert log_of(straight) == log_of(halves) and len(log_of(straight)) == 4
    assert metrics == resumed == json.loads((straight / "metrics.json").read_text())
    assert json.loads((straight / "config.json").read_text())["epochs"] == 4
    assert {"classification", "equivariance", "loss", "train_accuracy"} <= set(log_of(straight)[0])
    with pytest.raises(ValueError, match="holds a run already"):
        train.train(options(bird_root, halves))
    with pytest.raises(ValueError, match="seed 42, now 7"):
        train.train(options(bird_root, halves, "--resume", "--seed", 7))
    again = options(bird_root, halves, "--epochs", 4, "--resume", "--accumulate", 2)  # what out of memory asks for
    assert train.load_run(halves / "last.pt", again, data.Images(bird_root / "CUB_200_2011", "train", "train", 56), 1)["epoch"] == 4


def test_stopped_in_mid_epoch_and_resumed_is_as_if_never_stopped(bird_root, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    train.train(options(bird_root, straight, "--epochs", 1))
    affine = data.sample_affine
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped, calls = tmp_path / number.name, []

        def signal_at_the_third(*generator):
            calls.append(0)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return affine(*generator)
        monkeypatch.setattr(data, "sample_affine", signal_at_the_third)
        assert train.train(options(bird_root, stopped, "--epochs", 1)) == 3
        assert torch.load(stopped / "last.pt", weights_only=True)["step"] == 3  # the step was finished, then saved
        train.train(options(bird_root, stopped, "--epochs", 1, "--resume"))
        assert all(torch.equal(a, b) for a, b in zip(parameters(straight).values(), parameters(stopped).values()))
        assert log_of(straight) == log_of(stopped)


SIGNALLED = """import os, signal, subprocess, sys
sys.path.insert(0, {root!r})
import data, model, train
affine, save, calls, saves = data.sample_affine, model.save, [], []
def third(*generator):
    calls.append(0)
    if len(calls) == 3 and {what!r} == "TERM":
        subprocess.run(["kill", "-TERM", "--", f"-{{os.getpgrp()}}"])
    if len(calls) == 3 and {what!r} == "KILL in a step":
        os.kill(os.getpid(), signal.SIGKILL)
    return affine(*generator)
def second(path, content):
    saves.extend([0] * (path.name == "last.pt"))
    if len(saves) == 2 and {what!r} == "KILL":
        os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    save(path, content)
data.sample_affine, model.save = third, second
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the "kill" above is in the group, too; training sets its own
train.main()
"""


@pytest.fixture
def one_thread():
    """Sums are rounded in another order on another number of threads; ivpt_command gives its processes one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_kill_while_saving_and_a_signal_to_every_process_of_a_run_cost_nothing(bird_root, tmp_path, one_thread):
    """SIGKILL when the log is one epoch ahead of the checkpoint, SIGKILL in the next epoch's third step, then SIGTERM there,
    which reaches the loader processes as well."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    train.train(options(bird_root, straight))
    more = [*FEW_BIRDS, "--data-root", bird_root, "--out", run, "--epochs", 2, "--device", "cpu"]
    for what, code, where, lines, new in (("KILL", -signal.SIGKILL, (1, 0), 2, ()),
                                          ("KILL in a step", -signal.SIGKILL, (1, 0), 1, ("--resume",)),
                                          ("TERM", 3, (1, 3), 1, ("--resume", "--workers", 2))):
        (tmp_path / "run.py").write_text(SIGNALLED.format(root=str(ROOT), what=what))
        result = ivpt_command(tmp_path / "run.py", *more, *new, start_new_session=True)
        assert result.returncode == code, result.stderr
        checkpoint = torch.load(run / "last.pt", weights_only=True)
        assert (checkpoint["epoch"], checkpoint["step"]) == where and len(log_of(run)) == lines
    train.train(options(bird_root, run, "--resume"))
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight).values(), parameters(run).values()))
    assert log_of(straight) == log_of(run)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_with_the_op_is_training_with_the_formula(recipe, monkeypatch):
    """Ten steps in fp64, with the op and with section 3 as one would write it down: the same losses. In fp32 and bf16 the
    rounding of one step is in the exponents of the next, and in dozens of steps runs part whatever computes the maps."""
    def formula(x, q, b, after, smoothing=0.0, detach_maps=False):
        e = x.detach() if detach_maps else x
        logits = -(e[:, None] - q[:, None]).square().sum(3)  # (B, K, N), from a tensor of B K N D numbers
        a = (logits.softmax(1) + b).clamp(min=0) if after else (logits + b).softmax(1)
        a = (a + smoothing) / (a + smoothing).sum(1, keepdim=True) if smoothing else a
        r = a * F.one_hot(a.argmax(1), len(q)).transpose(1, 2)
        return a, (r @ x) / r.sum(2, keepdim=True).clamp(min=1e-300), r.sum(2)

    losses = []
    for _ in range(2):
        model = tiny_ivpt(recipe).double().train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        torch.manual_seed(0)
        for _ in range(10):
            optimizer.zero_grad()
            terms, _ = train.Objective(model)(torch.randn(2, 3, 70, 70).double(), torch.tensor([0, 1]), data.sample_affine().double())
            terms["loss"].backward()
            optimizer.step()
            losses.append(terms["loss"].item())
        monkeypatch.setattr(ivpt, "prototype_attention", formula)
    assert losses[:10] == pytest.approx(losses[10:], rel=1e-6)  # fp32 would give 1e-3


def test_accumulated_parts_sum_to_the_batch(bird_root, tmp_path):
    """No loss but presence mixes images of a batch; without it, two parts of 8 give the gradient of one batch of 16."""
    o = options(bird_root, tmp_path)
    model = ivpt.build(asdict(o), 10).eval()  # eval: no Gumbel noise
    images, labels, theta = torch.randn(4, 3, 56, 56), torch.arange(4), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    grads = []
    for parts in (1, 2):
        model.zero_grad()
        for i, l in zip(images.chunk(parts), labels.chunk(parts)):
            losses, _ = train.Objective(model)(i, l, theta)
            ((losses["loss"] - losses["presence"]) / parts).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)  # fp32, sums in another order


def test_a_non_finite_loss_takes_no_step_and_stops_the_run(bird_root, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train.train(options(bird_root, run, "--epochs", 1))
    before = (run / "last.pt").read_bytes()
    monkeypatch.setattr(train, "entropy", lambda A: A.sum() * float("nan"))
    assert train.train(options(bird_root, run, "--resume")) == 4
    assert (run / "last.pt").read_bytes() == before
    error = capsys.readouterr().err
    assert error.count("no step taken") == 3 and error.count(".jpg") == 48 and "last good state" in error
    named = [f"{bird_root}/CUB_200_2011/{name}" for name in re.findall(r"\S+\.jpg", error)]
    assert len(set(named)) == 48 and all(map(os.path.isfile, named))


def test_one_bad_batch_is_left_out_of_the_log(bird_root, tmp_path, monkeypatch):
    entropy, calls = train.entropy, []
    monkeypatch.setattr(train, "entropy", lambda A: calls.append(0) or entropy(A) * (float("nan") if len(calls) == 7 else 1))
    train.train(options(bird_root, tmp_path / "run", "--epochs", 1))  # 5 maps a step: the second of five steps is bad
    assert all(math.isfinite(value) for value in log_of(tmp_path / "run")[0].values())


def test_gradients_are_clipped_and_autocast_is_what_amp_says(bird_root, tmp_path, monkeypatch):
    clipped, seen, clip, layer = [], [], nn.utils.clip_grad_norm_, ivpt.Attention.forward
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append(norm) or clip(p, norm))
    monkeypatch.setattr(ivpt.Attention, "forward", lambda self, *x: seen.append(torch.is_autocast_enabled("cpu")) or layer(self, *x))
    train.train(options(bird_root, tmp_path / "a", "--epochs", 1, "--batch-size", 40))
    assert clipped == [2.0, 2.0] and not any(seen)
    seen.clear()
    train.train(options(bird_root, tmp_path / "b", "--epochs", 1, "--batch-size", 40, "--amp"))
    assert all(seen)


def test_overwrite_forgets_the_old_run_at_once(bird_root, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train.train(options(bird_root, run, "--epochs", 1))
    monkeypatch.setattr(train.Objective, "forward", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(options(bird_root, run, "--overwrite"))
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "log.jsonl"] and log_of(run) == []
    before = [path.stat().st_mtime_ns for path in run.iterdir()]
    with pytest.raises(ValueError, match="saved nothing yet.*--overwrite"):  # killed, or in its first epoch right now
        train.train(options(bird_root, run))
    with pytest.raises(FileNotFoundError, match="last.pt is not there.*--overwrite"):
        train.train(options(bird_root, run, "--resume"))
    assert [path.stat().st_mtime_ns for path in run.iterdir()] == before


def test_a_killed_or_failing_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    ivpt.save(path, {"epoch": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left.*the one before it stands"):
        ivpt.save(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(OSError, match="log.jsonl: could not be written.*none before it"):
        ivpt.save(tmp_path / "log.jsonl", "a line")
    monkeypatch.undo()
    monkeypatch.setattr(ivpt, "open", FullDisk, raising=False)  # torch's own writer is in the middle of the file
    with pytest.raises(OSError, match="No space left.*the one before it stands"):
        ivpt.save(path, {"epoch": 2, "model": torch.zeros(9999)})
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    child = multiprocessing.get_context("fork").Process(target=killed_while_saving, args=(path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    ivpt.save(path, {"epoch": 3})  # what the killed one left is no obstacle
    assert torch.load(path, weights_only=True) == {"epoch": 3}


class FullDisk(io.FileIO):
    def write(self, content):
        if self.tell() + len(content) > 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def killed_while_saving(path):
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # the file is written, not yet in place
    ivpt.save(path, {"epoch": 2})


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_one_step_of_each_recipe_trains_what_it_should(recipe, bird_root, tmp_path):
    o = options(bird_root, tmp_path, "--recipe", recipe)
    o.tune = "none" if recipe == "paper" else "tokens"  # the toy ViT stands in for a pretrained one
    model = ivpt.build(asdict(o), 10).train()
    optimizer, _ = train.make_optimizer(model, o)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses, _ = train.Objective(model)(torch.randn(2, 3, 56, 56), torch.tensor([0, 1]), data.sample_affine())
    losses["loss"].backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n in before if n.startswith("backbone.")} - (
        {"backbone.cls_token", "backbone.pos_embed"} if recipe == "released" else set())
    assert moved == set(before) - frozen
    rates = {n: g["lr"] for g in optimizer.param_groups for n, p in model.named_parameters() if any(p is q for q in g["params"])}
    assert rates["classifier.weight"] == rates["norm.weight"] == rates["fusions.0.grouping.weight"] == 1e-2
    o = options(bird_root, tmp_path, "--lr-backbone", "3e-4")
    groups = train.make_optimizer(ivpt.build(asdict(o), 10), o)[0].param_groups
    assert [group["lr"] for group in groups] == [1e-2, 2e-4, 2e-5, 3e-4]  # the last: a backbone trained along
    assert rates["concepts.0.prototypes"] == 2e-4 and rates["concepts.0.bias"] == (2e-5 if recipe == "paper" else 2e-4)


def test_the_toy_vit_is_pretrained_once(bird_root, tmp_path, monkeypatch, capsys):
    o = options(bird_root, tmp_path, "--pretrain", "6", "--epochs", "1", "--seed", "3")
    errors, mse_loss, whole = [], F.mse_loss, train.pretrain
    monkeypatch.setattr(F, "mse_loss", lambda drawn, pixels: errors.append(mse_loss(drawn, pixels)) or errors[-1])
    before = {}

    def watched(backbone, *rest):
        before.update({name: p.detach().clone() for name, p in backbone.named_parameters()})
        whole(backbone, *rest)
        still = {name for name, p in backbone.named_parameters() if torch.equal(p, before[name])}
        assert still == {"mask_token"}                                   # all else has learnt

    monkeypatch.setattr(train, "pretrain", watched)
    assert train.train(o)["accuracy"] >= 0 and before
    assert len(errors) == 6 * 5 and sum(errors[-5:]) < 0.8 * sum(errors[:5])  # 80 birds, 5 batches: patches tell their pixels
    monkeypatch.setattr(train, "pretrain", lambda *args: pytest.fail("pretrained again"))
    o.resume, o.epochs = True, 2
    train.train(o)
    dataset, vit = data.Images(bird_root / "CUB_200_2011", "train", "train", 56), ivpt.load_backbone("toy", 56)
    before = vit.blocks[-1].mlp.fc1.weight.detach().clone()
    monkeypatch.setattr(F, "mse_loss", lambda drawn, pixels: 0 * drawn.sum())
    whole(vit, dataset, train.parse([*FEW_BIRDS, "--pretrain", "1", "--device", "cpu"]), torch.device("cpu"), False)
    assert not torch.equal(vit.blocks[-1].mlp.fc1.weight, before)  # the labels alone teach, too
    with pytest.raises(ValueError, match="--pretrain 1: vits14 is pretrained"):
        train.parse(["--weights", "vits14", "--pretrain", "1"])
    assert (train.parse([]).pretrain, train.parse(["--data", "cub"]).pretrain) == (16, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_backbones_trains_one_step(family):
    model = tiny_ivpt(family=family).train()
    losses, _ = train.Objective(model)(torch.randn(2, 3, 70, 70), torch.tensor([0, 1]), data.sample_affine())
    losses["loss"].backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_recipes_presets_and_defaults_are_those_of_the_readme():
    for recipe, (after, mlp, tune, scaled, rate) in {"paper": (True, True, "none", False, 2e-5), "tuned": (True, True, "none", True, 2e-5),
                                                     "released": (False, False, "tokens", False, 2e-4)}.items():
        o = train.parse(["--data", "cub", "--recipe", recipe])
        assert (o.weights, o.image_size, o.epochs, o.batch_size, o.prototypes) == ("vitb14_reg4", 518, 25, 16, (17, 14, 11, 8, 5))
        assert (o.lr, o.lr_prototypes, o.lr_bias, o.start) == (1e-2, 2e-4, rate, "kmeans" if scaled else "noise")
        model = ivpt.build(asdict(o), 10, tiny_backbone())
        assert all(c.bias_after_softmax == after and c.scaled == scaled and c.regions for c in model.concepts)
        assert isinstance(model.fusions[0].head, nn.Sequential) == mlp and model.tune == tune
    model = ivpt.IVPT(tiny_backbone(), 10)
    assert model.prototypes == (17, 14, 11, 8, 5) and model.concepts[0].bias_after_softmax and model.tune == "none"
    assert model.concepts[0].prototypes.std().item() == pytest.approx(0.05, rel=0.15) and not model.concepts[0].bias.any()
    for weight in (model.classifier.weight, model.fusions[0].grouping.weight, model.fusions[0].head[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(c.regions for c in ivpt.IVPT(tiny_backbone(), 10, regions=False).concepts)


def test_training_augments_anew_halves_its_rates_and_starts_where_the_recipe_says(bird_root, tmp_path, monkeypatch):
    epochs, started, view, start = set(), [], data.Images._train_view, ivpt.start_prototypes
    monkeypatch.setattr(data.Images, "_train_view", lambda self, *a: epochs.add(self.epoch) or view(self, *a))
    monkeypatch.setattr(ivpt, "start_prototypes", lambda *a, **k: started.append(a) or start(*a, **k))
    train.train(options(bird_root, tmp_path, "--recipe", "tuned", "--epochs", 5, "--batch-size", 80, "--workers", 0))
    scale = 5 ** 0.5
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx([1e-2 * scale] * 4 + [5e-3 * scale])
    assert epochs == set(range(5)) and len(started) == 1
    optimizer, _ = train.make_optimizer(started[0][0], options(bird_root, tmp_path))
    assert optimizer.defaults["weight_decay"] == 0 and optimizer.defaults["betas"] == (0.9, 0.999)


ABLATION = {"no_bias": dict(spatial_bias=False), "no_regions": dict(regions=False), "no_cross_layer": dict(cross_layer=False),
            "no_fusion": dict(fusion=False)}


@pytest.mark.parametrize("idea", ABLATION)
def test_an_ablation_takes_one_idea_away_and_trains(idea, bird_root, tmp_path):
    o = options(bird_root, tmp_path, "--" + idea.replace("_", "-"))
    model = ivpt.build(asdict(o), 10).train()
    optimizer, _ = train.make_optimizer(model, o)
    images, labels, theta = torch.randn(2, 3, 56, 56), torch.tensor([0, 1]), data.sample_affine()
    losses, _ = train.Objective(model)(images, labels, theta)
    losses["loss"].backward()
    optimizer.step()
    unmoved = {n for n, p in model.named_parameters() if p.grad is None and not n.startswith("backbone.")}
    assert unmoved == (named(model, "concepts.*.bias") if idea == "no_bias" else set())
    out = model.eval()(images)
    prompted = 0 if idea == "no_cross_layer" else 4
    grouped = 0 if idea == "no_fusion" else prompted
    assert len(out.attention) == prompted + 1 and len(out.groups) == len(out.fused) == grouped and losses["loss"].isfinite()
    assert (losses["region_consistency"] > 0) == bool(grouped)


def test_without_regions_every_patch_counts_by_its_share():
    for last in (False, True):
        layer = ivpt.ConceptLayer(3, 64, 9, True, False, True, regions=False)
        patches = torch.randn(2, 9, 64, requires_grad=True)
        a, pooled, _ = layer(patches, **dict(smoothing=1e-6, detach_maps=True) if last else {})
        torch.testing.assert_close(pooled, torch.einsum("bkn,bnd->bkd", a / a.sum(2, keepdim=True), patches))


def test_without_fusion_every_fine_concept_is_a_prompt(monkeypatch):
    model, seen, forward = tiny_ivpt(fusion=False), [], ivpt.Block.forward
    monkeypatch.setattr(ivpt.Block, "forward", lambda self, x, prompts=None: seen.append(prompts) or forward(self, x, prompts))
    model(torch.randn(1, 3, 70, 70))
    assert [p.shape[1] for p in seen if p is not None] == [K - 1 for K in PROTOTYPES[:-1]]


# ---------------------------------------------------------------- the methods that IVPT is compared with

METHODS = ("vpt-deep", "vpt-deep-proto", "protopnet", "huang")


def rival(method, family="registers", classes=3):
    """A model of the method on a tiny frozen ViT, every parameter random."""
    options = dict.fromkeys(("no_bias", "no_regions", "no_cross_layer", "no_fusion"), False)
    options |= dict(method=method, prototypes=PROTOTYPES, bias="after", fusion="mlp", tune="none", distance="euclidean")
    model = ivpt.build(options, classes, tiny_backbone(**FAMILIES[family]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name != "vectors":
                p.copy_(torch.randn(p.shape) * 0.2)
    return model.eval()


def test_vpt_deep_is_the_vit_with_ten_more_tokens_in_every_block():
    """Against the independent ViT, prompts being full tokens that are thrown away after their block; and where they look."""
    model, images = rival("vpt-deep"), torch.randn(2, 3, 70, 70)
    P = {k: v.double() for k, v in model.state_dict().items()}
    state = {k.removeprefix("backbone."): v for k, v in P.items() if k.startswith("backbone.")}
    tokens, h, w = oracle_embed(images, state)
    T, looks = tokens.shape[1], []
    for i in range(5):
        x = torch.cat([tokens, P["prompts"][i].expand(2, -1, -1)], 1)
        s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        q, k, _ = (oracle_norm(x, s, "norm1") @ s["attn.qkv.weight"].T + s["attn.qkv.bias"]).split(128, dim=-1)
        heads = [(q[..., a:a + 64] @ k[..., a:a + 64].transpose(1, 2) / 8).softmax(-1) for a in (0, 64)]
        looks.append(sum(heads)[:, T:, 5:T].div(2).unflatten(2, (h, w)))  # rows of prompts, columns of patches
        tokens = oracle_block(x, state, i)[:, :T]
    cls = oracle_norm(tokens[:, 0], state, "norm")
    with torch.no_grad():
        out = model(images)
    torch.testing.assert_close(out.logits.double(), cls @ P["classifier.weight"].T + P["classifier.bias"], atol=1e-3, rtol=1e-3)  # fp32
    assert model.prototypes == (11,) * 5 and len(out.attention) == 5 and out.concept_logits is None
    for a, look in zip(out.attention, looks):
        torch.testing.assert_close(a[:, :-1].double(), look, atol=1e-4, rtol=1e-3)
        assert (a[:, -1] == 1 / (T + 10)).all()
    assert model.train()(images).attention == []


def test_vpt_deep_with_prototypes_is_a_concept_layer_on_prompted_patches():
    model, images = rival("vpt-deep-proto"), torch.randn(2, 3, 70, 70)
    assert model.free_prompts.shape == (5, 10, 128) and model.prototypes == PROTOTYPES[-1:]
    tokens = model.backbone.embed(images)
    for block, prompts in zip(model.backbone.blocks, model.free_prompts):
        tokens = block(tokens, prompts.expand(2, -1, -1))
    patches = model.backbone.norm(tokens[:, 5:])
    a, pooled, _ = model.concepts[0](patches, smoothing=ivpt.SMOOTHING, detach_maps=True)
    out = model(images)
    torch.testing.assert_close(out.attention[0].flatten(2), a)
    torch.testing.assert_close(out.logits, model.classifier(model.norm(pooled)[:, :-1]).mean(1))


@pytest.mark.parametrize("aligned", [False, True])
def test_protopnet_scores_by_hand(aligned):
    """log((d2 + 1) / (d2 + 1e-4)), the largest over patches, 1 to the own class and -1/2 to others or own weights alone."""
    model, images = rival("huang" if aligned else "protopnet"), torch.randn(2, 3, 70, 70)
    if not aligned:
        model.last.data = 1.5 * model.own - 0.5
    z, _, d2 = model.compare(images)
    out = model(images, torch.tensor([2, 0]))
    weights = 10 * model.last.softmax(1) if aligned else None
    for b, label in enumerate((2, 0)):
        similarity = torch.stack([((z[b] - p).square().sum(1) + 1).log() - ((z[b] - p).square().sum(1) + 1e-4).log()
                                  for p in model.vectors])  # (C m, N)
        scores = similarity.amax(1).view(3, 10)
        for c in range(3):
            expected = (weights[c] * scores[c]).sum() if aligned else 1.5 * scores[c].sum() - 0.5 * scores.sum()
            torch.testing.assert_close(out.logits[b, c], expected, atol=1e-3, rtol=1e-3)  # d2 by the binomial formula
        torch.testing.assert_close(out.attention[0][b, :10].flatten(1), similarity[10 * label:10 * label + 10], atol=1e-3, rtol=1e-3)
        for j in range(10):  # votes: what the prototypes shown add to every class, times m
            own = torch.eye(3)[label] * weights[label, j] if aligned else torch.tensor([-0.5] * 3) + 1.5 * torch.eye(3)[label]
            torch.testing.assert_close(out.concept_logits[b, j], 10 * scores[label, j] * own, atol=1e-3, rtol=1e-3)
    assert (out.attention[0][:, :10].amax(1) > out.attention[0][:, 10]).all()  # nobody is background
    shown = model(images).attention[0]  # without labels: of the predicted class
    assert torch.equal(shown, model(images, out.logits.argmax(1)).attention[0])
    with torch.autocast("cpu", torch.bfloat16):  # 40 classes have logits near -95 that differ by 0.25
        assert torch.equal(model.read(d2).logits, out.logits)


def test_the_votes_of_protopnet_sum_to_the_margin():
    model, image = rival("protopnet"), torch.randn(3, 70, 70)
    logits = model(image[None]).logits[0].sort(descending=True).values
    top, votes, regions = evaluate.explain(model, image, ["a", "b", "c"])
    assert len(votes) == 11 and sum(votes) == pytest.approx((logits[0] - logits[1]).item(), abs=1e-3)
    assert "other classes' prototypes" in evaluate.words(top, votes, regions, model.prototypes)


def test_the_losses_of_protopnet_and_huang_written_out():
    torch.manual_seed(0)
    d2, labels = torch.rand(2, 6, 3, 4), torch.tensor([1, 2])  # B, N, C, m
    nearest = d2.amin(1)
    torch.testing.assert_close(train.cluster(d2, labels), (nearest[0, 1].min() + nearest[1, 2].min()) / 2)
    torch.testing.assert_close(train.separation(d2, labels), -(nearest[0, [0, 2]].min() + nearest[1, :2].min()) / 2)
    z, shallow, total = torch.rand(2, 6, 5), torch.rand(2, 6, 7), 0
    for b, label in enumerate(labels):
        for j in range(4):
            peak = d2[b, :, label, j].argmin()
            for n in range(6):
                deep, early = (F.cosine_similarity(e[b, peak], e[b, n], dim=0) for e in (z, shallow))
                total += max(0, (deep - early).abs().item() - 0.1)
    assert train.alignment(z, shallow, d2, labels).item() == pytest.approx(total / (2 * 4 * 6), rel=1e-4)
    model = rival("protopnet")
    others = [model.last[c, k].abs() for c in range(3) for k in range(30) if k // 10 != c]
    torch.testing.assert_close(train.last_layer(model), sum(others))


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_learns(method):
    """A frozen ViT; the classes reach what the method's paper trains, and nothing else."""
    model, images = rival(method).train(), torch.randn(2, 3, 70, 70)
    first = {"vpt-deep": ("prompts", "classifier.*"), "vpt-deep-proto": ("free_prompts", "concepts.*", "norm.*", "classifier.*"),
             "protopnet": ("add_on.*", "vectors"), "huang": ("add_on.*", "vectors", "last")}[method]
    assert reached(model, images, "classification") == reached(model, images, "loss") == named(model, *first)
    if method == "vpt-deep-proto":
        assert reached(model, images, "entropy") == named(model, "concepts.*")  # maps see the patches through sg
    if method in ("protopnet", "huang"):
        assert reached(model, images, "cluster") == named(model, "add_on.*", "vectors")
    if method == "protopnet":
        model.last_only = True
        assert reached(model, images, "loss") == {"last"}
    if method == "huang":
        assert reached(model, images, "alignment") == named(model, "add_on.*")


@pytest.mark.parametrize("method, lr, slow", [
    ("vpt-deep", 1e-2, 2e-4), ("vpt-deep-proto", 1e-2, 2e-4), ("protopnet", 1e-2, 3e-3), ("huang", 1e-6, 3e-3)])
def test_the_rates_of_each_method(method, lr, slow, bird_root, tmp_path):
    o = options(bird_root, tmp_path, "--method", method)
    model = ivpt.build(asdict(o), 10)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in train.make_optimizer(model, o)[0].param_groups for p in group["params"]}
    for name, rate in rates.items():
        if not name.startswith("backbone.") and not (name.startswith("concepts") and name.endswith("bias")):
            assert rate == (slow if name.startswith(("concepts", "free_prompts", "prompts", "add_on", "vectors")) else lr), name


def test_projection_puts_every_prototype_on_a_patch_of_its_class(bird_root):
    torch.manual_seed(0)
    backbone = ivpt.load_backbone("toy", 56)
    model = ivpt.ProtoPNet(backbone, 10, per_class=3)
    dataset = data.Images(bird_root / "CUB_200_2011", "train", "test", 56)
    before = model.vectors.detach().clone()
    model.eval().project(dataset)
    for c in range(0, 10, 3):
        images = torch.stack([dataset[int(i)][0] for i in (dataset.labels == c).nonzero()])
        with torch.no_grad():
            patches = model.compare(images)[0].flatten(0, 1)
        for j in range(3 * c, 3 * c + 3):
            distances = (patches - before[j]).square().sum(1)
            torch.testing.assert_close(model.vectors[j], patches[distances.argmin()], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_resumes_evaluates_and_explains(method, bird_root, tmp_path, capsys):
    """Two epochs, and one resumed to two; then the very command that was printed. ProtoPNet's first stage cannot be a run."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    metrics = train.train(options(bird_root, straight, "--method", method))
    if method == "protopnet":
        assert "cluster" in log_of(straight)[0] and "cluster" not in log_of(straight)[1]
    else:
        train.train(options(bird_root, halves, "--method", method, "--epochs", 1))
        train.train(options(bird_root, halves, "--method", method, "--resume"))
        assert all(torch.equal(a, b) for a, b in zip(parameters(straight).values(), parameters(halves).values()))
    told = metrics["protocol"]["recipe"]
    assert told["method"] == method and (told["bias"] is None) == (method != "vpt-deep-proto") and len(metrics["layers"]) == {"vpt-deep": 5}.get(method, 1)
    capsys.readouterr()
    evaluate.main(["--ckpt", str(straight / "last.pt"), "--visualize", str(straight / "pictures")])
    page = (straight / "pictures" / "index.html").read_text()
    assert ("prototypes of its own" in page) == (method in ("protopnet", "huang"))
    assert json.loads((straight / "metrics.json").read_text()) == metrics
    bird = next((bird_root / "CUB_200_2011" / "images").rglob("*.jpg"))
    evaluate.main(["--ckpt", str(straight / "last.pt"), "--visualize", str(tmp_path), "--image", str(bird)])
    assert ("do not vote" in capsys.readouterr().out) == (method == "vpt-deep")


def test_a_run_stopped_after_the_projection_goes_on_with_the_last_layer(bird_root, tmp_path, monkeypatch):
    runs = [tmp_path / "straight", tmp_path / "stopped"]
    train.train(options(bird_root, runs[0], "--method", "protopnet", "--epochs", 4))
    calls, affine = [], data.sample_affine

    def stop_in_the_third_epoch():
        calls.append(0)
        if len(calls) == 12:
            signal.raise_signal(signal.SIGTERM)
        return affine()

    monkeypatch.setattr(data, "sample_affine", stop_in_the_third_epoch)
    assert train.train(options(bird_root, runs[1], "--method", "protopnet", "--epochs", 4)) == 3
    with pytest.raises(ValueError, match="epochs 4, now 6"):  # its last stage is counted from the end
        train.train(options(bird_root, runs[1], "--method", "protopnet", "--epochs", 6, "--resume"))
    train.train(options(bird_root, runs[1], "--method", "protopnet", "--epochs", 4, "--resume"))
    first, second = map(parameters, runs)
    assert all(torch.equal(first[name], second[name]) for name in first) and log_of(runs[0]) == log_of(runs[1])


def test_evaluate_prototypes_of_a_class_are_controlled_within_it():
    """Two classes whose one prototype each stands still at a place of its own: constant within its class, spread 0."""
    maps, labels = torch.zeros(6, 2, 7, 7), torch.tensor([0, 1, 0, 1, 0, 1])
    maps[labels == 0, 0, 1, 1] = maps[labels == 1, 0, 5, 5] = 1.0
    points = torch.tensor([[[48.0, 48, 1], [176, 176, 0]], [[48, 48, 0], [176, 176, 1]]])[labels]
    scores = []
    for owners in (1, 2):
        tally = evaluate.Tally(2, (7, 7), 2, owners)
        tally.add(maps, maps, maps, torch.zeros(6, 49, dtype=torch.long), torch.tensor([[8, -1], [-1, 40]])[labels], labels)
        scores.append(tally.summary(points, labels, ["beak", "tail"], 0))
    assert scores[0]["consistency"] == scores[1]["consistency"] == scores[1]["constant_location"] == 100
    assert scores[0]["constant_location"] == 50 and scores[0]["peak_spread"] > 80 and scores[1]["peak_spread"] == 0
    assert scores[0]["nmi"] is not None and scores[1]["nmi"] is scores[1]["ari"] is scores[1]["parts_hit"] is None


# ---------------------------------------------------------------- other data than birds

def test_data_the_ood_release_as_it_is_says_what_to_take(tmp_path):
    """Its splits share no class: known before anything is trained."""
    write_parts(tmp_path, "ood")
    (tmp_path / "test").rename(tmp_path / "test_images")
    rewrite(tmp_path / "test.json", lambda c: [i.update(file_name=i["file_name"].replace("n0", "n1")) for i in c["images"]])
    o = options(tmp_path, tmp_path / "run", "--data", "partimagenet")
    with pytest.raises(ValueError, match="2 of its classes, n11000001 the first, are not in .*train.json; .* PartImageNet_Seg.zip"):
        train.train(o)


@pytest.mark.parametrize("kind", ["partimagenet", "folder"])
def test_other_data_trains_and_is_found_again_by_evaluate(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path / "root/PartImageNet") if kind == "partimagenet" else write_classes(tmp_path / "root/pets")
    arguments = ["--data", "partimagenet", "--data-root", "root"] if kind == "partimagenet" else ["--data", "root/pets/"]
    o = train.parse([*arguments, "--weights", "toy", "--image-size", "56", "--epochs", "1", "--batch-size", "4", "--workers", "0",
                     "--device", "cpu", "--no-amp"])
    run = Path("runs", "partimagenet" if kind == "partimagenet" else "pets")
    assert Path(o.out) == run
    metrics = train.train(o)
    written = (run / "metrics.json").read_bytes()
    evaluate.main(["--ckpt", str(run / "last.pt"), "--visualize", "pictures"])
    assert (run / "metrics.json").read_bytes() == written and 0 <= metrics["accuracy"] <= 100 and len(log_of(run)) == 1
    page, layer = Path("pictures/index.html").read_text(), metrics["layers"][0]
    if kind == "partimagenet":
        assert metrics["unavailable"] is None and layer["consistency"] is not None and metrics["protocol"]["parts"] == 3
        assert "n01000001" in page
    else:
        assert all(layer[key] is None for key in evaluate.PART_METRICS) and layer["foreground_outside"] is None
        assert "not available" in capsys.readouterr().out and "truly zebra v1.5" in page and "truly ant eater" in page


def test_other_data_takes_the_presets_of_cub():
    wanted = train.parse(["--data", "cub"])
    for name in ("partimagenet", "/some/where/pets"):
        o = train.parse(["--data", name])
        assert (o.weights, o.image_size, o.epochs) == (wanted.weights, wanted.image_size, wanted.epochs) == ("vitb14_reg4", 518, 25)
        assert o.out == f"runs/{Path(name).name}" and o.tune == wanted.tune


# ---------------------------------------------------------------- the tuned recipe: where prototypes start, and the scaled distance

def test_the_scaled_layer_divides_squared_distances_of_unit_patches_by_sqrt_d():
    layer, patches = ivpt.ConceptLayer(3, 64, 9, True, True, True, True), torch.randn(2, 9, 64) * 30
    e = patches / patches.square().mean(-1, keepdim=True).sqrt()
    logits = -(e[:, None] - layer.prototypes[:, None]).square().sum(-1) / 8
    torch.testing.assert_close(layer(patches)[0], logits.softmax(1))


def test_kmeans_of_fewer_patches_than_centres():
    centres = ivpt.kmeans(torch.eye(5), 16, torch.Generator().manual_seed(0))
    assert centres.shape == (16, 5) and torch.cdist(torch.eye(5), centres).amin(1).max() < 1e-3  # each patch has its own


def test_a_start_without_foreground_is_one_line(bird_root, tmp_path, monkeypatch):
    o = options(bird_root, tmp_path, "--recipe", "tuned")
    monkeypatch.setattr(ivpt, "foreground_of", lambda e, rims, generator: rims < 0)
    with pytest.raises(ValueError, match="0 foreground patches in 4 training images.*--start noise"):
        ivpt.start_prototypes(ivpt.build(asdict(o), 10), [(torch.zeros(3, 56, 56), 0)] * 4, seed=0)


def test_kmeans_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    planted = 10 * torch.eye(6)[:5]
    e = planted.repeat(40, 1) + 0.1 * torch.randn(200, 6, generator=generator)
    centres = ivpt.kmeans(e, 5, generator)
    assert torch.cdist(planted, centres).amin(1).max() < 0.1  # each found, to the mean of 40 deviations of 0.1


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_the_middle_of_the_images_foreground(sign):
    generator = torch.Generator().manual_seed(0)
    radii = torch.rand(400, generator=generator) * 2
    bird = radii < 0.6
    e = torch.randn(400, 8, generator=generator) + sign * 8 * bird[:, None] * torch.eye(8)[2]
    e[radii > 1.9] += sign * 8 * torch.eye(8)[2]  # corners that look like birds
    assert torch.equal(ivpt.foreground_of(e, radii, generator), bird)


def test_prototypes_start_in_the_patches_they_will_meet(bird_root, tmp_path):
    """Deterministic; no label, box or key point is read; concepts win patches before the first step."""
    o, starts = options(bird_root, tmp_path, "--recipe", "tuned"), []
    dataset = data.Images(bird_root / "CUB_200_2011", "train", "test", o.image_size)
    for _ in range(2):
        dataset.labels, dataset.boxes, dataset.keypoints = dataset.labels * 0, dataset.boxes * 0, dataset.keypoints * 0
        torch.manual_seed(0)
        model = ivpt.build(asdict(o), 10)
        ivpt.start_prototypes(model, dataset, seed=1)
        starts.append([concept.prototypes.detach().clone() for concept in model.concepts])
    assert all(torch.equal(a, b) for a, b in zip(*starts))
    assert all((q.norm(dim=1) <= 128 ** 0.5 + 1e-3).all() for q in starts[0])  # means of vectors of that length
    images = torch.stack([dataset[i][0] for i in range(40)])
    won = model.eval()(images).attention[0].argmax(1).flatten().bincount(minlength=17)  # before any prompt: the frozen patches
    assert (won[:-1] > 0).sum() >= 14 and won[-1] > won.sum() / 2  # nearly all of 16 concepts, and yet more background


def test_learning_rates_follow_the_batch_and_halve_every_four_epochs(bird_root, tmp_path):
    o = options(bird_root, tmp_path, "--batch-size", 64)
    optimizer, scheduler = train.make_optimizer(ivpt.build(asdict(o), 10), o)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2e-2] * 4 + [1e-2] * 4 + [5e-3]


def test_every_image_has_its_turn_on_one_rank(bird_root, tmp_path):
    o, images = options(bird_root, tmp_path, "--accumulate", 2), range(80)
    ranks = [train.epoch_batches(images, o, 3, rank, 2) for rank in range(2)]
    alone = train.epoch_batches(images, options(bird_root, tmp_path), 3, 0, 1)
    assert ranks[0].shape == (5, 2, 4)
    for step in range(5):  # the same images in every step, however many processes share it
        assert sorted([*ranks[0][step].flatten().tolist(), *ranks[1][step].flatten().tolist()]) == sorted(alone[step].flatten().tolist())
    assert sorted(alone.flatten().tolist()) == list(images)
    assert not torch.equal(alone, train.epoch_batches(images, options(bird_root, tmp_path), 4, 0, 1))


# ---------------------------------------------------------------- the scripts, from the shell

def test_scripts_end_to_end(bird_root, tmp_path):
    """train.py, then the very command it prints; a second run refuses to replace the first."""
    more = [*FEW_BIRDS, "--data-root", bird_root, "--epochs", "1", "--batch-size", "32", "--out", tmp_path / "run"]
    result = ivpt_command("train.py", *more)
    assert result.returncode == 0, result.stderr
    command = result.stdout.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"]
    metrics = (tmp_path / "run" / "metrics.json").read_bytes()
    result = ivpt_command(*command[1:])
    assert result.returncode == 0, result.stderr
    assert "accuracy" in result.stdout and (tmp_path / "run" / "pictures" / "index.html").is_file()
    assert (tmp_path / "run" / "metrics.json").read_bytes() == metrics  # evaluation repeats training's own, byte for byte
    one_line_error(ivpt_command("train.py", *more), "--overwrite")


def test_bench_prints_a_table_and_a_json_line(bird_root, tmp_path, capsys):
    train.bench(options(bird_root, tmp_path, "--bench", "--tune", "none", "--batch-size", "2"))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1 < row["ratio"] < 100 and row["step_ms_per_image"] > row["forward_ms_per_image"] > 0  # a step holds two forwards
    assert row["peak_gib_above_model"] >= 0 and row["dtype"] == "fp32" and row["recipe"] == "paper"
    assert 0 < row["loading_ms_per_image"] < 1000


class Harm:
    def __reduce__(self):  # what a plain unpickler would run
        return pytest.fail, ("a checkpoint ran code",)


def damaged(kind, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"format": "ivpt"}, path)
    elif kind == "pickle":
        torch.save({"format": "ivpt", "options": Harm()}, path)
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(Harm()))
    elif kind == "shape":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["model"]["concepts.0.prototypes"] = torch.zeros(3, 128)
        torch.save(checkpoint, path)
    elif kind == "backbone":
        torch.save(dict(torch.load(path, weights_only=True), fingerprint="0"), path)


@pytest.mark.parametrize("kind, says", [("truncated", "truncated"), ("empty", "empty"), ("foreign", "not written by train.py"),
                                        ("pickle", "not a torch file"), ("shape", "concepts.0.prototypes"), ("backbone", "another frozen backbone")])
def test_damaged_checkpoints_are_named(kind, says, bird_root, tmp_path):
    o = options(bird_root, tmp_path)
    model = ivpt.build(asdict(o), 10)
    path = tmp_path / "last.pt"
    ivpt.save(path, dict(format="ivpt", options=asdict(o), classes=["a"] * 10, model=ivpt.trained_state(model),
                          fingerprint=ivpt.fingerprint(model)))
    assert ivpt.load_checkpoint(path)[0].num_classes == 10
    damaged(kind, path)
    with pytest.raises(ValueError, match=says) as error:
        ivpt.load_checkpoint(path)
    assert "\n" not in str(error.value)
    if kind == "backbone":  # whole, but for what only --resume needs
        with pytest.raises(ValueError, match="optimizer is missing"):
            train.load_run(path, o, None, 1)


def test_scripts_say_damage_to_a_checkpoint_in_one_line(bird_root, tmp_path, recwarn):
    """train.py --resume and evaluate.py meet every kind of damage; fields of another type, too."""
    path, whole = tmp_path / "run" / "last.pt", tmp_path / "whole.pt"
    more = [*FEW_BIRDS, "--data-root", bird_root, "--out", path.parent, "--epochs", "1", "--device", "cpu", "--resume"]
    train.train(options(bird_root, path.parent, "--epochs", 1))
    os.replace(path, whole)

    def change(name, value):
        checkpoint = torch.load(whole, weights_only=True)
        place = checkpoint["options"] if name in checkpoint["options"] else checkpoint
        place[name] = value
        torch.save({key: value for key, value in checkpoint.items() if value is not None}, path)

    for kind, says in (("truncated", "truncated"), ("empty", "empty"), ("pickle", "not a torch file"), ("raw pickle", "not a torch file")):
        shutil.copy(whole, path)
        damaged(kind, path)
        for error in (script_fails(train.main, *more), script_fails(evaluate.main, "--ckpt", path)):
            assert str(path) in error and says in error
    for name, value in (("data_root", 5), ("image_size", "x"), ("classes", {}), ("options", None)):
        change(name, value)
        for error in (script_fails(train.main, *more), script_fails(evaluate.main, "--ckpt", path)):
            assert f"{name} is missing or of another type" in error
    for name, value, says in (("epoch", "x", "epoch is missing or of another type"), ("images", None, "images is missing"),
                              ("optimizer", {}, "optimizer, scheduler or random states are damaged"),
                              ("scheduler", [], "scheduler is missing"), ("random", [{"cpu": torch.zeros(3)}], "random states are damaged"),
                              ("random", [0, 0], "written by 2 processes")):
        change(name, value)
        assert says in script_fails(train.main, *more)
    assert not recwarn.list  # torch warns of an old pickle before it refuses it


@pytest.mark.parametrize("arguments, says", [
    (["--resume", "--overwrite"], "--resume --overwrite"), (["--image-size", "100"], "divisible by the patch"), (["--prototypes", "17"], "prototypes"),
    (["--prototypes", "17", "14", "11", "8", "1"], "prototypes"), (["--batch-size", "0"], "--batch-size"),
    (["--data", "birds"], "--data"), (["--weights", "nowhere.pth"], "nowhere.pth"), (["--resume"], "--resume"),
    (["--batch-size", "9", "--accumulate", "2"], "--accumulate"), (["--batch-size", "100"], "training images"),
    (["--lr", "nan"], "--lr"), (["--lr-bias", "-1"], "--lr-bias"), (["--seed", "-1"], "--seed"), (["--workers", "-1"], "--workers"),
    (["--device", "gpu"], "--device"), (["--tune", "tokens"], "--tune"), (["--method", "protopnet", "--no-bias"], "--no-bias"),
    (["--method", "vpt-deep-proto", "--no-fusion"], "--no-fusion"), (["--method", "huang", "--recipe", "tuned"], "--recipe"),
    (["--method", "vpt-deep", "--distance", "scaled"], "--distance"), (["--method", "protopnet", "--epochs", "1"], "--epochs 1"),
    (["--method", "protopnet", "--tune", "tokens"], "--tune tokens"),
    (["--method", "vpt"], "--method"), (["--image-size", "16"], "at least 3 a side")])
def test_bad_options_are_one_line(arguments, says, bird_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *FEW_BIRDS, "--data-root", str(bird_root), "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    captured = capsys.readouterr().err.strip()
    assert end.value.code == 2 and captured.startswith("error: ") and "\n" not in captured and says in captured


def test_a_corrupt_image_and_a_folder_that_cannot_be_written_are_named(bird_root, tmp_path, monkeypatch, one_thread):
    """Met by a loader process, in the middle of an epoch: still one line, and a checkpoint from before that step. Other data
    is refused there; once the image is mended the run goes on as if nothing had been."""
    shutil.copytree(bird_root, tmp_path / "birds")
    dataset = data.Images(tmp_path / "birds" / "CUB_200_2011", "train", "train", 56)
    order = train.epoch_batches(dataset, options(bird_root, tmp_path), 0, 0, 1).flatten()
    broken, straight, run = dataset.files[order[40]], tmp_path / "straight", tmp_path / "run"  # in the third of five steps
    content = broken.read_bytes()
    broken.write_bytes(content[:700])
    more = [*FEW_BIRDS, "--data-root", tmp_path / "birds", "--workers", "1"]
    result = ivpt_command("train.py", *more, "--out", run, "--epochs", "1", "--device", "cpu", "--accumulate", "2")
    one_line_error(result, str(broken), "--resume")
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 2
    broken.write_bytes(content)
    split = dataset.folder / "train_test_split.txt"
    lists = split.read_text()
    split.write_text(lists.replace(" 1\n", " 0\n", 1))
    resume = options(tmp_path / "birds", run, "--epochs", 1, "--accumulate", 2, "--resume")
    with pytest.raises(ValueError, match="trained on 80 images.*has 79 images"):
        train.train(resume)
    split.write_text(lists)
    train.train(resume)
    train.train(options(bird_root, straight, "--epochs", 1, "--accumulate", 2))
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight).values(), parameters(run).values()))
    assert log_of(straight) == log_of(run)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    for error in (script_fails(train.main, *more, "--out", tmp_path / "new"), script_fails(evaluate.main, "--ckpt", run / "last.pt")):
        assert "cannot be written (Read-only file system)" in error
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert f"--out {tmp_path / 'file' / 'run'}: cannot be written" in script_fails(train.main, *more, "--out", tmp_path / "file" / "run")


def test_exit_codes_reach_the_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for outcome, code in ((lambda o: 3, 3), (lambda o: 4, 4), (lambda o: {}, 0)):
        monkeypatch.setattr(train, "train", outcome)
        with pytest.raises(SystemExit) as end:
            train.main()
        assert end.value.code == code
    no_memory = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for error, says in ((torch.OutOfMemoryError("CUDA out of memory"), "--accumulate"), (RuntimeError(no_memory), "--accumulate"),
                        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "--workers"),
                        (RuntimeError("[pair.cc:544] Connection closed by peer [127.0.0.1]:9"), "another process")):
        monkeypatch.setattr(train, "train", lambda o: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as end:
            train.main()
        assert end.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("script, arguments", [
    ("train.py", ["--prototype", "3"]), ("train.py", ["--recipe", "best"]), ("train.py", ["--prototypes"]), ("train.py", ["--epochs", "x"]),
    ("evaluate.py", ["--ckpt", "a", "--foo"]), ("evaluate.py", []), ("data.py", ["--foo"])])
def test_unknown_options_are_one_line(script, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        try:
            dict(zip(("train.py", "evaluate.py", "data.py"), (train, evaluate, data)))[script].main()
        except ValueError as error:  # data.py prints it below its main()
            raise SystemExit(2) from print("error:", error, file=sys.stderr)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.startswith("error: ") and "\n" not in error and "--help" in error


# ---------------------------------------------------------------- real birds, a real pretrained ViT (skipped where absent)

@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the project's own copy of 40 CUB classes and a ViT-Tiny")
def test_real_features_know_birds():
    """The pretrained ViT reads right: its cls token's nearest neighbours agree on the class far above chance (1 in 40)."""
    backbone = ivpt.load_backbone(SHARED / "weights" / "vit_tiny_patch16_224.pth", 224)
    features, labels = [], []
    for split, step in (("train", 10), ("test", 25)):
        dataset = data.Images(SHARED / "data" / "CUB_200_2011", split, "test", 224)
        picked = range(0, len(dataset), step)
        with torch.no_grad():
            features.append(F.normalize(torch.cat([backbone(dataset[i][0][None])[:, 0] for i in picked]), dim=1))
        labels.append(dataset.labels[list(picked)])
    nearest = labels[0][(features[1] @ features[0].T).argmax(1)]
    assert (nearest == labels[1]).float().mean() > 0.4  # 3 training images a class; with all 30 a 20-NN reaches 84 %


# ---------------------------------------------------------------- two processes

@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_and_evaluate_like_one(bird_root, tmp_path, monkeypatch):
    """torchrun over gloo, each batch in two processes x two parts: with the terms that see their own part only made equal,
    the gradient is one process's; rank 0 alone writes; the sharded metrics equal one process's."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    root = tmp_path / "birds"
    shutil.copytree(bird_root, root)
    split = root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 0\n", " 1\n", 1))  # 19 images to evaluate: one process has one more
    equal = """
torch.nn.functional.gumbel_softmax = lambda logits, tau: logits.softmax(-1)
data.sample_affine = lambda: torch.tensor([[0.0, 1, 0], [-1, 0, 0]])
train.presence = lambda A: 0 * A.sum()
"""
    (tmp_path / "run.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, data, train{equal}train.main()\n")
    for owner, name in ((F, "gumbel_softmax"), (data, "sample_affine"), (train, "presence")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    exec(equal, dict(torch=torch, data=data, train=train))
    more = [*FEW_BIRDS, "--data-root", root, "--epochs", "1", "--device", "cpu", "--batch-size", "80", "--out"]
    train.train(train.parse(list(map(str, [*more, alone]))))  # a single step: Adam's first moment is the gradient
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = ivpt_command(*torchrun, tmp_path / "run.py", *more, run, "--accumulate", "2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("accuracy") == 1 and len((run / "log.jsonl").read_text().splitlines()) == 1
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert len(checkpoint["random"]) == 2 and not torch.equal(*(state["cpu"] for state in checkpoint["random"]))
    expected = torch.load(alone / "last.pt", weights_only=True)["optimizer"]["state"]
    for i, state in checkpoint["optimizer"]["state"].items():  # fp32 sums in another order
        scale = expected[i]["exp_avg"].abs().max().item()
        torch.testing.assert_close(state["exp_avg"], expected[i]["exp_avg"], rtol=1e-3, atol=1e-3 * scale + 1e-9)
    together = (run / "metrics.json").read_bytes()
    evaluate.main(["--ckpt", str(run / "last.pt")])
    assert (run / "metrics.json").read_bytes() == together and json.loads(together)["protocol"]["images"] == 19
    (run / "metrics.json").unlink()
    result = ivpt_command(*torchrun, ROOT / "evaluate.py", "--ckpt", run / "last.pt")
    assert result.returncode == 0, result.stderr[-2000:]
    assert (run / "metrics.json").read_bytes() == together and result.stdout.count("accuracy") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for option in ("--visualize", "--image"):
        assert "one process draws" in script_fails(evaluate.main, "--ckpt", run / "last.pt", option, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- evaluate.py: the metrics on hand-computed cases -----------------------------------------------------------------
def evaluate_upsampled(maps):
    """The definition: bicubic to 224 x 224, half-pixel centres, first maximum row by row. (n, K, h, w) -> (n, K, 2)"""
    n, K = maps.shape[:2]
    full = F.interpolate(maps.double(), size=(224, 224), mode="bicubic", align_corners=False).float()
    first = full.flatten(2).argmax(2)                                       # documented: the first of equal maxima
    return torch.stack((first % 224, first // 224), 2).view(n, K, 2)


@pytest.mark.parametrize("h, w", [(14, 14), (16, 16), (37, 37), (7, 7), (9, 14), (224, 224), (1, 1), (3, 2)])
def test_evaluate_peaks_are_those_of_the_upsampled_map(h, w):
    generator = torch.Generator().manual_seed(h * 1000 + w)
    noise = torch.randn(9, 4, h, w, generator=generator)
    one_hot = F.one_hot(torch.randint(h * w, (9, 4), generator=generator), h * w).view(9, 4, h, w)
    kinds = noise, noise.mul(3).softmax(1), noise.mul(40).softmax(1), one_hot.float(), (noise > 0).float(), -noise.exp()
    for maps in kinds:
        assert torch.equal(evaluate.find_peaks(maps), evaluate_upsampled(maps))


def test_evaluate_peaks_agree_with_fp32_interpolation():
    maps = torch.randn(6, 17, 14, 14, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    first = F.interpolate(maps, size=(224, 224), mode="bicubic").flatten(2).argmax(2)
    assert torch.equal(evaluate.find_peaks(maps), torch.stack((first % 224, first // 224), 2))


def test_evaluate_the_first_of_equal_maxima_is_the_peak():
    maps = torch.zeros(1, 4, 14, 14)
    maps[0, 1] = 0.3                                                        # constant: the first pixel of the frame
    maps[0, 2, 3, 9] = maps[0, 2, 3, 4] = maps[0, 2, 8, 1] = 1              # the first row, and in it the first column
    maps[0, 3, 13, 13] = 1                                                  # replicated border: the corner cell is flat
    peaks = evaluate.find_peaks(maps)[0]
    assert peaks[:2].tolist() == [[0, 0], [0, 0]]
    assert torch.equal(peaks, evaluate_upsampled(maps)[0]) and 64 <= peaks[2, 0] < 80 and 48 <= peaks[2, 1] < 64
    assert evaluate.find_peaks(torch.ones(1, 1, 37, 37))[0, 0].tolist() == [0, 0]


def evaluate_map_with_peak(x, y):
    maps = torch.zeros(1, 1, 224, 224)
    maps[0, 0, y, x] = 1
    return maps


def test_evaluate_region_has_inclusive_ends_and_stops_at_the_frame():
    def hit(x, y, point, visible=1, **options):
        keypoints = torch.tensor([[[*point, visible]]]).float()
        return evaluate.part_hits(evaluate_map_with_peak(x, y), keypoints, **options).item()
    assert hit(100, 50, (136, 50)) and hit(100, 50, (64, 86)) and hit(100, 50, (136, 14))
    assert not hit(100, 50, (137, 50)) and not hit(100, 50, (100, 87)) and not hit(100, 50, (63, 50))
    assert hit(220, 100, (224, 100)) and not hit(220, 100, (225, 100))      # 225 is within 36, but outside the frame
    assert hit(3, 3, (0, 0)) and not hit(3, 3, (-1, 3))
    assert not hit(100, 50, (100, 50), visible=0)
    assert hit(100, 50, (110, 50), half_size=10) and not hit(100, 50, (111, 50), half_size=10)


def evaluate_hits(*rows):
    """One prototype: a string of parts per image, x hit, . not -> (n, 1, M)"""
    return torch.tensor([[[c == "x" for c in row]] for row in rows])


def test_evaluate_consistency_by_hand():
    labels, all_seen = torch.zeros(5, dtype=torch.long), torch.ones(5, 2)
    assert evaluate.consistency(evaluate_hits("x.", "x.", "x.", "x.", ".."), all_seen, labels) == 100   # 4 of 5 is 0.8
    assert evaluate.consistency(evaluate_hits("x.", "x.", "x.", ".x", ".x"), all_seen, labels) == 0     # 3 of 5
    seen = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [0, 1]])
    assert evaluate.consistency(evaluate_hits("x.", "x.", "x.", "..", ".."), seen, labels) == 0         # 3 of 4 visible
    assert evaluate.consistency(evaluate_hits("x.", "x.", "x.", "x.", ".."), seen, labels) == 100       # 4 of 4 visible
    assert evaluate.consistency(evaluate_hits(*["..."] * 5), torch.tensor([[1, 1, 0]] * 5), labels) == 0


@pytest.mark.parametrize("n", [5, 10, 15, 35, 145, 1000])
def test_evaluate_exactly_four_fifths_is_consistent(n):
    hits = torch.zeros(n, 1, 1, dtype=torch.bool)
    hits[:n * 4 // 5] = True
    labels, seen = torch.zeros(n, dtype=torch.long), torch.ones(n, 1)
    assert evaluate.consistency(hits, seen, labels) == 100
    hits[0] = False
    assert evaluate.consistency(hits, seen, labels) == 0


def test_evaluate_classes_count_alike_and_missing_ones_not_at_all():
    labels = torch.tensor([7, 2, 7, 7])                                     # most classes without images, one with one
    hits, seen = evaluate_hits("x", "x", ".", "."), torch.ones(4, 1)
    assert evaluate.consistency(hits, seen, labels) == 50                   # class 2: 1 of 1; class 7: 1 of 3
    noisy = evaluate_hits(".", "x", ".", "x")
    assert evaluate.stability(hits, noisy, labels) == pytest.approx(100 * (1 + 1 / 3) / 2, abs=1e-12)
    two = torch.cat((hits, torch.zeros_like(hits)), 1)                      # a second prototype that never hits
    assert evaluate.consistency(two, seen, labels) == 25
    noisy = torch.cat((noisy, torch.zeros_like(hits)), 1)
    assert evaluate.stability(two, noisy, labels) == pytest.approx(250 / 3, abs=1e-12)


def test_evaluate_labels_may_be_a_list_or_an_array_but_images_there_must_be():
    hits, seen = evaluate_hits("x", "x", ".", "."), torch.ones(4, 1)
    for labels in ([7, 2, 7, 7], np.array([7, 2, 7, 7])):
        assert evaluate.consistency(hits, seen, labels) == 50
        assert evaluate.stability(hits, hits, labels) == 100
    for metric in (evaluate.consistency, evaluate.stability):
        with pytest.raises(ValueError, match="no images, expected one or more"):
            metric(hits[:0], hits[:0, 0] if metric is evaluate.consistency else hits[:0], torch.empty(0).long())


def test_evaluate_stability_wants_the_whole_set_unchanged():
    labels = torch.zeros(4, dtype=torch.long)
    clean, noisy = evaluate_hits("xx.", "x..", "...", ".x."), evaluate_hits("xx.", "xx.", "...", "..x")
    assert evaluate.stability(clean, noisy, labels) == 50                   # no visible part, third image: unchanged


def test_evaluate_metrics_equal_a_loop_over_images():
    """The definition written out, one image at a time."""
    generator = torch.Generator().manual_seed(3)
    n, K, M = 60, 3, 5
    labels, seen = torch.randint(9, (n,), generator=generator), torch.rand(n, M, generator=generator) < 0.6
    hits, noisy = ((torch.rand(n, K, M, generator=generator) < 0.85) & seen[:, None] for _ in range(2))
    consistent, stable = [], []
    for c in set(labels.tolist()):
        images = [i for i in range(n) if labels[i] == c]
        for k in range(K):
            shares = [sum(hits[i, k, m].item() for i in images if seen[i, m]) / sum(seen[i, m].item() for i in images)
                      for m in range(M) if any(seen[i, m] for i in images)]
            consistent.append(max(shares, default=0) >= 0.8)
            stable.append(np.mean([torch.equal(hits[i, k], noisy[i, k]) for i in images]))
    assert evaluate.consistency(hits, seen, labels) == pytest.approx(100 * np.mean(consistent), abs=1e-9)
    assert evaluate.stability(hits, noisy, labels) == pytest.approx(100 * np.mean(stable), abs=1e-9)


def test_evaluate_agreement_by_hand():
    assert evaluate.agreement(torch.tensor([[0, 3], [5, 0]])) == pytest.approx((100, 100))     # the names do not matter
    assert evaluate.agreement(torch.tensor([[2, 2], [2, 2]]))[0] == pytest.approx(0, abs=1e-9)
    # labels 0 0 1 1 against 0 0 1 2: I = ln 2, H = ln 2 and 1.5 ln 2; Rand (1 - 1/3) / (1.5 - 1/3)
    assert evaluate.agreement(torch.tensor([[2, 0, 0], [0, 1, 1]])) == pytest.approx((80, 100 * 4 / 7))
    assert evaluate.agreement(torch.tensor([[9]])) == (100, 100)            # one region and one part: they agree
    assert evaluate.agreement(torch.tensor([[1]])) == (None, None)


# ---- evaluate.py: a data set and a model small enough to reason about ------------------------------------------------
def evaluate_folder(root, spots, labels, parts=("mark", "tail"), size=(64, 64), boxes=None, classes=4, visible=None):
    """CUB's layout: black images with a white square around `spots` (x, y), the key point "mark"; "tail" beside it."""
    (root / "images").mkdir(parents=True)
    rows = {name: [] for name in data.LISTS}
    locations = []
    for i, ((x, y), label) in enumerate(zip(spots, labels), 1):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[max(0, y - 4):y + 4, max(0, x - 4):x + 4] = 255
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
        rows["images.txt"].append(f"{i} {i}.png")
        rows["image_class_labels.txt"].append(f"{i} {label + 1}")
        rows["train_test_split.txt"].append(f"{i} 0")
        rows["bounding_boxes.txt"].append("{} {} {} {} {}".format(i, *(boxes[i - 1] if boxes else (0, 0, *size))))
        seen = visible[i - 1] if visible else 1
        locations += [f"{i} 1 {x}.0 {y}.0 {seen}", f"{i} 2 {(x + 40) % 64}.0 {y}.0 {seen}"]
    rows["classes.txt"] = [f"{c + 1} {c + 1:03}.Bird_{c}" for c in range(classes)]
    for name, lines in rows.items():
        (root / name).write_text("\n".join(lines) + "\n")
    if parts:
        (root / "parts").mkdir()
        (root / "parts" / "parts.txt").write_text("".join(f"{m} {part}\n" for m, part in enumerate(parts, 1)))
        (root / "parts" / "part_locs.txt").write_text("\n".join(locations) + "\n")
    return root


class EvaluateFake(torch.nn.Module):
    """Concept 1 looks at the brightest patch, concept 2 at the upper left one, whatever the image; always class 0."""
    grid, prototypes, num_classes = (7, 7), (3, 4, 3), 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        bright = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), self.grid)                 # (B, 1, h, w)
        corner = torch.zeros_like(bright)
        corner[:, :, 0, 0] = 8
        attention = [torch.cat((4 * (bright + 1.9), *[corner] * (K - 2), torch.zeros_like(bright)), 1).softmax(1)
                     for K in self.prototypes]
        B, G = len(images), self.prototypes[-1] - 1
        votes = torch.arange(4.).flip(0).expand(B, G, 4) * torch.arange(1., G + 1)[:, None] * self.weight
        groups = [torch.full((B, K - 1, G), 1 / G) for K in self.prototypes[:-1]]
        return ivpt.Output(votes.mean(1), votes, attention, groups, [], torch.zeros(B, G + 1, 8))


class EvaluateConv(torch.nn.Module):
    """Five layers of fixed random maps: any mix-up of views, of layers or of x and y gives other numbers."""
    grid, prototypes, num_classes = (7, 7), (6, 5, 4, 3, 4), 8

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.conv = torch.nn.Conv2d(3, sum(self.prototypes) + 8, 8, 8)
        self.amp = []

    def forward(self, images):
        self.amp.append(torch.is_autocast_enabled("cpu"))
        *maps, logits = self.conv(images).float().mul(3).split((*self.prototypes, 8), 1)
        return ivpt.Output(logits.amax((2, 3)), None, [a.softmax(1) for a in maps], [], [], None)


EVALUATE_SPOTS = [(8, 8), (56, 8), (8, 56), (56, 56), (32, 32), (20, 44), (44, 20), (12, 40)]
EVALUATE_LABELS = [0, 0, 0, 0, 2, 2, 2, 2]


def test_evaluate_end_to_end_by_hand(tmp_path):
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS)
    metrics = evaluate.evaluate(EvaluateFake(), folder, 56, progress=False)
    assert metrics["accuracy"] == 50 and list(metrics["unavailable"]) == ["foreground_outside"]      # boxes: whole images
    follow_and_stay, one_more_stays, same_again = metrics["layers"]
    assert follow_and_stay["consistency"] == 50 and one_more_stays["consistency"] == pytest.approx(100 / 3)
    assert follow_and_stay["constant_location"] == 0 and follow_and_stay["over_constant"] == 50
    assert follow_and_stay["stability"] == 100                              # noise does not move the brightest patch
    assert follow_and_stay["peak_spreads"][0] > 40 and follow_and_stay["peak_spreads"][1] == 0
    assert follow_and_stay["parts_hit"][0][0] == ["mark", 100]
    assert follow_and_stay["wins"][0] >= 8 and follow_and_stay["winning"] == 100 and one_more_stays["winning"] < 100
    assert sum(follow_and_stay["wins"]) == 8 * 49
    assert metrics["headline"] == {"layer": 0, "consistency": 50, "stability": 100}            # the third from the end
    assert metrics["protocol"]["images"] == 8 and metrics["protocol"]["classes_with_images"] == 2
    json.dumps(metrics, allow_nan=False)


@torch.no_grad()
def test_evaluate_equals_the_protocol_written_out(tmp_path):
    """One image at a time: which view, which maps and which noise every number is made from."""
    rng, n, S, seed = np.random.default_rng(0), 12, 56, 3
    labels = [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 7]
    boxes = [(*rng.integers(0, 20, 2), *rng.integers(25, 44, 2)) for _ in range(n)]
    spots = [tuple(rng.integers(8, 60, 2).tolist()) for _ in range(n)]
    folder = evaluate_folder(tmp_path / "cub", spots, labels, size=(90, 64), boxes=boxes, classes=8,
                             visible=[1] * 10 + [0, 1])
    for file in folder.glob("images/*.png"):
        Image.fromarray(rng.integers(0, 256, (8, 11, 3), np.uint8)).resize((90, 64)).save(file)
    model, view, box = EvaluateConv(), *(data.Images(folder, "test", kind, S) for kind in ("test", "box"))
    metrics = evaluate.evaluate(model, folder, S, batch_size=5, seed=seed, progress=False)
    keypoints, right, layers = torch.stack([box[i][2] for i in range(n)]), 0, range(5)
    maps = [[[] for _ in layers] for _ in range(3)]
    counts, patches = ([torch.zeros(K, 2) for K in model.prototypes] for _ in range(2))
    for i in range(n):
        noise = np.random.default_rng((seed, i)).standard_normal((3, S, S), np.float32)
        image, label, points, _ = view[i]
        clean = box[i][0]
        outputs = [model(x[None]) for x in (image, clean, clean + torch.from_numpy(0.2 * noise).clamp(-0.25, 0.25))]
        right += int(outputs[0].logits.argmax()) == label
        x, y, w, h = boxes[i]
        for l in layers:
            for of_view, output in zip(maps, outputs):
                of_view[l].append(output.attention[l][0])
            region = outputs[0].attention[l][0].argmax(0)                                       # (h, w)
            for m, (u, v, seen) in enumerate(points.tolist()):
                if seen:
                    counts[l][region[int(v // 8), int(u // 8)], m] += 1
            for row in range(7):                        # 90 x 64 becomes 78 x 56, of which columns 11 to 67 are seen
                for column in range(7):
                    u, v = (8 * column + 4 + 11) * 90 / 78, (8 * row + 4) * 64 / 56
                    patches[l][region[row, column], int(x <= u <= x + w and y <= v <= y + h)] += 1
    visible, labels = keypoints[:, :, 2] > 0, torch.tensor(labels)
    for l, layer in enumerate(metrics["layers"]):
        clean, noisy = (torch.stack(of_view[l])[:, :-1] for of_view in maps[1:])
        random, draws = [], np.random.default_rng((seed, l))
        for _ in range(10):
            peaks = torch.from_numpy(draws.integers(0, 224, (n, clean.shape[1], 2)))
            random.append(evaluate.consistency(evaluate.hits_of(peaks, keypoints), visible, labels))
        hits, fixed = (evaluate.part_hits(a, keypoints) for a in (clean, clean.mean(0).expand_as(clean)))
        share = hits.sum(0) / visible.sum(0)
        inside, won = patches[l].sum(0), patches[l][:-1].sum(0)
        expected = dict(
            consistency=evaluate.consistency(hits, visible, labels), random_location=np.mean(random),
            stability=evaluate.stability(hits, evaluate.part_hits(noisy, keypoints), labels),
            constant_location=evaluate.consistency(fixed, visible, labels),
            foreground_outside=100 * won[0] / inside[0], foreground_inside=100 * won[1] / inside[1],
            foreground=100 * won.sum() / (49 * n), nmi=evaluate.agreement(counts[l])[0],
            ari=evaluate.agreement(counts[l])[1])
        assert {key: layer[key] for key in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
        assert layer["wins"] == patches[l].sum(1).int().tolist()
        for row, best in zip(share, layer["parts_hit"]):
            assert dict(best) == pytest.approx({part: 100 * float(x) for part, x in zip(("mark", "tail"), row) if x})
    assert metrics["accuracy"] == 100 * right / n and 0 < right < n
    for key in ("stability", "random_location", "consistency", "constant_location", "foreground_inside"):
        assert len({layer[key] for layer in metrics["layers"]}) > 1, key    # or the check above would see nothing
    headline = metrics["layers"][2]
    assert metrics["headline"] == dict(layer=2, consistency=headline["consistency"], stability=headline["stability"])
    pairs = [(layer["consistency"], layer["stability"]) for layer in metrics["layers"]]
    assert pairs.count(pairs[2]) == 1                                       # or any other layer would pass for it
    assert metrics["protocol"]["data"] == "cub" and not any(model.amp)


def test_evaluate_amp_reaches_the_model(tmp_path, monkeypatch):
    folder, model = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS), EvaluateConv()
    assert evaluate.evaluate(model, folder, 56, amp=True, progress=False)["protocol"]["amp"] is True
    assert model.amp == [True] * 3
    arguments = ["--ckpt", str(tmp_path / "last.pt"), "--image", str(bird_image(tmp_path / "bird.png"))]
    for trained, more, wanted in ((True, [], True), (False, [], False), (True, ["--no-amp"], False), (False, ["--amp"], True)):
        evaluate_checkpoint(monkeypatch, tmp_path, list("abcdefgh"), model, amp=trained)
        evaluate.main([*arguments, *more])                                  # one image as all of them
        assert model.amp.pop() is wanted


def test_evaluate_nothing_but_the_seed_changes_the_numbers(tmp_path):
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS)
    first, *others = (json.dumps(evaluate.evaluate(EvaluateFake(), folder, 56, progress=False, **options))
                      for options in ({}, {}, dict(batch_size=3), dict(batch_size=1, workers=2), dict(seed=1)))
    assert others[0] == others[1] == others[2] == first != others[3]


def test_evaluate_batches_and_workers_change_nothing_of_a_real_model(bird_root):
    """Its matrix products are rounded otherwise in batches of another size; peaks and counts stay, to the byte."""
    first, *others = (json.dumps(evaluate.evaluate(tiny_ivpt(), bird_root / "CUB_200_2011", 70, size, workers, progress=False))
                      for size, workers in ((32, 0), (3, 2), (1, 0)))
    assert all(other == first for other in others)
    layers = json.loads(first)["layers"]
    assert len({layer["stability"] for layer in layers}) > 2 and all(len(set(layer["wins"])) > 2 for layer in layers)


def test_evaluate_noise_is_clipped_and_belongs_to_the_image(tmp_path):
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS)
    views, again, other = (evaluate.Views(folder, "test", 56, seed, (7, 7)) for seed in (5, 5, 6))
    noise = views[3]["noisy"] - views[3]["clean"]
    assert torch.equal(noise, again[3]["noisy"] - again[3]["clean"])
    assert not torch.equal(noise, other[3]["noisy"] - other[3]["clean"])
    assert not torch.equal(noise, views[4]["noisy"] - views[4]["clean"])
    assert noise.abs().max() <= 0.25 + 1e-6                                 # 1e-6: of adding and subtracting in fp32
    assert (noise.abs() > 0.2499).float().mean() == pytest.approx(0.2113, abs=0.02)   # P(|z| > 1.25), sigma 0.0042


@pytest.mark.parametrize("size, box", [((64, 64), (10, 20, 30, 25)), ((100, 64), (30, 5, 40, 50)),
                                       ((64, 90), (-5, 30, 80, 200))])
def test_evaluate_patches_inside_the_box(tmp_path, size, box):
    """Against a picture of the box sent through the same resize and crop."""
    folder = evaluate_folder(tmp_path / "cub", [(8, 8)], [0], size=size, boxes=[box])
    x, y, w, h = box
    picture = np.zeros((size[1], size[0]), np.uint8)
    picture[max(0, y):y + h, max(0, x):x + w] = 255
    crop = np.asarray(data.centre_crop(data.resize_short(Image.fromarray(picture), 56), 56))
    drawn = crop[4::8, 4::8] / 2. + crop[3::8, 3::8] / 2.                   # the patch centres lie between these pixels
    inside = evaluate.Views(folder, "test", 56, 0, (7, 7))[0]["inside"].view(7, 7).numpy()
    clear = (drawn == 0) | (drawn == 255)                                   # the box's very edge is blurred by resizing
    assert clear.mean() > 0.6 and (inside == drawn / 255)[clear].all() and 0 < inside.sum() < 49


def test_evaluate_without_key_points(tmp_path, capsys):
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS, parts=())
    metrics = evaluate.evaluate(EvaluateFake(), folder, 56)
    assert "warning: the data has no key points" in capsys.readouterr().err
    assert metrics["headline"]["consistency"] is None and "parts.txt" in metrics["unavailable"]["consistency"]
    assert all(layer[key] is None for layer in metrics["layers"] for key in evaluate.PART_METRICS)
    assert metrics["layers"][0]["peak_spreads"][0] > 40 and metrics["accuracy"] == 50
    assert re.search(r"not available: consistency, stability, .*nmi, ari.*:\nthe data has no key points", evaluate.table(metrics))


@pytest.mark.parametrize("kind, missing, reason", [
    ("hidden", [*evaluate.PART_METRICS, "foreground_outside"], "no key point is visible in any test image"),
    ("of classes", ["nmi", "ari", "parts_hit", "foreground_outside"], "prototypes of its own"),
    ("one point", ["nmi", "ari", "foreground_outside"], "fewer than two key points"),
    ("tiny boxes", ["foreground_inside"], "no patch has its centre in a box"), ("boxes", [], None)])
def test_evaluate_every_metric_that_is_none_says_why(tmp_path, monkeypatch, kind, missing, reason):
    boxes = {"tiny boxes": [(0, 0, 1, 1)] * 8, "boxes": [(0, 0, 40, 40)] * 8}.get(kind)
    visible = {"hidden": [0] * 8, "one point": [1] + [0] * 7}.get(kind)
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS, boxes=boxes, visible=visible)
    if kind == "one point":
        locations = folder / "parts" / "part_locs.txt"
        locations.write_text(re.sub(r"(?m)^(\d+ 2 .*) 1$", r"\1 0", locations.read_text()))
    if kind == "of classes":
        monkeypatch.setattr(ivpt, "ProtoPNet", EvaluateFake)
        monkeypatch.setattr(EvaluateFake, "forward", lambda self, x, *_, forward=EvaluateFake.forward: forward(self, x))
    metrics = evaluate.evaluate(EvaluateFake(), folder, 56, progress=False)
    for layer in metrics["layers"]:
        assert [key for key, value in layer.items() if value is None] == sorted(missing, key=list(layer).index)
    assert set(metrics["unavailable"] or ()) == set(missing) and (metrics["unavailable"] is None) == (not missing)
    assert metrics["headline"]["stability"] == (None if kind == "hidden" else 100)
    table = evaluate.table(metrics)
    assert (reason in table if reason else "not available" not in table) and "* the headline" in table
    json.dumps(metrics, allow_nan=False)


def test_evaluate_parts_are_named_by_the_images_in_which_they_are_hit():
    """beak: seen once and hit once; crown: hit in 3 of 4; tail: in 3 of 3; belly: seen and never hit."""
    peaks, labels = torch.zeros(4, 2, 7, 7), torch.zeros(4, dtype=torch.long)
    peaks[:, 0, 1, 1] = 1.0
    near, far = (48.0, 48.0), (200.0, 200.0)
    points = torch.tensor([[(*near, i == 0), (*(near if i else far), 1), (*near, i > 0), (*far, 1)] for i in range(4)])
    tally = evaluate.Tally(2, (7, 7), 4)
    tally.add(peaks, peaks, peaks, torch.zeros(4, 49, dtype=torch.long), torch.full((4, 4), -1), labels)
    names = ["beak", "crown", "tail", "belly"]
    assert tally.summary(points, labels, names, 0)["parts_hit"] == [[["tail", 100], ["crown", 75], ["beak", 100]]]
    points[..., :2] = 224 - points[..., :2]                                 # nothing near the peak but the belly
    assert tally.summary(points, labels, names, 0)["parts_hit"] == [[["belly", 100], ["crown", 25]]]


@pytest.mark.parametrize("where, says", [(1, "the maps of layer 2"), (None, "logits")])
def test_evaluate_what_is_not_finite_is_refused(tmp_path, monkeypatch, capsys, where, says):
    folder = evaluate_folder(tmp_path / "data" / "CUB_200_2011", EVALUATE_SPOTS, EVALUATE_LABELS)
    evaluate_checkpoint(monkeypatch, tmp_path / "data", data.Images(folder, "test", "test", 56).classes)

    def spoilt(self, images, forward=EvaluateFake.forward):
        output = forward(self, images)
        (output.logits if where is None else output.attention[where]).view(-1)[-1] = math.nan
        return output

    monkeypatch.setattr(EvaluateFake, "forward", spoilt)
    for more in ([], ["--image", str(bird_image(tmp_path / "bird.png"))]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--ckpt", str(tmp_path / "last.pt"), *more])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: {says}: not finite") and error.count("\n") == 1
    assert not (tmp_path / "metrics.json").exists()


def test_evaluate_odd_annotations(tmp_path):
    """A box over the rim, a box of one pixel, an image and a part that nothing is visible of."""
    boxes = [(-10, -10, 200, 200), (56, 8, 1, 1), (60, 60, 0.4, 0.4)] + [(0, 0, 64, 64)] * 5
    folder = evaluate_folder(tmp_path / "cub", EVALUATE_SPOTS, EVALUATE_LABELS, boxes=boxes, visible=[0] * 4 + [1] * 4)
    locations = folder / "parts" / "part_locs.txt"
    lines = locations.read_text().splitlines()
    lines = [re.sub(r"1$", "0", line) if line.split()[1] == "2" else line for line in lines]
    locations.write_text("\n".join(lines) + "\n")
    layer = evaluate.evaluate(EvaluateFake(), folder, 56, progress=False)["layers"][0]
    assert layer["consistency"] == 25                                       # class 2's mark; class 0 shows no part
    assert layer["stability"] == 100 and layer["parts_hit"][0][0] == ["mark", 100]
    json.dumps(layer, allow_nan=False)


# ---- evaluate.py: the gallery and the command line -------------------------------------------------------------------
def evaluate_outputs(n, prototypes=(5, 4, 3), grid=(4, 4)):
    generator = torch.Generator().manual_seed(1)
    attention = [torch.randn(n, K, *grid, generator=generator).mul(3).softmax(1) for K in prototypes]
    groups = [torch.rand(n, K - 1, 2, generator=generator).softmax(2) for K in prototypes[:-1]]
    return ivpt.Output(torch.randn(n, 6, generator=generator), None, attention, groups, [], None)


def test_evaluate_gallery_keeps_the_nine_strongest_claims_of_all():
    fake, n = EvaluateFake(), 40
    fake.prototypes, fake.grid = (5, 4, 3), (4, 4)
    output, gallery = evaluate_outputs(n), evaluate.Gallery(fake, n, examples=6)
    for part in torch.arange(n).split(7):
        gallery.add(ivpt.Output(output.logits[part], None, [a[part] for a in output.attention],
                                [g[part] for g in output.groups], [], None), dict(index=part))
    for l, a in enumerate(output.attention):
        for k in range(a.shape[1] - 1):
            won = a.argmax(1) == k
            strength = (a[:, k] * won).sum((1, 2))
            best = strength.sort(descending=True, stable=True)[1][:9]
            assert gallery.best[l][1][k].tolist() == best.tolist() and torch.equal(gallery.best[l][2][k], won[best])
            assert gallery.best[l][0].shape == (a.shape[1] - 1, 9)          # and no more, however many images
            if l < 2:
                rows = output.groups[l][won.any(2).any(1), k].double().sum(0)
                assert torch.allclose(gallery.groups[l][k], rows)           # images where it wins nothing do not count
    assert sorted(gallery.examples) == np.linspace(0, n - 1, 6).astype(int).tolist()


def test_evaluate_pictures_show_what_they_say():
    grey, colour = np.full((112, 112, 3), 200, np.uint8), evaluate.COLOURS.astype(int)
    mask = np.zeros((4, 4), bool)
    mask[1, 1:3] = True                                                     # two patches of 28 pixels, side by side
    picture = np.asarray(evaluate.spotlight(grey, mask, 67)).astype(int)    # concept 67 wears colour 3
    assert picture[42, 42].tolist() == picture[42, 56].tolist() == [200] * 3            # seen, and no frame between
    assert picture[28, 42].tolist() == picture[42, 28].tolist() == picture[55, 83].tolist() == colour[3].tolist()
    assert picture[27, 42].tolist() == picture[42, 84].tolist() == [150] * 3            # the rest grey
    region = np.array([[0, 1], [2, 2]])
    picture = np.asarray(evaluate.paint(grey, region, 3)).astype(int)
    for (y, x), k in (((28, 28), 0), ((28, 84), 1)):
        assert np.abs(picture[y, x] - (0.45 * 200 + 0.55 * evaluate.COLOURS[k])).max() <= 1              # cut to bytes
    assert picture[84, 28].tolist() == picture[84, 84].tolist() == [238] * 3            # pale: the background
    red = evaluate.paint(np.full((112, 112, 3), (210, 0, 0), np.uint8), region, 3)      # its hue is left out: 70 is grey
    assert np.abs(np.asarray(red)[28, 28] - (0.45 * 70 + 0.55 * evaluate.COLOURS[0])).max() <= 1
    row = evaluate.strip(grey, [region, 2 - region], (3, 3), 112, [(30, 60, 1), (90, 60, 0)])
    assert row.size == (3 * 112 + 2 * 6, 112) and row.getpixel((115, 50)) == (255, 255, 255)
    assert row.getpixel((30, 60)) == (255, 212, 0) and row.getpixel((90, 60)) == (200, 200, 200)        # hidden: no dot
    assert row.getpixel((118 + 28, 28)) == tuple(picture[28, 28]) and row.getpixel((118 + 84, 84)) == (238, 238, 238)
    assert row.getpixel((236 + 28, 28)) == (238, 238, 238) and row.getpixel((236 + 84, 84)) == tuple(picture[28, 28])


def test_evaluate_tree_draws_the_mean_weights():
    fake = EvaluateFake()
    fake.prototypes = (4, 3)
    gallery = evaluate.Gallery(fake, 4)
    gallery.groups = [torch.tensor([[3.0, 1.0], [0.0, 0.0], [0.08, 1.92]])]   # sums; concept 2 never won
    svg = gallery.tree(0)
    assert re.findall(r"stroke-width:([\d.]+);opacity:([\d.]+)", svg) == [
        ("9.0", "0.75"), ("3.0", "0.45"), ("11.5", "0.88")]                 # 75 %, 25 %, 96 %; not the 4 %
    assert re.findall(r">(\d+)</text>", svg) == ["1", "75", "3", "96", "1", "2"]


def test_evaluate_bars_point_to_the_side_of_their_sign():
    top, votes, region = [("a", 60.0), ("b", 40.0)], [0.5, -1.0], np.zeros((2, 2), int)
    sheet = evaluate.draw_explanation(np.full((56, 56, 3), 9, np.uint8), top, votes, [region] * 3, (3,) * 3)
    lines = evaluate.words(top, votes, [region] * 3, (3,) * 3).count("\n") + 1
    for g, (near, far, other) in enumerate(((460, 570, 440), (440, 205, 460))):         # half of 250, and all of it
        y = 262 + 22 * (lines - 2 + g) + 7
        colour = tuple(evaluate.COLOURS[g].astype(int))
        assert sheet.getpixel((near, y)) == sheet.getpixel((far, y)) == colour != sheet.getpixel((other, y))
    assert sheet.getpixel((580, 262 + 22 * (lines - 2) + 7)) == (255, 255, 255)
    legend = [sheet.getpixel((27 + 45 * k, 277 + 22 * lines)) for k in range(2)]        # the numbers' colours
    assert legend == [tuple(evaluate.COLOURS[k].astype(int)) for k in range(2)]


@pytest.mark.parametrize("text, shown, hidden", [
    ('{"epoch": 0, "loss": 3.5}\n{"epoch": 1, "loss": 2.5}\n{"epoch": 2, "lo', ["2.5 to 3.5"], ["lo<"]),
    ('null\n7\n[1]\n\n{"epoch": 0, "loss": 4.5}', ["loss <b>4.5</b>", "M5.0,75.0h0"], []),
    ('{"loss": NaN, "a": 1}\n{"loss": 2.25, "a": Infinity}', ["2.25 to 2.25", "1 to 1"], ["nan", "inf"]),
    ('{"loss": 1}\n{"loss": 2, "late": 6, "note": "x"}\n{"late": 8}', ["1 to 2", "6 to 8", "M100.0,75.0"], ["note"]),
    ('{"a<b": 1}\n{"a": 1' + "0" * 400 + "}", ["a&lt;b"], ["<b>1e"]), ("", ["no curves"], ["svg"])])
def test_evaluate_curves_survive_any_log(tmp_path, text, shown, hidden):
    (tmp_path / "log.jsonl").write_text(text)
    page = evaluate.curves(tmp_path / "log.jsonl")
    assert all(word in page for word in shown) and not any(word in page for word in hidden)
    assert "no curves" in evaluate.curves(tmp_path / "none.jsonl")


def evaluate_checkpoint(monkeypatch, root, classes, model=None, amp=False):
    """Have the command line meet the fake model in place of a trained one."""
    options = dict.fromkeys(evaluate.METHOD) | dict(data="cub", data_root=str(root), image_size=56, amp=amp, seed=3, recipe="paper", bias="after",
                   fusion="mlp", tune="none")
    checkpoint = dict(options=options, classes=classes)
    monkeypatch.setattr(evaluate.ivpt, "load_checkpoint", lambda *_: (model or EvaluateFake(), checkpoint))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)          # the fake stays on the CPU


@pytest.mark.parametrize("parts", [("mark", "tail"), ()])
def test_evaluate_command_line_writes_metrics_and_gallery(tmp_path, monkeypatch, capsys, parts):
    folder = evaluate_folder(tmp_path / "data" / "CUB_200_2011", EVALUATE_SPOTS, EVALUATE_LABELS, parts=parts)
    run, pictures, bird = tmp_path / "run", tmp_path / "a" / "b", tmp_path / "bird.png"
    run.mkdir()
    (run / "log.jsonl").write_text('{"epoch": 0, "loss": 3.5, "note": ""}\n{"epoch": 1, "loss": 2.5}\n{"epoch": 2, "lo')
    evaluate_checkpoint(monkeypatch, tmp_path / "data", data.Images(folder, "test", "test", 56).classes)
    evaluate.main(["--ckpt", str(run / "last.pt"), "--visualize", str(pictures)])
    first = (run / "metrics.json").read_bytes()
    assert "gallery gathered and drawn in" in capsys.readouterr().out
    evaluate.main(["--ckpt", str(run / "last.pt"), "--batch-size", "3"])
    with monkeypatch.context() as patch:                                    # a full disk: the old numbers stand
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(SystemExit):
            evaluate.main(["--ckpt", str(run / "last.pt"), "--seed", "5"])
        assert "metrics.json: could not be written ([Errno 28] No space left" in capsys.readouterr().err
    assert (run / "metrics.json").read_bytes() == first and json.loads(first)["protocol"]["recipe"]["bias"] == "after"
    page = (pictures / "index.html").read_text()
    links = re.findall(r"(?:src|href)='([^'#]+)'", page)
    assert len(set(links)) > 20 and all((pictures / link).is_file() for link in links)          # relative, and there
    assert "http" not in page and "<script" not in page and "Never win a patch: 3." in page
    assert ("mark\u00a0100\u00a0%" in page) == bool(parts) and ("no key points" in page) == (not parts) and "2.5 to 3.5" in page
    assert ("title='From left to right: mark, tail'" in page) == ("title='From left to right: tail, mark'" in page) == bool(parts)
    assert "mark\u00a0100\u00a0%, tail" not in page and ">epochs 1 to 2</text>" in page           # tail: never hit by concept 1
    for words in ("✓ truly Bird 0", "✗ truly Bird 2", "73 x 73", "start afresh", "5 % or less", "<b>layer 3</b>",
                  "accuracy 50.0 % on 8 images", "not available" if not parts else "beats c."):
        assert words in page
    assert all(f"peak spread {layer['peak_spreads'][0]:.0f} px" in page for layer in json.loads(first)["layers"])
    evaluate.main(["--ckpt", str(run / "last.pt"), "--visualize", str(pictures), "--image", str(bird_image(bird))])
    assert Image.open(pictures / "bird_explained.png").size[0] > 800
    assert "1. 001.Bird_0" in capsys.readouterr().out
    other = bird_image(tmp_path / "bird.jpg")                               # the same name, another picture
    evaluate.main(["--ckpt", str(run / "last.pt"), "--image", str(bird), str(other)])
    assert sorted(f.name for f in tmp_path.glob("*explained*")) == ["bird_explained.png", "bird_explained_2.png"]


def test_evaluate_prints_what_the_terminal_cannot_show(tmp_path, monkeypatch):
    """As a script, on a terminal that knows ASCII only: a bird and a file with letters beyond it."""
    evaluate_checkpoint(monkeypatch, tmp_path, ["Zaunkönig", "b", "c", "d"])
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", "last.pt", "--image", str(bird_image(tmp_path / "vögel.png"))])
    monkeypatch.setattr(sys, "stdout", terminal)
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    terminal.flush()
    assert b"v?gel.png" in terminal.buffer.getvalue() and b"1. Zaunk?nig" in terminal.buffer.getvalue()


def bird_image(path):
    Image.fromarray(np.full((80, 120, 3), 90, np.uint8)).save(path)
    return path


# ---- evaluate.py: one image explained --------------------------------------------------------------------------------
def test_evaluate_votes_sum_to_the_margin():
    top, votes, regions = evaluate.explain(EvaluateFake(), torch.zeros(3, 56, 56), ["a", "b", "c", "d"])
    logits = EvaluateFake()(torch.zeros(1, 3, 56, 56)).logits[0]
    assert [name for name, _ in top] == ["a", "b", "c", "d"] and sum(p for _, p in top) == pytest.approx(100, abs=1e-3)
    assert votes == [0.5, 1.0] and sum(votes) == (logits[0] - logits[1]).item()
    assert [region.shape for region in regions] == [(7, 7)] * 3
    text = evaluate.words(top, votes, regions, (3, 4, 3))
    assert "concept 1 +0.50\nconcept 2 +1.00" in text and "in all +1.50" in text


def test_evaluate_reads_any_image(tmp_path):
    """Left half dark (51), right half bright (204): every kind of file must come out so."""
    grey = np.full((20, 40), 51, np.uint8)
    grey[:, 20:] = 204
    plain = Image.fromarray(grey)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(40) < 10, 0, 255).astype(np.uint8)[None].repeat(20, 0)))
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # stored turned; viewers turn it back
    files = {"l.png": plain, "la.png": plain.convert("LA"), "p.png": plain.convert("P"), "clear.png": clear,
             "rgb.png": plain.convert("RGB"), "cmyk.jpg": plain.convert("CMYK"),
             "one.png": plain.convert("1", dither=0), "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
             **{f"float{top}.tiff": Image.fromarray((grey / 255 * top).astype(np.float32)) for top in (1, 255, 65535)}}
    for name, image in files.items():
        image.save(tmp_path / name)
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for name in [*files, "turned.jpg"]:
        image = data.read_image(tmp_path / name, upright=True)
        dark, bright = np.asarray(image).astype(int)[10, [15, 30]]
        expected = (0, 255) if name == "one.png" else (51, 204)
        assert image.mode == "RGB" and image.size == (40, 20), name
        assert np.abs(dark - expected[0]).max() <= 4 and np.abs(bright - expected[1]).max() <= 4, name      # 4: JPEG
    assert (np.asarray(data.read_image(tmp_path / "clear.png"))[:, :10] == 255).all()     # transparent: white


def test_evaluate_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error
    folder = evaluate_folder(tmp_path / "data" / "CUB_200_2011", EVALUATE_SPOTS, EVALUATE_LABELS)
    (tmp_path / "file").write_text("not an image, not a folder, not a checkpoint")
    assert "no such file" in fails("--ckpt", tmp_path / "none.pt").lower()
    assert "file" in fails("--ckpt", tmp_path / "file")
    evaluate_checkpoint(monkeypatch, tmp_path / "data", ["other"])
    assert "found 4 classes, expected the 1" in fails("--ckpt", tmp_path / "last.pt")
    with monkeypatch.context() as patch:                                    # other data does not lie in this root
        roots = []
        patch.setattr(data, "find", lambda name, root: roots.append((name, root)) or folder)
        fails("--ckpt", tmp_path / "last.pt", "--data", "toy")
        assert roots == [("toy", None)]
    assert f"--visualize {tmp_path}/file" in fails("--ckpt", tmp_path / "last.pt", "--visualize", tmp_path / "file")
    (tmp_path / "pictures").write_text("a file")                            # met before any image is
    assert f"--visualize {tmp_path}/pictures: cannot be" in fails("--ckpt", tmp_path / "last.pt", "--visualize", tmp_path)
    for name in ("file", "none.jpg"):
        error = fails("--ckpt", tmp_path / "last.pt", "--image", tmp_path / name)
        assert f"{tmp_path}/{name}: not a readable image" in error
    with monkeypatch.context() as patch:                                    # beside the image nothing can be written
        patch.setattr(evaluate.tempfile, "TemporaryFile", lambda dir: open("/proc/none", "w"))
        error = fails("--ckpt", tmp_path / "last.pt", "--image", bird_image(tmp_path / "bird.png"))
        assert f"--visualize {tmp_path}: cannot be written" in error and "a folder of yours" in error
    evaluate_checkpoint(monkeypatch, tmp_path / "data", data.Images(folder, "test", "test", 56).classes)
    for option, value, least in (("--batch-size", 0, 1), ("--workers", -1, 0), ("--seed", -1, 0)):
        assert f"{option} {value}: expected {least} or more" in fails("--ckpt", tmp_path / "last.pt", option, value)
    (folder / "images" / "3.png").write_text("broken")
    for workers in (0, 2):                                                  # a worker wraps the message in a traceback
        assert "3.png: not a readable image" in fails("--ckpt", tmp_path / "last.pt", "--workers", workers)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("error, code, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 2, "out of memory"),
    (MemoryError(), 2, "lower --batch-size"), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "lower --batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2, "DataLoader worker (pid 7) is killed"),
    (OSError("Caught OSError in DataLoader worker process 0.\nTraceback:\nPermissionError: x.png"), 2, "error: x.png"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_evaluate_failures_of_the_machine_are_one_line(monkeypatch, capsys, error, code, words):
    def fail(_):
        raise error
    monkeypatch.setattr(evaluate, "run", fail)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--ckpt", "last.pt"])
    line = capsys.readouterr().err
    assert stop.value.code == code and line.startswith("error: ") and line.count("\n") == 1 and words in line
    error = RuntimeError("a bug of ours")                                   # keeps its traceback
    with pytest.raises(RuntimeError, match="a bug of ours"):
        evaluate.main(["--ckpt", "last.pt"])
