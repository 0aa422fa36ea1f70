"""
The ops of one token for each of B texts, in plain PyTorch: what `eager` offers of them.

They write into tensors that stay where they are (caches, counters, tokens) and look at no value on
the host, so that a CUDA graph can hold a whole token. None has a gradient.

Products are of the weights' dtype: what is normed is rounded to it before, and the product after,
as under autocast. Statistics are in float32 at least.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels import dropout

MASS_BITS = 40  # the likeliest token's mass is 2^40; what is 2^40 times less likely has none
MAX_V = 1 << 22  # so many masses fit into 63 bits
GREATEST_INVERSE = 3e38  # of a temperature: a factor that float32 holds


def cached_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of one new position for each text, to itself and to all that came before it.

    qkv: (B, 1, 3, H, D). cache_k, cache_v: (B, H, N, D); the new key and value are written at
    `position`, (B,) int64, each from 0 to N - 1, and what lies behind it is never read.
    scale: 1/sqrt(D) unless given. Returns (B, 1, H, D).
    """
    q, k, v = qkv[:, 0].unbind(1)  # (B, H, D)
    seen = append(k, v, cache_k, cache_v, position)
    scores = (cache_k @ q[..., None])[..., 0]  # (B, H, N)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (wide * (q.shape[-1] ** -0.5 if scale is None else scale)).where(seen, -math.inf)
    weights = weights.softmax(-1).to(v.dtype)[:, :, None]
    return (weights @ cache_v.where(seen[..., None], 0.0)).transpose(1, 2)


def append(k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor) -> Tensor:
    """Writes k, v (B, H, D) at `position`. Returns what is seen, bool, (B, 1, N).

    Not by an index: where determinism is asked for, PyTorch writes by one through numbers of the
    host, which no CUDA graph holds.
    """
    columns = torch.arange(cache_k.shape[2], device=position.device)
    new = (columns == position[:, None, None])[..., None]  # (B, 1, N, 1)
    cache_k.copy_(k[:, :, None].where(new, cache_k))
    cache_v.copy_(v[:, :, None].where(new, cache_v))
    return columns <= position[:, None, None]


def embed_tokens(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """Embeddings of each text's last token and of its position, added. Returns (B, C).

    tokens: (B, N) int64, a ring: the last of n tokens stands in column (n - 1) mod N. counts:
    (B, 2) int64, n and the last token's position. wte: (V, C). wpe: (context, C). A token -1, which
    `draw_tokens` gives for logits of no use, counts as 0.
    """
    last = tokens.gather(1, ((counts[:, :1] - 1) % tokens.shape[1]))[:, 0]
    return wte[last.clamp(min=0)] + wpe[counts[:, 1]]


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
    """layer_norm(x) weight^T + bias, with `gelu` its GELU.

    x: (B, K). weight: (N, K). norm_weight, norm_bias: (K,). bias: (N,).
    Returns (B, N) in the weight's dtype.
    """
    from irongpt_kernels import eager

    normed = eager.layer_norm(x, norm_weight, norm_bias, eps).to(weight.dtype)
    if gelu:
        return eager.gelu(normed @ weight.T, bias)
    return F.linear(normed, weight, None if bias is None else bias.to(weight.dtype))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + x weight^T + bias, in the residual's dtype.

    x: (B, K), weight: (N, K), residual: (B, N), bias: (N,).
    """
    branch = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return (residual + branch).to(residual.dtype)


def draw_tokens(
    logits: Tensor,
    tokens: Tensor,
    counts: Tensor,
    seed: int | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Draws the next token of each text, writes it into `tokens`, and counts on.

    logits: (B, V). tokens: (B, N) int64: token number n goes into column n mod N. counts: (B, K)
    int64: n is in column 0, and every column advances by one.

    Temperature divides the logits; at 0 the likeliest token is taken. top_k keeps the k likeliest;
    top_p (Holtzman et al. 2020) the fewest likeliest that hold p of what is left, one at least. Of
    equal ones the first are likelier. What is kept has masses exp((logit - greatest) / temperature)
    in units of 2^-40, integers, whose sums no order of adding changes. The draw is the first token
    whose masses up to it exceed `uniform` times all, a pure function of (seed, text, n).
    Where a logit is not finite the token is -1.
    """
    V = logits.shape[1]
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, index = x.nan_to_num().sort(dim=-1, descending=True, stable=True)
    inverse, keep = limits(V, temperature, top_k)
    mass = ((ordered - ordered[:, :1]) * inverse).exp().mul(2.0**MASS_BITS).long()
    mass[:, keep:] = 0
    if top_p is not None and top_p < 1:
        wanted = (mass.sum(-1, keepdim=True).double() * top_p).ceil()
        mass *= mass.cumsum(-1) - mass < wanted
    mass = mass.gather(1, index.argsort(-1))  # in the order of the vocabulary
    total = mass.sum(-1)
    target = (uniform(seed, counts[:, 0]) * total.double()).long().minimum(total - 1)
    token = (mass.cumsum(-1) <= target[:, None]).sum(-1)
    token = token.where(x.isfinite().all(-1), -1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    tokens.copy_(token[:, None].where(columns == counts[:, :1] % len(columns), tokens))
    counts += 1


def limits(V: int, temperature: float, top_k: int | None) -> tuple[float, int]:
    """The factor of the logits, which float32 holds, and how many tokens are kept."""
    if temperature == 0:
        return 1.0, 1
    inverse = min(1 / temperature, GREATEST_INVERSE)
    return inverse, V if top_k is None else min(top_k, V)


def uniform(seed: int | Tensor, number: Tensor) -> Tensor:
    """Numbers in [0, 1) by 53 bits of Philox for texts 0 to B - 1. number: (B,) int64.

    Philox of `dropout`; the counter's words: number's low and high 32 bits, text, 2.
    """
    text = torch.arange(len(number), device=number.device)
    m32 = 0xFFFFFFFF
    words = dropout.philox(seed, number & m32, number >> 32, text, torch.full_like(text, 2))
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53
