"""Helpers of all launchers: properties of the GPU, block sizes, warps, and views of the arguments.

In Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) kernels run on CPU
tensors, one program after another, and these functions describe a small GPU.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from irongpt_kernels.runtime import emulate, turing

INTERPRETED = bool(knobs.runtime.interpret)
# The architecture whose PTX `irongpt_kernels.ptx` executes on CPU tensors; 0 if it executes none.
EXECUTED_PTX_ARCH = 0


def architecture(device: torch.device) -> int:
    """The compute capability as in sm_75: 75, 80, 90. The interpreter counts as a T4."""
    if device.type != "cuda":
        return EXECUTED_PTX_ARCH or turing.ARCH
    if emulate.enabled():
        return emulate.ARCH
    major, minor = _query(torch.cuda.get_device_capability, device)
    return 10 * major + minor


def num_sms(device: torch.device) -> int:
    """The number of SMs; in the interpreter 2, so that several programs share the rows."""
    if device.type != "cuda":
        return 2
    if emulate.enabled():
        return emulate.NUM_SMS
    return int(_query(torch.cuda.get_device_properties, device).multi_processor_count)


@functools.cache
def _query(torch_function: Callable[[torch.device], Any], device: torch.device) -> Any:
    """torch_function(device), cached because every launch needs it. The function is part of the
    cache key, so that a function patched in by a test is called."""
    return torch_function(device)


def prepare(device: torch.device) -> None:
    """Installs the compiler hooks that the device needs; later calls return at once.

    Raises RuntimeError if `turing` cannot enable the tensor cores of an sm_75 GPU.
    """
    if device.type != "cuda" or INTERPRETED:
        return
    if emulate.enabled():
        emulate.install()
    if architecture(device) == turing.ARCH:
        turing.install()


def device_context(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels launch on `device`, after `prepare`."""
    prepare(device)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def block(n: int) -> int:
    """The smallest power of two that is at least n and at least 16."""
    return max(16, triton.next_power_of_2(n))


def warps(elements: int) -> int:
    """The warps of a program that holds `elements` values, a power of two, in registers: 16 values
    per thread, but at least 1 warp and at most 16."""
    return min(16, max(1, elements // 512))


def no_fusion_in_narrow_rows(row: int, num_warps: int) -> dict[str, int]:
    """Launch options with which all threads get the same bits for the sum of `row` products.

    If each thread holds only one product a b, the compiler fuses that multiplication with the first
    addition of the reduction: fma(a, b, product of another lane). Each lane then skips the rounding
    of a different product, so the lanes get slightly different sums.
    """
    return {} if row > 32 * num_warps else dict(enable_fp_fusion=False)


def row_options(N: int, columns: int, elements: int) -> dict[str, int]:
    """Launch options for rows of N elements: blocks of at most `columns` columns, and of as many
    rows as make `elements` elements, at least one."""
    BLOCK_N = min(columns, block(N))
    BLOCK_M = max(1, elements // BLOCK_N)
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps(BLOCK_M * BLOCK_N))


def seed_tensor(seed: "int | Tensor | None", device: torch.device) -> Tensor:
    """The seed as a 0-d int64 tensor on the device. None, which means no dropout, becomes 0."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), 0 if seed is None else seed, dtype=torch.int64, device=device)


def as_matrix(x: Tensor) -> Tensor:
    """x as (M, N): a view if the leading dimensions collapse to one row stride, else a copy."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def contiguous_rows(x: Tensor) -> Tensor:
    """`as_matrix` with a column stride of 1, which a copy ensures if needed."""
    x = as_matrix(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """x itself if it is contiguous, else a copy; None for None."""
    return None if x is None else x.contiguous()


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """Splits (B, T, 3, H, D) into q, k and v, or their gradients, as (B, H, T, D) views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()
