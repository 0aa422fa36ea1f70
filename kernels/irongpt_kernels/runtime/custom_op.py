"""PyTorch custom ops, so that autograd and torch.compile can use functions that launch kernels."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from irongpt_kernels.runtime import launch

Function = Callable[..., Any]


def custom_op(
    name: str, function: Function, fake: Function = lambda *_, **__: None,
    mutates: Sequence[str] = (), setup_context: Function | None = None,
    backward: Function | None = None,
) -> Function:  # fmt: skip
    """Registers the function as the op `irongpt::name` and returns a function that calls it.

    The kernels launch on the device of the first tensor among the arguments. The returned function
    raises NotImplementedError if an argument has a forward-mode tangent; PyTorch would
    silently use a derivative of 0.

    fake: returns uninitialized results for the same arguments, which shows torch.compile their
    shapes and dtypes; for an op without a result it can be omitted. mutates: the names of arguments
    that are updated in place. setup_context, backward: the formula of autograd, as in
    `torch.library.register_autograd`.
    """

    @functools.wraps(function)
    def on_device(*args: Any, **options: Any) -> Any:
        device = next((x.device for x in _tensors(args)), torch.device("cpu"))
        with launch.device_context(device):
            return function(*args, **options)

    op = torch.library.custom_op(f"irongpt::{name}", on_device, mutates_args=mutates)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, _tensors(args))):
            raise NotImplementedError(f"irongpt::{name} has no forward-mode derivative")
        return op(*args, **options)

    return call


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the tensors to the autocast dtype if autocast is on. Our kernels do not see autocast,
    and autograd must record the cast, so a public function casts before it calls the op."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None
