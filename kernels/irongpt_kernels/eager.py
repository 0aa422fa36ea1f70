"""
Every op in plain PyTorch: the specification, the eager path of the model, and, run in float64, the
oracle that the other implementations are held to.

Statistics and sums are taken in float32 (float64 for float64 inputs), results come in the dtype of
the first argument unless said otherwise.
"""

import math

import torch
from torch import Tensor

from irongpt_kernels import dropout, scaling
from irongpt_kernels.decode_eager import cached_attention as cached_attention
from irongpt_kernels.decode_eager import draw_tokens as draw_tokens
from irongpt_kernels.decode_eager import embed_tokens as embed_tokens
from irongpt_kernels.decode_eager import linear_add as linear_add
from irongpt_kernels.decode_eager import norm_linear as norm_linear


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """dropout(softmax(scale q k^T, no row sees a later column)) v, after Vaswani et al. 2017.

    q, k, v: (B, H, T, D), any strides. scale: 1/sqrt(D) unless given. Dropout is on the weights.
    Returns (B, H, T, D), a view whose (B, T, H, D) memory is contiguous.
    """
    B, H, T, D = q.shape
    weights = softmax(
        q @ k.transpose(-2, -1), scale=D**-0.5 if scale is None else scale, causal=True
    )  # (B, H, T, T)
    if dropout_p > 0:
        keep = dropout.attention_keep(_need(seed), B, H, T, dropout_p, q.device)
        weights = weights * keep * dropout.keep_scale(dropout_p)
    out = weights.to(v.dtype) @ v
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def causal_attention_packed(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`causal_attention` from a packed projection to the next one, in the layout of both.

    qkv: (B, T, 3, H, D), any strides. Returns (B, T, H, D), contiguous.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, scale=scale)
    return out.transpose(1, 2)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016).

    x: (..., N). weight, bias: (N,). dtype: of the result, x's own unless given. The
    variance is the biased one, from centred values.
    """
    centred = _wide(x) - _wide(x).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd * weight
    return (y if bias is None else y + bias).to(dtype or x.dtype)


def softmax(x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor:
    """exp(scale x) over its sum, along the last dimension.

    x: (..., N). causal: the last two dimensions are (T, T), and row i sees columns 0 to i.
    """
    scores = _wide(x) * scale
    if causal:
        T = x.shape[-1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[target] over the rows whose target is not `ignore_index`.

    logits: (M, V). targets: (M,) int64. Returns a 0-d tensor, float32 at least; NaN where every
    row is ignored, as in PyTorch.
    """
    counted = targets != ignore_index
    log_p = _wide(logits).log_softmax(-1)  # logsumexp - logit loses a confident class's digits
    picked = log_p.gather(1, targets.masked_fill(~counted, 0)[:, None])[:, 0]
    return -picked.masked_fill(~counted, 0.0).sum() / counted.sum()


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias in the tanh approximation (Hendrycks and Gimpel 2016). x: (..., N)."""
    z = _wide(x) if bias is None else _wide(x) + bias
    y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return y.to(x.dtype)


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
    """The step between two branches of a pre-norm block: residual + dropout(branch), and its norm.

    branch, residual: (..., N). weight, bias: (N,).
    Returns the sum in the residual's dtype, and its layer norm in the branch's dtype.
    """
    if dropout_p > 0:
        N = branch.shape[-1]
        M = branch.numel() // N
        keep = dropout.row_keep(_need(seed), M, N, dropout_p, branch.device).view(branch.shape)
        branch = branch * keep * dropout.keep_scale(dropout_p)
    total = (residual + branch).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps).to(branch.dtype)


def unscale(
    grads: list[Tensor],
    scale: Tensor,
    good_steps: Tensor,
    steps: Tensor,
    *,
    max_norm: float,
    calm: int = 0,
) -> Tensor:
    """What `adamw` has to know of the gradients of scale * loss before it uses any of them.

    scale: 0-d float32. good_steps: 0-d int64, steps since the last change of the scale. steps:
    (n,) float32, updates so far; one is added to each unless a gradient is not finite. calm: after
    so many good steps the scale doubles, and halves after a bad one, between 1 and 2^24 (dynamic
    loss scaling, Micikevicius et al. 2018); 0 leaves it. Returns (norm, divisor, overflow), (3,):
    the norm of all unscaled gradients, what to divide gradients by so that it is `max_norm` at
    most, and 1 if it is not finite, else 0.
    """
    total = torch.stack([_wide(g).square().sum() for g in grads]).sum()
    return scaling.finish(total.sqrt(), scale, good_steps, steps, max_norm, calm)


def adamw(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Tensor,
    lr: Tensor,
    unscaled: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decays: list[float],
    eps: float = 1e-8,
) -> None:
    """AdamW (Loshchilov and Hutter 2019) in place, unless `unscaled` tells of an overflow.

    params, exp_avgs, exp_avg_sqs: contiguous float32. grads: of the params' shapes, of any dtype.
    copies: of the first params, rounded to their own dtype. steps: (n,), with this one. lr: 0-d.
    unscaled: what `unscale` returned.
    """
    _, divisor, overflow = unscaled.unbind()
    keep = overflow > 0
    corrections = [1 - beta ** steps.double() for beta in (beta1, beta2)]
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        bias1, bias2 = (c[i].to(p.dtype) for c in corrections)
        g = g.to(p.dtype) / divisor
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g.square()
        new_p = p - lr * weight_decays[i] * p
        new_p -= lr / bias1 * new_m / (new_v.sqrt() / bias2.sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(old.where(keep, new))
    for copy, p in zip(copies, params, strict=False):
        copy.copy_(p)


def muon_momentum(
    grads: list[Tensor], momentum: Tensor, unscaled: Tensor, *, beta: float, dtype: torch.dtype
) -> Tensor:
    """What Muon (Jordan et al. 2024) makes orthogonal: Nesterov's look ahead, of Frobenius norm 1.

    grads: n of (rows, columns), of any one dtype. momentum: (n, rows, columns) float32, changes in
    place. unscaled: what `unscale` returned; if it tells of an overflow, momentum stays and the
    result is finite and of no use. Returns (n, rows, columns) of `dtype`.
    """
    _, divisor, overflow = unscaled.unbind()
    keep = overflow > 0
    g = (torch.stack(grads).to(momentum.dtype) / divisor).masked_fill(keep, 0)
    new = beta * momentum + (1 - beta) * g
    ahead = beta * new + (1 - beta) * g
    momentum.copy_(momentum.where(keep, new))
    return (ahead / (ahead.square().sum((1, 2), keepdim=True).sqrt() + 1e-7)).to(dtype)


def muon_update(
    params: list[Tensor],
    copies: list[Tensor],
    update: Tensor,
    lr: Tensor,
    unscaled: Tensor,
    *,
    scale: float,
    weight_decay: float,
) -> None:
    """Weights less lr times scale times their update, decayed as by `adamw`, unless `unscaled`
    tells of an overflow.

    params: n of (rows, columns), contiguous float32, change in place. copies: of each, rounded to
    their own dtype, or none at all. update: (n, rows, columns), of any dtype. lr: 0-d.
    """
    keep = unscaled[2] > 0
    for p, u in zip(params, update, strict=True):
        p.copy_(p.where(keep, p - lr * weight_decay * p - lr * scale * u.to(p.dtype)))
    for copy, p in zip(copies, params, strict=False):
        copy.copy_(p)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _need(seed: int | Tensor | None) -> int | Tensor:
    if seed is None:
        raise ValueError("dropout_p > 0 needs a seed")
    return seed
