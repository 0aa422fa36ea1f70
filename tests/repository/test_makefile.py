"""The commands that make runs, recorded by a stand-in for python and irongpt."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import make_venv
from irongpt import driver

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
echo "$2" >> calls
for word in "$@"; do echo "  $word" >> calls; done
[ "$2" != "$FAILING" ]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkout with a .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "make_venv.py"):
        shutil.copy(ROOT / name, tmp_path)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for command in ("python", "irongpt"):
        (bin_folder / command).write_text(STUB)
        (bin_folder / command).chmod(0o755)
    for name in ("run", "dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def make(folder: Path, *words: str, failing: str = "") -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, FAILING=failing)
    env.pop("MAKEFLAGS", None)
    return subprocess.run(
        ["make", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("failing", ["", "benchmarks.training", "benchmarks.decode"])
def test_bench_train_runs_all_three_even_if_one_fails(folder, failing: str) -> None:
    done = make(folder, "bench-train", 'ARGS=--out "a b"', "NANOGPT=nano gpt", failing=failing)
    calls = (folder / "calls").read_text()
    modules = [line for line in calls.splitlines() if not line.startswith("  ")]
    assert modules == ["benchmarks.training", "benchmarks.decode", "benchmarks.train_runs"]
    assert calls.count("  --out\n  a b\n") == 3
    assert calls.count("  --nanogpt\n  nano gpt\n") == 1
    assert done.stderr.count("--out a b") == 3  # it prints the commands
    assert (done.returncode == 0) == (failing == "")


def test_targets_take_their_options(folder) -> None:
    for target, options in (("bench", "--no-sweeps"), ("gpu", "--only doctor"), ("report", "FILE")):
        assert make(folder, target, f"ARGS={options}").returncode == 0
        calls = (folder / "calls").read_text()
        assert calls.endswith("".join(f"  {word}\n" for word in options.split()))


def test_the_gpu_suite_gets_what_its_tests_need(folder) -> None:
    (folder / ".venv" / "dev").unlink()  # as `make train` leaves it
    assert "setting up .venv for the tests" in make(folder, "gpu").stdout


def test_make_alone_prints_every_target_and_runs_nothing(folder) -> None:
    done = make(folder)
    targets = re.search(r"\.PHONY: (.*?)\n\n", (ROOT / "Makefile").read_text(), flags=re.DOTALL)
    assert targets
    assert re.findall(r"^  ([a-z-]+) +\S", done.stdout, flags=re.MULTILINE) == [
        target for target in targets[1].split() if target != "\\"
    ]
    assert not (folder / "calls").exists()


def test_generate_takes_the_newest_run_or_the_one_named(folder) -> None:
    assert "make train" in make(folder, "generate").stderr
    for age, run in ((2, "old"), (1, "new")):
        (folder / "runs" / run).mkdir(parents=True)
        os.utime(folder / "runs" / run, (1e9 - age, 1e9 - age))
    assert make(folder, "generate").returncode == 0
    assert make(folder, "generate", "RUN=runs/old").returncode == 0
    assert re.findall("^  (runs/.*)", (folder / "calls").read_text(), flags=re.MULTILINE) == [
        "runs/new/",
        "runs/old",
    ]


def test_the_pages_name_no_other_target(folder) -> None:
    help_text = make(folder).stdout
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")]:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE))
        assert {target for target in named if f"  {target} " not in help_text} == set(), page


def venv_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own: bool = False, hidden: str = ""
) -> tuple[object, list[str]]:
    """What make_venv returns, and the words that it runs."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(make_venv, "own_torch", lambda: own)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == hidden else find(n))
    words: list[str] = []

    def run(command: list[str], check: bool) -> None:
        words.extend(command[1:])
        (folder / ".venv").mkdir()

    monkeypatch.setattr(make_venv.subprocess, "run", run)
    return make_venv.main(), words


@pytest.mark.parametrize(
    ("driver", "own", "torch"),
    [
        (None, False, ["numpy==2.4.6", "torch==2.13.0", "triton==3.7.1"]),
        ("580.65.06", False, ["numpy==2.4.6", "torch==2.13.0", "triton==3.7.1"]),
        ("570.86.15", False, ["torch==2.10.0", "triton==3.6.0", "numpy==2.3.5"]),
        ("535.104.05", False, ["torch==2.10.0", "triton==3.6.0", "numpy==2.3.5"]),
        ("535.104.05", True, []),
    ],
)
def test_the_driver_decides_which_torch_is_installed(
    tmp_path, monkeypatch, driver: str | None, own: bool, torch: list[str]
) -> None:
    monkeypatch.setattr("irongpt.driver.version", lambda: driver)
    code, words = venv_made(tmp_path, monkeypatch, own)
    assert code == 0
    assert words == ["-m", "venv", "--clear", *["--system-site-packages"] * own, ".venv"]
    lines = (tmp_path / ".venv" / "constraints.txt").read_text().split("\n")
    assert [line for line in lines if re.match("(torch|triton|numpy)==", line)] == torch
    assert "regex==2026.11.15" in lines


def test_a_python_without_ensurepip_needs_its_own_torch(tmp_path, monkeypatch) -> None:
    """Then its pip is used, too."""
    code, words = venv_made(tmp_path, monkeypatch, hidden="ensurepip")
    assert re.fullmatch(r"error: this Python has no ensurepip: apt install python3.*-venv.*", code)
    assert words == []
    code, words = venv_made(tmp_path, monkeypatch, own=True, hidden="ensurepip")
    assert code == 0
    assert words[3:5] == ["--system-site-packages", "--without-pip"]


def test_an_environment_that_is_there_is_kept(tmp_path, monkeypatch) -> None:
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.touch()
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    assert venv_made(tmp_path, monkeypatch) == (0, [])
    assert pip.exists()


def test_make_sets_up_the_environment_that_the_driver_needs(folder) -> None:
    """With a stand-in for nvidia-smi, and for the python that would install."""
    (folder / ".venv" / "run").unlink()
    (folder / ".venv" / "constraints.txt").touch()
    (folder / ".venv" / "pyvenv.cfg").touch()
    (folder / "irongpt").mkdir()
    for name in ("__init__.py", "driver.py"):
        shutil.copy(ROOT / "irongpt" / name, folder / "irongpt")
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 535.104.05\n")
    (folder / "nvidia-smi").chmod(0o755)
    path = f"PATH={folder}{os.pathsep}{os.environ['PATH']}"
    done = make(folder, "report", f"PYTHON=env {path} {sys.executable}")
    assert done.returncode == 0, done.stderr
    assert "NVIDIA driver 535.104.05 is older than 580" in done.stdout
    assert "torch==2.10.0\n" in (folder / ".venv" / "constraints.txt").read_text()
    assert "  --constraint\n  .venv/constraints.txt\n" in (folder / "calls").read_text()


def test_the_torch_for_new_drivers_is_that_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert set(driver.PACKAGES[13].split()) <= set(lines)
