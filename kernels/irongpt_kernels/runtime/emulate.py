"""
A T4 where there is none: with IRONGPT_EMULATE=sm_75 in the environment every kernel is chosen and
compiled as for a T4, and runs on the NVIDIA GPU that is there, as long as it is newer.

A cubin for sm_75 runs on sm_75 alone. PTX runs on what is newer too: the driver compiles it when it
is loaded. So Triton is told that its target is sm_75, all of its stages run as they would for a T4
(with `turing`, to the cubin), and then its loader gets the PTX that the cubin was made from.

What it shows     the tiles, the layouts, the instructions that the PTX names and a T4's limit of
                  shared memory; so results, masks and losses are those of a T4's code
What it does not  a T4's speed, its SASS, its registers (both are the driver's for this GPU), and
                  how its HMMA rounds inside an instruction; PyTorch's own kernels stay this GPU's

Spec        CUDA C++ Programming Guide, "Just-in-Time Compilation" and "PTX Compatibility"
"""

import functools
import os

import torch

VARIABLE = "IRONGPT_EMULATE"
ARCH = 75
NUM_SMS = 40
SHARED = 65_536  # bytes that a program may have on sm_75


def on() -> bool:
    """Whether kernels are those of a T4. Raises ValueError for a value that is not sm_75."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", f"sm_{ARCH}"):
        raise ValueError(f"{VARIABLE} must be sm_{ARCH} or unset, got {wanted!r}")
    return bool(wanted)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels are made for: of the GPU, or (7, 5) in its place."""
    return divmod(ARCH, 10) if on() else torch.cuda.get_device_capability(device)


@functools.cache
def install() -> None:
    """From here on Triton's target is sm_75, and what it compiles for sm_75 is loaded as PTX.

    For this process, as the variable is; the second call does nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    driver.active.get_current_target = lambda: GPUTarget("cuda", ARCH, 32)
    load = compiler.CompiledKernel._init_handles

    def load_ptx(self: compiler.CompiledKernel) -> None:
        if self.module is None and self.metadata.target.arch == ARCH:
            if self.metadata.shared > SHARED:
                raise OutOfResources(self.metadata.shared, SHARED, "shared memory")
            self.kernel = self.asm["ptx"].encode() + b"\0"
        load(self)

    compiler.CompiledKernel._init_handles = load_ptx
