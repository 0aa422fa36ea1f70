"""Attention between two projections is attention, with one gradient and no copy."""

import pytest
import torch
from irongpt_kernels import builtin
from irongpt_kernels.fused import attention
from irongpt_kernels.runtime import launch
from numerics import DEVICE, assert_op, each_dtype, randn, run
from torch import Tensor


def projection(B: int, T: int, H: int, D: int, dtype=torch.float32) -> Tensor:
    return randn(B, T, 3, H, D, seed=3).to(DEVICE, dtype)


@each_dtype
@pytest.mark.parametrize(("T", "D"), [(1, 16), (37, 48), (65, 64)])
def test_the_rule(T: int, D: int, dtype) -> None:
    qkv, dout = projection(2, T, 3, D, dtype), randn(2, T, 3, D, seed=5).to(DEVICE, dtype)
    assert_op(attention, "causal_attention_packed", dict(qkv=qkv), (dout,), scale=0.2)
    assert_op(attention, "causal_attention_packed", dict(qkv=qkv), (dout,), dropout_p=0.3, seed=2)


@each_dtype
def test_builtin(dtype) -> None:
    qkv, dout = projection(2, 37, 3, 16, dtype), randn(2, 37, 3, 16, seed=5).to(DEVICE, dtype)
    assert_op(builtin, "causal_attention_packed", dict(qkv=qkv), (dout,))


def test_strides_change_no_bit() -> None:
    qkv, dout = projection(2, 3, 37, 32), randn(2, 3, 37, 32, seed=5).to(DEVICE, torch.float32)
    qkv, dout = qkv.transpose(1, 3), dout.transpose(1, 2)  # (2, 37, 3, 3, 32)
    options = dict(dropout_p=0.3, seed=2)
    op = attention.causal_attention_packed
    first = run(op, dict(qkv=qkv), (dout,), **options)
    again = run(op, dict(qkv=qkv.contiguous()), (dout.contiguous(),), **options)
    assert torch.equal(first[0][0], again[0][0])
    assert torch.equal(first[1][0], again[1][0])


def test_nothing_stands_between_the_projections() -> None:
    """Whoever unbinds q, k and v pays for a stack of their gradients."""
    qkv = projection(2, 37, 3, 16).requires_grad_()
    out = attention.causal_attention_packed(qkv)
    assert out.is_contiguous()
    (before, *_), *others = out.grad_fn.next_functions
    assert before.variable is qkv
    assert not any(node for node, _ in others)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert dqkv.is_contiguous()


def test_registration() -> None:
    qkv = projection(1, 20, 2, 16).requires_grad_()
    seed = launch.seed_tensor(3, qkv.device)
    torch.library.opcheck(torch.ops.irongpt.causal_attention_packed.default, (qkv, seed, 0.2, 0.25))


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "qkv must be a tensor, got NoneType", dict(qkv=None)),
        (TypeError, "qkv must be .* got torch.float64",
         dict(qkv=torch.zeros(2, 8, 3, 3, 16).double())),
        (ValueError, "qkv must have 5 dimensions", dict(qkv=torch.zeros(2, 8, 3, 16))),
        (ValueError, r"qkv must have shape \(2, 8, 3, 4, 16\), got \(2, 8, 2, 4, 16\)",
         dict(qkv=torch.zeros(2, 8, 2, 4, 16))),
        (ValueError, "D, the last dimension of qkv, .* got 40",
         dict(qkv=torch.zeros(2, 8, 3, 4, 40))),
        (ValueError, "dropout_p > 0 needs a seed", dict(dropout_p=0.1)),
        (ValueError, "scale must be finite, got nan", dict(scale=float("nan"))),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, changed: dict) -> None:
    with pytest.raises(error, match=message):
        attention.causal_attention_packed(**dict(qkv=torch.zeros(2, 8, 3, 4, 16)) | changed)
