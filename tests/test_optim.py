from dataclasses import replace

import pytest
import torch
from numerics import OUTPUTS, assert_rule
from torch import nn

from irongpt import optim
from irongpt.config import PRESETS, TrainConfig

CONFIG = TrainConfig(**{**PRESETS["nano"].train, "lr": 1e-2, "grad_clip": 1.0})
CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def give_gradients(net: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [t for p in net.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in [*net.parameters(), *state]]


@pytest.mark.parametrize(
    ("decay", "expected"),
    [  # at steps 0, 3, 4, 7, 10, 12, of warmup 4, iters 10, lr 1, min_lr 0.1
        ("constant", [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]),
        ("cosine", [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_the_schedule(decay, expected):
    config = replace(CONFIG, lr=1.0, min_lr=0.1, warmup=4, iters=10, decay=decay)
    assert [optim.lr_at(step, config) for step in (0, 3, 4, 7, 10, 12)] == pytest.approx(expected)


def test_cosine_is_above_the_line_first_and_below_it_later():
    line, cosine = (replace(CONFIG, warmup=0, iters=100, decay=d) for d in ("linear", "cosine"))
    assert optim.lr_at(25, cosine) > optim.lr_at(25, line)
    assert optim.lr_at(75, cosine) < optim.lr_at(75, line)


def test_only_matrices_decay():
    net = model()
    decayed, kept = optim.adamw(net, CONFIG).param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert decayed["weight_decay"] == CONFIG.weight_decay
    assert kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(net.parameters()))


def reference_step(params, moments, grads, t: int) -> None:
    """AdamW with clipping, in float64, from the paper."""
    norm = torch.sqrt(sum((g**2).sum() for g in grads))
    for p, (m, v), g in zip(params, moments, grads, strict=True):
        g = g * min(1.0, CONFIG.grad_clip / (float(norm) + 1e-6))
        m.mul_(CONFIG.beta1).add_((1 - CONFIG.beta1) * g)
        v.mul_(CONFIG.beta2).add_((1 - CONFIG.beta2) * g**2)
        m_hat, v_hat = m / (1 - CONFIG.beta1**t), v / (1 - CONFIG.beta2**t)
        p.mul_(1 - CONFIG.lr * (CONFIG.weight_decay if p.dim() >= 2 else 0))
        p.sub_(CONFIG.lr * m_hat / (v_hat.sqrt() + 1e-8))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_fifty_steps_are_adamw_on_clipped_gradients_whatever_the_loss_scale(scale):
    net, baseline = model(), model()
    params = [p.detach().double() for p in net.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    optimizer, scaler = optim.adamw(net, CONFIG), optim.LossScaler(False, CPU)
    plain = optim.adamw(baseline, CONFIG)
    scaler.scale.fill_(scale)
    for t in range(1, 51):
        size = 10.0 if t % 2 else 0.01  # every other step is clipped
        give_gradients(net, t, size * scale)
        give_gradients(baseline, t, size)
        grads = [p.grad.double() for p in baseline.parameters()]
        norm = optim.step(optimizer, scaler, CONFIG.lr, CONFIG.grad_clip)
        expected = nn.utils.clip_grad_norm_(baseline.parameters(), CONFIG.grad_clip)
        torch.testing.assert_close(norm, expected)
        plain.step()
        reference_step(params, moments, grads, t)
    for ours, theirs, oracle in zip(net.parameters(), baseline.parameters(), params, strict=True):
        assert_rule(OUTPUTS, ours.detach(), theirs.detach(), oracle)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad, enabled):
    net = model()
    optimizer, scaler = optim.adamw(net, CONFIG), optim.LossScaler(enabled, CPU)
    give_gradients(net, 1)
    optim.step(optimizer, scaler, CONFIG.lr, 1.0)
    before = snapshot(net, optimizer)
    give_gradients(net, 2)
    list(net.parameters())[2].grad[0] = bad
    norm = optim.step(optimizer, scaler, CONFIG.lr, 1.0)
    assert not norm.isfinite()
    after = snapshot(net, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.scale == (32768 if enabled else 1)
    give_gradients(net, 3)
    optim.step(optimizer, scaler, CONFIG.lr, 1.0)
    assert not torch.equal(before[0], snapshot(net, optimizer)[0])


def test_the_scale_doubles_after_a_calm_and_only_then(monkeypatch):
    monkeypatch.setattr(optim.LossScaler, "calm", 3)
    scaler = optim.LossScaler(True, CPU)
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    scales = []
    for overflow in (good, good, bad, good, good, good, good, good, good):
        scaler.update(overflow)
        scales.append(float(scaler.scale) / 65536)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]


def test_the_scale_stays_within_its_bounds(monkeypatch):
    monkeypatch.setattr(optim.LossScaler, "calm", 1)
    scaler = optim.LossScaler(True, CPU)
    for _ in range(40):
        scaler.update(torch.tensor(1.0))
    assert scaler.scale == 1
    for _ in range(40):
        scaler.update(torch.tensor(0.0))
    assert scaler.scale == 2**24
