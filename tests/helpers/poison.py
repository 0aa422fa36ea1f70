"""Makes uninitialised memory visible: inside `poison()`, torch.empty returns NaN."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_OWNERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch, ("empty", "empty_like", "empty_strided")),
    (Tensor, ("new_empty", "new_empty_strided")),
)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Floats are filled with NaN, integers with their largest value."""
    with contextlib.ExitStack() as stack:
        for owner, names in _OWNERS:
            for name in names:
                stack.enter_context(patch.object(owner, name, _filled(getattr(owner, name))))
        yield


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        if x.device.type == "meta":
            return x
        if x.is_floating_point():
            return x.detach().fill_(float("nan")).requires_grad_(x.requires_grad)
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)

    return poisoned
