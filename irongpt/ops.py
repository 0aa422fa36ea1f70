"""The seam: which implementation of the ops a model is built on. All of it is here."""

from types import ModuleType

import torch

from irongpt.errors import UserError


def load(name: str, device: torch.device) -> ModuleType:
    """The module of ops called `name`: eager, builtin or fused.

    Raises UserError where fused cannot run: it never falls back on another one.
    """
    if name == "fused":
        return _load_fused(device)
    from irongpt_kernels import builtin, eager

    return {"eager": eager, "builtin": builtin}[name]


def _load_fused(device: torch.device) -> ModuleType:
    hint = "train without --fused to use PyTorch's own fused ops"
    if device.type != "cuda":
        raise UserError(f"--fused needs an NVIDIA GPU, and the device is {device.type}: {hint}")
    if torch.cuda.get_device_capability(device) < (7, 5):
        raise UserError(f"--fused needs compute capability 7.5 or newer: {hint}")
    try:
        from irongpt_kernels import fused  # type: ignore[attr-defined]
    except ImportError as e:
        raise UserError(f"--fused cannot import its Triton kernels ({e}): {hint}") from e
    return fused
