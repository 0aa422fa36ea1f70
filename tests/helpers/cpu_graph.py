"""A stand-in for a CUDA graph, on a CPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from test_gpu import nothing_waits

from irongpt.cuda_graph import Graph


class CpuGraph(Graph):
    """The result stays at one address, and replays do not see the host's count of steps.

    step: a bound method, of an object that counts in the attribute `count`. error: what the capture
    raises. events: gets a word for each capture, replay and end.
    """

    def __init__(
        self,
        step: Callable[[], torch.Tensor | None],
        count: str,
        error: Exception | None = None,
        events: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(step, torch.device("cpu"), **options)
        self.count, self.error = count, error
        self.events = [] if events is None else events

    def _run_on_side_stream(self) -> torch.Tensor | None:
        self.last = self.step()
        return self.last

    def _capture(self) -> None:
        self.events.append("capture")
        if self.error:
            raise self.error
        self.result = None if self.last is None else torch.full_like(self.last, float("nan"))
        gone = lambda: self.events.append("the graph is gone")  # noqa: E731
        self.graph = SimpleNamespace(replay=self._replay, reset=gone)

    def _replay(self) -> None:
        self.events.append("replay")
        with patch.object(self._step().__self__, self.count, None), nothing_waits():
            found = self.step()
        if found is not None:
            self.result.copy_(found)
