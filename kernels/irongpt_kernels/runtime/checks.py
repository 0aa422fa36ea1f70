"""Argument validation shared by all fused ops. Messages name the argument and its value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from irongpt_kernels.dropout import check

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tensors(
    *, integers: dict[str, Tensor] | None = None, optional: dict[str, Tensor | None] | None = None,
    **floats: Tensor,
) -> None:  # fmt: skip
    """Raises TypeError unless all are tensors in one of FLOATS, and `integers` in int64; ValueError
    unless all are on the device of the first. optional: floating tensors that may be None."""
    floats |= {name: t for name, t in (optional or {}).items() if t is not None}
    dtype(FLOATS, **floats)
    dtype((torch.int64,), **integers or {})
    same_device(**floats, **integers or {})


def dtype(wanted: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Raises TypeError unless all are tensors of one of these dtypes."""
    for name, t in tensors.items():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        if got not in wanted:
            names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
            raise TypeError(f"{name} must be a tensor of {names}, got {got}")


def same_device(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors are on the device of the first."""
    (first, device), *others = ((name, t.device) for name, t in tensors.items())
    for name, other in others:
        if other != device:
            raise ValueError(f"{name} is on {other}, but {first} is on {device}")


def same_dtype(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors have the dtype of the first."""
    (first, dtype), *others = ((name, t.dtype) for name, t in tensors.items())
    for name, other in others:
        if other != dtype:
            raise ValueError(f"{name} must have the dtype of {first}, {dtype}, got {other}")


def head_dimension(name: str, t: Tensor) -> None:
    """Raises ValueError unless the attention kernels support the last dimension of t."""
    D = t.shape[-1]
    if D not in range(16, 129, 16):
        raise ValueError(f"D, the last dimension of {name}, must be 16, 32, ... or 128, got {D}")


def shape(wanted: Sequence[int | str], **tensors: Tensor | None) -> None:
    """Raises ValueError unless each tensor has the shape, or is None. A string in `wanted`, such as
    "B", fits any size."""
    for name, t in tensors.items():
        if t is None:
            continue
        pairs = zip(t.shape, wanted, strict=False)
        if t.dim() != len(wanted) or any(n != size for n, size in pairs if type(size) is not str):
            named = str(tuple(wanted)).replace("'", "")
            raise ValueError(f"{name} must have shape {named}, got {tuple(t.shape)}")


def ids(below: int, ignored: int | None = None, **tensor: Tensor) -> None:
    """Raises ValueError for an id outside [0, below) that is not `ignored`, but not on a GPU, where
    the host would have to wait. tensor: one keyword argument, NAME=ids; messages use NAME."""
    ((name, t),) = tensor.items()
    if t.device.type == "cpu":
        bad, allowed = (t < 0) | (t >= below), f"[0, {below})"
        if ignored is not None:
            bad, allowed = bad & (t != ignored), f"{allowed} or {ignored}"
        if bad.any():
            raise ValueError(f"{name} must be in {allowed}, got {int(t[bad][0])}")


def rows(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor without dimensions."""
    for name, t in tensors.items():
        if t.dim() == 0:
            raise ValueError(f"{name} must have at least one dimension, got shape ()")


def memory(
    wanted: torch.dtype, size: Sequence[int | str], device: torch.device, **tensors: Tensor
) -> None:
    """For kernels that use no strides. Raises TypeError unless all have the dtype `wanted`,
    ValueError unless they are contiguous, of shape `size` and on `device`."""
    dtype((wanted,), **tensors)
    shape(size, **tensors)
    for name, t in tensors.items():
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, but must be on {device}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def addresses(
    dtype: torch.dtype, sizes: Sequence[Sequence[int]], device: torch.device, **lists: list[Tensor]
) -> None:
    """Checks lists of tensors as `memory` does, for kernels that get addresses. Raises ValueError
    also if an address is not a multiple of 16, or a list does not have the shapes `sizes`."""
    for name, tensors in lists.items():
        if len(tensors) != len(sizes):
            raise ValueError(f"{name} must have {len(sizes)} tensors, got {len(tensors)}")
        for i, (t, size) in enumerate(zip(tensors, sizes, strict=True)):
            memory(dtype, size, device, **{f"{name}[{i}]": t})
            if t.data_ptr() % 16:
                raise ValueError(f"{name}[{i}] must begin at a multiple of 16 bytes")


def copies(found: list[Tensor], sizes: Sequence[Sequence[int]], device: torch.device) -> None:
    """`addresses` for the 16-bit copies of weights, which have one dtype."""
    if found:
        dtype(FLOATS, low_precision_params=found[0])
        addresses(found[0].dtype, sizes, device, low_precision_params=found)


def gradients(grads: list[Tensor], sizes: Sequence[Sequence[int]], device: torch.device) -> None:
    """Raises TypeError unless gradients are float32 or of one 16-bit dtype, ValueError unless they
    have the shapes `sizes` and are on `device`."""
    for i, g in enumerate(grads):
        dtype(FLOATS, **{f"grads[{i}]": g})
        if g.device != device:
            raise ValueError(f"grads[{i}] is on {g.device}, but must be on {device}")
    if len({g.dtype for g in grads} - {torch.float32}) > 1:
        raise TypeError("gradients must be float32, or float32 and one 16-bit dtype")
    if [g.shape for g in grads] != list(sizes):
        raise ValueError(f"grads must have the shapes of the {len(sizes)} weights")


def dropout(p: float, seed: "int | Tensor | None", **tensor: Tensor) -> None:
    """Raises ValueError for p outside [0, 1), and for p > 0 without a seed. For errors of the seed
    see `seed_of`."""
    check(p)
    if seed is not None:
        seed_of(seed, **tensor)
    elif p > 0:
        raise ValueError("dropout_p > 0 needs a seed")


def seed_of(seed: "int | Tensor", **tensor: Tensor) -> None:
    """ValueError: a seed beyond 64 bits or on another device than `tensor`. TypeError: a seed of
    another type. tensor: one keyword argument, NAME=a tensor of the op; messages use NAME."""
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit into a signed 64-bit integer, got {seed}")
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {seed!r}")
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a 0-d int64 tensor, got {seed.dtype} {seed.shape}")
    same_device(**tensor, seed=seed)
