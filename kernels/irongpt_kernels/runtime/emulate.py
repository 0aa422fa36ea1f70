"""Emulation of a T4 on a newer NVIDIA GPU: IRONGPT_EMULATE=sm_75 compiles every kernel as for a T4.

A cubin for sm_75 runs on sm_75 only. PTX for sm_75 also runs on newer GPUs, where the driver
compiles it at load time. So this module sets Triton's target to sm_75, lets all stages run as for a
T4 (with `turing`, up to the cubin), and then gives the loader the PTX from which the cubin was
made.

Covered     the tiles, the layouts, the instructions in the PTX and the shared-memory limit of a T4,
            and so the results, dropout masks and losses of the code that a T4 runs
Not covered the speed of a T4, its SASS and registers (the driver makes both for this GPU), and how
            its HMMA rounds internally; PyTorch's own kernels remain those of this GPU

Source      CUDA C++ Programming Guide, "Just-in-Time Compilation" and "PTX Compatibility"
"""

import functools
import os

import torch

VARIABLE = "IRONGPT_EMULATE"
ARCH = 75
NUM_SMS = 40
SHARED = {75: 65_536, 80: 166_912, 90: 232_448}  # bytes of shared memory that a program may have


def enabled() -> bool:
    """Whether T4 emulation is on. Raises ValueError if the variable is set to another value."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", f"sm_{ARCH}"):
        raise ValueError(f"{VARIABLE} must be sm_{ARCH} or unset, got {wanted!r}")
    return bool(wanted)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels are compiled for: (7, 5) under emulation."""
    return divmod(ARCH, 10) if enabled() else torch.cuda.get_device_capability(device)


@functools.cache
def install() -> None:
    """Sets Triton's target to sm_75 and makes it load kernels as PTX, for the rest of the process.
    Further calls do nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    driver.active.get_current_target = lambda: GPUTarget("cuda", ARCH, 32)
    load = compiler.CompiledKernel._init_handles

    def load_ptx(self: compiler.CompiledKernel) -> None:
        if self.module is None and self.metadata.target.arch == ARCH:
            if self.metadata.shared > SHARED[ARCH]:
                raise OutOfResources(self.metadata.shared, SHARED[ARCH], "shared memory")
            self.kernel = self.asm["ptx"].encode() + b"\0"
        load(self)

    compiler.CompiledKernel._init_handles = load_ptx
