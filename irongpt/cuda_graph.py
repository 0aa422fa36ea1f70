"""
A function on fixed tensors as one CUDA graph, whose kernels the host launches with one call.

A training step of the iron model launches 147 kernels with fused ops (`benchmarks.ledger`). Most of
them take microseconds on a fast GPU, less than the host needs to launch one. A graph reads and
writes the addresses of its capture, so the step takes its inputs from tensors that the host fills
in place, and its result, if it has one, is copied before the next replay overwrites it.

Source      PyTorch, "CUDA Graphs", whole-network capture
"""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from irongpt.errors import one_line, out_of_memory

WARMUP = 3  # real steps in which kernels are compiled and libraries allocate workspaces


class Graph:
    """Calls `step`, which takes no arguments, and replays a graph of it after `warmup` calls.

    Captured or not, the results are the same, to the bit: the same kernels run on the same values.
    If the capture fails, a line on standard error reports it, and the step is launched every time.
    """

    failures = 0  # captures of this process that failed

    def __init__(
        self,
        step: Callable[[], Tensor | None],
        device: torch.device,
        warmup: int = WARMUP,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """step: a bound method, to which only a weak reference is kept. Its object usually owns
        this graph. With a strong reference they would be a cycle, which the garbage collector could
        free during another capture, and so break that capture.
        device: a GPU. No part of the step may synchronize with the host.
        agree: receives whether the capture succeeded in this process, and returns whether it did in
        all processes: NCCL needs all or none of them to replay a graph with collectives.
        """
        self._step: Any = weakref.WeakMethod(step)
        self.device, self.warmup, self.agree = device, warmup, agree
        self.calls = 0
        self.failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def step(self) -> Any:
        return self._step()()

    def __call__(self) -> Any:
        """The result of the step."""
        self.calls += 1
        if self.calls <= self.warmup:
            return self._run_on_side_stream()
        if self.graph is None and not self.failed:
            try:
                self._capture()
            except Exception as e:  # not KeyboardInterrupt
                Graph.failures += 1
                full = "out of memory: " if out_of_memory(e) else ""
                print(
                    "irongpt: the step cannot be captured in a CUDA graph and is launched kernel "
                    f"by kernel, as with --no-graph: {full}{one_line(e)}",
                    file=sys.stderr,
                )
            if not self.agree(self.graph is not None):
                self.close()
        if self.graph is None:
            return self.step()
        self.graph.replay()
        return None if self.result is None else self.result.clone()

    def close(self) -> None:
        """Destroys the graph. Later calls launch the step."""
        if self.graph is not None:
            self.graph.reset()
        self.graph, self.result, self.failed = None, None, True

    def _run_on_side_stream(self) -> Any:
        """PyTorch requires another stream than the caller's for warmup before a capture."""
        stream = side_stream(self.device)
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.step()
        current.wait_stream(stream)
        return result

    def _capture(self) -> None:
        """Records the step without running it. Raises what the step or the capture raises."""
        stream = side_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with capture(graph):
                self.result = self.step()
        self.graph = graph


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for warmups and captures: one per device, as cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def capture(graph: Any) -> Iterator[None]:
    """Captures on the current stream, because a backward runs on the stream of its forward.

    Raises what the captured code raises, and the process can continue. The garbage collector does
    not run meanwhile, because a graph that it destroys would invalidate the capture.
    """
    pool, broken = torch.cuda.graph_pool_handle(), None
    generator = torch.cuda.get_rng_state()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            try:
                yield
            except Exception as e:
                broken = e
                raise
    except Exception as e:
        recover(pool, generator)
        if broken is None or e is broken:
            raise
        raise broken from None  # the end of a broken capture raises a less clear error
    finally:
        if collects:
            gc.enable()


def recover(pool: Any, generator: Tensor) -> None:
    """Repairs what a failed capture leaves behind: PyTorch still allocates from the graph's pool,
    and its default generator, whose state was `generator`, raises errors."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # if PyTorch has ended that itself
        torch._C._cuda_endAllocateToPool(device, pool)
    fresh = torch.Generator(torch.device("cuda", device))
    fresh.set_state(generator)
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)
