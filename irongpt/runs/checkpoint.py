"""A checkpoint: a folder that holds everything the next step depends on, whole at every instant.

    model.safetensors       the weights, float32
    optimizer.safetensors   the optimizer's moments, loss scale, the states of the random generators
    tokenizer.json          the vocabulary
    state.json              where the run stands, and the SHA-256 of the other files and of itself

A save writes a temporary folder beside the old one, flushes it to the disk, and swaps the two in
one rename. Nothing is ever unpickled, and nothing is read before its digest is right.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from irongpt.files import (
    beside,
    damaged,
    digest,
    exchange,
    read,
    sealed,
    sync_folder,
    unsealed,
    write,
)

FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json")

Tensors = dict[str, Tensor]


def save(
    folder: Path,
    model: Tensors,
    optimizer: Tensors,
    tokenizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Writes the checkpoint `folder`; or raises OSError and leaves the one that is there."""
    contents = {
        "model.safetensors": to_bytes(_portable(model)),
        "optimizer.safetensors": to_bytes(_portable(optimizer)),
        "tokenizer.json": json.dumps(tokenizer).encode(),
    }
    state = {**state, "files": {name: digest(data) for name, data in contents.items()}}
    contents["state.json"] = sealed(state)
    temporary = beside(folder)
    try:
        temporary.mkdir()
        for name, data in contents.items():
            write(temporary / name, data)
        sync_folder(temporary)
        _replace(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any], dict[str, Any]]:
    """The model, optimizer, tokenizer and state that `save` was given, on the CPU.

    Raises UserError if a file is missing, cut off or changed.
    """
    old = _set_aside(folder)
    if not folder.is_dir() and old.is_dir():
        folder = old  # killed between the two renames of `_replace`
    state = unsealed(read(folder / "state.json"), folder / "state.json")
    contents = {name: read(folder / name) for name in FILES}
    for name, data in contents.items():
        if state.get("files", {}).get(name) != digest(data):
            raise damaged(folder / name)
    try:
        model, optimizer = (from_bytes(contents[name]) for name in FILES[:2])
        tokenizer = json.loads(contents["tokenizer.json"])
    except (SafetensorError, ValueError) as e:
        raise damaged(folder) from e
    return model, optimizer, tokenizer, state


def _portable(tensors: Tensors) -> Tensors:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _replace(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`, whose old contents go.

    On Linux the two swap names in one system call. Where that is not to be had (other systems,
    some network drives) the old one is set aside first, and `load` finds it there.
    """
    old = _set_aside(folder)
    if folder.exists() and not exchange(new, folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    if not folder.exists():
        os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
