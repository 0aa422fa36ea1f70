"""PyTorch's own functions within the tolerance of eager, and in float64 equal to it."""

import math

import pytest
import torch
from irongpt_kernels import builtin, eager
from numerics import OPS, Inputs, assert_exact, assert_op, inputs_of, randn, run
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

both = pytest.mark.parametrize("module", [eager, builtin], ids=["eager", "builtin"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def tensors(dtype: torch.dtype, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    return {n: randn(*size, dtype=dtype, seed=i) for i, (n, size) in enumerate(sizes.items())}


def check(name: str, inputs: Inputs, **options: object) -> None:
    """In float64 builtin and eager are two formulas of one function."""
    if next(iter(inputs.values())).dtype != torch.float64:
        assert_op(builtin, name, inputs, **options)
        return
    outputs, _ = run(getattr(eager, name), inputs, **options)
    upstream = tuple(randn(*x.shape, seed=70 + i) for i, x in enumerate(outputs))
    results = (run(getattr(ops, name), inputs, upstream, **options) for ops in (builtin, eager))
    assert_exact(*results)


@each_dtype
@pytest.mark.parametrize(
    ("T", "D", "options"),
    [
        pytest.param(1, 16, {}, id="one position"),
        pytest.param(17, 32, {}, id="no power of two"),
        pytest.param(33, 64, dict(scale=0.3), id="one over a tile, scale given"),
        pytest.param(33, 16, dict(scale=0.0), id="scale 0"),
        pytest.param(33, 16, dict(scale=-1.0), id="a negative scale"),
        pytest.param(255, 16, {}, id="one under the context"),
        pytest.param(256, 64, {}, id="the presets'"),
    ],
)
def test_attention(dtype: torch.dtype, T: int, D: int, options: dict) -> None:
    if T == 1 and dtype != torch.float64:
        pytest.skip("the gradients of q and k are 0, to which PyTorch adds rounding errors")
    check("causal_attention", tensors(dtype, **dict.fromkeys("qkv", (2, 3, T, D))), **options)


@each_dtype
@pytest.mark.parametrize("shape", [(3, 11, 17), (2, 3, 384), (5, 1)], ids=str)
def test_layer_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if shape[-1] == 1 and dtype != torch.float64:
        pytest.skip("the gradient of x is 0, to which PyTorch adds rounding errors")
    inputs = tensors(dtype, x=shape, weight=shape[-1:], bias=shape[-1:])
    x, weight = dict(x=inputs.pop("x")), dict(weight=inputs["weight"])
    check("layer_norm", x, **weight)
    for params in (inputs, weight):
        if dtype.itemsize >= 4:
            check("layer_norm", x | params, eps=1e-3)
        else:  # PyTorch sums the parameters' gradients in 16 bits on a CPU, beyond the tolerance
            check("layer_norm", x, **params, eps=1e-3)


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.37])
def test_softmax(dtype: torch.dtype, causal: bool, scale: float) -> None:
    x = randn(2, 3, 33, 33, dtype=dtype) * 4
    check("softmax", dict(x=x), scale=scale, causal=causal)


@each_dtype
def test_cross_entropy(dtype: torch.dtype) -> None:
    targets = torch.arange(65) % 50
    targets[::7] = -100
    for scale in (1, 20):  # of an untrained model, and of a confident one
        logits = randn(64, 50, dtype=dtype) * scale
        for some in (targets[1:], targets[:-1]):  # targets may start anywhere
            check("cross_entropy", dict(logits=logits, targets=some))
    few, logits = torch.tensor([0, 3, 9, 3]), randn(4, 10, dtype=dtype)
    check("cross_entropy", dict(logits=logits, targets=few))
    check("cross_entropy", dict(logits=logits, targets=few), ignore_index=3)
    none = dict(logits=logits, targets=torch.full((4,), -100))
    assert all(ops.cross_entropy(**none).isnan() for ops in (eager, builtin))
    if dtype == torch.float64:
        check("cross_entropy", none)


@each_dtype
def test_gelu(dtype: torch.dtype) -> None:
    inputs = tensors(dtype, x=(7, 11, 19), bias=(19,))
    inputs["x"] *= 2
    check("gelu", inputs)
    check("gelu", dict(x=inputs["x"]), bias=None)


@each_dtype
def test_dropout_add_layer_norm_without_dropout(dtype: torch.dtype) -> None:
    name, N = "dropout_add_layer_norm", 384
    sizes = dict(branch=(3, 11, N), residual=(3, 11, N), weight=(N,), bias=(N,))
    halves = tensors(dtype, **sizes)
    if dtype.itemsize < 4:  # as in training
        inputs = tensors(torch.float32, **sizes) | dict(branch=halves["branch"])
    else:
        inputs = halves
    check(name, inputs)
    check(name, {n: x for n, x in inputs.items() if n != "bias"}, bias=None, eps=1e-2)
    rows = {n: halves[n] for n in ("branch", "residual")}
    check(name, rows, weight=halves["weight"], bias=halves["bias"])


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
def test_only_pytorchs_generator_decides_what_is_dropped(seed: int | None) -> None:
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


@pytest.mark.parametrize("dtype", DTYPES[1:])
@both
@pytest.mark.parametrize("name", OPS)
def test_results_come_in_the_dtype_of_the_first_argument(name, module, dtype) -> None:
    outputs, _ = run(getattr(module, name), inputs_of(name, dtype))
    wanted = torch.float32 if "cross_entropy" in name else dtype
    assert [x.dtype for x in outputs] == [wanted] * len(outputs)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@both
def test_a_half_branch_joins_a_float32_stream(module, dtype: torch.dtype) -> None:
    inputs = inputs_of("dropout_add_layer_norm", torch.float32)
    total, normed = module.dropout_add_layer_norm(inputs.pop("branch").to(dtype), **inputs)
    assert (total.dtype, normed.dtype) == (torch.float32, dtype)
    norm = inputs_of("layer_norm", torch.float32)
    assert module.layer_norm(norm.pop("x").to(dtype), **norm).dtype == dtype


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_decode_attention_takes_any_scale(scale):
    row, position = torch.randn(1, 1, 3, 2, 16), torch.tensor([0])
    cache = torch.zeros(2, 1, 2, 8, 16)
    results = [ops.decode_attention(row, *cache, position, scale=scale) for ops in (builtin, eager)]
    torch.testing.assert_close(*results)
