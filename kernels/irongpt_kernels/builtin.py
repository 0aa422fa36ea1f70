"""Every op with PyTorch's own functions where it has them: the model's default, and our baseline.

The contract is that of `eager`, unless a docstring says otherwise. Dropout always differs:
PyTorch's global generator decides which elements are dropped, and the seed is ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels import dropout
from irongpt_kernels.eager import GradStats, append_to_cache, grad_stats, padded_logits
from irongpt_kernels.eager import embed_tokens as embed_tokens
from irongpt_kernels.eager import linear_add as linear_add
from irongpt_kernels.eager import norm_parameters as norm_parameters
from irongpt_kernels.eager import sample_tokens as sample_tokens


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.causal_attention`."""
    dropout.check(dropout_p)
    q, scale = _positive_scale(q, scale)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # most backends need no copy


def _positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """A query and a positive scale that give the same scores, since PyTorch takes no other
    scale."""
    if scale is None or scale > 0:
        return q, scale
    return (-q, -scale) if scale else (q * 0, 1.0)


def causal_attention_packed(
    qkv: Tensor, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.causal_attention_packed`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = causal_attention(q, k, v, dropout_p=dropout_p, seed=seed, scale=scale)
    return out.transpose(1, 2)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.layer_norm`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype or x.dtype)


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


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *,
    classes: int | None = None, loss_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `eager.linear_cross_entropy`. torch.nn.functional.linear_cross_entropy of torch 2.13 is
    not used, because outside autocast its loss has the 16-bit dtype of its inputs."""
    return cross_entropy(padded_logits(x, weight, classes), targets)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `eager.gelu`."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh").to(x.dtype)


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    dropout_p: float = 0.0, seed: int | Tensor | None = None, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.dropout_add_layer_norm`."""
    dropout.check(dropout_p)
    total = (residual + F.dropout(branch, dropout_p)).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps).to(branch.dtype)


def embed_layer_norm(
    wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None = None,
    eps: float = 1e-5, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.embed_layer_norm`."""
    x = F.embedding(idx, wte) + wpe
    return x, layer_norm(x, weight, bias, eps, dtype)


def grad_norm(
    grads: list[Tensor], scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> Tensor:  # fmt: skip
    """See `eager.grad_norm`."""
    norms: dict[int, Tensor] = {}
    for dtype in {g.dtype for g in grads}:  # _foreach_norm is fused only for tensors of one dtype
        at = [i for i, g in enumerate(grads) if g.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        norms |= zip(at, torch._foreach_norm([grads[i] for i in at], 2.0, wide), strict=True)
    norm = torch.linalg.vector_norm(torch.stack([norms[i] for i in range(len(grads))]))
    return grad_stats(norm, scale, growth_tracker, state_steps, max_norm, growth_interval)


def sum_shards(
    shards: Tensor, scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
    max_norm: float, growth_interval: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `eager.sum_shards`."""
    total = shards[0].to(torch.promote_types(shards.dtype, torch.float32), copy=True)
    for shard in shards[1:]:
        total += shard
    norm = torch.linalg.vector_norm(total)
    return total, grad_stats(norm, scale, growth_tracker, state_steps, max_norm, growth_interval)


def adamw(
    params: list[Tensor], low_precision_params: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], state_steps: Tensor, lr: Tensor,
    stats: Tensor, *,
    beta1: float, beta2: float, weight_decays: list[float], eps: float = 1e-8,
) -> None:  # fmt: skip
    """See `eager.adamw`. Like PyTorch, it unscales float32 gradients in place."""
    _, grad_scale, found_inf = GradStats(*stats)
    at = [i for i, (p, g) in enumerate(zip(params, grads, strict=True)) if g.dtype != p.dtype]
    if at:  # _fused_adamw_ needs gradients in the dtype of the weights
        float32_grads = [torch.empty_like(params[i]) for i in at]
        torch._foreach_copy_(float32_grads, [grads[i] for i in at])
        converted = dict(zip(at, float32_grads, strict=True))
        grads = [converted.get(i, g) for i, g in enumerate(grads)]
    steps = state_steps.unbind()
    for decay in dict.fromkeys(weight_decays):
        at = [i for i, d in enumerate(weight_decays) if d == decay]
        weights, gradients, m, v = (
            [tensors[i] for i in at] for tensors in (params, grads, exp_avgs, exp_avg_sqs)
        )
        torch._fused_adamw_(
            weights, gradients, m, v, [], [steps[i] for i in at],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False,
            maximize=False, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
    if low_precision_params:
        torch._foreach_copy_(low_precision_params, params[: len(low_precision_params)])


def muon_momentum(
    grads: list[Tensor], momentum: Tensor, stats: Tensor, *, beta: float, dtype: torch.dtype
) -> Tensor:
    """See `eager.muon_momentum`."""
    _, grad_scale, found_inf = GradStats(*stats)
    g = torch.stack(grads) / grad_scale.view(1, 1, 1)  # 0-d would not promote 16-bit ones
    g.masked_fill_(found_inf > 0, 0)
    momentum.lerp_(g, (1 - beta) * (1 - found_inf))
    nesterov = g.lerp_(momentum, beta)
    return (nesterov / (nesterov.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)


def muon_update(
    params: list[Tensor], low_precision_params: list[Tensor], update: Tensor, lr: Tensor,
    stats: Tensor, *,
    scale: float, weight_decay: float,
) -> None:  # fmt: skip
    """See `eager.muon_update`."""
    lr = lr * (1 - GradStats(*stats).found_inf)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, list((update * (lr * -scale).view(1, 1, 1)).unbind()))
    if low_precision_params:
        torch._foreach_copy_(low_precision_params, params)


def decode_attention(
    qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *, scale: float | None = None
) -> Tensor:
    """See `eager.decode_attention`, but cache rows after `position` may be read and must be finite.

    On a CPU the new row is written by indexing: a position of N or above raises IndexError, and a
    negative one counts from the end.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
    q, scale = _positive_scale(q, scale)
    write = append_by_indexing if qkv.device.type == "cpu" else append_to_cache
    mask = write(k[:, :, 0], v[:, :, 0], cache_k, cache_v, position)[:, :, None]  # (B, 1, 1, N)
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def append_by_indexing(
    k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor
) -> Tensor:
    """Like `append_to_cache`, but by indexing, so that only the new row is written."""
    sequences, columns = (torch.arange(n, device=k.device) for n in (len(k), cache_k.shape[2]))
    cache_k[sequences, :, position] = k.to(cache_k.dtype)
    cache_v[sequences, :, position] = v.to(cache_v.dtype)
    return columns <= position[:, None, None]


def norm_linear(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None,
    bias: Tensor | None = None, *,
    gelu: bool = False, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """See `eager.norm_linear`."""
    normed = layer_norm(x, norm_weight, norm_bias, eps).to(weight.dtype)
    if gelu:
        return _gelu(F.linear(normed, weight), bias)
    return F.linear(normed, weight, None if bias is None else bias.to(weight.dtype))


_gelu = gelu  # `norm_linear` has an argument of that name
