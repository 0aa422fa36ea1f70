"""
The step between two branches of a pre-norm block, in one pass: sum = residual + dropout(branch),
and the layer norm of that sum.

    sum, norm = dropout_add_layer_norm(branch, residual, weight, bias, dropout_p=p, seed=seed)

Forward, per row:   keep = 0 where the element's byte of the generator is below the threshold of p,
                    1 / (1 - p) elsewhere, p as `dropout` rounds it
                    sum = residual + keep branch        norm = layer_norm(sum), see `layer_norm`
Backward    in `layer_norm_backward`, the mask computed again.

Traffic     Forward reads branch and residual, writes sum and norm: 4MN elements. Backward reads
            dsum, dnorm and sum, writes dresidual and dbranch: 5MN; 1MN less where one of the
            outputs was not used. The mask is never stored: it is a pure function of the seed and
            the element's place, row = index over all leading dimensions, and is computed again.
Parallelism As in `layer_norm`: whole rows in registers, partials of dweight and dbias, no atomics.
Precision   Loads and stores in the tensors' own types (in training, branch and norm in a half type,
            residual and sum in float32), all between in float32. The norm is that of the sum as it
            was rounded for the store: it is what backward reads.
Limits      As in `layer_norm`: N <= 8192, and copies of what has no contiguous rows.
Spec        irongpt_kernels/eager.py::dropout_add_layer_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused.layer_norm import affine, check, normalize
from irongpt_kernels.fused.layer_norm_backward import (
    forward_tile,
    keep_factor,
    layer_norm_backward,
    matrix,
)
from irongpt_kernels.runtime import checks, launch


@triton.jit
def _forward_kernel(
    branch_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    norm_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    M,
    N,
    stride_bm,
    stride_rm,
    eps,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """seed: None where nothing is dropped."""
    row_block = tl.program_id(0).to(tl.int64)  # a row times its stride passes 2^31
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = (rows < M)[:, None] & (cols < N)[None, :]
    branch_ptrs = branch_ptr + rows[:, None] * stride_bm + cols[None, :]
    branch = tl.load(branch_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    residual_ptrs = residual_ptr + rows[:, None] * stride_rm + cols[None, :]
    residual = tl.load(residual_ptrs, mask=valid, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        branch *= keep_factor(seed_ptr, rows, cols, threshold, scale)
    total = (residual + branch).to(sum_ptr.dtype.element_ty)
    out = rows[:, None] * N + cols[None, :]
    tl.store(sum_ptr + out, total, mask=valid)
    mean, rstd, xhat = normalize(total.to(tl.float32), valid, N, eps)
    tl.store(norm_ptr + out, affine(xhat, weight_ptr, bias_ptr, cols, N), mask=valid)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


def _like(branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for sum, norm, mean and rstd."""
    mean, rstd = (residual.new_empty(branch.shape[:-1], dtype=torch.float32) for _ in range(2))
    return residual.new_empty(branch.shape), branch.new_empty(branch.shape), mean, rstd


def forward(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum like residual, norm like branch, contiguous; mean and rstd, float32, one a row.

    seed: None where dropout_p is 0.
    """
    branch_rows, rows = matrix(branch), matrix(residual)
    M, N = rows.shape
    outputs = _like(branch, residual)
    if branch.numel():
        bias = None if bias is None else bias.contiguous()
        inputs = branch_rows, rows, weight.contiguous(), bias
        strides = branch_rows.stride(0), rows.stride(0)
        drop = dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)
        tile = forward_tile(N, branch.element_size(), branch.device)
        with launch.on(branch.device):
            _forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
                *inputs, *outputs, seed, M, N, *strides, eps, *drop, **tile
            )
    return outputs


_op = torch.library.custom_op("irongpt::dropout_add_layer_norm", forward, mutates_args=())


@_op.register_fake
def _(branch: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(branch, residual)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    branch, _, weight, bias, seed, dropout_p, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, seed)
    ctx.dropout_p = dropout_p
    ctx.branch_dtype = branch.dtype
    ctx.bias_dtype = weight.dtype if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dsum: Tensor | None, dnorm: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dsum is None and dnorm is None:
        return (None,) * 7
    total, weight, mean, rstd, seed = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    if dnorm is None:
        wanted[2:] = [False, False]  # the parameters had no part in the sum
    dbranch, dresidual, dweight, dbias = layer_norm_backward(
        dsum, dnorm, total, weight, mean, rstd, seed, ctx.dropout_p, ctx.branch_dtype, wanted
    )
    gradients = dbranch, dresidual, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)
    kept = (d if want else None for d, want in zip(gradients, wanted, strict=True))
    return *kept, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """See `eager.dropout_add_layer_norm`. Raises ValueError where N is above 8192."""
    checks.floating(branch=branch, residual=residual, weight=weight, optional=dict(bias=bias))
    check(branch, weight, bias, "branch")
    checks.shape("residual", residual, tuple(branch.shape))
    checks.dropout(dropout_p, seed, branch=branch)
    drops = launch.seed_tensor(seed, branch.device) if dropout_p > 0 else None
    total, norm, _, _ = _op(branch, residual, weight, bias, drops, dropout_p, eps)
    return total, norm
