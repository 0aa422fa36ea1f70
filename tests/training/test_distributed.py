"""Several processes train to the bits of one that loops over the shards. gloo, on the CPU."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from irongpt_kernels import Ops, builtin, eager, fused
from model_helpers import CONFIG

from irongpt.config import TrainConfig
from irongpt.model import GPT
from irongpt.training import distributed
from irongpt.training.distributed import Torchrun, World
from irongpt.training.trainer import Trainer

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload("irongpt.training.start irongpt.cli pytest tqdm".split())
CPU = torch.device("cpu")
RECIPE = TrainConfig(
    iters=9, batch_size=4, lr=1e-2, warmup=2, decay="constant", weight_decay=0.1, eval_every=9
)
TINY = replace(CONFIG, context=8)


def worker(rank: int, size: int, port: int, task: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    distributed.BEAT, distributed.SILENT = 0.1, 3.0
    task(rank, *args)


def launch(size: int, task: Callable[..., None], *args: Any) -> list[Any]:
    """Starts the task in so many processes, as torchrun would: the store is the parent's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [
        SERVER.Process(target=worker, args=(rank, size, store.port, task, args))
        for rank in range(size)
    ]
    for process in made:
        process.start()
    for process in made:
        process.join()
    return [process.exitcode for process in made]


def train(
    ops: Ops, recipe: TrainConfig, dtype: torch.dtype, world: World | None, dropout: float, n: int
) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.arange(400) ** 2 // 5 % CONFIG.vocab_size
    layers, interpreted = (1, True) if ops is fused else (2, False)  # the interpreter is slow
    model = GPT(replace(TINY, n_layer=layers, dropout=dropout), ops)
    trainer = Trainer(model, ids, recipe, CPU, dtype, world)
    rows = [trainer.train_step() for _ in range(n)]
    losses = [] if interpreted else [trainer.evaluate(), trainer.evaluate_all()]
    return dict(
        rows=torch.stack(rows),
        val=torch.tensor(losses),
        **trainer.optimizer_tensors(),
        **model.state_dict(),
    )


# ops, optimizer, dtype, dropout, grad_accum, shards, steps
CASES: dict[str, tuple[Ops, str, torch.dtype, float, int, int, int]] = {
    "eager": (eager, "muon", torch.float32, 0.2, 1, 2, 4),
    "eager adamw, accumulated": (eager, "adamw", torch.float16, 0.2, 2, 4, 4),
    "builtin muon": (builtin, "muon", torch.float32, 0.0, 1, 2, 4),
    "builtin bfloat16": (builtin, "adamw", torch.bfloat16, 0.0, 1, 4, 4),
    "fused float16": (fused, "muon", torch.float16, 0.2, 1, 2, 2),
    "fused adamw": (fused, "adamw", torch.float32, 0.2, 1, 2, 1),
}


def results(world: World | None, names: Iterable[str] = CASES) -> dict[str, dict[str, Any]]:
    from interpreter_matmul import repeatable

    found = {}
    with repeatable():
        for name in names:
            ops, optimizer, dtype, p, n, shards, steps = CASES[name]
            recipe = replace(RECIPE, optimizer=optimizer, grad_accum=n, shards=shards)
            found[name] = train(ops, recipe, dtype, world, p, steps)
    return found


def compute(rank: int, folder: Path) -> None:
    world = Torchrun(CPU)
    found = [results(world)]
    distributed.PARTS_FROM = 2  # as a large world
    found.append(results(world, list(CASES)[:5]))
    torch.save(found, folder / f"{rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return results(None)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What two processes compute, each: by the gathered gradients, and by parts."""
    folder = tmp_path_factory.mktemp("together")
    assert launch(2, compute, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_bits_of_one(case: str, alone, together) -> None:
    for found in (f for of_rank in together for f in of_rank if case in f):
        assert found[case].keys() == alone[case].keys()
        unequal = [k for k, t in alone[case].items() if not torch.equal(t, found[case][k])]
        assert [k for k in unequal if k != "rng.cpu"] == []
