"""The fused ops as a set: a model computes and trains with them as it does on eager."""

import importlib

import numerics
import pytest
import torch
from irongpt_kernels import eager
from numerics import GRADIENTS, OUTPUTS, assert_rule

from irongpt.config import GPTConfig, TrainConfig
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

fused = importlib.import_module("irongpt_kernels.fused")
DEVICE = torch.device(numerics.DEVICE)
V, T = 29, 32
CLOSE = 2e-5  # Liger-Kernel's, for the relative gap of a float32 loss


def model(ops, dropout: float, bias: bool) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(V, n_layer=2, n_head=2, n_embd=32, context=T, dropout=dropout, bias=bias)
    return GPT(config, ops).to(DEVICE)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, shape, generator=generator).to(DEVICE)


def loss_and_gradients(gpt: GPT, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = tokens(2, 13)
    loss = gpt.loss(x[:, :-1], x[:, 1:], seed=seed)
    return loss.detach(), list(torch.autograd.grad(loss, list(gpt.parameters())))


@pytest.mark.parametrize(("bias", "dropout"), [(False, 0.2), (True, 0.0)])
def test_a_model_computes_what_it_computes_on_eager(bias: bool, dropout: float) -> None:
    ours, theirs, oracle = (model(ops, dropout, bias) for ops in (fused, eager, eager))
    oracle.double()
    x = tokens(2, 12)
    with torch.no_grad():
        assert_rule(OUTPUTS, *(gpt(x, seed=7) for gpt in (ours, theirs, oracle)))
    results = [loss_and_gradients(gpt, seed=7) for gpt in (ours, theirs, oracle)]
    assert_rule(OUTPUTS, *(loss for loss, _ in results))
    for gradients in zip(*(g for _, g in results), strict=True):
        assert_rule(GRADIENTS, *gradients)


def test_32_steps_of_training_match_eager(monkeypatch) -> None:
    grad_norm = importlib.import_module("irongpt_kernels.fused.grad_norm")
    monkeypatch.setattr(grad_norm, "MAX_TENSORS", 4)  # selecting one of many is slow here
    ids = tokens(600) % 7 * 3
    recipe = TrainConfig(
        iters=32, batch_size=1, lr=1e-2, warmup=4, decay="constant", weight_decay=0.1, eval_every=32
    )
    losses = []
    for ops in (fused, eager):
        config = GPTConfig(V, n_layer=1, n_head=1, n_embd=16, context=16, dropout=0.2)
        torch.manual_seed(0)
        trainer = Trainer(GPT(config, ops).to(DEVICE), ids, recipe, DEVICE, torch.float32)
        losses.append([float(trainer.train_step()[0]) for _ in range(32)])
    assert losses[1][-1] < losses[1][0] - 0.1  # it learns
    for step, (a, b) in enumerate(zip(*losses, strict=True)):
        assert abs(a - b) <= CLOSE * b, f"step {step}: {a} fused, {b} eager"
