"""Layer normalization over the last dimension, forward, alone or after dropout and residual.

    y = layer_norm(x, weight, bias, eps)        x, y: (..., N)        weight, bias: (N,)
    sum, y = dropout_add_layer_norm(branch, residual, weight, bias, dropout_p=p, seed=seed, eps=eps)

`dropout_add_layer_norm` is residual + dropout + layer norm in one pass: the step between two
branches of a pre-norm block. `layer_norm` is the same without a branch: x is the residual.

Forward, per row:   factor = 0 for a dropped element, 1 / (1 - p) for the others, where `dropout`
                    gives the mask and rounds p to a multiple of 1/256
                    x = residual + factor * branch, the sum
                    mean = sum(x) / N       rstd = 1 / sqrt(sum((x - mean)^2) / N + eps)
                    xhat = (x - mean) rstd              y = xhat weight + bias
Backward            all gradients in one pass over the rows: see `layer_norm_backward`

Traffic     layer_norm: the forward reads x and writes y: 2MN elements. The backward reads x and dy
            and writes dx: 3MN.
            dropout_add_layer_norm: the forward reads branch and residual and writes sum and y: 4MN.
            The backward reads dsum, dy and sum and writes dresidual and dbranch: 5MN. If only y was
            used, it does not read dsum: 4MN. If only the sum was, it reads dsum alone: 3MN.
            The backward needs mean and rstd, which take 8 bytes per row, and recomputes xhat. The
            mask is not stored but recomputed too: it is a function of the seed, the column and the
            row, where rows are counted over all leading dimensions.
Parallelism A program holds complete rows in registers, several if rows are short. Rows of up to
            512 elements are held by one warp, so their sums need no barrier.
Precision   Loads and stores are in the dtypes of the tensors (in training, branch and y in a 16-bit
            dtype, residual and sum in float32), arithmetic is in float32. y is computed from the
            rounded sum, because that is what the backward reads. The variance is computed from
            centred values. Forward and backward subtract the mean, and then the mean
            of the centred row, which is the rounding error of the first mean. So rows whose mean is
            large compared with their standard deviation lose no digits.
Limits      N <= 8192, because a row is one block. Inputs and gradients may have any strides, but
            are copied unless the last dimension is contiguous and the others collapse to one row
            stride.
Spec        irongpt_kernels/eager.py::layer_norm, dropout_add_layer_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused.layer_norm_backward import (
    centre,
    forward_options,
    keep_factor,
    launch_options,
    one_row,
)
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
    branch_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr, seed_ptr,
    M, N, branch_stride, residual_stride, eps, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """branch_ptr: None for `layer_norm`, which stores no sum. seed_ptr: None without dropout."""
    row_tile = tl.program_id(0).to(tl.int64)  # int64: a row times its stride can exceed 2^31
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    if branch_ptr is not None:
        branch_ptrs = branch_ptr + rows[:, None] * branch_stride + cols[None, :]
        branch = tl.load(branch_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    x_ptrs = residual_ptr + rows[:, None] * residual_stride + cols[None, :]
    x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        if seed_ptr is not None:
            branch *= keep_factor(seed_ptr, rows, cols, threshold, scale)
        x = (x + branch).to(sum_ptr.dtype.element_ty)
    offsets = rows[:, None] * N + cols[None, :]  # computed earlier, they take more registers
    if branch_ptr is not None:
        tl.store(sum_ptr + offsets, x, mask=valid)
        x = x.to(tl.float32)
    store_norm(
        x, valid, rows, cols, offsets, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, eps
    )


def empty_outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, of `dtype`, mean and rstd."""
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


def _empty_outputs(branch: Tensor | None, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Uninitialized sum, y, mean and rstd."""
    total = residual.new_empty(0 if branch is None else residual.shape)
    return total, *empty_outputs(residual, rest[-1])


def layer_norm_fwd(
    branch: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor | None,
    seed: Tensor | None, dropout_p: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns sum, y, mean and rstd. seed: None if dropout_p is 0.

    sum: in the dtype of residual, empty without a branch. y: in `dtype`, contiguous. mean, rstd:
    float32, in the leading shape of residual.
    """
    rows = launch.contiguous_rows(residual)
    M, N = rows.shape
    total, y, mean, rstd = _empty_outputs(branch, residual, dtype)
    if residual.numel():
        branch_rows, stride, options = None, 0, launch_options(N)
        if branch is not None:
            branch_rows = launch.contiguous_rows(branch)
            stride, options = branch_rows.stride(0), forward_options(N, branch.itemsize, y.device)
        parameters = one_row(weight), one_row(bias)
        drop = dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)
        _fwd_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
            branch_rows, rows, *parameters, None if branch is None else total, y, mean, rstd, seed,
            M, N, stride, rows.stride(0), eps, *drop, **options,
        )  # fmt: skip
    return total, y, mean, rstd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, residual, weight, _, seed, ctx.dropout_p, _, _ = inputs
    total, _, mean, rstd = output
    ctx.dtype = residual.dtype if branch is None else branch.dtype
    if branch is None:  # the residual is the sum, and the first output is empty
        ctx.mark_non_differentiable(total)
        total = residual
    ctx.save_for_backward(total, weight, mean, rstd, seed)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dsum: Tensor | None, dy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    gradients = norm_gradients(dsum, dy, saved, ctx.dtype, wanted, seed, ctx.dropout_p)
    return *gradients, None, None, None, None


_op = custom_op("layer_norm", layer_norm_fwd, _empty_outputs, (), _setup_context, _backward)


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
    return _op(None, x, weight, bias, None, 0.0, eps, dtype or x.dtype)[1]


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.dropout_add_layer_norm`."""
    checks.tensors(branch=branch, residual=residual, weight=weight, optional=dict(bias=bias))
    check_shapes(weight, bias, branch=branch)
    checks.shape(branch.shape, residual=residual)
    checks.dropout(dropout_p, seed, branch=branch)
    mask_seed = launch.seed_tensor(seed, branch.device) if dropout_p > 0 else None
    total, y, _, _ = _op(branch, residual, weight, bias, mask_seed, dropout_p, eps, branch.dtype)
    return total, y
