"""Comparison of two run folders, bit for bit, and a process that compiles kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch

SECONDS = ("seconds", "tokens_per_s", "mfu")  # differ between equal runs


def history(run: Path) -> list[dict]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in record.items() if k not in SECONDS} for record in records]


def state(run: Path) -> dict:
    state = json.loads((run / "last/state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "sha256")}


def assert_same(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    for name in ("last", "best"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            x, y = (safetensors.torch.load_file(run / name / file) for run in (a, b))
            assert x.keys() == y.keys()
            assert [k for k in x if not x[k].equal(y[k])] == []
    assert state(a) == state(b)
    samples, others = ([p.read_text() for p in run.glob("sample.txt")] for run in (a, b))
    assert samples == others


def compiling(
    *words: object, cwd: Path | None = None, timeout: float | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Python with these words in a process where Triton does not interpret."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | env,
        cwd=cwd, timeout=timeout, capture_output=True, text=True,
    )  # fmt: skip
