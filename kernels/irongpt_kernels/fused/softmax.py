"""Softmax of scaled scores along the last dimension, forward and backward, optionally causal.

    y = softmax(x, scale=s, causal=c)         x, y: (..., N); causal: (..., T, T)

Forward, per row:   a = s x; with a causal mask, row i of a T x T block sees columns 0 to i only
                    m = max(a)    y = exp(a - m) / sum(exp(a - m)), and y = 0 for masked columns
Backward, per row:  y is recomputed in float32    delta = sum(dy * y)    dx = s * y * (dy - delta)

Traffic     The forward reads x and writes y: 2MN elements. The backward reads x and dy and writes
            dx: 3MN. Masked columns are not read, except those in the same aligned group of 16 as a
            visible one, so that a thread can still issue vector loads. Rows longer than MAX_BLOCK
            are read more than once: 3MN in total forward, 7MN backward.
Parallelism Rows of at most MAX_BLOCK columns fit in registers: a program handles BLOCK_M rows.
            For longer rows a program loops over one row, ONLINE_BLOCK columns at a time (online
            softmax; Milakov and Gimelshein 2018). The first loop computes m and the sums, and
            rescales the sums when m grows. Each of the ONLINE_BLOCK positions keeps a separate
            maximum and sums, which are combined after the loop. The last loop computes y or dx. The
            backward has one more loop in between, for the rounding error of delta.
Precision   float32 between load and store. For the backward x is saved and not y: a y rounded to
            float16 does not sum to 1, has few digits below 6e-5 and none below 3e-8, and dx
            computed from it had up to 46 times the error of eager. If one column has nearly all the
            weight, dy - delta cancels, so the rounding error of delta is estimated and subtracted
            too.
Limits      x and dy are used as matrices with any strides; a tensor whose leading dimensions do
            not collapse to one stride is copied first. A row without a finite visible score is
            NaN, as in PyTorch.
Spec        irongpt_kernels/eager.py::softmax
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.exponential import exp
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

MAX_BLOCK = 16384  # the longest row held in registers: 16 warps, 32 values a thread
ONLINE_BLOCK = 4096
TILE = 1024  # elements per program if rows are short: 2 warps


@triton.jit
def _softmax_of_rows(x_ptr, rows, cols, M, N, x_strides, scale, CAUSAL: tl.constexpr):
    """y in float32, and two (BLOCK_M, BLOCK_N) masks: the visible and the loaded elements."""
    seen = cols < N
    load = seen & (rows < M)
    if CAUSAL:
        seen = seen & (cols <= rows % N)
        # The mask is equal for 16 aligned columns, so loads stay 128 bits wide.
        load = load & (cols // 16 * 16 <= rows % N)
    x = tl.load(x_ptr + rows * x_strides[0] + cols * x_strides[1], mask=load, other=0.0)
    a = tl.where(seen, x.to(tl.float32) * scale, float("-inf"))
    e = exp(a - tl.max(a, axis=1)[:, None])
    return e * tl.div_rn(1.0, tl.sum(e, axis=1))[:, None], seen, load


@triton.jit
def _fwd_kernel(
    x_ptr, y_ptr, M, N, x_strides, scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)  # int64: M N can exceed 2^31
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    y, _, _ = _softmax_of_rows(x_ptr, rows, cols, M, N, x_strides, scale, CAUSAL)
    tl.store(y_ptr + rows * N + cols, y, mask=(rows < M) & (cols < N))


@triton.jit
def _bwd_kernel(
    x_ptr, dy_ptr, dx_ptr, M, N, x_strides, dy_strides, scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    y, seen, load = _softmax_of_rows(x_ptr, rows, cols, M, N, x_strides, scale, CAUSAL)
    dy = tl.load(dy_ptr + rows * dy_strides[0] + cols * dy_strides[1], mask=load, other=0.0)
    dy = tl.where(seen, dy.to(tl.float32), 0.0)
    dy -= tl.sum(dy * y, axis=1)[:, None]
    dy -= tl.sum(dy * y, axis=1)[:, None]  # subtracts the rounding error of delta
    dx = tl.where(seen, scale * y * dy, 0.0)
    tl.store(dx_ptr + rows * N + cols, dx, mask=(rows < M) & (cols < N))


@triton.jit
def _end(row, N, CAUSAL: tl.constexpr):
    """One past the last visible column of the row."""
    end = tl.zeros((), dtype=tl.int64) + N
    if CAUSAL:
        end = row % N + 1
    return end


@triton.jit
def _row_statistics(x_row, dy_row, x_stride, dy_stride, end, scale, BLOCK_N: tl.constexpr):
    """m, sum(exp(a - m)) and sum(dy exp(a - m)) of a row. dy_row is None in the forward."""
    m = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_row + cols * x_stride, mask=cols < end, other=0.0)
        a = tl.where(cols < end, x.to(tl.float32) * scale, float("-inf"))
        m_new = tl.maximum(m, a)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
        e = exp(a - shift)
        rescale = exp(m - shift)
        total = total * rescale + e
        if dy_row is not None:
            dy = tl.load(dy_row + cols * dy_stride, mask=cols < end, other=0.0)
            weighted = weighted * rescale + dy.to(tl.float32) * e
        m = m_new
    m_row = tl.max(m, axis=0)
    rescale = exp(m - m_row)
    return m_row, tl.sum(total * rescale, axis=0), tl.sum(weighted * rescale, axis=0)


@triton.jit
def _fwd_online_kernel(
    x_ptr, y_ptr, N, x_strides, scale,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = _end(row, N, CAUSAL)
    x_row = x_ptr + row * x_strides[0]
    m, total, _ = _row_statistics(x_row, None, x_strides[1], 0, end, scale, BLOCK_N)
    inverse = tl.div_rn(1.0, total)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_row + cols * x_strides[1], mask=cols < end, other=0.0)
        y = tl.where(cols < end, exp(x.to(tl.float32) * scale - m) * inverse, 0.0)
        tl.store(y_ptr + row * N + cols, y, mask=cols < N)


@triton.jit
def _bwd_online_kernel(
    x_ptr, dy_ptr, dx_ptr, N, x_strides, dy_strides, scale,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = _end(row, N, CAUSAL)
    x_row = x_ptr + row * x_strides[0]
    dy_row = dy_ptr + row * dy_strides[0]
    m, total, weighted = _row_statistics(
        x_row, dy_row, x_strides[1], dy_strides[1], end, scale, BLOCK_N
    )
    inverse = tl.div_rn(1.0, total)
    delta = weighted * inverse
    delta_error = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_row + cols * x_strides[1], mask=cols < end, other=0.0)
        dy = tl.load(dy_row + cols * dy_strides[1], mask=cols < end, other=0.0).to(tl.float32)
        y = tl.where(cols < end, exp(x.to(tl.float32) * scale - m) * inverse, 0.0)
        delta_error += y * (dy - delta)
    delta_error_row = tl.sum(delta_error, axis=0)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_row + cols * x_strides[1], mask=cols < end, other=0.0)
        dy = tl.load(dy_row + cols * dy_strides[1], mask=cols < end, other=0.0).to(tl.float32)
        y = exp(x.to(tl.float32) * scale - m) * inverse
        dx = tl.where(cols < end, scale * y * (dy - delta - delta_error_row), 0.0)
        tl.store(dx_ptr + row * N + cols, dx, mask=cols < N)


def softmax_fwd(x: Tensor, scale: float, causal: bool) -> Tensor:
    """x: (..., N), or (..., N, N) if causal, any strides. Returns a contiguous y."""
    y, x = x.new_empty(x.shape), launch.as_matrix(x)
    if y.numel():
        M, N = x.shape
        if N <= MAX_BLOCK:
            options = launch.row_options(N, MAX_BLOCK, TILE)
            grid = (triton.cdiv(M, options["BLOCK_M"]),)
            _fwd_kernel[grid](x, y, M, N, x.stride(), scale, CAUSAL=causal, **options)
        else:
            _fwd_online_kernel[(M,)](x, y, N, x.stride(), scale, CAUSAL=causal, **_online_options())
    return y


def softmax_bwd(dy: Tensor, x: Tensor, scale: float, causal: bool) -> Tensor:
    """dy, x: of one shape, any strides; x is the input of the forward. Returns a contiguous dx."""
    dx, dy, x = x.new_empty(x.shape), launch.as_matrix(dy), launch.as_matrix(x)
    if dx.numel():
        (M, N), numbers = x.shape, (x.stride(), dy.stride(), scale)
        if N <= MAX_BLOCK:
            options = launch.row_options(N, MAX_BLOCK, TILE)
            grid = (triton.cdiv(M, options["BLOCK_M"]),)
            _bwd_kernel[grid](x, dy, dx, M, N, *numbers, CAUSAL=causal, **options)
        else:
            _bwd_online_kernel[(M,)](x, dy, dx, N, *numbers, CAUSAL=causal, **_online_options())
    return dx


def _online_options() -> dict[str, int]:
    """Launch options of the online kernels, without fused multiply-adds: m is the largest rounded
    product scale * x. At the column of the maximum, scale * x - m is exactly 0 only if the product
    is rounded before the subtraction."""
    return dict(BLOCK_N=ONLINE_BLOCK, num_warps=launch.warps(ONLINE_BLOCK), enable_fp_fusion=False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return _backward_op(dy, x, ctx.scale, ctx.causal), None, None


_op = custom_op(
    "softmax", softmax_fwd, lambda x, *_: x.new_empty(x.shape), (), _setup_context, _backward
)
_backward_op = custom_op("softmax_backward", softmax_bwd, lambda dy, x, *_: x.new_empty(x.shape))


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """See `eager.softmax`."""
    checks.tensors(x=x)
    if not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {scale!r}")
    checks.rows(x=x)
    if causal and x.shape[-2:] != 2 * x.shape[-1:]:
        raise ValueError(f"a causal x must be (..., T, T), got shape {tuple(x.shape)}")
    return _op(x, float(scale), bool(causal))
