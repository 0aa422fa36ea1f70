"""Causal self-attention, backward: dQ, dK and dV in one packed gradient, without atomics.

With P, keep, m and l as in `attention`, the backward computes for each row

    Z  = P * keep / (1 - p)            the weights that the forward used
    dV = Z^T dO                        dZ = dO V^T
    dS = P * (dZ * keep / (1 - p) - delta)
    dQ = scale dS K                    dK = scale dS^T Q

where delta, one number per row, is sum_j Z_j dZ_j. That sum equals dot(dO, O), so the kernel takes
it from the outputs; only in float32 a pass over the keys corrects it (see Precision).

At short contexts in 16 bits `attention_head_backward` can replace these kernels; by default it does
so only on sm_90 (see `attention_tiles.default_head_options`).

Algorithm   Dao, "FlashAttention-2" (2023), with two kernels: the first has a program for each query
            tile and computes delta and dQ; the second has one for each key tile and computes dK and
            dV. No two programs add to the same gradient, so every run gives the same bits. Both
            kernels recompute the dropout mask, dZ, and P = 2^(S - m) / l, where S and m carry the
            factor log2(e). With S and dZ twice, the two kernels compute seven matmuls, where one
            kernel that adds dQ by atomics computes five. In float32 the kernel of dQ computes S and
            dZ once more (see Precision), which makes nine.
Diagonal    As in the forward, tiles that the diagonal crosses have a separate, masked loop.
Traffic     reads q, k, v, out, dout and writes dq, dk, dv: 8 B H T D elements, and m and log2(l).
            The second kernel reads q, k, v and dout again, which makes 12 B H T D. Each tile of
            queries reads k and v, and each tile of keys q and dout, mostly from L2. The gradients
            are one (B, T, 3, H, D) tensor, as a packed projection needs them.
Parallelism one program per head and query tile, then one per head and key tile.
Precision   Accumulators and dS are in float32; Z and dS are rounded to the input dtype for their
            matmuls. dS is rounded before it is multiplied by the scale, so that small values do not
            underflow in float16. Let x = dZ keep / (1 - p). Then delta = sum_i P_i x_i, and because
            the P_i sum to 1, dS_j = P_j (x_j - delta) = P_j sum_{i != j} P_i (x_j - x_i). So |dS_j|
            <= P_j (1 - P_j) 2 max|x| <= max|x| / 2: dS overflows in float16 only if x does, and
            then `eager`, which stores x in float16, overflows as well. Each row of dS should sum to
            0. If one key has nearly all of the weight, its dS is a difference of nearly equal
            numbers, and the different rounding of dot(dO, O) and dZ becomes visible in float32.
            The exact delta is sum_j P_j x_j and the P_j sum to 1, so the sum of a row of dS is the
            error of the computed delta. So in float32 a first pass over the keys computes the sum
            of the row and adds it to delta. Row 0 sees only one key, so its dS is set to exactly 0.
Limits      those of `attention`.
Spec        the gradient of irongpt_kernels/eager.py::causal_attention
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused import attention_tiles, philox
from irongpt_kernels.fused.attention_head_backward import head_bwd
from irongpt_kernels.fused.attention_tiles import load_stats, load_tile, store_tile
from irongpt_kernels.runtime import launch
from irongpt_kernels.runtime.custom_op import custom_op


@triton.jit
def _bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, m_ptr, log_l_ptr, seed_ptr, dq_ptr, delta_ptr,
    dout_strides, q_strides, k_strides, v_strides, out_strides, dq_strides, H, T,
    scale, scale_log2, THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes delta and dQ of one query tile."""
    query_tiles = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // query_tiles
    start_m = (query_tiles - 1 - tl.program_id(0) % query_tiles) * BLOCK_M  # longest rows first
    b, h = head // H, head % H
    seed = tl.load(seed_ptr)
    rows = start_m + tl.arange(0, BLOCK_M)
    at = tl.cast(head, tl.int64) * T + rows  # offsets of m, log2(l) and delta
    q = load_tile(q_ptr, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, True)
    dout = load_tile(dout_ptr, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, True)
    out = load_tile(out_ptr, out_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, True)
    m, log_l = load_stats(m_ptr, log_l_ptr, at, rows < T, q.dtype == tl.float32)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    end = tl.minimum(start_m + BLOCK_M, T)
    if q.dtype == tl.float32:  # see Precision
        ds_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start_n in range(0, end, BLOCK_N):
            ds, _ = _ds_of_keys(
                q, dout, m, log_l, delta, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m,
                start_n, T, scale_log2, seed, True, THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            ds_sum += tl.sum(ds, 1)
        delta += ds_sum
    tl.store(delta_ptr + at, delta, mask=rows < T)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N  # every row sees the keys before this one
    for start_n in range(0, diagonal, BLOCK_N):
        ds, k = _ds_of_keys(
            q, dout, m, log_l, delta, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m,
            start_n, T, scale_log2, seed, False, THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    for start_n in range(diagonal, end, BLOCK_N):
        ds, k = _ds_of_keys(
            q, dout, m, log_l, delta, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m,
            start_n, T, scale_log2, seed, True, THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_tile(scale * dq, dq_ptr, dq_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _ds_of_keys(
    q, dout, m, log_l, delta, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m,
    start_n, T, scale_log2, seed, DIAGONAL: tl.constexpr, THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns dS of a tile of keys, (BLOCK_M, BLOCK_N), and the tile of k."""
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    cols = (start_n + tl.arange(0, BLOCK_N))[None, :]
    k = load_tile(k_ptr, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, DIAGONAL)
    v = load_tile(v_ptr, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, DIAGONAL)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
    p = attention_tiles.weights(s, m[:, None], log_l[:, None], q.dtype == tl.float32)
    if DIAGONAL:
        p = tl.where((cols <= rows) & (rows > 0), p, 0.0)  # rows > 0: see Precision
    dz = tl.dot(dout, tl.trans(v), input_precision="ieee") * (256 / (256 - THRESHOLD))
    if THRESHOLD > 0:
        keep = philox.attention_keep(seed, head, start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD)
        dz = tl.where(keep, dz, 0.0)
    return p * (dz - delta[:, None]), k


@triton.jit
def _bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, m_ptr, log_l_ptr, delta_ptr, seed_ptr, dk_ptr, dv_ptr,
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, H, T,
    scale, scale_log2, THRESHOLD: tl.constexpr, D: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes dK and dV of one key tile. EVEN_M: T is a multiple of BLOCK_M."""
    key_tiles = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // key_tiles
    start_n = tl.program_id(0) % key_tiles * BLOCK_N  # longest columns first
    b, h = head // H, head % H
    seed = tl.load(seed_ptr)
    k = load_tile(k_ptr, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, True)
    v = load_tile(v_ptr, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, True)

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    diagonal = start_n // BLOCK_M * BLOCK_M  # the first query tile that sees one of these keys
    below = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M  # the first that sees all of them
    for start_m in range(diagonal, tl.minimum(below, T), BLOCK_M):
        dk, dv = _dkv_of_queries(
            dk, dv, k, v, dout_ptr, q_ptr, m_ptr, log_l_ptr, delta_ptr, dout_strides, q_strides,
            b, h, head, start_m, start_n, T, scale_log2, seed, True, True, THRESHOLD, D,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start_m in range(below, T, BLOCK_M):
        dk, dv = _dkv_of_queries(
            dk, dv, k, v, dout_ptr, q_ptr, m_ptr, log_l_ptr, delta_ptr, dout_strides, q_strides,
            b, h, head, start_m, start_n, T, scale_log2, seed, False, not EVEN_M, THRESHOLD, D,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    keep_scale = 256 / (256 - THRESHOLD)
    store_tile(scale * dk, dk_ptr, dk_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    store_tile(keep_scale * dv, dv_ptr, dv_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)


@triton.jit
def _dkv_of_queries(
    dk, dv, k, v, dout_ptr, q_ptr, m_ptr, log_l_ptr, delta_ptr, dout_strides, q_strides,
    b, h, head, start_m, start_n, T, scale_log2, seed,
    DIAGONAL: tl.constexpr, CHECK_T: tl.constexpr, THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of a tile of queries to dK / scale and dV / keep_scale.

    Scores are computed transposed, (BLOCK_N, BLOCK_M), so that P and dS need no transpose as left
    operands. Rows beyond T have dout = 0 and delta = 0, and contribute nothing.
    """
    rows = start_m + tl.arange(0, BLOCK_M)
    cols = (start_n + tl.arange(0, BLOCK_N))[:, None]
    at = tl.cast(head, tl.int64) * T + rows
    q = load_tile(q_ptr, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, CHECK_T)
    dout = load_tile(dout_ptr, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, CHECK_T)
    m, log_l = load_stats(m_ptr, log_l_ptr, at, rows < T, q.dtype == tl.float32)
    delta = tl.load(delta_ptr + at, mask=rows < T, other=0.0)[None, :]
    rows = rows[None, :]
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # (BLOCK_N, BLOCK_M)
    p = attention_tiles.weights(s, m[None, :], log_l[None, :], q.dtype == tl.float32)
    if DIAGONAL:
        p = tl.where(cols <= rows, p, 0.0)
    z = p
    dz = tl.dot(v, tl.trans(dout), input_precision="ieee") * (256 / (256 - THRESHOLD))
    if THRESHOLD > 0:
        keep = philox.attention_keep(
            seed, head, start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD, TRANSPOSED=True
        )
        z = tl.where(keep, p, 0.0)
        dz = tl.where(keep, dz, 0.0)
    dv = tl.dot(z.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dz - delta)
    if DIAGONAL:
        ds = tl.where(rows > 0, ds, 0.0)  # see Precision
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


def _empty_gradient(dout: Tensor, q: Tensor, *_: Any) -> Tensor:
    B, H, T, D = q.shape
    return q.new_empty(B, T, 3, H, D)


def causal_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, out: Tensor, stats: Tensor,
    dropout_p: float, scale: float,
) -> Tensor:  # fmt: skip
    """Returns the packed gradient, (B, T, 3, H, D).

    dout, out: (B, T, H, D). q, k, v: (B, H, T, D). stats: (2, B, H, T).
    """
    B, H, T, D = q.shape
    packed = _empty_gradient(dout, q)
    if packed.numel() == 0:
        return packed
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    single_kernel = attention_tiles.head_options(q.device, T, D, q.element_size())
    if single_kernel is not None:
        head_bwd(dout, q, k, v, seed, out, stats, packed, dropout_p, scale, single_kernel)
        return packed
    dq, dk, dv = launch.unpack(packed)
    m, log_l = stats
    delta = torch.empty_like(m)
    sizes = H, T, scale, scale * math.log2(math.e)
    options = dict(
        THRESHOLD=dropout.threshold(dropout_p),
        D=D,
        BLOCK_D=launch.block(D),
        enable_fp_fusion=False,  # see Precision in `attention`
    )
    config = attention_tiles.launch_options("query", q.device, D, q.element_size())
    _bwd_dq_kernel[(B * H * triton.cdiv(T, config["BLOCK_M"]),)](
        dout, q, k, v, out, m, log_l, seed, dq, delta,
        dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),
        *sizes, **options, **config,
    )  # fmt: skip
    config = attention_tiles.launch_options("key", q.device, D, q.element_size())
    _bwd_dkdv_kernel[(B * H * triton.cdiv(T, config["BLOCK_N"]),)](
        dout, q, k, v, m, log_l, delta, seed, dk, dv,
        dout.stride(), q.stride(), k.stride(), v.stride(), dk.stride(), dv.stride(),
        *sizes, EVEN_M=T % config["BLOCK_M"] == 0, **options, **config,
    )  # fmt: skip
    return packed


backward_op = custom_op("causal_attention_backward", causal_attention_bwd, _empty_gradient)
