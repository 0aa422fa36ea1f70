"""The training step as a CUDA graph would replay it, by a stand-in that runs on a CPU."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, Cli
from irongpt_kernels import eager
from test_trainer import CPU, assert_same_params, train, trainer

from irongpt.cuda_graph import WARMUP, Graph
from irongpt.training.trainer import Trainer


class Double(Graph):
    """A graph without a GPU: the result stays at one address, and replays do not see t.step."""

    def __init__(self, t: Trainer) -> None:
        super().__init__(t._run_step, CPU)
        self.trainer = t
        self.replays = 0

    def _run_on_side_stream(self) -> torch.Tensor:
        return self.step()

    def _capture(self) -> None:
        self.result = torch.full((3,), float("nan"))
        self.graph = SimpleNamespace(replay=self._replay)

    def _replay(self) -> None:
        self.replays += 1
        step, self.trainer.step = self.trainer.step, None
        self.result.copy_(self.step())
        self.trainer.step = step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_replays_are_the_steps_bitwise(dtype: torch.dtype, optimizer: str) -> None:
    options = dict(
        ops=eager, dtype=dtype, dropout=0.2, optimizer=optimizer, grad_accum=2, decay="cosine"
    )
    plain, graphed = trainer(**options), trainer(**options)
    graphed.run_step = Double(graphed)
    rows = train(plain, WARMUP + 6), train(graphed, WARMUP + 6)
    assert graphed.run_step.replays == 6
    assert torch.equal(*rows)
    assert_same_params(plain, graphed)


def test_a_resumed_run_captures_its_own_graph() -> None:
    options = dict(ops=eager, dropout=0.2)
    plain, graphed = trainer(**options), trainer(**options)
    wanted = train(plain, 12)
    train(graphed, 5)
    resumed = trainer(**options)
    resumed.model.load_state_dict(graphed.model.state_dict())
    resumed.restore(5, graphed.optimizer_tensors())
    resumed.run_step = Double(resumed)
    assert torch.equal(train(resumed, 7), wanted[5:])


def test_an_overflow_in_a_replay_changes_nothing_but_the_scale() -> None:
    t = trainer(dtype=torch.float16)
    t.run_step = Double(t)
    train(t, WARMUP + 1)
    before = [p.detach().clone() for p in t.model.parameters()]
    t.scaler.scale.fill_(2.0**24)
    row = t.train_step()
    assert not row[1].isfinite()
    assert all(map(torch.equal, before, t.model.parameters()))
    assert t.scaler.scale == 2.0**23
    train(t, 20)
    assert not any(map(torch.equal, before, t.model.parameters()))


def test_the_flag_is_in_the_runs_config_and_may_change(cli: Cli, tmp_path: Path) -> None:
    for name in ("safetensors", "matplotlib", "tqdm"):  # a run needs them, a step does not
        pytest.importorskip(name)

    def graph() -> bool:
        return json.loads((tmp_path / "run" / "config.json").read_text())["train"]["graph"]

    assert cli("train", *TINY, "--iters", "2", "--out", "run", "--no-graph").code == 0
    assert graph() is False
    assert cli("train", "--resume", "run", "--iters", "3").code == 0
    assert graph() is False
    assert cli("train", *TINY, "--iters", "2", "--out", "other").code == 0
    assert cli("train", "--resume", "other", "--iters", "3", "--no-graph").code == 0


def test_a_cpu_has_no_graph() -> None:
    assert not isinstance(trainer().run_step, Graph)
