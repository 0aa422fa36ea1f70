"""A fake driver for Triton: with it, launches on CPU tensors compile as for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from irongpt_kernels.runtime import turing


@contextmanager
def gpu(arch: int, device: int, max_shared: int = 0, stock: bool = False) -> Iterator[None]:
    """A context in which Triton sees a GPU of this architecture, for sm_75 with the hook of
    `turing`.

    device: a number that no GPU has, so that Triton keeps the kernels for it separate.
    max_shared: the limit of shared memory per program, in bytes. stock: without the hook.
    """
    properties = dict(max_shared_mem=max_shared)
    fake = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    hook, active = knobs.runtime.add_stages_inspection_hook, driver._active
    if arch == turing.ARCH:
        (turing.uninstall if stock else turing.install)()
    driver.set_active(fake)
    try:
        yield
    finally:
        driver._active = active
        knobs.runtime.add_stages_inspection_hook = hook
