"""PyTorch custom ops, so that autograd and torch.compile can use functions that launch kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]


def custom_op(
    name: str, function: Function, fake: Function = lambda *_: None, mutates: Sequence[str] = (),
    setup_context: Function | None = None, backward: Function | None = None,
) -> Function:  # fmt: skip
    """Registers the function as the op `irongpt::name` and returns a function that calls it.

    That function raises NotImplementedError if an argument has a forward-mode tangent; PyTorch
    would silently use a derivative of 0.

    fake: returns uninitialized results for the same arguments, which shows torch.compile their
    shapes and dtypes; for an op without a result it can be omitted. mutates: the names of arguments
    that are updated in place. setup_context, backward: the formula of autograd, as in
    `torch.library.register_autograd`.
    """
    op = torch.library.custom_op(f"irongpt::{name}", function, mutates_args=mutates)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(f"irongpt::{name} has no forward-mode derivative")
        return op(*args)

    return call


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the tensors to the autocast dtype if autocast is on. Our kernels do not see autocast,
    and autograd must record the cast, so a public function casts before it calls the op."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _has_tangent(arg: Any) -> bool:
    if isinstance(arg, list | tuple):
        return any(map(_has_tangent, arg))
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None
