"""Residual + dropout + layer norm in one pass: the step between two branches of a pre-norm block.

    sum, norm = dropout_add_layer_norm(branch, residual, weight, bias, dropout_p=p, seed=seed)

Forward, per row:   factor = 0 for a dropped element, 1 / (1 - p) for the others, where `dropout`
                    gives the mask and rounds p to a multiple of 1/256
                    sum = residual + factor branch      norm = layer_norm(sum), see `layer_norm`
Backward            see `layer_norm_backward`

Traffic     The forward reads branch and residual and writes sum and norm: 4MN elements. The
            backward reads dsum, dnorm and sum and writes dresidual and dbranch: 5MN. If only norm
            was used, it does not read dsum: 4MN. If only sum was, it reads dsum alone: 3MN.
            The mask is not stored but recomputed: it is a function of the seed, the column and the
            row, where rows are counted over all leading dimensions.
Parallelism as in `layer_norm`: complete rows in registers.
Precision   Loads and stores are in the dtypes of the tensors (in training, branch and norm in a
            16-bit dtype, residual and sum in float32), arithmetic is in float32. The norm is
            computed from the rounded sum, because that is what the backward reads.
Limits      as in `layer_norm`: N <= 8192; tensors without contiguous rows are copied.
Spec        irongpt_kernels/eager.py::dropout_add_layer_norm
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused.layer_norm import check_shapes, empty_outputs, store_norm
from irongpt_kernels.fused.layer_norm_backward import forward_options, keep_factor, one_row
from irongpt_kernels.fused.norm_parameters import norm_gradients
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op


@triton.jit
def _fwd_kernel(
    branch_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, norm_ptr, mean_ptr, rstd_ptr, seed_ptr,
    M, N, branch_stride, residual_stride, eps, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """seed_ptr: None without dropout."""
    row_tile = tl.program_id(0).to(tl.int64)  # int64: a row times its stride can exceed 2^31
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    branch_ptrs = branch_ptr + rows[:, None] * branch_stride + cols[None, :]
    branch = tl.load(branch_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    residual_ptrs = residual_ptr + rows[:, None] * residual_stride + cols[None, :]
    residual = tl.load(residual_ptrs, mask=valid, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        branch *= keep_factor(seed_ptr, rows, cols, threshold, scale)
    total = (residual + branch).to(sum_ptr.dtype.element_ty)
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(sum_ptr + offsets, total, mask=valid)
    store_norm(
        total.to(tl.float32), valid, rows, cols, offsets, weight_ptr, bias_ptr,
        norm_ptr, mean_ptr, rstd_ptr, M, N, eps,
    )  # fmt: skip


def _empty_outputs(branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized sum, norm, mean and rstd."""
    return residual.new_empty(branch.shape), *empty_outputs(branch, branch.dtype)


def dropout_add_layer_norm_fwd(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns sum in the dtype of residual, norm in that of branch, contiguous; mean and rstd,
    float32, one per row. seed: None if dropout_p is 0."""
    branch_rows, rows = launch.contiguous_rows(branch), launch.contiguous_rows(residual)
    M, N = rows.shape
    outputs = _empty_outputs(branch, residual)
    if branch.numel():
        inputs = branch_rows, rows, one_row(weight), one_row(bias)
        strides = branch_rows.stride(0), rows.stride(0)
        drop = dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)
        options = forward_options(N, branch.element_size(), branch.device)
        _fwd_kernel[(triton.cdiv(M, options["BLOCK_M"]),)](
            *inputs, *outputs, seed, M, N, *strides, eps, *drop, **options
        )
    return outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, _, weight, _, seed, ctx.dropout_p, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, seed)
    ctx.dtype = branch.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dsum: Tensor | None, dnorm: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    gradients = norm_gradients(dsum, dnorm, saved, ctx.dtype, wanted, seed, ctx.dropout_p)
    return *gradients, None, None, None


_op = custom_op(
    "dropout_add_layer_norm", dropout_add_layer_norm_fwd,
    lambda branch, residual, *_: _empty_outputs(branch, residual), (), _setup_context, _backward,
)  # fmt: skip


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
    total, norm, _, _ = _op(branch, residual, weight, bias, mask_seed, dropout_p, eps)
    return total, norm
