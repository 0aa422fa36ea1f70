"""A stand-in for a CUDA graph of the training step, on a CPU."""

from types import SimpleNamespace

import torch

from irongpt.cuda_graph import Graph
from irongpt.training.trainer import Trainer


class CpuGraph(Graph):
    """The result stays at one address, and replays do not see the trainer's step.

    error: what the capture raises. events: gets a word for each capture, replay and end.
    """

    def __init__(
        self, trainer: Trainer, error: Exception | None = None, events: list[str] | None = None
    ) -> None:
        super().__init__(trainer._run_step, torch.device("cpu"), agree=trainer.world.all_true)
        self.trainer, self.error = trainer, error
        self.events = [] if events is None else events

    def _run_on_side_stream(self) -> torch.Tensor:
        return self.step()

    def _capture(self) -> None:
        self.events.append("capture")
        if self.error:
            raise self.error
        self.result = torch.full((3 if self.trainer.shards is None else 4,), float("nan"))
        gone = lambda: self.events.append("the graph is gone")  # noqa: E731
        self.graph = SimpleNamespace(replay=self._replay, reset=gone)

    def _replay(self) -> None:
        self.events.append("replay")
        step, self.trainer.step = self.trainer.step, None
        self.result.copy_(self.step())
        self.trainer.step = step
