"""Matmuls of a few rows with the ops before and after them, within the tolerance of eager."""

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from numerics import DEVICE, assert_exact, assert_op, each_dtype, randn, values
from torch import Tensor

SIZES = [(1, 16, 16), (3, 37, 21), (4, 384, 109), (2, 100, 33), (5, 37, 21), (0, 16, 16)]
each_size = pytest.mark.parametrize(("M", "K", "N"), SIZES, ids=str)
with_and_without = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def normed(M: int, K: int, N: int, dtype: torch.dtype, bias: bool) -> dict[str, Tensor]:
    inputs = dict(
        x=values(M, K) * 3 + 5,
        weight=values(N, K, dtype=dtype, seed=1),
        norm_weight=values(K, seed=2),
    )
    return inputs | (dict(norm_bias=values(K, seed=3), bias=values(N, seed=4)) if bias else {})


@each_dtype
@each_size
@with_and_without
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "GELU"])
def test_norm_linear(M: int, K: int, N: int, dtype, bias: bool, gelu: bool) -> None:
    for ops in (fused, builtin):
        assert_op(ops, "norm_linear", normed(M, K, N, dtype, bias), (), gelu=gelu, eps=1e-3)


@each_dtype
@pytest.mark.parametrize("V", [4096, 8192, 16384, 50304])
def test_the_head_of_a_large_vocabulary(V: int, dtype: torch.dtype) -> None:
    assert_op(fused, "norm_linear", normed(2, 48, V, dtype, False), ())


@pytest.mark.parametrize("mean", [1e4, 1e6 / 3])
@pytest.mark.parametrize("K", [37, 384])
def test_rows_with_a_large_mean(mean: float, K: int) -> None:
    """The rounding error of the mean would shift the row, and the matmul would add that up."""
    given = normed(3, K, 21, torch.float32, False)
    given["x"] = (mean + 0.1 * randn(3, K)).float().to(DEVICE)
    given["weight"] = given["weight"].abs()
    assert_op(fused, "norm_linear", given, ())


@each_dtype
@each_size
@with_and_without
def test_linear_add(M: int, K: int, N: int, dtype, bias: bool) -> None:
    x, weight = values(M, K, dtype=dtype), values(N, K, dtype=dtype, seed=1)
    given = dict(x=x, weight=weight, residual=values(M, N, seed=2))
    given |= dict(bias=values(N, seed=3)) if bias else {}
    for ops in (fused, builtin):
        assert_op(ops, "linear_add", given, ())


def test_eager_is_the_formula() -> None:
    x, weight, norm, bias = randn(3, 9), randn(5, 9, seed=1), randn(9, seed=2), randn(5, seed=3)
    y = torch.nn.functional.layer_norm(x, (9,), norm, norm) @ weight.T + bias
    assert_exact(eager.norm_linear(x, weight, norm, norm, bias), y)
    wanted = torch.nn.functional.gelu(y, approximate="tanh")
    assert_exact(eager.norm_linear(x, weight, norm, norm, bias, gelu=True), wanted)
    assert_exact(eager.linear_add(x, weight, y, bias), y + x @ weight.T + bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eager_rounds_as_autocast_does(dtype: torch.dtype) -> None:
    x, weight, norm, bias = (
        randn(*shape, dtype=torch.float32, seed=i)
        for i, shape in enumerate([(3, 40), (7, 40), (40,), (7,)])
    )
    with torch.autocast("cpu", dtype):
        plain = torch.nn.functional.linear(eager.layer_norm(x, norm), weight, bias)
        y = eager.gelu(torch.nn.functional.linear(eager.layer_norm(x, norm), weight), bias)
        z = x[:, :7] + torch.nn.functional.linear(x, weight, bias)
    cast = weight.to(dtype)
    assert torch.equal(eager.norm_linear(x, cast, norm, None, bias), plain)
    assert torch.equal(eager.norm_linear(x, cast, norm, None, bias, gelu=True), y)
    assert torch.equal(eager.linear_add(x.to(dtype), cast, x[:, :7], bias), z)


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "GELU"])
def test_the_kernel_rounds_where_eager_rounds(gelu: bool) -> None:
    """Sums of two, which float32 holds, so that nothing but the roundings can differ; hardly ever
    does the norm's last bit decide one of them."""
    x, weight = values(4, 64), torch.zeros(64, 64)
    at = torch.arange(64)
    weight[at, at] = weight[at, (at + 1) % 64] = 1.0
    weight, norm = weight.half().to(x.device), values(64, seed=2)
    same = [ops.norm_linear(x, weight, norm, gelu=gelu) for ops in (fused, eager)]
    assert (same[0] == same[1]).float().mean() > 0.97
    halves = values(4, 64).half()
    zero = torch.zeros(4, 64, device=x.device)
    sums = [ops.linear_add(halves, values(64, 64).half(), zero) for ops in (fused, eager)]
    assert torch.equal(sums[0], sums[0].half().float())
    assert torch.equal(sums[1], sums[1].half().float())


def test_a_row_does_not_depend_on_the_others() -> None:
    given = normed(4, 37, 21, torch.float16, True)
    y = fused.norm_linear(**given)
    given["x"][[0, 1, 3]] = float("nan")
    changed = fused.norm_linear(**given)
    assert torch.equal(changed[2], y[2])
    assert changed[[0, 1, 3]].isnan().all()
