"""`irongpt tune`: which options it measures and keeps, with a clock that the test sets."""

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_mistake
from fake_gpu import reset_launch_tables  # noqa: F401
from irongpt_kernels import eager, fused
from irongpt_kernels.aot import tiles
from irongpt_kernels.runtime import emulate, launch, launch_table
from numerics import DEVICE

from irongpt import launch_cache as cache
from irongpt import timing, tuning
from irongpt.config import GPTConfig
from irongpt.errors import UserError
from irongpt.tuning import FUNCTIONS, Launch, Row, Work, beats

CPU = torch.device("cpu")
SMALL = GPTConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=32, context=16, dropout=0.2)
SLOW, FAST = 10e-6, 5e-6
Options = launch_table.Options


def work(kernel: str = "gelu forward", device: torch.device = CPU) -> Work:
    return Work(kernel, SMALL, 2, torch.float32, device)


FOUND = [dict(BLOCK_M=M, BLOCK_N=16, num_warps=1) for M in (1, 2, 4)]


def in_use() -> Options | None:
    return next(iter(launch_table._tables[CPU].values()), None)


def by_tile(default: float, **costs: float) -> Callable[[Options | None, int], float]:
    """Seconds by BLOCK_M; `other` for the rest."""
    return lambda o, i: default if o is None else costs.get(f"M{o['BLOCK_M']}", costs["other"])


Measured = Callable[..., list[Row]]


@pytest.fixture
def measured(monkeypatch) -> Measured:
    """Measures candidates. costs(options, sample) gives the seconds, to which noise is added. The
    op is eager's, which launches no kernel, unless another is given."""

    def rows(
        costs: Callable[[Options | None, int], float],
        spills: Callable[[Options | None], int] = lambda options: 0,
        gelu: Any = eager.gelu,
    ) -> list[Row]:
        samples = itertools.count(1)

        def record(work: Work, module: Any, inputs: Any) -> Launch:
            work.run(module, inputs)
            options = in_use()
            return Launch(lambda: options, spills(options), 100)

        def measure(calls: Any, sets: int, device: Any, rounds: int) -> dict[str, Any]:
            assert sets == 2
            found: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    options, sample = call(0), next(samples)
                    assert call(1) == options
                    found[name].append(costs(options, sample) + 1e-9 * (sample % 3))
            return {name: timing.Timing(samples, False) for name, samples in found.items()}

        monkeypatch.setattr(tuning, "record", record)
        monkeypatch.setattr(timing, "measure", measure)
        monkeypatch.setattr(timing, "copies", lambda touched, device: 2)
        found = tuning.measure(work(), SimpleNamespace(gelu=gelu), FOUND, rounds=6)
        assert launch_table.digest(CPU) == ""  # the default is in use again
        return found

    return rows


def test_the_fastest_is_kept(measured) -> None:
    rows = measured(by_tile(SLOW, M1=SLOW, M2=FAST, M4=7e-6, other=0))
    assert tuning.winner(rows).options == FOUND[1]
    lines = tuning.table(work(), rows).splitlines()
    assert lines[0] == "gelu forward, columns 128: us, relative to the default"
    assert lines[1].split() == "BLOCK_M 2, BLOCK_N 16, num_warps 1 5.00 0.50 saved".split()
    assert "default" in lines[4] or "default" in lines[3]
    assert [e["options"] for e in tuning.updated([], work(), rows)] == [FOUND[1]]


@pytest.mark.parametrize("gain", [0.0, 0.01])
def test_a_small_gain_is_not_kept(measured, gain: float) -> None:
    rows = measured(by_tile(SLOW, other=SLOW * (1 - gain)))
    assert tuning.winner(rows) is None
    assert "saved" not in tuning.table(work(), rows)


def test_luck_in_the_first_round_is_not_enough(measured) -> None:
    rows = measured(lambda o, i: FAST if o == FOUND[0] and i <= 6 * 4 else SLOW)
    assert tuning.winner(rows) is None
    assert statistics.median(rows[1].samples) == pytest.approx(SLOW, rel=1e-3)


def test_noise_hides_a_gain() -> None:
    assert beats((5.0,) * 8, (6.0,) * 8)
    assert not beats((6.0,) * 8, (5.0,) * 8)
    assert not beats((5.95,) * 8, (6.0,) * 8)
    assert not beats((1, 9, 5, 9, 1, 5, 5, 9), (2, 9, 6, 9, 1, 6, 6, 9))


def test_a_candidate_that_spills_is_rejected_but_not_the_default(measured) -> None:
    rows = measured(by_tile(SLOW, other=FAST), lambda o: 8 if o in (None, FOUND[1]) else 0)
    assert [row.rejected for row in rows] == ["", "", "spills 8 bytes", ""]
    assert "spills 8 bytes" in tuning.table(work(), rows).splitlines()[-1]


def test_a_candidate_that_is_wrong_or_cannot_run_is_rejected(measured) -> None:
    def gelu(x: torch.Tensor) -> torch.Tensor:
        if in_use() == FOUND[0]:
            raise ValueError("out of\nresources")
        return eager.gelu(x) * (1.01 if in_use() == FOUND[1] else 1)

    rows = measured(by_tile(SLOW, other=FAST), gelu=gelu)
    outs = ["", "ValueError: out of resources", "exceeds tolerance in out, d x", ""]
    assert [row.rejected for row in rows] == outs
    assert tuning.winner(rows).options == FOUND[2]
    assert [len(row.samples) > 0 for row in rows] == [True, False, False, True]


def test_the_default_has_to_run(measured) -> None:
    with pytest.raises(UserError, match="gelu forward with the default tiles: RuntimeError: no"):
        measured(by_tile(1.0, other=1.0), gelu=Mock(side_effect=RuntimeError("no")))


def test_entries_of_other_kernels_stay(measured) -> None:
    other = dict(kernel="gelu forward", size=512, itemsize=2, options=FOUND[0])
    old = dict(kernel="gelu forward", size=128, itemsize=4, options=FOUND[0])
    assert tuning.updated([other, old], work(), measured(by_tile(SLOW, other=SLOW))) == [other]
    found = tuning.updated([other, old], work(), measured(by_tile(SLOW, other=FAST)))
    assert found[0] == other
    assert found[1]["default_us"] == pytest.approx(10, abs=0.1)
    assert launch_table.table_of(found)[work().key] == found[1]["options"]


@pytest.mark.parametrize("kernel", [k for k in FUNCTIONS if k not in launch_table.HEADS[1:]])
def test_each_op_launches_the_kernel_that_is_timed(kernel: str) -> None:
    """And the accuracy check passes."""
    assert work(kernel, torch.device(DEVICE)).wrong(fused) == []
    module, name = FUNCTIONS[kernel][1].split(".")
    assert hasattr(sys.modules[f"irongpt_kernels.fused.{module}"], name)


@pytest.mark.parametrize(
    ("context", "width", "backward"),
    [
        (64, 32, ["attention head 64"]),
        (100, 32, ["attention head 128"]),
        (256, 64, ["attention head 256"]),
        (256, 32, ["attention query", "attention key"]),
    ],
)
def test_of_the_backwards_of_attention_that_of_the_context_is_measured(
    h200, monkeypatch, context: int, width: int, backward: list[str]
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    model = replace(SMALL, n_embd=2 * width, context=context)
    works = [Work(k, model, 2, torch.bfloat16, torch.device("cuda", 0)) for k in FUNCTIONS]
    launched = [work.kernel for work in works if work.launched]
    assert launched == ["attention forward", *backward, *list(FUNCTIONS)[-4:]]
    heads = [work for work in works if work.kernel in launch_table.HEADS]
    assert [work.key for work in heads if work.launched] == [
        (kernel, width, 2) for kernel in backward if kernel in launch_table.HEADS
    ]


def test_the_command_measures_prints_and_keeps(h200, cli, monkeypatch) -> None:
    best = tiles.launches(("norm backward", 384, 2), 90)[3]

    def measure(work: Work, module: Any, found: list, rounds: int) -> list[Row]:
        assert rounds == tuning.QUICK_ROUNDS
        fast = work.kernel == "norm backward"
        return [Row(o, (FAST if fast and o == best else SLOW,) * 6) for o in [None, *found]]

    monkeypatch.setattr(tuning, "measure", measure)
    result = cli("tune", "--quick")
    assert result.err == ""
    assert "tuning for iron, 64 sequences in bfloat16, on NVIDIA H200" in result.out
    assert [x for x in result.out.splitlines() if x.endswith("saved")] != []
    cache.load.cache_clear()
    (entry,) = cache.load(torch.device("cuda", 0)).entries
    assert (entry["kernel"], entry["size"], entry["options"]) == ("norm backward", 384, best)
    monkeypatch.setattr(tuning, "winner", lambda rows: None)
    result = cli("tune", "--quick")
    assert "nothing is saved" in result.out
    assert not cache.path(torch.device("cuda", 0)).exists()


def test_mistakes(h200, cli, monkeypatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert_mistake(cli, "IRONGPT_TUNED=off is set", "tune")
    monkeypatch.setenv(emulate.VARIABLE, "sm_75")
    assert_mistake(cli, "IRONGPT_EMULATE is set", "tune")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_mistake(cli, "irongpt tune needs an NVIDIA GPU", "tune")


@pytest.mark.gpu
def test_one_kernel_for_real() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    real = Work("norm forward", SMALL, 8, torch.float16, device)
    found = tuning.candidates(real, quick=True)
    rows = tuning.measure(real, fused, found, tuning.QUICK_ROUNDS)
    assert len(rows) == len(found) + 1
    assert all(0 < row.median < 1e-2 for row in rows if row.samples)
    assert rows[tuning.DEFAULT].samples
    assert any(row.samples for row in rows[1:]), [row.rejected for row in rows]
    assert launch_table.digest(device) == ""
