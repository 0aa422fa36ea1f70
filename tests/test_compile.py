"""Every kernel compiles for the GPUs that we name, at the parameters that its launcher chooses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHS = ["75", "80", "90"]
SHARED_MEMORY = {"75": 65_536, "80": 166_912, "90": 232_448}  # bytes a program may have


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """By architecture: see `compile_all`."""
    here = Path(__file__).parent
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(here / "compile_all.py"), *ARCHS],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles(compiled: dict[str, Any], arch: str) -> None:
    assert compiled[arch]["compiled"]
    assert compiled[arch]["failed"] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_launched_by_some_op(compiled: dict[str, Any], arch: str) -> None:
    assert compiled[arch]["idle"] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_fits(compiled: dict[str, Any], arch: str) -> None:
    too_big = [x for x in compiled[arch]["compiled"] if x["shared"] > SHARED_MEMORY[arch]]
    assert too_big == []


def test_a_t4_sees_no_bfloat16(compiled: dict[str, Any]) -> None:
    assert [x for x in compiled["75"]["compiled"] if x["bf16"]] == []
