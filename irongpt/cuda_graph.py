"""
A function on fixed tensors as one CUDA graph, whose kernels the host launches with one call.

The iron model's step is about a hundred kernels of microseconds each, and the host needs longer to
launch one than a fast GPU to run it. A graph reads and writes the addresses of its capture, so the
step takes its inputs from tensors that the host fills in place, and its result, if it has one, is
copied before the next replay overwrites it.

Source      PyTorch, "CUDA Graphs", whole-network capture
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, None)
WARMUP = 3  # real steps in which kernels are compiled and libraries allocate workspaces


class Graph(Generic[Result]):
    """Calls `step`, which takes no arguments, and replays a graph of it after `warmup` calls.

    Captured or not, the results are the same, to the bit: the same kernels run on the same values.
    """

    def __init__(
        self, step: Callable[[], Result], device: torch.device, warmup: int = WARMUP
    ) -> None:
        """device: a GPU. No part of the step may synchronize with the host."""
        self.step: Callable[[], Result] = step
        self.device, self.warmup = device, warmup
        self.calls = 0
        self.stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Result:
        self.calls += 1
        if self.calls <= self.warmup:
            return self._run_on_side_stream()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        result: Any = None if self.result is None else self.result.clone()
        return result

    def _run_on_side_stream(self) -> Result:
        """PyTorch requires another stream than the caller's for warmup before a capture."""
        self.stream = self.stream or torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.step()
        current.wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        """Records the step without running it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self.result = self.step()
        self.graph = graph
