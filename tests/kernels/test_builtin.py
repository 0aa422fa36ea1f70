"""PyTorch's own functions within the tolerance of eager."""

import math

import pytest
import torch
from irongpt_kernels import builtin, eager
from numerics import assert_exact, assert_op, randn, run, small_inputs
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = list(small_inputs())
HALVES = [torch.float16, torch.bfloat16]

both = pytest.mark.parametrize("module", [eager, builtin], ids=["eager", "builtin"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def tensors(dtype: torch.dtype, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    return {n: randn(*size, dtype=dtype, seed=i) for i, (n, size) in enumerate(sizes.items())}


@each_dtype
@pytest.mark.parametrize(
    ("T", "D", "options"),
    [
        pytest.param(17, 32, {}, id="no power of two"),
        pytest.param(33, 64, dict(scale=0.3), id="one over a tile, scale given"),
        pytest.param(256, 64, {}, id="the presets'"),
    ],
)
def test_attention(dtype: torch.dtype, T: int, D: int, options: dict) -> None:
    assert_op(
        builtin, "causal_attention", tensors(dtype, **dict.fromkeys("qkv", (2, 3, T, D))), **options
    )


@each_dtype
@pytest.mark.parametrize("N", [17, 384])
def test_layer_norm(dtype: torch.dtype, N: int) -> None:
    inputs = tensors(dtype, x=(3, 11, N), weight=(N,), bias=(N,))
    for bias in (inputs.pop("bias"), None):
        if dtype == torch.float32:
            assert_op(builtin, "layer_norm", inputs | dict(bias=bias), eps=1e-3)
        else:  # PyTorch sums the parameters' gradients in 16 bits on a CPU, beyond the tolerance
            x, weight = inputs.values()
            assert_op(builtin, "layer_norm", dict(x=x), weight=weight, bias=bias, eps=1e-3)


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.37])
def test_softmax(dtype: torch.dtype, causal: bool, scale: float) -> None:
    x = randn(2, 3, 33, 33, dtype=dtype) * 4
    assert_op(builtin, "softmax", dict(x=x), scale=scale, causal=causal)


@each_dtype
def test_cross_entropy(dtype: torch.dtype) -> None:
    targets = torch.arange(64) % 50
    targets[::7] = -100
    for scale in (1, 20):  # of an untrained model, and of a confident one
        logits = randn(64, 50, dtype=dtype) * scale
        assert_op(builtin, "cross_entropy", dict(logits=logits, targets=targets))


@each_dtype
def test_gelu(dtype: torch.dtype) -> None:
    inputs = tensors(dtype, x=(7, 11, 19), bias=(19,))
    inputs["x"] *= 2
    assert_op(builtin, "gelu", inputs)
    assert_op(builtin, "gelu", dict(x=inputs["x"]), bias=None)


@each_dtype
def test_dropout_add_layer_norm_without_dropout(dtype: torch.dtype) -> None:
    name, N = "dropout_add_layer_norm", 384
    sizes = dict(branch=(3, 11, N), residual=(3, 11, N), weight=(N,), bias=(N,))
    halves = tensors(dtype, **sizes)
    inputs = tensors(torch.float32, **sizes) | dict(branch=halves["branch"])  # as in training
    assert_op(builtin, name, inputs)
    assert_op(builtin, name, {n: x for n, x in inputs.items() if n != "bias"}, bias=None, eps=1e-2)
    rows = {n: halves[n] for n in ("branch", "residual")}
    assert_op(builtin, name, rows, weight=halves["weight"], bias=halves["bias"])


def test_cross_entropy_with_another_ignored_class_and_with_nothing_left() -> None:
    logits, targets = randn(4, 10, dtype=torch.float32), torch.tensor([3, 3, 1, 2])
    assert_op(builtin, "cross_entropy", dict(logits=logits, targets=targets), ignore_index=3)
    assert builtin.cross_entropy(logits, torch.full((4,), -100)).isnan()


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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@both
@pytest.mark.parametrize("name", OPS)
def test_results_come_in_the_dtype_of_the_first_argument(name, module, dtype) -> None:
    outputs, _ = run(getattr(module, name), small_inputs(dtype)[name])
    wanted = torch.float32 if "cross_entropy" in name else dtype
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
