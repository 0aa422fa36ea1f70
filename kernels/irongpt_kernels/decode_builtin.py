"""The ops of one token by PyTorch's own fused functions: what `builtin` offers of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels.decode_eager import append, draw_tokens, embed_tokens, linear_add

__all__ = ["cached_attention", "draw_tokens", "embed_tokens", "linear_add", "norm_linear"]


def cached_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *, scale: float | None = None
) -> Tensor:
    """See `eager.cached_attention`. What was not written is read, as far as PyTorch reads it, and
    has to be finite. On a CPU one row of a cache is written, by an index, and the rest stays: a
    position outside is an IndexError there, or counts from the end."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
    write = write_row if qkv.device.type == "cpu" else append
    mask = write(k[:, :, 0], v[:, :, 0], cache_k, cache_v, position)[:, :, None]  # (B, 1, 1, N)
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def write_row(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """As `append`, by an index: nothing but the new row is written."""
    texts, columns = (torch.arange(n, device=k.device) for n in (len(k), cache_k.shape[2]))
    cache_k[texts, :, position] = k.to(cache_k.dtype)
    cache_v[texts, :, position] = v.to(cache_v.dtype)
    return columns <= position[:, None, None]


def norm_linear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gelu: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """See `eager.norm_linear`."""
    from irongpt_kernels import builtin

    normed = builtin.layer_norm(x, norm_weight, norm_bias, eps).to(weight.dtype)
    if gelu:
        return builtin.gelu(F.linear(normed, weight), bias)
    return F.linear(normed, weight, None if bias is None else bias.to(weight.dtype))
