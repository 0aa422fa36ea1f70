"""
Every op by PyTorch's own fused functions: the default of the model, and what a kernel has to beat.

The contract is that of `eager`, but for dropout: PyTorch's global generator decides what is
dropped, and the seed is ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from irongpt_kernels import scaling
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


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
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


def unscale(
    grads: list[Tensor],
    scale: Tensor,
    good_steps: Tensor,
    steps: Tensor,
    *,
    max_norm: float,
    calm: int = 0,
) -> Tensor:
    """See `eager.unscale`."""
    norms: dict[int, Tensor] = {}
    for dtype in {g.dtype for g in grads}:  # a fused pass takes tensors of one dtype
        at = [i for i, g in enumerate(grads) if g.dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        norms |= zip(at, torch._foreach_norm([grads[i] for i in at], 2.0, wide), strict=True)
    norm = torch.linalg.vector_norm(torch.stack([norms[i] for i in range(len(grads))]))
    return scaling.finish(norm, scale, good_steps, steps, max_norm, calm)


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
    """See `eager.adamw`. Gradients of float32 end divided, as PyTorch leaves them."""
    _, divisor, overflow = unscaled.unbind()
    narrow = [i for i, (p, g) in enumerate(zip(params, grads, strict=True)) if g.dtype != p.dtype]
    if narrow:  # the fused pass wants them in the type of the weights
        wide = [torch.empty_like(params[i]) for i in narrow]
        torch._foreach_copy_(wide, [grads[i] for i in narrow])
        widened = dict(zip(narrow, wide, strict=True))
        grads = [widened.get(i, g) for i, g in enumerate(grads)]
    every_step = steps.unbind()
    for decay in dict.fromkeys(weight_decays):
        at = [i for i, d in enumerate(weight_decays) if d == decay]
        weights, gradients, m, v = (
            [tensors[i] for i in at] for tensors in (params, grads, exp_avgs, exp_avg_sqs)
        )
        torch._fused_adamw_(
            weights,
            gradients,
            m,
            v,
            [],
            [every_step[i] for i in at],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=overflow,
        )
    if copies:
        torch._foreach_copy_(copies, params[: len(copies)])


def muon_momentum(
    grads: list[Tensor], momentum: Tensor, unscaled: Tensor, *, beta: float, dtype: torch.dtype
) -> Tensor:
    """See `eager.muon_momentum`."""
    _, divisor, overflow = unscaled.unbind()
    g = torch.stack(grads) / divisor.view(1, 1, 1)  # of three dimensions, which makes it float32
    g.masked_fill_(overflow > 0, 0)
    momentum.lerp_(g, (1 - beta) * (1 - overflow))
    ahead = g.lerp_(momentum, beta)
    return (ahead / (ahead.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)


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
    """See `eager.muon_update`."""
    lr = lr * (1 - unscaled[2])
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, list((update * (lr * -scale).view(1, 1, 1)).unbind()))
    if copies:
        torch._foreach_copy_(copies, params)
