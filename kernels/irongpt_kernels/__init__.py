"""The operations of a GPT in three interchangeable implementations.

    irongpt_kernels.eager      plain PyTorch: the specification, and the reference of every test
    irongpt_kernels.builtin    PyTorch's own functions, such as scaled_dot_product_attention
    irongpt_kernels.fused      our Triton kernels, one module per op or group of related ops

Each module satisfies the Protocol `Ops`, and the caller imports the one it wants. Only `fused`
imports Triton. `eager` documents shapes, dtypes and results.

`seed` is a Python int or a 0-d int64 tensor on the device of the inputs. Which elements dropout
zeroes depends only on dropout_p, the seed and their position (see `dropout`), so `eager` and
`fused` drop the same ones. Dropout in `builtin` uses PyTorch's global generator, not the seed.

Sizes: B batch, H heads, T positions, D head dimension, C width, N features, M rows, V vocabulary.
In the ops of a decoding step N has other meanings:

    decode_attention               the length of the cache of keys and values
    embed_tokens, sample_tokens    the number of tokens that the buffer of a sequence can hold
    norm_linear, linear_add        the output features of a linear layer; K: its input features
"""

from typing import Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """The signatures of the ops. A model runs on any module that has all of them."""

    def causal_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *,
        dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
    ) -> Tensor: ...  # fmt: skip
    def causal_attention_packed(
        self, qkv: Tensor, *,
        dropout_p: float = 0.0, seed: int | Tensor | None = None, scale: float | None = None,
    ) -> Tensor: ...  # fmt: skip
    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...  # fmt: skip
    def softmax(self, x: Tensor, *, scale: float = 1.0, causal: bool = False) -> Tensor: ...
    def cross_entropy(
        self, logits: Tensor, targets: Tensor, ignore_index: int = -100
    ) -> Tensor: ...
    def linear_cross_entropy(
        self, x: Tensor, weight: Tensor, targets: Tensor, *,
        classes: int | None = None, loss_scale: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip
    def gelu(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def dropout_add_layer_norm(
        self, branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *,
        dropout_p: float = 0.0, seed: int | Tensor | None = None, eps: float = 1e-5,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def embed_layer_norm(
        self, wte: Tensor, wpe: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None = None,
        eps: float = 1e-5, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def norm_parameters(
        self, params: list[Tensor], rows: int, dtype: torch.dtype
    ) -> list[Tensor]: ...
    def grad_norm(
        self, grads: list[Tensor], scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
        max_norm: float, growth_interval: int = 0,
    ) -> Tensor: ...  # fmt: skip
    def sum_shards(
        self, shards: Tensor, scale: Tensor, growth_tracker: Tensor, state_steps: Tensor, *,
        max_norm: float, growth_interval: int = 0,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def adamw(
        self, params: list[Tensor], low_precision_params: list[Tensor], grads: list[Tensor],
        exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], state_steps: Tensor, lr: Tensor,
        stats: Tensor, *,
        beta1: float, beta2: float, weight_decays: list[float], eps: float = 1e-08,
    ) -> None: ...  # fmt: skip
    def muon_momentum(
        self, grads: list[Tensor], momentum: Tensor, stats: Tensor, *,
        beta: float, dtype: torch.dtype,
    ) -> Tensor: ...  # fmt: skip
    def muon_update(
        self, params: list[Tensor], low_precision_params: list[Tensor], update: Tensor, lr: Tensor,
        stats: Tensor, *,
        scale: float, weight_decay: float,
    ) -> None: ...  # fmt: skip
    def decode_attention(
        self, qkv: Tensor, cache_k: Tensor, cache_v: Tensor, position: Tensor, *,
        scale: float | None = None,
    ) -> Tensor: ...  # fmt: skip
    def embed_tokens(self, tokens: Tensor, counts: Tensor, wte: Tensor, wpe: Tensor) -> Tensor: ...
    def norm_linear(
        self, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor | None = None,
        bias: Tensor | None = None, *,
        gelu: bool = False, eps: float = 1e-5,
    ) -> Tensor: ...  # fmt: skip
    def linear_add(
        self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...
    def sample_tokens(
        self, logits: Tensor, tokens: Tensor, counts: Tensor, seed: int | Tensor, *,
        temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    ) -> None: ...  # fmt: skip
