"""Muon's kernels for n weight matrices of one shape: before and after the matmuls.

    muon_momentum:  g = g / grad_scale               grad_scale and found_inf come from `grad_norm`
                    m = beta m + (1 - beta) g
                    a = beta m + (1 - beta) g        Nesterov momentum
                    y = a / (|a| + 1e-7)             |a| is the Frobenius norm of each matrix
    muon_update:    p = p - lr decay p - lr scale u  u is y made orthogonal by matmuls
                    copy = p, rounded to the dtype of the copy

Traffic     With 16-bit gradients and matmuls, in bytes per weight: muon_momentum reads g and m and
            writes m, then reads both again for y, which needs the norm, and writes y: 18.
            muon_update reads u and p and writes p and the copy: 12. PyTorch's ops would move 92.
Parallelism The first dimension of the grid is over blocks of BLOCK elements, the second over
            matrices. A program selects its matrix from addresses that are kernel arguments, as in
            `grad_norm`. muon_momentum has two kernels. In the first a program loops over several
            blocks, so that each matrix has at most PARTS partial sums of squares. Every program of
            the second adds those of its matrix in a fixed order.
Precision   float32, except y and u, which have the dtype of the matmuls.
Limits      Parameters are contiguous float32, copies contiguous and of one dtype, at addresses
            that are multiples of 16, as PyTorch allocates them. momentum is contiguous float32.
            Gradients have one dtype, and are copied unless they are contiguous and aligned. If
            found_inf is set, y is 0, and m, p and copies do not change.
Spec        irongpt_kernels/eager.py::muon_momentum, muon_update
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.fused.grad_norm import BLOCK, aligned, launches, load, programs
from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

PARTS = 128  # partial sums per matrix, at most
TINY = tl.constexpr(1e-7)


@triton.jit
def _address(pointers, i, N: tl.constexpr):
    """The address of tensor i of N, as an integer."""
    address = pointers[0].to(tl.int64)
    for k in tl.static_range(1, N):
        address = tl.where(i == k, pointers[k].to(tl.int64), address)
    return address


@triton.jit
def _offsets(size, BLOCK: tl.constexpr):
    """The offsets of a program's elements in their matrix, and their mask."""
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < size


@triton.jit
def _momentum_kernel(
    grads, momentum_ptr, stats_ptr, sums_ptr, size, beta, one_minus_beta,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m and stores each program's sum of squares of a."""
    matrix, programs = tl.program_id(1), tl.num_programs(0)
    if tl.load(stats_ptr + 2) == 0.0:
        dtype: tl.constexpr = grads[0].dtype.element_ty
        address, grad_scale = _address(grads, matrix, N), tl.load(stats_ptr + 1)
        momentum_ptr += tl.cast(matrix, tl.int64) * size
        squares = tl.zeros((BLOCK,), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), programs):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < size
            g = tl.div_rn(load(address, offsets, mask, dtype), grad_scale)
            m = beta * tl.load(momentum_ptr + offsets, mask=mask, other=0.0) + one_minus_beta * g
            tl.store(momentum_ptr + offsets, m, mask=mask)
            a = beta * m + one_minus_beta * g
            squares += a * a
        tl.store(sums_ptr + matrix * programs + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def _nesterov_kernel(
    grads, momentum_ptr, stats_ptr, sums_ptr, y_ptr, parts, size, beta, one_minus_beta,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores y, from the updated m. parts: the number of partial sums per matrix."""
    matrix, part = tl.program_id(1), tl.arange(0, PARTS)
    offsets, mask = _offsets(size, BLOCK)
    at = tl.cast(matrix, tl.int64) * size + offsets
    y = tl.zeros((BLOCK,), tl.float32)
    if tl.load(stats_ptr + 2) == 0.0:
        sums = tl.load(sums_ptr + matrix * parts + part, mask=part < parts, other=0.0)
        dtype: tl.constexpr = grads[0].dtype.element_ty
        g = load(_address(grads, matrix, N), offsets, mask, dtype)
        g = tl.div_rn(g, tl.load(stats_ptr + 1))
        a = beta * tl.load(momentum_ptr + at, mask=mask, other=0.0) + one_minus_beta * g
        y = tl.div_rn(a, tl.sqrt_rn(tl.sum(sums, 0)) + TINY)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _update_kernel(
    weights, low_precision_params, update_ptr, lr_ptr, stats_ptr, size, scale, decay,
    N: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates p and, with COPY, its copy. weights: the parameters."""
    matrix = tl.program_id(1)
    offsets, mask = _offsets(size, BLOCK)
    if tl.load(stats_ptr + 2) == 0.0:
        lr, p_at = tl.load(lr_ptr), _address(weights, matrix, N)
        p_ptr = tl.multiple_of(p_at.to(tl.pointer_type(tl.float32)), 16) + offsets
        p = tl.load(p_ptr, mask=mask, other=0.0)
        at = tl.cast(matrix, tl.int64) * size + offsets
        u = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
        p = p - lr * decay * p - lr * scale * u
        tl.store(p_ptr, p, mask=mask)
        if COPY:
            dtype: tl.constexpr = low_precision_params[0].dtype.element_ty
            copy_ptr = _address(low_precision_params, matrix, N).to(tl.pointer_type(dtype))
            tl.store(tl.multiple_of(copy_ptr, 16) + offsets, p.to(dtype), mask=mask)


def _muon_momentum(
    grads: list[Tensor], momentum: Tensor, stats: Tensor, *, beta: float, dtype: torch.dtype
) -> Tensor:
    """See `eager.muon_momentum`."""
    device, shape = momentum.device, momentum.shape[1:]
    wanted = len(grads), "rows", "columns"
    checks.memory(torch.float32, wanted, device, momentum=momentum)
    checks.memory(torch.float32, (3,), device, stats=stats)
    if len({g.dtype for g in grads}) > 1:
        raise TypeError("the gradients of a group of matrices must have one dtype")
    checks.gradients(grads, [shape] * len(grads), device)
    grads = [aligned(g) for g in grads]
    y = torch.empty_like(momentum, dtype=dtype)
    size = momentum[0].numel()
    blocks = triton.cdiv(size, BLOCK)
    parts = min(blocks, PARTS)
    sums = torch.empty(len(grads), parts, dtype=torch.float32, device=y.device)
    for part, *_ in launches(programs(grads)):
        some, m, s = tuple(grads[part]), momentum[part], sums[part]
        numbers, options = (size, beta, 1 - beta), dict(N=len(some), BLOCK=BLOCK, num_warps=4)
        _momentum_kernel[(parts, len(some))](some, m, stats, s, *numbers, **options)
        _nesterov_kernel[(blocks, len(some))](
            some, m, stats, s, y[part], parts, *numbers, **options, PARTS=launch.block(parts)
        )
    return y


def _muon_update(
    params: list[Tensor], low_precision_params: list[Tensor], update: Tensor, lr: Tensor,
    stats: Tensor, *,
    scale: float, weight_decay: float,
) -> None:  # fmt: skip
    """See `eager.muon_update`."""
    device, sizes = lr.device, [update.shape[1:]] * len(update)
    checks.tensors(lr=lr, update=update)
    checks.addresses(torch.float32, sizes, device, params=params)
    checks.copies(low_precision_params, sizes, device)
    checks.memory(torch.float32, (), device, lr=lr)
    checks.memory(torch.float32, (3,), device, stats=stats)
    update = update.contiguous()
    size = update[0].numel()
    for part, *_ in launches(programs(params)):
        some, low = tuple(params[part]), tuple(low_precision_params[part])
        options = dict(N=len(some), COPY=bool(low), BLOCK=BLOCK, num_warps=4)
        _update_kernel[(triton.cdiv(size, BLOCK), len(some))](
            some, low, update[part], lr, stats, size, scale, weight_decay, **options
        )


muon_momentum = custom_op(
    "muon_momentum", _muon_momentum,
    lambda grads, momentum, *_, dtype, **__: torch.empty_like(momentum, dtype=dtype),
    mutates=("momentum",),
)  # fmt: skip
muon_update = custom_op("muon_update", _muon_update, mutates=("params", "low_precision_params"))
