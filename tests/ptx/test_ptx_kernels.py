"""Every op from the PTX that is compiled for a T4, and bugs injected there.

`make test-compiled` runs all of it: every shape, architecture and dtype.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from irongpt_kernels.op_specs import SPECS
from run_helpers import compiling

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")


def output(*command: str) -> str:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = compiling("-m", *command, cwd=ROOT, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_every_op_executed_as_compiled_for_a_t4() -> None:
    """With the errors that tensor cores and approximate instructions may have."""
    dtypes = ("float16", "float32")
    how = ("--dtype", *dtypes, "--mma", "hardware", "--noise", "1")
    found = output("tests.ptx", "--set", "sample", "--arch", "sm_75", *how)
    good = re.compile(
        r"^(\w+) .* sm_75 (\w+) +lockstep +0\.([0-7]\d|80) +[\d,]+ +[\d.]+  ok$", re.MULTILINE
    )
    assert {m.group(1, 2) for m in good.finditer(found)} == {
        (op, d) for op in SPECS for d in dtypes
    }


def test_injected_bugs_are_found() -> None:
    archs = ("sm_75", "sm_80", "sm_90")
    found = output("tests.ptx.injected", "--quick", "--arch", *archs)
    for arch in archs:
        assert len(re.findall(rf"^{arch} ", found, re.MULTILINE)) >= 4
    assert re.search(r"^14 named bugs, 0 not found$", found, re.MULTILINE), found
