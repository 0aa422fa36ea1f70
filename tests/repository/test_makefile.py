"""What make runs, with a python that only writes down how it was called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
echo "$2" >> calls
for word in "$@"; do echo "  $word" >> calls; done
[ "$2" != "$FAILING" ]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout whose .venv is there."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
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
def test_bench_train_runs_all_three_whatever_fails(folder: Path, failing: str) -> None:
    done = make(folder, "bench-train", 'ARGS=--out "a b"', "NANOGPT=nano gpt", failing=failing)
    calls = (folder / "calls").read_text()
    modules = [line for line in calls.splitlines() if not line.startswith("  ")]
    assert modules == ["benchmarks.training", "benchmarks.decode", "benchmarks.train_runs"]
    assert calls.count("  --out\n  a b\n") == 3
    assert calls.count("  --nanogpt\n  nano gpt\n") == 1
    assert done.stderr.count("--out a b") == 3  # it says what it runs
    assert (done.returncode == 0) == (failing == "")


def test_targets_take_their_options(folder: Path) -> None:
    for target, options in (("bench", "--no-sweeps"), ("gpu", "--only doctor"), ("report", "FILE")):
        assert make(folder, target, f"ARGS={options}").returncode == 0
        calls = (folder / "calls").read_text()
        assert calls.endswith("".join(f"  {word}\n" for word in options.split()))
