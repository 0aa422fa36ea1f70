"""
Plants each bug of `bugs` into a copy of the kernels, and runs the tests of that kernel there.

    python -m tests.mutants.run                          all of them: half an hour
    python -m tests.mutants.run --only gelu              those whose module or name contains it

A bug is caught where a test fails, or memory is corrupted and Python dies. The kernel's own tests
run first, the sanitizer's where they pass. Before a module's bugs its tests have to pass without
any, or what they catch means nothing, and the module is left out as RED. Prints a table and how
many were caught; exits 1 where fewer than 95 % were.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.bugs import BUGS

REPOSITORY = Path(__file__).parents[2]
GOAL = 0.95
PASSED, FAILED = 0, 1  # pytest's exit codes; others mean that the tests did not run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--only", default="", help="part of a module's or a bug's name")
    parser.add_argument("--seconds", type=float, default=600, help="for the tests of one bug")
    args = parser.parse_args()
    caught = total = 0
    for module, (bugs, files, ops) in BUGS.items():
        wanted = [bug for bug in bugs if args.only in f"{module}: {bug[0]}"]
        if wanted and (red := _verdict(module, "", "", files, ops, args.seconds)) != "MISSED":
            print(f"{module}: RED without a bug: {red}", flush=True)
            total += len(wanted)
            continue
        for bug in wanted:
            name = f"{module}: {bug[0]}"
            start = time.perf_counter()
            verdict = _verdict(module, bug[1], bug[2], files, ops, args.seconds)
            caught += verdict.startswith("caught")
            total += 1
            print(f"{name:68} {time.perf_counter() - start:4.0f} s  {verdict}", flush=True)
    print(f"{caught} of {total} caught")
    return 0 if total and caught >= GOAL * total else 1


def _verdict(module: str, old: str, new: str, files: str, ops: str, seconds: float) -> str:
    """What the tests say with `old` replaced by `new`; an empty `old` is no bug."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "irongpt_kernels")
        shutil.copytree(REPOSITORY / "kernels" / "irongpt_kernels", package)
        source = package / "fused" / f"{module}.py"
        text = source.read_text()
        if old and text.count(old) != 1:
            return f"STALE, the text stands there {text.count(old)} times"
        source.write_text(text.replace(old, new) if old else text)
        own = [f"tests/kernels/{name}" for name in files.split()]
        under_sanitizer = ["tests/kernels/test_sanitizer.py", "-k", f"an_op and {ops}"]
        for tests in (own, under_sanitizer) if ops else (own,):
            try:
                code, out = _pytest(folder, tests, seconds)
            except subprocess.TimeoutExpired:
                return "TIMEOUT"
            if code == FAILED:
                failed = re.search(r"^FAILED tests/(.+?)(?: - |$)", out, re.MULTILINE)
                return f"caught by {failed[1] if failed else '?'}"
            if code < 0:
                return f"caught by a crash, signal {-code}"
            if code != PASSED:
                return f"BROKEN, pytest ends with {code}: {out[-300:]}"
    return "MISSED"


def _pytest(folder: str, tests: list[str], seconds: float) -> tuple[int, str]:
    env = os.environ | {"PYTHONPATH": f"{folder}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
