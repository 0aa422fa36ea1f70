"""Baselines of the ops without a gradient: the one-token ops as one would write them in PyTorch.

Some of `builtin`'s are eager's, because a sampled token has to be the same with any ops and the
other two are plain PyTorch anyway. `naive` has no such duty, and torch.compile takes it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from irongpt_kernels import op_specs
from irongpt_kernels.builtin import write_row
from irongpt_kernels.op_inputs import RING, TOP_K
from torch import Tensor

OPTIMIZERS = tuple(spec.name for spec in op_specs.OPTIMIZERS)
TOKEN = tuple(spec.name for spec in op_specs.TOKEN)
OPS = (*OPTIMIZERS, *TOKEN)
AS_EAGER = ("embed_tokens", "linear_add", "sample_tokens")  # in builtin
COLDEST = 1e-6  # a temperature at which the most likely token is sampled

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


def naive(op: str, temperature: float) -> Function:
    """The op as one would write it; that of norm_linear is builtin's."""
    return {
        "embed_tokens": _embed,
        "decode_attention": _decode_attention,
        "linear_add": lambda x: (x["residual"] + F.linear(x["x"], x["weight"]),),
        "sample_tokens": lambda x: _sample(x, temperature),
    }[op]


def _embed(x: Inputs) -> tuple[Tensor, ...]:
    rows = torch.arange(len(x["tokens"]), device=x["tokens"].device)
    last = x["tokens"][rows, (x["counts"][:, 0] - 1) % RING]
    return (F.embedding(last, x["wte"]) + F.embedding(x["counts"][:, 1], x["wpe"]),)


def _decode_attention(x: Inputs) -> tuple[Tensor, ...]:
    """A static cache: one row is written, and all rows are attended to behind a mask."""
    cache_k, cache_v = x["cache_k"], x["cache_v"]
    q, k, v = x["qkv"].permute(2, 0, 3, 1, 4)  # (B, H, 1, D)
    seen = write_row(k[:, :, 0], v[:, :, 0], cache_k, cache_v, x["position"])[:, :, None]
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen)
    return out.transpose(1, 2), cache_k, cache_v


def _sample(x: Inputs, temperature: float) -> tuple[Tensor, ...]:
    logits, tokens, counts = x["logits"], x["tokens"], x["counts"]
    scores = logits.float() / max(temperature, COLDEST)
    best, which = scores.topk(min(TOP_K, logits.shape[1]))
    # As multinomial samples, but without its look at the probabilities on the host.
    race = best.softmax(-1) / torch.empty_like(best).exponential_()
    sampled = which.gather(1, race.argmax(-1, keepdim=True))
    tokens.scatter_(1, counts[:, :1] % RING, sampled)
    counts += 1
    return tokens, counts
