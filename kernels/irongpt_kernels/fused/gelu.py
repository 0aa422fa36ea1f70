"""
GELU of a sum, in the tanh approximation, forward and backward.

    y = gelu(x, b)                        x, y: (..., N)      b: (N,) or none

Forward     z = x + b      u = sqrt(2/pi) (z + 0.044715 z^3)
            y = z/2 (1 + tanh u) = z s, where s = 1 / (1 + exp(-2u)) is the logistic function
Backward    du = sqrt(2/pi) (1 + 3 * 0.044715 z^2)
            dx = dy (s + 2 z s (1 - s) du)      db = dx summed over rows

Traffic     fwd reads x, writes y: 2MN elements. bwd reads x, dy, writes dx: 3MN; s is recomputed.
Parallelism fwd: a program per tile. bwd: P programs share the rows of each block of columns, and
            each keeps its db in registers; the (P, N) partials are summed afterwards. No atomics:
            the result is the same on every run.
Precision   float32 between load and store. s from exp(-|2u|), which cannot overflow, and
            s (1 - s) without a difference: for z << 0 all digits hold, where 1 + tanh u loses them.
Limits      x and dy are read through two strides, row and column; leading dimensions that no
            single stride describes are copied.
Spec        irongpt_kernels/eager.py::gelu
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import checks, launch, launch_table
from irongpt_kernels.runtime.launch import matrix

BLOCK_N = 256
BLOCK_M = 4
PROGRAMS_PER_SM = 8  # of the backward: enough loads in flight, and few partials


@triton.jit
def _logistic(z):
    """s = logistic(2u), s (1 - s) and 2 du."""
    # Beyond 30 s is 0 or 1 in float32, and z^3 would overflow. Comparisons let a NaN through.
    z = tl.where(z > 30.0, 30.0, tl.where(z < -30.0, -30.0, z))
    u2 = 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)  # 2 sqrt(2/pi)
    e = tl.exp(-tl.abs(u2))
    r = 1.0 / (1.0 + e)
    return tl.where(u2 >= 0.0, 1.0, e) * r, e * r * r, 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@triton.jit
def _fwd_kernel(
    x_ptr, b_ptr, y_ptr, M, N, x_stride_m, x_stride_n, b_stride,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # int64: M N may pass 2^31
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (cols < N)
    z = tl.load(x_ptr + rows * x_stride_m + cols * x_stride_n, mask=mask, other=0.0)
    z = z.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if BIAS:
        z += tl.load(b_ptr + cols * b_stride, mask=cols < N, other=0.0).to(tl.float32)
    s, _, _ = _logistic(z)
    tl.store(y_ptr + rows * N + cols, z * s, mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, db_ptr,
    M, N, dy_stride_m, dy_stride_n, x_stride_m, x_stride_n, b_stride,
    BIAS: tl.constexpr, SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, col_tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    if BIAS:
        b = tl.load(b_ptr + cols * b_stride, mask=cols < N, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for row_tile in range(part, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tl.cast(row_tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < M) & (cols < N)
        z = tl.load(x_ptr + rows * x_stride_m + cols * x_stride_n, mask=mask, other=0.0)
        z = z.to(tl.float32)
        if BIAS:
            z += b
        dy = tl.load(dy_ptr + rows * dy_stride_m + cols * dy_stride_n, mask=mask, other=0.0)
        s, slope, du2 = _logistic(z)
        dx = dy.to(tl.float32) * (s + z * slope * du2)
        tl.store(dx_ptr + rows * N + cols, dx, mask=mask)
        db += dx

    if SUM:
        partial = tl.sum(db, axis=0)[None, :]
        tl.store(db_ptr + tl.cast(part, tl.int64) * N + cols, partial, mask=cols < N)


def gelu_fwd(x: Tensor, b: Tensor | None) -> Tensor:
    """x: (M, N), b: (N,), any strides. Returns a contiguous (M, N)."""
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel():
        tile = launch_table.options("gelu forward", N, x.element_size(), x.device, _tile())
        grid = (triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(N, tile["BLOCK_N"]))
        with launch.on(x.device):
            _fwd_kernel[grid](x, b, y, M, N, *x.stride(), _stride(b), BIAS=b is not None, **tile)
    return y


def gelu_bwd(dy: Tensor, x: Tensor, b: Tensor | None, bias_grad: bool) -> tuple[Tensor, Tensor]:
    """dy, x: (M, N), any strides. Returns dx, (M, N), and db, (N,), or (0,) if not asked for."""
    M, N = x.shape
    shipped = _tile() | dict(programs_per_sm=PROGRAMS_PER_SM)
    tile = dict(launch_table.options("gelu backward", N, x.element_size(), x.device, shipped))
    col_tiles = triton.cdiv(N, tile["BLOCK_N"])
    programs = tile.pop("programs_per_sm") * launch.num_sms(x.device)
    P = min(triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(programs, max(1, col_tiles)))
    dx = torch.empty((M, N), dtype=x.dtype, device=x.device)
    db = torch.empty((P, N if bias_grad else 0), dtype=torch.float32, device=x.device)
    if dx.numel():
        with launch.on(x.device):
            _bwd_kernel[(P, col_tiles)](
                dy, x, b, dx, db, M, N, *dy.stride(), *x.stride(), _stride(b),
                BIAS=b is not None, SUM=bias_grad, **tile,
            )  # fmt: skip
    return dx, db.sum(0).to(x.dtype if b is None else b.dtype)


def _stride(b: Tensor | None) -> int:
    return 0 if b is None else b.stride(0)


def _tile() -> dict[str, int]:
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=launch.warps(BLOCK_M * BLOCK_N))


@torch.library.custom_op("irongpt::gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return gelu_fwd(matrix(x), bias).view(x.shape)


@torch.library.custom_op("irongpt::gelu_backward", mutates_args=())
def _gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    dx, db = gelu_bwd(matrix(dy), matrix(x), bias, bias_grad)
    return dx.view(x.shape), db


@_gelu.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_gelu_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, bias_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if bias is None else bias.dtype
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if bias_grad else 0, dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    need_x, need_bias = ctx.needs_input_grad
    dx, db = _gelu_backward(dy, *ctx.saved_tensors, need_bias)
    return dx if need_x else None, db if need_bias else None


_gelu.register_autograd(_backward, setup_context=_setup_context)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `eager.gelu`, and the docstring of this module.

    Raises TypeError for what is no floating tensor, ValueError for shapes and devices.
    """
    checks.floating(x=x, optional=dict(bias=bias))
    checks.rank("x", x, 1, 64)
    checks.shape("bias", bias, (x.shape[-1],))
    return _gelu(x, bias)
