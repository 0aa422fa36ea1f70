"""Gradient norm, clipping factor and loss scale: the pass before `adamw` or `muon`.

    norm = sqrt(sum(g^2)) / scale      grad_scale = scale max(1, (norm + 1e-6) / max_norm)
    found_inf = 1 if norm is not finite, else 0

    sum_shards: g = shard 0 + shard 1 + ..., in that order; then the same

scale (the loss scale), growth_tracker and state_steps are updated in place.

Traffic     reads every gradient: 2 or 4 bytes per weight. sum_shards reads those of all shards,
            writes their sum (4 bytes per weight) and reads it again for the norm. So the norm
            depends only on the sum, not on the number or the dtype of the shards.
Parallelism A program handles BLOCK elements of one tensor. The addresses of all tensors are kernel
            arguments, so no table is copied to the device, and the tensors may lie anywhere. A
            program selects its tensor by its program id. Every program stores a partial sum, and
            one program of a second kernel adds those in a fixed order. This takes two launches for
            up to 48 tensors, and one more for shards.
Precision   float32. The square of a gradient above 1.8e19 overflows to infinity and sets found_inf.
Limits      Gradients are float32 or of one 16-bit dtype. They are copied unless they are contiguous
            and their address is a multiple of 16, which PyTorch's allocator ensures. Shards are
            copied unless their rows are contiguous. scale and state_steps are contiguous float32,
            growth_tracker is int64.
Spec        irongpt_kernels/eager.py::grad_norm, sum_shards
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import checks, launch
from irongpt_kernels.runtime.custom_op import custom_op

BLOCK = 2048  # with 1,024, a program takes as long to find its tensor as to compute
MAX_TENSORS = 48  # per launch: 5 addresses of each in `adamw` take 1.9 KB; arguments may take 4 KB
SUMS = 1024  # partial sums that the second kernel reads at a time


@triton.jit
def select_address(pointers, i: tl.constexpr, mine, address):
    """One step of a loop in which a program finds the address of its tensor, as an integer. mine:
    whether tensor i begins at this program or before it. Returns the address of tensor i if so,
    else `address`, the result of the previous step."""
    return tl.where(mine, pointers[i].to(tl.int64), address)


@triton.jit
def load(address, offsets, mask, dtype: tl.constexpr):
    """Loads `dtype` at a 16-byte aligned address plus offsets, and returns it in float32."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gradient(
    address, offsets, mask, is_16bit,
    SOME_16BIT: tl.constexpr, SOME_FLOAT32: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Returns a gradient in float32. is_16bit: true if its dtype is `dtype`, false if it is
    float32. A launch with gradients of both dtypes issues a load for each, and masks off the one of
    the wrong dtype, so each element is read once.

    SOME_16BIT, SOME_FLOAT32: whether the launch has any gradient of `dtype`, and any of float32.
    """
    g = tl.zeros(offsets.shape, tl.float32)
    if SOME_FLOAT32:
        g += load(address, offsets, mask & (not is_16bit), tl.float32)
    if SOME_16BIT:
        g += load(address, offsets, mask & is_16bit, dtype)
    return g


@triton.jit
def _sum_squares_kernel(
    grads, firsts, sizes, sums_ptr, N: tl.constexpr, N_16BIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Stores each program's sum of squares. Of N gradients the first N_16BIT are 16-bit.

    firsts: the id of the first program of each tensor. sizes: the number of elements of each.
    """
    program = tl.program_id(0)
    address, first, size = grads[0].to(tl.int64), 0, tl.cast(sizes[0], tl.int64)
    is_16bit = N_16BIT > 0
    for i in tl.static_range(1, N):
        mine = program >= firsts[i]
        address = select_address(grads, i, mine, address)
        first = tl.where(mine, firsts[i], first)
        size = tl.where(mine, sizes[i], size)
        is_16bit = tl.where(mine, i < N_16BIT, is_16bit)
    offsets = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = grads[0].dtype.element_ty
    g = load_gradient(address, offsets, offsets < size, is_16bit, N_16BIT > 0, N_16BIT < N, dtype)
    tl.store(sums_ptr + program, tl.sum(g * g, 0))


@triton.jit
def _sum_shards_kernel(shards_ptr, total_ptr, shards, stride, size, BLOCK: tl.constexpr):
    """Stores the sum of the shards. stride: between shards."""
    offsets = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    g = tl.load(shards_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for shard in range(1, shards):
        row = tl.cast(shard, tl.int64) * stride
        g += tl.load(shards_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_ptr + offsets, g, mask=mask)


@triton.jit
def _stats_kernel(
    sums_ptr, scale_ptr, growth_tracker_ptr, steps_ptr, stats_ptr, programs, n, max_norm,
    GROWTH_INTERVAL: tl.constexpr, SUMS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A single program stores (norm, grad_scale, found_inf), and updates the loss scale, the
    growth tracker and the n step counts."""
    total = tl.zeros((SUMS,), tl.float32)
    cols = tl.arange(0, SUMS)
    for start in range(0, programs, SUMS):
        total += tl.load(sums_ptr + start + cols, mask=start + cols < programs, other=0.0)
    scale = tl.load(scale_ptr)
    norm = tl.div_rn(tl.sqrt_rn(tl.sum(total, 0)), scale)
    finite = norm < float("inf")  # False for NaN
    larger = tl.div_rn(norm + 1e-6, max_norm)
    each = tl.arange(0, STEPS)
    before = tl.load(steps_ptr + each, mask=each < n, other=0.0)
    if GROWTH_INTERVAL > 0:
        count = tl.where(finite, tl.load(growth_tracker_ptr) + 1, 0)
    tl.debug_barrier()  # every warp has loaded the state before one of them stores it
    tl.store(stats_ptr, norm)
    tl.store(stats_ptr + 1, scale * tl.where(larger > 1.0, larger, 1.0))
    tl.store(stats_ptr + 2, tl.where(finite, 0.0, 1.0))
    tl.store(steps_ptr + each, before + tl.where(finite, 1.0, 0.0), mask=each < n)
    if GROWTH_INTERVAL > 0:
        grow = count >= GROWTH_INTERVAL
        scale *= tl.where(finite, tl.where(grow, 2.0, 1.0), 0.5)
        tl.store(scale_ptr, tl.minimum(tl.maximum(scale, 1.0), 16777216.0))
        tl.store(growth_tracker_ptr, tl.where(grow, 0, count))


def programs(tensors: list[Tensor]) -> list[int]:
    """The number of programs of each tensor."""
    return [triton.cdiv(t.numel(), BLOCK) for t in tensors]


def launches(counts: list[int]) -> Iterator[tuple[slice, tuple[int, ...], int]]:
    """Splits tensors into launches of at most MAX_TENSORS. Yields, for each launch, the
    slice of its tensors, the first program of each, and the number of programs. counts: the number
    of programs of each tensor."""
    for i in range(0, len(counts), MAX_TENSORS):
        part = slice(i, i + MAX_TENSORS)
        *firsts, count = itertools.accumulate(counts[part], initial=0)
        yield part, tuple(firsts), count


def aligned(g: Tensor) -> Tensor:
    """g itself if it is contiguous and 16-byte aligned, as `load` needs it, else a copy."""
    fits = g.is_contiguous() and g.data_ptr() % 16 == 0
    return g if fits else g.clone(memory_format=torch.contiguous_format)


def count_16bit(grads: Sequence[Tensor]) -> int:
    """The number of 16-bit gradients. Raises TypeError unless they come first."""
    count = sum(g.dtype != torch.float32 for g in grads)
    if any(g.dtype != torch.float32 for g in grads[count:]):
        raise TypeError("16-bit gradients must be those of the first weights")
    return count


def _grad_norm(
    grads: list[Tensor], scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> Tensor:  # fmt: skip
    """See `eager.grad_norm`."""
    checks.gradients(grads, [g.shape for g in grads], scale.device)
    _check_state(scale, growth_tracker, state_steps)
    grads = sorted(map(aligned, grads), key=lambda g: g.dtype == torch.float32)
    counts = programs(grads)
    sums = torch.empty(sum(counts), dtype=torch.float32, device=scale.device)
    done = 0
    for part, firsts, count in launches(counts):
        some = tuple(grads[part])
        sizes = tuple(g.numel() for g in some)
        options = dict(N=len(some), N_16BIT=count_16bit(some), BLOCK=BLOCK, num_warps=4)
        _sum_squares_kernel[(count,)](some, firsts, sizes, sums[done:], **options)
        done += count
    stats = torch.empty(3, dtype=torch.float32, device=scale.device)
    _stats_kernel[(1,)](
        sums, scale, growth_tracker, state_steps, stats, len(sums), len(state_steps), max_norm,
        GROWTH_INTERVAL=growth_interval, SUMS=SUMS,
        STEPS=launch.block(len(state_steps)), num_warps=4,
    )  # fmt: skip
    return stats


def _check_state(scale: Tensor, growth_tracker: Tensor, state_steps: Tensor) -> None:
    device, n = scale.device, state_steps.numel()
    checks.memory(torch.float32, (), device, scale=scale)
    checks.memory(torch.int64, (), device, growth_tracker=growth_tracker)
    checks.memory(torch.float32, (n,), device, state_steps=state_steps)


def _sum_shards(
    shards: Tensor, scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.sum_shards`."""
    checks.shape(("S", "n"), shards=shards)
    checks.same_device(scale=scale, shards=shards)
    if not len(shards):
        raise ValueError("shards must have at least one row")
    _check_state(scale, growth_tracker, state_steps)
    shards = shards if shards.stride(1) == 1 else shards.contiguous()
    count, size = shards.shape
    total = torch.empty(size, dtype=torch.float32, device=scale.device)
    _sum_shards_kernel[(triton.cdiv(size, BLOCK),)](
        shards, total, count, shards.stride(0), size, BLOCK=BLOCK, num_warps=4
    )
    state = scale, growth_tracker, state_steps
    stats = _grad_norm([total], *state, max_norm=max_norm, growth_interval=growth_interval)
    return total, stats


MUTATES = ("scale", "growth_tracker", "state_steps")
grad_norm = custom_op(
    "grad_norm", _grad_norm, lambda grads, scale, *_, **__: scale.new_empty(3), mutates=MUTATES
)
sum_shards = custom_op(
    "sum_shards", _sum_shards,
    lambda shards, scale, *_, **__: (scale.new_empty(shards.shape[1]), scale.new_empty(3)),
    mutates=MUTATES,
)  # fmt: skip
