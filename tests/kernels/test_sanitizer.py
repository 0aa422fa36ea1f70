"""The sanitizer catches injected faults, and every op of `fused` runs clean under it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from irongpt_kernels.op_inputs import RowShape
from irongpt_kernels.runtime import launch
from numerics import LAYOUTS, Inputs, randn
from op_cases import CASES, ROWS, WITHOUT_GRADIENT, Case, leaves_of
from poison import poison
from sanitizer import Violation, addresses_only, sanitize
from torch import Tensor

if not launch.INTERPRETED:
    pytest.skip("the sanitizer works on Triton's interpreter", allow_module_level=True)

from irongpt_kernels import fused

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
    with sanitize(order=1) as launched:
        _copy(x, y, 19)
    assert torch.equal(x, y)
    assert launched == ["_copy_kernel"]


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
def test_an_injected_fault_is_caught(fault: str, launch_it: Callable[[Tensor], object]) -> None:
    with sanitize(), pytest.raises(Violation, match=fault):
        launch_it(randn(19, dtype=F32))


def test_an_int32_offset_is_caught_without_memory() -> None:
    x = torch.empty(2**31 + 8, device="meta")
    with addresses_only(), pytest.raises(Violation, match="int32 overflow"):
        _copy_kernel[(2**28 + 1,)](x, x, len(x), 1, 8, 8, True)
    with addresses_only(), pytest.raises(Violation, match="load out of bounds"):
        _copy(x[:19], x, 19, stride=-1)
    with addresses_only() as launched:
        _copy(x, x, 19, stride=80_000_000)
    assert launched == ["_copy_kernel"]


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
    _copy(torch.ones(40), y[:18], 19)  # out of bounds, which nothing checks
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


# Several programs and several tiles take part: two tiles of attention with dropout, which is slow
# here, else three. The packed op launches the kernels of causal_attention.
SHAPE = replace(ROWS, H=2, V=37, M=33, N=37)
CHECKED = {n: c for n, c in CASES.items() if "packed" not in n and "in blocks" not in n}
each_case = pytest.mark.parametrize("case", CHECKED.values(), ids=list(CHECKED), indirect=True)
EVERY = CHECKED | WITHOUT_GRADIENT
each_of_every = pytest.mark.parametrize("case", EVERY.values(), ids=list(EVERY), indirect=True)
# Where loads give 0, kernels divide by it.
of_no_values = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# How many kernels an op without a gradient launches, if not one.
KERNELS = dict(adamw=3, muon=14, sum_shards=3)


@pytest.fixture
def case(request) -> Iterator[Case]:
    with request.param.path():
        yield request.param


def _sized(case: Case) -> Case:
    if not case.spec.differentiable or "ONLINE_BLOCK" in case.constants:
        return case
    T = {"causal_attention": 35 if case.options else 67}.get(case.op, 37)
    return replace(case, shape=replace(SHAPE, T=T), lead=(3, 11))


def _laid_out(inputs: Inputs) -> Inputs:
    """Every matrix is a slice of a wider tensor, whose other values must not be read."""
    place = LAYOUTS["slice of a wider tensor"]
    return {n: place(x) if x.dim() > 1 and x.is_floating_point() else x for n, x in inputs.items()}


def assert_launched(case: Case, kernels: list[str]) -> None:
    if case.spec.differentiable:
        assert len(kernels) >= 2, "forward and backward are kernels"
    else:
        assert len(kernels) == KERNELS.get(case.op, 1)


@each_of_every
@pytest.mark.parametrize(
    ("dtype", "orders"), [(F32, (0, 1)), (F16, (1,))], ids=["float32", "float16"]
)
def test_an_op_runs_clean_in_any_order(case, dtype: torch.dtype, orders: tuple[int, ...]) -> None:
    inputs = _sized(case).inputs(dtype)
    upstream = case.upstream(inputs)
    plain = case.results(fused, inputs, upstream)
    assert all(x.isfinite().all() for x in plain)
    for order in orders:
        with sanitize(order) as launched:
            results = case.results(fused, _laid_out(inputs), upstream)
        assert all(map(torch.equal, plain, results))
        assert_launched(case, launched)


@each_case
def test_an_op_runs_clean_on_its_smallest_input(case) -> None:
    one = RowShape(B=1, H=1, T=1, D=16, V=2, M=1, N=1)
    inputs = replace(case, shape=one, lead=(1, 1)).inputs()
    if "targets" in inputs:
        inputs["targets"] = torch.tensor([0])
    with sanitize():
        results = case.results(fused, inputs, case.upstream(inputs))
    assert all(x.isfinite().all() for x in results)


def _big(case: Case) -> Inputs:
    """Meta tensors of more than 2^31 elements, in shapes whose kernels loop little."""

    def empty(*shape: int, dtype: torch.dtype = F16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if case.options.get("causal"):
        return dict(x=empty(2**19 + 1, 65, 65))
    x = empty(2**19 + 1, 4099)
    packed = empty(2**24 + 1, 67, 3, 4, 16)  # and m has 2^32
    tokens = dict(wte=x[:1], wpe=x, idx=empty(1, len(x), dtype=torch.int64))
    return {
        "causal_attention": dict(zip("qkv", packed.permute(2, 0, 3, 1, 4), strict=True)),
        "layer_norm": dict(x=x, weight=x[0], bias=x[0]),
        "softmax": dict(x=x),
        "cross_entropy": dict(logits=x, targets=empty(len(x), dtype=torch.int64)),
        "linear_cross_entropy": dict(
            x=x[:, :16], weight=x[:4099, :16], targets=empty(len(x), dtype=torch.int64)
        ),
        "gelu": dict(x=empty(257, 2**23 + 5), bias=empty(2**23 + 5)),
        "dropout_add_layer_norm": dict(branch=x, residual=x, weight=x[0], bias=x[0]),
        "embed_layer_norm": tokens | dict(weight=x[0], bias=x[0]),
    }[case.op]


def _far_apart(x: Tensor, last: int) -> Tensor:
    """The same shape with strides from 2^31 on, but for the last one, which is given."""
    *outer, _ = x.shape
    strides = [2**31 * math.prod(outer[i + 1 :]) for i in range(len(outer))] + [last]
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, strides)


def _addresses(case: Case, inputs: Inputs, spread: Callable[[Tensor], Tensor]) -> None:
    if "seed" in case.options:
        seed = torch.empty((), dtype=torch.int64, device="meta")
        case = replace(case, options=case.options | dict(seed=seed))
    inputs = {n: spread(x) for n, x in inputs.items()}
    upstream = tuple(map(spread, case.outputs(fused, inputs)))  # by the fake: for the shapes
    leaves = leaves_of(inputs)
    with addresses_only() as launched:
        outputs = case.outputs(fused, leaves)
        torch.autograd.grad(outputs, [x for x in leaves.values() if x.requires_grad], upstream)
    assert_launched(case, launched)


@of_no_values
@pytest.mark.parametrize("name", CHECKED)
def test_an_op_addresses_more_than_2_to_the_31_elements(name: str, monkeypatch) -> None:
    case = CHECKED[name]
    long = dict(MAX_BLOCK=0) if "online" in name else {}
    long |= dict(LOGITS_BYTES=1 << 40) if case.op == "linear_cross_entropy" else {}
    monkeypatch.setattr(launch, "num_sms", lambda device: 2**15)  # few rows for each program
    # With a block of a few columns a long row would take hours.
    with replace(case, constants=long).path():
        _addresses(case, _big(case), lambda x: x)


@of_no_values
@each_case
@pytest.mark.parametrize("last", [1, 2**33], ids=["rows far apart", "all far apart"])
def test_an_op_addresses_strides_beyond_2_to_the_31(case, last: int) -> None:
    inputs = {n: x.to("meta") for n, x in _sized(case).inputs(F16).items()}
    _addresses(case, inputs, lambda x: _far_apart(x, last) if x.dim() else x)


@of_no_values
@pytest.mark.parametrize("name", [n for n in WITHOUT_GRADIENT if n not in ("adamw", "muon")])
@pytest.mark.parametrize("least", [2**31, 2**30], ids=["strides", "multiples of strides"])
def test_an_op_without_a_gradient_addresses_rows_that_an_int32_cannot_count(
    name: str, least: int
) -> None:
    """Strides of 2^30 fit into 32 bits, and their multiples do not."""
    case = WITHOUT_GRADIENT[name]

    def spread(name: str, x: Tensor) -> Tensor:
        if x.dim() < 2 or (least == 2**31 and name in ("tokens", "counts")):
            return x
        if least == 2**31:
            return _far_apart(x, 1)
        inner = x[0].contiguous().stride()
        size = least * (len(x) - 1) + x[0].numel()
        return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, (least, *inner))

    options = case.spec.options(case.shape, 0.8, 3) | case.options
    if "seed" in options:
        options["seed"] = torch.empty((), dtype=torch.int64, device="meta")
    inputs = {n: spread(n, x.to("meta")) for n, x in case.inputs(F16).items()}
    with addresses_only() as launched:
        getattr(fused, case.op)(**inputs, **options)
    assert_launched(case, launched)
