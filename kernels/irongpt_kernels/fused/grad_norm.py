"""
The norm of all gradients, and what follows of it for the update: the first of the optimizer's two
passes. The second is `adamw`.

    norm = sqrt(sum(g^2)) / scale      divisor = scale max(1, (norm + 1e-6) / max_norm)
    overflow = norm is not finite      the loss scale and the counts of steps, in place

Traffic     Reads every gradient, 2 or 4 bytes a weight.
Parallelism A program has BLOCK elements of one tensor. A launch takes its tensors' addresses as
            arguments: nothing is copied to the device, and none need lie beside another. Of them
            a program selects its own by its number. Every program keeps a partial sum, and one
            more program sums those in order: two kernels for up to 48 tensors, no atomics, the
            same bits on every run.
Precision   float32, sums of squares too: beyond 1.8e19 a gradient counts as an overflow.
Limits      Gradients of float32 and of one 16-bit type; those that are not contiguous from an
            address that is a multiple of 16, as PyTorch allocates them, are copied.
Spec        irongpt_kernels/eager.py::grad_norm
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from irongpt_kernels.runtime import launch

BLOCK = 1024
MAX_TENSORS = 48  # of a launch: five addresses each are 1.9 of the 4 KB that arguments may take
SUMS = 1024  # partial sums that the last program reads at a time


@triton.jit
def address_of(pointers, i: tl.constexpr, mine, address):
    """That of tensor i as a number, for the programs that are its own."""
    return tl.where(mine, pointers[i].to(tl.int64), address)


@triton.jit
def load(address, offsets, mask, dtype: tl.constexpr):
    """float32 of what lies at an address, which is a multiple of 16."""
    pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gradient(
    address, offsets, mask, narrow, NARROW: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """NARROW, WIDE: gradients of `dtype`, or of float32, are in the launch. narrow: this is one."""
    g = tl.zeros(offsets.shape, tl.float32)
    if WIDE:
        g += load(address, offsets, mask & (not narrow), tl.float32)
    if NARROW:
        g += load(address, offsets, mask & narrow, dtype)
    return g


@triton.jit
def _square_kernel(
    grads, firsts, sizes, sums_ptr, N: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of squares of each program's elements. Of N gradients the first NARROW are narrow.

    firsts: of each tensor, the number of its first program; sizes: its elements.
    """
    program = tl.program_id(0)
    address, first, size, narrow = grads[0].to(tl.int64), 0, tl.cast(sizes[0], tl.int64), NARROW > 0
    for i in tl.static_range(1, N):
        mine = program >= firsts[i]
        address = address_of(grads, i, mine, address)
        first = tl.where(mine, firsts[i], first)
        size = tl.where(mine, sizes[i], size)
        narrow = tl.where(mine, i < NARROW, narrow)
    offsets = tl.cast(program - first, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = grads[0].dtype.element_ty
    g = load_gradient(address, offsets, offsets < size, narrow, NARROW > 0, NARROW < N, dtype)
    tl.store(sums_ptr + program, tl.sum(g * g, 0))


@triton.jit
def _finish_kernel(
    sums_ptr, scale_ptr, good_ptr, steps_ptr, out_ptr, programs, n, max_norm,
    CALM: tl.constexpr, SUMS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: (norm, divisor, overflow); the loss scale and the counts of steps."""
    total = tl.zeros((SUMS,), tl.float32)
    cols = tl.arange(0, SUMS)
    for start in range(0, programs, SUMS):
        total += tl.load(sums_ptr + start + cols, mask=start + cols < programs, other=0.0)
    scale = tl.load(scale_ptr)
    norm = tl.sqrt_rn(tl.sum(total, 0)) / scale
    good = norm < float("inf")  # not so for NaN
    larger = (norm + 1e-6) / max_norm
    tl.store(out_ptr, norm)
    tl.store(out_ptr + 1, scale * tl.where(larger > 1.0, larger, 1.0))
    tl.store(out_ptr + 2, tl.where(good, 0.0, 1.0))
    state_steps = tl.arange(0, STEPS)
    before = tl.load(steps_ptr + state_steps, mask=state_steps < n, other=0.0)
    tl.store(steps_ptr + state_steps, before + tl.where(good, 1.0, 0.0), mask=state_steps < n)
    if CALM > 0:
        count = tl.where(good, tl.load(good_ptr) + 1, 0)
        grow = count >= CALM
        scale *= tl.where(good, tl.where(grow, 2.0, 1.0), 0.5)
        tl.store(scale_ptr, tl.minimum(tl.maximum(scale, 1.0), 16777216.0))
        tl.store(good_ptr, tl.where(grow, 0, count))


Chunk = tuple[int, int, int]  # tensors from one number to another; programs for them


def chunks(tensors: list[Tensor]) -> list[Chunk]:
    """The launches for so many tensors."""
    ranges = [(i, i + MAX_TENSORS) for i in range(0, len(tensors), MAX_TENSORS)]
    return [(a, b, sum(map(_programs, tensors[a:b]))) for a, b in ranges]


def _programs(t: Tensor) -> int:
    return triton.cdiv(t.numel(), BLOCK)


def layout(tensors: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The number of each tensor's first program, and its elements."""
    firsts = [0]
    for t in tensors:
        firsts.append(firsts[-1] + _programs(t))
    return tuple(firsts[:-1]), tuple(t.numel() for t in tensors)


def packed(g: Tensor) -> Tensor:
    """The same, contiguous from an address as `load` takes it."""
    fits = g.is_contiguous() and g.data_ptr() % 16 == 0
    return g if fits else g.clone(memory_format=torch.contiguous_format)


def narrow_count(grads: list[Tensor]) -> int:
    """How many of the gradients, the first ones, are of a 16-bit type, which is one."""
    count = sum(g.dtype != torch.float32 for g in grads)
    if len({g.dtype for g in grads[:count]} - {torch.float32}) > 1:
        raise TypeError("gradients must be float32 and of one other type at most")
    if any(g.dtype != torch.float32 for g in grads[count:]):
        raise TypeError("gradients of another type than float32 must be those of the first weights")
    return count


def unscale_launch(
    grads: list[Tensor],
    scale: Tensor,
    growth_tracker: Tensor,
    state_steps: Tensor,
    max_norm: float,
    growth_interval: int,
) -> Tensor:
    """(norm, divisor, overflow), (3,) float32; the other tensors change in place."""
    grads = sorted(map(packed, grads), key=lambda g: g.dtype == torch.float32)
    launches = chunks(grads)
    programs = sum(count for *_, count in launches)
    sums = torch.empty(programs, dtype=torch.float32, device=scale.device)
    out = torch.empty(3, dtype=torch.float32, device=scale.device)
    done = 0
    with launch.on(scale.device):
        for a, b, count in launches:
            some = grads[a:b]
            options = dict(N=len(some), NARROW=narrow_count(some), BLOCK=BLOCK, num_warps=4)
            _square_kernel[(count,)](tuple(some), *layout(some), sums[done:], **options)
            done += count
        _finish_kernel[(1,)](
            sums, scale, growth_tracker, state_steps, out, programs, len(state_steps), max_norm,
            CALM=growth_interval, SUMS=SUMS, STEPS=launch.block(len(state_steps)), num_warps=4,
        )  # fmt: skip
    return out


_op = torch.library.custom_op(
    "irongpt::grad_norm", unscale_launch, mutates_args=("scale", "growth_tracker", "state_steps")
)


@_op.register_fake
def _(grads: Any, scale: Tensor, *_: Any) -> Tensor:
    return scale.new_empty(3, dtype=torch.float32)


def grad_norm(
    grads: list[Tensor],
    scale: Tensor,
    growth_tracker: Tensor,
    state_steps: Tensor,
    *,
    max_norm: float,
    growth_interval: int = 0,
) -> Tensor:
    """See `eager.grad_norm`. Raises TypeError for gradients of more than one 16-bit type."""
    return _op(list(grads), scale, growth_tracker, state_steps, float(max_norm), growth_interval)
