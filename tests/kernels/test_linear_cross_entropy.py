"""Cross-entropy of a linear layer's logits, whose gradient is computed with the loss."""

import importlib
import math

import pytest
import torch
from extremes import extreme_logits
from irongpt_kernels import builtin, eager
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

kernel = importlib.import_module("irongpt_kernels.fused.linear_cross_entropy")
INF = math.inf
C = 8
BLOCKS = dict(MAX_BLOCK=16, LONG_BLOCK=16, TILE=32, PARTS=2)


@pytest.fixture(params=["one block", "blocks"])
def path(request, monkeypatch) -> None:
    """A row at once, and walked in blocks."""
    for name, value in BLOCKS.items() if request.param == "blocks" else ():
        monkeypatch.setattr(kernel, name, value)


def tensors(M: int, V: int, dtype: torch.dtype, targets: Tensor | None = None) -> dict[str, Tensor]:
    targets = torch.arange(M) * 3 % V if targets is None else targets
    x, weight = values(M, C, dtype=dtype), values(V, C, dtype=dtype, seed=1)
    return dict(x=x, weight=weight / 2, targets=targets.to(DEVICE))


def hold(inputs: dict[str, Tensor], upstream: float = 1.7, **options: object) -> None:
    assert_op(
        kernel, "linear_cross_entropy", inputs, (torch.tensor(upstream, device=DEVICE),), **options
    )


def rows(
    z: Tensor, targets: Tensor, scale: float = 1.0, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mean loss of logits, and what the kernel stores over them."""
    dz, classes = z.clone(), classes or z.shape[1]
    sums = torch.empty(-(-len(z) // kernel.launch_options(z.shape[1])["BLOCK_M"]), device=DEVICE)
    loss_scale = torch.tensor(scale, device=DEVICE)
    kernel.gradient_in_place(dz, targets, sums, len(z), loss_scale, classes)
    return sums.sum() / len(z), dz


def hold_rows(z: Tensor, targets: Tensor, scale: float = 1.0, classes: int | None = None) -> Tensor:
    """Returns what the kernel stores over the logits."""
    loss, dz = rows(z, targets.to(DEVICE), scale, classes)
    upstream = torch.tensor(scale, device=DEVICE)
    baseline, oracle = (
        run(eager.cross_entropy, dict(logits=x, targets=targets.to(DEVICE)), (g,))
        for x, g in ((z[:, :classes], upstream), (z[:, :classes].double(), upstream.double()))
    )
    assert_rule(OUTPUTS, loss, baseline[0][0], oracle[0][0])
    assert_rule(GRADIENTS, dz[:, :classes], baseline[1][0], oracle[1][0])
    return dz


@each_dtype
@pytest.mark.parametrize("M", [1, 7, 19])
def test_linear_cross_entropy(M: int, dtype: torch.dtype, path: None) -> None:
    hold(tensors(M, 50, dtype))
    hold(tensors(M, 56, dtype, torch.arange(M) * 3 % 51), classes=51)


@each_dtype
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 104, 128, 1000, 4096, 16384, 16392, 50257])
def test_any_vocabulary(V: int, dtype: torch.dtype) -> None:
    hold(tensors(3, V, dtype, torch.tensor([0, V - 1, V // 2])))


def test_builtin_is_within_the_tolerance_too() -> None:
    for dtype in (torch.float32, torch.float16):
        inputs = {n: x.cpu() for n, x in tensors(19, 56, dtype, torch.arange(19)).items()}
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
def test_padding_has_a_gradient_of_0_and_no_probability(dtype: torch.dtype, path: None) -> None:
    z, targets = values(7, 56, dtype=dtype), torch.arange(7, device=DEVICE)
    z[:, 51:] = torch.tensor([INF, -INF, math.nan, 100.0, 0.0], device=DEVICE)
    assert (hold_rows(z, targets, classes=51)[:, 51:] == 0).all()


@each_dtype
@pytest.mark.parametrize("upstream", [3.7, 65536.0, -1.0, 0.0])
@pytest.mark.parametrize("scaled", [False, True], ids=["unexpected", "expected"])
def test_the_upstream_gradient_counts(upstream: float, scaled: bool, dtype: torch.dtype) -> None:
    """Also where the forward did not expect it."""
    if upstream == 0.0 and scaled:
        return  # no scale
    loss_scale = torch.tensor(upstream if scaled else 2.5, device=DEVICE)
    hold(tensors(40, 19, dtype), upstream, loss_scale=loss_scale)
    hold(tensors(40, 19, dtype), upstream)


def test_the_loss_scale_itself_costs_nothing_in_the_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And with it the gradients of confident rows do not underflow in float16."""
    eye = torch.eye(16, dtype=torch.float16, device=DEVICE)
    inputs = dict(x=16 * eye, weight=eye, targets=torch.arange(16, device=DEVICE))
    scale = torch.tensor(65536.0, device=DEVICE)
    found = []
    for loss_scale in (scale, scale.clone(), None):
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with monkeypatch.context() as patch:
            if loss_scale is scale:
                patch.setattr(kernel, "linear_cross_entropy_bwd", None)
            kernel.linear_cross_entropy(**leaves, loss_scale=loss_scale).backward(scale)
        found.append((leaves["x"].grad, leaves["weight"].grad))
    assert all(map(torch.equal, found[0], found[1]))
    hold(inputs, 65536.0, loss_scale=scale)
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
    found = run(kernel.linear_cross_entropy, inputs, (one,))[1][1]
    assert (found[3] == -INF).all()
    assert (found[:3] == 12.5).all()
    hold(inputs, 1.0, loss_scale=torch.tensor(512.0, device=DEVICE))


def test_a_loss_scale_that_changes_before_the_backward_is_rejected() -> None:
    inputs, scale = tensors(3, 10, torch.float32), torch.tensor(2.0, device=DEVICE)
    inputs["x"].requires_grad_()
    loss = kernel.linear_cross_entropy(**inputs, loss_scale=scale)
    scale *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(scale)


@each_dtype
def test_extreme_logits(dtype: torch.dtype, path: None) -> None:
    x, targets = extreme_logits(dtype)
    hold_rows(x, targets, 1.7)
    hold_rows(x[4:5], torch.tensor([1]))  # the least likely class
    hold_rows(x[10:11], torch.tensor([5]))  # an impossible one: the loss is infinite


@each_dtype
@pytest.mark.parametrize("doubt", [0.1, 1e-3, 1e-6, 1e-8])
def test_a_confident_row_keeps_its_loss_and_gradient(doubt: float, dtype, path: None) -> None:
    """Both are the probability of being wrong: 1 - p would leave nothing of it."""
    z = values(1, 37, dtype=dtype) / 8
    z[0, 5] = math.log(36 * (1 - doubt) / doubt)
    targets, scale = torch.tensor([5], device=DEVICE), 2.0 ** math.floor(-math.log2(doubt))
    loss, dz = rows(z, targets, scale)
    inputs = dict(logits=z.double(), targets=targets)
    upstream = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
    (exact,), (exact_dz,) = run(eager.cross_entropy, inputs, (upstream,))
    # As good as the oracle's own rounding, but for an exponential's error, which is its argument in
    # roundings of float32.
    roundings = EPS32 * float(z.abs().max())
    assert_rule(OUTPUTS, loss, exact.float(), exact, exact.abs() * roundings)
    for part in (slice(5, 6), slice(None)):
        wanted = exact_dz[0, part]
        assert_rule(GRADIENTS, dz[0, part], wanted.to(dtype), wanted, wanted.abs() * roundings)


@each_dtype
def test_more_logits_than_fit_are_computed_in_chunks_of_rows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(300, 24, dtype)
    whole = run(kernel.linear_cross_entropy, inputs, (torch.tensor(1.0, device=DEVICE),))
    sizes, in_place = [], kernel.gradient_in_place
    monkeypatch.setattr(
        kernel, "gradient_in_place", lambda z, *rest: (sizes.append(len(z)), in_place(z, *rest))
    )
    monkeypatch.setattr(kernel, "LOGITS_BYTES", 130 * 24 * dtype.itemsize)
    hold(inputs)
    assert sizes == [128, 128, 44]
    chunks = run(kernel.linear_cross_entropy, inputs, (torch.tensor(1.0, device=DEVICE),))
    assert torch.equal(chunks[0][0], whole[0][0])
    with torch.no_grad():
        assert torch.equal(kernel.linear_cross_entropy(**inputs), whole[0][0])
    monkeypatch.setattr(kernel, "LOGITS_BYTES", 1)
    hold(inputs)
    assert sizes[-3:] == [128, 128, 44]


def test_without_a_gradient_none_is_computed() -> None:
    inputs = tensors(19, 50, torch.float32)
    op = torch.ops.irongpt.linear_cross_entropy
    loss, dx, dweight = op(*inputs.values(), None, 50, False)
    assert dx.numel() == dweight.numel() == 0
    assert torch.equal(loss, op(*inputs.values(), None, 50, True)[0])
    assert torch.equal(loss, kernel.linear_cross_entropy(**inputs))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look")
@pytest.mark.parametrize("target", [-100, -1, 10, 11])
def test_a_target_that_is_no_class_is_named(target: int) -> None:
    inputs = tensors(2, 12, torch.float32, torch.tensor([1, target]))
    with pytest.raises(ValueError, match=rf"^targets must be in \[0, 10\), got {target}$"):
        kernel.linear_cross_entropy(**inputs, classes=10)


@pytest.mark.parametrize("target", [-1, 37, 2**32 + 1, -(2**60)])
def test_on_a_gpu_such_a_target_makes_the_loss_nan(target: int, path: None) -> None:
    z, targets = values(3, 40, dtype=torch.float32), torch.tensor([1, target, 2], device=DEVICE)
    loss, dz = rows(z, targets, classes=37)
    assert loss.isnan()
    assert dz[1, :37].isnan().all()
    assert dz[::2].isfinite().all()


@pytest.mark.parametrize("classes", [0, 11, -1])
def test_bad_classes_are_named(classes: int) -> None:
    with pytest.raises(ValueError, match=rf"^classes must be in \[1, 10\], .*got {classes}$"):
        kernel.linear_cross_entropy(**tensors(2, 10, torch.float32), classes=classes)


def test_bad_arguments_are_named() -> None:
    inputs, ones = tensors(2, 10, torch.float32), torch.ones(1, device=DEVICE)
    for changed, message in [
        (dict(weight=inputs["weight"].half()), "weight must have the dtype of x, torch.float32"),
        (dict(loss_scale=ones), r"loss_scale must have shape \(\), got \(1,\)"),
        (dict(loss_scale=ones[0].to("meta")), "loss_scale is on meta, but x is on"),
        (dict(weight=inputs["weight"][:0]), r"classes must be in \[1, 0\]"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            kernel.linear_cross_entropy(**inputs | changed)
