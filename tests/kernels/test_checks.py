"""What every fused op refuses alike: nothing where a tensor has to be, and seeds that are none."""

import pytest
import torch
from irongpt_kernels import fused
from numerics import small_inputs

OPTIONAL = "bias"
DROPPING = {"causal_attention": "q", "dropout_add_layer_norm": "branch"}


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, x in small_inputs().items() for name in x if name != OPTIONAL],
)
def test_none_for_a_tensor_is_named(op: str, name: str) -> None:
    inputs = small_inputs(torch.float32)[op] | {name: None}
    with pytest.raises(TypeError, match=rf"^{name} must be an? (int64 )?tensor, got NoneType$"):
        getattr(fused, op)(**inputs)


@pytest.mark.parametrize("op", DROPPING)
@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.tensor(1, device="meta"), ValueError, "^seed is on meta, but {first} is on cpu$"),
        (torch.tensor([1]), TypeError, "^seed must be an int or a 0-d int64 tensor, got torch.int"),
        (torch.tensor(1.0), TypeError, "^seed must be .*, got torch.float32"),
        (1.5, TypeError, "^seed must be .*, got 1.5$"),
        (
            2**63,
            ValueError,
            "^seed must fit into a signed 64-bit integer, got 9223372036854775808$",
        ),
    ],
    ids=["another device", "not 0-d", "floating tensor", "floating number", "too large"],
)
def test_bad_seeds_are_named(op: str, seed: object, error: type[Exception], message: str) -> None:
    inputs = small_inputs(torch.float32)[op]
    with pytest.raises(error, match=message.format(first=DROPPING[op])):
        getattr(fused, op)(**inputs, dropout_p=0.5, seed=seed)
