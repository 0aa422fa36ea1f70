"""Every op as a Triton kernel, with the contract and the dropout masks of `eager`.

A module has the kernels of one op or of related ops, and a docstring with formulas, memory traffic
and limits. Every op raises TypeError or ValueError for types, dtypes, shapes, devices and numbers
that it does not support. On a GPU it does not read the values of ids and positions: the limits say
what happens if one is out of range. Floating tensors are float32, float16 or bfloat16. No op has a
second or a forward-mode derivative: asking for one raises an error. There are no atomics, so every
run gives the same bits. exponential, philox and attention_tiles are helpers. Importing this package
imports Triton.
"""

from irongpt_kernels.fused.adamw import adamw
from irongpt_kernels.fused.attention import causal_attention, causal_attention_packed
from irongpt_kernels.fused.cross_entropy import cross_entropy
from irongpt_kernels.fused.decode_attention import decode_attention
from irongpt_kernels.fused.decode_linear import linear_add, norm_linear
from irongpt_kernels.fused.decode_tokens import embed_tokens, sample_tokens
from irongpt_kernels.fused.embed_layer_norm import embed_layer_norm
from irongpt_kernels.fused.gelu import gelu
from irongpt_kernels.fused.grad_norm import grad_norm, sum_shards
from irongpt_kernels.fused.layer_norm import dropout_add_layer_norm, layer_norm
from irongpt_kernels.fused.linear_cross_entropy import linear_cross_entropy
from irongpt_kernels.fused.muon import muon_momentum, muon_update
from irongpt_kernels.fused.norm_parameters import norm_parameters
from irongpt_kernels.fused.softmax import softmax

__all__ = [
    "adamw", "causal_attention", "causal_attention_packed", "cross_entropy", "decode_attention",
    "dropout_add_layer_norm", "embed_layer_norm", "embed_tokens", "gelu", "grad_norm", "layer_norm",
    "linear_add", "linear_cross_entropy", "muon_momentum", "muon_update", "norm_linear",
    "norm_parameters", "sample_tokens", "softmax", "sum_shards",
]  # fmt: skip
