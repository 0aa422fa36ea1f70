"""The cross-entropy kernels within the tolerance of eager."""

import importlib
import math

import pytest
import torch
from extremes import extreme_logits
from irongpt_kernels import eager
from numerics import (
    DEVICE,
    EPS32,
    GRADIENTS,
    OUTPUTS,
    assert_op,
    assert_rule,
    each_dtype,
    run,
    values,
)
from torch import Tensor

kernel = importlib.import_module("irongpt_kernels.fused.cross_entropy")
INF = math.inf
LARGE_VOCABULARIES = [4096, 8192, 16384, 50257, 50304]  # the last two end in a partial block


@pytest.fixture(params=["one block", "blocks"])
def path(request, monkeypatch) -> None:
    """A row at once, and walked in blocks."""
    if request.param == "blocks":
        monkeypatch.setattr(kernel, "MAX_BLOCK", 16)
        monkeypatch.setattr(kernel, "TILE", 32)
        monkeypatch.setattr(kernel, "PARTS", 2)


def hold(logits: Tensor, targets: Tensor, upstream: float = 1.7, **options: object) -> None:
    inputs = dict(logits=logits, targets=targets.to(DEVICE))
    dloss = torch.tensor(upstream, device=DEVICE)
    assert_op(kernel, "cross_entropy", inputs, (dloss,), **options)


@each_dtype
@pytest.mark.parametrize("scale", [1, 20], ids=["untrained", "confident"])
@pytest.mark.parametrize("M", [1, 7, 19])
def test_cross_entropy(M: int, scale: int, dtype: torch.dtype, path: None) -> None:
    targets = torch.arange(M) * 3 % 50
    targets[1::7] = -100
    hold(values(M, 50, dtype=dtype) * scale, targets)


@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 15, 16, 17, 112, 128, 1000, *LARGE_VOCABULARIES])
def test_any_vocabulary(V: int, dtype: torch.dtype) -> None:
    hold(values(4, V, dtype=dtype) * 3, torch.tensor([0, V - 1, V // 2, -100]))


@each_dtype
@pytest.mark.parametrize("upstream", [3.7, 65536.0, -1.0, 0.0])
def test_the_upstream_gradient_counts(upstream: float, dtype: torch.dtype) -> None:
    hold(values(40, 19, dtype=dtype), torch.arange(40) % 19, upstream)


@each_dtype
def test_extreme_logits(dtype: torch.dtype, path: None) -> None:
    x, targets = extreme_logits(dtype)
    hold(x, targets)
    hold(x[4:5], torch.tensor([1]))  # the least likely class


def test_an_infinite_loss_is_infinite(path: None) -> None:
    x = values(3, 37, dtype=torch.float32)
    x[1, 5] = -INF
    hold(x, torch.tensor([0, 5, 7]))


@each_dtype
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_an_ignored_row_does_not_matter(bad: float, dtype: torch.dtype, path: None) -> None:
    x, targets = values(6, 37, dtype=dtype), torch.tensor([3, -100, 0, 36, -100, 8], device=DEVICE)
    x[1], x[4, ::2] = bad, bad
    dloss = torch.tensor(1.0, device=DEVICE)
    (loss,), (dx,) = run(kernel.cross_entropy, dict(logits=x, targets=targets), (dloss,))
    counted = targets != -100
    alone = dict(logits=x[counted], targets=targets[counted])
    oracle = run(eager.cross_entropy, alone | dict(logits=x[counted].double()), (dloss.double(),))
    baseline = run(eager.cross_entropy, alone, (dloss,))
    assert_rule(OUTPUTS, loss, baseline[0][0], oracle[0][0])
    assert_rule(GRADIENTS, dx[counted], baseline[1][0], oracle[1][0])
    assert (dx[~counted] == 0).all()


def test_another_ignored_class() -> None:
    hold(values(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 2]), ignore_index=3)
    hold(values(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 77]), ignore_index=77)


def test_with_all_targets_ignored_the_loss_is_nan_and_the_gradient_zero() -> None:
    x = values(4, 10, dtype=torch.float32)
    targets = torch.full((4,), -100, device=DEVICE)
    dloss = torch.tensor(1.0, device=DEVICE)
    (loss,), (dx,) = run(kernel.cross_entropy, dict(logits=x, targets=targets), (dloss,))
    assert loss.isnan()
    assert torch.equal(dx, torch.zeros_like(x))


@each_dtype
@pytest.mark.parametrize("doubt", [0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-8])
def test_a_confident_row_keeps_its_loss_and_gradient(doubt: float, dtype, path: None) -> None:
    """Both are the probability of being wrong: 1 - p would leave nothing of it."""
    x = values(1, 37, dtype=dtype) / 8
    x[0, 5] = math.log(36 * (1 - doubt) / doubt)
    targets = torch.tensor([5], device=DEVICE)
    dloss = torch.tensor(2.0 ** math.floor(-math.log2(doubt)), device=DEVICE)  # as by loss scaling
    (loss,), (dx,) = run(kernel.cross_entropy, dict(logits=x, targets=targets), (dloss,))
    inputs = dict(logits=x.double(), targets=targets)
    (exact,), (exact_dx,) = run(eager.cross_entropy, inputs, (dloss.double(),))
    # Better than eager, which has rounded to 0 by then: as good as the oracle's own rounding, but
    # for an exponential's error, which is its argument in roundings of float32.
    roundings = EPS32 * float(x.abs().max())
    assert_rule(OUTPUTS, loss, exact.float(), exact, exact.abs() * roundings)
    for part in (slice(5, 6), slice(None)):
        got, wanted = dx[0, part], exact_dx[0, part]
        assert_rule(GRADIENTS, got, wanted.to(dtype), wanted, wanted.abs() * roundings)


def test_targets_may_be_the_tail_of_a_tensor() -> None:
    targets = torch.arange(8, device=DEVICE)
    hold(values(7, 9, dtype=torch.float32), targets[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look")
@pytest.mark.parametrize("target", [-1, 10, 20, -101])
def test_a_target_outside_the_vocabulary_is_named(target: int) -> None:
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 10\) or -100, got {target}"):
        kernel.cross_entropy(torch.zeros(2, 10), torch.tensor([1, target]))


@pytest.mark.parametrize("target", [-1, 37, 10**12, -(2**60)])
def test_on_a_gpu_such_a_target_makes_the_loss_nan(target: int, path: None, monkeypatch) -> None:
    monkeypatch.setattr(kernel.checks, "ids", lambda *_, **__: None)
    x, targets = values(3, 37, dtype=torch.float32), torch.tensor([1, target, 2], device=DEVICE)
    loss, m, rest, n = kernel.cross_entropy_fwd(x, targets, -100)
    assert loss.isnan()
    dx = kernel.cross_entropy_bwd(torch.ones((), device=DEVICE), x, targets, m, rest, n, -100)
    assert dx[1].isnan().all()
    assert dx[::2].isfinite().all()


def test_logits_of_no_class_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"logits must have at least one class, got shape \(2, 0\)"
    ):
        kernel.cross_entropy(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
