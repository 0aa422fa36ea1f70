"""Every kernel compiles for the GPUs that we name, at the parameters that its launcher chooses, and
Triton's launcher passes each of its arguments to the place where the PTX reads it."""

import ast
import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import irongpt_kernels
import pytest
from run_helpers import compiling

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
LAUNCHED = Path(__file__).parents[1] / "helpers" / "launched.py"
SHARED_MEMORY = {75: 65_536, 80: 166_912, 90: 232_448}  # bytes a program may have
COMPILE = """
import sys
from irongpt_kernels.aot.__main__ import main
for arch in sys.argv[1:]:
    main(["--arch", arch, "--quick", "--json"])
"""


def missing() -> str:
    """What Triton's launcher, a C module, cannot be built without; empty if it can be built."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return "a C compiler"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.exists() else "Python.h"


@pytest.fixture(scope="module")
def reports() -> dict[int, dict[str, Any]]:
    """The reports of `irongpt_kernels.aot`, by architecture, from one process: it starts slowly."""
    program = ["-c", COMPILE] if missing() else [LAUNCHED]
    done = compiling(*program, *(f"sm_{arch}" for arch in SHARED_MEMORY))
    found = json.loads("[" + done.stdout.replace("\n}\n{", "\n},\n{") + "]")
    assert [report["arch"] for report in found] == [*SHARED_MEMORY], done.stderr[-3000:]
    return dict(zip(SHARED_MEMORY, found, strict=True))


def launched_kernels() -> set[str]:
    """module._name_kernel for every kernel of the package that a launcher launches."""
    found = set()
    for path in Path(irongpt_kernels.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(f"{path.stem}.{node.name}")
    return found


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{r['kernel']} {r['shape']}" for r in rows]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_fits_and_gets_its_arguments(arch: int, reports) -> None:
    report = reports[arch]
    rows = report["kernels"]
    assert report["failed"] == []
    assert report["warnings"] == []
    head = {"attention_head_backward._bwd_head_kernel"}  # the default on sm_90 alone
    assert launched_kernels() - {r["kernel"] for r in rows} == (set() if arch == 90 else head)
    assert names([r for r in rows if r["shared"] > SHARED_MEMORY[arch]]) == []
    assert names([r for r in rows if r["warps_per_sm"] == 0]) == []

    assert names([r for r in rows if r.get("LOCAL")]) == []  # in its loop

    matmuls = [r for r in rows if r["dot"] and r["dtype"] != "float32"]
    assert {r["kernel"] for r in matmuls} == {
        "attention._fwd_kernel",
        "attention_backward._bwd_dq_kernel",
        "attention_backward._bwd_dkdv_kernel",
    } | (head if arch == 90 else set())
    assert names([r for r in matmuls if r["HMMA"] == 0]) == []
    assert {r["shape"].split()[0] for r in matmuls} >= {"D=64", "D=128"}
    # Of 16 elements that a call could serve, a warp of 16 rows has 8; addresses count as calls.
    calls = [(r["kernel"], r["per_call"]) for r in matmuls if "D=64 p=0.2" in r["shape"]]
    assert len({kernel for kernel, _ in calls}) == (4 if arch == 90 else 3)
    assert min(per_call for _, per_call in calls) >= 7
    if arch >= 80 and f"triton=={report['triton']}" in CONSTRAINTS.read_text().split():
        attention = [r for r in rows if r["op"] == "causal_attention"]
        assert names([r for r in attention if r["stack"]]) == []
        kernel = {80: "_bwd_dq_kernel", 90: "_fwd_kernel"}[arch]  # whose registers have a limit
        tight = [r for r in matmuls if kernel in r["kernel"] and "D=64" in r["shape"]]
        assert [r["warps_per_sm"] for r in tight] == [12] * len(tight) != []
    if arch == 75:
        # Registers fall out a little differently under another compiler.
        pinned = f"triton=={report['triton']}" in CONSTRAINTS.read_text().split()
        assert names([r for r in rows if r["stack"] > (0 if pinned else 16)]) == []
        assert names([r for r in rows if r["bf16"]]) == []
        assert names([r for r in matmuls if r["FFMA"] > r["HMMA"]]) == []
        assert names([r for r in matmuls if r["warps_per_sm"] < 4]) == []

    if missing():
        pytest.skip(f"compiled, but not launched: that needs {missing()}")
    assert report["mismatches"] == []
    assert report["launches"] >= len(rows)
    assert report["parameters"] > 10 * len(rows)
    # The check sees two arguments that are exchanged, forward and backward.
    assert len(report["injected"]) == 4
