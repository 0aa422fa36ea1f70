"""The cross-entropy of logits, and that of a linear layer's, within the tolerance of eager."""

import importlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from irongpt_kernels import builtin, eager
from irongpt_kernels.runtime import checks
from numerics import (
    DEVICE,
    EPS32,
    GRADIENTS,
    OUTPUTS,
    assert_exact,
    assert_op,
    assert_rule,
    each_dtype,
    randn,
    run,
    values,
)
from torch import Tensor

kernel = importlib.import_module("irongpt_kernels.fused.cross_entropy")
linear = importlib.import_module("irongpt_kernels.fused.linear_cross_entropy")
INF = math.inf
C = 8  # the width of linear layers
LARGE_VOCABULARIES = [4096, 8192, 16384, 16392, 50257, 50304]  # the last two end in a partial block
BLOCKS = dict(MAX_BLOCK=16, LONG_BLOCK=16, TILE=32, PARTS=2)


@pytest.fixture(params=["one block", "blocks"])
def path(request, monkeypatch) -> None:
    """A row at once, and in blocks."""
    if request.param == "blocks":
        for module, (name, value) in itertools.product((kernel, linear), BLOCKS.items()):
            monkeypatch.setattr(module, name, value, raising=False)


def check(logits: Tensor, targets: Tensor, upstream: float = 1.7, **options: object) -> None:
    inputs = dict(logits=logits, targets=targets.to(DEVICE))
    dloss = torch.tensor(upstream, device=DEVICE)
    assert_op(kernel, "cross_entropy", inputs, (dloss,), **options)


def layer(M: int, V: int, dtype: torch.dtype, targets: Tensor | None = None) -> dict[str, Tensor]:
    targets = torch.arange(M) * 3 % V if targets is None else targets
    x, weight = values(M, C, dtype=dtype), values(V, C, dtype=dtype, seed=1)
    return dict(x=x, weight=weight / 2, targets=targets.to(DEVICE))


def check_linear(inputs: dict[str, Tensor], upstream: float = 1.7, **options: object) -> None:
    dloss = torch.tensor(upstream, device=DEVICE)
    assert_op(linear, "linear_cross_entropy", inputs, (dloss,), **options)


def of_logits(x: Tensor, targets: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """The mean loss, and the gradient of the logits."""
    inputs, dloss = dict(logits=x, targets=targets), torch.tensor(upstream, device=DEVICE)
    (loss,), (dx,) = run(kernel.cross_entropy, inputs, (dloss,))
    return loss, dx


def of_a_linear_layer(
    x: Tensor, targets: Tensor, upstream: float = 1.0, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the kernel that overwrites the logits of a linear layer."""
    dx, scale = x.clone(), torch.tensor(upstream, device=DEVICE)
    sums = torch.empty(-(-len(x) // linear.launch_options(x.shape[1])["BLOCK_M"]), device=DEVICE)
    linear.gradient_in_place(dx, targets, sums, len(x), scale, classes or x.shape[1])
    return sums.sum() / len(x), dx


Kernel = Callable[..., tuple[Tensor, Tensor]]
each_kernel = pytest.mark.parametrize(
    "rows", [of_logits, of_a_linear_layer], ids=["logits", "linear"]
)


def check_rows(
    rows: Kernel, x: Tensor, targets: Tensor, upstream: float = 1.7, classes: int | None = None
) -> Tensor:
    """Returns the gradient of the logits."""
    targets, dloss = targets.to(DEVICE), torch.tensor(upstream, device=DEVICE)
    loss, dx = rows(x, targets, upstream, **(dict(classes=classes) if classes else {}))
    baseline, oracle = (
        run(eager.cross_entropy, dict(logits=logits, targets=targets), (g,))
        for logits, g in ((x[:, :classes], dloss), (x[:, :classes].double(), dloss.double()))
    )
    assert_rule(OUTPUTS, loss, baseline[0][0], oracle[0][0])
    assert_rule(GRADIENTS, dx[:, :classes], baseline[1][0], oracle[1][0])
    return dx


@each_dtype
@pytest.mark.parametrize("scale", [1, 20], ids=["untrained", "confident"])
@pytest.mark.parametrize("M", [1, 7, 19])
def test_cross_entropy(M: int, scale: int, dtype: torch.dtype, path) -> None:
    targets = torch.arange(M) * 3 % 50
    targets[1::7] = -100
    check(values(M, 50, dtype=dtype) * scale, targets)


@each_dtype
@pytest.mark.parametrize("V", [1, 2, 7, 15, 16, 17, 104, 112, 128, 1000, *LARGE_VOCABULARIES])
def test_any_vocabulary(V: int, dtype: torch.dtype) -> None:
    targets = torch.tensor([0, V - 1, V // 2, -100])
    check(values(4, V, dtype=dtype) * 3, targets)
    check_linear(layer(3, V, dtype, targets[:3]))


@each_dtype
@pytest.mark.parametrize("upstream", [3.7, 65536.0, -1.0, 0.0])
def test_the_upstream_gradient_counts(upstream: float, dtype: torch.dtype) -> None:
    """Also where the forward of a linear layer did not expect it."""
    check(values(40, 19, dtype=dtype), torch.arange(40) % 19, upstream)
    inputs = layer(40, 19, dtype)
    check_linear(inputs, upstream)
    for scale in {2.5, upstream or 2.5}:  # 0 is no scale
        check_linear(inputs, upstream, loss_scale=torch.tensor(scale, device=DEVICE))


@each_dtype
@each_kernel
def test_extreme_logits(rows: Kernel, dtype: torch.dtype, path) -> None:
    """To the edge of the dtype, and -inf: in front, behind, in whole blocks, all but the target."""
    top, V = 65504.0 if dtype == torch.float16 else 1e30, 37
    x, targets = (
        values(12, V, dtype=dtype),
        torch.tensor([5, 0, 36, 18, 0, 36, 0, 36, 0, 19, 20, 3]),
    )
    x[1], x[2], x[3] = 3.0, top, -top
    x[4, ::2], x[4, 1::2] = top, -top
    x[5] = torch.arange(V) * (top / V)
    x[6] = x[5].flip(0)
    x[7, :36], x[8, 1:], x[9, 20:], x[10, :20] = (-math.inf,) * 4
    check_rows(rows, x, targets)
    check_rows(rows, x[4:5], torch.tensor([1]), 1.0)  # the least likely class
    check_rows(rows, x[10:11], torch.tensor([5]), 1.0)  # an impossible one: the loss is infinite


@each_dtype
@each_kernel
@pytest.mark.parametrize("doubt", [0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-8])
def test_a_confident_row_keeps_its_loss_and_gradient(rows, doubt: float, dtype, path) -> None:
    """Both are the probability of being wrong: 1 - p would leave nothing of it."""
    x = values(1, 37, dtype=dtype) / 8
    x[0, 5] = math.log(36 * (1 - doubt) / doubt)
    targets = torch.tensor([5], device=DEVICE)
    upstream = 2.0 ** math.floor(-math.log2(doubt))  # as by loss scaling
    loss, dx = rows(x, targets, upstream)
    inputs = dict(logits=x.double(), targets=targets)
    dloss = torch.tensor(upstream, dtype=torch.float64, device=DEVICE)
    (exact,), (exact_dx,) = run(eager.cross_entropy, inputs, (dloss,))
    # Better than eager, which has rounded to 0 by then: as good as the oracle's own rounding, but
    # for an exponential's error, which is its argument in roundings of float32.
    roundings = EPS32 * float(x.abs().max())
    assert_rule(OUTPUTS, loss, exact.float(), exact, exact.abs() * roundings)
    for part in (slice(5, 6), slice(None)):
        got, wanted = dx[0, part], exact_dx[0, part]
        assert_rule(GRADIENTS, got, wanted.to(dtype), wanted, wanted.abs() * roundings)


@each_kernel
@pytest.mark.parametrize("target", [-1, 37, 2**32 + 1, 10**12, -(2**60)])
def test_on_a_gpu_a_target_that_is_no_class_makes_the_loss_nan(
    rows: Kernel, target: int, path, monkeypatch
) -> None:
    monkeypatch.setattr(checks, "ids", lambda *_, **__: None)
    x, targets = values(3, 37, dtype=torch.float32), torch.tensor([1, target, 2], device=DEVICE)
    loss, dx = rows(x, targets)
    assert loss.isnan()
    assert dx[1].isnan().all()
    assert dx[::2].isfinite().all()


@each_dtype
@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
def test_an_ignored_row_does_not_matter(bad: float, dtype: torch.dtype, path) -> None:
    x, targets = values(6, 37, dtype=dtype), torch.tensor([3, -100, 0, 36, -100, 8], device=DEVICE)
    x[1], x[4, ::2] = bad, bad
    counted = targets != -100
    loss, dx = of_logits(x, targets)

    def without_them(*_: object) -> tuple[Tensor, Tensor]:
        return loss, dx[counted]

    check_rows(without_them, x[counted], targets[counted], 1.0)
    assert (dx[~counted] == 0).all()


def test_another_ignored_class() -> None:
    check(values(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 2]), ignore_index=3)
    check(values(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 77]), ignore_index=77)


def test_with_all_targets_ignored_the_loss_is_nan_and_the_gradient_zero() -> None:
    x = values(4, 10, dtype=torch.float32)
    loss, dx = of_logits(x, torch.full((4,), -100, device=DEVICE))
    assert loss.isnan()
    assert torch.equal(dx, torch.zeros_like(x))


def test_targets_may_be_the_tail_of_a_tensor() -> None:
    targets = torch.arange(8, device=DEVICE)
    check(values(7, 9, dtype=torch.float32), targets[1:])


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look")
@pytest.mark.parametrize("target", [-1, 10, 11, 20, -101])
def test_a_target_outside_the_vocabulary_is_named(target: int) -> None:
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 10\) or -100, got {target}"):
        kernel.cross_entropy(torch.zeros(2, 10), torch.tensor([1, target]))
    for bad in (target, -100):
        inputs = layer(2, 12, torch.float32, torch.tensor([1, bad]))
        with pytest.raises(ValueError, match=rf"^targets must be in \[0, 10\), got {bad}$"):
            linear.linear_cross_entropy(**inputs, classes=10)


@each_dtype
@pytest.mark.parametrize("M", [1, 7, 19])
def test_linear_cross_entropy(M: int, dtype: torch.dtype, path) -> None:
    check_linear(layer(M, 50, dtype))
    check_linear(layer(M, 56, dtype, torch.arange(M) * 3 % 51), classes=51)


def test_builtin_is_within_the_tolerance_too() -> None:
    for dtype in (torch.float32, torch.float16):
        inputs = {n: x.cpu() for n, x in layer(19, 56, dtype, torch.arange(19)).items()}
        assert_op(builtin, "linear_cross_entropy", inputs, classes=51)


def test_eager_is_the_cross_entropy_of_a_linear_layer() -> None:
    x, weight, targets = randn(9, 5), randn(12, 5, seed=1), torch.arange(9)
    found = run(eager.linear_cross_entropy, dict(x=x, weight=weight, targets=targets), (x[0, 0],))
    wanted = run(
        lambda x, weight: torch.nn.functional.cross_entropy(x @ weight.T, targets),
        dict(x=x, weight=weight),
        (x[0, 0],),
    )
    assert_exact(found, wanted)
    padded = torch.cat([weight, 100 + weight])
    inputs = dict(x=x, weight=padded, targets=targets)
    loss, (dx, dweight) = run(eager.linear_cross_entropy, inputs, (x[0, 0],), classes=12)
    assert_exact((loss, dx, dweight[:12]), (found[0], *found[1]))
    assert (dweight[12:] == 0).all()


@each_dtype
def test_padding_has_a_gradient_of_0_and_no_probability(dtype: torch.dtype, path) -> None:
    z, targets = values(7, 56, dtype=dtype), torch.arange(7, device=DEVICE)
    z[:, 51:] = torch.tensor([INF, -INF, math.nan, 100.0, 0.0], device=DEVICE)
    assert (check_rows(of_a_linear_layer, z, targets, 1.0, 51)[:, 51:] == 0).all()
    targets[3] = 53
    loss, dz = of_a_linear_layer(z, targets, classes=51)
    assert loss.isnan()
    assert dz[3, :51].isnan().all()


def test_the_loss_scale_itself_costs_nothing_in_the_backward(monkeypatch) -> None:
    """And with it the gradients of confident rows do not underflow in float16."""
    eye = torch.eye(16, dtype=torch.float16, device=DEVICE)
    inputs = dict(x=16 * eye, weight=eye, targets=torch.arange(16, device=DEVICE))
    scale = torch.tensor(65536.0, device=DEVICE)
    found = []
    for loss_scale in (scale, scale.clone(), None):
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with monkeypatch.context() as patch:
            if loss_scale is scale:
                patch.setattr(linear, "linear_cross_entropy_bwd", None)
            linear.linear_cross_entropy(**leaves, loss_scale=loss_scale).backward(scale)
        found.append((leaves["x"].grad, leaves["weight"].grad))
    assert all(map(torch.equal, found[0], found[1]))
    check_linear(inputs, 65536.0, loss_scale=scale)
    wide = dict(x=inputs["x"].double(), weight=eye.double(), targets=inputs["targets"])
    _, exact = run(eager.linear_cross_entropy, wide, (scale.double(),))
    scaled, default = (
        [(x - y).norm() / y.norm() for x, y in zip(f, exact, strict=True)] for f in found[::2]
    )
    assert max(scaled) < 1e-3
    assert max(default) < 1e-2


def test_the_loss_scale_limits_gradients_in_float16() -> None:
    """By default they are kept times 1,024, and 87.5 times that is beyond float16."""
    x = torch.full((1, C), 100.0, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(8, C, dtype=torch.float16, device=DEVICE)
    inputs, one = dict(x=x, weight=weight, targets=torch.tensor([3], device=DEVICE)), torch.ones(())
    assert run(eager.linear_cross_entropy, inputs, (one,))[1][1][3, 0] == -87.5
    found = run(linear.linear_cross_entropy, inputs, (one,))[1][1]
    assert (found[3] == -INF).all()
    assert (found[:3] == 12.5).all()
    check_linear(inputs, 1.0, loss_scale=torch.tensor(512.0, device=DEVICE))


def test_a_loss_scale_that_changes_before_the_backward_is_rejected() -> None:
    inputs, scale = layer(3, 10, torch.float32), torch.tensor(2.0, device=DEVICE)
    inputs["x"].requires_grad_()
    loss = linear.linear_cross_entropy(**inputs, loss_scale=scale)
    scale *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(scale)


@each_dtype
def test_more_logits_than_fit_are_computed_in_chunks_of_rows(
    dtype: torch.dtype, monkeypatch
) -> None:
    inputs = layer(300, 24, dtype)
    whole = run(linear.linear_cross_entropy, inputs, (torch.tensor(1.0, device=DEVICE),))
    sizes, in_place = [], linear.gradient_in_place
    monkeypatch.setattr(
        linear, "gradient_in_place", lambda z, *rest: (sizes.append(len(z)), in_place(z, *rest))
    )
    monkeypatch.setattr(linear, "LOGITS_BYTES", 130 * 24 * dtype.itemsize)
    check_linear(inputs)
    assert sizes == [128, 128, 44]
    chunks = run(linear.linear_cross_entropy, inputs, (torch.tensor(1.0, device=DEVICE),))
    assert torch.equal(chunks[0][0], whole[0][0])
    with torch.no_grad():
        assert torch.equal(linear.linear_cross_entropy(**inputs), whole[0][0])
    monkeypatch.setattr(linear, "LOGITS_BYTES", 1)
    check_linear(inputs)
    assert sizes[-3:] == [128, 128, 44]


def test_without_a_gradient_none_is_computed() -> None:
    inputs = layer(19, 50, torch.float32)
    op = torch.ops.irongpt.linear_cross_entropy
    loss, dx, dweight = op(*inputs.values(), None, 50, False)
    assert dx.numel() == dweight.numel() == 0
    assert torch.equal(loss, op(*inputs.values(), None, 50, True)[0])
    assert torch.equal(loss, linear.linear_cross_entropy(**inputs))
