"""Gradients of the parameters of all layer norms, by one kernel at the end of the backward pass.

    norm_parameters([w, ...])   each parameter, (N,), expanded to a view of P equal rows, (P, N)
    backward                    dw = the sum of the P rows of the view's gradient

The backward of a norm runs P programs (see `layer_norm_backward`), and each sums the gradient of a
parameter over its own rows of x: (P, N) partial sums. A norm that is called with a (P, N) view of
the parameter returns these sums as the gradient of the view, without adding them. The backward of
`norm_parameters` then adds those of all norms with one kernel, instead of one launch per norm. A
norm that is called with the parameter itself, (N,), adds its own partial sums.

Traffic     reads the partial sums, 4PN bytes per parameter, and writes 4N.
Parallelism A program adds BLOCK_N columns of one matrix, BLOCK_M rows at a time. One launch handles
            up to 48 matrices, whose addresses are kernel arguments, as in `grad_norm`.
Precision   float32.
Limits      Matrices that are not float32 or not contiguous are copied.
Spec        irongpt_kernels/eager.py::norm_parameters
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.grad_norm import aligned, launches, load, select_address
from irongpt_kernels.fused.layer_norm_backward import layer_norm_backward, programs
from irongpt_kernels.runtime.custom_op import custom_op

TILE = dict(BLOCK_M=64, BLOCK_N=32, num_warps=4)


@triton.jit
def _column_sums_kernel(
    matrices, sums, firsts, heights, widths,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the sum of the rows of each of COUNT contiguous matrices.

    firsts: the id of the first program of each matrix. heights, widths: its rows and columns.
    """
    program = tl.program_id(0)
    matrix, sum_at = matrices[0].to(tl.int64), sums[0].to(tl.int64)
    first, M, N = 0, tl.cast(heights[0], tl.int64), tl.cast(widths[0], tl.int64)
    for i in tl.static_range(1, COUNT):
        mine = program >= firsts[i]
        matrix = select_address(matrices, i, mine, matrix)
        sum_at = select_address(sums, i, mine, sum_at)
        first = tl.where(mine, firsts[i], first)
        M, N = tl.where(mine, heights[i], M), tl.where(mine, widths[i], N)
    cols = tl.cast(program - first, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        total += load(matrix, rows[:, None] * N + cols[None, :], mask, tl.float32)
    pointer = sum_at.to(tl.pointer_type(tl.float32))
    tl.store(pointer + cols, tl.sum(total, 0), mask=cols < N)


def column_sums(matrices: list[Tensor]) -> list[Tensor]:
    """The sum of the rows of each matrix: (M, N) of any sizes -> (N,) float32."""
    matrices = [aligned(m.float()) for m in matrices]
    sums = [m.new_empty(m.shape[1]) for m in matrices]
    blocks = [triton.cdiv(m.shape[1], TILE["BLOCK_N"]) for m in matrices]
    for part, firsts, count in launches(blocks):
        if count:
            some, out = tuple(matrices[part]), tuple(sums[part])
            heights, widths = zip(*(m.shape for m in some), strict=True)
            _column_sums_kernel[(count,)](
                some, out, firsts, heights, widths, COUNT=len(some), **TILE
            )
    return sums


_backward_op = custom_op(
    "norm_parameters_backward", column_sums,
    lambda matrices: [m.new_empty(m.shape[1], dtype=torch.float32) for m in matrices],
)  # fmt: skip


def _sums(partial: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`column_sums` of the gradients that are not None; None for the others."""
    sums = iter(_backward_op([m for m in partial if m is not None]))
    return [None if m is None else next(sums) for m in partial]


class _Rows(torch.autograd.Function):
    """Views of the parameters as P equal rows each."""

    @staticmethod
    def forward(ctx: Any, P: int, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(p.expand(P, -1) for p in params)

    @staticmethod
    def backward(ctx: Any, *partial: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_sums(partial)


def norm_parameters(params: list[Tensor], rows: int, dtype: torch.dtype) -> list[Tensor]:
    """See `eager.norm_parameters`. Returns (P, N) views if any parameter needs a gradient."""
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
        return list(params)
    P = max(1, programs(rows, params[0].shape[-1], dtype.itemsize, params[0].device))
    # float32: the gradient of a view is float32 partial sums, and autograd wants the view's dtype.
    return list(_Rows.apply(P, *(p.float() for p in params)))


def norm_gradients(
    dsum: Tensor | None, dnorm: Tensor | None, saved: Sequence[Tensor], branch_dtype: torch.dtype,
    wanted: Sequence[bool], seed: Tensor | None = None, dropout_p: float = 0.0,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients with respect to branch, residual, weight and bias; None for those not wanted.

    saved: total, weight, mean and rstd. Arguments and results are those of `layer_norm_bwd`, but
    the gradients of weight and bias have the shape of weight: (N,), or (P, N) partial sums if it is
    a view.
    """
    total, weight, mean, rstd = saved
    if dnorm is None:  # the sum does not depend on the parameters
        wanted = [*([False, False] if dsum is None else wanted[:2]), False, False]
    if not any(wanted):
        return [None] * 4
    N, summed = weight.shape[-1], weight.dim() == 1
    rows = total.numel() // max(1, N)
    P = programs(rows, N, branch_dtype.itemsize, total.device) if summed else len(weight)
    gradients = layer_norm_backward(
        dsum, dnorm, total, weight, mean, rstd, seed, dropout_p, branch_dtype, P, wanted
    )
    found = [d if want else None for d, want in zip(gradients, wanted, strict=True)]
    return found[:2] + _sums(found[2:]) if summed and any(wanted[2:]) else found
