"""How the kernels of a comparison run: on a GPU, in Triton's interpreter, or from their PTX."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from irongpt.config import check
from irongpt.errors import UserError

Faults = Callable[[], list[str]]
ARCHS = ("sm_75", "sm_80", "sm_90")


@contextmanager
def execution(arch: str | None, device: str, candidate: str) -> Iterator[Faults | None]:
    """In this context kernels are compiled for `arch` and executed on the CPU, and it yields a
    function that lists the wrong memory accesses so far.

    If arch is None they run on the device, or in Triton's interpreter with matmuls whose bits do
    not depend on NumPy's BLAS. Raises UserError for flags that contradict each other.
    """
    if arch is None:
        matmuls: AbstractContextManager[None] = nullcontext()
        with suppress(ImportError):  # without Triton there is no interpreter
            from irongpt_kernels.runtime import interpreter, launch

            matmuls = interpreter.repeatable_matmuls() if launch.INTERPRETED else matmuls
        with matmuls:
            yield None
        return
    check(arch in ARCHS, f"--arch must be {', '.join(ARCHS)}, got {arch!r}")
    check(candidate == "fused", f"--arch is for the kernels, and --ops {candidate} has none")
    check(device in ("auto", "cpu"), f"--arch runs on the CPU, not on --device {device}")
    try:
        from irongpt_kernels.ptx.driver import emulating
        from irongpt_kernels.runtime import launch
    except ImportError as e:
        raise UserError(f"--arch needs Triton, which cannot be imported ({e})") from e
    check(not launch.INTERPRETED, "--arch needs compiled kernels: unset TRITON_INTERPRET")
    with emulating(int(arch.removeprefix("sm_"))) as report:
        yield report.lines
