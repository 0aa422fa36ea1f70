"""Checkpoints: atomic saves, damage, file modes."""

import errno
import json
import os
import shutil

import pytest
import torch

from irongpt import files
from irongpt.errors import UserError
from irongpt.runs import checkpoint


def save(folder, value: float = 1.0, step: int = 1) -> None:
    checkpoint.save(
        folder,
        {"w": torch.full((3, 2), value), "odd": torch.arange(5)},
        {"exp_avg.w": torch.full((3, 2), -value), "rng.cpu": torch.arange(9, dtype=torch.uint8)},
        {"kind": "char", "chars": "ab"},
        {"step": step, "best_val": 0.1 + 0.2, "rows": [[1.5, 2.5, 1.0]], "nothing": None},
    )


def step_of(folder) -> int:
    weights, _, _, state = checkpoint.load(folder)
    assert weights["w"].unique().tolist() == [state["step"]]
    return state["step"]


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_loads_bitwise(tmp_path):
    save(tmp_path / "last")
    weights, optimizer, tokenizer, state = checkpoint.load(tmp_path / "last")
    assert torch.equal(weights["w"], torch.ones(3, 2))
    assert torch.equal(weights["odd"], torch.arange(5))
    assert torch.equal(optimizer["exp_avg.w"], -torch.ones(3, 2))
    assert optimizer["rng.cpu"].dtype == torch.uint8
    assert tokenizer == {"kind": "char", "chars": "ab"}
    assert (state["step"], state["best_val"], state["nothing"]) == (1, 0.1 + 0.2, None)
    assert state["rows"] == [[1.5, 2.5, 1.0]]


@pytest.mark.parametrize("name", [*checkpoint.FILES, "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "longer", "gone", "folder"])
def test_damage_is_noticed(tmp_path, name, damage):
    save(tmp_path / "last")
    file = tmp_path / "last" / name
    data = bytearray(file.read_bytes())
    file.unlink()
    flipped = data.copy()
    flipped[len(data) // 2] ^= 1
    changed = {"cut": data[:-3], "empty": b"", "longer": data + b" {}", "flip": flipped}
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes(changed[damage])
    with pytest.raises(UserError, match=f"{name} is damaged|cannot read .*{name}"):
        checkpoint.load(tmp_path / "last")


def test_every_flipped_bit_of_the_state_is_noticed(tmp_path):
    save(tmp_path / "last")
    file = tmp_path / "last" / "state.json"
    data = file.read_bytes()
    state = json.loads(data)
    for position in range(0, 8 * len(data), 7):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        file.write_bytes(changed)
        try:
            checkpoint.load(tmp_path / "last")
        except UserError:
            continue
        assert json.loads(changed) == state  # white space between the values


@pytest.mark.parametrize("value", [b"[]", b"null", b"3", b"[" * 100_000, b'{"sha256": 1}', b"\xff"])
def test_json_without_a_valid_digest_is_rejected(tmp_path, value):
    with pytest.raises(UserError, match="is damaged"):
        files.unsealed(value, tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("failing", range(6))
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, code, failing):
    save(tmp_path / "last", 1.0, 1)
    calls = 0

    def fail(original):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        return wrapper

    # Four files are written and flushed, then the folder is flushed and swapped.
    monkeypatch.setattr(os, "fsync", fail(os.fsync))
    monkeypatch.setattr(files, "exchange", fail(files.exchange))
    if failing == 4:  # a folder that cannot be flushed does not fail a save
        save(tmp_path / "last", 2.0, 2)
    else:
        with pytest.raises(OSError, match=r".+") as caught:
            save(tmp_path / "last", 2.0, 2)
        assert caught.value.errno == code
    assert names(tmp_path) == ["last"]
    assert step_of(tmp_path / "last") == (2 if failing == 4 else 1)


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    save(tmp_path / "last", 1.0, 1)
    renames = []

    class Killed(BaseException):
        pass

    def rename(a, b):
        renames.append(b)
        if len(renames) == 2:
            raise Killed
        os.replace(a, b)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a kill cleans up nothing
    with pytest.raises(Killed):
        save(tmp_path / "last", 2.0, 2)
    assert not (tmp_path / "last").exists()
    assert step_of(tmp_path / "last") == 1
    monkeypatch.undo()
    save(tmp_path / "last", 3.0, 3)
    assert step_of(tmp_path / "last") == 3
    assert not (tmp_path / ".last.old").exists()


def test_a_backup_is_not_read_if_there_is_a_checkpoint(tmp_path):
    save(tmp_path / "last", 2.0, 2)
    save(tmp_path / ".last.old", 1.0, 1)
    assert step_of(tmp_path / "last") == 2


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_modes_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(tmp_path / "last")
        files.replace_file(tmp_path / "config.json", b"{}")
    finally:
        os.umask(before)
    for path in (tmp_path / "last", tmp_path / "last/state.json", tmp_path / "config.json"):
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask


def test_the_swap_is_one_system_call_on_linux(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / folder.name).touch()
    assert files.exchange(a, b)
    assert names(a) == ["b"]
    assert names(b) == ["a"]
    assert not files.exchange(a, tmp_path / "missing")


def test_a_file_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    files.replace_file(file, b"old")
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["config.json"]
