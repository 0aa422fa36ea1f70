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
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

MAX_N = 8192  # the backward holds about five float32 rows; longer ones exceed an SM's registers


@triton.jit
def store_norm(
    x, valid, rows, cols, offsets, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, eps
):
    """Stores the layer norm of x at `offsets`, and mean and rstd of its rows.

    x: float32, (BLOCK_M, BLOCK_N), 0 outside the mask `valid`. bias_ptr: None without a bias.
    """
    mean = tl.sum(x, axis=1) / N
    centred = centre(x, valid, mean, N)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    xhat = centred * rstd[:, None]
    y = xhat * tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y, mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


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
    offsets = rows[:, None] * N + cols[None, :]
    store_norm(
        x, valid, rows, cols, offsets, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, eps
    )


def empty_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, of `dtype`, mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y in `dtype`, contiguous; mean and rstd, float32, in the leading shape of x."""
    rows = launch.contiguous_rows(x)
    M, N = rows.shape
    y, mean, rstd = empty_outputs(x, dtype)
    if x.numel():
        parameters = one_row(weight), one_row(bias)
        stride = rows.stride(0)
        _fwd_kernel[(triton.cdiv(M, launch_options(N)["BLOCK_M"]),)](
            rows, *parameters, y, mean, rstd, M, N, stride, eps, **launch_options(N)
        )
    return y, mean, rstd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [False, *ctx.needs_input_grad[:3]]
    dtype = ctx.saved_tensors[0].dtype
    gradients = norm_gradients(None, dy, ctx.saved_tensors, dtype, wanted)
    return *gradients[1:], None, None


_op = custom_op(
    "layer_norm", layer_norm_fwd, lambda x, *rest: empty_outputs(x, rest[-1]),
    (), _setup_context, _backward,
)  # fmt: skip


def check_shapes(weight: Tensor, bias: Tensor | None, **tensor: Tensor) -> None:
    """Raises ValueError for shapes that the ops with a layer norm do not support. tensor: one
    keyword argument, NAME=tensor, whose rows are normalized; messages use NAME."""
    checks.rows(**tensor)
    (name, N) = next((name, x.shape[-1]) for name, x in tensor.items())
    if N > MAX_N:
        raise ValueError(f"{name} must have a last dimension of at most {MAX_N}, got {N}")
    given = [t for t in (weight, bias) if t is not None]
    # `norm_parameters` gives each parameter as a view with P equal rows.
    views = all(t.dim() == 2 and (len(t) == 1 or t.stride(0) == 0) for t in given)
    checks.shape((len(weight), N) if views else (N,), weight=weight, bias=bias)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.layer_norm`."""
    checks.tensors(x=x, weight=weight, optional=dict(bias=bias))
    check_shapes(weight, bias, x=x)
    return _op(x, weight, bias, eps, dtype or x.dtype)[0]
