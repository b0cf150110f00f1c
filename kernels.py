"""Prototype attention: patches and prototypes in, attention maps and region prompts out, in one read of the patches.

The heart of IVPT (Interpretable Visual Prompt Tuning, ICLR 2026, arXiv 2503.06084): concept region discovery, its
spatial bias and intra-region feature aggregation. A lesson: maths and bytes, then 1 PyTorch, 2 forward, 3 backward, 4 op,
5 benchmark.

    python kernels.py                 # the benchmark; beside each time the error against fp64
    python -m pytest -k kernels       # the specification; needs no GPU

THE MATHS. x (B,N,D) patches, q (K,D) prototypes, b (K,N) spatial bias.
    l_k(n) = -|x_n - q_k|^2 = 2 x_n.q_k - |q_k|^2        |x_n|^2 is the same for every k: a softmax cannot see it
    s      = softmax_k(l)                                or softmax_k(l + b) with the bias inside, as released
    u      = max(s + b, 0)                               the paper's bias, after the softmax; u = s with the bias inside
    a      = (u + eps) / sum_k (u + eps)                 smoothing, only where eps > 0; otherwise a = u
    r_k(n) = a_k(n) where k is the first argmax of a(n), else 0                 every patch votes for one concept
    m_k    = sum_n r_k(n),   p_k = sum_n r_k(n) x_n / m_k                       zero where the region is empty

THE BYTES. At B 32, N 1369, D 768, K 17 in bf16, x is 67 MB, the fp32 maps are 3 MB and the rest is below 1 MB. The
product r_k(n) x_n as a tensor (B,D,K,N) would be 72 MB per image in fp32. Two matmuls avoid it but read x twice: once for l,
once for p. The same tile of x serves both, so x need leave memory only once: 71 MB, 17 us at 4.3 TB/s.
"""
from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op, wrap_triton

try:
    import triton
    import triton.language as tl
    jit = triton.jit
    wrap_triton = (lambda kernel: kernel) if triton.knobs.runtime.interpret else wrap_triton    # TRITON_INTERPRET=1
except ImportError:                                         # no Triton for macOS: the reference below serves
    triton, jit = None, lambda kernel: kernel


# --- 1. The reference: plain PyTorch, the CPU path and the oracle of the tests ---------------------------------------
def _attend(x, prototypes, bias, bias_after_softmax, smoothing):
    """The maths up to a, in the dtype of x: softmax s, unclamped u and attention a, each (B, N, K)."""
    logits = F.linear(x, 2 * prototypes, -prototypes.square().sum(1))                           # (B, N, K)
    softmax = (logits if bias_after_softmax else logits + bias.T).softmax(-1)
    shifted = softmax + bias.T if bias_after_softmax else softmax
    attention = torch.where(shifted < 0, 0, shifted)        # clamp(min=0) would stop the gradient of an exact 0
    if smoothing > 0:
        attention = (attention + smoothing) / (attention + smoothing).sum(-1, keepdim=True)
    return softmax, shifted, attention

def _won(attention):
    """(B, N, K) bool: the first of the largest. torch 2.11 compiles argmax wrongly here (pytorch issue 178964)."""
    top = attention == attention.amax(-1, keepdim=True)
    return top & (top.cumsum(-1) == 1)

def _wide(*tensors):
    """Squared distances are in the hundreds and go into an exponent: fp32, or fp64 where the input is fp64."""
    return [t.to(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32) for t in tensors]


def prototype_attention_reference(x, prototypes, bias, bias_after_softmax=True, *, smoothing=0.0, detach_maps=False):
    """x (B,N,D), prototypes (K,D), bias (K,N) -> attention (B,K,N) fp32, pooled (B,K,D) like x, mass (B,K) fp32.

    smoothing is eps above, before pooling. detach_maps lets the gradient reach x only through the averaged features,
    not through the maps (the head of IVPT). fp64 stays fp64. The argmax has no gradient."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        patches, q, b = _wide(x, prototypes, bias)
        attention = _attend(patches.detach() if detach_maps else patches, q, b, bias_after_softmax, smoothing)[2]
        region = torch.where(_won(attention.detach()), attention, 0)                            # (B, N, K)
        mass = region.sum(1)                                                                    # (B, K)
        mean = region.mT @ patches / torch.where(mass > 0, mass, 1)[..., None]                  # (B, K, D)
        pooled = torch.where(mass[..., None] > 0, mean, 0).to(x.dtype)
    return attention.mT.contiguous(), pooled, mass


# --- 2. The forward in Triton ----------------------------------------------------------------------------------------
# A program owns a span of patches of one image and walks it in tiles of BN patches. Its 8 warps share out the columns:
# of each chunk of 128 columns, every warp holds 16. Both products are batched over the warps:
#     logits    (8, BN, 16) @ (8, 16, BK)  -> 8 partial sums of x.q, added over the warps        -> softmax, argmax, r
#     pooling   (8, BK, BN) @ (8, BN, 16)  -> each warp sums the columns it already holds        -> stays in registers
# So an element of x comes from memory once (cp.async, STAGES - 1 tiles ahead of the arithmetic) and from shared memory
# once per product. The prototypes stay in shared memory, the (K, D) sums in registers until the span ends; then they
# are written, and a second kernel adds the spans of an image in their order: no atomics, the same bits in every run.
# K is padded to BK with -inf; D is walked in chunks, the last one masked. HOLD is the number of chunks kept on chip:
# all, or none where K * D is too large. Then tiles are loaded again for the second product, from the L2 cache, and
# neighbouring programs share a span: each sums a slice, POOL chunks. A matrix is (pointer, row stride, column stride).
@jit
def _tile(matrix, row, rows, chunk, D: tl.constexpr):
    """(8, R, 16): of the given rows, column c of warp w is column 128 chunk + 16 w + c. Zero outside."""
    ptr, stride_row, stride_d = matrix
    d = chunk * 128 + tl.arange(0, 8)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    inside = row[None, :, None] < rows if D % 128 == 0 else (row[None, :, None] < rows) & (d < D)
    return tl.load(ptr + row[None, :, None].to(tl.int64) * stride_row + d.to(tl.int64) * stride_d, inside, other=0.0)

@jit
def _tiles(matrix, row, rows, D: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for c in tl.static_range(CHUNKS):
        tiles = tiles + (_tile(matrix, row, rows, c, D),)
    return tiles

@jit
def _row_dots(left, right, k, K, D: tl.constexpr):
    total = tl.zeros(k.shape, tl.float32)                                                       # (K, D) twice -> (BK)
    for c in tl.range((D + 127) // 128):
        total += tl.sum(tl.sum(_tile(left, k, K, c, D).to(tl.float32) * _tile(right, k, K, c, D), 0), 1)
    return total

@jit
def _map(ptr, k, n, inside, stride_k, stride_n):                                                # (K, N) -> (BN, BK)
    return tl.load(ptr + (k[None, :] * stride_k + n[:, None] * stride_n), inside, other=0.0).to(tl.float32)

@jit
def _products(tiles, x, n, end, rows, q, k, K, D: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr):
    """x_n.q_k (BN, BK). The 8 partial sums are added as a tree of halves: a split puts both halves into one thread, so
    that the softmax is shared out over the warps. After tl.sum every warp would do all of it."""
    dots = tl.zeros((8, n.shape[0], k.shape[0]), tl.float32)
    if HOLD > 0:
        for c in tl.static_range(HOLD):
            dots = tl.dot(tiles[c], tl.permute(rows[c], (0, 2, 1)), dots, input_precision=PRECISION)
    else:
        for c in tl.range((D + 127) // 128, num_stages=2):
            again = tl.permute(_tile(q, k, K, c, D), (0, 2, 1))
            dots = tl.dot(_tile(x, n, end, c, D), again, dots, input_precision=PRECISION)
    low, high = tl.split(tl.reshape(tl.permute(dots, (1, 2, 0)), (n.shape[0], k.shape[0], 4, 2)))
    low, high = tl.split(tl.reshape(low + high, (n.shape[0], k.shape[0], 2, 2)))
    low, high = tl.split(low + high)
    return low + high

@jit
def _softmax(logits, bias, k, K, AFTER: tl.constexpr):
    logits = tl.where(k[None, :] < K, logits if AFTER else logits + bias, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    return share * (1 / tl.sum(share, 1))[:, None]                                              # (BN, BK)

@jit
def _add_weighted(sums, weight, tiles, x, n, end, first, D: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr):
    """sums_k += sum_n weight_k(n) x_n, chunk by chunk from first on; weight (BN, BK), sums a tuple of (8, BK, 16)."""
    weight = tl.broadcast_to(tl.trans(weight)[None], (8, weight.shape[1], weight.shape[0]))
    added = ()
    for c in tl.static_range(len(sums)):
        tile = tiles[c] if HOLD > 0 else _tile(x, n, end, first + c, D)
        added = added + (tl.dot(weight, tile, sums[c], input_precision=PRECISION),)
    return added

@jit
def _store_sums(part_ptr, part_total_ptr, sums, total, part, k, K, first, D: tl.constexpr):
    row = part.to(tl.int64) * K                                                                 # (B * spans, K, D)
    tl.store(part_total_ptr + row + k, tl.sum(total, 0), k < tl.where(first == 0, K, 0))
    k = k[None, :, None]
    for c in tl.static_range(len(sums)):
        d = (first + c) * 128 + tl.arange(0, 8)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
        tl.store(part_ptr + (row + k) * D + d, sums[c], (k < K) & (d < D))


@jit
def _forward_kernel(x_ptr, q_ptr, bias_ptr,                 # x (B, N, D), q (K, D) like x, bias (K, N): any strides
                    attention_ptr,                          # out (B, K, N) fp32
                    part_ptr, part_mass_ptr,                # out (B * spans, K, D) and (B * spans, K) fp32
                    N, K, spans, span, slices, sxb, sxn, sxd, sqk, sqd, sbk, sbn, smoothing, AFTER: tl.constexpr,
                    SMOOTH: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HOLD: tl.constexpr,
                    POOL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    part, first = tl.program_id(0) // slices, tl.program_id(0) % slices * POOL       # whose span, from which chunk
    image, begin = (part // spans).to(tl.int64), part % spans * span
    end = tl.minimum(begin + span, N)
    k = tl.arange(0, BK)
    writes = k < tl.where(first == 0, K, 0)                 # the maps are written by the first slice alone
    x, q = (x_ptr + image * sxb, sxn, sxd), (q_ptr, sqk, sqd)
    norm = _row_dots(q, q, k, K, D)                                                             # |q_k|^2
    rows = _tiles(q, k, K, D, HOLD)
    sums, mass = (tl.zeros((8, BK, 16), tl.float32),) * POOL, tl.zeros((BN, BK), tl.float32)
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        inside = (k[None, :] < K) & (n[:, None] < end)
        bias = _map(bias_ptr, k, n, inside, sbk, sbn)                                           # (BN, BK)
        tiles = _tiles(x, n, end, D, HOLD)                                                      # chunks x (8, BN, 16)
        dots = _products(tiles, x, n, end, rows, q, k, K, D, HOLD, PRECISION)
        a = _softmax(2 * dots - norm[None, :], bias, k, K, AFTER)
        a = tl.where(a + bias < 0, 0.0, a + bias) if AFTER else a       # tl.maximum would turn a NaN into 0
        if SMOOTH:
            a = tl.where(k[None, :] < K, a + smoothing, 0.0)
            a = a * (1 / tl.sum(a, 1))[:, None]
        winner = tl.argmax(tl.where(k[None, :] < K, a, -1.0), 1)                                # the first of equals
        region = tl.where((k[None, :] == winner[:, None]) & inside, a, 0.0)
        mass += region
        sums = _add_weighted(sums, region.to(x_ptr.dtype.element_ty), tiles, x, n, end, first, D, HOLD, PRECISION)
        tl.store(attention_ptr + image * K * N + (k[None, :] * N + n[:, None]), a, inside & writes[None, :])
    _store_sums(part_ptr, part_mass_ptr, sums, mass, part, k, K, first, D)


@jit
def _combine_kernel(part_ptr, part_mass_ptr,                # (B * spans, K, D) and (B * spans, K) fp32
                    pooled_ptr, mass_ptr,                   # out (B, K, D) like x and (B, K) fp32
                    K, D, spans, BLOCK: tl.constexpr):
    """The spans of an image, always added in the same order, then divided by the mass."""
    image, k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total, mass = tl.zeros((BLOCK,), tl.float32), 0.0
    for span in range(spans):
        row = (image * spans + span) * K + k
        total += tl.load(part_ptr + row * D + d, d < D, other=0.0)
        mass += tl.load(part_mass_ptr + row)
    pooled = tl.where(mass > 0, total / tl.where(mass > 0, mass, 1.0), 0.0)
    tl.store(pooled_ptr + (image * K + k) * D + d, pooled.to(pooled_ptr.dtype.element_ty), d < D)
    tl.store(mass_ptr + image * K + k, mass)


# --- 3. The backward, derived ----------------------------------------------------------------------------------------
# Given dA (B,K,N), dP (B,K,D), dm (B,K): the gradients of the loss with respect to attention, pooled and mass.
#     p_k = sum_n r_k(n) x_n / m_k and m_k = sum_n r_k(n), so r_k(n) acts on both:
#         dr_k(n) = dm_k + dP_k.(x_n - p_k) / m_k                                  0 for an empty region's dP
#     r_k is a_k on the patches that k won and the choice itself has no gradient:
#         da_k(n) = dA_k(n) + [k won n] dr_k(n)
#     smoothing divides by Z = sum_k (u_k + eps), hence       du_k = (da_k - sum_j da_j a_j) / Z
#     the clamp lets pass what was not negative, and the bias is added there:     h_k = [s_k + b_k >= 0] du_k
#     the softmax's Jacobian is s_k (delta_kj - s_j):         dl_k = s_k (h_k - sum_j h_j s_j)
#     l_k = 2 x.q_k - |q_k|^2 gives                           dq_k = 2 sum_n dl_k(n) (x_n - q_k)
#     bias after the softmax: db = sum_B h; inside it:        db = sum_B dl
#     x_n is seen by the logits and by the averages:          dx_n = 2 sum_k dl_k(n) q_k + a_w(n) / m_w dP_w, w won n
# Everything but x.q and x.dP is a handful of operations per map entry. So s is not stored but computed again from the
# tile of x that x.dP and dq need anyway; from the forward only its three outputs are kept.
def backward_reference(dA, dP, dm, x, prototypes, bias, attention, pooled, mass, after, smoothing, detach_maps, needed):
    """The derivation line by line, (B, N, K) throughout -> dx (B,N,D), dprototypes (K,D), dbias (K,N), or empty."""
    dA, dP, dm = (torch.zeros_like(o) if g is None else g for g, o in ((dA, attention), (dP, pooled), (dm, mass)))
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        e, q, b, a, p, m, dA, dP, dm = _wide(x, prototypes, bias, attention.mT, pooled, mass, dA.mT, dP, dm)
        s, u, _ = _attend(e, q, b, after, smoothing)
        won, inverse = _won(a), torch.where(m > 0, 1 / m, 0)[:, None]                           # (B, N, K), (B, 1, K)
        dr = dm[:, None] + (e @ dP.mT - (dP * p).sum(-1)[:, None]) * inverse
        h = dA + won * dr
        if smoothing > 0:
            h = (h - (h * a).sum(-1, keepdim=True)) / (u.clamp(min=0) + smoothing).sum(-1, keepdim=True)
        h = torch.where(u < 0, 0, h)
        dl = s * (h - (h * s).sum(-1, keepdim=True))
        dq = 2 * (torch.einsum("bnk,bnd->kd", dl, e) - q * dl.sum((0, 1))[:, None])             # (K, D)
        dx = (won * a * inverse) @ dP + (0 if detach_maps else 2 * dl @ q)                      # (B, N, D)
        found = (dx, x), (dq, prototypes), ((h if after else dl).sum(0).T.contiguous(), bias)
        return tuple(g.to(t.dtype) if want else t.new_empty(0) for (g, t), want in zip(found, needed))


# The same two kernels again. The first has the forward's shape: a span of patches, x read once, dl instead of r as
# the weights of the (K, D) sums. The second makes dx, which needs dl, a, q and dP but not x. Each gradient that is
# not asked for is compiled away: a prompted layer detaches x, so there the second kernel does not run at all.
@jit
def _backward_kernel(x_ptr, q_ptr, bias_ptr,                # x (B, N, D), q (K, D) like x, bias (K, N): any strides
                     attention_ptr, pooled_ptr, mass_ptr,   # saved: (B, K, N) fp32, (B, K, D) like x, (B, K) fp32
                     da_ptr, dp_ptr, dm_ptr,                # (B, K, N), (B, K, D) and (B, K): any strides
                     dl_ptr, h_ptr,                         # out (B, K, N) fp32
                     part_ptr, part_sum_ptr,                # out (B * spans, K, D) and (B * spans, K) fp32
                     N, K, spans, span, slices, sxb, sxn, sxd, sqk, sqd, sbk, sbn, sab, sak, san, spb, spk, spd, smb,
                     smk, smoothing, POOLED: tl.constexpr, WANT_DL: tl.constexpr, WANT_H: tl.constexpr,
                     AFTER: tl.constexpr, SMOOTH: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     HOLD: tl.constexpr, POOL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    part, first = tl.program_id(0) // slices, tl.program_id(0) % slices * POOL
    image, begin = (part // spans).to(tl.int64), part % spans * span
    end = tl.minimum(begin + span, N)
    k = tl.arange(0, BK)
    writes = k < tl.where(first == 0, K, 0)
    x, q = (x_ptr + image * sxb, sxn, sxd), (q_ptr, sqk, sqd)
    norm = _row_dots(q, q, k, K, D)
    rows = _tiles(q, k, K, D, HOLD)
    dr = tl.load(dm_ptr + image * smb + k * smk, k < K, other=0.0).to(tl.float32)
    if POOLED:
        dp = (dp_ptr + image * spb, spk, spd)
        mass = tl.load(mass_ptr + image * K + k, k < K, other=0.0)
        inverse = tl.where(mass > 0, 1 / tl.where(mass > 0, mass, 1.0), 0.0)
        dr -= _row_dots(dp, (pooled_ptr + image * K * D, D, 1), k, K, D) * inverse              # dm_k - dP_k.p_k / m_k
        dp_rows = _tiles(dp, k, K, D, HOLD)
    sums, sum_dl = (tl.zeros((8, BK, 16), tl.float32),) * POOL, tl.zeros((BN, BK), tl.float32)
    for start in tl.range(begin, end, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        inside = (k[None, :] < K) & (n[:, None] < end)
        bias = _map(bias_ptr, k, n, inside, sbk, sbn)                                           # (BN, BK), as all below
        a = _map(attention_ptr + image * K * N, k, n, inside, N, 1)
        da = _map(da_ptr + image * sab, k, n, inside, sak, san)
        tiles = _tiles(x, n, end, D, HOLD)
        dots = _products(tiles, x, n, end, rows, q, k, K, D, HOLD, PRECISION)                   # x.q
        s = _softmax(2 * dots - norm[None, :], bias, k, K, AFTER)
        u = s + bias if AFTER else s
        won = tl.broadcast_to(dr[None, :], (BN, BK))
        if POOLED:
            won += _products(tiles, x, n, end, dp_rows, dp, k, K, D, HOLD, PRECISION) * inverse[None, :]    # x.dP / m
        winner = tl.argmax(tl.where(k[None, :] < K, a, -1.0), 1)
        h = da + tl.where(k[None, :] == winner[:, None], won, 0.0)
        if SMOOTH:
            total = tl.sum(tl.where(k[None, :] < K, tl.maximum(u, 0.0) + smoothing, 0.0), 1)
            h = (h - tl.sum(h * a, 1)[:, None]) / total[:, None]
        h = tl.where(u < 0, 0.0, h)
        dl = tl.where(n[:, None] < end, s * (h - tl.sum(h * s, 1)[:, None]), 0.0)
        weight = dl.to(x_ptr.dtype.element_ty)              # rounded in both sums: dq is their difference
        sum_dl += weight.to(tl.float32)
        sums = _add_weighted(sums, weight, tiles, x, n, end, first, D, HOLD, PRECISION)
        if WANT_H:
            tl.store(h_ptr + image * K * N + (k[None, :] * N + n[:, None]), h, inside & writes[None, :])
        if WANT_DL:
            tl.store(dl_ptr + image * K * N + (k[None, :] * N + n[:, None]), dl, inside & writes[None, :])
    if POOL > 0:                                            # 0: the prototypes ask for no gradient
        _store_sums(part_ptr, part_sum_ptr, sums, sum_dl, part, k, K, first, D)


@jit
def _patch_gradient_kernel(q_ptr, dp_ptr,                   # (K, D) and (B, K, D) like x: any strides
                           attention_ptr, mass_ptr, dl_ptr, # (B, K, N), (B, K), (B, K, N) fp32
                           dx_ptr,                          # out (B, N, D)
                           N, K, sqk, sqd, spb, spk, spd, LOGITS: tl.constexpr, POOLED: tl.constexpr, D: tl.constexpr,
                           BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    blocks, k = tl.cdiv(N, BN), tl.arange(0, BK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    dtype = dx_ptr.dtype.element_ty
    inside = (k[None, :] < K) & (n[:, None] < N)
    if LOGITS:
        dl = (2 * _map(dl_ptr + image * K * N, k, n, inside, N, 1)).to(dtype)                   # (BN, BK)
    if POOLED:
        a = _map(attention_ptr + image * K * N, k, n, inside, N, 1)
        winner = tl.argmax(tl.where(k[None, :] < K, a, -1.0), 1)
        mass = tl.load(mass_ptr + image * K + k, k < K, other=0.0)
        share = a / tl.where(mass > 0, mass, 1.0)[None, :]                                      # at most 1, fp16-safe
        share = tl.where(k[None, :] == winner[:, None], share, 0.0).to(dtype)
    for start in tl.range(0, D, BD):
        d = start + tl.arange(0, BD)
        rows = (k[:, None] < K) & (d[None, :] < D)
        dx = tl.zeros((BN, BD), tl.float32)
        if LOGITS:
            q = tl.load(q_ptr + k[:, None] * sqk + d[None, :] * sqd, rows, other=0.0)
            dx = tl.dot(dl, q, dx, input_precision=PRECISION)
        if POOLED:
            dp = tl.load(dp_ptr + image * spb + k[:, None] * spk + d[None, :] * spd, rows, other=0.0)
            dx = tl.dot(share, dp, dx, input_precision=PRECISION)
        tl.store(dx_ptr + (image * N + n[:, None]) * D + d[None, :], dx.to(dtype), (n[:, None] < N) & (d[None, :] < D))


# --- 4. The launch and the op ----------------------------------------------------------------------------------------
@functools.cache
def _chip(device):
    """Multiprocessors and a program's shared memory in bytes; an H200's where there is no GPU to ask."""
    chip = torch.cuda.get_device_properties(device) if torch.cuda.is_available() else None
    return (chip.multi_processor_count, chip.shared_memory_per_block_optin) if chip else (132, 232448)

def _plan(B, N, D, K, size, products, processors, shared):
    """How a problem is cut: constexprs, spans of an image, patches of a span, slices of D. products: 1 in the forward,
    in the backward 2, or 3 with x.dP. sums: a thread's registers for the (K, D) sums; above the limit, spilling."""
    BK, chunks, forward, BN, stages = max(16, triton.next_power_of_2(K)), triton.cdiv(D, 128), products == 1, 16, 1
    sums, hold, pool = BK * chunks // 2, chunks, chunks
    if sums <= (128 if size == 2 else 48 if forward else 0):
        row, free = chunks * 128 * size, shared - (1 + (products == 3)) * BK * chunks * 128 * size
        BN = 32 if size == 2 and forward and sums <= 96 and free >= 32 * (row + 36 * BK) else 16
        stages = min(3, (free - 32 * BN * BK) // (BN * (row + (4 if forward else 12) * BK)) + 1)  # a map: 4 BN BK bytes
    if stages < 2:                                          # does not fit: nothing held, a divisor of chunks per slice
        BN, stages, hold, pool = 16, 1, 0, max(p for p in range(1, max(2, 64 // BK + 1)) if chunks % p == 0)
    spans = processors // B if 2 * B <= processors else triton.cdiv(4 * processors, B)      # one wave, or at least four
    span = triton.cdiv(N, max(1, min(spans, N // (2 * BN))) * BN) * BN
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"         # PyTorch's switch: fp32 as it is, or 3 x TF32
    return dict(D=D, BN=BN, BK=BK, HOLD=hold, POOL=pool, STAGES=stages, PRECISION="ieee" if exact else "tf32x3"), \
        triton.cdiv(N, span), span, chunks // pool


def launch_forward(x, prototypes, bias, after, smoothing):
    (B, N, D), K, q = x.shape, len(prototypes), prototypes.to(x.dtype)
    cut, spans, span, slices = _plan(B, N, D, K, x.element_size(), 1, *_chip(x.device))
    empty = functools.partial(x.new_empty, dtype=torch.float32)
    attention, pooled, mass = empty((B, K, N)), x.new_empty((B, K, D)), empty((B, K))
    part, part_mass = empty((B * spans, K, D)), empty((B * spans, K))
    wrap_triton(_forward_kernel)[(B * spans * slices,)](
        x, q, bias, attention, part, part_mass, N, K, spans, span, slices, *x.stride(), *q.stride(), *bias.stride(),
        smoothing, AFTER=after, SMOOTH=smoothing > 0, num_warps=8, **cut)
    wrap_triton(_combine_kernel)[(B * K, triton.cdiv(D, 256))](part, part_mass, pooled, mass, K, D, spans, BLOCK=256)
    return attention, pooled, mass


def launch_backward(dA, dP, dm, x, prototypes, bias, attention, pooled, mass, after, smoothing, detach_maps, needed):
    """dA, dP and dm may be None; the gradients that are not needed come back empty."""
    (B, N, D), K, q, zero = x.shape, len(prototypes), prototypes.to(x.dtype), mass.new_zeros(())
    (want_x, want_q, want_b), POOLED = needed, dP is not None
    dA, dP, dm = (g if g is not None else zero.expand(o.shape) for g, o in ((dA, attention), (dP, pooled), (dm, mass)))
    dA = dA.contiguous() if dA.numel() >= 2 ** 31 else dA                   # _map counts in 32 bits within an image
    want_h, want_dl = want_b and after, (want_x and not detach_maps) or (want_b and not after)
    cut, spans, span, slices = _plan(B, N, D, K, x.element_size(), 2 + POOLED, *_chip(x.device))
    cut, slices = (cut, slices) if want_q else (cut | dict(POOL=0), 1)          # no (K, D) sums: nothing to slice
    empty = functools.partial(x.new_empty, dtype=torch.float32)
    h, dl, dx = empty((B * want_h, K, N)), empty((B * want_dl, K, N)), x.new_empty((B * want_x, N, D))
    part, part_sum = empty((B * spans * want_q, K, D)), empty((B * spans * want_q, K))
    if want_q or want_h or want_dl:
        wrap_triton(_backward_kernel)[(B * spans * slices,)](
            x, q, bias, attention, pooled, mass, dA, dP, dm, dl, h, part, part_sum, N, K, spans, span, slices,
            *x.stride(), *q.stride(), *bias.stride(), *dA.stride(), *dP.stride(), *dm.stride(), smoothing,
            POOLED=POOLED, WANT_DL=want_dl, WANT_H=want_h, AFTER=after, SMOOTH=smoothing > 0, num_warps=8, **cut)
    if want_x:
        wrap_triton(_patch_gradient_kernel)[(B * triton.cdiv(N, 64),)](
            q, dP, attention, mass, dl, dx, N, K, *q.stride(), *dP.stride(), LOGITS=not detach_maps, POOLED=POOLED,
            D=D, BN=64, BK=cut["BK"], BD=64, PRECISION=cut["PRECISION"])
    dq = 2 * (part.sum(0) - q.float() * part_sum.sum(0)[:, None]) if want_q else part       # spans, always in one order
    return dx, dq.to(prototypes.dtype), (h if after else dl).sum(0).to(bias.dtype) if want_b else h.new_empty(0)


def _fused(x):
    return triton is not None and x.is_cuda and x.numel() > 0 and x.element_size() in (2, 4) and x.is_floating_point()

@triton_op("ivpt::prototype_attention", mutates_args=())     # annotations are the schema: torch 2.11 takes no other
def _op(x: Tensor, prototypes: Tensor, bias: Tensor, after: bool, smoothing: float,
        detach_maps: bool) -> tuple[Tensor, Tensor, Tensor]:
    if _fused(x):
        return launch_forward(x, prototypes, bias, after, smoothing)
    return prototype_attention_reference(x, prototypes, bias, after, smoothing=smoothing)

@triton_op("ivpt::prototype_attention_backward", mutates_args=())
def _backward_op(dA: Tensor | None, dP: Tensor | None, dm: Tensor | None, x: Tensor, prototypes: Tensor, bias: Tensor,
                 attention: Tensor, pooled: Tensor, mass: Tensor, after: bool, smoothing: float, detach_maps: bool,
                 needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    given = dA, dP, dm, x, prototypes, bias, attention, pooled, mass, after, smoothing, detach_maps, needed
    return launch_backward(*given) if _fused(x) else backward_reference(*given)

def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)                        # an output that has no gradient costs nothing
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]

def _differentiate(ctx, *grads):
    needed = list(ctx.needs_input_grad[:3])
    results = _backward_op(*grads, *ctx.saved_tensors, *ctx.options, needed)
    return *(result if want else None for result, want in zip(results, needed)), None, None, None

_op.register_autograd(_differentiate, setup_context=_save)


def prototype_attention(x, prototypes, bias, bias_after_softmax=True, *, smoothing=0.0, detach_maps=False):
    """As prototype_attention_reference. Fused on an NVIDIA GPU in fp32, bf16 and fp16; elsewhere the reference itself.
    The kernels round the prototypes to the dtype of x, which under autocast is autocast's, as for any matmul: LayerNorm
    hands over fp32, whose tiles are twice as large and miss the tensor cores. ValueError: shapes that disagree."""
    if prototypes.shape[1:] != x.shape[2:] or bias.shape != (len(prototypes), x.shape[1]):      # reads past their ends
        found = [*map(list, (x.shape, prototypes.shape, bias.shape))]
        raise ValueError(f"x, prototypes, bias of shapes {found}: expected (B, N, D), (K, D), (K, N)")
    if _fused(x):
        if x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _op(x, prototypes, bias, bias_after_softmax, float(smoothing), detach_maps)
    options = dict(smoothing=smoothing, detach_maps=detach_maps)
    return prototype_attention_reference(x, prototypes, bias, bias_after_softmax, **options)


# --- 5. Self-check and benchmark -------------------------------------------------------------------------------------
def two_reads(x, prototypes, bias, product_form=False):
    """The honest rival, in the dtype of x; product_form pools through the (B, D, K, N) tensor instead of a matmul."""
    logits = F.linear(x, 2 * prototypes, -prototypes.square().sum(1)).float()                   # (B, N, K), x read once
    attention = (logits.softmax(-1) + bias.T).clamp(min=0)
    region = attention * torch.zeros_like(attention).scatter(-1, attention.argmax(-1, keepdim=True), 1)
    weight, mass = region.to(x.dtype).mT, region.sum(1)
    pooled = (x.mT[:, :, None] * weight[:, None]).sum(-1).mT if product_form else weight @ x    # and here again
    return attention.mT, pooled / torch.where(mass > 0, mass, 1).to(x.dtype)[..., None], mass


def measure(run, fill):
    """Microseconds: median, 20 % and 80 % of the GPU's time (without a GPU: of wall time), median of the wall time.
    Before each GPU timing 4 GiB are filled: x leaves the cache, and Python, slower than the kernels, can queue them."""
    from torch.utils.benchmark import Timer                 # here, as it warns of a CUDA toolkit without a GPU
    wall = Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads()).blocked_autorange()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(100 if fill is not None else 0)]
    for start, stop in marks:
        fill.zero_(), start.record(), run(), stop.record()
    torch.cuda.synchronize() if marks else None
    times = [start.elapsed_time(stop) / 1e3 for start, stop in marks] or wall.times
    return *(1e6 * torch.tensor(times).quantile(torch.tensor((0.5, 0.2, 0.8)))).tolist(), 1e6 * wall.median


def main():
    cuda, device = torch.cuda.is_available(), "cuda" if torch.cuda.is_available() else "cpu"
    fill = torch.empty(2 ** 32, dtype=torch.uint8, device=device) if cuda else None
    copied = 2e-3 * 2 ** 32 / measure(fill.clone, fill)[0] if cuda else 1                       # GB/s, read and written
    forms = {"product": functools.partial(two_reads, product_form=True), "two reads": two_reads,
             "compiled": torch.compile(two_reads), "Triton" if cuda else "reference": prototype_attention}
    print("torch", torch.__version__, f"{torch.cuda.get_device_name()}, copy {copied:.0f} GB/s" if cuda else
          "CPU: wall time of the PyTorch forms at batch 1. Missing: Triton, GPU time, copy bandwidth, peak memory.")
    print("error: the largest against fp64, of outputs or gradients, as a share of the largest value\n"
          "  B     N     D   K dtype    form      pass       median us (20 to 80 %)     wall us   error     GB/s")
    shapes = (32, 1369, 768, 17), (32, 256, 384, 17), (8, 1369, 1024, 17), (16, 196, 192, 5)
    for (B, N, D, K), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()
        x, q, bias = torch.randn(B if cuda else 1, N, D), 0.3 * torch.randn(K, D), torch.zeros(K, N)
        inputs = [t.to(device, t.dtype if t is bias else dtype).requires_grad_() for t in (x, q, bias)]

        def call(form, inputs, backward):
            with torch.set_grad_enabled(backward):
                outputs = form(*inputs)
            return torch.autograd.grad(outputs, inputs, outputs) if backward else outputs
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = [call(prototype_attention_reference, wide, backward) for backward in (False, True)]
        for (name, form), backward in itertools.product(forms.items(), (False, True)):
            run = functools.partial(call, form, inputs, backward)
            error = max(((o - e).abs().max() / e.abs().max()).item() for o, e in zip(run(), exact[backward]))
            torch.cuda.reset_peak_memory_stats() if cuda else None
            held, (median, low, high, wall) = torch.cuda.memory_allocated(), measure(run, fill)
            rate = (3 if backward else 1) * (inputs[0].nbytes + 4 * len(x) * K * N) / median / 1e3        # fewest bytes
            print(f"{len(x):3d} {N:5d} {D:5d} {K:3d} {str(dtype)[6:]:9s}{name:10s}{'fwd+bwd' if backward else 'fwd':8s}"
                  f"{median:9.0f} ({f'{low:.0f} to {high:.0f})':20s}{wall:9.0f} {error:9.1e} {rate:7.1f}"
                  + f", {rate / copied:.0%} of copy, peak {torch.cuda.max_memory_allocated() - held >> 20} MiB" * cuda)


if __name__ == "__main__":
    main()
