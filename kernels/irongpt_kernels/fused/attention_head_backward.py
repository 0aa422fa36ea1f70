"""Causal self-attention, backward of short contexts: one program computes the gradient of a head.

A program computes the same gradient as `attention_backward`, in its notation:

    Z  = P * keep / (1 - p)            dV = Z^T dO         dZ = dO V^T
    dS = Z * dZ - P * delta            dQ = scale dS K     dK = scale dS^T Q

Algorithm   A program keeps Q, dO and the accumulator of dQ of all rows of its head on chip. It
            loops over tiles of keys: each adds its part to dQ, and its rows of dK and dV are then
            complete. Scores, weights and dropout masks are computed once. The pair of kernels of
            `attention_backward` computes them twice.
Diagonal    With SPLIT there are two loops. The first has all queries and the first half of the
            keys. The second has the second half of the queries and of the keys: no other query sees
            those keys. So 3/4 of the scores are computed. BLOCK_M is T, rounded up to a power of
            two, and at least 16 rows per warp. SPLIT is used if half of BLOCK_M still has 16 rows
            per warp. Without SPLIT one loop computes all scores. Every tile is masked.
Traffic     reads q, k, v, out, dout and writes dq, dk, dv once: 8 B H T D elements (the pair moves
            12), and m and log2(l). With SPLIT the second loop loads its half of q and dout again,
            from cache; dQ is split into its upper and lower rows in registers.
Parallelism one program per head.
Precision   As in `attention_backward`. The factor 1 / (1 - p) is added to the exponent of P as its
            log2, which saves a multiplication per element. Z cannot overflow in float16: it is at
            most 1 / (1 - p) <= 256.
Limits      float16 and bfloat16. A program holds BLOCK_M >= T rows of q, dout and dQ, which have to
            fit its registers and shared memory: see `attention_tiles.head_options`.
Spec        the gradient of irongpt_kernels/eager.py::causal_attention
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused import philox
from irongpt_kernels.fused.attention_tiles import load_stats, load_tile, store_tile
from irongpt_kernels.runtime import launch


@triton.jit
def _bwd_head_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, m_ptr, log_l_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    dout_strides, q_strides, k_strides, v_strides, out_strides, grad_strides, H, T,
    scale, scale_log2, THRESHOLD: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """T is at most BLOCK_M, and with SPLIT more than half of it. dq, dk and dv have one layout."""
    head = tl.program_id(0)
    b, h = head // H, head % H
    seed = tl.load(seed_ptr)
    rows = tl.arange(0, BLOCK_M)
    at = tl.cast(head, tl.int64) * T + rows
    q = load_tile(q_ptr, q_strides, b, h, 0, T, D, BLOCK_M, BLOCK_D, True)
    dout = load_tile(dout_ptr, dout_strides, b, h, 0, T, D, BLOCK_M, BLOCK_D, True)
    out = load_tile(out_ptr, out_strides, b, h, 0, T, D, BLOCK_M, BLOCK_D, True)
    m, log_l = load_stats(m_ptr, log_l_ptr, at, rows < T, True)
    m += log_l - tl.log2(256 / (256 - THRESHOLD))  # 2^(S - m) = P / (1 - p)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    # -(1 - p) delta: m now contains 1 / (1 - p), so 2^(S - m) times this is -P delta.
    delta_factor = delta * (THRESHOLD / 256 - 1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(0, BLOCK_M // 2 if SPLIT else T, BLOCK_N):
        dq = _gradients_of_keys(
            dq, q, dout, m, delta_factor, k_ptr, v_ptr, dk_ptr, dv_ptr, k_strides, v_strides,
            grad_strides, b, h, head, 0, start_n, T, scale, scale_log2, seed, not SPLIT,
            THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if SPLIT:
        HALF: tl.constexpr = BLOCK_M // 2
        upper, dq = _halves(dq)
        store_tile(scale * upper, dq_ptr, grad_strides, b, h, 0, T, D, HALF, BLOCK_D)
        q = load_tile(q_ptr, q_strides, b, h, HALF, T, D, HALF, BLOCK_D, True)
        dout = load_tile(dout_ptr, dout_strides, b, h, HALF, T, D, HALF, BLOCK_D, True)
        _, m = _halves(m)
        _, delta_factor = _halves(delta_factor)
        for start_n in range(HALF, T, BLOCK_N):
            dq = _gradients_of_keys(
                dq, q, dout, m, delta_factor, k_ptr, v_ptr, dk_ptr, dv_ptr, k_strides, v_strides,
                grad_strides, b, h, head, HALF, start_n, T, scale, scale_log2, seed, True,
                THRESHOLD, D, HALF, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        store_tile(scale * dq, dq_ptr, grad_strides, b, h, HALF, T, D, HALF, BLOCK_D)
    else:
        store_tile(scale * dq, dq_ptr, grad_strides, b, h, 0, T, D, BLOCK_M, BLOCK_D)


@triton.jit
def _halves(x):
    """The upper and the lower half of the rows. Threads hold parts of both: no data moves."""
    M: tl.constexpr = x.shape[0] // 2
    if len(x.shape) == 2:
        x = tl.permute(tl.reshape(x, (2, M, x.shape[1])), (1, 2, 0))
    else:
        x = tl.permute(tl.reshape(x, (2, M)), (1, 0))
    return tl.split(x)


@triton.jit
def _gradients_of_keys(
    dq, q, dout, m, delta_factor, k_ptr, v_ptr, dk_ptr, dv_ptr, k_strides, v_strides, grad_strides,
    b, h, head, start_m: tl.constexpr, start_n, T, scale, scale_log2, seed, CHECK_T: tl.constexpr,
    THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores dK and dV of a tile of keys, and returns dQ / scale with its contribution.

    delta_factor: -(1 - p) delta of each row. m: here m + log2(l) + log2(1 - p), so that 2^(S - m)
    is P / (1 - p), and times delta_factor it is -P delta. Rows beyond T have dout = 0 and
    delta_factor = 0, and contribute nothing.
    """
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    cols = (start_n + tl.arange(0, BLOCK_N))[None, :]
    k = load_tile(k_ptr, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, CHECK_T)
    v = load_tile(v_ptr, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, CHECK_T)
    s = tl.dot(q, tl.trans(k)) * scale_log2  # (BLOCK_M, BLOCK_N)
    p = tl.where(cols <= rows, tl.exp2(s - m[:, None]), 0.0)
    z = p
    if THRESHOLD > 0:
        keep = philox.attention_keep(seed, head, start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD)
        z = tl.where(keep, p, 0.0)
    ds = tl.fma(z, tl.dot(dout, tl.trans(v)), p * delta_factor[:, None])
    if start_m == 0:
        ds = tl.where(rows > 0, ds, 0.0)  # see Precision in `attention_backward`
    z, ds = z.to(q.dtype), ds.to(q.dtype)
    if BLOCK_D < 64:
        dv = tl.dot(tl.trans(z), dout)
        dk = tl.dot(tl.trans(ds), q)
    else:  # transposed: a wgmma of sm_90 has 64 rows, which BLOCK_D has and BLOCK_N may not
        dv = tl.trans(tl.dot(tl.trans(dout), z))
        dk = tl.trans(tl.dot(tl.trans(q), ds))
    store_tile(scale * dk, dk_ptr, grad_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    store_tile(dv, dv_ptr, grad_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    return tl.dot(ds, k, dq)


def head_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, out: Tensor, stats: Tensor,
    packed: Tensor, dropout_p: float, scale: float, options: dict[str, int],
) -> None:  # fmt: skip
    """Writes the packed gradient. Shapes: see `attention_backward.causal_attention_bwd`, except
    that dout and out are (B, H, T, D). options: those of `attention_tiles.head_options`."""
    B, H, T, D = q.shape
    dq, dk, dv = launch.unpack(packed)
    # With fewer than 16 rows per warp, several warps would compute the same rows.
    least = 16 * options["num_warps"]
    BLOCK_M = max(launch.block(T), least)
    _bwd_head_kernel[(B * H,)](
        dout, q, k, v, out, *stats, seed, dq, dk, dv,
        dout.stride(), q.stride(), k.stride(), v.stride(), out.stride(), dq.stride(),
        H, T, scale, scale * math.log2(math.e),
        THRESHOLD=dropout.threshold(dropout_p), D=D, BLOCK_D=launch.block(D),
        BLOCK_M=BLOCK_M, SPLIT=T > BLOCK_M // 2 >= least,
        enable_fp_fusion=False,  # see Precision in `attention`
        **options,
    )  # fmt: skip
