"""What an op refuses: each message names the argument and its value."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def floating(**tensors: Tensor | None) -> None:
    """Every argument is a tensor of a float type that kernels take, on the first one's device.

    Raises TypeError for another type, ValueError for another device.
    """
    devices = []
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {t.dtype}")
        devices.append((name, t.device))
    for name, device in devices:
        if device != devices[0][1]:
            raise ValueError(f"{name} is on {device}, and {devices[0][0]} on {devices[0][1]}")


def shape(name: str, t: Tensor | None, wanted: tuple[int, ...]) -> None:
    """Raises ValueError unless t, where there is one, has the shape `wanted`."""
    if t is not None and tuple(t.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(t.shape)}")


def rank(name: str, t: Tensor, low: int, high: int | None = None) -> None:
    """Raises ValueError unless t has `low` to `high` dimensions; just `low` if no high is given."""
    if not low <= t.dim() <= (high or low):
        wanted = f"{low} dimensions" if high is None else f"{low} to {high} dimensions"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(t.shape)}")


def dropout(p: float, seed: "int | Tensor | None") -> None:
    """Raises ValueError for a probability that is none, TypeError for a seed that is none."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    if p > 0 and seed is None:
        raise ValueError("dropout_p > 0 needs a seed")
    if isinstance(seed, Tensor) and (seed.dim() != 0 or seed.dtype != torch.int64):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {seed.dtype} {seed.shape}")
