"""Each op names an argument that it cannot take. What is the same for every tensor of every op is
in test_op_contract.py, and the optimizers are in test_optimizer_arguments.py."""

import math
import re
from typing import Any

import pytest
import torch
from irongpt_kernels import fused
from numerics import DEVICE
from op_cases import OP_CASES, WITHOUT_GRADIENT
from torch import Tensor


def zeros(*size: int) -> Tensor:
    return torch.zeros(size, device=DEVICE)


HEAD = "must be 16, 32, ... or 128, got"
HALF = "torch.float32, got torch.float16"
LONG, TOO_LONG = zeros(1, 8193), "must have a last dimension of at most 8192, got 8193"
VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("causal_attention", dict(v=zeros(1, 1, 9, 16).half()),
     f"v must have the dtype of q, {HALF}"),
    *(("causal_attention", dict.fromkeys("qkv", zeros(1, 1, 4, D)),
       f"D, the last dimension of q, {HEAD} {D}") for D in (40, 144, 0)),
    ("causal_attention", dict(scale=math.inf), "scale must be finite, got inf"),
    ("causal_attention_packed", dict(qkv=zeros(2, 8, 2, 4, 16)),
     "qkv must have shape (B, T, 3, H, D), got (2, 8, 2, 4, 16)"),
    ("causal_attention_packed", dict(qkv=zeros(2, 8, 3, 4, 40)),
     f"D, the last dimension of qkv, {HEAD} 40"),
    ("causal_attention_packed", dict(scale=math.nan), "scale must be finite, got nan"),
    ("softmax", dict(x=zeros(3)), "a causal x must be (..., T, T), got shape (3,)"),
    ("softmax", dict(x=zeros(3, 4)), "a causal x must be (..., T, T), got shape (3, 4)"),
    ("layer_norm", dict(x=LONG), f"x {TOO_LONG}"),
    ("dropout_add_layer_norm", dict(branch=LONG, residual=LONG), f"branch {TOO_LONG}"),
    ("cross_entropy", dict(logits=zeros(2, 0), targets=zeros(2).long()),
     "logits must have at least one class, got shape (2, 0)"),
    ("linear_cross_entropy", dict(weight=zeros(17, 19).half()),
     f"weight must have the dtype of x, {HALF}"),
    ("linear_cross_entropy", dict(weight=zeros(0, 19)),
     "classes must be in [1, 0], as weight has 0 rows, got 0"),
    *(("linear_cross_entropy", dict(classes=n),
       f"classes must be in [1, 17], as weight has 17 rows, got {n}") for n in (0, 18, -1)),
    ("linear_cross_entropy", dict(loss_scale=zeros(1)), "loss_scale must have shape (), got (1,)"),
    ("linear_cross_entropy", dict(loss_scale=zeros().to("meta")),
     f"loss_scale is on meta, but x is on {zeros().device}"),
    ("decode_attention", dict(qkv=zeros(2, 2, 3, 2, 48)),
     "qkv must have shape (B, 1, 3, H, D), got (2, 2, 3, 2, 48)"),
    ("decode_attention", dict(qkv=zeros(3, 1, 3, 2, 40)),
     "cache_k must have shape (3, 2, N, 40), got (3, 2, 34, 48)"),
    ("decode_attention", dict(cache_v=zeros(3, 2, 9, 48)),
     "cache_v must have shape (3, 2, 34, 48), got (3, 2, 9, 48)"),
    ("decode_attention", dict(cache_k=zeros(3, 2, 34, 48).half()),
     f"cache_k must have the dtype of qkv, {HALF}"),
    ("decode_attention", dict(position=zeros(4).long()), "position must have shape (3,), got (4,)"),
    ("decode_attention", dict(qkv=zeros(3, 1, 3, 2, 40), cache_k=zeros(3, 2, 9, 40),
     cache_v=zeros(3, 2, 9, 40)), f"D, the last dimension of qkv, {HEAD} 40"),
    ("norm_linear", dict(x=zeros(3)), "x must have shape (M, K), got (3,)"),
    ("norm_linear", dict(weight=zeros(21, 36)), "weight must have shape (N, 37), got (21, 36)"),
    ("norm_linear", dict(norm_weight=zeros(36)), "norm_weight must have shape (37,), got (36,)"),
    ("norm_linear", dict(bias=zeros(20)), "bias must have shape (148,), got (20,)"),
    ("linear_add", dict(residual=zeros(2, 9)), "residual must have shape (3, 37), got (2, 9)"),
    ("linear_add", dict(x=zeros(3, 148).half()), f"x must have the dtype of weight, {HALF}"),
    ("embed_tokens", dict(counts=zeros(3, 1).long()),
     "counts must have at least 2 columns, got shape (3, 1)"),
    ("sample_tokens", dict(logits=zeros(4, 5)), "logits must have shape (3, V), got (4, 5)"),
    ("sample_tokens", dict(counts=zeros(4, 2).long()),
     "counts must have shape (3, columns), got (4, 2)"),
]  # fmt: skip
TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("softmax", dict(scale="a"), "scale must be a number, got 'a'"),
    ("sample_tokens", dict(tokens=zeros(9, 3).long().t()),
     "tokens must have contiguous rows, got strides (1, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "op", "changed", "message"),
    [*((ValueError, *row) for row in VALUES), *((TypeError, *row) for row in TYPES)],
)
def test_bad_arguments_are_named(
    error: type[Exception], op: str, changed: dict[str, Any], message: str
) -> None:
    case = (OP_CASES | WITHOUT_GRADIENT)[op]
    given = case.inputs() | case.spec.options(case.shape, 0.0, 5) | case.options | changed
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        getattr(fused, op)(**given)
