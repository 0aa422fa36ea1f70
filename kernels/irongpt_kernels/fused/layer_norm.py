"""Layer normalization over the last dimension, forward; `layer_norm_backward` has the backward.

    y = layer_norm(x, weight, bias, eps)        x, y: (..., N)        weight, bias: (N,)

Forward, per row:   mean = sum(x) / N       rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
                    xhat = (x - mean) rstd              y = xhat weight + bias
Backward            dx, dweight and dbias in one pass over the rows: see `layer_norm_backward`

Traffic     The forward reads x and writes y: 2MN elements. The backward reads x and dy and writes
            dx: 3MN. It needs mean and rstd, which take 8 bytes per row, and recomputes xhat.
Parallelism A program holds complete rows in registers, several if rows are short. Rows of up to
            512 elements are held by one warp, so their sums need no barrier.
Precision   Loads and stores are in the dtypes of the tensors, arithmetic is in float32. The
            variance is computed from centred values. Forward and backward subtract the mean, and
            then the mean of the centred row, which is the rounding error of the first mean. So rows
            whose mean is large compared with their standard deviation lose no digits.
Limits      N <= 8192, because a row is one block. x and dy may have any strides, but are copied
            unless the last dimension is contiguous and the others collapse to one row stride.
Spec        irongpt_kernels/eager.py::layer_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.layer_norm_backward import centre, launch_options, one_row
from irongpt_kernels.fused.norm_parameters import norm_gradients
from irongpt_kernels.runtime import checks
from irongpt_kernels.runtime.custom_op import custom_op
from irongpt_kernels.runtime.launch import contiguous_rows

MAX_N = 8192  # the backward holds about five float32 rows; longer ones exceed an SM's registers


@triton.jit
def normalize(x, valid, N, eps):
    """Returns mean and rstd, (BLOCK_M,), and xhat, (BLOCK_M, BLOCK_N).

    x: float32 rows, 0 outside the mask `valid`.
    """
    mean = tl.sum(x, axis=1) / N
    centred = centre(x, valid, mean, N)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, cols, N):
    """Returns xhat weight + bias, or xhat weight if bias_ptr is None."""
    y = xhat * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, x_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0).to(tl.int64)  # int64: a row times its stride can exceed 2^31
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    x_ptrs = x_ptr + rows[:, None] * x_stride + cols[None, :]
    x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    mean, rstd, xhat = normalize(x, valid, N, eps)
    y = affine(xhat, weight_ptr, bias_ptr, cols, N)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


def _empty_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, of `dtype`, mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y in `dtype`, contiguous; mean and rstd, float32, in the leading shape of x."""
    rows = contiguous_rows(x)
    M, N = rows.shape
    y, mean, rstd = _empty_outputs(x, dtype)
    if x.numel():
        parameters = one_row(weight), one_row(bias)
        stride = rows.stride(0)
        _fwd_kernel[(triton.cdiv(M, launch_options(N)["BLOCK_M"]),)](
            rows, *parameters, y, mean, rstd, M, N, stride, eps, **launch_options(N)
        )
    return y, mean, rstd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
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
    wanted = [False, *ctx.needs_input_grad[:3]]
    dtypes = x.dtype, ctx.bias_dtype
    _, *gradients = norm_gradients(None, dy, x, weight, mean, rstd, None, 0.0, dtypes, wanted)
    return *gradients, None, None


_op = custom_op(
    "layer_norm", layer_norm_fwd, lambda x, *rest: _empty_outputs(x, rest[-1]),
    (), _setup_context, _backward,
)  # fmt: skip


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Raises ValueError for shapes that the ops with a layer norm do not support. name: that of x
    in the op."""
    checks.rank(name, x, 1, 64)
    N = x.shape[-1]
    if N > MAX_N:
        raise ValueError(f"{name} must have a last dimension of at most {MAX_N}, got {N}")
    given = [t for t in (weight, bias) if t is not None]
    # `norm_parameters` gives each parameter as a view with P equal rows.
    views = all(t.dim() == 2 and (len(t) == 1 or t.stride(0) == 0) for t in given)
    wanted = (len(weight), N) if views else (N,)
    checks.shape("weight", weight, wanted)
    checks.shape("bias", bias, wanted)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.layer_norm`. Raises TypeError unless x, weight and bias are float32, float16 or
    bfloat16, ValueError for shapes and devices that do not match, and for N above 8192."""
    checks.floating(x=x, weight=weight, optional=dict(bias=bias))
    check_shapes(x, weight, bias, "x")
    return _op(x, weight, bias, eps, dtype or x.dtype)[0]
