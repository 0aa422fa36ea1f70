"""Result files: their content, their page, and the comparison of two of them."""

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import roofline
from benchmarks.measure import environment, result_file
from benchmarks.measure.rows import Accuracy, DecodeRow, KernelRow, NanoRow, RunRow, StepRow, short
from benchmarks.ops.cases import MODES
from benchmarks.ops.providers import NAMES
from benchmarks.report import __main__ as report
from benchmarks.report import diff, plots, tables, tables_kernels

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch) -> None:
    """The tests run in the interpreter, which the name of a result file would contain."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_name_of_a_file_has_its_kind(monkeypatch, tmp_path) -> None:
    args = options(tmp_path)
    assert result_file.path(args, CPU, name="-gpu").name.endswith("-abc-gpu.json")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert result_file.path(args, CPU).name.endswith("-abc-interpreted.json")


def table_of(text: str, head: str) -> list[list[str]]:
    """The cells of the first table that begins so, its head included."""
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_of(providers: dict[str, float], sweep: str = "iron", **more: object) -> list[KernelRow]:
    """Rows of attention in all modes; `providers`: seconds of forward + backward."""
    row = dict(op="causal_attention", sweep=sweep, size="s", dtype="float16", dropout=0.0)
    row |= dict(accuracy=Accuracy(True, 0.5), iqr=0.0, host_seconds=1e-5, peak_bytes=3 << 20)
    row |= dict(least_bytes=8e9, least_flops=16e12) | more
    parts = dict(forward=0.25, backward=0.75, total=1.0)
    return [
        KernelRow(**row, provider=name, mode=mode, seconds=seconds * part)
        for name, seconds in providers.items()
        for mode, part in parts.items()
    ]


PEAK_RATES = dict(copy_bytes_per_s=16e9, gemm_flops_per_s={"float16": 64e12})


def kernels(rows: list[KernelRow]) -> str:
    return tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})


def test_every_mode_has_its_rates_its_shares_and_its_memory() -> None:
    text = kernels(rows_of({"fused": 1.0, "builtin": 2.0}))
    head, _, ours, theirs = table_of(text, "provider | forward")
    assert ours[head.index("total") + 2] == "2.00"  # times as fast as builtin
    head, _, ours, theirs = table_of(text, "provider | GB/s")
    found = dict(zip(head, ours, strict=True))
    assert [found[f"GB/s {mode}"] for mode in MODES] == ["32", "10.7", "8"]
    assert [found[f"TFLOP/s {mode}"] for mode in MODES] == ["64", "21.3", "16"]
    assert [found[f"copy {mode}"] for mode in MODES] == ["200.0%", "66.7%", "50.0%"]
    assert [found[f"matmul {mode}"] for mode in MODES] == ["100.0%", "33.3%", "25.0%"]
    assert [found[f"MiB {mode}"] for mode in MODES] == ["3", "3", "3"]
    assert theirs[head.index("GB/s total")] == "4"


def test_a_sweep_has_rates_of_fused_and_memory_of_all() -> None:
    rows = rows_of({"fused": 1.0, "builtin": 2.0}, "T")
    text = kernels(rows)
    assert table_of(text, "size")[2] == ["s", "1,000,000.0 (2.00)", "2,000,000.0", "8", "16", "50%"]
    assert table_of(text, "MiB at the peak")[2] == ["s", "3", "3"]
    text = kernels([replace(r, peak_bytes=None) for r in rows if r.provider == "builtin"])
    assert "MiB at the peak" not in text
    assert "fused: GB/s" not in text


def test_every_provider_has_a_color() -> None:
    assert plots.COLORS.keys() == set(NAMES)


def test_the_rates_of_a_time() -> None:
    (row,) = rows_of({"fused": 2.0}, least_bytes=100, least_flops=600)[2:]
    peak_rates = dict(copy_bytes_per_s=100.0, gemm_flops_per_s={"float16": 400.0})
    d = roofline.derive(row, peak_rates)
    assert (d.bytes_per_s, d.flops_per_s) == (50, 300)
    assert (d.share_of_copy, d.share_of_gemm) == (0.5, 0.75)
    assert (d.lower_bound_seconds, d.share_of_peak) == (1.5, 0.75)


def options(folder: Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(out=folder, result=None, commit="abc", **more)


def test_several_commands_fill_a_file_and_repeated_ones_another(tmp_path, capsys) -> None:
    files = []
    for i, end in enumerate((".json", "-2.json", "-3.json")):
        for name in ("kernels", "train"):
            with result_file.Section(name, CPU, options(tmp_path)) as section:
                section.put(x=math.inf, y=[1.0, float(i)])
        assert capsys.readouterr().out == f"written to {section.path}\n" * 2
        assert section.path.name.endswith(f"-abc{end}")
        files.append(section.path)
    for i, file in enumerate(files):
        values = result_file.load(file)
        assert set(values) == {"format", "kernels", "train"}
        e = values["kernels"]["environment"]
        assert (e["commit"], e["torch"]) == ("abc", torch.__version__)
        assert (values["train"]["x"], values["train"]["y"]) == (None, [1.0, i])
        assert f'"y": [1.0, {i}.0]' in file.read_text()
    named = options(tmp_path)
    named.result = tmp_path / "mine.json"
    for i in range(2):
        with result_file.Section("train", CPU, named) as section:
            section.put(x=i)
    assert result_file.load(named.result)["train"]["x"] == 1


def test_results_before_an_error_are_kept_and_the_gpu_is_no_longer_watched(
    tmp_path, monkeypatch, capsys
) -> None:
    state = dict(sm_mhz=345, watt=73.0, celsius=None, throttled_by=None)
    monkeypatch.setattr(environment, "state", lambda device: state)
    section = result_file.Section("runs", CPU, options(tmp_path))

    def measured() -> None:
        with section:
            section.put(rows=[RunRow(run="fast")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured()
    section.watch.thread.join(timeout=10)
    assert not section.watch.thread.is_alive()
    values = result_file.load(section.path)["runs"]
    assert values["state"]["before"] == state
    assert values["rows"] == [RunRow(run="fast")]
    assert values["ended_by"].startswith("KeyboardInterrupt")
    assert capsys.readouterr().out == ""


def test_another_file_is_no_result(tmp_path) -> None:
    for text in ('{"rows": []}', '{"format": 1}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="not a result file of format 2"):
            result_file.load(tmp_path / "a.json")


def file_of(seconds: float = 1.0, iqr: float = 0.01, name: str = "T4", preset: str = "") -> dict:
    row = StepRow(variant="fused", dtype="float16", seconds=seconds, iqr=iqr)
    tests = {"environment": {"IRONGPT_EMULATE": "sm_75"}}  # says nothing of the device
    train = {"environment": {"name": name}, "preset": preset, "rows": [row]}
    return {"format": 2, "tests": tests, "train": train}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, dict(seconds=0.5), "| 2.00x faster |"),
        ({}, dict(seconds=1.5), "| 1.50x slower |"),
        ({}, dict(seconds=1.02, iqr=0.0), "0 of 1 times differ"),  # less than 3 %
        (dict(iqr=0.3), dict(seconds=1.5, iqr=0.3), "0 of 1 times differ"),  # within both spreads
        (
            dict(iqr=math.nan),
            dict(seconds=9.0),
            "0 of 1 times differ beyond the noise\nNOTE: of 1 times the noise is not known",
        ),
        ({}, dict(name="H200"), "NOTE: another device: T4 and H200"),
        (dict(preset="iron"), dict(preset="fast"), "NOTE: train: another preset, iron and fast"),
    ],
)
def test_changes_beyond_the_noise_and_other_work(before: dict, after: dict, said: str) -> None:
    a, b = file_of(**before), file_of(**after)
    assert said in diff.text(a, b, "a", "b")
    assert "NOTE" not in diff.text(b, b, "a", "b")


def test_memory_and_whole_trainings_are_compared() -> None:
    def file(peak: int, seconds: float, loss: float) -> dict:
        step = StepRow(variant="fused", dtype="float16", seconds=1.0, iqr=0.0, peak_bytes=peak)
        run = RunRow(run="fast, fused", dtype="float16", seconds=seconds)
        run.evaluated = [[500, 1, loss]]
        nano = NanoRow(name="nano", seconds=seconds, validation_loss=loss)
        parts = dict(train=[step], target=[run, RunRow(run="no", skipped_reason="x")], nano=[nano])
        return {"format": 2} | {name: {"rows": rows} for name, rows in parts.items()}

    text = diff.text(file(100 << 20, 20.0, 1.375), file(50 << 20, 10.0, 1.25), "a", "b")
    assert "| -50% | 100.0 MiB | 50.0 MiB | train: fused, float16 |" in text
    assert "target: fast, fused, float16: 20.0 to 10.0 s, validation loss 1.3750 to 1.2500" in text
    assert "nano: nano: 20.0 to 10.0 s, validation loss 1.3750 to 1.2500" in text
    same = diff.text(*(file(100 << 20, 20.0, 1.375),) * 2, "a", "b")
    assert "MiB" not in same


def test_the_newest_file_is_that_of_the_latest_date_inside(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(result_file, "FOLDER", tmp_path)
    for name, date in (("b", "2026-11-25T10:00:00+00:00"), ("a", "2026-11-24")):
        file = tmp_path / "card" / f"{name}.json"  # the older one is written last
        result_file.save(file, "train", {"environment": {"date": date}})
    (tmp_path / "card" / "c.json").write_text("{}")
    assert report.newest() == tmp_path / "card" / "b.json"


@pytest.mark.parametrize("section", tables.SECTIONS)
def test_the_state_of_the_card_is_shown_for_every_section(section: str) -> None:
    before, after = (dict(sm_mhz=345, watt=w, celsius=None) for w in (73.036, 162.853))
    state = dict(seconds=41.2, before=before, after=after, sm_mhz_from_to=[1965, 1980])
    state |= dict(throttled_by=["power cap"])
    values = dict(environment={}, state=state, ended_by="KeyboardInterrupt: ")
    lines = tables.about({section: values}, "x").split("\n\n")
    assert lines[1:] == [
        f"> {section}: interrupted; its results up to then were saved.",
        f"> {section}: at times the driver limited the clocks: power cap.",
        f"- {section}: 41 s, SM clock 1965 to 1980 MHz (345 before, 345 after), power 73 to 163 W "
        "(73 before, 163 after), temperature ? to ? °C (? before, ? after)",
    ]


def test_a_section_that_broke_off_is_reported(tmp_path) -> None:
    """The page has the other sections."""
    begun = dict(environment=dict(name="T4"), state=dict(seconds=1.0), ended_by="RuntimeError: a|b")
    values = {"kernels": begun | dict(rows=[], missing={}), "train": begun, "decode": begun}
    for name, section in values.items():
        result_file.save(tmp_path / "a.json", name, section)
    run = RunRow(run="fast, fused", preset="fast", ops="fused", dtype="float16", finite=False)
    run.steps, run.seconds, run.tokens_per_s = 20, 1.0, 1.0
    run.curve, run.evaluated = [[10, 0.5, 4.0], [20, 1.0, math.nan]], [[20, 1.0, math.nan]]
    result_file.save(tmp_path / "a.json", "runs", dict(text="t", rows=[run]))
    text = (report.write(tmp_path / "a.json") / "report.md").read_text()
    for name in values:
        assert f"> {name}: stopped by RuntimeError: a/b; its results up to then were saved." in text
    assert "| fast, fused | 20 | 1.0 | 1 | nan | nan | STOPPED: the loss is not finite |" in text
    assert "![runs](runs.png)" in text


def test_a_time_of_a_provider_that_exceeds_the_tolerance_is_marked() -> None:
    def file(seconds: float, ok: bool) -> dict:
        accuracy = Accuracy(ok, 2.0)
        rows = rows_of({"builtin": seconds}, "T", accuracy=accuracy, shape=dict(B=1, T=64))
        section = dict(rows=rows, peak_rates=PEAK_RATES, environment={})
        return {"format": 2, "kernels": section}

    text = diff.text(file(1.0, True), file(2.0, False), "a", "b")
    assert text.count("builtin † |") == 3
    assert "exceeds the tolerance" in text
    assert "†" not in diff.text(file(1.0, True), file(2.0, True), "a", "b")
    pictured = [plots.draw("kernels", file(1.0, ok)["kernels"])["sweep-T"] for ok in (True, False)]
    assert pictured[0] != pictured[1]


@pytest.mark.parametrize("options", [["none.json"], ["--compare", "none.json", "none.json"]])
def test_a_file_that_is_no_result_ends_the_report_with_one_line(options: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(options)
    assert "report: error: [Errno 2] No such file" in capsys.readouterr().err


def test_three_digits() -> None:
    shown = {2812.4: "2,812", 99.96: "100", 32.0: "32", 0.012345: "0.0123", 0: "0"}
    assert {value: tables_kernels.digits(value) for value in shown} == shown


def test_a_reason_fits_in_a_cell() -> None:
    assert short("x" * 300) == "x" * 86 + " ..."
    assert short("a | b") == "a / b"


def test_the_pages_have_the_numbers_of_their_files() -> None:
    readme, docs = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    (file,) = re.findall(r"2-core AMD EPYC \(`(.*?)`\)", docs)
    section = result_file.load(ROOT / file)["nano"]
    keys = dict(seconds=1, validation_loss=3, peak_rss_mb=0)
    wanted = [
        [f"{getattr(row, k):.{digits}f}" for k, digits in keys.items()] for row in section["rows"]
    ]
    shown = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| (\d+) MB \|", docs)
    assert [list(cells) for cells in shown] == wanted
    to_end = r"([\d.]+) after ([\d.]+) s, when it ends"
    nanogpt, target, nano = wanted
    shown = re.findall(rf"1.80 after ([\d.]+) s, and {to_end}; .* {to_end}", readme)
    assert shown == [(target[0], *nano[1::-1], *nanogpt[1::-1])]
    assert f"({section['rows'][2].seconds:.0f} s on a 2-core AMD EPYC)" in readme
    step = section["iron_step"]
    sequences, ratio = step["batch"], step["irongpt_over_nanogpt"]
    assert f"with {sequences} sequences takes {ratio:.2f} times as long" in docs
    assert f"{sequences} sequences: {step['irongpt_ms']} ms, nanoGPT's" in tables.nano(section)


def test_rows_survive_a_file_and_ignore_unknown_fields(tmp_path) -> None:
    (row,) = rows_of({"fused": 1.0}, backend="flash")[2:]
    decoded = DecodeRow(ops="fused", way="cached", batch=1, seconds=2e-6, iqr=1e-7)
    for name, one in {"kernels": row, "decode": decoded}.items():
        result_file.save(tmp_path / "a.json", name, {"rows": [one]})
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["decode"]["rows"][0]["seconds_per_token"] == 2e-6
    values["kernels"]["rows"][0] |= {"new_in_a_later_version": 1, "skipped_reason": None}
    (tmp_path / "a.json").write_text(json.dumps(values))
    loaded = result_file.load(tmp_path / "a.json")
    assert loaded["kernels"]["rows"] == [row]
    assert loaded["decode"]["rows"] == [decoded]
    older = decoded.to_json() | {"way": "naive"}
    assert DecodeRow.from_json(older).way == "no cache"
