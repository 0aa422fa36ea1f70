"""Launch options measured on this user's GPU: the file that keeps them, and its use in a process.

A file is of one GPU, architecture, Triton and source of the kernels, and named so: of another it is
not even opened. Written by `irongpt tune`; IRONGPT_TUNED=off leaves it alone.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from irongpt_kernels.runtime import emulate, launch_table

from irongpt.data.corpus import cache_folder
from irongpt.errors import UserError
from irongpt.files import read, replace_file, sealed, unsealed

VARIABLE = "IRONGPT_TUNED"
FORMAT = 1


class Loaded(NamedTuple):
    """What a process found. note: a line for the user, empty where the shipped options run."""

    entries: list[dict[str, Any]]
    note: str


def wanted() -> bool:
    """Raises UserError for a value of the variable that means nothing."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "off"):
        raise UserError(f"{VARIABLE} must be off or unset, got {value!r}")
    return not value


def identity(device: torch.device) -> dict[str, Any]:
    """What measured options are of, and of nothing else."""
    import triton

    major, minor = emulate.capability(device)
    return {
        "gpu": torch.cuda.get_device_properties(device).name,
        "arch": f"sm_{major}{minor}",
        "triton": triton.__version__,
        "sources": launch_table.sources(),
    }


def path(device: torch.device) -> Path:
    """Where the options of a GPU are kept, whether or not there are any."""
    parts = "-".join(identity(device).values())
    return cache_folder() / f"tuned-{re.sub(r'[^A-Za-z0-9.]+', '-', parts)}.json"


def parse(data: bytes, file: Path, device: torch.device) -> list[dict[str, Any]]:
    """The entries of a file. Raises UserError unless it is as `save` wrote it, for this GPU."""
    values = unsealed(data, file)
    same = {**identity(device), "format": FORMAT}
    if {name: values.get(name) for name in same} != same:
        raise UserError(f"{file} is of another GPU or version")
    try:
        entries = values["entries"]
        launch_table.table_of(entries)
    except (KeyError, ValueError) as e:
        raise UserError(f"{file} has no launch options that can be used: {e}") from e
    return list(entries)


@functools.cache  # once a process: a run keeps the options that it began with
def load(device: torch.device) -> Loaded:
    """Puts this GPU's measured options in use, if there are any. Never fails: a file that is not
    as it was written is ignored, and the note says so."""
    if device.type != "cuda" or not wanted():
        return Loaded([], "")
    try:
        file = path(device)
        if not file.is_file():
            return Loaded([], "")
        entries = parse(read(file), file, device)
    except (UserError, OSError) as e:
        return Loaded([], f"measured tiles ignored: {e}; irongpt tune measures anew")
    launch_table.use(device, launch_table.table_of(entries))
    return Loaded(
        entries, f"tiles measured on this GPU, table {launch_table.digest(device)} ({file})"
    )


def note(name: str, device: torch.device) -> str:
    """What to tell a user of the launch options of the ops called `name`; empty if shipped."""
    return load(device).note if name == "fused" else ""


def save(device: torch.device, entries: list[dict[str, Any]]) -> Path:
    """Keeps the entries in place of all that were there. Raises UserError where it cannot."""
    file = path(device)
    try:
        if entries:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, sealed({**identity(device), "format": FORMAT, "entries": entries}))
        else:
            file.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {file}: {e.strerror}") from e
    return file
