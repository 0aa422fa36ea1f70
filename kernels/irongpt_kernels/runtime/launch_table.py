"""
Launch options that were measured on a user's GPU, in place of those that this package ships.

Whoever measured them hands them over with `use`, before kernels are launched on that GPU; nothing
here measures, and no launch does more than look into a dict. Other options add up in another order,
so results are the same bits for one table, and `digest` tells tables apart. Imports no Triton.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

Options = dict[str, int]
Key = tuple[str, int, int]  # kernel; head dimension, else columns; bytes of an element
Table = dict[Key, Options]

TILE = ("BLOCK_M", "BLOCK_N", "num_warps")
# What a launcher takes from a table, by kernel. The norms are those of dropout_add_layer_norm.
# maxnreg, registers a thread may have, may be missing: as many as ptxas likes.
KNOBS = {
    "attention forward": (*TILE, "num_stages", "maxnreg"),
    "attention query": (*TILE, "num_stages", "maxnreg"),
    "attention key": (*TILE, "num_stages", "maxnreg"),
    "norm forward": ("BLOCK_M", "num_warps"),
    "norm backward": ("BLOCK_M", "num_warps", "warps_per_sm"),
    "gelu forward": TILE,
    "gelu backward": (*TILE, "programs_per_sm"),
}
RANGES = dict(
    BLOCK_M=(1, 256),
    BLOCK_N=(16, 1024),
    num_warps=(1, 16),
    num_stages=(1, 4),
    maxnreg=(64, 255),
    warps_per_sm=(1, 64),
    programs_per_sm=(1, 64),
)

_tables: dict[torch.device, Table] = {}


def use(device: torch.device, table: Table) -> None:
    """From here on launches on the device take what the table has; an empty one ends that.

    Raises ValueError for a kernel or option that there is not, and for a value out of range.
    """
    for key, options in table.items():
        _check(key, options)
    _tables[device] = {key: dict(options) for key, options in table.items()}


def _check(key: Key, options: Options) -> None:
    kernel, _, _ = key
    if kernel not in KNOBS:
        raise ValueError(f"no kernel {kernel!r} has launch options of its own")
    if not set(KNOBS[kernel]) - {"maxnreg"} <= set(options) <= set(KNOBS[kernel]):
        raise ValueError(f"{kernel} has the options {', '.join(KNOBS[kernel])}")
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
    kernel: str, size: int, itemsize: int, device: torch.device, shipped: Options
) -> Options:
    """What a launch takes: the table's options for it, else the shipped ones. Not to be changed."""
    table = _tables.get(device)
    return table.get((kernel, size, itemsize), shipped) if table else shipped


def digest(device: torch.device) -> str:
    """Of the table in use, 12 hexadecimal digits; empty for the shipped options."""
    table = _tables.get(device)
    return table_digest(table) if table else ""


def table_digest(table: Table) -> str:
    """The same for the same options, in any order."""
    listed = sorted([*key, sorted(options.items())] for key, options in table.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


@cache
def sources() -> str:
    """A digest of this package's source: options are of the kernels that they were measured on."""
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
        raise ValueError(f"an entry lacks or misspells {e}") from e
    return table
