"""The CUDA graph of a step is destroyed before the processes part, on every way out.

NCCL waits for a graph that holds an exchange when its group is destroyed. Stand-ins take the place
of the graph and of the other process.
"""

import gc
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from cpu_graph import CpuGraph

from irongpt.cuda_graph import WARMUP
from irongpt.errors import DivergenceError
from irongpt.training import distributed
from irongpt.training.distributed import Torchrun, World
from irongpt.training.loop import TrainingLoop
from irongpt.training.trainer import Trainer


class Recorded(World):
    """Notes in `events` what happens between the processes. agrees: their captures succeed too."""

    def __init__(self, agrees: bool = True) -> None:
        self.events: list[str] = []
        self.agrees = agrees

    def all_gather(self, rows: torch.Tensor) -> None:
        self.events.append("exchange")

    def all_true(self, value: bool) -> bool:
        return value and self.agrees

    def close(self) -> None:
        self.events.append("destroy_process_group")

    def fail(self, code: int) -> bool:
        self.events.append("the others end")
        return True


WAYS = {  # exit code, and the last events
    "end": (0, ["the graph is gone", "destroy_process_group"]),
    "signal": (128 + signal.SIGTERM, ["the graph is gone", "destroy_process_group"]),
    "divergence": (1, ["the graph is gone", "the others end"]),
    "exception": (None, ["the graph is gone", "the others end"]),
    "interrupt": (130, ["the graph is gone", "the others end"]),
    "broken capture": (0, ["exchange", "destroy_process_group"]),
    "broken capture elsewhere": (0, ["exchange", "destroy_process_group"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_gone_before_the_processes_part(way: str, cli, monkeypatch) -> None:
    world = Recorded(agrees=way != "broken capture elsewhere")
    monkeypatch.setattr(distributed, "join", lambda: world)
    fit, fill = TrainingLoop.fit, Trainer._fill_inputs

    def captured(self: TrainingLoop) -> int | None:
        error = RuntimeError("not permitted") if way == "broken capture" else None
        step = self.trainer._run_step
        self.trainer.run_step = CpuGraph(step, "step", error, world.events, agree=world.all_true)
        return fit(self)

    def filled(self: Trainer) -> None:
        if self.step == WARMUP + 2:
            if way == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            known = {"divergence": DivergenceError, "exception": ValueError}
            if error := (known | {"interrupt": KeyboardInterrupt}).get(way):
                raise error("injected")
        fill(self)

    monkeypatch.setattr(TrainingLoop, "fit", captured)
    monkeypatch.setattr(Trainer, "_fill_inputs", filled)
    code, last = WAYS[way]
    flags = ["train", *TINY, "--shards", "2", "--iters", "12", "--eval-every", "12", "--out", "run"]
    if code is None:
        with pytest.raises(ValueError, match="injected"):
            cli(*flags)
    else:
        cli(*flags, code=code)
    assert world.events[-2:] == last
    assert world.events[: WARMUP + 1] == ["exchange"] * WARMUP + ["capture"]
    if way == "broken capture elsewhere":  # this one's is destroyed at once
        assert world.events[WARMUP + 1] == "the graph is gone"


def test_a_world_parts_after_all_are_done(monkeypatch) -> None:
    """What `close` does: garbage, which may hold a graph, then the others, then the group."""
    events: list[str] = []
    world = Torchrun.__new__(Torchrun)
    monkeypatch.setattr(gc, "collect", lambda: events.append("collect"))
    monkeypatch.setattr(world, "gather", lambda value: events.append("wait"))
    monkeypatch.setattr(world, "_leave", lambda last: events.append(last))
    world.dist = SimpleNamespace(destroy_process_group=lambda: events.append("destroy"))
    world.close()
    assert events == ["collect", "wait", "ended", "destroy"]
