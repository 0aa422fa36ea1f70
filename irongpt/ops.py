"""The seam: which implementation of the ops a model is built on. All of it is here."""

from types import ModuleType

import torch
from irongpt_kernels.runtime import emulate

from irongpt import launch_cache
from irongpt.config import GPTConfig, check
from irongpt.errors import UserError


def load(name: str, device: torch.device, config: GPTConfig | None = None) -> ModuleType:
    """The module of ops called `name`: eager, builtin or fused. config: the model that it is for.

    Raises UserError where fused cannot run: it never falls back on another one.
    """
    if name == "fused" and config is not None:
        head = config.n_embd // config.n_head
        check(
            head in range(16, 129, 16),
            f"--fused takes heads of 16, 32, ... or 128, and --n-embd {config.n_embd} over "
            f"--n-head {config.n_head} is {head}",
        )
    if name == "fused":
        return _load_fused(device)
    from irongpt_kernels import builtin, eager

    return {"eager": eager, "builtin": builtin}[name]


def _load_fused(device: torch.device) -> ModuleType:
    hint = "--ops builtin takes PyTorch's own fused ops"
    try:
        from irongpt_kernels import fused
        from irongpt_kernels.runtime import launch
    except ImportError as e:
        raise UserError(f"--fused needs Triton, which is not here ({e}): {hint}") from e
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 5):
            raise UserError(f"--fused needs compute capability 7.5 or newer: {hint}")
        try:
            launch.prepare(device)
        except RuntimeError as e:
            raise UserError(f"--fused: {e}") from e
        launch_cache.load(device)
    elif not launch.INTERPRETED:
        raise UserError(
            f"--fused needs an NVIDIA GPU, and the device is {device.type}: {hint}, or set "
            "TRITON_INTERPRET=1 to run the kernels on the CPU, slowly"
        )
    return fused


def slow_note(name: str, device: torch.device) -> str | None:
    """What to tell a user whose kernels do not run as they would on the GPU they are for."""
    if name != "fused":
        return None
    if device.type == "cpu":
        return "TRITON_INTERPRET=1: the kernels run in Triton's interpreter on the CPU, slowly"
    if emulate.on():
        return f"{emulate.VARIABLE}=sm_{emulate.ARCH}: a T4's kernels; their timings are no T4's"
    return None
