"""The presets as the benchmarks measure them."""

from typing import NamedTuple

import torch

from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig, TrainConfig
from irongpt.data.batches import Tokens

N_IDS = 400_000


class Setting(NamedTuple):
    """What a training run starts from."""

    model: GPTConfig
    recipe: TrainConfig
    tokens: Tokens


def model_of(preset: str) -> GPTConfig:
    """The model with the vocabulary of the preset's default corpus."""
    vocab_size = PRESETS[preset].vocab_size or WAR_AND_PEACE_VOCAB
    return GPTConfig(vocab_size=vocab_size, **PRESETS[preset].model)


def random_setting(preset: str, batch_size: int | None = None) -> Setting:
    """The preset with random tokens, because the speed of a step does not depend on the text.

    batch_size: sequences per step; None is the preset's.
    """
    model = model_of(preset)
    ids = torch.randint(model.vocab_size, (N_IDS,), generator=torch.Generator().manual_seed(1))
    recipe = PRESETS[preset].train | ({} if batch_size is None else {"batch_size": batch_size})
    return Setting(model, TrainConfig(**recipe), Tokens.of(ids))
