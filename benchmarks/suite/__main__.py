"""The full GPU suite: every test, comparison and benchmark of a GPU in one command.

    PYTHONPATH=.:kernels python -m benchmarks.suite          run all stages, for at most 40 minutes
    PYTHONPATH=.:kernels python -m benchmarks.suite --only compare kernels

It needs torch, triton, pytest, numpy and regex, and no installation (`make gpu` runs it too); with
nvidia-ml-py the results also have the GPU's clocks, power and temperature. Without a network, the
runs train on Python's language reference, or on the text that --data names. Each stage is a
subprocess with a share of the remaining time, and saves its results as it goes; the next stage
starts even if it fails. Without a GPU, the stages run in small sizes. The checks that need a GPU
come first:

    doctor      reports what this machine will run
    gpu         runs the tests that need a GPU, with training steps of each implementation
    compare     compares the kernels with eager PyTorch and float64
    tests       runs the other kernel tests on this GPU, several files at a time
    emulated    on newer GPUs: repeats stages gpu and tests with the kernels compiled for a T4
    kernels     times every op in every implementation at the iron model's shape
    train       times training steps
    decode      times generation in tokens/s
    runs        trains for 300 steps with each implementation
    report      writes a Markdown report of all results, if matplotlib is installed

The exit code is 1 if a stage failed or exceeded its time limit. A T4 that has not compiled the
kernels yet needs about 40 minutes, which is an estimate; other GPUs and later runs need less.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import emulate

from benchmarks.measure import result_file
from irongpt import device as devices

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 8  # the most test files that run at a time
PROCESS_BYTES = 8 << 30  # GPU memory that a test file may need, most of it for eager in float64
LEAST = 30.0  # seconds, the shortest limit of a stage
GRACE = 8.0  # seconds from the interrupt of a late stage to its kill
COUNTS = ("passed", "failed", "error", "skipped")  # in pytest's last line
SHARES = dict(  # shares of the time; the stages in their order
    doctor=3,
    gpu=10,
    compare=16,
    tests=20,
    emulated=14,
    kernels=14,
    train=12,
    decode=4,
    runs=5,
    report=2,
)
COMMANDS = {  # the command of a stage, and its additional options without a GPU
    "doctor": ("irongpt doctor", ""),
    "compare": ("irongpt compare", "--ops builtin --dtype float32"),
    "kernels": ("benchmarks.ops --quick", "--rounds 2 --providers eager builtin --ops gelu adamw"),
    "train": ("benchmarks.training", "--steps 1 --rounds 2 --variants builtin"),
    "decode": ("benchmarks.decode", "--ops builtin --tokens 24"),
    "runs": ("benchmarks.train_runs", "--iters 5 --ops builtin"),
    "report": ("benchmarks.report", ""),
}


@dataclass
class Done:
    """How a stage ended. status: ok, failed, timed out or skipped; summary: one line."""

    status: str
    seconds: float = 0.0
    summary: str = ""
    lines: list[str] = field(default_factory=list)


def test_files(stage: str, gpu: bool) -> tuple[list[Path], list[str]]:
    """The files of a stage that runs tests, and the option of pytest that selects tests in them.

    Files in tests/aot are not among them: they compile only, which needs no GPU.
    """
    tests = ROOT / "tests"
    if not gpu:  # a step of each of the ops, and one file: make test runs all of them
        select = ["-k", "waits_in_a_step and adamw and float32"] if stage == "gpu" else []
        return [tests / ("test_gpu.py" if stage == "gpu" else "kernels/test_philox.py")], select
    files = sorted(tests.rglob("test_*.py"))
    marked = [file for file in files if "pytest.mark.gpu" in file.read_text("utf-8")]
    if stage == "gpu":  # training steps first
        return sorted(marked, key=lambda file: file.name != "test_gpu.py"), ["-m", "gpu"]
    kernels = [file for file in files if file.parent.name == "kernels" or file in marked]
    return kernels, ["-m", "not gpu"] if stage == "tests" else []


def run(
    command: Sequence[object], env: dict[str, str], limit: float, log: Path, show: bool = True
) -> Done:
    """Runs a Python module: interrupts it after `limit` seconds, and kills it GRACE later.

    Its output goes to the end of `log` and, with `show`, to the terminal. The summary is the last
    line that does not only name the result file.
    """
    start, late, ended = time.perf_counter(), threading.Event(), threading.Event()
    words = [sys.executable, "-m", *map(str, command)]
    child = subprocess.Popen(
        words, cwd=ROOT, env=env, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, so that its subprocesses end with it
    )  # fmt: skip

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def stop() -> None:
        late.set()
        send(signal.SIGINT)  # benchmarks save their results, pytest prints its counts
        ended.wait(GRACE)
        send(signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    lines: list[str] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if show:
                print(line, end="", flush=True)
        child.wait()
    finally:
        timer.cancel()
        ended.set()
        send(signal.SIGKILL)
        child.wait()
        with open(log, "a", encoding="utf-8") as f:
            f.write("\n".join([f"$ {' '.join(words)}", *lines, "", ""]))
    status = {0: "ok", 5: "skipped"}.get(child.returncode, "failed")  # 5: pytest ran no test
    texts = (" ".join(line.split()) for line in reversed(lines))
    last = next((x for x in texts if x and not x.startswith("written to ")), "")
    seconds = time.perf_counter() - start
    return Done("timed out" if late.is_set() else status, seconds, last[:200], lines)


class Suite:
    """The stages on one device, with one result file and one log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = result_file.pick(args.device)
        self.gpu = self.device.type == "cuda"
        self.file = result_file.path(
            args, self.device, *(args.only or SHARES), name="-gpu"
        ).resolve()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.file.with_suffix(".log")
        self.data: list[object] = []
        if args.data:  # a path, which stages read from the root folder, or the name of a text
            path = Path(args.data).resolve()
            self.data = ["--data", path if path.exists() else args.data]
        self.options = ["--device", str(self.device), "--result", str(self.file)]
        self.options += ["--commit", args.commit] if args.commit else []
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self.env["PYTHONUNBUFFERED"] = "1"
        self.env.pop("TRITON_INTERPRET", None)  # times of the interpreter mean nothing

    def saved(self) -> dict[str, Any]:
        """The sections that the result file has by now."""
        return result_file.load(self.file) if self.file.exists() else {}

    def stage(self, name: str, limit: float) -> Done:
        """Runs a stage. The summary of one that is cut off lists the results that it saved."""
        if name not in COMMANDS:
            return self.tests(name, limit)
        plots = importlib.util.find_spec("matplotlib") is not None
        if name == "report" and not plots:
            why = "matplotlib is not installed: make the report from the file"
            return Done("skipped", summary=why)
        command, on_cpu = COMMANDS[name]
        file = self.file.with_suffix(f".{name}.json")  # which a command of irongpt writes
        common = ["--device", self.device, "--json", file] if "irongpt" in command else self.options
        picture = ["--plot", self.file.with_name(f"{self.file.stem}-compare.png")]
        words: list[object] = {
            "compare": [*common, *(picture if plots else [])],
            "train": [*common, "--budget", 0.85 * limit],
            "runs": [*common, "--limit", limit / 3, *self.data],
            "report": [self.file],
        }.get(name, common)
        given = [*command.split(), *("" if self.gpu else on_cpu).split()]
        done = run([*given, *words], self.env, limit, self.log)
        if file.exists():
            values = json.loads(file.read_bytes())
            file.unlink()
            result_file.save(self.file, name, values)
            if name == "doctor":  # its last line is the end of an advice
                done.summary = "; ".join(values["problems"])[:150] or "no problems"
        if done.status == "timed out":
            section = self.saved().get(name, {})
            saved = f"{len(section.get('rows', []))} rows"
            if "groups" in section:
                saved = f"{section['groups']} of {section['of_groups']} groups"
            done.summary = "; ".join(filter(None, (f"saved {saved}", done.summary)))
        return done

    def at_once(self) -> int:
        """How many test files run at a time: as many as the CPU and the GPU's memory allow."""
        if not self.gpu:
            return 1
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return max(1, min(PROCESSES, (os.cpu_count() or 2) // 2, memory // PROCESS_BYTES))

    def tests(self, name: str, limit: float) -> Done:
        """Runs test files, each in a separate pytest, in as many processes as fit."""
        env = {emulate.VARIABLE: f"sm_{emulate.ARCH}"} if name == "emulated" else {}
        if env and not self.gpu:
            return Done("skipped", summary="emulation of a T4 needs a GPU")
        if env and emulate.capability(self.device) == (7, 5):
            return Done("skipped", summary="this GPU has compute capability 7.5 itself")
        files, select = test_files(name, self.gpu)
        start, lock = time.perf_counter(), threading.Lock()
        results: dict[str, Any] = {"files": {}, "environment": env, "failures": []}

        def one(file: Path) -> str:
            left = limit - GRACE - (time.perf_counter() - start)
            done = Done("timed out", summary="no time was left")
            if left > 1:
                options = ["-rfE", "--tb=short", "-p", "no:cacheprovider", *select]
                words = ["pytest", *options, file]
                done = run(words, self.env | env, left, self.log, show=False)
            counts = {
                w: int(n) for n, w in re.findall(rf"(\d+) ({'|'.join(COUNTS)})", done.summary)
            }
            bad = [line[:200] for line in done.lines if line.startswith(("FAILED", "ERROR"))]
            with lock:
                row = counts | {"status": done.status, "seconds": round(done.seconds, 1)}
                results["files"][file.name] = row
                results["failures"] += bad
                result_file.save(self.file, name, results)
                print(f"{file.name:36} {done.status:9} {done.summary}", flush=True)
            return done.status

        with ThreadPoolExecutor(self.at_once()) as pool:
            statuses = list(pool.map(one, files))
        rows = results["files"].values()
        total = {w: sum(row.get(w, 0) for row in rows) for w in COUNTS}
        summary = ", ".join(f"{n} {w}" for w, n in total.items() if n) or "no test ended"
        late = [f for f, row in results["files"].items() if row["status"] == "timed out"]
        if late:
            ended = len(files) - len(late)
            summary += f"; {ended} of {len(files)} files ended, not {', '.join(sorted(late))}"
        worst = next((s for s in ("failed", "timed out") if s in statuses), "ok")
        return Done(worst, time.perf_counter() - start, summary)


def main(argv: list[str] | None = None) -> int:
    parser = result_file.parser("benchmarks.suite", __doc__)
    help = f"run only these stages: {', '.join(SHARES)} [all]"
    parser.add_argument("--only", nargs="+", choices=list(SHARES), metavar="STAGE", help=help)
    help = "time limit for all stages together, in minutes [40]"
    parser.add_argument("--minutes", type=float, default=40, help=help)
    help = "text for stage 'runs' [War and Peace; without a network, python-docs]"
    parser.add_argument("--data", metavar="TEXT", help=help)
    result_file.add_options(parser.add_argument, name="-gpu")
    args = parser.parse_args(argv)
    # A shell lets its background jobs ignore interrupts; the stages must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    suite = Suite(args)
    stages = [name for name in SHARES if args.only is None or name in args.only]
    end = time.perf_counter() + 60 * args.minutes
    print(f"on {devices.describe(suite.device)}; results go to {suite.file}", flush=True)
    table: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(stages):
        left = end - time.perf_counter() - GRACE
        share = left * SHARES[name] / sum(SHARES[later] for later in stages[i:])
        limit = min(left, max(LEAST, share))
        print(f"\n== {name}, {max(0, limit):.0f} s at most", flush=True)
        done = Done("timed out", summary="no time was left")
        try:
            if limit > 1:
                done = suite.stage(name, limit)
        except Exception as e:  # the next stage runs in any case
            done = Done("failed", summary=f"{type(e).__name__}: {e}"[:200])
        table[name] = dict(status=done.status, seconds=round(done.seconds, 1), says=done.summary)
        result_file.save(suite.file, "stages", suite.saved().get("stages", {}) | table)
    print(f"\n{'stage':9} {'':9} {'seconds':>7}")
    for name, row in table.items():
        print(f"{name:9} {row['status']:9} {row['seconds']:7.1f}  {row['says']}")
    print(f"results: {suite.file}\noutput:  {suite.log}")
    return 0 if all(row["status"] in ("ok", "skipped") for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
