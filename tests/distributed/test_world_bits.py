"""Several processes compute the bits of one that loops over the shards. gloo, on the CPU."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from irongpt_kernels import Ops, builtin, eager, fused
from model_helpers import CONFIG
from processes import launch

from irongpt.config import TrainConfig
from irongpt.errors import UserError
from irongpt.model import GPT
from irongpt.training import shards
from irongpt.training.distributed import Torchrun, World
from irongpt.training.muon import Muon
from irongpt.training.trainer import Trainer

CPU = torch.device("cpu")
RECIPE = TrainConfig(
    iters=9, batch_size=4, lr=1e-2, warmup=2, decay="constant", weight_decay=0.1, eval_every=9
)
TINY = replace(CONFIG, context=8, n_layer=2)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# ops, optimizer, dtype, dropout, grad_accum, shards
CASES: dict[str, tuple[Ops, str, torch.dtype, float, int, int]] = {
    "eager adamw float32": (eager, "adamw", F32, 0.2, 1, 2),
    "eager adamw float16": (eager, "adamw", F16, 0.2, 1, 2),
    "eager muon float32": (eager, "muon", F32, 0.2, 1, 2),
    "eager muon bfloat16": (eager, "muon", BF16, 0.2, 1, 2),
    "builtin adamw float32": (builtin, "adamw", F32, 0.0, 1, 2),
    "builtin adamw bfloat16": (builtin, "adamw", BF16, 0.0, 1, 2),
    "builtin muon float32": (builtin, "muon", F32, 0.0, 1, 2),
    "builtin muon float16": (builtin, "muon", F16, 0.0, 1, 2),
    "accumulated, 4 shards": (eager, "muon", F16, 0.2, 2, 4),
    "fused muon float16": (fused, "muon", F16, 0.2, 1, 2),
}
OF_FOUR = "accumulated, 4 shards"
WAYS = {
    "gathered": list(CASES),
    "by parts": [
        name for name in CASES if "fused" not in name
    ],  # each process sums a part of the gradients
    "replicated": [
        name for name in CASES if "builtin muon" in name
    ],  # all compute Muon's iteration
}


class Bad(Trainer):
    """The loss of the second shard is infinite in the second step."""

    def _loss(self, i: int, scale: torch.Tensor) -> torch.Tensor:
        loss = super()._loss(i, scale)
        hit = self.step == 1 and self.world.own_range(2)[i] == 1
        return loss * float("inf") if hit else loss


def train(case: str, world: World | None, kind: type[Trainer] = Trainer) -> dict[str, Any]:
    """The losses, norms and scales of three steps, and the state after them."""
    ops, optimizer, dtype, dropout, n, shards = CASES[case]
    torch.manual_seed(1)
    ids = torch.arange(400) ** 2 // 5 % CONFIG.vocab_size
    slow = ops is fused  # in Triton's interpreter
    model = GPT(replace(TINY, n_layer=1 if slow else 2, dropout=dropout), ops)
    recipe = replace(RECIPE, optimizer=optimizer, grad_accum=n, shards=shards)
    trainer = kind(model, ids, recipe, CPU, dtype, world)
    rows = [trainer.train_step() for _ in range(1 if slow else 3)]
    losses = [] if slow else [trainer.evaluate(), trainer.evaluate_all()]
    return dict(
        rows=torch.stack(rows),
        val=torch.tensor(losses),
        **trainer.optimizer_tensors(),
        **model.state_dict(),
    )


def results(world: World | None, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    from interpreter_matmul import repeatable

    with repeatable():
        return {name: train(name, world) for name in names}


def compute(rank: int, folder: Path) -> None:
    """The results of one start of two processes, or of four."""
    world = Torchrun()
    if world.size == 4:
        names = [OF_FOUR]
        found: dict[str, Any] = {"gathered": results(world, names)}
    else:
        names = WAYS["by parts"]
        found = {"gathered": results(world, WAYS["gathered"])}
        found["overflow"] = train("eager adamw float16", world, Bad)
        with patch.object(Muon, "_worth_sharing", lambda *_: False):
            found["replicated"] = results(world, WAYS["replicated"])
        for facts in (
            {"text": "ab"[rank]},
            {"version of irongpt": rank},
            {"--iters": 5, str(rank): 1},
        ):
            try:
                world.check_equal(facts)
            except UserError as e:
                found[str(e)] = True
        found["all"] = [world.all_true(True), world.all_true(rank == 0), world.all_true(False)]
    shards.REDUCE_SCATTER_FROM = 2  # as a large world
    found["by parts"] = results(world, names)
    torch.save(found, folder / f"{rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return results(None, CASES)


def run(size: int, folder: Path) -> list[dict[str, Any]]:
    assert launch(size, compute, folder) == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict[str, Any]]:
    return run(4, tmp_path_factory.mktemp("four"))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares all but rng.cpu, which differs between processes."""
    assert found.keys() == wanted.keys()
    unequal = [
        k for k, t in wanted.items() if not t.nan_to_num(-1.0).equal(found[k].nan_to_num(-1.0))
    ]
    assert [k for k in unequal if k != "rng.cpu"] == []


@pytest.mark.parametrize(("how", "case"), [(how, case) for how in WAYS for case in WAYS[how]])
def test_two_processes_have_the_bits_of_one(how: str, case: str, alone, two) -> None:
    for found in two:
        assert_same(found[how][case], alone[case])


@pytest.mark.parametrize("how", ["gathered", "by parts"])
def test_four_processes_have_the_bits_of_one(how: str, alone, four) -> None:
    for found in four:
        assert_same(found[how][OF_FOUR], alone[OF_FOUR])


def test_an_overflow_in_one_process_skips_the_step_in_both(two) -> None:
    case = "eager adamw float16"
    wanted = train(case, None, Bad)
    for found in two:
        assert_same(found["overflow"], wanted)
    _, norms, scales, _ = wanted["rows"].T
    assert norms.isfinite().tolist() == [True, False, True]
    assert scales.tolist() == [65536.0, 65536.0, 32768.0]
    assert {int(t) for k, t in wanted.items() if k.startswith("step.")} == {2}


@pytest.mark.parametrize(
    "line", ["text: a and b", "version of irongpt: 0 and 1", "0: 1 and not given"]
)
def test_what_the_processes_must_share_is_named_in_all(line: str, two) -> None:
    message = f"processes 0 and 1 differ in {line}; use the same for all"
    assert all(message in found for found in two)


def test_all_is_true_where_it_is_true_in_every_process(two) -> None:
    assert [found["all"] for found in two] == [[True, False, False]] * 2
