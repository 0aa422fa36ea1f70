"""Dropout in the attention kernels: the very bits of `dropout`, in forward and backward."""

import pytest
import torch
from irongpt_kernels import dropout
from irongpt_kernels.fused import attention
from numerics import DEVICE, run
from torch import Tensor


def kept(B: int, H: int, T: int, p: float, seed: int | Tensor, D: int = 48) -> Tensor:
    """The mask as the kernels use it: (2, B, H, T, T) bool, in the forward and in dV.

    Equal scores make a row's weights equal, and v the identity shows them; so does dout for dV.
    T is at most D.
    """
    zero = torch.zeros(B, H, T, D, device=DEVICE)
    one = torch.eye(T, D, device=DEVICE).expand(B, H, T, D)
    (out,), (_, _, dv) = run(
        attention.causal_attention, dict(q=zero, k=zero, v=one), (one,), dropout_p=p, seed=seed
    )
    return torch.stack([out[..., :T] != 0, dv[..., :T].transpose(-2, -1) != 0])


@pytest.mark.parametrize("seed", [0, 2**33 + 7, -5])
@pytest.mark.parametrize("p", [0.001, 0.2])
def test_the_bits_are_those_of_eager(p: float, seed: int) -> None:
    B, H, T = 2, 2, 40
    wanted = dropout.attention_keep(seed, B, H, T, p, DEVICE).tril()
    forward, backward = kept(B, H, T, p, seed)
    assert torch.equal(forward, wanted)
    assert torch.equal(backward, wanted)


def test_a_seed_may_be_a_tensor_that_changes_in_place() -> None:
    seed = torch.tensor(3, device=DEVICE)
    three = kept(1, 2, 40, 0.5, seed)
    seed += 1
    four = kept(1, 2, 40, 0.5, seed)
    assert torch.equal(three, kept(1, 2, 40, 0.5, 3))
    assert torch.equal(four, kept(1, 2, 40, 0.5, 4))
    assert not torch.equal(three, four)


def test_without_dropout_the_seed_is_nothing() -> None:
    q = torch.ones(1, 2, 40, 16, device=DEVICE)
    out = attention.causal_attention(q, q, q)
    assert torch.equal(out, attention.causal_attention(q, q, q, seed=7))
    assert torch.equal(out, attention.causal_attention(q, q, q, dropout_p=0.0, seed=8))
