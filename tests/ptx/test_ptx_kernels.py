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
DTYPES, ARCHS = ("float16", "float32"), ("sm_75", "sm_80", "sm_90")
PROGRAM = f"""
import sys
from tests.ptx import __main__ as ptx, injected
noise = "--mma hardware --noise 1 --dtype float32".split()
sys.argv[1:] = [*noise, "float16", "--set", "sample"]
code = ptx.main()
sys.argv[1:] = [*noise, "--set", "lengths"]
code |= ptx.main()
sys.argv[1:] = "--quick --arch {" ".join(ARCHS)}".split()
sys.exit(code or injected.main())
"""


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_every_op_executed_as_compiled_for_a_t4_and_injected_bugs_that_are_found() -> None:
    """With the errors that tensor cores and approximate instructions may have. One process runs
    both: it starts slowly."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = compiling("-c", PROGRAM, cwd=ROOT, PYTHONPATH=os.pathsep.join(paths))
    found = done.stdout
    assert done.returncode == 0, found[-3000:] + done.stderr[-2000:]
    row = re.compile(
        r"^(\w+) .* sm_75 (\w+) +lockstep +(\d\.\d\d) +[\d,]+ +[\d.]+  ok$", re.MULTILINE
    )
    rows = row.findall(found)
    assert {(op, dtype) for op, dtype, _ in rows} == {(op, d) for op in SPECS for d in DTYPES}
    assert max(float(share) for *_, share in rows) <= 0.8  # of the tolerance
    for arch in ARCHS:
        assert len(re.findall(rf"^{arch} ", found, re.MULTILINE)) >= 4
    assert re.search(r"^14 named bugs, 0 not found$", found, re.MULTILINE), found


@pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
def test_emulating_restores_the_folder_of_the_cache(monkeypatch) -> None:
    """Otherwise each block would use a folder in that of the block before it."""
    from irongpt_kernels.ptx.driver import emulating
    from irongpt_kernels.runtime import launch
    from triton import knobs

    monkeypatch.setattr(launch, "INTERPRETED", False)
    before = knobs.cache.dir, dict(os.environ)
    for _ in range(2):
        with emulating(80):
            assert knobs.cache.dir == os.path.join(before[0], "ptx")
        assert (knobs.cache.dir, dict(os.environ)) == before
