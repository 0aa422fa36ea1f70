"""Causal self-attention, forward: exact, and without a T x T matrix in memory.

    out = causal_attention(q, k, v, dropout_p, seed, scale)          q, k, v, out: (B, H, T, D)

Forward, per row, over the columns up to the diagonal:

    S = scale q k^T     m = max S     l = sum exp(S - m)     P = exp(S - m) / l
    out = (P * keep / (1 - p)) v        keep: the dropout mask, 0 or 1; p: rounded, see `dropout`

Algorithm   Online softmax (Milakov and Gimelshein 2018; Dao, "FlashAttention-2", 2023): a program
            loops over tiles of keys and carries, for each row, the maximum m, the sum l and the
            unnormalized output. When a tile raises m, the carried l and output are rescaled by
            2^(m_old - m_new). Exponentials have base 2: log2(e) is folded into the scale, so S and
            m carry this factor. This m and log2(l) are saved. Dropout acts on the attention weights
            P and not on l, as in eager.
Backward    see `attention_backward`. It recomputes P from m and log2(l).
Diagonal    Tiles left of the diagonal need no mask. Tiles that the diagonal crosses are handled by
            a second, masked loop. Tiles right of the diagonal are never read.
Traffic     reads q, k and v and writes `out`: 4 B H T D elements together. It also writes m and
            log2(l), 8 bytes per row. k and v are read once per query tile, mostly from L2:
            neighbouring programs share a head.
Parallelism one program per head and query tile; the longest rows of a head come first.
Precision   Scores, softmax and accumulators are in float32; P, before its division by l, is rounded
            to the input dtype for its matmul with v. The multiplication by the scale and the
            subtraction of m must not become a fused multiply-add. m is the largest product after
            rounding. A fused multiply-add would not round the product in S - m, so for the largest
            score S - m would be a rounding error and not 0. In a row of huge scores this error is
            so large that 2^(S - m) overflows. m and log2(l) are stored separately: if m is large,
            their rounded sum loses digits of log2(l), and all P of the row are wrong by the same
            factor. In float32 the backward therefore subtracts first m and then log2(l) from S. For
            16-bit inputs, whose own rounding is far coarser, it subtracts the rounded sum
            (`attention_tiles.load_stats`).
Packed      `causal_attention_packed` runs the same kernels on views of qkv, (B, T, 3, H, D), and
            its backward writes the three gradients into one tensor. If a model instead splits qkv
            and passes q, k and v separately, autograd stacks their gradients again, which moves 6 B
            H T D elements more.
Limits      D is a multiple of 16 from 16 to 128; 48, 80, 96 and 112 are padded in registers.
Spec        irongpt_kernels/eager.py::causal_attention
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused import attention_tiles, philox
from irongpt_kernels.fused.attention_backward import backward_op
from irongpt_kernels.fused.attention_tiles import load_tile, store_tile
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import autocast, custom_op


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, m_ptr, log_l_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, H, T, scale_log2,
    THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    query_tiles = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // query_tiles
    start_m = (query_tiles - 1 - tl.program_id(0) % query_tiles) * BLOCK_M
    b, h = head // H, head % H
    seed = tl.load(seed_ptr)
    q = load_tile(q_ptr, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D, True)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N  # every row sees the keys before this one
    for start_n in range(0, diagonal, BLOCK_N):
        m, l, acc = _attend(  # noqa: E741
            m, l, acc, q, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m, start_n, T,
            scale_log2, seed, False, THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start_n in range(diagonal, tl.minimum(start_m + BLOCK_M, T), BLOCK_N):
        m, l, acc = _attend(  # noqa: E741
            m, l, acc, q, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m, start_n, T,
            scale_log2, seed, True, THRESHOLD, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    keep_scale = 256 / (256 - THRESHOLD)
    out = acc * (keep_scale / l)[:, None]  # div_rn would spill on sm_90
    store_tile(out, out_ptr, out_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    at = tl.cast(head, tl.int64) * T + rows
    tl.store(m_ptr + at, m, mask=rows < T)
    tl.store(log_l_ptr + at, tl.log2(l), mask=rows < T)


@triton.jit
def _attend(
    m, l, acc, q, k_ptr, v_ptr, k_strides, v_strides, b, h, head, start_m, start_n, T,  # noqa: E741
    scale_log2, seed, DIAGONAL: tl.constexpr, THRESHOLD: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Updates m, l and acc by one tile of keys. DIAGONAL: the diagonal crosses the tile."""
    rows = (start_m + tl.arange(0, BLOCK_M))[:, None]
    cols = (start_n + tl.arange(0, BLOCK_N))[None, :]
    k = load_tile(k_ptr, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, DIAGONAL)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # (BLOCK_M, BLOCK_N)
    if DIAGONAL:
        s = tl.where(cols <= rows, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))  # finite: the first tile has column 0, which all rows see
    p = tl.exp2(s - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    l = l * rescale + tl.sum(p, 1)  # noqa: E741
    if THRESHOLD > 0:
        keep = philox.attention_keep(seed, head, start_m, start_n, BLOCK_M, BLOCK_N, THRESHOLD)
        p = tl.where(keep, p, 0.0)
    v = load_tile(v_ptr, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D, DIAGONAL)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return m_new, l, acc


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized results of `causal_attention_fwd`."""
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(2, B, H, T, dtype=torch.float32)


def causal_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns out, (B, T, H, D), and m and log2(l) in one tensor, (2, B, H, T) float32."""
    B, H, T, D = q.shape
    out, stats = _empty_outputs(q)
    if out.numel() == 0:
        return out, stats
    config = attention_tiles.launch_options("forward", q.device, D, q.element_size())
    grid = (B * H * triton.cdiv(T, config["BLOCK_M"]),)
    _fwd_kernel[grid](
        q, k, v, out, *stats, seed,
        q.stride(), k.stride(), v.stride(), out.transpose(1, 2).stride(),
        H, T, scale * math.log2(math.e),
        THRESHOLD=dropout.threshold(dropout_p), D=D, BLOCK_D=launch.block(D),
        enable_fp_fusion=False, **config,
    )  # fmt: skip
    return out, stats


def _packed_fwd(qkv: Tensor, seed: Tensor, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = launch.unpack(qkv)
    return causal_attention_fwd(q, k, v, seed, dropout_p, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """The backward of both ops. The saved tensors begin with q, k and v, or with qkv."""
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    *qkv, seed, out, stats = ctx.saved_tensors
    q, k, v = launch.unpack(qkv[0]) if len(qkv) == 1 else qkv
    packed = backward_op(dout, q, k, v, seed, out, stats, ctx.dropout_p, ctx.scale)
    return *([packed] if len(qkv) == 1 else launch.unpack(packed)), None, None, None


_op = custom_op(
    "causal_attention", causal_attention_fwd, lambda q, *_: _empty_outputs(q),
    (), _setup_context, _backward,
)  # fmt: skip
_packed_op = custom_op(
    "causal_attention_packed", _packed_fwd, lambda qkv, *_: _empty_outputs(launch.unpack(qkv)[0]),
    (), _setup_context, _backward,
)  # fmt: skip


def check_options(
    name: str, q: Tensor, dropout_p: float, seed: "int | Tensor | None", scale: float | None
) -> tuple[Tensor, float]:
    """Returns the seed as a tensor and the scale as a float, after checking the arguments that both
    ops share. q: the tensor argument called `name`, of shape (..., D)."""
    checks.dropout(dropout_p, seed, **{name: q})
    checks.head_dimension(name, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return launch.seed_tensor(seed, q.device), scale


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.causal_attention`. Autocast casts the inputs, as for PyTorch's attention."""
    checks.tensors(q=q, k=k, v=v)
    checks.shape("BHTD", q=q)
    checks.shape(q.shape, k=k, v=v)
    seed, scale = check_options("q", q, dropout_p, seed, scale)
    q, k, v = autocast(q, k, v)
    checks.same_dtype(q=q, k=k, v=v)
    return _op(q, k, v, seed, float(dropout_p), scale)[0].transpose(1, 2)


def causal_attention_packed(
    qkv: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.causal_attention_packed`. Autocast: see `causal_attention`."""
    checks.tensors(qkv=qkv)
    checks.shape(("B", "T", 3, "H", "D"), qkv=qkv)
    seed, scale = check_options("qkv", qkv, dropout_p, seed, scale)
    (qkv,) = autocast(qkv)
    return _packed_op(qkv, seed, float(dropout_p), scale)[0]
