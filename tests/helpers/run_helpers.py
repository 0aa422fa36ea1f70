"""Comparison and changes of run folders, and a process that compiles kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from irongpt.files import sealed

SECONDS = ("seconds", "tokens_per_s", "mfu")  # differ between equal runs
REMOVED = object()


def change(**values: object) -> Callable[[Path], None]:
    """Changes fields of a sealed JSON file, or of an object in it."""

    def edit(path: Path) -> None:
        stored = json.loads(path.read_bytes())
        del stored["sha256"]
        for name, value in values.items():
            both = isinstance(value, dict) and isinstance(stored.get(name), dict)
            stored[name] = stored[name] | value if both else value
        path.write_bytes(sealed({k: v for k, v in stored.items() if v is not REMOVED}))

    return edit


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
        assert_same_tensors(a / name, b / name)
    assert state(a) == state(b)
    samples, others = ([p.read_text() for p in run.glob("sample.txt")] for run in (a, b))
    assert samples == others


def assert_same_tensors(*checkpoints: Path) -> None:
    """Of two checkpoints."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        x, y = (safetensors.torch.load_file(folder / file) for folder in checkpoints)
        assert x.keys() == y.keys()
        assert [k for k in x if not x[k].equal(y[k])] == []


def compiling(
    *words: object, cwd: Path | None = None, timeout: float | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Python with these words in a process where Triton does not interpret."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"} | env,
        cwd=cwd, timeout=timeout, capture_output=True, text=True,
    )  # fmt: skip
