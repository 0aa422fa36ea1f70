"""
Layer normalization over the last dimension, forward and backward.

    y = layer_norm(x, weight, bias, eps)        x, y: (..., N)        weight, bias: (N,)

Forward, per row:   mean = sum(x) / N       rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
                    xhat = (x - mean) rstd              y = xhat weight + bias
Backward, per row:  g = dy weight is the gradient that reaches xhat. Both statistics depend on the
                    whole row, so two projections come off it:
                    dx = rstd (g - sum(g) / N - xhat sum(g xhat) / N)
        over rows:  dweight = sum(dy xhat)      dbias = sum(dy)

Traffic     Forward reads x and writes y: 2MN elements. Backward reads x and dy and writes dx: 3MN.
            xhat is recomputed from (mean, rstd), 8 bytes a row, and not saved.
Parallelism A program holds BLOCK_M whole rows in registers, several where rows are short. Rows of
            up to 1023 elements get one warp: no barrier stands in their sums. Forward: a program
            per block of rows. Backward: as many programs as the GPU holds at a time; each strides
            over the blocks and keeps its own dweight and dbias, and the (P, N) partials are summed
            afterwards. No atomics: two runs give the same bits.
Precision   Loads and stores in the tensors' own types, all between in float32. The variance comes
            from centred values, and the mean is taken twice, the second time of x - mean, in
            forward and backward: rows far from zero keep the digits that they have.
Limits      N <= 16384, one block. x and dy of any strides: read as they are if the last dimension
            is contiguous and the others collapse to one row stride, else copied first.
Spec        irongpt_kernels/eager.py::layer_norm
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import checks, launch

MAX_N = 16384


@triton.jit
def _centred(x, valid, mean, N):
    """x minus its mean, which is given but for its rounding; 0 outside `valid`."""
    centred = tl.where(valid, x - mean[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / N  # what rounding took from the mean of large values
    return tl.where(valid, centred - rest[:, None], 0.0)


@triton.jit
def normalize(x, valid, N, eps):
    """mean, rstd: (BLOCK_M,), and xhat: (BLOCK_M, BLOCK_N), of float32 rows that are 0 outside
    `valid`."""
    mean = tl.sum(x, axis=1) / N
    centred = _centred(x, valid, mean, N)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def normalize_again(x, valid, mean, rstd, N):
    """xhat from the saved statistics."""
    return _centred(x, valid, mean, N) * rstd[:, None]


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, cols, N):
    """xhat weight + bias, the bias where there is one."""
    y = xhat * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def input_gradient(dy, xhat, weight, rstd, N):
    """dx of the docstring's formula, float32."""
    g = dy * weight[None, :]
    mean_g = tl.sum(g, axis=1) / N
    mean_gx = tl.sum(g * xhat, axis=1) / N
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    stride_xm,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_block = tl.program_id(0).to(tl.int64)  # a row times its stride passes 2^31
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
    x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    mean, rstd, xhat = normalize(x, valid, N, eps)
    y = affine(xhat, weight_ptr, bias_ptr, cols, N)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    N,
    stride_dym,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx, dweight, dbias: None where not wanted. dweight, dbias: (programs, N) partials."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row_block in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(row_block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (rows < M)[:, None] & (cols < N)[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :]
        dy = tl.load(dy_ptrs, mask=valid, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
        x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        xhat = normalize_again(x, valid, mean, rstd, N)
        if dx_ptr is not None:
            dx = input_gradient(dy, xhat, weight, rstd, N)
            tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx, mask=valid)
        if dweight_ptr is not None:
            dweight += tl.sum(dy * xhat, axis=0)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, axis=0)
    partial = tl.cast(program, tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=cols < N)


def matrix(x: Tensor) -> Tensor:
    """x as (M, N) with contiguous rows: a view where the strides allow it, else a copy."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def tile(N: int) -> dict[str, int]:
    """Launch options for whole rows: 16 to 32 elements a thread."""
    columns = launch.block(N)
    return {
        "BLOCK_M": max(1, 1024 // columns),
        "BLOCK_N": columns,
        "num_warps": launch.warps(columns),
    }


def programs(M: int, N: int, device: torch.device) -> int:
    """How many programs share the rows in a backward: 8 warps an SM cover the memory's latency,
    and more would only write more partials."""
    options = tile(N)
    per_sm = max(1, 8 // options["num_warps"])
    return min(triton.cdiv(M, options["BLOCK_M"]), per_sm * launch.num_sms(device))


def partials(M: int, N: int, wanted: Sequence[bool], device: torch.device) -> list[Tensor | None]:
    """A (programs, N) buffer for the gradient of each wanted parameter, None for another."""
    P = programs(M, N, device)
    return [torch.empty(P, N, device=device) if want else None for want in wanted]


def summed(partial: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of a parameter in float32, nothing where it was not wanted."""
    return like.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


def _like(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, contiguous; mean and rstd, float32, of x's leading shape."""
    rows = matrix(x)
    M, N = rows.shape
    y, mean, rstd = _like(x)
    if x.numel():
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        stride = rows.stride(0)
        with launch.on(x.device):
            _forward_kernel[(triton.cdiv(M, tile(N)["BLOCK_M"]),)](
                rows, weight, bias, y, mean, rstd, M, N, stride, eps, **tile(N)
            )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, contiguous; dweight and dbias in float32. Those not wanted are of size 0."""
    dy_rows, rows = matrix(dy), matrix(x)
    M, N = rows.shape
    dx = x.new_empty(x.shape) if wanted[0] else None
    dweight, dbias = partials(M, N, wanted[1:], x.device)
    if x.numel():
        weight = weight.contiguous()
        strides = dy_rows.stride(0), rows.stride(0)
        with launch.on(x.device):
            _backward_kernel[(programs(M, N, x.device),)](
                dy_rows, rows, weight, mean, rstd, dx, dweight, dbias, M, N, *strides, **tile(N)
            )
    return x.new_empty(0) if dx is None else dx, summed(dweight, x), summed(dbias, x)


_op = torch.library.custom_op("irongpt::layer_norm", forward, mutates_args=())
_backward_op = torch.library.custom_op("irongpt::layer_norm_backward", backward, mutates_args=())


@_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if rest[-1][0] else 0)
    dweight, dbias = (
        x.new_empty(weight.shape if want else 0, dtype=torch.float32) for want in rest[-1][1:]
    )
    return dx, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, _mean: Tensor | None, _rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    dx, dweight, dbias = _backward_op(dy, x, weight, mean, rstd, wanted)
    return (
        dx if wanted[0] else None,
        dweight.to(weight.dtype) if wanted[1] else None,
        dbias.to(ctx.bias_dtype) if wanted[2] else None,
        None,
    )


_op.register_autograd(_backward, setup_context=_setup)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """What both layer norms refuse. name: of the argument x."""
    checks.rank(name, x, 1, 64)
    N = x.shape[-1]
    if N > MAX_N:
        raise ValueError(f"{name} must have a last dimension of at most {MAX_N}, got {N}")
    checks.shape("weight", weight, (N,))
    checks.shape("bias", bias, (N,))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See `eager.layer_norm`. Raises ValueError where N is above 16384."""
    checks.floating(x=x, weight=weight, optional=dict(bias=bias))
    check(x, weight, bias, "x")
    return _op(x, weight, bias, eps)[0]


def layer_norm_bytes(M: int, N: int, itemsize: int, backward: bool = False) -> int:
    """Least bytes that cross DRAM: the rows, and the statistics of each. Parameters stay in L2."""
    return M * ((3 if backward else 2) * N * itemsize + 8)
