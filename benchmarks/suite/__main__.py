"""Everything that a GPU is asked for in one go: `make gpu`, or without any installation

    PYTHONPATH=.:kernels python -m benchmarks.suite              all stages, in ten minutes at most
    PYTHONPATH=.:kernels python -m benchmarks.suite --only compare kernels

It needs torch, triton, pytest and numpy; with nvidia-ml-py the results also have the GPU's clocks,
power and temperature. It needs no network: without it the runs read Python's manual, or what --data
names. Each stage is a process of its own, has its part of the time that is left, and
writes what it has as soon as it has it; the next one starts whatever became of it. Without a GPU
the same stages run in a small size.

    doctor      what this machine will run
    tests       the kernels' tests on this GPU, several files at a time
    emulated    the same as on a T4: IRONGPT_EMULATE=sm_75
    compare     kernels against eager
    kernels     every op by every provider at the iron model's shape
    train       milliseconds a training step
    decode      tokens a second of writing
    runs        300 steps of training for each of the ops
    report      the page with all of it, if matplotlib is installed

Exit code 1 if a stage failed or ran out of its time.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from irongpt_kernels.runtime import emulate

from benchmarks.measure import result_file
from benchmarks.suite import summary
from benchmarks.suite.process import Done, run, run_many
from irongpt import device as devices

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    *("test_attention*.py", "test_builtin.py", "test_cross_entropy.py", "test_dropout*.py"),
    *(
        "test_adamw.py",
        "test_fused.py",
        "test_gelu.py",
        "test_layer_norm.py",
        "test_muon.py",
        "test_op_contract.py",
        "test_decode_attention.py",
        "test_decode_linear.py",
        "test_decode_tokens.py",
        "test_decode.py",
        "test_philox.py",
        "test_softmax.py",
        "test_compile.py",
    ),
    *("test_turing*.py", "test_cuda_graph.py", "test_gpu.py"),
    *("test_cuda_graph_timing.py", "test_steps.py"),
)
SMOKE_TESTS = ("test_checks.py",)  # make test has all of them on a CPU
PROCESSES = 8  # of tests at a time, at most
LEAST = 30.0  # seconds for a stage
SHARES = {  # of the time
    "doctor": 4,
    "tests": 20,
    "emulated": 20,
    "compare": 10,
    "kernels": 17,
    "train": 18,
    "decode": 4,
    "runs": 7,
    "report": 4,
}
Values = dict[str, Any]


class Gpu:
    """The stages on one device, with one result file. Each returns what became of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = devices.pick(args.device)
        self.gpu = self.device.type == "cuda"
        self.file: Path = args.result or result_file.path(args.out, self.device, args.commit, "gpu")
        if not args.result:
            self.file = result_file.fresh(self.file, *(args.only or SHARES))
        self.file = self.file.resolve()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.data: str | None = args.data  # stages run in another folder
        if self.data and Path(self.data).exists():
            self.data = str(Path(self.data).resolve())
        self.log = self.file.with_suffix(".log")
        self.options = ["--device", str(self.device), "--result", str(self.file)]
        self.options += ["--commit", args.commit] if args.commit else []
        self.env = dict(os.environ)
        here = [str(ROOT), str(ROOT / "kernels"), self.env.get("PYTHONPATH", "")]
        self.env["PYTHONPATH"] = os.pathsep.join(p for p in here if p)
        self.env["PYTHONUNBUFFERED"] = "1"
        self.env.pop("TRITON_INTERPRET", None)  # a time of the interpreter tells nothing

    def python(self, *command: object, limit: float, env: dict[str, str] | None = None) -> Done:
        words = [sys.executable, "-m", *map(str, command)]
        return run(words, self.env | (env or {}), limit, self.log, ROOT)

    def benchmark(self, name: str, limit: float, *options: object) -> Done:
        return self.python(f"benchmarks.{name}", *self.options, *options, limit=limit)

    def doctor(self, limit: float) -> Done:
        return self._with_json("doctor", limit, "irongpt", "doctor")

    def compare(self, limit: float) -> Done:
        command: list[object] = ["irongpt", "compare"]
        if not self.gpu:  # a minute and more in the interpreter
            command += ["--ops", "builtin"]
        if importlib.util.find_spec("matplotlib"):
            picture = self.file.with_name(f"{self.file.stem}-compare.png")
            command += ["--plot", picture]
        else:
            print("matplotlib is not installed: no picture")
        return self._with_json("compare", limit, *command)

    def _with_json(self, section: str, limit: float, *command: object) -> Done:
        """A command of irongpt whose JSON becomes a section. Its exit code 1 is a finding."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            done = self.python(*command, "--device", self.device, "--json", file, limit=limit)
            if file.exists():
                result_file.save(self.file, section, json.loads(file.read_bytes()))
        return done

    def tests(self, limit: float) -> Done:
        return self._pytest("tests", limit, {})

    def emulated(self, limit: float) -> Done:
        if not self.gpu:
            return Done("skipped", 0.0, "it takes a GPU to emulate another")
        if emulate.capability(self.device) == (7, 5):
            return Done("skipped", 0.0, "this GPU is of sm_75 itself")
        return self._pytest("emulated", limit, {emulate.VARIABLE: f"sm_{emulate.ARCH}"})

    def _pytest(self, section: str, limit: float, env: dict[str, str]) -> Done:
        patterns = TESTS if self.gpu else SMOKE_TESTS
        files = sorted({f for pattern in patterns for f in (ROOT / "tests").rglob(pattern)})
        at_once = min(PROCESSES, max(1, (os.cpu_count() or 2) // 2)) if self.gpu else 1
        words = [sys.executable, "-m", "pytest", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        commands = {f.name: [*words, str(f)] for f in files}
        found: Values = {"files": {}, "environment": env}

        def finished(name: str, done: Done) -> None:
            found["files"][name] = {**summary.pytest_counts(done.lines), "status": done.status}
            found["files"][name]["seconds"] = round(done.seconds, 1)
            found["failures"] = found.get("failures", []) + [
                line[:200] for line in done.lines if line.startswith(("FAILED", "ERROR"))
            ]
            result_file.save(self.file, section, found)
            print(f"{name:36} {done.status:9} {summary.counts_line(found['files'][name])}")

        done = run_many(commands, self.env | env, limit, self.log, ROOT, at_once, finished)
        return Done(done.status, done.seconds, summary.tests(found))

    def kernels(self, limit: float) -> Done:
        small = ["--rounds", 3, "--providers", "eager", "naive", "builtin", "math"]
        size = [] if self.gpu else small  # compiling is in make bench
        return self.benchmark("ops", limit, "--quick", *size)

    def train(self, limit: float) -> Done:
        size = [] if self.gpu else ["--turns", 3, "--variants", "builtin", "naive", "eager"]
        return self.benchmark("training", limit, "--budget", 0.85 * limit, *size)

    def decode(self, limit: float) -> Done:
        return self.benchmark("decode", limit)

    def runs(self, limit: float) -> Done:
        size = [] if self.gpu else ["--iters", 10, "--ops", "builtin", "eager"]
        size += ["--data", self.data] if self.data else []
        return self.benchmark("train_runs", limit, "--limit", limit / 3, *size)

    def report(self, limit: float) -> Done:
        if not importlib.util.find_spec("matplotlib"):
            return Done("skipped", 0.0, "matplotlib is not installed; draw it from the file")
        return self.python("benchmarks.report", self.file, limit=limit)


def _says(name: str, known: Values) -> str:
    """A line of what a stage has measured; none of a section that it has left half-written."""
    try:
        return summary.stage(name, known)
    except (KeyError, TypeError, IndexError):
        return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="all that a GPU is asked for")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all stages [9.5]")
    parser.add_argument("--data", help="of the runs [War and Peace if it can be had]")
    result_file.add_options(parser)
    args = parser.parse_args(argv)
    # A shell starts what is in the background deaf to interrupts; the stages have to hear theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gpu = Gpu(args)
    stages = [name for name in SHARES if args.only is None or name in args.only]
    end = time.perf_counter() + 60 * args.minutes
    print(f"on {devices.describe(gpu.device)}; results go to {gpu.file}", flush=True)
    table: Values = {}
    for i, name in enumerate(stages):
        left = end - time.perf_counter()
        limit = max(LEAST, left * SHARES[name] / sum(SHARES[later] for later in stages[i:]))
        print(f"\n== {name}, {limit:.0f} s at most", flush=True)
        stage: Callable[[float], Done] = getattr(gpu, name)
        try:
            done = stage(limit)
        except Exception as e:  # the next stage runs whatever happens
            done = Done("failed", 0.0, f"{type(e).__name__}: {e}"[:200])
        known = result_file.load(gpu.file) if gpu.file.exists() else {}
        says = _says(name, known) or done.says
        table[name] = {"status": done.status, "seconds": round(done.seconds, 1), "says": says}
        result_file.save(gpu.file, "stages", known.get("stages", {}) | table)
    print(f"\n{'stage':9} {'':9} {'seconds':>7}")
    for name, row in table.items():
        print(f"{name:9} {row['status']:9} {row['seconds']:7.1f}  {row['says']}")
    print(f"results: {gpu.file}\noutput:  {gpu.log}")
    return 0 if all(row["status"] in ("ok", "skipped") for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
