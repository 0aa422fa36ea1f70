"""The softmax kernels within the tolerance of eager, in registers and online."""

import importlib
import math

import pytest
import torch
from numerics import DEVICE, assert_op, each_dtype, run, values

kernel = importlib.import_module("irongpt_kernels.fused.softmax")
INF = math.inf


@pytest.fixture(params=["registers", "online"])
def path(request, monkeypatch) -> str:
    """Both ways through a row, on rows short enough to try."""
    if request.param == "online":
        monkeypatch.setattr(kernel, "MAX_BLOCK", 0)
        small = request.node.originalname == "test_softmax"
        monkeypatch.setattr(kernel, "ONLINE_BLOCK", 4 if small else 16)
    return request.param


@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [1.0, 0.125, 30.0, -0.7, 0.0])
def test_softmax(path, scale: float, causal: bool, dtype: torch.dtype) -> None:
    inputs = dict(x=values(2, 1, 7, 7, dtype=dtype) * 4)
    assert_op(kernel, "softmax", inputs, scale=scale, causal=causal)


@each_dtype
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 33, 127, 129])
def test_any_length(N: int, path, dtype: torch.dtype) -> None:
    assert_op(kernel, "softmax", dict(x=values(2, N, dtype=dtype) * 3))
    if N < 32:
        assert_op(kernel, "softmax", dict(x=values(N, N, dtype=dtype) * 3), causal=True)


@each_dtype
@pytest.mark.parametrize("past", [0, 1], ids=["the longest in registers", "the shortest online"])
def test_long_rows(past: int, dtype: torch.dtype) -> None:
    assert_op(kernel, "softmax", dict(x=values(2, kernel.MAX_BLOCK + past, dtype=dtype)))


@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_extreme_rows(path, causal: bool, dtype: torch.dtype) -> None:
    """To the edge of the dtype, and -inf: in front, behind, in whole blocks, all but one."""
    top = 65504.0 if dtype == torch.float16 else 1e30
    N = 25
    x = values(N, N, dtype=dtype)
    x[1], x[2], x[3] = 3.0, top, -top
    x[4, 4:] = top  # equal to the last bit
    x[5, ::2], x[5, 1::2] = top, -top
    x[6] = torch.arange(N) * (top / N)  # the maximum is the last
    x[7] = x[6].flip(0)
    x[20, :20], x[21, 1:], x[22, 16:], x[23, :16] = -INF, -INF, -INF, -INF
    x[24, :24] = -INF
    assert_op(kernel, "softmax", dict(x=x), causal=causal)


def test_a_row_of_minus_infinity_is_nan_and_no_other(path) -> None:
    x = values(3, 37, dtype=torch.float32)
    x[1] = -INF
    y = kernel.softmax(x)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_the_future_of_a_causal_row_does_not_matter(path) -> None:
    x, dy = values(1, 21, 21, dtype=torch.float32), values(1, 21, 21, dtype=torch.float32, seed=1)
    past = torch.ones(21, 21, device=DEVICE).tril().bool()
    wanted = run(kernel.softmax, dict(x=x), (dy,), causal=True)
    poisoned = x.where(past, math.nan)
    ((y,), (dx,)) = run(kernel.softmax, dict(x=poisoned), (dy.where(past, math.nan),), causal=True)
    assert torch.equal(y, wanted[0][0])
    assert torch.equal(dx, wanted[1][0])
    assert (dx.where(past, 0) == dx).all()


@pytest.mark.parametrize("noise", [0.0, 0.25])
@pytest.mark.parametrize("logit", [2.0, 8.0, 14.0, 20.0])
@each_dtype
def test_a_confident_row_keeps_its_gradient(dtype, logit: float, noise: float, path) -> None:
    """dy - delta cancels: 1 - p of its size is left. In float16 most of y has few digits or none.

    Errors of equal weights do not average out.
    """
    x = values(2, 256, dtype=dtype) * noise
    x[:, 3] = logit
    assert_op(kernel, "softmax", dict(x=x))


def test_a_row_that_climbs_is_rescaled_at_every_step(path) -> None:
    x = (torch.arange(200.0) / 2).to(DEVICE)
    dy = 1 + values(200, dtype=torch.float32)
    assert_op(kernel, "softmax", dict(x=x), (dy,))
