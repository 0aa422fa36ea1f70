"""Every op in plain PyTorch: the specification, and the eager path of the model.

Run in float64, it is the oracle that the other implementations are compared with. Statistics and
sums are computed in float32 (float64 for float64 inputs). Results have the dtype of the first
argument unless documented otherwise. ValueError: dropout_p is outside [0, 1), or above 0 without a
seed.

The ops of one decoding step (`decode_attention` and those after it) need no gradient. They never
read a value on the host, and update caches, tokens and counts in place, so that a CUDA graph can
capture a complete step. Their linear layers run in the dtype of the weight: the normalized input
and the result of the matmul are rounded to it, as under autocast.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.runtime import checks

# The mass of a token is its unnormalized probability as an integer: 2^40 for the most likely token,
# 0 for one that is more than 2^40 times less likely.
MASS_BITS = 40
MAX_V = 1 << 22  # the sum of the masses of this many tokens fits into 63 bits
MAX_INVERSE = 3e38  # the largest 1 / temperature: it fits into float32


class GradStats(NamedTuple):
    """The three elements of `grad_norm`'s result, each a 0-d tensor."""

    norm: Tensor  # of the unscaled gradients, before clipping
    grad_scale: Tensor  # divide gradients by it to unscale them and to clip their norm
    found_inf: Tensor  # 1 if the norm is not finite, else 0


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """dropout(softmax(scale q k^T + causal mask)) v (Vaswani et al. 2017).

    q, k, v: (B, H, T, D), any strides. scale: 1/sqrt(D) unless given. Dropout acts on the
    attention weights. Returns (B, H, T, D), a view of a contiguous (B, T, H, D) tensor.
    """
    checks.dropout(dropout_p, seed, q=q)
    B, H, T, D = q.shape
    weights = softmax(
        q @ k.transpose(-2, -1), scale=D**-0.5 if scale is None else scale, causal=True
    )  # (B, H, T, T)
    if dropout_p > 0 and seed is not None:
        keep = dropout.attention_keep(seed, B, H, T, dropout_p, q.device)
        weights = weights * keep * dropout.keep_scale(dropout_p)
    out = weights.to(v.dtype) @ v
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def causal_attention_packed(
    qkv: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`causal_attention` in the layout of the projections before and after it.
    qkv: (B, T, 3, H, D), any strides. Returns (B, T, H, D), contiguous."""
    checks.dropout(dropout_p, seed, qkv=qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, scale=scale)
    return out.transpose(1, 2)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016).

    x: (..., N). weight, bias: (N,). dtype: that of the result, by default that of x.
    The variance is the biased one, computed from centred values.
    """
    centred = _wide(x) - _wide(x).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd * weight
    return (y if bias is None else y + bias).to(dtype or x.dtype)


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """exp(scale x) / sum(exp(scale x)) along the last dimension.
    x: (..., N). causal: the last two dimensions are (T, T), and row i sees columns 0 to i."""
    scores = _wide(x) * scale
    if causal:
        T = x.shape[-1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if x.numel() == 0:  # there is no largest score
        return scores.to(x.dtype)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[target] over the rows whose target is not `ignore_index`.

    logits: (M, V). targets: (M,) int64. Returns a 0-d tensor in float32 (float64 for
    float64 logits); NaN if every row is ignored, as in PyTorch.
    """
    counted = targets != ignore_index
    log_p = _wide(logits).log_softmax(-1)  # logsumexp - logit is inexact for a loss near 0
    picked = log_p.gather(1, targets.masked_fill(~counted, 0)[:, None])[:, 0]
    return -picked.masked_fill(~counted, 0.0).sum() / counted.sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *,
    classes: int | None = None, loss_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`cross_entropy` of the logits `x weight^T`: the head of a model and its loss.

    x: (M, C). weight: (V, C). targets: (M,) int64 in [0, classes); every target counts.
    classes: the number of classes, by default V; the rows of the weight after them are padding,
    whose probability and gradient are 0. loss_scale: 0-d, the upstream gradient that the loss is
    expected to get. It is only a hint. `fused` computes the gradients in the forward, already
    multiplied by loss_scale, so that small ones do not underflow in float16. If the upstream
    gradient is another, the backward rescales them. If loss_scale is None, `fused` uses 1, or 1,024
    for float16 inputs. A scale of 1,024 makes gradients above 65,504 / 1,024 = 64 overflow.
    """
    return cross_entropy(padded_logits(x, weight, classes), targets)


def padded_logits(x: Tensor, weight: Tensor, classes: int | None) -> Tensor:
    """x weight^T, and -inf in the columns from `classes` on."""
    if classes is None or classes == len(weight):
        return F.linear(x, weight)
    padding = len(weight) - classes
    return F.linear(x, weight, F.pad(weight.new_zeros(classes), (0, padding), value=-math.inf))


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias in the tanh approximation (Hendrycks and Gimpel 2016).
    x: (..., N). bias: (N,)."""
    z = _wide(x) if bias is None else _wide(x) + bias
    y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return y.to(x.dtype)


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual + dropout(branch), and the layer norm of that sum.

    branch, residual: (..., N). weight, bias: (N,).
    Returns the sum in the residual's dtype, and its layer norm in the branch's dtype.
    """
    checks.dropout(dropout_p, seed, branch=branch)
    if dropout_p > 0 and seed is not None:
        M, N = branch.numel() // branch.shape[-1], branch.shape[-1]
        keep = dropout.row_keep(seed, M, N, dropout_p, branch.device)
        branch = branch * keep.reshape(branch.shape) * dropout.keep_scale(dropout_p)
    total = (residual + branch).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps).to(branch.dtype)


def embed_layer_norm(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """wte[idx] + wpe, the embedding of tokens and of their positions, and its layer norm.

    wte: (V, C). wpe: (T, C). idx: (B, T) int64, in [0, V). weight, bias: (C,).
    Returns both as (B, T, C), the embedding in the dtype of wte, its norm in `dtype`, by default
    that of wte.
    """
    x = F.embedding(idx, wte) + wpe
    return x, layer_norm(x, weight, bias, eps, dtype)


def norm_parameters(params: list[Tensor], rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Prepares the parameters of layer norms for the layer-norm ops of this implementation.

    params: weights and biases, (N,) each. rows: the number of rows of the norms' inputs. dtype:
    that of the norms' results. This version returns the parameters unchanged. `fused` returns views
    whose gradients are partial sums, so that one kernel can add those of all parameters (see
    `fused.norm_parameters`).
    """
    return list(params)


def grad_norm(
    grads: list[Tensor], scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> Tensor:  # fmt: skip
    """Computes the norm of the gradients, the divisor that unscales and clips them, and the next
    loss scale.

    grads: the gradients of scale * loss. scale: 0-d float32, the loss scale. growth_tracker: 0-d
    int64, the number of finite steps since the scale last changed. state_steps: (k,) float32, the
    step counts of `adamw`'s tensors; all increase by one if the norm is finite. max_norm: the norm
    to clip to. growth_interval: the scale doubles after this many finite steps in a row and halves
    after one that is not finite, within 1 to 2^24 (Micikevicius et al. 2018). With 0 it never
    changes. scale, growth_tracker and state_steps are updated in place.
    Returns a (3,) float32 tensor: norm, grad_scale and found_inf, see `GradStats`.
    """
    total = torch.stack([_wide(g).square().sum() for g in grads]).sum()
    return grad_stats(total.sqrt(), scale, growth_tracker, state_steps, max_norm, growth_interval)


def sum_shards(
    shards: Tensor, scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of the gradients of a batch that was cut into shards, and `grad_norm` of it.

    shards: (S, n) of any dtype: row s is the gradient of all n weights from shard s. The rows are
    added in their order, in float32, so that every process that has all rows gets the same bits.
    Returns the sum, (n,) float32, and its `grad_norm`. The other arguments are those of
    `grad_norm`.
    """
    total = _wide(shards[0]).clone()
    for shard in shards[1:]:
        total = total + shard
    norm = total.square().sum().sqrt()
    return total, grad_stats(norm, scale, growth_tracker, state_steps, max_norm, growth_interval)


def grad_stats(
    scaled_norm: Tensor, scale: Tensor, growth_tracker: Tensor, state_steps: Tensor,
    max_norm: float, growth_interval: int,
) -> Tensor:  # fmt: skip
    """The rest of `grad_norm`, given the norm of the scaled gradients."""
    norm = scaled_norm / scale
    not_finite = ~norm.isfinite()
    grad_scale = scale * ((norm + 1e-6) / max_norm).clamp(min=1.0)
    state_steps += (~not_finite).float()
    if growth_interval:
        good = (growth_tracker + 1).masked_fill(not_finite, 0)
        grow = good >= growth_interval
        factor = torch.ones_like(scale).masked_fill(grow, 2.0).masked_fill(not_finite, 0.5)
        scale.copy_((scale * factor).clamp(1.0, 2.0**24))
        growth_tracker.copy_(good.masked_fill(grow, 0))
    return torch.stack(GradStats(norm, grad_scale, not_finite.to(norm.dtype)))


def adamw(
    params: list[Tensor], low_precision_params: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], state_steps: Tensor, lr: Tensor,
    stats: Tensor, *,
    beta1: float, beta2: float, weight_decays: list[float], eps: float = 1e-8,
) -> None:  # fmt: skip
    """AdamW (Loshchilov and Hutter 2019) in place. Nothing changes if found_inf is set in `stats`.

    params, exp_avgs, exp_avg_sqs: contiguous float32. grads: in the params' shapes, of any dtype.
    low_precision_params: 16-bit copies of the first len(low_precision_params) params, rounded after
    the update. state_steps: (n,) float32, the number of steps of each parameter, including the
    current step. lr: 0-d float32. stats: the result of `grad_norm`. weight_decays: one per
    parameter.
    """
    _, grad_scale, found_inf = GradStats(*stats)
    skip = found_inf > 0
    corrections = [1 - beta ** state_steps.double() for beta in (beta1, beta2)]
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        bias1, bias2 = (c[i].to(p.dtype) for c in corrections)
        g = g.to(p.dtype) / grad_scale
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g.square()
        new_p = p - lr * weight_decays[i] * p
        new_p -= lr / bias1 * new_m / (new_v.sqrt() / bias2.sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(old.where(skip, new))
    for copy, p in zip(low_precision_params, params, strict=False):
        copy.copy_(p)


def muon_momentum(
    grads: list[Tensor], momentum: Tensor, stats: Tensor, *, beta: float, dtype: torch.dtype
) -> Tensor:
    """The Nesterov momentum that Muon (Jordan et al. 2024) orthogonalizes, with Frobenius norm 1.

    grads: n tensors (rows, columns) of one dtype. momentum: (n, rows, columns) float32, updated in
    place. stats: the result of `grad_norm`; if found_inf is set, momentum does not change, and the
    result is finite but must not be used. Returns (n, rows, columns) of `dtype`.
    """
    _, grad_scale, found_inf = GradStats(*stats)
    skip = found_inf > 0
    g = (torch.stack(grads).to(momentum.dtype) / grad_scale).masked_fill(skip, 0)
    new = beta * momentum + (1 - beta) * g
    nesterov = beta * new + (1 - beta) * g
    momentum.copy_(momentum.where(skip, new))
    norm = nesterov.square().sum((1, 2), keepdim=True).sqrt()
    return (nesterov / (norm + 1e-7)).to(dtype)


def muon_update(
    params: list[Tensor], low_precision_params: list[Tensor], update: Tensor, lr: Tensor,
    stats: Tensor, *,
    scale: float, weight_decay: float,
) -> None:  # fmt: skip
    """p = p - lr weight_decay p - lr scale update, in place. Nothing changes if found_inf is set.

    params: n tensors (rows, columns), contiguous float32. low_precision_params: a 16-bit copy of
    each, rounded after the update, or an empty list. update: (n, rows, columns), of any dtype.
    lr: 0-d float32. stats: the result of `grad_norm`.
    """
    skip = GradStats(*stats).found_inf > 0
    for p, u in zip(params, update, strict=True):
        p.copy_(p.where(skip, p - lr * weight_decay * p - lr * scale * u.to(p.dtype)))
    for copy, p in zip(low_precision_params, params, strict=False):
        copy.copy_(p)


def decode_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of one new position per sequence to itself and to all earlier positions.

    qkv: (B, 1, 3, H, D). cache_k, cache_v: (B, H, N, D); the new key and value are written at
    `position`, (B,) int64, from 0 to N - 1. Cache rows after it have no effect.
    scale: 1/sqrt(D) unless given. Returns (B, 1, H, D).
    """
    q, k, v = qkv[:, 0].unbind(1)  # (B, H, D)
    seen = append_to_cache(k, v, cache_k, cache_v, position)
    scores = (cache_k @ q[..., None])[..., 0]  # (B, H, N)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (wide * (q.shape[-1] ** -0.5 if scale is None else scale)).where(seen, -math.inf)
    weights = weights.softmax(-1).to(v.dtype)[:, :, None]
    return (weights @ cache_v.where(seen[..., None], 0.0)).transpose(1, 2)


def append_to_cache(
    k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor
) -> Tensor:
    """Writes k, v (B, H, D) at `position`. Returns the mask of visible rows, bool, (B, 1, N).

    It does not use indexing: in deterministic mode PyTorch's indexed write synchronizes with the
    host, which a CUDA graph cannot capture.
    """
    columns = torch.arange(cache_k.shape[2], device=position.device)
    new = (columns == position[:, None, None])[..., None]  # (B, 1, N, 1)
    cache_k.copy_(k[:, :, None].where(new, cache_k))
    cache_v.copy_(v[:, :, None].where(new, cache_v))
    return columns <= position[:, None, None]


def embed_tokens(tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """The sum of the embeddings of each sequence's last token and of its position.

    tokens: (B, N) int64, a ring buffer: the last of n tokens is in column (n - 1) mod N. counts:
    (B, 2 or more) int64: column 0 is n, column 1 the position of the last token. wte: (V, C). wpe:
    (context, C). A negative id counts as 0: `sample_tokens` writes -1 if a logit is not finite. For
    an id of V or more, or a position outside the context, `fused` gives NaN. Returns (B, C) in the
    dtype of wte.
    """
    last = tokens.gather(1, ((counts[:, :1] - 1) % tokens.shape[1]))[:, 0]
    return wte[last.clamp(min=0)] + wpe[counts[:, 1]]


def norm_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None,
    bias: Tensor | None = None, *,
    gelu: bool = False, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """layer_norm(x) weight^T + bias, and with `gelu` the GELU of that.

    x: (B, K). weight: (N, K). norm_weight, norm_bias: (K,). bias: (N,).
    Returns (B, N) in the weight's dtype.
    """
    normed = layer_norm(x, norm_weight, norm_bias, eps).to(weight.dtype)
    if gelu:
        return _gelu(normed @ weight.T, bias)
    return F.linear(normed, weight, None if bias is None else bias.to(weight.dtype))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + x weight^T + bias, in the residual's dtype.
    x: (B, K), weight: (N, K), residual: (B, N), bias: (N,)."""
    branch = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return (residual + branch).to(residual.dtype)


def sample_tokens(
    logits: Tensor, tokens: Tensor, counts: Tensor, seed: int | Tensor, *,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
) -> None:  # fmt: skip
    """Samples the next token of each sequence, stores it in `tokens` and increments `counts`.

    logits: (B, V). tokens: (B, N) int64, a ring buffer: token number n is stored in column n mod N.
    counts: int64, B rows: column 0 is n, the number of tokens so far; all columns are incremented.

    Logits are divided by temperature; at 0 the most likely token is taken. top_k keeps the k most
    likely tokens. top_p (nucleus sampling, Holtzman et al. 2020) then keeps the smallest set of
    most likely tokens whose probability, among the tokens that top_k kept, is at least top_p. Of
    equal logits those with the smallest token ids are kept. The mass of a kept token is the integer
    part of 2^40 exp((logit - max logit) / temperature): sums of integers do not depend on the
    order. The sampled token is the first one, in order of token id, at which the running sum of
    masses exceeds `uniform` times their total. So, with the same options, it depends only on its
    logits, the seed, the sequence's index in the batch, and n. The token is -1 if a logit is not
    finite.
    ValueError: temperature is below 0 or not finite, top_k below 1, top_p outside (0, 1], or V
    outside [1, MAX_V].
    """
    checks.seed_of(seed, logits=logits)
    V = logits.shape[1]
    inverse, k = inverse_temperature_and_k(V, temperature, top_k, top_p)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, index = x.nan_to_num().sort(dim=-1, descending=True, stable=True)
    mass = ((ordered - ordered[:, :1]) * inverse).exp().mul(2.0**MASS_BITS).long()
    mass[:, k:].zero_()
    if top_p is not None and top_p < 1:
        wanted = (mass.sum(-1, keepdim=True).double() * top_p).ceil()
        mass *= mass.cumsum(-1) - mass < wanted
    mass = mass.gather(1, index.argsort(-1))  # in the order of token ids
    total = mass.sum(-1)
    target = (uniform(seed, counts[:, 0]) * total.double()).long().minimum(total - 1)
    token = (mass.cumsum(-1) <= target[:, None]).sum(-1)
    token = token.where(x.isfinite().all(-1), -1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    tokens.copy_(token[:, None].where(columns == counts[:, :1] % len(columns), tokens))
    counts += 1


def inverse_temperature_and_k(
    V: int, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[float, int]:
    """(1 / temperature, at most MAX_INVERSE; top_k, at most V). Temperature 0: (1, 1)."""
    if not 1 <= V <= MAX_V:
        raise ValueError(f"logits must have 1 to {MAX_V:,} columns, got {V:,}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number, 0 or above, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if temperature == 0:
        return 1.0, 1
    inverse = min(1 / temperature, MAX_INVERSE)
    return inverse, V if top_k is None else min(top_k, V)


def uniform(seed: int | Tensor, number: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits, one for each of B sequences.

    number: (B,) int64, how many tokens a sequence has before the one to sample. `dropout.philox`
    gets the counter (low and high 32 bits of number, sequence index, 2).
    """
    sequence = torch.arange(len(number), device=number.device)
    m32 = 0xFFFFFFFF
    words = dropout.philox(seed, number & m32, number >> 32, sequence, torch.full_like(sequence, 2))
    return ((words[0] << 21) | (words[1] >> 11)).double() * 2.0**-53


_gelu = gelu  # `norm_linear` has an argument of that name


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
