"""The file that stores launch options measured on this GPU, and its use in a process.

`irongpt tune` writes it. Its name contains the GPU, the architecture, the Triton version and a
digest of the kernels' source, so options measured for anything else are never read.
IRONGPT_TUNED=off ignores the file.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from irongpt_kernels.runtime import emulate, launch_table

from irongpt.config import check
from irongpt.data.download import cache_folder
from irongpt.errors import UserError
from irongpt.files import read, replace_file, reported, sealed, unsealed

VARIABLE = "IRONGPT_TUNED"
FORMAT = 1


class Loaded(NamedTuple):
    """The measured options that a process uses. note: a line for the user; empty without any."""

    entries: list[dict[str, Any]]
    note: str


def wanted() -> bool:
    """Whether measured options are used. Raises UserError for an unknown value of the variable."""
    value = os.environ.get(VARIABLE, "")
    check(value in ("", "off"), f"{VARIABLE} must be off or unset, got {value!r}")
    return not value


def identity(device: torch.device) -> dict[str, Any]:
    """The GPU and versions for which measured options are valid."""
    import triton

    major, minor = emulate.capability(device)
    return {
        "gpu": torch.cuda.get_device_properties(device).name,
        "arch": f"sm_{major}{minor}",
        "triton": triton.__version__,
        "sources": launch_table.source_digest(),
    }


def path(device: torch.device) -> Path:
    """The file for the options of a GPU, which need not exist."""
    parts = "-".join(identity(device).values())
    return cache_folder() / f"tuned-{re.sub(r'[^A-Za-z0-9.]+', '-', parts)}.json"


def parse(file: Path, device: torch.device) -> list[dict[str, Any]]:
    """The entries of a file. Raises UserError unless `save` wrote it for this GPU."""
    values = unsealed(read(file), file)
    same = {**identity(device), "format": FORMAT}
    fits = {name: values.get(name) for name in same} == same
    check(fits, f"{file} was measured on another GPU or version")
    try:
        launch_table.table_of(values["entries"])
    except (KeyError, ValueError) as e:
        raise UserError(f"{file} has no valid launch options: {e}") from e
    return list(values["entries"])


@functools.cache  # once per process: a run keeps the options that it started with
def load(device: torch.device) -> Loaded:
    """Uses this GPU's measured options, if there are any. A changed file is ignored, and the note
    reports it. Raises UserError for an unknown value of IRONGPT_TUNED only."""
    if device.type != "cuda" or not wanted():
        return Loaded([], "")
    try:
        file = path(device)
        if not file.is_file():
            return Loaded([], "")
        entries = parse(file, device)
    except (UserError, OSError) as e:
        return Loaded([], f"measured tiles ignored: {e}; run irongpt tune again")
    launch_table.use(device, launch_table.table_of(entries))
    used = launch_table.digest(device)
    return Loaded(entries, f"tiles measured on this GPU, table {used} ({file})")


def save(device: torch.device, entries: list[dict[str, Any]]) -> Path:
    """Replaces all stored entries. Raises UserError if the file cannot be written."""
    file = path(device)
    with reported(f"cannot write {file}", disk=file):
        if entries:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, sealed({**identity(device), "format": FORMAT, "entries": entries}))
        else:
            file.unlink(missing_ok=True)
    return file
