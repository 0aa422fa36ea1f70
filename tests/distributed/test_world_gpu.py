"""Training with NCCL, whose exchange is in the CUDA graph of the step. Needs one or two GPUs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_text
from irongpt_kernels import fused
from model_helpers import CONFIG
from processes import FLAGS, TERM, command, launch, shown

from irongpt import device as devices
from irongpt.config import TrainConfig
from irongpt.cuda_graph import WARMUP, Graph
from irongpt.model import GPT
from irongpt.training import shards
from irongpt.training.distributed import Torchrun, World
from irongpt.training.trainer import Trainer

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RECIPE = TrainConfig(
    iters=9, batch_size=4, lr=1e-2, warmup=2, decay="constant", weight_decay=0.1, eval_every=9
)
STEPS = WARMUP + 4  # the last four replay the graph


def train(world: World, optimizer: str, graph: bool) -> dict[str, Any]:
    """The losses and norms of some steps with two shards, and the state after them."""
    device = torch.device("cuda", torch.cuda.current_device())
    devices.make_deterministic()
    torch.manual_seed(1)
    ids = torch.arange(400) ** 2 // 5 % CONFIG.vocab_size
    model = GPT(replace(CONFIG, dropout=0.2), fused).to(device)
    recipe = replace(RECIPE, optimizer=optimizer, shards=2, graph=graph)
    dtype = devices.precision("auto", device).dtype
    trainer = Trainer(model, ids, recipe, device, dtype, world)
    rows = torch.stack([trainer.train_step() for _ in range(STEPS)])
    assert isinstance(trainer.run_step, Graph) == graph
    if graph:
        assert trainer.run_step.graph is not None, "the exchange could not be captured"
    trainer.close()
    tensors = {"rows": rows, **trainer.optimizer_tensors(), **model.state_dict()}
    return {name: t.cpu() for name, t in tensors.items() if not name.startswith("rng.")}


def compute(rank: int, folder: Path) -> None:
    world = Torchrun()
    found = [
        train(world, optimizer, graph) for optimizer in ("adamw", "muon") for graph in (True, False)
    ]
    shards.REDUCE_SCATTER_FROM = 1  # as a large world
    found.append(train(world, "muon", True))
    torch.save(found, folder / f"{rank}.pt")
    world.close()  # with NCCL it would not return while a graph lives


def alone(rank: int, folder: Path) -> None:
    """Without NCCL, in a separate process: this one keeps its GPU for the other tests."""
    found = [train(World(), optimizer, False) for optimizer in ("adamw", "muon")]
    torch.save(found, folder / "alone.pt")


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=two_gpus)])
def test_a_world_with_nccl_trains_in_a_graph_to_the_bits_of_one(size: int, tmp_path) -> None:
    assert launch(size, compute, tmp_path) == [0] * size
    assert launch(1, alone, tmp_path) == [0]
    adamw, muon = torch.load(tmp_path / "alone.pt")
    wanted = [adamw, adamw, muon, muon, muon]
    for rank in range(size):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), wanted, strict=True):
            assert [k for k, t in expected.items() if not t.equal(found[k])] == []


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=two_gpus)])
def test_a_run_with_nccl_stops_at_a_signal_and_resumes_to_the_same_bits(
    size: int, tmp_path
) -> None:
    from run_helpers import assert_same  # needs safetensors

    flags = ["train", *FLAGS, *"--n-embd 32 --ops fused --device cuda --shards 2".split()]
    for name, signals in (("a", None), ("b", {size - 1: (9, TERM)})):
        folder = tmp_path / name
        folder.mkdir()
        write_text(folder / "text.txt")
        codes = launch(size, command, folder, flags, signals)
        assert codes == [128 + TERM if signals else 0] * size, shown(folder, 0)
    assert launch(size, command, tmp_path / "b", ["train", "--resume", "run"]) == [0] * size
    assert_same(tmp_path / "a/run", tmp_path / "b/run")
