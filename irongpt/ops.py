"""Chooses the implementation of the ops, and reports why it cannot run or is slow."""

import torch
from irongpt_kernels import Ops
from irongpt_kernels.runtime import emulate

from irongpt import driver, launch_cache
from irongpt.config import GPTConfig, check
from irongpt.errors import UserError, short_reason


def load(name: str, device: torch.device, config: GPTConfig | None = None) -> Ops:
    """The module `eager`, `builtin` or `fused` of irongpt_kernels.

    config: the model that the ops are for. Raises UserError where fused cannot run: there is no
    silent fallback.
    """
    if name != "fused":
        from irongpt_kernels import builtin, eager

        return {"eager": eager, "builtin": builtin}[name]
    if config is not None:
        head = config.n_embd // config.n_head
        check(
            head in range(16, 129, 16),
            f"--fused needs a head dimension of 16, 32, ... or 128, and --n-embd {config.n_embd} "
            f"divided by --n-head {config.n_head} is {head}",
        )
    return _load_fused(device)


def _load_fused(device: torch.device) -> Ops:
    hint = "use --ops builtin, PyTorch's own functions"
    try:
        from irongpt_kernels import fused
        from irongpt_kernels.runtime import launch, turing
    except ImportError as e:
        raise UserError(f"--fused needs Triton, which cannot be imported ({e}): {hint}") from e
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 5):
            raise UserError(f"--fused needs compute capability 7.5 or newer: {hint}")
        try:
            launch.prepare(device)
        except RuntimeError as e:
            raise UserError(f"--fused: {e}") from e
        if emulate.enabled() and (old := driver.too_old_for(turing.small_dot_ptx())):
            raise UserError(f"{emulate.VARIABLE}: {old}: update the driver, or unset the variable")
        _build_launcher(hint)
        launch_cache.load(device)
    elif not (launch.INTERPRETED or launch.EXECUTED_PTX_ARCH):
        raise UserError(
            f"--fused needs an NVIDIA GPU, and the device is {device.type}: {hint}, or set "
            "TRITON_INTERPRET=1 to run the kernels on the CPU, slowly"
        )
    return fused


def _build_launcher(hint: str) -> None:
    """Lets Triton build the C module that launches kernels, which it keeps in its cache."""
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    except Exception as e:  # no compiler, no Python.h, no libcuda: each has its own type
        raise UserError(
            f"--fused: Triton cannot build its launcher ({short_reason(e)}): install a C compiler "
            f"and Python's headers (on Debian: apt install gcc python3-dev), or {hint}"
        ) from e


def notes(name: str, device: torch.device) -> list[str]:
    """Lines for the user: why the kernels are slow here, and which launch options they use."""
    if name != "fused":
        return []
    from irongpt_kernels.runtime import launch

    slow = ""
    if launch.EXECUTED_PTX_ARCH:
        slow = (
            f"the kernels are compiled for sm_{launch.EXECUTED_PTX_ARCH} and executed on the CPU, "
            "slowly"
        )
    elif device.type == "cpu":
        slow = "TRITON_INTERPRET=1: the kernels run in Triton's interpreter on the CPU, slowly"
    elif emulate.enabled():
        slow = (
            f"{emulate.VARIABLE}=sm_{emulate.ARCH}: the kernels of a T4 run on a newer GPU; "
            "their timings do not predict a T4's"
        )
    return [note for note in (slow, launch_cache.load(device).note) if note]
