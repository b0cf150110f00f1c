"""The specification of kernels.py: the reference alone, then the kernels equal the reference."""
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import kernels

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton cannot be imported here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KERNELS_WANTED = [n for n in itertools.product((False, True), repeat=3) if any(n)]
KERNELS_SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes of shared memory a program may have

def kernels_problem(B, N, D, K, dtype=torch.float32, seed=0, device="cpu"):
    """Inputs x, prototypes, bias and the gradients of the three outputs."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    inputs = draw(B, N, D), 0.3 * draw(K, D), 0.3 * draw(K, N)
    grads = draw(B, K, N), draw(B, K, D), draw(B, K)
    return [t.to(device, dtype) for t in inputs], [t.to(device) for t in grads]

def kernels_autograd(function, inputs, grads, dtype, *args, **options):
    """Outputs of function and gradients of the inputs, computed in dtype."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs, *args, **options)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs)]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, grads)

def kernels_too_wrong(found, plain, exact):
    """Whether an error is more than twice PyTorch's in the same precision. Sixteen roundings of the
    largest value, at least 1, are granted where PyTorch happens to be exact."""
    error = (found.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().clamp(min=1)
    return bool(error > allowed + 16 * rounding)

# --- The reference alone --------------------------------------------------------------------------
@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("smoothing", (0.0, 1e-2))
def test_kernels_reference_follows_the_definition_patch_by_patch(after, smoothing):
    (x, q, bias), _ = kernels_problem(2, 6, 4, 3, torch.float64)
    attention, pooled, mass = kernels.prototype_attention_reference(
        x, q, bias, after, smoothing=smoothing)
    sums = torch.zeros(2, 3, 4, dtype=torch.float64)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for image, n in itertools.product(range(2), range(6)):
        logits = torch.stack([-(x[image, n] - q[k]).square().sum() for k in range(3)])
        a = logits.softmax(0) + bias[:, n] if after else (logits + bias[:, n]).softmax(0)
        a = a.clamp(min=0)
        if smoothing:
            a = (a + smoothing) / (a + smoothing).sum()
        torch.testing.assert_close(attention[image, :, n], a)
        k = int(a.argmax())
        sums[image, k] += a[k] * x[image, n]
        total[image, k] += a[k]
    torch.testing.assert_close(mass, total)
    torch.testing.assert_close(pooled, torch.where(total[..., None] > 0, sums / total[..., None], 0))

@pytest.mark.parametrize("after", (True, False))
@pytest.mark.parametrize("smoothing", (0.0, 1e-3))
def test_kernels_reference_and_op_pass_gradcheck(after, smoothing):
    inputs = [t.requires_grad_() for t in kernels_problem(1, 5, 4, 3, torch.float64)[0]]
    for function in (
            lambda *a: kernels.prototype_attention_reference(*a, after, smoothing=smoothing),
            lambda *a: kernels._op(*a, after, smoothing, False)):
        assert torch.autograd.gradcheck(function, inputs)

def test_kernels_detach_maps_leaves_only_the_averaged_features_their_gradient():
    inputs, grads = kernels_problem(2, 9, 8, 4, torch.float64)
    reference = kernels.prototype_attention_reference
    outputs, (dx, dq, db) = kernels_autograd(
        reference, inputs, grads, torch.float64, detach_maps=True)
    attention, _, mass = outputs
    region = attention * (attention == attention.amax(1, keepdim=True))  # (B, K, N)
    weight = torch.where(mass > 0, 1 / mass, 0)[..., None] * region
    torch.testing.assert_close(dx, weight.mT @ grads[1].double())
    _, full = kernels_autograd(reference, inputs, grads, torch.float64)
    torch.testing.assert_close((dq, db), full[1:])
    assert not torch.allclose(dx, full[0])

def test_kernels_empty_regions_pool_to_zero_and_ties_go_to_the_first():
    x = torch.randn(1, 5, 8)
    q = x[0, :1].repeat(3, 1)  # three equal prototypes: every patch is a tie
    attention, pooled, mass = kernels.prototype_attention(x, q, torch.zeros(3, 5))
    torch.testing.assert_close(attention, torch.full((1, 3, 5), 1 / 3))
    torch.testing.assert_close(mass, torch.tensor([[5 / 3, 0, 0]]))
    torch.testing.assert_close(pooled[0, 0], x[0].mean(0))
    assert (pooled[0, 1:] == 0).all()
    outputs = kernels.prototype_attention(x, q, torch.full((3, 5), -2.0))  # the clamp empties all
    assert all((o == 0).all() for o in outputs)

def test_kernels_bias_keeps_its_gradient_where_the_softmax_underflows():
    x, q = 50 * torch.eye(2)[None], 50 * torch.eye(2)
    bias = torch.zeros(2, 2, requires_grad=True)
    attention = kernels.prototype_attention(x, q, bias)[0]
    assert attention.min() == 0
    attention.sum().backward()
    assert (bias.grad == 1).all()

def test_kernels_low_precision_and_autocast_still_give_fp32_maps():
    (x, q, bias), _ = kernels_problem(2, 33, 64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernels.prototype_attention(x.bfloat16(), q, bias)
    expected = kernels.prototype_attention_reference(x.bfloat16().float(), q, bias)
    assert [o.dtype for o in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(f, e.to(f.dtype)) for f, e in zip(found, expected))

@pytest.mark.parametrize("q,bias", (((3, 9), (3, 5)), ((3, 8), (3, 1)), ((3, 8), (2, 5))))
def test_kernels_refuse_shapes_that_a_kernel_would_read_past(q, bias):
    with pytest.raises(ValueError, match="expected"):
        kernels.prototype_attention(torch.zeros(2, 5, 8), torch.zeros(q), torch.zeros(bias))

# --- The op on a CPU ------------------------------------------------------------------------------
@pytest.mark.parametrize("needed", KERNELS_WANTED)
def test_kernels_op_gives_the_gradients_asked_for_and_only_those(needed):
    inputs, grads = kernels_problem(2, 9, 12, 5, torch.float64)
    for after, smoothing, detach in itertools.product((True, False), (0.0, 1e-6), (True, False)):
        _, expected = kernels_autograd(kernels.prototype_attention_reference, inputs, grads,
                                       torch.float64, after, smoothing=smoothing, detach_maps=detach)
        asked = [t.clone().requires_grad_(n) for t, n in zip(inputs, needed)]
        outputs = kernels._op(*asked, after, smoothing, detach)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
        for tensor, gradient, wanted in zip(asked, expected, needed):
            assert (tensor.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(tensor.grad, gradient)

def test_kernels_op_passes_opcheck():
    inputs = [t.requires_grad_() for t in kernels_problem(2, 9, 12, 5)[0]]
    ops = torch.ops.ivpt
    checks = torch.library.opcheck(ops.prototype_attention.default, (*inputs, True, 1e-6, False))
    assert len(checks) >= 4 and set(checks.values()) == {"SUCCESS"}
    given = [t.detach() for t in (*inputs, *kernels._op(*inputs, True, 0.0, False))]
    checks = torch.library.opcheck(ops.prototype_attention_backward.default, (
        torch.ones_like(given[3]), None, None, *given, True, 0.0, False, [True, False, True]))
    assert set(checks.values()) == {"SUCCESS"}

@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_kernels_compile_fullgraph(backend):
    compiled = torch.compile(kernels.prototype_attention, fullgraph=True, backend=backend)
    inputs, grads = kernels_problem(2, 9, 12, 5)
    torch.testing.assert_close(*(kernels_autograd(f, inputs, grads, torch.float32)
                                 for f in (compiled, kernels.prototype_attention)))

def test_kernels_without_triton_the_reference_serves():
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels\n"
            "inputs = torch.randn(2, 7, 8), torch.randn(3, 8), torch.zeros(3, 7)\n"
            "found = kernels.prototype_attention(*inputs)\n"
            "expected = kernels.prototype_attention_reference(*inputs)\n"
            "assert kernels.triton is None and all(map(torch.equal, found, expected))")
    here = Path(kernels.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr

# --- The kernels in Triton's interpreter ----------------------------------------------------------
def kernels_cases():
    """Odd shapes; placement of the bias, smoothing and wanted gradients run along."""
    shapes = itertools.product((2, 5, 17, 33), (1, 7, 70, 196))
    for i, (K, N) in enumerate(shapes):
        yield dict(B=1 if N > 100 else 3, N=N, D=(32, 192, 100, 72)[(i + i // 4) % 4], K=K,
                   after=i % 2 == 0, smoothing=(0.0, 1e-6)[i // 2 % 2], detach=i % 3 == 2,
                   needed=KERNELS_WANTED[i % 7], seed=i)
    for i, kind in enumerate(("transposed", "empty", "huge", "ties")):
        yield dict(B=2, N=70, D=72, K=5, after=i % 2 == 0, smoothing=0.0, detach=False,
                   needed=(True, True, True), seed=i, kind=kind)

def kernels_special(kind, inputs, grads):
    x, q, bias = inputs
    if kind == "transposed":
        return [t.mT.contiguous().mT for t in inputs], [t.mT.contiguous().mT for t in grads]
    if kind == "empty":
        bias = bias - torch.tensor([0, 5, 5, 0, 5.0])[:, None]
    if kind == "huge":
        x, q = 300 * x, 300 * q
    if kind == "ties":
        q, bias = q[:1].repeat(5, 1), 0 * bias
    return (x, q, bias), grads

def kernels_run(B, N, D, K, after, smoothing, detach, needed, seed, kind="plain"):
    """What is wrong with this case, a list."""
    inputs, grads = kernels_special(kind, *kernels_problem(B, N, D, K, seed=seed))

    def run(forward, backward):
        outputs = forward(*inputs, after, smoothing)
        options = (after, smoothing, detach, list(needed))
        missing = {2: 0, 3: 1, 5: 2}.get(seed)  # one output is not used
        given = [None if i == missing else g for i, g in enumerate(grads)]
        return *outputs, *backward(*given, *inputs, *outputs, *options)
    found = run(kernels.launch_forward, kernels.launch_backward)
    again = run(kernels.launch_forward, kernels.launch_backward)
    wrong = [] if all(map(torch.equal, found, again)) else ["repeat"]

    def reference(*args):
        return kernels.prototype_attention_reference(*args[:4], smoothing=args[4])
    plain = run(reference, kernels.backward_reference)
    inputs = [t.double() for t in inputs]
    grads = [t.double() for t in grads]
    exact = run(reference, kernels.backward_reference)
    for i, triple in enumerate(zip(found, plain, exact)):
        if kind == "ties" and i > 0:  # the winner is a matter of rounding: masses agree in sum only
            triple = [t.sum(1) for t in triple] if i == 2 else []
        if triple and triple[2].numel() and kernels_too_wrong(*triple):
            wrong.append(i)
    unwanted = [g.numel() for g, wanted in zip(found[3:], needed) if not wanted]
    return wrong + (["unwanted"] if sum(unwanted) else [])

@needs_triton
def test_kernels_interpreted_are_as_exact_as_pytorch_and_repeat():
    """A subprocess, since TRITON_INTERPRET must be set before triton is imported."""
    here = Path(__file__)
    code = (f"import json, {here.stem} as t\n"
            "print(json.dumps([[case, t.kernels_run(**case)] for case in t.kernels_cases()]))")
    environment = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=environment, cwd=here.parent)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 20 and not [r for r in results if r[1]]

# --- The kernels compiled for real chips ----------------------------------------------------------
def kernels_compile(target):
    """Forward, and backward with and without what a prompted layer leaves out: facts of each."""
    chip, dtype, N, D, K = target
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    x = torch.empty(32, N, D, dtype=dtype, device="meta")
    q, bias = x[0, :K], torch.empty(K, N, device="meta")
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    facts = []
    for kernel, sizes, left_out in (
            (kernels._forward_kernel, kernels.LARGE, ()),
            (kernels._backward_kernel, kernels.SMALL, ()),
            (kernels._backward_kernel, kernels.SMALL, ("dp_ptr", "dx_ptr"))):
        constants = kernels._prepare(x, q, bias, sizes)[2]
        warps = constants.pop("num_warps")
        constants |= dict(AFTER=True, SMOOTHING=0.0, DETACH=False, **dict.fromkeys(left_out))
        constants = {n: constants[n] for n in kernel.arg_names if n in constants}
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
            if name in ("x_ptr", "q_ptr", "dp_ptr", "dx_ptr"):
                signature[name] = names[dtype]
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        done = kernels.triton.compile(source, target=GPUTarget("cuda", chip, 32),
                                      options=dict(num_warps=warps))
        ptx = done.asm["ptx"]
        cores = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)
        facts.append(dict(
            shared=done.metadata.shared, tensor_cores=len(cores),
            atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)), **kernels_usage(done.asm["cubin"])))
    return target, facts

def kernels_usage(cubin):
    """Registers and bytes of stack, where this Triton brings cuobjdump."""
    tool = Path(kernels.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

@needs_triton
def test_kernels_compile_for_every_chip():
    """Within its shared memory, without spills, 16 bit on tensor cores, nothing by atomics."""
    targets = [(chip, torch.bfloat16, 1369, 768, 17) for chip in KERNELS_SHARED]
    targets += [(90, torch.float32, 1369, 1024, 17), (100, torch.float16, 196, 192, 5)]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        results = list(pool.map(kernels_compile, targets))
    for target, facts in results:
        chip, dtype, *_ = target
        for fact in facts:
            assert 0 < fact["shared"] <= KERNELS_SHARED[chip], (target, fact)
            assert fact["atomics"] == 0, (target, fact)
            assert dtype == torch.float32 or fact["tensor_cores"] > 0, (target, fact)
            assert fact.get("LOCAL", 0) == 0, (target, fact)
            spare = 0 if chip == 90 and dtype != torch.float32 else 48  # parked outside the loops
            assert fact.get("STACK", 0) <= spare, (target, fact)

class KernelsNoDriver:
    """Stands in for the GPU that torch.compile asks about when it reads what a kernel writes."""
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the real thing")
def test_kernels_launches_can_be_traced_and_torch_knows_what_they_write(monkeypatch):
    driver = kernels.triton.runtime.driver
    monkeypatch.setattr(driver, "_active", KernelsNoDriver(), raising=False)
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(4, 50, 128, device="cuda", dtype=torch.bfloat16)
        inputs = x, torch.empty(17, 128, device="cuda"), torch.empty(17, 50, device="cuda")

    def prompted(x, q, bias):  # neither dP nor dx, as in a prompted layer
        outputs = torch.ops.ivpt.prototype_attention(x, q, bias, True, 0.0, False)
        return torch.ops.ivpt.prototype_attention_backward(
            outputs[0], None, None, x, q, bias, *outputs, True, 0.0, False, [False, True, True])
    graph = make_fx(dispatch_functionalize(prompted), tracing_mode="symbolic")(*inputs).graph
    written = [set(node.kwargs["tensors_to_clone"]) for node in graph.nodes
               if "triton_kernel_wrapper" in str(node.target)]
    assert written == [{"attention_ptr", "part_ptr", "part_mass_ptr"}, {"part_ptr", "db_ptr"}]

# --- The kernels on a GPU -------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("shape", ((32, 1369, 768, 17), (8, 1369, 1024, 17), (16, 196, 192, 5),
                                   (3, 257, 100, 33), (2, 196, 1536, 64)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_kernels_gpu_is_as_exact_as_pytorch_and_repeats(shape, dtype):
    (x, q, bias), grads = kernels_problem(*shape, device="cuda")
    inputs = x.to(dtype), q.to(dtype), bias
    exact = kernels_autograd(kernels.prototype_attention_reference, inputs, grads, torch.float64)

    def run(function):
        own = [t.clone().requires_grad_() for t in inputs]
        outputs = function(*own)
        given = [g.to(o.dtype) for g, o in zip(grads, outputs)]
        return *outputs, *torch.autograd.grad(outputs, own, given)
    found, again, rival = map(run, (kernels.prototype_attention,) * 2 + (kernels.two_reads,))
    assert all(map(torch.equal, found, again))
    for f, r, e in zip(found, rival, itertools.chain(*exact)):
        rounding = torch.finfo(dtype).eps * e.norm()
        assert (f.double() - e).norm() <= 2 * (r.double() - e).norm() + rounding

@needs_gpu
def test_kernels_gpu_compiles_and_follows_autocast():
    inputs, grads = kernels_problem(2, 196, 192, 17, device="cuda")
    compiled = torch.compile(kernels.prototype_attention, fullgraph=True)
    torch.testing.assert_close(*(kernels_autograd(f, inputs, grads, torch.float32)
                                 for f in (compiled, kernels.prototype_attention)))
    with torch.autocast("cuda", torch.bfloat16):
        found = kernels.prototype_attention(*inputs)
    expected = kernels.prototype_attention(inputs[0].bfloat16(), *inputs[1:])
    assert all(map(torch.equal, found, expected))

@needs_gpu
def test_kernels_gpu_peak_memory_is_outputs_and_partial_sums():
    inputs = kernels_problem(32, 1369, 768, 17, torch.bfloat16, device="cuda")[0]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kernels.prototype_attention(*inputs)
    assert torch.cuda.max_memory_allocated() - before <= 0.5 * inputs[0].nbytes
