"""Backward of `layer_norm`, `dropout_add_layer_norm` and `embed_layer_norm`, by one kernel.

    sum = residual + factor * branch  factor: of the dropout, 0 or 1 / (1 - p)
    xhat = (sum - mean) rstd          norm = xhat weight + bias

Backward, per row:  Let g = dnorm weight, the gradient with respect to xhat. Because mean and rstd
                    depend on the whole row, two projections are subtracted:
                    dresidual = dsum + rstd (g - sum(g) / N - xhat sum(g xhat) / N)
                    dbranch = factor * dresidual
          columns:  dweight = sum(dnorm xhat)      dbias = sum(dnorm), both over the rows

For `layer_norm`, x takes the place of the sum, dsum is absent, and dresidual is dx.

Traffic     reads dsum, dnorm and the sum, writes dresidual and dbranch: 5MN elements, and 3MN for
            `layer_norm`. xhat is recomputed from mean and rstd, the mask from the seed.
Parallelism P programs share the blocks of rows. By default each SM has as many programs as make
            WARPS_PER_SM warps, but at least one. Each program keeps its own dweight and dbias;
            `norm_parameters` can add these (P, N) partial sums of all norms at once.
Precision   float32 between load and store; xhat is centred as in the forward.
Limits      those of `layer_norm`.
Spec        the gradients of irongpt_kernels/eager.py::layer_norm, dropout_add_layer_norm
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.fused import philox
from irongpt_kernels.runtime import launch, launch_table
from irongpt_kernels.runtime.custom_op import custom_op

WARPS_PER_SM = 8  # of all programs on an SM together
WIDE = tl.constexpr(4096)  # wider blocks reload the weight for each block of rows


@triton.jit
def centre(x, valid, mean, N):
    """x minus its mean, 0 outside `valid`. mean: the rounded mean of each row, (BLOCK_M,)."""
    centred = tl.where(valid, x - mean[:, None], 0.0)
    # The rounding error of the mean, which is large for large values. Because div_rn rounds
    # correctly, a row of equal values becomes exactly 0.
    mean_error = tl.div_rn(tl.sum(centred, axis=1), N * 1.0)
    return tl.where(valid, centred - mean_error[:, None], 0.0)


@triton.jit
def keep_factor(seed_ptr, rows, cols, threshold, scale):
    """The dropout factor of each element: 0 where it is dropped, else `scale`."""
    seed = tl.load(seed_ptr)
    return tl.where(philox.row_keep(seed, rows[:, None], cols[None, :], threshold), scale, 0.0)


@triton.jit
def _bwd_kernel(
    dsum_ptr, dnorm_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dbranch_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    M, N, dsum_stride, dnorm_stride, sum_stride, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes the gradients whose pointers are not None.

    dsum_ptr, dnorm_ptr: None for a gradient of 0. seed_ptr: None without dropout. dweight_ptr and
    dbias_ptr point to (programs, N) partial sums.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    if BLOCK_N <= WIDE:
        weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row_tile in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(row_tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = (rows < M)[:, None] & (cols < N)[None, :]
        dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if dnorm_ptr is not None:
            dnorm_ptrs = dnorm_ptr + rows[:, None] * dnorm_stride + cols[None, :]
            dnorm = tl.load(dnorm_ptrs, mask=valid, other=0.0).to(tl.float32)
            sum_ptrs = sum_ptr + rows[:, None] * sum_stride + cols[None, :]
            x = tl.load(sum_ptrs, mask=valid, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
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
            dsum_ptrs = dsum_ptr + rows[:, None] * dsum_stride + cols[None, :]
            dx += tl.load(dsum_ptrs, mask=valid, other=0.0).to(tl.float32)
        offsets = rows[:, None] * N + cols[None, :]
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, dx, mask=valid)
        if dbranch_ptr is not None:
            if seed_ptr is not None:
                dx *= keep_factor(seed_ptr, rows, cols, threshold, scale)
            tl.store(dbranch_ptr + offsets, dx, mask=valid)
    partial = tl.cast(program, tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask=cols < N)


def launch_options(N: int, measured: launch_table.Options | None = None) -> dict[str, int]:
    """Launch options for rows of N elements: 16 to 32 elements per thread. measured: options that
    replace them."""
    block_n = launch.block(N)
    block_m, num_warps = max(1, 1024 // block_n), launch.warps(block_n)
    options = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps) | (measured or {})
    return options | launch.no_fusion_in_narrow_rows(block_n, options["num_warps"])


def forward_options(N: int, itemsize: int, device: torch.device) -> dict[str, int]:
    """Launch options of the forward of `dropout_add_layer_norm`. itemsize: that of the branch."""
    return launch_options(N, launch_table.options("norm forward", N, itemsize, device, {}))


def backward_options(N: int, itemsize: int, device: torch.device) -> tuple[dict[str, int], int]:
    """Launch options, and the warps per SM: by default WARPS_PER_SM, but at least those of one
    program. That number of warps hides the memory latency; more would only write more partial
    sums."""
    measured = launch_table.options("norm backward", N, itemsize, device, {})
    options = dict(warps_per_sm=WARPS_PER_SM) | launch_options(N, measured)
    return options, max(options.pop("warps_per_sm"), options["num_warps"])


def programs(rows: int, N: int, itemsize: int, device: torch.device) -> int:
    """The number of programs that share the rows. itemsize: that of the branch."""
    options, warps = backward_options(N, itemsize, device)
    per_sm = warps // options["num_warps"]
    return min(triton.cdiv(rows, options["BLOCK_M"]), per_sm * launch.num_sms(device))


def layer_norm_bwd(
    dsum: Tensor | None, dnorm: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, seed: Tensor | None, dropout_p: float, branch_dtype: torch.dtype, P: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dbranch in `branch_dtype`, dresidual like total, contiguous; the partial sums of
    dweight and dbias, (P, N) float32.

    total: the sum, or the x of `layer_norm`. weight: (N,), or the (P, N) view of it that
    `norm_parameters` makes. dsum, dnorm: None for a gradient of 0. P: the number of programs.
    wanted: whether to compute dbranch, dresidual, dweight and dbias; one that is not wanted is
    returned empty.
    """
    dsum_rows, dnorm_rows = (
        None if d is None else launch.contiguous_rows(d) for d in (dsum, dnorm)
    )
    rows = launch.contiguous_rows(total)
    M, N = rows.shape
    options, warps = backward_options(N, branch_dtype.itemsize, total.device)
    outputs = _empty_outputs(total, branch_dtype, P, wanted)
    if total.numel():
        inputs = dsum_rows, dnorm_rows, rows, one_row(weight), mean, rstd, seed
        pointers = (d if want else None for d, want in zip(outputs, wanted, strict=True))
        strides = (0 if d is None else d.stride(0) for d in (dsum_rows, dnorm_rows, rows))
        drop = dropout.threshold(dropout_p), dropout.keep_scale(dropout_p)
        # Limits the registers per thread only so far that `warps` warps fit an SM. By itself,
        # ptxas would spill some so that more warps fit.
        options["maxnreg"] = min(255, 65_536 // (32 * warps))
        _bwd_kernel[(P,)](*inputs, *pointers, M, N, *strides, *drop, **options)
    else:
        for d in outputs:
            d.zero_()
    return outputs


def one_row(parameter: Tensor | None) -> Tensor | None:
    """A parameter as a contiguous (N,) tensor. It is given as (N,), or as the (P, N) view that
    `norm_parameters` makes."""
    if parameter is None:
        return None
    return (parameter[0] if parameter.dim() == 2 else parameter).contiguous()


def _empty_outputs(
    total: Tensor, branch_dtype: torch.dtype, P: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized gradients."""
    partial = (P, total.shape[-1]), torch.float32
    kinds = [(total.shape, branch_dtype), (total.shape, total.dtype), partial, partial]
    dbranch, dresidual, dweight, dbias = (
        total.new_empty(shape if want else 0, dtype=dtype)
        for want, (shape, dtype) in zip(wanted, kinds, strict=True)
    )
    return dbranch, dresidual, dweight, dbias


layer_norm_backward = custom_op(
    "layer_norm_backward", layer_norm_bwd,
    lambda dsum, dnorm, total, *rest: _empty_outputs(total, *rest[-3:]),
)  # fmt: skip
