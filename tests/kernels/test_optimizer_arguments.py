"""The optimizer's kernels get addresses, so the ops refuse tensors that they would misread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from irongpt_kernels import fused
from numerics import DEVICE
from torch import Tensor

Arguments = dict[str, Any]


def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=DEVICE)


def shifted(t: Tensor) -> Tensor:
    """A copy that begins 4 bytes after a multiple of 16."""
    step = 4 // t.itemsize
    return torch.cat((t.new_zeros(step), t.flatten()))[step:].view(t.shape)


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [zeros(4, 6, dtype=dtype) for _ in range(2)]


STATS = torch.tensor([1.0, 1.0, 0.0], device=DEVICE)


def adamw() -> Arguments:
    return dict(
        params=weights(), low_precision_params=weights(torch.float16), grads=weights(),
        exp_avgs=weights(), exp_avg_sqs=weights(), state_steps=1 + zeros(2), lr=zeros(),
        stats=STATS, beta1=0.9, beta2=0.99, weight_decays=[0.0, 0.0],
    )  # fmt: skip


def state() -> Arguments:
    integer = zeros(dtype=torch.int64)
    return dict(scale=1 + zeros(), growth_tracker=integer, state_steps=zeros(2), max_norm=1.0)


def grad_norm() -> Arguments:
    return dict(grads=weights(), **state(), growth_interval=3)


def sum_shards() -> Arguments:
    return dict(shards=zeros(2, 8), **state(), growth_interval=3)


def muon_momentum() -> Arguments:
    return dict(
        grads=weights(), momentum=zeros(2, 4, 6), stats=STATS, beta=0.9, dtype=torch.float32
    )


def muon_update() -> Arguments:
    return dict(
        params=weights(), low_precision_params=weights(torch.float16), update=zeros(2, 4, 6),
        lr=zeros(), stats=STATS, scale=1.0, weight_decay=0.1,
    )  # fmt: skip


OPS = [adamw, grad_norm, sum_shards, muon_momentum, muon_update]
HALF = zeros(4, 6, dtype=torch.float16)
TURNED = zeros(6, 4).t()
TWO_DTYPES = [HALF, HALF.bfloat16()]
MANY = [HALF] * 48 + [HALF.bfloat16()]  # a launch takes 48 tensors

CASES: list[tuple[Callable[[], Arguments], str, Any, type[Exception], str]] = [
    (adamw, "params", weights(torch.float16), TypeError, "params.0. must be a tensor of float32,"),
    (adamw, "params", [zeros(4, 6), TURNED], ValueError, "params.1. must be contiguous"),
    (adamw, "params", [zeros(4, 6), shifted(zeros(4, 6))], ValueError, "multiple of 16 bytes"),
    (adamw, "exp_avgs", weights()[:1], ValueError, "exp_avgs must have 2 tensors, got 1"),
    (adamw, "exp_avgs", [zeros(4, 6), TURNED], ValueError, "exp_avgs.1. must be contiguous"),
    (adamw, "exp_avg_sqs", [zeros(4, 6), zeros(3)], ValueError, "exp_avg_sqs.1. must have shape"),
    (adamw, "exp_avg_sqs", weights(torch.float64), TypeError, "exp_avg_sqs.0. must be a tensor"),
    (adamw, "low_precision_params", TWO_DTYPES, TypeError, "low_precision_params.1. must be a te"),
    (adamw, "low_precision_params", [TURNED.half()], ValueError, "must be contiguous"),
    (adamw, "low_precision_params", [shifted(HALF)], ValueError, "multiple of 16 bytes"),
    (adamw, "low_precision_params", [HALF] * 3, ValueError, "must have 2 tensors, got 3"),
    (adamw, "grads", [zeros(4, 6), zeros(4, 5)], ValueError, "grads must have the shapes"),
    (adamw, "grads", TWO_DTYPES, TypeError, "one 16-bit dtype"),
    (adamw, "grads", [zeros(4, 6), HALF], TypeError, "those of the first weights"),
    (adamw, "state_steps", (1 + zeros(4))[::2], ValueError, "state_steps must be contiguous"),
    (adamw, "state_steps", zeros(1), ValueError, "state_steps must have shape .2,"),
    (adamw, "lr", zeros(dtype=torch.float64), TypeError, "lr must be a tensor of float32"),
    (adamw, "stats", zeros(2), ValueError, "stats must have shape .3,"),
    (adamw, "weight_decays", [0.1], ValueError, "weight_decays must have 2 values, got 1"),
    (grad_norm, "grads", weights(torch.float64), TypeError, "grads.0. must be a tensor of float32"),
    (grad_norm, "grads", MANY, TypeError, "one 16-bit dtype"),
    (grad_norm, "state_steps", zeros(6)[::2], ValueError, "state_steps must be contiguous"),
    (grad_norm, "state_steps", zeros(2, dtype=torch.int64), TypeError, "state_steps must be a"),
    (grad_norm, "scale", zeros(dtype=torch.float16), TypeError, "scale must be a tensor of"),
    (grad_norm, "growth_tracker", zeros(), TypeError, "growth_tracker must be a tensor of int64"),
    (sum_shards, "state_steps", zeros(6)[::2], ValueError, "state_steps must be contiguous"),
    (sum_shards, "shards", zeros(8), ValueError, "shards must have shape .S, n., got"),
    (sum_shards, "shards", zeros(0, 8), ValueError, "shards must have at least one row"),
    (muon_momentum, "grads", weights()[:1], ValueError, "momentum must have shape .1, rows, "),
    (muon_momentum, "grads", [zeros(4, 6), zeros(6, 4)], ValueError, "grads must have the shapes"),
    (muon_momentum, "grads", [zeros(4, 6), HALF], TypeError, "must have one dtype"),
    (muon_momentum, "momentum", zeros(2, 6, 4).mT, ValueError, "momentum must be contiguous"),
    (muon_momentum, "momentum", zeros(2, 4, 6).half(), TypeError, "momentum must be a tensor of"),
    (muon_update, "params", [zeros(4, 6), TURNED], ValueError, "params.1. must be contiguous"),
    (muon_update, "params", [zeros(4, 6), shifted(zeros(4, 6))], ValueError, "multiple of 16"),
    (muon_update, "params", weights(torch.float16), TypeError, "params.0. must be a tensor of"),
    (muon_update, "low_precision_params", [HALF], ValueError, "must have 2 tensors, got 1"),
    (muon_update, "low_precision_params", TWO_DTYPES, TypeError, "must be a tensor of"),
    (muon_update, "update", zeros(1, 4, 6), ValueError, "params must have 1 tensors, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"),
    CASES,
    ids=[f"{i}-{case[0].__name__}-{case[1]}" for i, case in enumerate(CASES)],
)
def test_what_a_kernel_would_misread_is_refused(
    op: Callable[[], Arguments], name: str, value: Any, error: type[Exception], message: str
) -> None:
    """And nothing has changed by then."""
    given = op() | {name: value}
    held = [t for x in given.values() if isinstance(x, list) for t in x if isinstance(t, Tensor)]
    before = [t.clone() for t in held]
    with pytest.raises(error, match=message):
        getattr(fused, op.__name__)(**given)
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_views_of_larger_tensors_are_taken(op: Callable[[], Arguments]) -> None:
    """As those of a shard's gradients, and of the momentum of several weights."""

    def view(x: Any) -> Any:
        if isinstance(x, list):
            return [view(y) for y in x]
        return torch.stack([x, x, x, x])[2] if isinstance(x, Tensor) and x.dim() else x

    getattr(fused, op.__name__)(**{name: view(x) for name, x in op().items()})


@pytest.mark.gpu
def test_tensors_of_another_device_are_refused() -> None:
    for op, name in ((adamw, "params"), (grad_norm, "grads"), (muon_update, "params")):
        with pytest.raises(ValueError, match="must be on cuda"):
            getattr(fused, op.__name__)(**op() | {name: [x.cpu() for x in weights()]})
