"""The sanitizer catches planted faults, and every op of `fused` runs clean under it."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from addresses import addresses_only
from irongpt_kernels.runtime import launch
from numerics import OPS, Inputs, randn, run
from poison import poison
from sanitizer import Violation, sanitize
from torch import Tensor

if not launch.INTERPRETED:
    pytest.skip("the sanitizer works on Triton's interpreter", allow_module_level=True)

from irongpt_kernels import fused

softmax = importlib.import_module("irongpt_kernels.fused.softmax")
F32, F16 = torch.float32, torch.float16


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, stride, step, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    cols = tl.program_id(0) * step + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols * stride, mask=cols < N if MASKED else cols < BLOCK * 99)
    tl.store(y_ptr + cols, x, mask=cols < N)


def _copy(
    x: Tensor, y: Tensor, N: int, stride: int = 1, step: int = 8, masked: bool = True
) -> None:
    _copy_kernel[(triton.cdiv(N, step),)](x, y, N, stride, step, 8, masked)


@triton.jit
def _store_first(p, value):
    tl.store(p, value)


@triton.jit
def _shared_kernel(x_ptr, WRITE: tl.constexpr, ATOMIC: tl.constexpr):
    """Program 0 writes x[0], which the others read or, with WRITE, write too."""
    pid = tl.program_id(0)
    if ATOMIC:
        tl.atomic_add(x_ptr, 1.0)
    elif WRITE or pid == 0:
        _store_first(x_ptr, pid.to(tl.float32))
    else:
        tl.store(x_ptr + pid, tl.load(x_ptr))


@triton.jit
def _one_address_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 4) // 2, tl.arange(0, 4))


def test_a_clean_kernel_passes_and_writes_its_result() -> None:
    x, y = randn(19, dtype=F32), torch.zeros(19)
    with sanitize(order=1) as report:
        _copy(x, y, 19)
    assert torch.equal(x, y)
    assert report.kernels == ["_copy_kernel"]


@pytest.mark.parametrize(
    ("fault", "launch_it"),
    [
        ("load out of bounds", lambda x: _copy(x, x.clone(), 19, masked=False)),
        ("load out of bounds", lambda x: _copy(x, x.clone(), 19, stride=-1)),
        ("store out of bounds", lambda x: _copy(x, x[:18].clone(), 19)),
        # One past a view, where the storage goes on.
        ("store out of bounds", lambda x: _copy(x, x.repeat(2)[:18], 19)),
        ("load out of bounds", lambda x: _copy(x.repeat(2)[::2], x.clone(), 19)),
        ("int32 overflow", lambda x: _copy(x, x.clone(), 19, stride=2**30)),
        ("store of what another program writes", lambda x: _copy(x, x.clone(), 19, step=4)),
        ("store of what another", lambda x: _shared_kernel[(3,)](x, True, False)),
        ("load of what another", lambda x: _shared_kernel[(3,)](x, False, False)),
        ("atomic", lambda x: _shared_kernel[(3,)](x, False, True)),
        ("two lanes", lambda x: _one_address_kernel[(1,)](x)),
    ],
)
def test_a_planted_fault_is_caught(fault: str, launch_it: Callable[[Tensor], object]) -> None:
    with sanitize(), pytest.raises(Violation, match=fault):
        launch_it(randn(19, dtype=F32))


def test_an_int32_offset_is_caught_without_memory() -> None:
    x = torch.empty(2**31 + 8, device="meta")
    with addresses_only(), pytest.raises(Violation, match="int32 overflow"):
        _copy_kernel[(2**28 + 1,)](x, x, len(x), 1, 8, 8, True)
    with addresses_only(), pytest.raises(Violation, match="load out of bounds"):
        _copy(x[:19], x, 19, stride=-1)
    with addresses_only() as report:
        _copy(x, x, 19, stride=80_000_000)
    assert report.kernels == ["_copy_kernel"]


def test_a_read_before_another_programs_write_is_caught_as_well() -> None:
    """In some of the orders the readers come first."""
    seen = set()
    for order in range(8):
        with sanitize(order), pytest.raises(Violation) as caught:
            _shared_kernel[(3,)](torch.zeros(3), False, False)
        seen.add(str(caught.value).split(": ")[1])
    assert seen == {"load of what another program writes", "store to what another program reads"}


def test_order_runs_every_program_once() -> None:
    x, results = randn(64, dtype=F32), []
    for order in (None, 0, 1, 2):
        y = torch.zeros(64)
        with sanitize(order):
            _copy(x, y, 64)
        results.append(y)
    assert all(torch.equal(x, y) for y in results)


def test_nothing_stays_patched() -> None:
    with pytest.raises(Violation), sanitize():
        _copy(randn(19, dtype=F32), torch.zeros(18), 19)
    y = torch.zeros(40)
    _copy(torch.ones(40), y[:18], 19)  # out of bounds, and nobody looks
    assert y[18] == 1


def test_poison_shows_what_was_not_written() -> None:
    with poison():
        made = [
            torch.empty(3),
            torch.empty_like(torch.ones(2, dtype=F16)),
            torch.ones(1).new_empty(2),
        ]
        assert torch.empty(1, dtype=torch.int64) == 2**63 - 1
    assert all(x.isnan().all() for x in made)


def _cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every op with each of its options: name of the case, (op, options)."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in OPS}
    del cases["causal_attention_packed"]  # it launches the kernels of causal_attention
    for name in ("causal_attention", "dropout_add_layer_norm"):
        cases[f"{name} with dropout"] = name, dict(dropout_p=0.3, seed=5)
    cases["causal softmax"] = "softmax", dict(causal=True, scale=0.5)
    cases["online softmax"] = "softmax", dict(scale=0.5)
    cases["online causal softmax"] = "softmax", dict(causal=True, scale=0.5)
    return cases


CASES = _cases()
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def _rows_longer_than_registers(request: pytest.FixtureRequest, monkeypatch) -> None:
    """The online cases: every row is, and takes several blocks where it is short."""
    if "online" in request.node.name:
        monkeypatch.setattr(softmax, "MAX_BLOCK", 0)
        if "2_to_the_31" not in request.node.name:
            monkeypatch.setattr(softmax, "ONLINE_BLOCK", 4)


# Where loads give 0, kernels divide by it.
of_no_values = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _inputs(case: str, dtype: torch.dtype) -> Inputs:
    """Ragged, and so that several programs and several tiles take part."""
    rows, x = randn(11, 37, dtype=dtype), randn(3, 11, 37, dtype=dtype, seed=1)
    weight, bias = (randn(37, dtype=dtype, seed=seed) for seed in (2, 3))
    if "causal softmax" in case:
        T = 7 if "online" in case else 37
        return dict(x=randn(2, T, T, dtype=dtype))
    if CASES[case][0] == "causal_attention":
        T = 35 if CASES[case][1] else 67  # two tiles with dropout, which is slow here, else three
        packed = randn(1, T, 3, 2, 16, dtype=dtype)  # q, k, v are views of one projection
        return {n: t.transpose(1, 2) for n, t in zip("qkv", packed.unbind(2), strict=True)}
    return {
        "layer_norm": dict(x=x, weight=weight, bias=bias),
        "softmax": dict(x=x[:, :2, :7] if "online" in case else x),
        "cross_entropy": dict(
            logits=rows, targets=torch.tensor([3, -100, 36, 0, 7, 7, -100, 2, 1, 9, 4])
        ),
        "gelu": dict(x=x, bias=bias),
        "dropout_add_layer_norm": dict(
            branch=x, residual=x.flip(0).contiguous(), weight=weight, bias=bias
        ),
    }[CASES[case][0]]


def _run(case: str, inputs: Inputs, upstream: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """Outputs and gradients. `upstream` is random unless given."""
    name, options = CASES[case]
    op = getattr(fused, name)
    if upstream is None:
        with torch.no_grad():
            out = op(**inputs, **options)
        out = out if isinstance(out, tuple) else (out,)
        upstream = tuple(randn(*y.shape, dtype=y.dtype, seed=i) for i, y in enumerate(out, 80))
    outputs, gradients = run(op, inputs, upstream, **options)
    return [*outputs, *gradients]


@each_case
@pytest.mark.parametrize(
    ("dtype", "orders"), [(F32, (0, 1, 2)), (F16, (None,))], ids=["float32", "float16"]
)
def test_an_op_runs_clean_in_any_order(
    case: str, dtype: torch.dtype, orders: tuple[int | None, ...]
) -> None:
    plain = _run(case, _inputs(case, dtype))
    assert all(x.isfinite().all() for x in plain)
    for order in orders:
        with sanitize(order) as report:
            results = _run(case, _inputs(case, dtype))
        assert all(torch.equal(x, y) for x, y in zip(plain, results, strict=True))
        assert len(report.kernels) >= 2, "forward and backward are kernels"


@each_case
def test_an_op_runs_clean_on_its_smallest_input(case: str) -> None:
    inputs = {name: _first_of_each(x) for name, x in _inputs(case, F32).items()}
    if "targets" in inputs:
        inputs["targets"] = torch.tensor([0])
    with sanitize():
        results = _run(case, inputs)
    assert all(x.isfinite().all() for x in results)


def _first_of_each(x: Tensor | None) -> Tensor | None:
    """Size 1 along every dimension, but the last of four: a head of attention."""
    if x is None:
        return None
    return x[tuple(slice(1) for _ in range(x.dim() - (x.dim() == 4)))].clone()


def _big(case: str) -> Inputs:
    """Meta tensors of more than 2^31 elements, in shapes whose kernels loop little."""

    def empty(*shape: int, dtype: torch.dtype = F16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if "causal softmax" in case:
        return dict(x=empty(2**19 + 1, 65, 65))
    if CASES[case][0] == "causal_attention":
        packed = empty(2**24 + 1, 67, 3, 4, 16)  # and m has 2^32
        return {n: t.transpose(1, 2) for n, t in zip("qkv", packed.unbind(2), strict=True)}
    x = empty(2**19 + 1, 4099)
    return {
        "layer_norm": dict(x=x, weight=x[0], bias=x[0]),
        "softmax": dict(x=x),
        "cross_entropy": dict(logits=x, targets=empty(len(x), dtype=torch.int64)),
        "gelu": dict(x=empty(257, 2**23 + 5), bias=empty(2**23 + 5)),
        "dropout_add_layer_norm": dict(branch=x, residual=x, weight=x[0], bias=x[0]),
    }[CASES[case][0]]


def _far_apart(x: Tensor, last: int) -> Tensor:
    """The same shape with strides from 2^31 on, but for the last one, which is given."""
    *outer, _ = x.shape
    strides = [2**31 * math.prod(outer[i + 1 :]) for i in range(len(outer))] + [last]
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, strides)


def _addresses(case: str, inputs: Inputs, spread: Callable[[Tensor], Tensor]) -> None:
    name, options = CASES[case]
    op = getattr(fused, name)
    if "seed" in options:
        options = options | dict(seed=torch.empty((), dtype=torch.int64, device="meta"))
    inputs = {n: x if x is None else spread(x) for n, x in inputs.items()}
    out = op(**inputs, **options)  # by the fake: for the shapes
    upstream = tuple(spread(y) for y in (out if isinstance(out, tuple) else (out,)))
    with addresses_only() as report:
        run(op, inputs, upstream, **options)
    assert len(report.kernels) >= 2, "forward and backward are kernels"


@of_no_values
@each_case
def test_an_op_addresses_more_than_2_to_the_31_elements(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "num_sms", lambda device: 2**15)  # few rows for each program
    _addresses(case, _big(case), lambda x: x)


@of_no_values
@each_case
@pytest.mark.parametrize("last", [1, 2**33], ids=["rows far apart", "all far apart"])
def test_an_op_addresses_strides_beyond_2_to_the_31(case: str, last: int) -> None:
    inputs = {n: None if x is None else x.to("meta") for n, x in _inputs(case, F16).items()}
    _addresses(case, inputs, lambda x: _far_apart(x, last) if x.dim() else x)
