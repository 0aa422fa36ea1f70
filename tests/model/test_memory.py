"""The memory of a training step, computed with fake tensors."""

import pytest
import torch
from irongpt_kernels import eager, fused

from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig
from irongpt.doctor import training_bytes

CONFIG = GPTConfig(29, n_layer=2, n_head=2, n_embd=32, context=16, dropout=0.2)
C, T, B, V, LAYERS = 32, 16, 4, 29, 2


def test_a_small_model_counted_by_hand() -> None:
    """Float32, fused: counts the numbers per token that the backward of a block needs."""
    got = training_bytes(CONFIG, B, fused, torch.float32)
    tokens, heads = B * T, 2
    parameters = V * C + T * C + LAYERS * (12 * C * C + 13 * C) + 2 * C
    # into qkv, qkv, attention's output, m and l, sums of two norms, two norms, their statistics,
    # fc without its bias, gelu; the stream and two norms are counted once each
    block = C + 3 * C + C + 2 * heads + 2 * C + C + 4 + 4 * C + 4 * C
    head = C + V + 2
    by_hand = 4 * (4 * parameters + tokens * (LAYERS * block + head))
    assert got == pytest.approx(by_hand, rel=0.1)


def test_fused_ops_need_at_most_a_third_of_eagers_memory() -> None:
    config = GPTConfig(WAR_AND_PEACE_VOCAB, **PRESETS["iron"].model)
    batch = int(PRESETS["iron"].train["batch_size"])
    sizes = {ops: training_bytes(config, batch, ops, torch.float16) for ops in (eager, fused)}
    assert sizes[fused] <= sizes[eager] / 3


def test_only_eager_stores_the_attention_weights() -> None:
    """Four times the context needs four times the memory, except for a matrix of T x T."""

    def activations(ops, context: int) -> int:
        config = GPTConfig(29, n_layer=2, n_head=2, n_embd=32, context=context, dropout=0.2)
        both = [training_bytes(config, batch, ops, torch.float32) for batch in (1, 2)]
        return both[1] - both[0]

    assert activations(eager, 512) > 8 * activations(eager, 128)
    assert activations(fused, 512) < 4.1 * activations(fused, 128)
