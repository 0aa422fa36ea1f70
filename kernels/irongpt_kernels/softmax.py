"""
Softmax of scaled scores along the last dimension, forward and backward, causal if asked.

    y = softmax(x, scale=s, causal=c)         x, y: (..., N); causal: (..., T, T)

Forward, per row:   a = s x, where row i of a causal T x T block sees only columns 0 to i
                    m = max(a)    y = exp(a - m) / sum(exp(a - m)), 0 where nothing is seen
Backward, per row:  p = y / sum(y)    delta = sum(dy * p)    dx = s * p * (dy - delta)

Traffic     fwd reads x, writes y: 2MN elements. bwd reads y, dy, writes dx: 3MN. What a causal
            row does not see is not read. Above MAX_BLOCK columns: 3MN and 7MN.
Parallelism Rows that fit in registers: a program owns BLOCK_M whole rows. Longer ones: a program
            walks its row twice, first for m and the sum (online: the sum is rescaled whenever m
            grows; Milakov and Gimelshein 2018), then for y. bwd walks it three times.
Precision   float32 between load and store. y alone is saved, in the dtype of x. A rounded y does
            not sum to 1, and in a confident row, where dy - delta is all cancellation, that
            would be an error of 100 %: so bwd divides by its sum, and takes delta off twice,
            the second time what rounding left of it.
Limits      rows of x and dy are read through their strides; leading dimensions that no single
            stride describes are copied. A row that sees no finite score is NaN, as in PyTorch.
            In float16 y loses digits below 6e-5, and dx loses them with it.
Spec        irongpt_kernels/eager.py::softmax
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import checks, launch

MAX_BLOCK = 16384  # the longest row held in registers: 16 warps, 32 values a thread
ONLINE_BLOCK = 4096
TILE = 1024  # elements of a program whose rows are short: 2 warps


@triton.jit
def _fwd_kernel(
    x_ptr, y_ptr, M, N, x_stride_m, x_stride_n, scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)  # int64: M N passes 2^31 on big batches
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    seen = cols < N
    if CAUSAL:
        seen = seen & (cols <= rows % N)
    x = tl.load(x_ptr + rows * x_stride_m + cols * x_stride_n, mask=seen & (rows < M), other=0.0)
    a = tl.where(seen, x.to(tl.float32) * scale, float("-inf"))  # (BLOCK_M, BLOCK_N)
    e = tl.exp(a - tl.max(a, axis=1)[:, None])
    y = e / tl.sum(e, axis=1)[:, None]
    tl.store(y_ptr + rows * N + cols, y, mask=(rows < M) & (cols < N))


@triton.jit
def _bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, M, N, dy_stride_m, dy_stride_n, scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    inside = (rows < M) & (cols < N)
    seen = inside
    if CAUSAL:
        seen = inside & (cols <= rows % N)
    y = tl.load(y_ptr + rows * N + cols, mask=seen, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_stride_m + cols * dy_stride_n, mask=seen, other=0.0)
    dy = dy.to(tl.float32)
    total = tl.where(rows < M, tl.sum(y, axis=1)[:, None], 1.0)  # no 0 / 0 in rows past the end
    dy -= tl.sum(dy * y, axis=1)[:, None] / total
    dy -= tl.sum(dy * y, axis=1)[:, None] / total  # what rounding left of delta
    dx = scale / total * y * dy
    tl.store(dx_ptr + rows * N + cols, dx, mask=inside)


@triton.jit
def _end(row, N, CAUSAL: tl.constexpr):
    """One past the last column that the row sees."""
    end = tl.zeros((), dtype=tl.int64) + N
    if CAUSAL:
        end = row % N + 1
    return end


@triton.jit
def _fwd_online_kernel(
    x_ptr, y_ptr, N, x_stride_m, x_stride_n, scale,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = _end(row, N, CAUSAL)
    m = float("-inf")
    total = 0.0
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_ptr + row * x_stride_m + cols * x_stride_n, mask=cols < end, other=0.0)
        a = tl.where(cols < end, x.to(tl.float32) * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(a, axis=0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf would be NaN
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(a - shift), axis=0)
        m = m_new
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        x = tl.load(x_ptr + row * x_stride_m + cols * x_stride_n, mask=cols < end, other=0.0)
        y = tl.where(cols < end, tl.exp(x.to(tl.float32) * scale - m) / total, 0.0)
        tl.store(y_ptr + row * N + cols, y, mask=cols < N)


@triton.jit
def _bwd_online_kernel(
    y_ptr, dy_ptr, dx_ptr, N, dy_stride_m, dy_stride_n, scale,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    end = _end(row, N, CAUSAL)
    total = 0.0
    delta = 0.0
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        y = tl.load(y_ptr + row * N + cols, mask=cols < end, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride_m + cols * dy_stride_n, mask=cols < end, other=0.0)
        total += tl.sum(y, axis=0)
        delta += tl.sum(dy.to(tl.float32) * y, axis=0)
    delta = delta / total
    left = 0.0  # what rounding left of delta
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        y = tl.load(y_ptr + row * N + cols, mask=cols < end, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride_m + cols * dy_stride_n, mask=cols < end, other=0.0)
        left += tl.sum((dy.to(tl.float32) - delta) * y, axis=0)
    left = left / total
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N).to(tl.int64)
        y = tl.load(y_ptr + row * N + cols, mask=cols < end, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride_m + cols * dy_stride_n, mask=cols < end, other=0.0)
        dx = scale / total * y * (dy.to(tl.float32) - delta - left)
        tl.store(dx_ptr + row * N + cols, dx, mask=cols < N)


def softmax_fwd(x: Tensor, scale: float, causal: bool) -> Tensor:
    """x: (M, N), any strides; causal: M a multiple of N. Returns a contiguous (M, N)."""
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    with launch.on(x.device):
        if N <= MAX_BLOCK:
            grid, tile = _whole_rows(M, N)
            _fwd_kernel[grid](x, y, M, N, *x.stride(), scale, CAUSAL=causal, **tile)
        else:
            _fwd_online_kernel[(M,)](x, y, N, *x.stride(), scale, CAUSAL=causal, **_blocks())
    return y


def softmax_bwd(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    """dy: (M, N), any strides. y: (M, N), contiguous. Returns a contiguous (M, N)."""
    M, N = y.shape
    dx = torch.empty_like(y)
    if y.numel() == 0:
        return dx
    with launch.on(y.device):
        if N <= MAX_BLOCK:
            grid, tile = _whole_rows(M, N)
            _bwd_kernel[grid](y, dy, dx, M, N, *dy.stride(), scale, CAUSAL=causal, **tile)
        else:
            _bwd_online_kernel[(M,)](y, dy, dx, N, *dy.stride(), scale, CAUSAL=causal, **_blocks())
    return dx


def _whole_rows(M: int, N: int) -> tuple[tuple[int], dict[str, int]]:
    block_n = launch.block(N)
    block_m = max(1, TILE // block_n)
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=launch.warps(block_m * block_n))
    return (triton.cdiv(M, block_m),), tile


def _blocks() -> dict[str, int]:
    return dict(BLOCK_N=ONLINE_BLOCK, num_warps=launch.warps(ONLINE_BLOCK))


def _matrix(x: Tensor) -> Tensor:
    """x as (M, N): a view where one stride leads from row to row, else a copy."""
    N = x.shape[-1]
    return x.reshape(x.numel() // N if N else 0, N)


@torch.library.custom_op("irongpt::softmax", mutates_args=())
def _softmax(x: Tensor, scale: float, causal: bool) -> Tensor:
    return softmax_fwd(_matrix(x), scale, causal).view(x.shape)


@torch.library.custom_op("irongpt::softmax_backward", mutates_args=())
def _softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    return softmax_bwd(_matrix(dy), _matrix(y), scale, causal).view(y.shape)


@_softmax.register_fake
def _(x: Tensor, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape)


@_softmax_backward.register_fake
def _(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    return y.new_empty(y.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _backward(ctx, dy):
    (y,) = ctx.saved_tensors
    return _softmax_backward(dy, y, ctx.scale, ctx.causal), None, None


_softmax.register_autograd(_backward, setup_context=_setup_context)


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """See `eager.softmax`, and the docstring of this module.

    Raises TypeError for what is no floating tensor or no number, ValueError for a shape.
    """
    checks.floating(x=x)
    if not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {scale!r}")
    checks.rank("x", x, 2 if causal else 1, 64)
    if causal and x.shape[-2] != x.shape[-1]:
        raise ValueError(f"a causal x must be (..., T, T), got shape {tuple(x.shape)}")
    return _softmax(x, float(scale), bool(causal))


def softmax_bytes(M: int, N: int, itemsize: int, mode: str, causal: bool = False) -> int:
    """Least bytes that must cross DRAM, mode fwd or bwd. A causal row reads what it sees."""
    seen = M * (N + 1) // 2 if causal else M * N
    return ({"fwd": 1, "bwd": 2}[mode] * seen + M * N) * itemsize
