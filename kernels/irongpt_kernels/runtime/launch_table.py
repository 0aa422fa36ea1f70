"""
Launch options measured on a user's GPU, which replace this package's default options.

The caller passes them to `use` before kernels are launched on that GPU; nothing is measured here,
and a launch only looks them up in a dict. Different options sum in a different order, so results
are bit-identical only for the same table, which `digest` identifies. This file imports no Triton.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Options = dict[str, int]
Key = tuple[str, int, int]  # kernel; columns, or D for attention; bytes of an element
Table = dict[Key, Options]
Default = TypeVar("Default", bound=Options | None)

TILE = ("BLOCK_M", "BLOCK_N", "num_warps")
# The key of "attention head" has the context, rounded up to a power of two: a tile has all queries.
HEADS = tuple(f"attention head {context}" for context in (16, 32, 64, 128, 256))
# The options of each kernel. "attention query" computes dQ, "attention key" dK and dV, and
# "attention head" all three. "norm forward" is that of dropout_add_layer_norm, "norm backward" that
# of all layer norms. maxnreg limits the registers per thread; without it ptxas decides.
OPTION_NAMES = {
    "attention forward": (*TILE, "num_stages", "maxnreg"),
    "attention query": (*TILE, "num_stages", "maxnreg"),
    "attention key": (*TILE, "num_stages", "maxnreg"),
    **dict.fromkeys(HEADS, ("BLOCK_N", "num_warps", "num_stages", "maxnreg")),
    "norm forward": ("BLOCK_M", "num_warps"),
    "norm backward": ("BLOCK_M", "num_warps", "warps_per_sm"),
    "gelu forward": TILE,
    "gelu backward": TILE,
}
RANGES = dict(
    BLOCK_M=(1, 256), BLOCK_N=(16, 1024), num_warps=(1, 16), num_stages=(1, 4), maxnreg=(64, 255),
    warps_per_sm=(1, 64),
)  # fmt: skip

_tables: dict[torch.device, Table] = {}


def use(device: torch.device, table: Table) -> None:
    """Later launches on the device use the options in the table; an empty one restores defaults.

    Raises ValueError for an unknown kernel or option, for a value out of range, and for the device
    `cuda` without an index, because launches look up the options of cuda:0, cuda:1, ...
    """
    if device.type == "cuda" and device.index is None:
        raise ValueError(f"the device needs an index, such as cuda:0, got {device}")
    for key, options in table.items():
        _check(key, options)
    _tables[device] = {key: dict(options) for key, options in table.items()}


def _check(key: Key, options: Options) -> None:
    kernel, _, _ = key
    if kernel not in OPTION_NAMES:
        raise ValueError(f"there is no kernel {kernel!r} with launch options")
    if not set(OPTION_NAMES[kernel]) - {"maxnreg"} <= set(options) <= set(OPTION_NAMES[kernel]):
        raise ValueError(f"{kernel} has the options {', '.join(OPTION_NAMES[kernel])}")
    for name, value in options.items():
        low, high = RANGES[name]
        if name == "BLOCK_M" and kernel.startswith("attention"):
            low = 16
        power = type(value) is int and value > 0 and value & (value - 1) == 0
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} of {kernel} must be from {low} to {high}, got {value!r}")
        if name in TILE and not power:
            raise ValueError(f"{name} of {kernel} must be a power of two, got {value}")


def options(
    kernel: str, size: int, itemsize: int, device: torch.device, default: Default
) -> Options | Default:
    """The table's options for a launch, else the default ones. The caller must not change them."""
    table = _tables.get(device)
    return table.get((kernel, size, itemsize), default) if table else default


def digest(device: torch.device) -> str:
    """12 hexadecimal digits that identify the table in use; empty for the default options."""
    table = _tables.get(device)
    return table_digest(table) if table else ""


def table_digest(table: Table) -> str:
    """A digest of a table, which does not depend on the order of its entries."""
    listed = sorted([*key, sorted(options.items())] for key, options in table.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


@cache
def source_digest() -> str:
    """A digest of this package's source, since options are valid for one version of the kernels."""
    found = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def table_of(entries: Any) -> Table:
    """The table of a list of objects: kernel, size, itemsize, options. Raises ValueError."""
    table: Table = {}
    try:
        for entry in entries:
            key = str(entry["kernel"]), int(entry["size"]), int(entry["itemsize"])
            table[key] = dict(entry["options"])
            _check(key, table[key])
    except (KeyError, TypeError) as e:
        raise ValueError(f"an entry needs kernel, size, itemsize and options: {e!r}") from e
    return table
