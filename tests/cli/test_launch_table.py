"""Measured launch options: their file, its errors, and launches that use them."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY
from fake_gpu import reset_launch_tables  # noqa: F401
from irongpt_kernels import fused
from irongpt_kernels.fused import attention_tiles, layer_norm_backward
from irongpt_kernels.runtime import emulate, launch, launch_table
from numerics import assert_op, inputs_of

from irongpt import doctor, ops
from irongpt import launch_cache as cache
from irongpt.errors import UserError
from irongpt.files import sealed

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
TILE = dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2, maxnreg=255)
ENTRY: dict[str, Any] = dict(kernel="attention forward", size=64, itemsize=2, options=TILE)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch) -> None:
    """Options as for compiled kernels: the interpreter has smaller tiles."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


def forward_tile() -> dict[str, int]:
    return attention_tiles.launch_options("forward", GPU, 64, 2)


def test_saved_options_are_launched(h200) -> None:
    default = forward_tile()
    assert cache.load(GPU) == ([], "")
    assert launch_table.digest(GPU) == ""
    file = cache.save(GPU, [ENTRY])
    assert file.name.startswith("tuned-NVIDIA-H200-sm-90-")
    assert forward_tile() == default  # this process looked before there was a file
    cache.load.cache_clear()
    entries, note = cache.load(GPU)
    assert entries == [ENTRY]
    assert f"tiles measured on this GPU, table {launch_table.digest(GPU)}" in note
    assert forward_tile() == TILE
    for kernel, itemsize in (("query", 2), ("forward", 4)):
        found = attention_tiles.launch_options(kernel, GPU, 64, itemsize)
        assert found == attention_tiles.default_tiles(kernel, 90, 64, itemsize)
    assert attention_tiles.launch_options("forward", torch.device("cuda", 1), 64, 2) == default
    assert ops.notes("fused", GPU) == [note]
    assert ops.notes("builtin", GPU) == []


def test_interpreted_tiles_stay_small(h200, monkeypatch) -> None:
    launch_table.use(GPU, launch_table.table_of([ENTRY]))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert forward_tile()["BLOCK_M"] == 32


def test_without_entries_the_file_is_deleted(h200) -> None:
    file = cache.save(GPU, [ENTRY])
    assert cache.save(GPU, []) == file
    assert not file.exists()
    cache.save(GPU, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda card, m: setattr(card, "name", "NVIDIA H100"),
        lambda card, m: setattr(card, "major", 8),
        lambda card, m: m.setattr("triton.__version__", "3.9.0"),
        lambda card, m: m.setattr(launch_table, "source_digest", lambda: "123456789abc"),
    ],
    ids=["another GPU", "architecture", "Triton", "source"],
)
def test_a_file_of_another_machine_or_version_is_not_used(h200, monkeypatch, change) -> None:
    file = cache.save(GPU, [ENTRY])
    change(h200, monkeypatch)
    assert cache.path(GPU) != file
    assert cache.load(GPU) == ([], "")
    cache.path(GPU).write_bytes(file.read_bytes())  # renamed by hand, it is not trusted
    cache.load.cache_clear()
    assert "was measured on another GPU or version; run irongpt tune again" in cache.load(GPU).note
    assert launch_table.digest(GPU) == ""


def edited(file: Path, **changed: Any) -> bytes:
    """The file with changed values and a digest that fits."""
    values = json.loads(file.read_bytes()) | changed
    del values["sha256"]
    return sealed(values)


DAMAGES = {  # the new content, or changed values
    "empty": lambda file: b"",
    "cut": lambda file: file.read_bytes()[:-9],
    "by hand": lambda file: file.read_bytes().replace(b"128", b"256"),
    "a list": lambda file: b"[]",
    "binary": lambda file: b"\xff\x00\xfe",
    "no entries": dict(entries=None),
    "text": dict(entries="no"),
    "another kernel": dict(entries=[ENTRY | dict(kernel="gemm")]),
    "a kernel of an older version": dict(entries=[ENTRY | dict(kernel="attention head")]),
    "no size": dict(entries=[ENTRY | dict(size=None)]),
    "no options": dict(entries=[ENTRY | dict(options={})]),
    "another option": dict(entries=[ENTRY | dict(options=TILE | dict(num_ctas=2))]),
    "no power": dict(entries=[ENTRY | dict(options=TILE | dict(BLOCK_M=48))]),
    "too small": dict(entries=[ENTRY | dict(options=TILE | dict(BLOCK_N=8))]),
    "true": dict(entries=[ENTRY | dict(options=TILE | dict(num_stages=True))]),
    "format": dict(format=2),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_ignored_in_one_line(h200, damage) -> None:
    file = cache.save(GPU, [ENTRY])
    default = attention_tiles.default_tiles("forward", 90, 64, 2)
    file.write_bytes(damage(file) if callable(damage) else edited(file, **damage))
    loaded = cache.load(GPU)
    assert loaded.entries == []
    assert loaded.note.startswith(f"measured tiles ignored: {file}")
    assert loaded.note.endswith("run irongpt tune again")
    assert "\n" not in loaded.note
    assert len(loaded.note) < 400
    assert forward_tile() == default


def test_irongpt_tuned_off_ignores_the_file(h200, monkeypatch, cli) -> None:
    cache.save(GPU, [ENTRY])
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.load(GPU) == ([], "")
    cache.load.cache_clear()
    monkeypatch.setenv(cache.VARIABLE, "no")
    with pytest.raises(UserError, match="IRONGPT_TUNED must be off or unset, got 'no'"):
        cache.load(GPU)


def test_an_emulated_t4_and_a_cpu_use_no_file(h200, monkeypatch) -> None:
    cache.save(GPU, [ENTRY])
    monkeypatch.setenv(emulate.VARIABLE, "sm_75")
    assert cache.load(GPU) == ([], "")
    monkeypatch.delenv(emulate.VARIABLE)
    assert cache.load(CPU) == ([], "")


def test_a_folder_that_cannot_be_written(h200, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        cache.save(GPU, [ENTRY])


def test_a_run_and_the_doctor_load_and_report_them(h200, monkeypatch) -> None:
    cache.save(GPU, [ENTRY])
    monkeypatch.setattr(launch, "prepare", lambda device: None)
    assert ops.load("fused", GPU) is fused
    assert forward_tile() == TILE
    report = doctor.Report()
    doctor._kernels(report, GPU)
    assert "forward 128 x 32, 8 warps" in report.facts["kernels"]
    assert f"table {launch_table.digest(GPU)}" in report.facts["kernels"]


def test_a_gpu_without_an_index_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an index, such as cuda:0, got cuda"):
        launch_table.use(torch.device("cuda"), {})


@pytest.mark.parametrize(("num_warps", "narrow"), [(1, False), (8, True)])
def test_a_measured_number_of_warps_decides_whether_sums_are_equal(h200, num_warps, narrow) -> None:
    """A row of 256 columns has one product for each thread of 8 warps."""
    options = dict(BLOCK_M=1, num_warps=num_warps)
    table = {("norm forward", 129, 2): options}
    launch_table.use(GPU, table | {("norm backward", 129, 2): options | dict(warps_per_sm=8)})
    forward = layer_norm_backward.forward_options(129, 2, GPU)
    backward, warps = layer_norm_backward.backward_options(129, 2, GPU)
    assert warps == 8
    for found in (forward, backward):
        assert found.get("enable_fp_fusion", True) is not narrow
        assert {name: found[name] for name in options} == options


def test_digests_distinguish_tables() -> None:
    entries = [ENTRY, ENTRY | dict(size=128)]
    one, other, first = (
        launch_table.table_digest(launch_table.table_of(found))
        for found in (entries, entries[::-1], entries[:1])
    )
    assert one == other != first
    assert len(one) == len(launch_table.source_digest()) == 12


ROWS = {
    "norm forward": ("dropout_add_layer_norm", dict(BLOCK_M=4, num_warps=2)),
    "norm backward": ("dropout_add_layer_norm", dict(BLOCK_M=4, num_warps=2, warps_per_sm=2)),
    "gelu forward": ("gelu", dict(BLOCK_M=2, BLOCK_N=16, num_warps=1)),
    "gelu backward": ("gelu", dict(BLOCK_M=2, BLOCK_N=16, num_warps=1)),
}


@pytest.mark.parametrize("kernel", list(ROWS))
def test_row_kernels_use_other_tiles_and_are_correct(kernel: str, monkeypatch) -> None:
    op, options = ROWS[kernel]
    inputs = inputs_of(op, torch.float32)
    key = kernel, next(iter(inputs.values())).shape[-1], 4
    look = Mock(wraps=launch_table.options)
    monkeypatch.setattr(launch_table, "options", look)
    launch_table.use(CPU, {key: options})
    options_of_op = dict(dropout_p=0.2, seed=3) if op != "gelu" else {}
    assert_op(fused, op, inputs, **options_of_op)
    assert key in [call.args[:3] for call in look.call_args_list]


def test_a_resume_with_other_tiles_warns(cli, monkeypatch) -> None:
    from irongpt.training import loop

    flags = [*TINY, "--iters", "4", "--eval-every", "2"]
    now = {"tiles": "abc"}
    monkeypatch.setattr(loop.TrainingLoop, "_launch_digest", lambda self: now["tiles"])
    cli("train", *flags, "--out", "run")
    assert "saved with" not in cli("train", "--resume", "run", "--iters", "6").out
    now["tiles"] = ""
    out = cli("train", "--resume", "run", "--iters", "8").out
    changed = "saved with measured launch options abc, resumed with the default launch options"
    assert changed in " ".join(out.split())
    now["tiles"] = None  # other ops than fused
    assert "saved with" not in cli("train", "--resume", "run", "--iters", "10").out
