"""GELU of x plus an optional bias, in the tanh approximation, forward and backward.

    y = gelu(x, bias)                     x, y: (..., N)      bias: (N,) or None

Forward     z = x + bias      u = sqrt(2/pi) (z + 0.044715 z^3)
            y = z/2 (1 + tanh u) = z s, where s = 1 / (1 + exp(-2u)) is the logistic function
Backward    du/dz = sqrt(2/pi) (1 + 3 * 0.044715 z^2)
            dx = dy (s + 2 z s (1 - s) du/dz)      dbias = dx summed over rows

Traffic     The forward reads x and writes y: 2MN elements. The backward reads x and dy and writes
            dx: 3MN; it recomputes s.
Parallelism One program per tile, except in a backward with dbias: there P programs share the rows
            of each block of columns, each accumulates dbias in registers, and the (P, N) partial
            sums are added afterwards.
Precision   float32 between load and store. s is computed from exp(-|2u|), which cannot overflow,
            and s (1 - s) without a subtraction, so that for large negative z neither loses digits
            by cancellation, as 1 + tanh u would.
Limits      x and dy are used as matrices with any strides; a tensor whose leading dimensions do
            not collapse to one stride is copied first.
Spec        irongpt_kernels/eager.py::gelu
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import checks, launch, launch_table
from irongpt_kernels.runtime.custom_op import custom_op

BLOCK_N = 256
BLOCK_M = 4
PROGRAMS_PER_SM = 8  # of a backward with dbias; fewer programs mean fewer partial sums


@triton.jit
def gelu_factors(z):
    """Returns s, s (1 - s) and 2 du/dz for z, as in the module's docstring."""
    # For |z| > 30, s is 0 or 1 in float32, and z^3 could overflow. tl.where keeps a NaN.
    z = tl.where(z > 30.0, 30.0, tl.where(z < -30.0, -30.0, z))
    u2 = 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)  # 2 sqrt(2/pi)
    e = tl.exp(-tl.abs(u2))
    w = 1.0 + e
    r = 1.0 / w
    r = tl.fma(r, tl.fma(-w, r, 1.0), r)  # Newton's step; tl.div_rn takes twice the registers
    return tl.where(u2 >= 0.0, 1.0, e) * r, e * r * r, 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@triton.jit
def _fwd_kernel(
    x_ptr, bias_ptr, y_ptr, M, N, x_strides, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    row_tile, col_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # int64: M N can exceed 2^31
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M) & (cols < N)
    z = tl.load(x_ptr + rows * x_strides[0] + cols * x_strides[1], mask=mask, other=0.0)
    z = z.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    s, _, _ = gelu_factors(z)
    tl.store(y_ptr + rows * N + cols, z * s, mask=mask)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, M, N, dy_strides, x_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, col_tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for row_tile in range(part, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tl.cast(row_tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < M) & (cols < N)
        z = tl.load(x_ptr + rows * x_strides[0] + cols * x_strides[1], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if bias_ptr is not None:
            z += bias
        dy = tl.load(dy_ptr + rows * dy_strides[0] + cols * dy_strides[1], mask=mask, other=0.0)
        s, slope, du2 = gelu_factors(z)
        dx = dy.to(tl.float32) * (s + z * slope * du2)
        tl.store(dx_ptr + rows * N + cols, dx, mask=mask)
        dbias += dx

    if bias_ptr is not None:
        partial = tl.sum(dbias, axis=0)[None, :]
        tl.store(dbias_ptr + tl.cast(part, tl.int64) * N + cols, partial, mask=cols < N)


def gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., N), bias: (N,), any strides. Returns a contiguous y."""
    y, x = x.new_empty(x.shape), launch.as_matrix(x)
    if y.numel():
        (M, N), options = x.shape, _launch_options("gelu forward", x)
        grid = (triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"]))
        _fwd_kernel[grid](x, launch.contiguous(bias), y, M, N, x.stride(), **options)
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy, x: (..., N), any strides. Returns a contiguous dx; and dbias, (N,) float32, empty without
    a bias."""
    dx, dy, x = x.new_empty(x.shape), launch.as_matrix(dy), launch.as_matrix(x)
    (M, N), options = x.shape, _launch_options("gelu backward", x)
    col_tiles = triton.cdiv(N, options["BLOCK_N"])
    P = triton.cdiv(M, options["BLOCK_M"])
    if bias is not None:
        programs = PROGRAMS_PER_SM * launch.num_sms(x.device)
        P = min(P, triton.cdiv(programs, max(1, col_tiles)))
    dbias = x.new_empty((P, 0 if bias is None else N), dtype=torch.float32)
    if dx.numel():
        bias = launch.contiguous(bias)
        _bwd_kernel[(P, col_tiles)](
            dy, x, bias, dx, dbias, M, N, dy.stride(), x.stride(), **options
        )
    return dx, dbias.sum(0)


def _launch_options(kernel: str, x: Tensor) -> dict[str, int]:
    default = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=launch.warps(BLOCK_M * BLOCK_N))
    return launch_table.options(kernel, x.shape[1], x.element_size(), x.device, default)


def _fake_bwd(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    N = 0 if bias is None else len(bias)
    return x.new_empty(x.shape), x.new_empty(N, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = _backward_op(dy, x, bias)
    return dx, None if bias is None else dbias


_op = custom_op("gelu", gelu_fwd, lambda x, _: x.new_empty(x.shape), (), _setup_context, _backward)
_backward_op = custom_op("gelu_backward", gelu_bwd, _fake_bwd)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `eager.gelu`."""
    checks.tensors(x=x, optional=dict(bias=bias))
    checks.rows(x=x)
    checks.shape(x.shape[-1:], bias=bias)
    return _op(x, bias)
