"""
Layer normalization over the last dimension, forward and backward.

    y = layer_norm(x, weight, bias, eps)        x, y: (..., N)        weight, bias: (N,)

Forward, per row:   mean = sum(x) / N       rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
                    xhat = (x - mean) rstd              y = xhat weight + bias
Backward    in `layer_norm_backward`: dx, dweight and dbias in one pass over the rows.

Traffic     Forward reads x and writes y: 2MN elements. Backward reads x and dy and writes dx: 3MN.
            It saves 8 bytes a row, mean and rstd, and not xhat.
Parallelism A program holds BLOCK_M whole rows in registers, several where rows are short. Rows of
            up to 1023 elements get one warp: no barrier stands in their sums.
Precision   Loads and stores in the tensors' own types, all between in float32. The variance comes
            from centred values, and the mean is taken twice, the second time of x - mean, in
            forward and backward: rows far from zero keep the digits that they have.
Limits      N <= 8192, one block. x and dy of any strides: read as they are if the last dimension
            is contiguous and the others collapse to one row stride, else copied first.
Spec        irongpt_kernels/eager.py::layer_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.layer_norm_backward import centre, layer_norm_backward, matrix, tile
from irongpt_kernels.runtime import checks, launch

MAX_N = 8192  # five float32 rows of more are beyond the registers of an SM


@triton.jit
def normalize(x, valid, N, eps):
    """mean, rstd: (BLOCK_M,), and xhat: (BLOCK_M, BLOCK_N), of float32 rows that are 0 outside
    `valid`."""
    mean = tl.sum(x, axis=1) / N
    centred = centre(x, valid, mean, N)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, cols, N):
    """xhat weight + bias, the bias where there is one."""
    y = xhat * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


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


def _like(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for y, of `dtype`, mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, in `dtype`, contiguous; mean and rstd, float32, of x's leading shape."""
    rows = matrix(x)
    M, N = rows.shape
    y, mean, rstd = _like(x, dtype)
    if x.numel():
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        stride = rows.stride(0)
        with launch.on(x.device):
            _forward_kernel[(triton.cdiv(M, tile(N)["BLOCK_M"]),)](
                rows, weight, bias, y, mean, rstd, M, N, stride, eps, **tile(N)
            )
    return y, mean, rstd


_op = torch.library.custom_op("irongpt::layer_norm", forward, mutates_args=())


@_op.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: Tensor | None, _mean: Tensor | None, _rstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, mean, rstd = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    _, dx, dweight, dbias = layer_norm_backward(
        None, dy, x, weight, mean, rstd, None, 0.0, x.dtype, [False, *wanted]
    )
    gradients = dx, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)
    return *(d if want else None for d, want in zip(gradients, wanted, strict=True)), None, None


_op.register_autograd(_backward, setup_context=_setup)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """What both layer norms refuse. name: of the argument x."""
    checks.rank(name, x, 1, 64)
    N = x.shape[-1]
    if N > MAX_N:
        raise ValueError(f"{name} must have a last dimension of at most {MAX_N}, got {N}")
    checks.shape("weight", weight, (N,))
    checks.shape("bias", bias, (N,))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `eager.layer_norm`. Raises ValueError where N is above 8192."""
    checks.floating(x=x, weight=weight, optional=dict(bias=bias))
    check(x, weight, bias, "x")
    return _op(x, weight, bias, eps, dtype or x.dtype)[0]
