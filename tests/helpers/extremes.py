"""Extreme inputs on which several implementations of one operation are tested."""

import math

import pytest
import torch
from numerics import values
from torch import Tensor

each_extreme = pytest.mark.parametrize(
    "kind", ["large logits", "equal", "one winner", "large values", "small"]
)


def extreme_attention(kind: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of a kind of `each_extreme`, made of x: (B, H, T, D) each, T above 30."""
    if kind == "large logits":
        return dict(q=x["q"] * 15, k=x["k"] * 15, v=x["v"])
    if kind == "equal":  # v is not: dq would be exactly 0
        return x | {n: torch.full_like(x[n], 1.5) for n in "qk"}
    if kind == "one winner":  # scores to the edge of float16, one column far above the others
        k = x["k"].clone()
        k[:, :, 20] = x["q"][:, :, 30] * 40
        return dict(q=x["q"] * 40, k=k, v=x["v"])
    if kind == "large values":
        return x | dict(v=x["v"] * 1e3)
    return {n: t * 1e-3 for n, t in x.items()}


def extreme_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (12, 37) to the edge of the dtype, and -inf: in front, behind, in whole blocks, all
    but the target; and targets (12,)."""
    top, V = 65504.0 if dtype == torch.float16 else 1e30, 37
    x = values(12, V, dtype=dtype)
    x[1], x[2], x[3] = 3.0, top, -top
    x[4, ::2], x[4, 1::2] = top, -top
    x[5] = torch.arange(V) * (top / V)
    x[6] = x[5].flip(0)
    x[7, :36], x[8, 1:], x[9, 20:], x[10, :20] = (-math.inf,) * 4
    return x, torch.tensor([5, 0, 36, 18, 0, 36, 0, 36, 0, 19, 20, 3])
