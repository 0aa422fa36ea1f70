"""
The backward of `layer_norm` and of `dropout_add_layer_norm`: the first is the second's without a
branch and without a gradient of the sum.

    x = residual + keep branch      xhat = (x - mean) rstd      norm = xhat weight + bias

Per row:    g = dnorm weight is the gradient that reaches xhat. Both statistics depend on the whole
            row, so two projections come off it:
            dresidual = dsum + rstd (g - sum(g) / N - xhat sum(g xhat) / N)
            dbranch = keep dresidual
Over rows:  dweight = sum(dnorm xhat)      dbias = sum(dnorm)

xhat is recomputed from (mean, rstd), 8 bytes a row, and the mask from the seed. As many programs as
the GPU holds at a time stride over the blocks of rows; each keeps its own dweight and dbias, and
the (P, N) partials are summed afterwards. No atomics: two runs give the same bits.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused import philox
from irongpt_kernels.runtime import launch, launch_table

WARPS_PER_SM = 8  # of a backward, in all its programs
WIDE = tl.constexpr(4096)  # columns; of wider rows the weight is read for each, out of a cache


@triton.jit
def centre(x, valid, mean, N):
    """x minus its mean, which is given but for its rounding; 0 outside `valid`."""
    centred = tl.where(valid, x - mean[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / N  # what rounding took from the mean of large values
    return tl.where(valid, centred - rest[:, None], 0.0)


@triton.jit
def keep_factor(seed_ptr, rows, cols, threshold, scale):
    """The factor of each element: 0 where dropped, else `scale`."""
    seed = tl.load(seed_ptr)
    return tl.where(philox.row_keep(seed, rows[:, None], cols[None, :], threshold), scale, 0.0)


@triton.jit
def _kernel(
    dsum_ptr, dnorm_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dbranch_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    M, N, stride_dsm, stride_dnm, stride_xm, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """None for an upstream gradient that is 0, for a gradient that is not wanted, and for the seed
    where nothing is dropped. dweight, dbias: (programs, N) partials."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N <= WIDE:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row_block in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(row_block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (rows < M)[:, None] & (cols < N)[None, :]
        dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if dnorm_ptr is not None:
            dnorm_ptrs = dnorm_ptr + rows[:, None] * stride_dnm + cols[None, :]
            dnorm = tl.load(dnorm_ptrs, mask=valid, other=0.0).to(tl.float32)
            x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :]
            x = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
            xhat = centre(x, valid, mean, N) * rstd[:, None]
            if BLOCK_N > WIDE:
                weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            g = dnorm * weight[None, :]
            mean_g = tl.sum(g, axis=1) / N
            mean_gx = tl.sum(g * xhat, axis=1) / N
            dx += rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
            if dweight_ptr is not None:
                dweight += tl.sum(dnorm * xhat, axis=0)
            if dbias_ptr is not None:
                dbias += tl.sum(dnorm, axis=0)
        if dsum_ptr is not None:
            dsum_ptrs = dsum_ptr + rows[:, None] * stride_dsm + cols[None, :]
            dx += tl.load(dsum_ptrs, mask=valid, other=0.0).to(tl.float32)
        out = rows[:, None] * N + cols[None, :]
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + out, dx, mask=valid)
        if dbranch_ptr is not None:
            if seed_ptr is not None:
                dx *= keep_factor(seed_ptr, rows, cols, threshold, scale)
            tl.store(dbranch_ptr + out, dx, mask=valid)
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


def forward_tile(N: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Launch options of dropout-add-norm's forward. itemsize: of the branch."""
    options = tile(N)
    return options | launch_table.options("norm forward", N, itemsize, device, {})


def backward_tile(N: int, itemsize: int, device: torch.device) -> tuple[dict[str, int], int]:
    """Launch options, and warps an SM in all programs: WARPS_PER_SM cover the memory's latency,
    and more would only write more partials."""
    options = tile(N) | dict(warps_per_sm=WARPS_PER_SM)
    options |= launch_table.options("norm backward", N, itemsize, device, {})
    return options, max(options.pop("warps_per_sm"), options["num_warps"])


@torch.library.custom_op("irongpt::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    dsum: Tensor | None,
    dnorm: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    branch_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dbranch in `branch_dtype` and dresidual like x, contiguous; dweight, dbias in float32.

    An upstream gradient of None is 0. Gradients that are not wanted are of size 0.
    """
    dsum_rows, dnorm_rows = (None if d is None else matrix(d) for d in (dsum, dnorm))
    rows = matrix(x)
    M, N = rows.shape
    options, warps = backward_tile(N, branch_dtype.itemsize, x.device)
    per_sm = warps // options["num_warps"]
    P = min(triton.cdiv(M, options["BLOCK_M"]), per_sm * launch.num_sms(x.device))
    dbranch = x.new_empty(x.shape, dtype=branch_dtype) if wanted[0] else None
    dresidual = x.new_empty(x.shape) if wanted[1] else None
    dweight, dbias = (
        x.new_empty(P, N, dtype=torch.float32) if want else None for want in wanted[2:]
    )
    if x.numel():
        inputs = dsum_rows, dnorm_rows, rows, weight.contiguous(), mean, rstd, seed
        outputs = dbranch, dresidual, dweight, dbias
        strides = (0 if d is None else d.stride(0) for d in (dsum_rows, dnorm_rows, rows))
        drop = dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)
        with launch.on(x.device):
            # All that so many warps leave a thread. ptxas would spill some for more of them.
            registers = min(255, 65_536 // (32 * warps))
            _kernel[(P,)](*inputs, *outputs, M, N, *strides, *drop, **options, maxnreg=registers)
    return (
        x.new_empty(0, dtype=branch_dtype) if dbranch is None else dbranch,
        x.new_empty(0) if dresidual is None else dresidual,
        x.new_empty(0, dtype=torch.float32) if dweight is None else dweight.sum(0),
        x.new_empty(0, dtype=torch.float32) if dbias is None else dbias.sum(0),
    )


@layer_norm_backward.register_fake
def _(dsum: Any, dnorm: Any, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    branch_dtype, wanted = rest[-2:]
    like = [(x.shape, branch_dtype), (x.shape, x.dtype)] + [(weight.shape, torch.float32)] * 2
    return tuple(
        x.new_empty(shape if want else 0, dtype=dtype)
        for want, (shape, dtype) in zip(wanted, like, strict=True)
    )
