"""`irongpt tune`: what it measures and what it keeps, with a clock that the test sets."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_mistake
from irongpt_kernels import fused
from irongpt_kernels.aot import tiles
from irongpt_kernels.runtime import emulate, launch_table

from irongpt import launch_cache as cache
from irongpt.config import GPTConfig
from irongpt.errors import UserError
from irongpt.tuning import command
from irongpt.tuning.timing import COPIES, Gpu, Launch, beats, in_turns
from irongpt.tuning.workload import FUNCTIONS, Gate, Work

CPU = torch.device("cpu")
SMALL = GPTConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=32, context=16, dropout=0.2)
SLOW, FAST = 10e-6, 5e-6


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    cache.load.cache_clear()
    yield
    cache.load.cache_clear()
    launch_table._tables.clear()


def work(kernel: str = "gelu forward", device: torch.device = CPU) -> Work:
    return Work(kernel, SMALL, 2, torch.float32, device)


class FakeClock:
    """The seconds of an options' launch are what `costs` says; each sample adds some noise."""

    def __init__(
        self, costs: Callable[[launch_table.Options | None, int], float], spills: Any = None
    ):
        self.costs, self.spills, self.samples = costs, spills or (lambda options: 0), 0
        self.recorded: list[launch_table.Options | None] = []

    def record(self, run: Callable[[], object], kernel: str) -> Launch:
        run()
        table = launch_table._tables[CPU]
        options = next(iter(table.values())) if table else None
        self.recorded.append(options)
        return Launch(lambda: options, self.spills(options), 100)

    def copies(self, touched: int) -> int:
        return 2

    def seconds(self, launches: list[Launch]) -> float:
        self.samples += 1
        assert len(launches) == 2
        return self.costs(launches[0].again(), self.samples) + 1e-9 * (self.samples % 3)


FOUND = [dict(BLOCK_M=M, BLOCK_N=16, num_warps=1) for M in (1, 2, 4)]


def measured(clock: FakeClock, found: list[launch_table.Options] = FOUND) -> list[command.Row]:
    rows = command.measure(work(), fused, clock, found, rounds=6)
    assert launch_table.digest(CPU) == ""  # nothing of it stays in use
    return rows


def test_the_fastest_is_kept() -> None:
    costs = {1: SLOW, 2: FAST, 4: 7e-6}
    rows = measured(FakeClock(lambda o, i: SLOW if o is None else costs[o["BLOCK_M"]]))
    assert command.winner(rows).options == FOUND[1]
    text = command.table(work(), rows)
    lines = text.splitlines()
    assert lines[0] == "gelu forward, columns 128: us, of the shipped one's"
    assert lines[1].split() == "M 2, N 16, warps 1 5.00 0.50 kept".split()
    assert "as shipped" in lines[4] or "as shipped" in lines[3]
    assert [e["options"] for e in command.updated([], work(), rows)] == [FOUND[1]]


@pytest.mark.parametrize("gain", [0.0, 0.01])
def test_what_is_hardly_faster_is_not_kept(gain: float) -> None:
    rows = measured(FakeClock(lambda o, i: SLOW if o is None else SLOW * (1 - gain)))
    assert command.winner(rows) is None
    assert "kept" not in command.table(work(), rows)


def test_luck_in_the_first_round_is_not_enough() -> None:
    def lucky(options: launch_table.Options | None, sample: int) -> float:
        return FAST if options == FOUND[0] and sample <= 6 * 4 else SLOW

    rows = measured(FakeClock(lucky))
    assert command.winner(rows) is None


def test_noise_hides_a_gain() -> None:
    assert beats([5.0] * 8, [6.0] * 8)
    assert not beats([6.0] * 8, [5.0] * 8)
    assert not beats([5.95] * 8, [6.0] * 8)
    assert not beats([1, 9, 5, 9, 1, 5, 5, 9], [2, 9, 6, 9, 1, 6, 6, 9])


def test_what_spills_is_out_but_not_what_is_shipped() -> None:
    def spills(options: launch_table.Options | None) -> int:
        return 8 if options in (None, FOUND[1]) else 0

    rows = measured(FakeClock(lambda o, i: SLOW if o is None else FAST, spills))
    assert [row.out for row in rows] == ["", "", "spills 8 bytes", ""]
    assert "spills 8 bytes" in command.table(work(), rows).splitlines()[-1]


def test_what_is_wrong_or_cannot_run_is_out(monkeypatch) -> None:
    right = fused.gelu

    def gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        options = next(iter(launch_table._tables[CPU].values()), None)
        if options == FOUND[0]:
            raise ValueError("out of\nresources")
        return right(x, bias) * (1.01 if options == FOUND[1] else 1)

    clock = FakeClock(lambda o, i: SLOW if o is None else FAST)
    rows = command.measure(work(), SimpleNamespace(gelu=gelu), clock, FOUND, 4)
    outs = ["", "ValueError: out of resources", "beyond the rule in out 0, d x", ""]
    assert [row.out for row in rows] == outs
    assert command.winner(rows).options == FOUND[2]
    assert FOUND[1] not in clock.recorded  # before it was found right it was not timed


def test_what_is_shipped_has_to_run() -> None:
    def broken(x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(UserError, match="gelu forward as it is shipped: RuntimeError: no"):
        command.measure(work(), SimpleNamespace(gelu=broken), FakeClock(lambda o, i: 1), [], 4)


def test_candidates_take_turns() -> None:
    order = []

    class Clock(FakeClock):
        def seconds(self, launches: list[Launch]) -> float:
            order.append(launches[0].again())
            return 1.0

    launches = {i: [Launch(lambda i=i: i, 0, 1)] for i in range(3)}
    in_turns(Clock(lambda o, i: 0), launches, 3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_entries_of_other_kernels_stay() -> None:
    other = dict(kernel="gelu forward", size=512, itemsize=2, options=FOUND[0])
    old = dict(kernel="gelu forward", size=128, itemsize=4, options=FOUND[0])
    slow = measured(FakeClock(lambda o, i: SLOW))
    assert command.updated([other, old], work(), slow) == [other]
    fast = measured(FakeClock(lambda o, i: SLOW if o is None else FAST))
    found = command.updated([other, old], work(), fast)
    assert found[0] == other
    assert found[1]["shipped_us"] == pytest.approx(10, abs=0.1)
    assert launch_table.table_of(found)[work().key] == found[1]["options"]


@pytest.mark.parametrize("kernel", list(FUNCTIONS))
def test_a_work_runs_the_kernel_that_it_times(kernel: str) -> None:
    """And the gate passes what is right."""
    assert Gate(work(kernel)).wrong(fused) == []
    module, name = FUNCTIONS[kernel].split(".")
    assert hasattr(__import__(f"irongpt_kernels.{module}", fromlist=[name]), name)


@pytest.fixture
def card(monkeypatch, tmp_path) -> None:
    """A GPU that is not there, with the interpreter in its place."""
    p = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=1 << 37, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: p)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("IRONGPT_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv(emulate.VARIABLE, raising=False)


def test_the_command_measures_prints_and_keeps(card, cli, monkeypatch) -> None:
    best = tiles.launches(("norm backward", 384, 2), 90)[3]

    def measure(work: Work, module: Any, clock: Gpu, found: list, rounds: int) -> list[command.Row]:
        assert (clock.calls, rounds) == (command.QUICK_CALLS, command.QUICK_ROUNDS)
        fast = work.kernel == "norm backward"
        return [
            command.Row(None, (SLOW,) * 6),
            *(command.Row(o, (FAST if fast and o == best else SLOW,) * 6) for o in found),
        ]

    monkeypatch.setattr(command, "measure", measure)
    result = cli("tune", "--quick")
    assert (result.code, result.err) == (0, "")
    assert "tuning for iron, 64 windows in bfloat16, on NVIDIA H200" in result.out
    assert [x for x in result.out.splitlines() if x.endswith("kept")] != []
    cache.load.cache_clear()
    entries = cache.load(torch.device("cuda", 0)).entries
    assert [(e["kernel"], e["size"], e["options"]) for e in entries] == [
        ("norm backward", 384, best)
    ]
    monkeypatch.setattr(command, "winner", lambda rows: None)
    result = cli("tune", "--quick")
    assert "nothing is kept" in result.out
    assert not cache.path(torch.device("cuda", 0)).exists()


def test_mistakes_on_a_gpu(card, cli, monkeypatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert_mistake(cli("tune"), "IRONGPT_TUNED=off is set")
    monkeypatch.setenv(emulate.VARIABLE, "sm_75")
    assert_mistake(cli("tune"), "IRONGPT_EMULATE is set")


def test_copies_leave_the_cache_cold(card) -> None:
    clock = Gpu(torch.device("cuda", 0), 4)
    assert clock.copies(50 << 20) == 2
    assert clock.copies(25 << 20) == 4
    assert clock.copies(1) == COPIES
    assert clock.copies(1 << 40) == 2


COMPILED = """
import torch
from irongpt_kernels import aot, shapes, tuned
cpu = torch.device("cpu")
tile = dict(BLOCK_M=2, BLOCK_N=1024, num_warps=4)
tuned.use(cpu, {("gelu forward", 1536, 2): tile})
tuned.use(cpu, tuned._tables[cpu] | {("gelu backward", 1536, 2): tile | dict(programs_per_sm=4)})
cases = [c for c in shapes.every(90) if c.shape == "N=1536 float16 no bias"]
print([row["warps"] for row in aot.report(90, cases)["kernels"]])
"""


def test_a_launch_compiles_with_measured_options(tmp_path: Path) -> None:
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[4, 4]", done.stderr[-2000:]


@pytest.mark.gpu
def test_one_kernel_for_real() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    real = Work("norm forward", SMALL, 8, torch.float16, device)
    found = command.candidates(real, quick=True)
    rows = command.measure(real, fused, Gpu(device, 4), found, command.QUICK_ROUNDS)
    assert len(rows) == len(found) + 1
    assert all(0 < row.median < 1e-2 for row in rows if row.samples)
    assert rows[command.SHIPPED].samples
    assert any(row.samples for row in rows[1:]), [row.out for row in rows]
    assert launch_table.digest(device) == ""
