"""The optimizer: schedule, AdamW, Muon, clipping, loss scaling."""

import math
from dataclasses import replace

import pytest
import torch
from numerics import GRADIENTS, OUTPUTS, assert_rule
from torch import nn

from irongpt.config import PRESETS, TrainConfig
from irongpt.training import muon
from irongpt.training import optimizer as optim

CONFIG = TrainConfig(**{**PRESETS["nano"].train, "lr": 1e-2, "grad_clip": 1.0, "ema": 0.0})
CPU = torch.device("cpu")


class Net(nn.Module):
    """Matrices in blocks, two of them of one shape, and other parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 7)])
        self.head = nn.Linear(7, 3)


def optimizer_of(
    net: nn.Module, loss_scale: float | None = None, name: str = "adamw", lr: float = CONFIG.lr
) -> optim.Optimizer:
    """Without a loss scale, or with one as in float16, from the given value on."""
    optimizer = optim.Optimizer(net, replace(CONFIG, optimizer=name))
    optimizer.lr.fill_(lr)
    optimizer.scaled = loss_scale is not None
    optimizer.scale.fill_(loss_scale or 1.0)
    return optimizer


def give_gradients(net: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    ("decay", "middle"),
    [
        ("constant", [1.0] * 3),
        ("linear", [0.85, 0.55, 0.4]),
        ("cosine", [0.55 + 0.225 * 3**0.5, 0.55, 0.325]),
    ],
)
def test_the_schedule(decay, middle):
    config = replace(CONFIG, lr=1.0, min_lr=0.1, warmup=4, iters=10, decay=decay)
    rates = [optim.lr_at(step, config) for step in (0, 3, 4, 5, 7, 8, 10, 12)]
    last = 1.0 if decay == "constant" else 0.1
    assert rates == pytest.approx([0.25, 1.0, 1.0, *middle, last, last])


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


@pytest.mark.parametrize("scale", [None, 65536.0])
def test_fifty_steps_are_adamw_on_clipped_gradients_whatever_the_loss_scale(scale):
    net, baseline = Net(), Net()
    params = [p.detach().double() for p in net.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    optimizer = optimizer_of(net, scale)
    decays = {p: CONFIG.weight_decay if p.dim() >= 2 else 0.0 for p in baseline.parameters()}
    plain = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay} for p, decay in decays.items()],
        lr=CONFIG.lr,
        betas=(CONFIG.beta1, CONFIG.beta2),
    )
    for t in range(1, 51):
        size = 10.0 if t % 2 else 0.01  # every other step is clipped
        give_gradients(net, t, size * (scale or 1))
        give_gradients(baseline, t, size)
        grads = [p.grad.double() for p in baseline.parameters()]
        norm = optimizer.step()
        expected = nn.utils.clip_grad_norm_(baseline.parameters(), CONFIG.grad_clip)
        torch.testing.assert_close(norm, expected)
        plain.step()
        reference_step(params, moments, grads, t)
    for ours, theirs, oracle in zip(net.parameters(), baseline.parameters(), params, strict=True):
        assert_rule(OUTPUTS, ours.detach(), theirs.detach(), oracle)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    net = Net()
    optimizer = optimizer_of(net, name="muon")
    assert set(optimizer.muon.momentum) == {block.weight for block in net.blocks}
    assert set(optimizer.adamw_params) == set(net.parameters()) - set(optimizer.muon.momentum)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """The iteration as it is published: every step from the matrix itself."""
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_groups_are_batched_by_their_smaller_side(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 4, 6), (1, 6, 4), (3, 5, 5), (2, 4, 9)]
    groups = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    groups = [x / x.norm(dim=(1, 2), keepdim=True) for x in groups]
    sizes, factor = [], muon._factor
    monkeypatch.setattr(muon, "_factor", lambda g, n: sizes.append(len(g)) or factor(g, n))
    for x, y in zip(groups, muon.orthogonal(groups), strict=True):
        torch.testing.assert_close(y, newton_schulz(x))
    assert sizes == [5, 5, 3, 3]


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 24), (1, 24, 6), (1, 1, 5)])
def test_orthogonal_keeps_singular_vectors_and_equalizes_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    (even,) = muon.orthogonal([x / x.norm(dim=(1, 2), keepdim=True)])
    # In x's own directions even is diagonal, with what the iteration makes of singular values.
    diagonal = u.mT @ even @ vt.mT
    sizes = diagonal.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.diag_embed(sizes), atol=1e-9, rtol=0)
    high = s > 0.05 * s.amax(dim=1, keepdim=True)
    assert 0.6 < sizes[high].min() <= sizes.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("least", [1.0, 1e-2, 1e-4])  # singular value, of the largest
@pytest.mark.parametrize("shape", [(48, 192), (48, 48), (144, 48)], ids=str)
def test_orthogonal_is_as_exact_as_the_published_iteration(dtype, least, shape):
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(n, 48, generator=generator, dtype=torch.float64) for n in shape]
    u, v = (torch.linalg.qr(f).Q for f in factors)
    x = (u * torch.logspace(0, math.log10(least), 48, dtype=torch.float64) @ v.mT)[None]
    x /= x.norm()
    (found,) = muon.orthogonal([x.to(dtype)])
    assert found.dtype == dtype
    # It is made of a gradient, so the tolerance of gradients applies.
    assert_rule(GRADIENTS, found, newton_schulz(x.to(dtype)), newton_schulz(x))


def test_the_iteration_has_float16_for_16_bits_on_a_gpu_and_the_steps_dtype_elsewhere():
    float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
    for dtype, on_gpu in ((float32, float32), (float16, float16), (bfloat16, float16)):
        assert muon.matmul_dtype(dtype, torch.device("cuda")) == on_gpu
        assert muon.matmul_dtype(dtype, CPU) == dtype


def test_saved_moments_share_no_storage():
    tensors = optimizer_of(Net(), name="muon").tensors()
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


def test_a_step_of_muon_is_the_formula_on_each_matrix():
    net = Net()
    optimizer = optimizer_of(net, 1024.0, "muon", lr=0.1)
    before = [block.weight.detach().double() for block in net.blocks]
    momentum = [torch.zeros_like(w) for w in before]
    for t in (1, 2, 3):
        give_gradients(net, t, 1024.0)
        grads = [block.weight.grad.double() / 1024 for block in net.blocks]
        norm = optimizer.step().double()
        for i, (g, w) in enumerate(zip(grads, before, strict=True)):
            g = g / (norm + 1e-6).clamp(min=1)
            momentum[i] = 0.95 * momentum[i] + 0.05 * g
            look = (0.05 * g + 0.95 * momentum[i])[None]
            update = newton_schulz(look / look.norm())[0]
            before[i] = w * (1 - 0.1 * CONFIG.weight_decay) - 0.1 * 0.2 * 7**0.5 * update
    for block, w in zip(net.blocks, before, strict=True):
        torch.testing.assert_close(block.weight.detach().double(), w, atol=1e-6, rtol=0)


def test_the_average_of_the_weights_follows_them() -> None:
    config, net = replace(CONFIG, ema=0.5), Net()
    optimizer = optim.Optimizer(net, config)
    optimizer.lr.fill_(config.lr)
    expected = [p.detach().clone() for p in net.parameters()]
    decays = [optim.average_decay_at(step, config) for step in range(12)]
    assert decays[:3] == [0.1, 2 / 11, 3 / 12]
    assert decays[8:] == [0.5] * 4
    for step, decay in enumerate(decays):
        give_gradients(net, step)
        optimizer.new_share.fill_(1 - decay)
        optimizer.step()
        expected = [
            decay * a + (1 - decay) * p for a, p in zip(expected, net.parameters(), strict=True)
        ]
    raw = [p.detach().clone() for p in net.parameters()]
    with optimizer.averaged():
        torch.testing.assert_close(list(net.parameters()), expected)
    assert all(map(torch.equal, net.parameters(), raw))
    names = [name for name in optimizer.tensors() if name.startswith("average.")]
    assert names == [f"average.{name}" for name, _ in net.named_parameters()]


def test_without_an_average_the_weights_are_evaluated() -> None:
    net = Net()
    optimizer, before = optimizer_of(net), list(map(torch.clone, net.parameters()))
    with optimizer.averaged():
        assert all(map(torch.equal, net.parameters(), before))
    assert not any(name.startswith("average.") for name in optimizer.tensors())
