"""A small model in which every parameter matters, and tokens for it."""

import torch
from irongpt_kernels import eager
from torch import Tensor

from irongpt.config import GPTConfig
from irongpt.model import GPT

CONFIG = GPTConfig(
    vocab_size=65, n_layer=3, n_head=2, n_embd=32, context=24, dropout=0.0, bias=True
)


def build(config: GPTConfig = CONFIG, ops=eager) -> GPT:
    """Norm weights are about 1, biases are not 0, and matrices are large."""
    generator = torch.Generator().manual_seed(0)
    model = GPT(config, ops)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            p += ".ln_" in "." + name and name.endswith("weight")
    return model


def tokens(B: int = 2, T: int = CONFIG.context, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (B, T), generator=generator)
