"""`make gpu` runs each stage as a subprocess with a time limit, and summarizes all of them."""

import argparse
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.measure import result_file
from benchmarks.suite import __main__ as suite

ROOT = Path(__file__).resolve().parents[2]
CODE = {
    "hello": "print('hello   world'); print('written to x'); print()",
    "fails": "print('a reason'); raise SystemExit(1)",
    "no tests": "raise SystemExit(5)",
    "slow": "import time; print('begun', flush=True); time.sleep(60)",
    "deaf": (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('begun', flush=True); time.sleep(60)"
    ),
}


@pytest.fixture
def env(tmp_path, monkeypatch) -> dict[str, str]:
    """The environment in which `python -m child` runs a piece of CODE."""
    code = f"import sys\nexec({CODE!r}[sys.argv[1]])\n"
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(suite, "GRACE", 1.0)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("hello", "ok", "hello world"),
        ("fails", "failed", "a reason"),
        ("no tests", "skipped", ""),
        ("slow", "timed out", "KeyboardInterrupt"),
        ("deaf", "timed out", "begun"),
    ],
)
def test_a_subprocess_ends_in_time(code: str, status: str, says: str, env, tmp_path) -> None:
    """Even one that ignores interrupts and has a subprocess which keeps the output open."""
    limit = 2.0 if status == "timed out" else 60.0
    done = suite.run(["child", code], env, limit, tmp_path / "log")
    assert (done.status, done.summary) == (status, says)
    assert done.seconds < 20
    assert done.lines == (tmp_path / "log").read_text().split("\n")[1:-2]


def arguments(tmp_path: Path, *stages: str) -> list[str]:
    return ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--only", *stages]


def test_a_failed_stage_does_not_stop_the_next(tmp_path, monkeypatch, capsys) -> None:
    def stage(self: suite.Suite, name: str, limit: float) -> suite.Done:
        if name == "train":
            result_file.save(self.file, "train", {"state": {}, "ended_by": "KeyboardInterrupt: "})
            raise RuntimeError("no such thing")
        return suite.Done("ok", 1.0, "hello")

    monkeypatch.setattr(suite.Suite, "stage", stage)
    assert suite.main(arguments(tmp_path, "train", "decode")) == 1
    (file,) = tmp_path.glob("*/*.json")
    assert result_file.load(file)["stages"] == {
        "train": dict(status="failed", seconds=0.0, says="RuntimeError: no such thing"),
        "decode": dict(status="ok", seconds=1.0, says="hello"),
    }
    assert re.search(r"decode +ok +1.0  hello", capsys.readouterr().out)


def test_no_stage_starts_without_time(tmp_path, monkeypatch) -> None:
    limits = []

    def stage(self: suite.Suite, name: str, limit: float) -> suite.Done:
        limits.append(limit)
        time.sleep(0.6)
        return suite.Done("ok")

    monkeypatch.setattr(suite.Suite, "stage", stage)
    monkeypatch.setattr(suite, "GRACE", 0.0)
    assert suite.main([*arguments(tmp_path, "kernels", "decode"), "--minutes", "0.025"]) == 1
    assert limits == [pytest.approx(1.5, abs=0.1)]  # of 1.5 s, 0.9 are left: less than a second


def test_the_counts_of_test_files_are_added(tmp_path, monkeypatch) -> None:
    lines = {
        "test_a.py": ("failed", ["FAILED x - y", "3 failed, 12 passed, 1 skipped in 4.20s"]),
        "test_b.py": ("ok", ["28 passed, 2 xfailed in 62.10s (0:01:02)"]),
        "test_c.py": ("failed", ["ERROR z", "1 passed, 2 errors in 0.50s"]),
        "test_d.py": ("timed out", ["..."]),
    }

    def run(words: list[object], *_: object, show: bool) -> suite.Done:
        status, out = lines[Path(str(words[-1])).name]
        return suite.Done(status, 1.0, out[-1], out)

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(suite, "test_files", lambda *_: ([Path(name) for name in lines], []))
    suite.main(arguments(tmp_path, "tests", "emulated"))
    (file,) = tmp_path.glob("*/*.json")
    found = result_file.load(file)
    says = "41 passed, 3 failed, 2 error, 1 skipped; 3 of 4 files ended, not test_d.py"
    stage = found["stages"]["tests"]
    assert (stage["status"], stage["says"]) == ("failed", says)
    assert found["stages"]["emulated"]["status"] == "skipped"
    assert found["tests"]["failures"] == ["FAILED x - y", "ERROR z"]
    assert found["tests"]["files"]["test_b.py"] == dict(passed=28, status="ok", seconds=1.0)


def test_a_gpu_runs_what_only_it_can_show_first() -> None:
    assert list(suite.SHARES)[:5] == ["doctor", "gpu", "compare", "tests", "emulated"]
    only_gpu, select = suite.test_files("gpu", gpu=True)
    assert only_gpu[0].name == "test_gpu.py"
    assert select == ["-m", "gpu"]
    all_files, none = suite.test_files("emulated", gpu=True)
    assert suite.test_files("tests", gpu=True) == (all_files, ["-m", "not gpu"])
    assert none == []
    names = {str(file.relative_to(ROOT / "tests")) for file in all_files}
    kernels = {f"kernels/{file.name}" for file in (ROOT / "tests/kernels").glob("test_*.py")}
    assert kernels | {"test_gpu.py", "generation/test_decode.py", "cli/test_tune.py"} <= names
    assert set(only_gpu) < set(all_files)
    assert not any(name.startswith("aot/") for name in names)
    assert "training/test_loop.py" not in names


def test_a_cpu_takes_a_step_of_each_of_the_ops() -> None:
    (file,), (_, words) = suite.test_files("gpu", gpu=False)
    (step,) = re.findall(r"@each_ops\n(?:@.*\n)*def test_\w*waits_in_a_step\b.*", file.read_text())
    assert "waits_in_a_step" in words
    assert "optimizer" in step
    assert suite.test_files("tests", gpu=False)[0][0].exists()


@pytest.mark.parametrize(
    ("gib", "cpus", "processes"), [(15, 2, 1), (15, 16, 1), (24, 16, 3), (80, 6, 3), (140, 64, 8)]
)
def test_test_files_share_the_memory_of_the_gpu(
    tmp_path, monkeypatch, gib: int, cpus: int, processes: int
) -> None:
    args = dict(device="cpu", result=tmp_path / "r.json", data=None, commit=None, only=None)
    one = suite.Suite(argparse.Namespace(**args))
    assert one.at_once() == 1
    one.gpu = True
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert one.at_once() == processes


@pytest.mark.parametrize(
    ("name", "saves", "says"),
    [
        ("train", dict(rows=[1, 2]), "saved 2 rows; KeyboardInterrupt"),
        (
            "compare",
            dict(rows=[1], groups=7, of_groups=31),
            "saved 7 of 31 groups; KeyboardInterrupt",
        ),
        ("decode", None, "saved 0 rows; KeyboardInterrupt"),
    ],
)
def test_a_stage_that_is_cut_says_what_it_saved(
    tmp_path, monkeypatch, name: str, saves: dict | None, says: str
) -> None:
    def run(words: list[object], *_: object) -> suite.Done:
        at = words[words.index("--json") + 1] if "--json" in words else None
        if at:
            Path(str(at)).write_text(json.dumps(saves))
        elif saves:
            result_file.save(tmp_path / "r.json", name, saves)
        return suite.Done("timed out", 1.0, "KeyboardInterrupt")

    monkeypatch.setattr(suite, "run", run)
    monkeypatch.setitem(result_file.KINDS, "train", SimpleNamespace(from_json=lambda row: row))
    arguments = ["--device", "cpu", "--result", str(tmp_path / "r.json"), "--only", name]
    assert suite.main(arguments) == 1
    assert result_file.load(tmp_path / "r.json")["stages"][name]["says"] == says
