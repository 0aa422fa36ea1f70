"""The benchmark commands run end to end with a tiny model, and the report shows their results."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from irongpt_kernels import builtin

from benchmarks import decode, roofline, train_runs, vs_nanogpt
from benchmarks.measure import environment, result_file
from benchmarks.measure.rows import KernelRow, NanoRow, RunRow, StepRow
from benchmarks.ops import __main__ as kernels
from benchmarks.ops import cases
from benchmarks.report import __main__ as report
from benchmarks.report import tables
from benchmarks.training import __main__ as train
from irongpt.config import PRESETS, GPTConfig
from irongpt.cuda_graph import Graph
from irongpt.model import GPT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """A result file with every section, for a model of a few thousand weights."""
    file = tmp_path_factory.mktemp("results") / "result.json"
    options = ["--device", "cpu", "--result", str(file), "--commit", "abc"]
    small = dict(n_layer=1, n_head=2, n_embd=32, context=16, dropout=0.1)
    recipe = {**PRESETS["nano"].train, "batch_size": 2, "eval_windows": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", PRESETS["nano"].__class__("", small, recipe))
        patch.setattr(cases, "NANO", cases.Shape(B=2, H=2, T=16, D=16, V=13, L=1))
        patch.setitem(environment.COPIED, "cpu", 1 << 20)  # else copies take most of the time
        kernels.main([*options, "--providers", "eager", "builtin", "liger", "--rounds", "2"])
        variants = ["--variants", "builtin", "naive", "eager"]
        train.main([*options, *variants, "--batch-size", "4", "--rounds", "2"])
        decode.main([*options, "--ops", "builtin"])
        some = ["--ops", "builtin", "eager", "--data", "python-docs"]
        train_runs.main([*options, *some, "--iters", "20"])
        target = "--section target --target-loss 99 --iters 20 --seeds 1 2".split()
        train_runs.main([*options, *some, *target])
    return file


def test_every_section_is_complete_and_in_the_report(result) -> None:
    values = result_file.load(result)
    text = (report.write(result) / "report.md").read_text()
    assert "commit `abc`" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"speedup.png", "step.png", "runs.png", "target.png"} <= set(pictures)
    for picture in pictures:
        assert (result.with_suffix("") / picture).read_bytes().startswith(b"\x89PNG")
    for name in ("kernels", "train", "decode", "runs", "target"):
        assert values[name]["environment"]["commit"] == "abc"
        assert values[name]["state"]["seconds"] >= 0
        assert "ended_by" not in values[name]
    assert list(values["kernels"]["missing"]) == ["liger"]
    # Ops with a dropout have rows with it and without; some others have no builtin.
    layers = len([op for op in cases.OPS if cases.modes(op) == cases.MODES])
    count = (layers + len(cases.WITH_DROPOUT)) * 3 * 2 + 2 * (len(cases.OPS) - layers)
    assert len(values["kernels"]["rows"]) == count - len(cases.AS_EAGER)


def test_a_step_is_measured_and_shown_in_the_table(result) -> None:
    section = result_file.load(result)["train"]
    assert {r.variant for r in section["rows"]} == {"builtin", "naive", "eager"}
    shown = tables.train(section)
    for r in section["rows"]:
        assert r.samples == 2
        assert r.tokens_per_s == pytest.approx(4 * 16 / r.seconds, rel=1e-4)
        assert f"| {r.variant} | {r.seconds * 1e3:.2f} |" in shown
        assert f"{r.tokens_per_s:,.0f}" in shown
    alone = section["matmuls"]["float32"]
    assert 0 < alone["seconds"] < alone["lower_bound_seconds"]


def test_generation_is_measured(result) -> None:
    rows = result_file.load(result)["decode"]["rows"]
    assert [(r.way, r.batch) for r in rows] == [("no cache", 1), ("cached", 1), ("batched", 8)]
    assert all(r.tokens == 16 for r in rows)


@pytest.fixture
def small_model() -> GPT:
    shape = GPTConfig(vocab_size=7, n_layer=1, n_head=1, n_embd=16, context=40, dropout=0.0)
    return GPT(shape, builtin)


def test_generation_whose_graph_failed_has_no_time(small_model, monkeypatch) -> None:
    def launched_one_by_one(*args: object) -> Iterator[list[int]]:
        monkeypatch.setattr(Graph, "failures", Graph.failures + 1)
        yield [0]

    monkeypatch.setattr(decode.sample, "generate_batch", launched_one_by_one)
    _, cached, batched = decode.measure("builtin", small_model, torch.float32, 1, [3], 1)
    why = "RuntimeError: the CUDA graph could not be captured"
    assert cached.skipped_reason == batched.skipped_reason == why


def test_the_other_ways_to_generate_are_measured_when_one_fails(small_model, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(decode, "no_cache", broken)
    rows = decode.measure("builtin", small_model, torch.float32, 40, [3], 2)
    assert rows[0].skipped_reason == "RuntimeError: no such kernel"
    assert [(r.way, r.batch, r.timed) for r in rows[1:]] == [
        ("cached", 1, True), ("batched", 3, True)
    ]  # fmt: skip
    assert all(r.steady_tokens_per_s > 0 for r in rows[1:])
    section = dict(preset="nano", dtype="float32", rows=rows)
    assert "no such kernel" in tables.decode(section)
    assert all(r.ops in decode.line(r) for r in section["rows"])


def test_complete_trainings(result) -> None:
    values = result_file.load(result)
    builtin, eager = values["runs"]["rows"]
    assert builtin.steps == eager.steps == 20
    assert [point[0] for point in builtin.curve] == [10, 20]
    assert builtin.evaluated[-1][0] == 20
    assert builtin.target is None
    assert builtin.bits_per_byte == pytest.approx(builtin.validation_loss / math.log(2), rel=0.05)
    rows = values["target"]["rows"]
    assert [r.run for r in rows] == [
        f"nano, {ops}, seed {seed}" for seed in (1, 2) for ops in ("builtin", "eager")
    ]
    for r in rows:
        assert r.reached
        assert r.steps == r.evaluated[0][0]
        assert r.run in tables.runs(values["target"])
    assert rows[0].validation_loss != rows[2].validation_loss  # the seed changes the training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--section target --preset nano code", "--target-loss is needed for code"),
        ("--iters 1", "--iters must be above 1, the warm-up steps, got 1"),
    ],
)
def test_a_mistake_is_one_line(options: str, message: str, capsys, tmp_path) -> None:
    file = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="2"):
        train_runs.main([*options.split(), "--device", "cpu", "--result", str(file)])
    assert not file.exists()
    assert message in capsys.readouterr().err


def test_the_section_of_nano_against_nanogpt_has_its_commit_and_date(tmp_path, monkeypatch) -> None:
    (tmp_path / "train.py").touch()
    row = NanoRow(name="nanoGPT", seconds=128.3, validation_loss=1.7243, peak_rss_mb=453.2)
    for name in ("nanogpt", "irongpt"):
        monkeypatch.setattr(vs_nanogpt, name, lambda *args: row)
    monkeypatch.setattr(vs_nanogpt.corpus, "load", lambda name, say: SimpleNamespace(text=""))
    options = ["--nanogpt", str(tmp_path), "--out", str(tmp_path / "out"), "--commit", "abc"]
    vs_nanogpt.main(options)
    (file,) = (tmp_path / "out").glob("*/*-abc*.json")
    section = result_file.load(file)["nano"]
    assert section["environment"]["commit"] == "abc"
    assert section["environment"]["date"]
    assert section["nanogpt"] == "unknown"  # not a git checkout
    assert len(section["rows"]) == 3
    text = (report.write(file) / "report.md").read_text()
    assert "| nanoGPT | 128.3 | 1.724 | 453 |" in text


def iron_row(name: str) -> dict:
    row = dict(op="gelu", size="16384x1536", dtype="float16", sweep="iron", mode="total", dropout=0)
    row |= dict(provider="fused", seconds=1e-3, least_bytes=250_000_000, least_flops=0)
    return {"environment": {"name": name}, "rows": [KernelRow(**row)]}


def test_the_column_of_a_t4_is_empty_on_other_gpus() -> None:
    elsewhere, there = (
        tables.t4({"kernels": iron_row(card)}) for card in ("NVIDIA H200", "Tesla T4")
    )
    assert "| gelu, 16384x1536 |  | 1,000 |" in elsewhere
    assert "| gelu, 16384x1536 | 1,000 | 1,000 |" in there
    assert "computed" in elsewhere
    step = StepRow(variant="fused as trained", dtype="float16", seconds=0.5)
    run = RunRow(run="", preset="fast", ops="fused", dtype="float16", seconds=9.0)
    run.steps, run.warm_steps = 500, 50
    values = {"kernels": iron_row("Tesla T4"), "target": dict(rows=[run])}
    values["train"] = dict(preset="iron", batch_size=64, rows=[step])
    text = tables.t4(values)
    assert "| a training step, iron | 500,000 |" in text
    assert "| a training step, fast | 20,000 |" in text
    values["train"]["batch_size"] = 8
    assert "| a training step, iron |  |" in tables.t4(values)


def test_the_docs_have_the_computed_lower_bound() -> None:
    iron, fast = (f"{roofline.t4_step(preset) * 1e3:.1f}" for preset in ("iron", "fast"))
    assert f"{iron} and {fast} ms" in (ROOT / "README.md").read_text()
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"| iron | {iron} ms |\n| fast | {fast} ms |" in text


def test_pytest_benchmark_reports_the_samples(tmp_path, monkeypatch, capsys) -> None:
    """Like `make bench`, for one op."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # pytest-benchmark does not measure under xdist
    monkeypatch.setitem(environment.COPIED, "cpu", 1 << 20)
    monkeypatch.chdir(ROOT)
    file = tmp_path / "benchmark.json"
    command = ["benchmarks", "--no-sweeps", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--providers", "eager,builtin", "-k", "gelu", "-p", "no:cacheprovider"]
    assert pytest.main([*command, f"--benchmark-json={file}"]) == 0
    assert "6 passed" in capsys.readouterr().out
    (ours,) = tmp_path.glob("*/*.json")
    rows = {(r.provider, r.mode): r for r in result_file.load(ours)["kernels"]["rows"]}
    timed = json.loads(file.read_text())["benchmarks"]
    assert {(b["name"], b["extra_info"]["mode"]) for b in timed} == set(rows)
    for b in timed:
        row = rows[b["extra_info"]["provider"], b["extra_info"]["mode"]]
        assert b["stats"]["median"] == pytest.approx(row.seconds, rel=1e-4)
        assert b["stats"]["rounds"] == len(row.sample_seconds)


def test_bench_measures_nothing_more_after_its_minutes(tmp_path, monkeypatch) -> None:
    """A case that has begun keeps its rows; the next one is skipped."""
    from benchmarks import conftest as bench

    options = dict(device="cpu", providers="builtin", minutes=1.0)
    config = SimpleNamespace(
        getoption=options.get, option=SimpleNamespace(out=tmp_path, result=None, commit="abc")
    )
    session = bench.Session(config)  # type: ignore[arg-type]
    session.section.values["rows"] = []
    row = SimpleNamespace(provider="builtin", mode="call", skipped_reason=None, to_json=dict)
    monkeypatch.setattr(bench.kernels, "measure_case", lambda *_: [row])
    monkeypatch.setattr(session.section, "put", session.section.values.update)
    assert session.row("first", "call", "builtin") is row  # type: ignore[arg-type]
    session.end = 0.0
    assert session.row("first", "call", "builtin") is row  # type: ignore[arg-type]
    with pytest.raises(pytest.skip.Exception, match="--minutes are over"):
        session.row("second", "call", "builtin")  # type: ignore[arg-type]
    assert session.section.values["rows"] == [row]


def test_a_benchmark_says_in_one_line_that_torch_finds_no_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr("irongpt.device.why_gpu_not_found", lambda: "update the driver")
    with pytest.raises(SystemExit) as ended:
        result_file.pick("auto")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: update the driver\n"
