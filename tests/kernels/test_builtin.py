"""PyTorch's own functions by the rule of `numerics`, and the contract that eager keeps as well."""

import math

import pytest
import torch
from irongpt_kernels import builtin, eager
from numerics import LAYOUTS, assert_exact, assert_op, randn, run, small_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = list(small_inputs())
HALVES = [torch.float16, torch.bfloat16]

both = pytest.mark.parametrize("module", [eager, builtin], ids=["eager", "builtin"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@each_dtype
@pytest.mark.parametrize(
    ("T", "D", "options"),
    [
        pytest.param(17, 32, {}, id="no power of two"),
        pytest.param(33, 64, dict(scale=0.3), id="one over a tile, scale given"),
        pytest.param(256, 64, {}, id="the model's"),
    ],
)
def test_attention(dtype: torch.dtype, T: int, D: int, options: dict) -> None:
    q, k, v = (randn(2, 3, T, D, dtype=dtype, seed=i) for i in range(3))
    assert_op(builtin, "causal_attention", dict(q=q, k=k, v=v), **options)


@each_dtype
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("N", [17, 384])
def test_layer_norm(dtype: torch.dtype, N: int, with_bias: bool) -> None:
    bias = randn(N, dtype=dtype, seed=2) if with_bias else None
    x, weight = randn(3, 11, N, dtype=dtype), randn(N, dtype=dtype, seed=1)
    params = dict(weight=weight, bias=bias)
    if dtype == torch.float32:
        assert_op(builtin, "layer_norm", dict(x=x) | params, eps=1e-3)
    else:  # PyTorch on a CPU sums the parameters' gradients in halves: beyond the rule, so left out
        assert_op(builtin, "layer_norm", dict(x=x), eps=1e-3, **params)


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.37])
def test_softmax(dtype: torch.dtype, causal: bool, scale: float) -> None:
    x = randn(2, 3, 33, 33, dtype=dtype) * 4
    assert_op(builtin, "softmax", dict(x=x), scale=scale, causal=causal)


@each_dtype
@pytest.mark.parametrize("scale", [1, 20], ids=["untrained", "confident"])
def test_cross_entropy(dtype: torch.dtype, scale: int) -> None:
    targets = torch.arange(64) % 50
    targets[::7] = -100
    logits = randn(64, 50, dtype=dtype) * scale
    assert_op(builtin, "cross_entropy", dict(logits=logits, targets=targets))


def test_cross_entropy_with_another_ignored_class_and_with_nothing_left() -> None:
    logits, targets = randn(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 2])
    assert_op(builtin, "cross_entropy", dict(logits=logits, targets=targets), ignore_index=3)
    assert builtin.cross_entropy(logits, torch.full((4,), -100)).isnan()


@each_dtype
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_gelu(dtype: torch.dtype, with_bias: bool) -> None:
    bias = randn(19, dtype=dtype, seed=1) if with_bias else None
    assert_op(builtin, "gelu", dict(x=randn(7, 11, 19, dtype=dtype) * 2, bias=bias))


@each_dtype
def test_dropout_add_layer_norm_without_dropout(dtype: torch.dtype) -> None:
    branch = randn(3, 11, 384, dtype=dtype)
    stream, weight, bias = (
        randn(*shape, dtype=torch.float32, seed=seed)
        for seed, shape in enumerate([(3, 11, 384), (384,), (384,)], 1)
    )
    inputs = dict(branch=branch, residual=stream, weight=weight)  # as in training
    assert_op(builtin, "dropout_add_layer_norm", inputs, bias=None, eps=1e-2)
    assert_op(builtin, "dropout_add_layer_norm", inputs | dict(bias=bias))
    halves = dict(branch=branch, residual=stream.to(dtype))
    params = dict(weight=weight.to(dtype), bias=bias.to(dtype))
    assert_op(builtin, "dropout_add_layer_norm", halves, **params)


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    B, H, T, p = 16, 8, 64, 0.3
    q = torch.zeros(B, H, T, 8)
    out = builtin.causal_attention(q, q, torch.ones_like(q), dropout_p=p)[..., 0]  # (B, H, T)
    rows = torch.arange(1.0, T + 1)  # row i is the mean of i bits, each scaled by 1 / (1 - p)
    sigma = math.sqrt(float((p / (1 - p) / rows).sum()) * B * H) / out.numel()
    assert abs(float(out.double().mean()) - 1) < 5 * sigma
    assert out.var(dim=(0, 1))[0] > 0  # something was dropped


def test_branch_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    p, branch = 0.3, torch.ones(256, 384)
    total, _ = builtin.dropout_add_layer_norm(
        branch, torch.zeros_like(branch), torch.ones(384), dropout_p=p
    )
    sigma = math.sqrt(p / (1 - p) / branch.numel())
    assert abs(float(total.double().mean()) - 1) < 5 * sigma
    assert total.unique().numel() == 2  # dropped, or kept and scaled


@pytest.mark.parametrize("seed", [None, 1])
def test_pytorchs_generator_alone_decides_what_is_dropped(seed: int | None) -> None:
    branch, weight = torch.ones(8, 16), torch.ones(16)

    def total(generator_seed: int) -> torch.Tensor:
        torch.manual_seed(generator_seed)
        return builtin.dropout_add_layer_norm(branch, branch, weight, dropout_p=0.5, seed=seed)[0]

    assert torch.equal(total(3), total(3))
    assert not torch.equal(total(3), total(4))


@both
def test_attention_takes_a_packed_projection_and_returns_what_the_next_takes(module) -> None:
    B, H, T, D = 2, 3, 17, 16
    packed = randn(B, T, 3, H, D)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each, no copies
    out = module.causal_attention(q, k, v)
    assert out.shape == (B, H, T, D)
    assert out.transpose(1, 2).is_contiguous()
    contiguous = module.causal_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert_exact(out, contiguous)


@both
@pytest.mark.parametrize("target", [-1, 10, 20])
def test_cross_entropy_refuses_a_target_outside_the_vocabulary(module, target: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        module.cross_entropy(randn(2, 10), torch.tensor([1, target]))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_the_layout_of_inputs_and_gradients_changes_nothing(name, layout, module) -> None:
    op, inputs = getattr(module, name), small_inputs()[name]
    place = LAYOUTS[layout]
    # A layer norm of equal values is all rounding: nothing to compare.
    lay = torch.clone if layout == "one value expanded" else place
    laid = {n: lay(x) if x.is_floating_point() and x.dim() > 1 else x for n, x in inputs.items()}
    outputs, _ = run(op, laid)
    upstream = tuple(
        place(g) if g.dim() > 1 else g
        for g in (randn(*x.shape, seed=i) for i, x in enumerate(outputs))
    )
    results = run(op, laid, upstream)
    contiguous = run(
        op, {n: x.contiguous() for n, x in laid.items()}, tuple(g.contiguous() for g in upstream)
    )
    assert_exact(results, contiguous)


@both
@pytest.mark.parametrize("name", OPS)
def test_inputs_and_upstream_gradients_are_left_alone(name: str, module) -> None:
    inputs = small_inputs()[name]
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    out = getattr(module, name)(**inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = [randn(*x.shape, seed=5) for x in outputs]
    before = [x.detach().clone() for x in [*leaves, *outputs, *upstream]]
    first, again = (
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, before, [*leaves, *outputs, *upstream]))
    assert all(map(torch.equal, first, again))


@both
@pytest.mark.parametrize("name", OPS)
def test_any_input_may_be_frozen(name: str, module) -> None:
    inputs = small_inputs()[name]
    floats = [n for n, x in inputs.items() if x.is_floating_point()]
    outputs, _ = run(getattr(module, name), inputs)
    upstream = tuple(randn(*x.shape, seed=i) for i, x in enumerate(outputs))
    _, everything = run(getattr(module, name), inputs, upstream)
    for n, wanted in zip(floats, everything, strict=True):
        frozen = {m: x.detach() for m, x in inputs.items() if m != n}
        _, (alone,) = run(
            lambda f=frozen, **x: getattr(module, name)(**f, **x), {n: inputs[n]}, upstream
        )
        assert_exact(alone, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@both
@pytest.mark.parametrize("name", OPS)
def test_results_come_in_the_dtype_of_the_first_argument(name, module, dtype) -> None:
    outputs, _ = run(getattr(module, name), small_inputs(dtype)[name])
    wanted = torch.float32 if name == "cross_entropy" else dtype
    assert [x.dtype for x in outputs] == [wanted] * len(outputs)


@pytest.mark.parametrize("dtype", HALVES)
@both
def test_a_half_branch_joins_a_float32_stream(module, dtype: torch.dtype) -> None:
    inputs = small_inputs(torch.float32)["dropout_add_layer_norm"]
    inputs["branch"] = inputs["branch"].to(dtype)
    total, normed = module.dropout_add_layer_norm(**inputs)
    assert (total.dtype, normed.dtype) == (torch.float32, dtype)
    norm = small_inputs(torch.float32)["layer_norm"]
    assert module.layer_norm(norm["x"].to(dtype), norm["weight"], norm["bias"]).dtype == dtype
    gelu = small_inputs(torch.float32)["gelu"]
    assert eager.gelu(gelu["x"].to(dtype), gelu["bias"]).dtype == dtype
