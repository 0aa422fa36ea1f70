"""What is timed: calls on copies of the inputs, and what to say of one that cannot run."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # of copy i of the inputs


@dataclass(frozen=True)
class Work:
    """call: of copy i. first: of copy i, not timed; `call` then takes what it made and i.

    around: entered once about many calls, not at each of them.

    In a graph what comes first is captured too: PyTorch's attention keeps the state of its dropout
    on the host outside of a graph, where the backward inside of one cannot reach it.
    """

    call: Callable[..., object]
    first: Call | None = None
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext

    def begin(self, sets: int) -> Call:
        """The call, with what comes first done for every copy of the inputs."""
        first = self.first
        if first is None:
            return self.call
        made = [first(i) for i in range(sets)]
        return lambda i: self.call(made[i], i)


def free(device: torch.device) -> None:
    """Gives back the memory that nobody holds."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reason(e: Exception) -> str:
    """A line for an exception."""
    if isinstance(e, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
