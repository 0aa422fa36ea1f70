"""
Every op by PyTorch's own fused functions: the default of the model, and what a kernel has to beat.

The contract is that of `eager`, but for dropout: PyTorch's global generator decides what is
dropped, and the seed is ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels.decode_builtin import cached_attention as cached_attention
from irongpt_kernels.decode_builtin import draw_tokens as draw_tokens
from irongpt_kernels.decode_builtin import embed_tokens as embed_tokens
from irongpt_kernels.decode_builtin import linear_add as linear_add
from irongpt_kernels.decode_builtin import norm_linear as norm_linear


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `eager.causal_attention`."""
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # copies only where a backend must


def causal_attention_packed(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `eager.causal_attention_packed`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, scale=scale)
    return out.transpose(1, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See `eager.layer_norm`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """See `eager.softmax`."""
    scores = x * scale
    if causal:
        T = x.shape[-1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return F.softmax(scores, -1).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """See `eager.cross_entropy`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `eager.gelu`."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh").to(x.dtype)


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """See `eager.dropout_add_layer_norm`."""
    total = (residual + F.dropout(branch, dropout_p)).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps).to(branch.dtype)
