"""Everything that depends on the GPU: which one, how many programs, how they launch.

In Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) kernels run on CPU
tensors, program after program, and stand in for a small GPU.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from irongpt_kernels.runtime import emulate, turing

INTERPRETED = bool(knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """Compute capability as in sm_75: 75, 80, 90. A CPU, for the interpreter, counts as a T4."""
    if device.type != "cuda":
        return turing.ARCH
    if emulate.on():
        return emulate.ARCH
    major, minor = _asked(torch.cuda.get_device_capability, device)
    return 10 * major + minor


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; in the interpreter 2, so that programs share rows."""
    if device.type != "cuda":
        return 2
    if emulate.on():
        return emulate.NUM_SMS
    return int(_asked(torch.cuda.get_device_properties, device).multi_processor_count)


@functools.cache
def _asked(torch_function: Callable[[torch.device], Any], device: torch.device) -> Any:
    """What torch says of a device, asked once: each launch needs it. The function is a part of the
    question, so that one which stands in for torch's is asked itself."""
    return torch_function(device)


def prepare(device: torch.device) -> None:
    """From here on launches use the device's tensor cores. Cheap when it is done.

    Raises RuntimeError where `turing` cannot make them do so.
    """
    if device.type != "cuda" or INTERPRETED:
        return
    if emulate.on():
        emulate.install()
    if architecture(device) == turing.ARCH:
        turing.install()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the device of the tensors, whatever the current one is. See `prepare`."""
    prepare(device)
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def block(n: int) -> int:
    """The power of two that covers n, and 16 at least."""
    return max(16, triton.next_power_of_2(n))


def warps(elements: int) -> int:
    """Warps for a program that holds `elements` in registers: 8 to 16 a thread."""
    return min(16, max(1, elements // 512))


def seed_tensor(seed: "int | Tensor | None", device: torch.device) -> Tensor:
    """The seed as kernels read it: 0-d int64 on the device. None, where nothing drops, is 0."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), 0 if seed is None else seed, dtype=torch.int64, device=device)


def matrix(x: Tensor) -> Tensor:
    """x as (M, N): a view where one stride leads from row to row, else a copy."""
    N = x.shape[-1]
    return x.reshape(x.numel() // N if N else 0, N)


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, T, 3, H, D) -> q, k and v, or their gradients, as (B, H, T, D) views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()
