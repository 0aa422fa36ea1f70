"""Runs Triton kernels on a CPU from the PTX that Triton compiles for an NVIDIA GPU.

    with emulating(75) as report:
        fused.layer_norm(x, weight)  # CPU tensors; this executes the kernel compiled for sm_75

A launch goes through Triton as on a GPU. Triton specializes the arguments and compiles for the
architecture (for sm_75 with the hook in `runtime.turing`), then hands the compiled kernel, the
grid and the arguments to a driver. The driver here parses the PTX (`parse`), makes Python functions
of it (`blocks`, `instructions`, `compute`), and runs the CTAs of the grid, some side by side
(`threads`, `memory`, `tensor_cores`), on the memory of the tensors. A CTA is a block of threads in
CUDA's terms, and runs one Triton program.

kernels/README.md says what is executed and checked, how the arithmetic follows PTX, and what is not
covered. Besides, ptxas may fuse a mul and an add, and about one fma in 2^29 of the emulator is off
by an ulp, so a GPU can give other bits.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from irongpt_kernels.ptx.execute import Argument, Options, execute
from irongpt_kernels.ptx.threads import Report
from irongpt_kernels.runtime import emulate, fake_driver, launch

_SMS = 2  # that the launchers see, which decides how many programs share the rows
_DEVICES = 1000  # from this device number on, kernels are compiled to PTX only


def _flatten(kind: Any, x: Any) -> list[Argument]:
    """The arguments that are passed to the kernel, tuples taken apart."""
    if isinstance(kind, tuple):
        return [one for k, y in zip(kind, x, strict=True) for one in _flatten(k, y)]
    return [] if kind == "constexpr" else [(kind, x)]


def _launch(kernel: Any, grid: Any, values: Any) -> None:
    options, report = _active[-1]
    ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
    if options.change is not None:
        ptx = options.change(kernel.metadata.name, ptx)
    if shared > emulate.SHARED[options.arch]:
        raise OutOfResources(shared, emulate.SHARED[options.arch], "shared memory")
    arguments = _flatten(tuple(kernel.src.signature.values()), values)
    execute(ptx, grid, arguments, shared, options, report)


_active: list[tuple[Options, Report]] = []  # the `emulating` blocks that are active


@contextlib.contextmanager
def emulating(arch: int, **options: Any) -> Iterator[Report]:
    """A context in which launches on CPU tensors execute the PTX of the kernel.

    options: see `Options`. Raises RuntimeError in a process with TRITON_INTERPRET=1.
    """
    if launch.INTERPRETED:
        raise RuntimeError("compiled kernels cannot be executed: unset TRITON_INTERPRET")
    report = Report()

    def init(kernel: Any) -> None:
        def run(gx: int, gy: int, gz: int, stream: Any, function: Any, *rest: Any) -> None:
            _launch(kernel, (gx, gy, gz), rest[-len(kernel.src.signature) :])  # without hooks

        if kernel._run is None:
            kernel._run, kernel.module, kernel.function = run, object(), object()

    folder = os.path.join(knobs.cache.dir, "ptx")
    _active.append((Options(arch, **options), report))
    try:
        with (
            knobs.cache.scope(),  # restores TRITON_CACHE_DIR too, which `dir` sets
            fake_driver.gpu(arch, _DEVICES + arch, emulate.SHARED[arch]),
            patch.object(CUDABackend, "make_cubin", lambda *_: b""),  # nothing reads it
            patch.object(CompiledKernel, "_init_handles", init),
            patch.object(launch, "EXECUTED_PTX_ARCH", arch),
            patch.object(launch, "num_sms", lambda device: _SMS),
        ):
            knobs.cache.dir = folder
            yield report
    finally:
        _active.pop()
