"""A fake driver for Triton: with it, launches on CPU tensors compile as for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from irongpt_kernels.runtime import turing


class _Driver:
    """device: a number that no GPU has, so that Triton keeps its compiled kernels separate."""

    def __init__(self, arch: int, device: int, max_shared: int) -> None:
        self.arch, self.device = arch, device
        properties = dict(max_shared_mem=max_shared)
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def gpu(arch: int, device: int, max_shared: int = 0, stock: bool = False) -> Iterator[None]:
    """A context in which Triton sees a GPU of this architecture, for sm_75 with the hook of
    `turing`.

    device: see `_Driver`. max_shared: the limit of shared memory per program, in bytes. stock:
    without the hook.
    """
    hook, active = knobs.runtime.add_stages_inspection_hook, driver._active
    if arch == turing.ARCH:
        (turing.uninstall if stock else turing.install)()
    driver.set_active(_Driver(arch, device, max_shared))
    try:
        yield
    finally:
        driver._active = active
        knobs.runtime.add_stages_inspection_hook = hook
