"""`make gpu`: stages as processes, their limits, and what is told of them."""

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks.measure import result_file
from benchmarks.suite import __main__ as gpu
from benchmarks.suite import process, summary


def arguments(tmp_path: Path, *stages: str) -> list[str]:
    return ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--only", *stages]


def test_a_stage_survives_the_failure_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(self: gpu.Gpu, *command: object, limit: float) -> process.Done:
        words = [sys.executable, "-c", "print('hello')"]
        return process.run(words, self.env, limit, self.log, tmp_path)

    def broken(self: gpu.Gpu, limit: float) -> process.Done:
        result_file.save(self.file, "train", {"state": {}, "ended_by": "KeyboardInterrupt: "})
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu.Gpu, "python", python)
    monkeypatch.setattr(gpu.Gpu, "train", broken)
    assert gpu.main(arguments(tmp_path, "train", "decode")) == 1
    (file,) = tmp_path.glob("*/*.json")
    stages = result_file.load(file)["stages"]
    assert stages["train"]["status"] == "failed"
    assert "no such thing" in stages["train"]["says"]
    assert stages["decode"] == {**stages["decode"], "status": "ok", "says": "hello"}
    assert re.search(r"decode +ok .*hello", capsys.readouterr().out)
    assert "hello" in file.with_suffix(".log").read_text()


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    done = process.run(words, dict(os.environ), 1.5, tmp_path / "log", tmp_path)
    assert done.status == "timed out"
    assert done.seconds < 20
    assert "begun" in done.lines


def test_several_at_a_time(tmp_path: Path) -> None:
    commands = {
        str(i): [sys.executable, "-c", f"print({i}); raise SystemExit({i})"] for i in (0, 1)
    }
    found: dict[str, str] = {}
    done = process.run_many(
        commands, dict(os.environ), 60, tmp_path / "log", tmp_path, 2,
        lambda name, done: found.__setitem__(name, done.status),
    )  # fmt: skip
    assert found == {"0": "ok", "1": "failed"}
    assert done.status == "failed"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("3 failed, 12 passed, 1 skipped in 4.20s", dict(failed=3, passed=12, skipped=1)),
        ("28 passed in 62.10s (0:01:02)", dict(passed=28)),
        ("1 passed, 2 errors in 0.50s", dict(passed=1, error=2)),
        ("no tests ran", {}),
    ],
)
def test_counts_of_pytest(line: str, counts: dict[str, int]) -> None:
    assert summary.pytest_counts(["tests/x.py ....", line, ""]) == counts
