"""
A function on fixed tensors as one CUDA graph: the host launches its kernels at once.

The iron model's step is some hundred kernels of microseconds each, and a host needs longer to
launch one than a fast GPU to run it. A graph has them launched beforehand. What it reads and writes
stays where it was at the capture, so the step takes its inputs from tensors that the host fills in
place, and its result, if it has one, is copied out before the next replay overwrites it.

Source      PyTorch, "CUDA Graphs", whole-network capture
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", Tensor, None)
WARMUP = 3  # real steps, by which time libraries have their workspaces and kernels are compiled


class Graph(Generic[Result]):
    """Calls `step`, which takes no arguments, and after `warmup` calls replays a graph of it.

    Captured or not, the results are the same, to the bit: the same kernels run on the same values.
    """

    def __init__(
        self, step: Callable[[], Result], device: torch.device, warmup: int = WARMUP
    ) -> None:
        """device: a GPU, on which all of the step happens, without a look at it by the host."""
        self.step: Callable[[], Result] = step
        self.device, self.warmup = device, warmup
        self.calls = 0
        self.stream: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Result:
        self.calls += 1
        if self.calls <= self.warmup:
            return self._aside()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self._taken()

    def _taken(self) -> Any:
        """The result, as the next replay will not change it."""
        return None if self.result is None else self.result.clone()

    def _aside(self) -> Result:
        """On another stream than the caller's, as PyTorch asks of what is captured later."""
        self.stream = self.stream or torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.step()
        current.wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        """Records the step, which does not run by that."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self.result = self.step()
        self.graph = graph
