"""Makes uninitialised memory visible: inside `poison()`, torch.empty returns NaN."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def poison() -> Iterator[None]:
    """Floats are filled with NaN, integers with their largest value."""
    made = {
        name: _filled(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")
    }
    new = {name: _filled(getattr(Tensor, name)) for name in ("new_empty", "new_empty_strided")}
    with patch.multiple(torch, **made), patch.multiple(Tensor, **new):
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
