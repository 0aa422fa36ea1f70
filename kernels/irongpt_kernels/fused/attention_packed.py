"""
Causal self-attention between two projections: from packed q, k and v, without a layout copy.

    out = causal_attention_packed(qkv, dropout_p, seed, scale)

    qkv: (B, T, 3, H, D)     out: (B, T, H, D)

The kernels are those of `attention` and `attention_backward`, on views of qkv. What this op saves
is a stack by autograd: three gradients that come back apart are copied into one of qkv, 6 B H T D
elements of traffic, though the kernels have written them side by side already.

Spec        irongpt_kernels/eager.py::causal_attention_packed
"""

from typing import Any

import torch
from torch import Tensor

from irongpt_kernels.fused import attention
from irongpt_kernels.fused.attention_backward import causal_attention_backward
from irongpt_kernels.runtime import checks
from irongpt_kernels.runtime.layout import unpack


@torch.library.custom_op("irongpt::causal_attention_packed", mutates_args=())
def _op(qkv: Tensor, seed: Tensor, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    return attention.attention_forward(q, k, v, seed, dropout_p, scale)


@_op.register_fake
def _(qkv: Tensor, seed: Tensor, dropout_p: float, scale: float) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(2, B, H, T, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, seed, ctx.dropout_p, ctx.scale = inputs
    ctx.save_for_backward(qkv, seed, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    if dout is None:
        return None, None, None, None
    qkv, seed, out, stats = ctx.saved_tensors
    q, k, v = unpack(qkv)
    packed = causal_attention_backward(
        dout, q, k, v, seed, out, stats, ctx.dropout_p, ctx.scale, True
    )
    return packed, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def causal_attention_packed(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `eager.causal_attention_packed`; dtypes, autocast and errors as in `causal_attention`."""
    checks.floating(qkv=qkv)
    checks.rank("qkv", qkv, 5)
    B, T, _, H, D = qkv.shape
    checks.shape("qkv", qkv, (B, T, 3, H, D))
    seed, scale = attention.check_options("qkv", qkv, dropout_p, seed, scale)
    (qkv,) = attention.autocast(qkv)
    return _op(qkv, seed, float(dropout_p), scale)[0]
