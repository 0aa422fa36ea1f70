"""Attention of one position to a cache: eager is causal attention, the kernel is like eager."""

import math

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from irongpt_kernels.op_inputs import widened
from numerics import (
    DEVICE,
    OUTPUTS,
    assert_exact,
    assert_rule,
    each_dtype,
    randn,
    values,
)
from torch import Tensor

each_ops = pytest.mark.parametrize(
    "ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"]
)
POSITIONS = [[0, 0], [1, 0], [15, 16], [17, 39], [39, 31]]


def inputs(positions: list[int], dtype=torch.float32, H: int = 3, N: int = 40, D: int = 16) -> dict:
    """The caches are NaN where nothing has been written yet."""
    B = len(positions)
    position = torch.tensor(positions, dtype=torch.int64, device=DEVICE)
    past = torch.arange(N, device=DEVICE) < position[:, None, None]
    caches = {
        name: values(B, H, N, D, dtype=dtype, seed=i).where(past[..., None], math.nan)
        for i, name in enumerate(("cache_k", "cache_v"))
    }
    return dict(qkv=values(B, 1, 3, H, D, dtype=dtype, seed=5), **caches, position=position)


def call(ops, given: dict, **options) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the caches after it."""
    given = {n: x.clone() for n, x in given.items()}
    out = ops.decode_attention(**given, **options)
    return out, given["cache_k"], given["cache_v"]


def check(ops, given: dict, **options) -> None:
    """The tolerance, and the bits of the caches."""
    (out, *caches), (base, *wanted) = (call(module, given, **options) for module in (ops, eager))
    assert_rule(OUTPUTS, out, base, call(eager, widened(given), **options)[0])
    for a, b in zip(caches, wanted, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_eager_is_the_last_row_of_causal_attention() -> None:
    B, H, N, D = 2, 3, 9, 16
    qkv = randn(B, N, 3, H, D)
    cache_k, cache_v = torch.zeros(B, H, N, D).double(), torch.zeros(B, H, N, D).double()
    rows = []
    for i in range(N):
        position = torch.full((B,), i)
        rows.append(eager.decode_attention(qkv[:, i : i + 1], cache_k, cache_v, position))
    assert_exact(torch.cat(rows, 1), eager.causal_attention_packed(qkv))
    assert_exact(cache_k, qkv[:, :, 1].transpose(1, 2))


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@each_dtype
@pytest.mark.parametrize("D", [16, 48, 128])
def test_fused(D: int, dtype: torch.dtype, positions: list[int]) -> None:
    given = inputs(positions, dtype, H=8, D=D)  # of few heads eager may be exact by chance
    # At scores of 80, one rounding changes a weight by 4e-6, but eager on a GPU may be exact there.
    for scale in (None, 2.0 if DEVICE == "cpu" else 0.3):
        check(fused, given, scale=scale)


@each_dtype
def test_builtin(dtype: torch.dtype) -> None:
    check(builtin, {n: x.nan_to_num(3) for n, x in inputs([17, 39], dtype).items()})


@each_ops
def test_only_the_new_row_is_written(ops) -> None:
    given = {n: x.nan_to_num(3) for n, x in inputs([5, 0]).items()}
    _, *caches = call(ops, given)
    for which, (name, cache) in enumerate(zip(("cache_k", "cache_v"), caches, strict=True), 1):
        for b, position in enumerate((5, 0)):
            assert torch.equal(cache[b, :, position], given["qkv"][b, 0, which])
        changed = (cache != given[name]).any(-1)
        assert changed.nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, 5], [1, 0]]


def test_huge_scores_are_rescaled() -> None:
    """Of keys that grow, and where the new one is by far the likeliest, or the least."""
    for factor in (30.0, -30.0):
        given = inputs([39, 20])
        given["cache_k"] *= torch.linspace(1, 30, 40, device=DEVICE)[:, None]
        given["qkv"][:, :, 1] = factor * given["qkv"][:, :, 0]
        check(fused, given)


@pytest.mark.parametrize("position", [-1, 40, 2**40])
def test_a_position_outside_writes_nothing(position: int) -> None:
    given = inputs([5, 5])
    given = {n: x.nan_to_num(3) for n, x in given.items()}
    given["position"] = torch.tensor([position, 5], device=DEVICE)
    _, k, v = call(fused, given)
    assert torch.equal(k[0], given["cache_k"][0])
    assert torch.equal(v[0], given["cache_v"][0])
    assert not torch.equal(k[1], given["cache_k"][1])
