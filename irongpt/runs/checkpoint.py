"""Checkpoints: folders that hold everything the next step depends on, replaced atomically.

    model.safetensors       the weights, float32
    optimizer.safetensors   the optimizer's moments, loss scale, the states of the random generators
    tokenizer.json          the vocabulary
    state.json              the state of the loop, the SHA-256 of the other files and of its values

A save writes a temporary folder next to the old one, flushes it to the disk, and swaps the two (see
`_replace`). Pickle is not used. state.json is read first and verified; no other file is parsed
before its digest is verified.
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

from irongpt import files
from irongpt.config import check
from irongpt.files import write

FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json")

Tensors = dict[str, Tensor]


def save(
    folder: Path,
    model: Tensors,
    optimizer: Tensors,
    tokenizer: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Writes the checkpoint `folder`. Raises OSError if it cannot; the previous one then stays."""
    contents = {
        "model.safetensors": to_bytes(_portable(model)),
        "optimizer.safetensors": to_bytes(_portable(optimizer)),
        "tokenizer.json": json.dumps(tokenizer).encode(),
    }
    state = {**state, "files": {name: files.digest(data) for name, data in contents.items()}}
    contents["state.json"] = files.sealed(state)
    temporary = files.temporary_path(folder)
    try:
        temporary.mkdir()
        for name, data in contents.items():
            write(temporary / name, data)
        files.sync_folder(temporary)
        _replace(temporary, folder)
        files.sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path) -> tuple[Tensors, Tensors, dict[str, Any], dict[str, Any]]:
    """The model, optimizer, tokenizer and state that were saved, on the CPU.

    Raises UserError if the checkpoint or a file of it is missing, truncated or changed.
    """
    old = files.backup(folder)
    if not folder.is_dir() and old.is_dir():
        folder = old  # killed between the two renames of `_replace`
    check(
        folder.is_dir(),
        f"{folder.parent} has no checkpoint {folder.name}: train it first, or start a new run",
    )
    state = files.unsealed(files.read(folder / "state.json"), folder / "state.json")
    contents = {name: files.read(folder / name) for name in FILES}
    digests = state.get("files")
    for name, data in contents.items():
        if not isinstance(digests, dict) or digests.get(name) != files.digest(data):
            raise files.damaged(folder / name)
    try:
        model, optimizer = (from_bytes(contents[name]) for name in FILES[:2])
        tokenizer = json.loads(contents["tokenizer.json"])
    except (SafetensorError, ValueError, RecursionError) as e:
        raise files.damaged(folder) from e
    return model, optimizer, tokenizer, state


def _portable(tensors: Tensors) -> Tensors:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _replace(new: Path, folder: Path) -> None:
    """Replaces `folder` by `new` and deletes the old contents.

    On Linux the two swap names in one system call. Where that is not supported (other systems,
    some network drives) the old folder is renamed first, and `load` finds it under that name.
    """
    old = files.backup(folder)
    if folder.exists() and not files.exchange(new, folder):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    if not folder.exists():
        os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
