"""PyTorch custom ops, so that autograd and torch.compile can use functions that launch kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Function = Callable[..., Any]


def custom_op(
    name: str, function: Function, fake: Function = lambda *_: None, mutates: Sequence[str] = (),
    setup_context: Function | None = None, backward: Function | None = None,
) -> Function:  # fmt: skip
    """Registers the function as the op `irongpt::name` and returns that op.

    fake: returns uninitialized results for the same arguments, which shows torch.compile their
    shapes and dtypes; for an op without a result it can be omitted. mutates: the names of arguments
    that are updated in place. setup_context, backward: the formula of autograd, as in
    `torch.library.register_autograd`.
    """
    op = torch.library.custom_op(f"irongpt::{name}", function, mutates_args=mutates)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op
