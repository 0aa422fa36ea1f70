"""The commands that make runs, recorded by a stand-in for python and irongpt."""

import os
import re
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
    """A checkout with a .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
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
def test_bench_train_runs_all_three_even_if_one_fails(folder: Path, failing: str) -> None:
    done = make(folder, "bench-train", 'ARGS=--out "a b"', "NANOGPT=nano gpt", failing=failing)
    calls = (folder / "calls").read_text()
    modules = [line for line in calls.splitlines() if not line.startswith("  ")]
    assert modules == ["benchmarks.training", "benchmarks.decode", "benchmarks.train_runs"]
    assert calls.count("  --out\n  a b\n") == 3
    assert calls.count("  --nanogpt\n  nano gpt\n") == 1
    assert done.stderr.count("--out a b") == 3  # it prints the commands
    assert (done.returncode == 0) == (failing == "")


def test_targets_take_their_options(folder: Path) -> None:
    for target, options in (("bench", "--no-sweeps"), ("gpu", "--only doctor"), ("report", "FILE")):
        assert make(folder, target, f"ARGS={options}").returncode == 0
        calls = (folder / "calls").read_text()
        assert calls.endswith("".join(f"  {word}\n" for word in options.split()))


def test_make_alone_prints_every_target_and_runs_nothing(folder: Path) -> None:
    done = make(folder)
    targets = re.search(r"\.PHONY: (.*?)\n\n", (ROOT / "Makefile").read_text(), flags=re.DOTALL)
    assert targets
    assert re.findall(r"^  ([a-z-]+) +\S", done.stdout, flags=re.MULTILINE) == [
        target for target in targets[1].split() if target != "\\"
    ]
    assert not (folder / "calls").exists()


def test_generate_takes_the_newest_run_or_the_one_named(folder: Path) -> None:
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


def test_the_pages_name_no_other_target(folder: Path) -> None:
    help_text = make(folder).stdout
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")]:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE))
        assert {target for target in named if f"  {target} " not in help_text} == set(), page
