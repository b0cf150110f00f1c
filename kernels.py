"""Prototype attention: patches and prototypes in, attention maps and region features out.

The heart of IVPT (Interpretable Visual Prompt Tuning, ICLR 2026, arXiv 2503.06084): concept region
discovery, its spatial bias and intra-region feature aggregation.

    python explore/bench.py --kernel  # the benchmark
    python -m pytest -k kernels       # the specification, errors included; needs no GPU

THE MATHS. x (B, N, D) patches, q (K, D) prototypes, b (K, N) spatial bias, eps the smoothing.
    l_k(n) = 2 x_n.q_k - |q_k|^2                       -|x_n - q_k|^2 less what a softmax cannot see
    s      = softmax_k(l)                              or softmax_k(l + b), bias inside, as released
    v      = s + b                                     the paper's bias; with the bias inside v = s
    u      = max(v, 0)
    a      = (u + eps) / sum_k (u + eps)               smoothing; a = u, whatever its sum, without
    r_k(n) = a_k(n) where k is the first argmax of a(n), else 0      a patch votes for one concept
    m_k    = sum_n r_k(n)                              mass of the region
    p_k    = sum_n r_k(n) x_n / m_k                    pooled feature, zero for an empty region

THE BYTES. At B 32, N 1369, D 768, K 17 in bf16, x is 67 MB and the fp32 maps are 3 MB.
The product r_k(n) x_n as a tensor (B, D, K, N) would be 2.3 GB in fp32.
Two matmuls avoid it, but read x twice from memory: once for l, once for p.
Here a program takes 128 patches of an image, 197 kB, and reads them twice in a row: the second time
from the L2 cache. The price is that every program writes (K, D) sums of its own, 18 MB in all.
So the forward reads 67 MB, writes 21 MB, and reads 18 MB again, most of it from the cache.
"""
from __future__ import annotations  # tl.constexpr below exists only with Triton

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op, wrap_triton

try:
    import triton
    import triton.language as tl
    jit = triton.jit
    if triton.knobs.runtime.interpret:  # TRITON_INTERPRET=1: wrap_triton refuses such kernels
        wrap_triton = lambda kernel: kernel
except ImportError:  # no Triton for macOS and Windows: the reference serves
    triton = None
    jit = lambda kernel: kernel


# --- 1. The reference: plain PyTorch, the CPU path and the oracle of the tests --------------------
def _attend(x, q, b, bias_after_softmax, smoothing):
    """The maths up to a: s, v, a, and bool: whether k won patch n; each (B, N, K)."""
    logits = F.linear(x, 2 * q, -q.square().sum(1))
    s = (logits if bias_after_softmax else logits + b.T).softmax(-1)
    v = s + b.T if bias_after_softmax else s
    a = torch.where(v < 0, 0, v)  # clamp would stop the gradient of an exact 0
    if smoothing > 0:
        a = a + smoothing
        a = a / a.sum(-1, keepdim=True)
    # The first of the largest. torch.compile's argmax can be wrong here (pytorch issue 178964).
    largest = a == a.amax(-1, keepdim=True)
    won = largest & (largest.cumsum(-1) == 1)
    return s, v, a, won

def prototype_attention_reference(x, prototypes, bias, bias_after_softmax=True, *,
                                  smoothing=0.0, detach_maps=False):
    """x (B, N, D), prototypes (K, D), bias (K, N) -> attention (B, K, N) fp32, pooled (B, K, D) in
    the dtype of x, mass (B, K) fp32: the maths above, smoothing is eps. fp64 stays fp64.

    detach_maps: the gradient reaches x only through the averaged features, not through the maps
    (the head of IVPT). The argmax has no gradient.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # logits in the hundreds enter an exponent
        patches = x.to(dtype)
        seen = patches.detach() if detach_maps else patches
        q, b = prototypes.to(dtype), bias.to(dtype)
        _, _, a, won = _attend(seen, q, b, bias_after_softmax, smoothing)
        region = torch.where(won, a, 0)  # r (B, N, K)
        mass = region.sum(1)  # (B, K)
        empty = mass[..., None] == 0
        mean = region.mT @ patches / torch.where(empty, 1, mass[..., None])
        pooled = torch.where(empty, 0, mean)  # an empty region has no gradient
    return a.mT.contiguous(), pooled.to(x.dtype), mass

# --- 2. The forward in Triton ---------------------------------------------------------------------
# A program owns BLOCK_N patches of one image and walks their columns twice, BLOCK_D at a time:
#   first  products = 2 q x^T, (BLOCK_K, BLOCK_D) @ (BLOCK_D, BLOCK_N); softmax, argmax, region r
#   then   sums     = r x,     (BLOCK_K, BLOCK_N) @ (BLOCK_N, BLOCK_D), one chunk of columns each
# The second walk goes backwards: what was read last is the likeliest to be in the cache.
# A second kernel adds the blocks of an image, always in the same order. Atomic additions would save
# that step, but their order, and so the last bits of a result, changes from run to run.
# K is padded to BLOCK_K by prototypes that are infinitely far away: logit -inf, so s is 0. They
# come last and the first of equals wins, so they win no patch. Patches beyond N are not counted.
@jit
def _load(ptr, rows, columns, num_rows, num_columns):
    """A tile of a contiguous matrix of fewer than 2^31 entries, zero outside."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None] * num_columns + columns[None, :]
    return tl.load(ptr + offsets, inside, other=0.0)

@jit
def _store(ptr, tile, rows, columns, num_rows, num_columns):
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None] * num_columns + columns[None, :]
    tl.store(ptr + offsets, tile, inside)

@jit
def _shares(products, norms_ptr, bias, k, K, BIAS_AFTER_SOFTMAX):
    """s and v, (BLOCK_K, BLOCK_N), from products = 2 q x^T and |q_k|^2."""
    norms = tl.load(norms_ptr + k, k < K, other=float("inf"))
    logits = products - norms[:, None]
    if not BIAS_AFTER_SOFTMAX:
        logits += bias
    exponential = tl.exp(logits - tl.max(logits, 0, keep_dims=True))
    s = exponential / tl.sum(exponential, 0, keep_dims=True)
    v = s + bias if BIAS_AFTER_SOFTMAX else s
    return s, v

@jit
def _winners(attention, k, n, N):
    """(BLOCK_K, BLOCK_N) bool: the first of the largest, for patches that exist."""
    winner = tl.argmax(attention, 0, keep_dims=True)
    return (k[:, None] == winner) & (n[None, :] < N)

@jit
def _forward_kernel(
        x_ptr, q_ptr, norms_ptr, bias_ptr,  # (B, N, D), (K, D) like x, |q_k|^2 (K,) fp32, (K, N)
        attention_ptr, part_ptr, part_mass_ptr,  # out (B, K, N), (B, blocks, K, D), (B, blocks, K)
        N, K, BIAS_AFTER_SOFTMAX: tl.constexpr, SMOOTHING: tl.constexpr, D: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)  # a batch can pass 2^31 elements
    block = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += image * N * D
    attention_ptr += image * K * N
    part = image * tl.num_programs(1) + block

    products = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = _load(q_ptr, k, d, K, D)
        x = _load(x_ptr, n, d, N, D)
        # "ieee": fp32 is not rounded to TF32. The sum of a chunk is added to the others as a whole:
        # a dot that goes on adding to products is less exact, one long sum over D.
        products += 2 * tl.dot(q, tl.trans(x), input_precision="ieee")
    bias = _load(bias_ptr, k, n, K, N).to(tl.float32)
    _, v = _shares(products, norms_ptr, bias, k, K, BIAS_AFTER_SOFTMAX)
    attention = tl.maximum(v, 0.0)
    if SMOOTHING > 0:
        total = tl.sum(attention, 0, keep_dims=True) + K * SMOOTHING
        attention = (attention + SMOOTHING) / total
    _store(attention_ptr, attention, k, n, K, N)

    region = tl.where(_winners(attention, k, n, N), attention, 0.0)
    mass = tl.sum(region, 1)
    tl.store(part_mass_ptr + part * K + k, mass, k < K)
    region = region.to(x_ptr.dtype.element_ty)
    chunks = tl.cdiv(D, BLOCK_D)
    for chunk in tl.range(chunks):
        d = (chunks - 1 - chunk) * BLOCK_D + tl.arange(0, BLOCK_D)
        x = _load(x_ptr, n, d, N, D)
        sums = tl.dot(region, x, input_precision="ieee")
        _store(part_ptr + part * K * D, sums, k, d, K, D)

@jit
def _pool_kernel(
        part_ptr, part_mass_ptr,  # (B, blocks, K, D), (B, blocks, K)
        pooled_ptr, mass_ptr,  # out (B, K, D) like x, (B, K)
        blocks, K, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds what the blocks of an image found of a region, and divides by its mass."""
    region = tl.program_id(0).to(tl.int64)  # image * K + k
    block = tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (region // K * blocks + block) * K + region % K
    part_mass = tl.load(part_mass_ptr + row, block < blocks, other=0.0)
    mass = tl.sum(part_mass, 0)
    inside = (block < blocks)[:, None] & (d < D)[None, :]
    offsets = row[:, None] * D + d[None, :]
    part = tl.load(part_ptr + offsets, inside, other=0.0)
    pooled = tl.sum(part, 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(pooled_ptr + region * D + d, pooled.to(pooled_ptr.dtype.element_ty), d < D)
    tl.store(mass_ptr + region, mass)

# --- 3. The backward, derived ---------------------------------------------------------------------
# Given dA (B, K, N), dP (B, K, D), dm (B, K), the gradients of attention, pooled and mass.
#   p_k = sum_n r_k(n) x_n / m_k and m_k = sum_n r_k(n), so r_k(n) acts on both:
#       dr_k(n) = dm_k + dP_k.(x_n - p_k) / m_k           an empty region's dP counts as 0
#   r_k is a_k on the patches that k won; the choice itself has no gradient:
#       da_k(n) = dA_k(n) + [k won n] dr_k(n)
#   smoothing divides by Z = sum_k (u_k + eps); without it du = da:
#       du_k = (da_k - sum_j da_j a_j) / Z
#   the clamp lets pass what was not negative:
#       h_k = [v_k >= 0] du_k
#   the softmax's Jacobian is s_k (delta_kj - s_j):
#       dl_k = s_k (h_k - sum_j h_j s_j)
#   all images share the prototypes and the bias, so with the sum over images too
#       dq_k = 2 sum_n dl_k(n) (x_n - q_k)
#       db_k(n) = h_k(n)                                  dl_k(n) with the bias inside
#   x_n is seen by the logits and, where w won n, by the average:
#       dx_n = 2 sum_k dl_k(n) q_k + a_w(n) / m_w dP_w    detach_maps leaves the first out
# From x.q to s is a handful of operations per map entry. So s is not stored but computed again,
# from the x that dq needs anyway; only the forward's three outputs are kept.
def backward_reference(dA, dP, dm, x, prototypes, bias, attention, pooled, mass,
                       bias_after_softmax, smoothing, detach_maps, needed):
    """The derivation line by line, maps (B, N, K) -> dx (B, N, D), dq (K, D), db (K, N).
    dA, dP, dm may be None; needed, three bools: the gradients not needed come back empty."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dA = torch.zeros_like(attention) if dA is None else dA
    dP = torch.zeros_like(pooled) if dP is None else dP
    dm = torch.zeros_like(mass) if dm is None else dm
    with torch.autocast(x.device.type, enabled=False):
        e, q, dP = x.to(dtype), prototypes.to(dtype), dP.to(dtype)
        a = attention.mT
        s, v, _, won = _attend(e, q, bias.to(dtype), bias_after_softmax, smoothing)
        inverse = torch.where(mass > 0, 1 / mass, 0)[:, None]  # (B, 1, K)
        dP_p = (dP * pooled).sum(-1)[:, None]
        dr = dm[:, None] + (e @ dP.mT - dP_p) * inverse
        da = dA.mT + won * dr
        du = da
        if smoothing > 0:
            Z = (v.clamp(min=0) + smoothing).sum(-1, keepdim=True)
            du = (da - (da * a).sum(-1, keepdim=True)) / Z
        h = torch.where(v < 0, 0, du)
        dl = s * (h - (h * s).sum(-1, keepdim=True))
        products = dl.flatten(0, 1).T @ e.flatten(0, 1)
        sums = dl.sum((0, 1))[:, None]  # (K, 1)
        dq = 2 * (products - q * sums)
        db = (h if bias_after_softmax else dl).sum(0).T
        dx = (won * a * inverse) @ dP
        if not detach_maps:
            dx = dx + 2 * dl @ q
    dx = dx.to(x.dtype)
    dq = dq.to(prototypes.dtype)
    db = db.to(bias.dtype).contiguous()
    gradients = dx, dq, db
    return tuple(g if want else g.new_empty(0) for g, want in zip(gradients, needed))

# --- 4. The backward in Triton --------------------------------------------------------------------
# The forward's shape again: one walk for x.q and x.dP, a few maps, then one walk for dq and dx.
# What all patches of an image share comes ready: 1 / m_k, and c_k = dm_k - dP_k.p_k / m_k, so that
# dr_k(n) = x_n.dP_k / m_k + c_k. A pointer that is None leaves its code out: an unneeded
# gradient, or one that is zero. In a prompted layer x and pooled are detached, so both occur.
@jit
def _backward_kernel(
        x_ptr, q_ptr, norms_ptr, bias_ptr, attention_ptr,  # as in the forward
        dA_ptr, dP_ptr, inverse_ptr, c_ptr,  # dA (B, K, N), dP (B, K, D) like x, 1 / m and c (B, K)
        dx_ptr, part_ptr, db_ptr,  # out (B, N, D) like x, dq (B, blocks, K, D), db (B, K, N)
        N, K, BIAS_AFTER_SOFTMAX: tl.constexpr, SMOOTHING: tl.constexpr, DETACH: tl.constexpr,
        D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += image * N * D
    dtype = x_ptr.dtype.element_ty
    part = image * tl.num_programs(1) + block
    if dP_ptr is not None:
        dP_ptr += image * K * D

    products = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    dP_x = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.trans(_load(x_ptr, n, d, N, D))
        q = _load(q_ptr, k, d, K, D)
        products += 2 * tl.dot(q, x, input_precision="ieee")
        if dP_ptr is not None:
            dP = _load(dP_ptr, k, d, K, D)
            dP_x = tl.dot(dP, x, dP_x, input_precision="ieee")  # meets no exponent: one long sum

    inverse = tl.load(inverse_ptr + image * K + k, k < K, other=0.0)
    inverse = inverse[:, None]
    c = tl.load(c_ptr + image * K + k, k < K, other=0.0)
    c = c[:, None]
    a = _load(attention_ptr + image * K * N, k, n, K, N)
    won = _winners(a, k, n, N)
    weight = tl.where(won, a * inverse, 0.0).to(dtype)  # a_w / m_w, at most 1: safe in fp16
    da = tl.where(won, dP_x * inverse + c, 0.0)  # dr
    if dA_ptr is not None:
        da += _load(dA_ptr + image * K * N, k, n, K, N)

    bias = _load(bias_ptr, k, n, K, N).to(tl.float32)
    s, v = _shares(products, norms_ptr, bias, k, K, BIAS_AFTER_SOFTMAX)
    du = da
    if SMOOTHING > 0:
        Z = tl.sum(tl.maximum(v, 0.0), 0, keep_dims=True) + K * SMOOTHING
        du = (da - tl.sum(da * a, 0, keep_dims=True)) / Z
    h = tl.where(v < 0, 0.0, du)
    dl = s * (h - tl.sum(h * s, 0, keep_dims=True))
    if db_ptr is not None:
        _store(db_ptr + image * K * N, h if BIAS_AFTER_SOFTMAX else dl, k, n, K, N)

    dl2 = (2 * dl).to(dtype)
    sum_dl2 = tl.sum(dl2.to(tl.float32), 1)[:, None]  # of what the dot for dq sums, rounded alike
    chunks = tl.cdiv(D, BLOCK_D)
    for chunk in tl.range(chunks):
        d = (chunks - 1 - chunk) * BLOCK_D + tl.arange(0, BLOCK_D)
        q = _load(q_ptr, k, d, K, D)
        if part_ptr is not None:
            x = _load(x_ptr, n, d, N, D)
            dq = tl.dot(dl2, x, input_precision="ieee") - sum_dl2 * q
            _store(part_ptr + part * K * D, dq, k, d, K, D)
        if dx_ptr is not None:
            dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            if not DETACH:
                dx = tl.dot(tl.trans(dl2), q, dx, input_precision="ieee")
            if dP_ptr is not None:
                dP = _load(dP_ptr, k, d, K, D)
                dx = tl.dot(tl.trans(weight), dP, dx, input_precision="ieee")
            _store(dx_ptr + image * N * D, dx.to(dtype), n, d, N, D)

# --- 5. The launch --------------------------------------------------------------------------------
# The sizes were timed on an H200 (docs/results.md). They are not tuned at run time: another BLOCK_N
# is another order of addition, so a timing could change bits.
FORWARD = dict(BLOCK_N=128, BLOCK_D=128, num_warps=8)
BACKWARD = dict(BLOCK_N=128, BLOCK_D=64, num_warps=8)
SMALL = dict(BLOCK_N=64, BLOCK_D=32, num_warps=8)  # for fp32, many prototypes, few patches

def _prepare(x, prototypes, bias, sizes):
    """The grid, the contiguous inputs and the constants of a launch."""
    (B, N, D), K = x.shape, len(prototypes)
    q = prototypes.to(x.dtype).contiguous()
    norms = q.float().square().sum(1)
    inputs = x.contiguous(), q, norms, bias.contiguous()
    BLOCK_K = max(16, triton.next_power_of_2(K))  # a dot takes 16 rows or more
    if x.dtype == torch.float32 or BLOCK_K > 32 or B * N < 2 ** 15:
        sizes = SMALL  # also for few patches: every multiprocessor should have a program
    grid = B, triton.cdiv(N, sizes["BLOCK_N"])
    return grid, inputs, dict(sizes, D=D, BLOCK_K=BLOCK_K)

def launch_forward(x, prototypes, bias, bias_after_softmax, smoothing):
    """The reference's results, by the kernel. Inputs may have any strides."""
    (B, N, D), K = x.shape, len(prototypes)
    grid, inputs, constants = _prepare(x, prototypes, bias, FORWARD)
    blocks = grid[1]
    attention = x.new_empty((B, K, N), dtype=torch.float32)
    part = x.new_empty((B, blocks, K, D), dtype=torch.float32)
    part_mass = x.new_empty((B, blocks, K), dtype=torch.float32)
    wrap_triton(_forward_kernel)[grid](
        *inputs, attention, part, part_mass, N, K,
        BIAS_AFTER_SOFTMAX=bias_after_softmax, SMOOTHING=smoothing, **constants)
    pooled = x.new_empty((B, K, D))
    mass = x.new_empty((B, K), dtype=torch.float32)
    wrap_triton(_pool_kernel)[B * K, triton.cdiv(D, 256)](
        part, part_mass, pooled, mass, blocks, K, D,
        ROWS=triton.next_power_of_2(blocks), COLUMNS=256)
    return attention, pooled, mass

def launch_backward(dA, dP, dm, x, prototypes, bias, attention, pooled, mass,
                    bias_after_softmax, smoothing, detach_maps, needed):
    """The results of backward_reference, by the kernel."""
    want_x, want_q, want_b = needed
    (B, N, D), K = x.shape, len(prototypes)
    grid, inputs, constants = _prepare(x, prototypes, bias, BACKWARD)
    dA = None if dA is None else dA.contiguous()
    c = torch.zeros_like(mass) if dm is None else dm.contiguous()
    inverse = torch.where(mass > 0, 1 / mass, 0)
    if dP is not None:
        dP = dP.contiguous()
        c = c - (dP.float() * pooled).sum(-1) * inverse
    dx = x.new_empty((B, N, D)) if want_x else None
    part = x.new_empty((*grid, K, D), dtype=torch.float32) if want_q else None
    db = torch.empty_like(attention) if want_b else None
    wrap_triton(_backward_kernel)[grid](
        *inputs, attention, dA, dP, inverse, c, dx, part, db, N, K,
        BIAS_AFTER_SOFTMAX=bias_after_softmax, SMOOTHING=smoothing, DETACH=detach_maps, **constants)
    dx = dx if want_x else x.new_empty(0)
    dq = part.sum((0, 1)).to(prototypes.dtype) if want_q else x.new_empty(0)
    db = db.sum(0).to(bias.dtype) if want_b else x.new_empty(0)
    return dx, dq, db

# --- 6. The op ------------------------------------------------------------------------------------
# torch.compile sees into a triton_op: the kernels and the PyTorch around them. On a CPU only the
# tests call the op; prototype_attention there is the reference, which autograd differentiates.
def _fused(x):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return triton is not None and x.is_cuda and x.numel() > 0 and x.dtype in kinds

@triton_op("ivpt::prototype_attention", mutates_args=())  # the annotations are the op's schema
def _op(x: Tensor, prototypes: Tensor, bias: Tensor, bias_after_softmax: bool, smoothing: float,
        detach_maps: bool) -> tuple[Tensor, Tensor, Tensor]:  # detach_maps is for the backward
    if _fused(x):
        return launch_forward(x, prototypes, bias, bias_after_softmax, smoothing)
    return prototype_attention_reference(x, prototypes, bias, bias_after_softmax,
                                         smoothing=smoothing)

@triton_op("ivpt::prototype_attention_backward", mutates_args=())
def _backward_op(
        dA: Tensor | None, dP: Tensor | None, dm: Tensor | None,
        x: Tensor, prototypes: Tensor, bias: Tensor,
        attention: Tensor, pooled: Tensor, mass: Tensor,
        bias_after_softmax: bool, smoothing: float, detach_maps: bool,
        needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    backward = launch_backward if _fused(x) else backward_reference
    return backward(dA, dP, dm, x, prototypes, bias, attention, pooled, mass,
                    bias_after_softmax, smoothing, detach_maps, needed)

def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # an output that has no gradient gives None
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]

def _differentiate(ctx, dA, dP, dm):
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(dA, dP, dm, *ctx.saved_tensors, *ctx.options, needed)
    wanted = [g if want else None for g, want in zip(gradients, needed)]
    return *wanted, None, None, None

_op.register_autograd(_differentiate, setup_context=_save)

def prototype_attention(x, prototypes, bias, bias_after_softmax=True, *,
                        smoothing=0.0, detach_maps=False):
    """As prototype_attention_reference; fused on an NVIDIA GPU in fp32, bf16 and fp16.

    The kernels round the prototypes to the dtype of x; sums are fp32. Under autocast fp32 x takes
    autocast's dtype, unlike in the reference: it is twice as large and misses the tensor cores.
    Raises ValueError where shapes disagree, since a kernel would read past an end.
    """
    (_, N, D), K = x.shape, len(prototypes)
    if prototypes.shape != (K, D) or bias.shape != (K, N):
        found = [list(tensor.shape) for tensor in (x, prototypes, bias)]
        raise ValueError(f"x, prototypes, bias: found {found}, expected (B, N, D), (K, D), (K, N)")
    if not x.is_cuda:
        return prototype_attention_reference(x, prototypes, bias, bias_after_softmax,
                                             smoothing=smoothing, detach_maps=detach_maps)
    if _fused(x) and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return _op(x, prototypes, bias, bias_after_softmax, float(smoothing), detach_maps)
