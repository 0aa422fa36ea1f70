"""Injects bugs into a copy of the kernels, one at a time, and runs the tests of that kernel on it.

    python -m tests.mutants.run                          all bugs, in an hour and a half
    python -m tests.mutants.run --only gelu              bugs whose module or name contains the text
    python -m tests.mutants.run --check                  only checks that every bug can be injected

The bugs are of kinds that other kernels have had: one-line changes of a text that occurs exactly
once in its file, in which {{a -> b}} marks that b replaces a. A bug is caught if a test fails, or
if Python crashes after memory was corrupted. The kernel's own test files run first; if they pass,
the op's tests in test_op_contract.py and test_sanitizer.py follow. A module whose tests fail
without a bug is reported as RED, and skipped. The command prints a row per bug and how many were
caught. Its exit code is 1 if fewer than 95 % were.
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

from tests.mutants import attention, optimizer, rows, tokens
from tests.mutants.rows import Bug

# A list of bugs is named after the module of `fused` into which they are injected.
BUGS: dict[str, list[Bug]] = {
    name.lower(): bugs
    for file in (attention, rows, tokens, optimizer)
    for name, bugs in vars(file).items()
    if isinstance(bugs, list)
}
# The test files of a module's ops alone, and what pytest -k selects in those of all ops. By default
# both are the module's name.
TESTS = {
    "attention": ("attention", "causal_attention"),
    "attention_tiles": ("attention", "causal_attention"),
    "attention_backward": ("attention", "causal_attention"),
    "attention_head_backward": ("attention attention_head", "causal_attention"),
    "layer_norm_backward": ("layer_norm", "layer_norm"),
    "norm_parameters": ("norm_parameters embed_layer_norm", "layer_norm"),
    "linear_cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "decode_linear": ("decode_linear", "linear"),
    "decode_tokens": ("decode_tokens", "tokens"),
    "grad_norm": ("adamw", "adamw or sum_shards"),
    "philox": ("philox attention layer_norm", "with and dropout"),
}
REPOSITORY = Path(__file__).parents[2]
GOAL = 0.95
PASSED, FAILED = 0, 1  # pytest's exit codes; with others the tests did not run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "only check that every bug can be injected"
    parser.add_argument("--check", action="store_true", help=help)
    help = "inject the bugs whose module or name contains this text [all bugs]"
    parser.add_argument("--only", metavar="TEXT", default="", help=help)
    help = "time limit for the tests of one bug, in seconds [600]"
    parser.add_argument("--seconds", type=float, default=600, help=help)
    args = parser.parse_args()
    if args.check:
        stale = problems()
        print("\n".join(stale) or f"all {sum(map(len, BUGS.values()))} bugs can be injected")
        return 1 if stale else 0
    caught = total = 0
    for module, bugs in BUGS.items():
        wanted = [bug for bug in bugs if args.only in f"{module}: {bug[0]}"]
        if wanted and (red := _verdict(module, "", "", args.seconds)) != "MISSED":
            print(f"{module}: RED without a bug: {red}", flush=True)
            total += len(wanted)
            continue
        for bug in wanted:
            name = f"{module}: {bug[0]}"
            start = time.perf_counter()
            verdict = _verdict(module, *texts(bug[1]), args.seconds)
            caught += verdict.startswith("caught")
            total += 1
            print(f"{name:68} {time.perf_counter() - start:4.0f} s  {verdict}", flush=True)
    print(f"{caught} of {total} caught")
    return 0 if total and caught >= GOAL * total else 1


def problems() -> list[str]:
    """Bugs whose old text does not occur exactly once, or that change nothing; and test files that
    do not exist."""
    found = []
    for module, bugs in BUGS.items():
        found += [f"no {file}" for file in _files(module) if not (REPOSITORY / file).exists()]
        text = (REPOSITORY / f"kernels/irongpt_kernels/fused/{module}.py").read_text()
        for name, change in bugs:
            old, new = texts(change)
            found += [f"{module}: {name}"] if text.count(old) != 1 or old == new else []
    return found


def texts(change: str) -> tuple[str, str]:
    """The text without the bug and with it: of each {{a -> b}} the a, and the b."""
    old, new = (re.sub(r"{{(.*?) -> (.*?)}}", rf"\{i}", change, flags=re.DOTALL) for i in (1, 2))
    return old, new


def _files(module: str) -> list[str]:
    """The test files of a module's ops alone."""
    names, _ = TESTS.get(module, (module, ""))
    return [f"tests/kernels/test_{name}.py" for name in names.split()]


def _verdict(module: str, old: str, new: str, seconds: float) -> str:
    """The result of the tests with `old` replaced by `new`. An empty `old` injects no bug."""
    _, ops = TESTS.get(module, ("", module))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "irongpt_kernels")
        shutil.copytree(REPOSITORY / "kernels" / "irongpt_kernels", package)
        source = package / "fused" / f"{module}.py"
        text = source.read_text()
        if old and text.count(old) != 1:
            return f"STALE, the text occurs {text.count(old)} times"
        source.write_text(text.replace(old, new) if old else text)
        of_all = [f"tests/kernels/test_{name}.py" for name in ("op_contract", "sanitizer")]
        for tests in (_files(module), [*of_all, "-k", ops]):
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
                return f"BROKEN, pytest exits with {code}: {out[-300:]}"
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
