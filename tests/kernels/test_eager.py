"""The specification itself: in float64 against PyTorch's functions, and at extreme values."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from irongpt_kernels import dropout, eager
from numerics import EXACT, OPS, OUTPUTS, assert_exact, assert_rule, inputs_of, randn, run
from torch import Tensor


def assert_same_op(mine: Callable, torchs: Callable, *inputs: Tensor) -> None:
    """Values and gradients of both."""
    named = {str(i): x for i, x in enumerate(inputs)}
    out = torchs(*inputs)
    upstream = tuple(randn(*x.shape, seed=70) for x in (out if isinstance(out, tuple) else (out,)))
    results = [run(lambda op=op, **x: op(*x.values()), named, upstream) for op in (mine, torchs)]
    assert_exact(*results)


def qkv(T: int, D: int, B: int = 2, H: int = 3) -> list[Tensor]:
    return [randn(B, H, T, D, seed=i) for i in range(3)]


def test_attention_drops_weights_by_the_mask_and_scales_the_rest() -> None:
    B, H, T, D, p, seed = 2, 3, 33, 16, 0.3, 2**40 + 5
    keep = dropout.attention_keep(seed, B, H, T, p)
    q, k, v = qkv(T, D)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(D)
        scores = scores + torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        weights = F.softmax(scores, -1).masked_fill(~keep, 0.0) / (1 - 77 / 256)  # 0.3 is 77 / 256
        return torch.einsum("bhij,bhjd->bhid", weights, v)

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager.causal_attention(q, k, v, dropout_p=p, seed=seed)

    assert_same_op(mine, reference, q, k, v)


def test_an_ignored_row_may_hold_anything() -> None:
    logits = randn(3, 10)
    logits[1] = math.inf
    targets = torch.tensor([2, -100, 4])
    assert_exact(eager.cross_entropy(logits, targets), F.cross_entropy(logits[::2], targets[::2]))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_add_layer_norm_is_its_three_steps(p: float) -> None:
    branch, residual = randn(2, 5, 19), randn(2, 5, 19, seed=1)
    weight, bias = randn(19, seed=2), randn(19, seed=3)
    keep = dropout.row_keep(7, 10, 19, p).view(2, 5, 19)

    def reference(branch: Tensor, residual: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + branch.masked_fill(~keep, 0.0) / (1 - p)
        return total, F.layer_norm(total, (19,), *params)

    def mine(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return eager.dropout_add_layer_norm(*inputs, dropout_p=p, seed=7)

    assert_same_op(mine, reference, branch, residual, weight, bias)
    assert_same_op(mine, reference, branch, residual, weight)


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_the_finite_differences(name: str) -> None:
    inputs = inputs_of(name, torch.float64)
    options = {"dropout_p": 0.4, "seed": 3} if "dropout" in name or "attention" in name else {}
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *x: getattr(eager, name)(*x, **options), leaves, fast_mode=True
    )


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param([6e4, -6e4, 0.0], torch.float16, id="the end of float16"),
        pytest.param([1e30, -1e30, 1e30], torch.float32, id="float32 far out, two alike"),
        pytest.param([1e30] * 3, torch.float32, id="all equal"),
        pytest.param([-math.inf, 5.0, -math.inf], torch.float32, id="one live column"),
        pytest.param([math.nan, 1.0, 2.0], torch.float32, id="nan stays nan"),
    ],
)
def test_softmax_at_extreme_values(row: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor([row, row[::-1]], dtype=dtype)
    assert_rule(OUTPUTS, eager.softmax(x), F.softmax(x, -1), F.softmax(x.double(), -1))


def test_no_live_score_is_too_low_to_beat_a_masked_one() -> None:
    x = torch.full((4, 4), -1e30)
    wanted = torch.ones(4, 4).tril() / torch.arange(1.0, 5.0)[:, None]
    assert torch.equal(eager.softmax(x, causal=True), wanted)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 1 - 1e-6])
def test_the_gradient_of_a_confident_class_keeps_its_digits(p: float) -> None:
    """p - 1, taken after p has been rounded to float16, loses all of them (Liger-Kernel #1329)."""
    logits = torch.zeros(2, 50, dtype=torch.float16)
    logits[:, 7] = math.log(p / (1 - p) * 49)
    targets = torch.tensor([7, 7])

    def true_class_gradient(op: Callable, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(op(x, targets), x, torch.tensor(65536.0))
        return gradient[0, 7]

    mine, torchs = (
        true_class_gradient(op, logits)
        for op in (eager.cross_entropy, lambda x, y: F.cross_entropy(x.float(), y))
    )
    assert_rule(OUTPUTS, mine, torchs, true_class_gradient(F.cross_entropy, logits.double()))


@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
def test_layer_norm_of_rows_far_from_zero(mean: float, spread: float) -> None:
    x = (mean + spread * randn(8, 384)).float()
    weight = torch.ones(384)
    outputs, (gradient, _) = run(eager.layer_norm, {"x": x, "weight": weight}, (x / x.norm(),))
    oracle = F.layer_norm(x.double(), (384,))
    assert_rule(OUTPUTS, outputs[0], F.layer_norm(x, (384,)), oracle)
    assert gradient.isfinite().all()


def test_rows_of_equal_values() -> None:
    x, weight, bias = torch.full((3, 8), 2.5), torch.ones(8), torch.arange(8.0)
    outputs, gradients = run(eager.layer_norm, {"x": x, "weight": weight, "bias": bias}, (x,))
    assert torch.equal(outputs[0], bias.expand(3, 8))
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(eager.softmax(x), torch.full((3, 8), 1 / 8))
    causal = eager.softmax(torch.zeros(4, 4, dtype=torch.float64), causal=True)
    assert causal.tolist() == [[1 / (i + 1) if j <= i else 0.0 for j in range(4)] for i in range(4)]


def test_a_dropped_weight_gets_no_gradient() -> None:
    """v of a column that a row dropped does not feed it; the mask of backward is forward's."""
    T, p, seed = 40, 0.5, 11
    keep = dropout.attention_keep(seed, 1, 1, T, p)[0, 0]
    q = torch.zeros(1, 1, T, 4, dtype=torch.float64)
    v = randn(1, 1, T, 4).requires_grad_()
    out = eager.causal_attention(q, q, v, dropout_p=p, seed=seed)
    for row in (0, 17, T - 1):
        (dv,) = torch.autograd.grad(out[0, 0, row].sum(), v, retain_graph=True)
        seen = keep[row] & (torch.arange(T) <= row)
        wanted = seen.double() * 2 / (row + 1)
        torch.testing.assert_close(dv[0, 0, :, 0], wanted, rtol=EXACT, atol=0)
