"""Several processes train to the bits of one that loops over the shards. gloo, on the CPU."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import Cli, make_quick, write_text
from irongpt_kernels import Ops, builtin, eager, fused
from model_helpers import CONFIG
from run_helpers import state

from irongpt.cli import main
from irongpt.config import PRESETS, TrainConfig
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


def launch(
    size: int,
    task: Callable[..., None],
    *args: Any,
    kill: Callable[[list[Any]], None] | None = None,
) -> list[Any]:
    """Starts the task in so many processes, as torchrun would: the store is the parent's.

    kill: gets their ids. Returns their exit codes.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [
        SERVER.Process(target=worker, args=(rank, size, store.port, task, args))
        for rank in range(size)
    ]
    for process in made:
        process.start()
    if kill is not None:
        kill([process.pid for process in made])
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
    world = Torchrun()
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


FLAGS = (
    "--preset nano --n-layer 2 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --iters 24 "
    "--eval-every 8 --warmup 2 --lr 0.01 --device cpu --data text.txt --out run"
).split()


def command(rank: int, folder: Path, args: list[str]) -> None:
    """`irongpt`, whose output goes to a file for each process."""
    os.chdir(folder)
    make_quick(pytest.MonkeyPatch())
    PRESETS["nano"].train["sample_tokens"] = 4
    with open(f"{rank}.txt", "a") as file:
        sys.stdout = sys.stderr = file
        code = main(args)
    os._exit(code)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt")
    return tmp_path


def shown(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.txt").read_text()


def wait_for(folder: Path, records: int) -> None:
    """Until the run has so many lines of metrics."""
    metrics, end = folder / "run/metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= records:
            return
        time.sleep(0.01)


def test_a_run_in_two_one_and_two_processes_is_the_run_of_one(folder: Path, cli: Cli) -> None:
    """It is stopped by a signal to the process that does not write, and goes on in other worlds."""
    flags = ["train", *FLAGS, "--optimizer", "muon", "--decay", "constant", "--dropout", "0.1"]
    flags += ["--ops", "eager", "--iters"]

    def stop(ids: list[Any]) -> None:
        wait_for(folder, 1)
        os.kill(ids[1], signal.SIGTERM)

    codes = launch(2, command, folder, [*flags, "4000"], kill=stop)
    assert codes == [128 + signal.SIGTERM] * 2
    assert "saved; continue" in shown(folder, 0)
    assert shown(folder, 1) == ""
    PRESETS["nano"].train["sample_tokens"] = 4
    at, more = state(folder / "run")["step"], ["train", "--resume", "run", "--iters"]
    assert cli(*more, at + 9).code == 0
    assert launch(2, command, folder, [*more, str(at + 20)]) == [0, 0]
    os.rename("run", "several")
    for length in (at, at + 9, at + 20):  # the last step of a run is evaluated
        given = [*flags, length, "--shards", 2] if length == at else [*more, length]
        assert cli(*given).code == 0
    ours, theirs = (
        json.loads(Path(f"{r}/last/state.json").read_text()) for r in ("several", "run")
    )
    assert ours["step"] == theirs["step"] == at + 20
    for file in ("model.safetensors", "optimizer.safetensors"):
        x, y = (safetensors.torch.load_file(f"{r}/last/{file}") for r in ("several", "run"))
        assert [k for k in x if not x[k].equal(y[k]) and k != "rng.cpu"] == []
    ours, theirs = (json.loads(Path(f"{r}/result.json").read_text()) for r in ("several", "run"))
    assert ours == theirs


def test_a_killed_process_ends_the_other_which_names_it(folder: Path) -> None:
    def kill(ids: list[Any]) -> None:
        wait_for(folder, 1)
        os.kill(ids[1], signal.SIGKILL)

    codes = launch(2, command, folder, ["train", *FLAGS, "--iters", "100000"], kill=kill)
    assert codes == [1, -signal.SIGKILL]
    line = "irongpt: error: process 1 of 2 has died: the others end; continue with --resume"
    assert shown(folder, 0).splitlines()[-1] == line


@pytest.mark.parametrize(
    ("size", "flags", "message"),
    [
        (2, ["--shards", "1"], "2 processes cannot share 1 shards evenly"),
        (3, [], "--batch-size (4) must be divisible by --shards (3)"),
        (2, ["--data", "-"], "several processes cannot read standard input"),
    ],
)
def test_a_wrong_world_is_one_line(folder: Path, size: int, flags: list[str], message: str) -> None:
    assert set(launch(size, command, folder, ["train", *FLAGS, *flags])) <= {1, 2}
    (line,) = "".join(shown(folder, rank) for rank in range(size)).splitlines()
    assert line.startswith("irongpt: error: ")
    assert message in line
    assert not (folder / "run").exists()
