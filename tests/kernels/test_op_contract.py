"""The promises that every op makes, once for all of them. The table of ops says which there are.

The sanitizer adds that no access is out of bounds and that the order of programs changes no bit.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from irongpt_kernels.op_specs import TOKEN
from irongpt_kernels.runtime import launch
from numerics import (
    DEVICE,
    DTYPES,
    GRADIENTS,
    HALVES,
    LAYOUTS,
    OUTPUTS,
    assert_exact,
    assert_rule,
    each_dtype,
    inputs_of,
)
from op_cases import CASES, OP_CASES, ROWS, WITHOUT_GRADIENT, Calls, Case, leaves_of
from torch import Tensor

INF, NAN = math.inf, math.nan
ROW_OPS = ["layer_norm", "softmax", "gelu", "dropout_add_layer_norm"]  # of any rank

PATHS = {n: c for n, c in CASES.items() if "seed" not in c.options}
each_path = pytest.mark.parametrize("case", PATHS.values(), ids=list(PATHS), indirect=True)
each_op = pytest.mark.parametrize("case", OP_CASES.values(), ids=list(OP_CASES), indirect=True)
each_dropout_op = pytest.mark.parametrize(
    "case", [c for c in OP_CASES.values() if "seed" in c.options], ids=lambda c: c.op, indirect=True
)
each_row_op = pytest.mark.parametrize(
    "case", [Case(op) for op in ROW_OPS], ids=ROW_OPS, indirect=True
)
each_other = pytest.mark.parametrize("case", WITHOUT_GRADIENT.values(), ids=list(WITHOUT_GRADIENT))
# Fused gives the same bits. Eager and builtin, whose sums depend on layouts, run in float64. Sums
# of compiled kernels depend on layouts too, and are held to the tolerance there.
each_module = pytest.mark.parametrize(
    ("ops", "dtype"),
    [(eager, torch.float64), (builtin, torch.float64), *((fused, dtype) for dtype in DTYPES)],
    ids=["eager", "builtin", *(f"fused-{str(d).removeprefix('torch.')}" for d in DTYPES)],
)


@pytest.fixture
def case(request) -> Iterator[Case]:
    with request.param.path():
        yield request.param


def assert_same(ops: Any, a: Any, b: Any) -> None:
    if ops is fused:
        assert all(map(torch.equal, a, b))
    else:
        assert_exact(tuple(a), tuple(b))


@each_op
@pytest.mark.parametrize("part", ["all", "first", "last"])
def test_custom_ops_pass_opcheck(case, part: str) -> None:
    """The op and its backward: with every gradient, and with those of one input and one output."""
    inputs = leaves_of(case.inputs())
    floats = [n for n, x in inputs.items() if x.is_floating_point()]
    upstream = case.upstream(inputs)
    if part != "all" and "bias" not in inputs:
        pytest.skip("one input, or attention, which leaves unwanted gradients unwritten")
    at = dict(all=slice(None), first=slice(1), last=slice(-1, None))[part]
    for name in set(floats) - set(floats[at]):
        inputs[name] = None if name == "bias" else inputs[name].detach()
    with Calls() as calls:
        outputs = case.outputs(fused, inputs)[at]
        torch.autograd.grad(outputs, [inputs[n] for n in floats[at]], upstream[at])
    # A norm computes the gradients of its parameters, and of embeddings, by a separate op.
    groups = [{"weight", "bias"}, {"wte", "wpe"}] if "layer_norm" in case.op else []
    ops = 1 + (case.op != "linear_cross_entropy")  # which has its gradients in the forward
    assert len(calls.found) == ops + sum(not g.isdisjoint(floats[at]) for g in groups)
    calls.check("" if part == "all" else "backward")


@each_other
def test_ops_without_a_gradient_pass_opcheck_and_give_the_same_bits_again(case: Case) -> None:
    inputs = case.inputs(torch.float16)
    with Calls() as calls:
        first, again = (case.outputs(fused, inputs) for _ in range(2))
    calls.check()
    assert all(map(torch.equal, first, again))


@each_op
def test_an_op_compiles_without_a_graph_break(case) -> None:
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    compiled = torch.compile(getattr(fused, case.op), fullgraph=True, backend="aot_eager")
    found = case.results(type("Compiled", (), {case.op: staticmethod(compiled)}), inputs, upstream)
    assert_same(fused, found, case.results(fused, inputs, upstream))


@each_op
@each_module
def test_two_runs_give_the_same_bits_and_leave_inputs_unchanged(case, ops, dtype) -> None:
    """Attention on two tiles of queries."""
    leaves = leaves_of(replace(case, shape=replace(ROWS, T=37)).inputs(dtype))
    upstream = case.upstream(leaves)
    tensors = [*leaves.values(), *upstream]
    before = [x.detach().clone() for x in tensors]
    found = []
    for _ in range(2):
        outputs = case.outputs(ops, leaves)
        found += [  # the backward runs twice on each graph
            [*outputs, *case.gradients(leaves, outputs, upstream, retain=True)] for _ in range(2)
        ]
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    assert all(map(torch.equal, tensors, before))


@each_op
def test_a_second_derivative_raises(case) -> None:
    leaves = leaves_of(case.inputs())
    first, *_ = (x for x in leaves.values() if x.requires_grad)
    loss = sum(y.sum() for y in case.outputs(fused, leaves))
    message = r"_backward.*no autograd formula|no second derivative"
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012 - by either call
        (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
        torch.autograd.grad(loss + gradient.square().sum(), first)


@each_op
@each_dtype
@pytest.mark.parametrize("enabled", [False, True], ids=["no autocast", "autocast"])
def test_dtypes_are_those_of_eager(case, dtype, enabled: bool) -> None:
    """For every dtype of the residual stream and of weights."""
    kinds = [case.inputs(dtype, stream=s, weight=w) for s in DTYPES for w in DTYPES]
    for inputs in {tuple(x.dtype for x in inputs.values()): inputs for inputs in kinds}.values():
        found = []
        for ops in (fused, eager):
            leaves = leaves_of(inputs)
            with torch.autocast(DEVICE, torch.float16, enabled=enabled):  # not of the backward
                outputs = case.outputs(ops, leaves)
            gradients = case.gradients(leaves, outputs, tuple(map(torch.ones_like, outputs)))
            found.append([x.dtype for x in (*outputs, *gradients)])
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("case", "ops", "dtype"),
    [
        pytest.param(case, ops, dtype, id=f"{name}-{ops.__name__.split('.')[-1]}-{str(dtype)[6:]}")
        for name, case in PATHS.items()
        for ops, dtype in [(eager, torch.float64), (builtin, torch.float64), (fused, torch.float32)]
        + [(fused, half) for half in HALVES if "attention" in name]  # it has a path for float32
    ]
    + [pytest.param(WITHOUT_GRADIENT[s.name], fused, torch.float16, id=s.name) for s in TOKEN],
    indirect=["case"],
)
def test_the_layout_of_inputs_and_gradients_changes_no_bit(case, ops, dtype) -> None:
    """Each tensor has another layout than the others, and every layout in its turn."""
    H = 2 if "attention" in case.op else 1
    case = replace(case, shape=replace(case.shape, B=2, H=H, T=5))
    inputs = case.inputs(dtype)
    floats = [n for n, x in inputs.items() if x.is_floating_point()]
    upstream = dict(enumerate(case.upstream(inputs)))
    for turn in range(len(LAYOUTS)):
        laid, above = dict(inputs), dict(upstream)
        for i, name in enumerate([*floats, *upstream]):
            layout, place = list(LAYOUTS.items())[(i + turn) % len(LAYOUTS)]
            same = ops is fused and launch.INTERPRETED
            if not same and layout == "one value expanded" and (name in inputs or ops is fused):
                continue  # a norm, or a sum, of equal values is one rounding: nothing to compare
            if name in case.spec.changes and "expanded" in layout:
                continue  # several elements at one address cannot be updated
            tensors = laid if name in inputs else above
            tensors[name] = place(tensors[name]) if tensors[name].dim() else tensors[name]
        for name in set(inputs) - set(floats):
            laid[name] = torch.stack([laid[name], 0 * laid[name] + 99], 1)[:, 0]
        found = case.results(ops, laid, tuple(above.values()))
        straight = [{n: x.contiguous() for n, x in t.items()} for t in (laid, above)]
        wanted = case.results(ops, straight[0], tuple(straight[1].values()))
        if ops is fused and not launch.INTERPRETED:
            assert_within_tolerance(case, straight[0], straight[1], found)
        else:
            assert_same(ops, found, wanted)
        assert not any(x.isnan().any() for x in found)


def assert_within_tolerance(case: Case, inputs: Any, upstream: Any, found: Any) -> None:
    def eager_results(cast: Any) -> Any:
        given = ({n: cast(x) for n, x in tensors.items()} for tensors in (inputs, upstream))
        x, above = given
        return case.results(eager, x, tuple(above.values()))

    base = eager_results(lambda x: x)
    oracle = eager_results(lambda x: x.double() if x.is_floating_point() else x)
    outputs = len(upstream) or len(found)
    for i, (x, *wanted) in enumerate(zip(found, base, oracle, strict=True)):
        if x.is_floating_point():
            assert_rule(OUTPUTS if i < outputs else GRADIENTS, x, *wanted)
        else:
            assert torch.equal(x, wanted[0])


@each_row_op
@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 2, 2)], ids=str)
def test_any_rank_gives_the_bits_of_its_rows(case, lead: tuple[int, ...]) -> None:
    M = math.prod(lead)
    inputs = replace(case, shape=replace(ROWS, M=M), lead=lead).inputs()
    if case.op == "softmax":
        inputs["x"] = inputs["x"].view(*lead, -1)
    upstream = case.upstream(inputs)
    found = case.results(fused, inputs, upstream)
    parameters = ("weight", "bias")
    rows = {n: x if n in parameters else x.reshape(M, -1) for n, x in inputs.items()}
    wanted = case.results(fused, rows, tuple(y.view(M, -1) for y in upstream))
    assert_same(fused, found, [y.view_as(x) for x, y in zip(found, wanted, strict=True)])
    assert found[0].shape == (*lead, found[0].shape[-1])


EMPTY = [
    *((name, {size: 0}, ()) for name in ("causal_attention", "causal_attention_packed",
      "causal_attention with dropout") for size in "BHT"),
    *((name, dict(M=0), lead) for name in ("layer_norm", "gelu", "dropout_add_layer_norm",
      "dropout_add_layer_norm with dropout") for lead in ((0,), (3, 0))),
    *((name, dict(N=0), (4, 5)) for name in ("layer_norm", "gelu", "dropout_add_layer_norm")),
    *((name, {size: 0}, ()) for name in ("softmax", "online softmax") for size in "MV"),
    ("causal softmax", dict(B=0), ()), ("causal softmax", dict(T=0), ()),
    ("online causal softmax", dict(B=0), ()), ("linear_cross_entropy", dict(N=0), ()),
    *((name, dict(M=0), ()) for name in ("cross_entropy", "linear_cross_entropy")),
    *(("embed_layer_norm", {size: 0}, ()) for size in "BT"),
    *((spec.name, dict(B=0), ()) for spec in TOKEN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sizes", "lead"), EMPTY, ids=str)
def test_empty_inputs(name: str, sizes: dict[str, int], lead: tuple[int, ...]) -> None:
    """The outputs are those of builtin, and the gradients are 0."""
    case = (CASES | WITHOUT_GRADIENT)[name]
    case = replace(case, shape=replace(case.shape, **sizes), lead=lead)
    inputs = case.inputs()
    wanted = case.outputs(builtin, inputs)
    floats = [x for x in inputs.values() if x.is_floating_point()]
    for ops in (fused, eager):
        with case.path():
            found = case.results(ops, inputs, tuple(map(torch.ones_like, wanted)))
        torch.testing.assert_close(tuple(found[: len(wanted)]), wanted, equal_nan=True)
        assert all(map(torch.equal, found[len(wanted) :], map(torch.zeros_like, floats)))


@each_op
@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
def test_frozen_inputs_get_no_gradient_and_the_others_theirs(case, ops) -> None:
    """For every set of them. Without any gradient nothing is recorded."""
    dtype = torch.float32 if ops is fused else torch.float64
    inputs = case.inputs(dtype)
    floats = [n for n, x in inputs.items() if x.is_floating_point()]
    upstream = case.upstream(inputs)
    outputs = case.outputs(ops, inputs)
    everything = dict(zip(floats, case.results(ops, inputs, upstream)[len(outputs) :], strict=True))
    for learn in itertools.product([False, True], repeat=len(floats)):
        wanted = {n for n, one in zip(floats, learn, strict=True) if one}
        leaves = {n: x.detach().clone().requires_grad_(n in wanted) for n, x in inputs.items()}
        found = case.outputs(ops, leaves)
        assert found[-1].requires_grad == any(learn)
        if wanted:
            pairs = [(y, g) for y, g in zip(found, upstream, strict=True) if y.requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
        assert all(leaves[n].grad is None for n in set(inputs) - wanted)
        names = sorted(wanted)
        assert_same(ops, [leaves[n].grad for n in names], [everything[n] for n in names])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = case.outputs(ops, leaves)
        assert not any(y.requires_grad for y in found)
        assert_same(ops, found, outputs)


@each_path
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_an_element_that_is_not_finite_has_eagers_effect(case, bad: float) -> None:
    """The same elements of the result are NaN or infinite, and those that keep their bits in eager
    do so here. Attention has to be not finite where eager is not, and of a causal softmax the
    positions that a row sees are compared."""
    inputs = case.inputs()
    clean = [case.outputs(ops, inputs) for ops in (fused, eager)]
    for name, x in inputs.items():
        if not x.is_floating_point():
            continue
        changed = inputs | {name: x.clone()}
        at = tuple(min(1, n - 1) for n in x.shape)
        changed[name][at] = bad
        for y, e, before, eager_before in zip(
            case.outputs(fused, changed), case.outputs(eager, changed), *clean, strict=True
        ):
            if "attention" in case.op:
                assert not y[~e.isfinite()].isfinite().any()
                continue
            if case.options.get("causal"):
                y, e = y.tril(), e.tril()
            assert torch.equal(y.isnan(), e.isnan())
            assert torch.equal(y[~y.isnan()].isinf(), e[~e.isnan()].isinf())
            same = e == eager_before
            assert torch.equal(y[same], before[same])
    if math.isnan(bad):
        name, x = next(iter(inputs.items()))
        at = tuple(min(1, n - 1) for n in x.shape)
        changed = inputs | {name: x.clone()}
        changed[name][at] = bad
        upstream = case.upstream(inputs)
        gradient = case.results(fused, changed, upstream)[len(upstream)]
        assert gradient[at].isnan()


@each_dropout_op
@pytest.mark.parametrize("ops", [eager, fused], ids=["eager", "fused"])
def test_a_seed_is_a_number_or_a_tensor_that_changes_in_place(case, ops) -> None:
    inputs = case.inputs()

    def outputs(p: float, seed: int | Tensor | None) -> tuple[Tensor, ...]:
        return replace(case, options=dict(dropout_p=p, seed=seed)).outputs(ops, inputs)

    assert all(map(torch.equal, outputs(0.0, None), outputs(0.0, 5)))
    for start in (3, -3, 2**40 + 1):
        seed = torch.tensor(start, device=DEVICE)
        first = outputs(0.4, seed)
        seed += 1
        second = outputs(0.4, seed)
        assert all(map(torch.equal, first, outputs(0.4, start)))
        assert all(map(torch.equal, second, outputs(0.4, start + 1)))
        assert not any(map(torch.equal, first, second))


@each_dropout_op
def test_a_seed_that_changes_between_forward_and_backward_is_rejected(case) -> None:
    seed = torch.tensor(3, device=DEVICE)
    given = replace(case, options=dict(dropout_p=0.3, seed=seed))
    outputs = given.outputs(fused, leaves_of(case.inputs()))
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


BAD_SEEDS = [
    (torch.tensor(1, device="meta"), ValueError, "^seed is on meta, but {first} is on cpu$"),
    (torch.tensor([1]), TypeError, "^seed must be an int or a 0-d int64 tensor, got torch.int"),
    (torch.tensor(1.0), TypeError, "^seed must be .*, got torch.float32"),
    (1.5, TypeError, "^seed must be .*, got 1.5$"),
    (2**63, ValueError, "^seed must fit into a signed 64-bit integer, got 9223372036854775808$"),
]


@pytest.mark.parametrize("name", [n for n, case in OP_CASES.items() if "seed" in case.options])
def test_bad_dropout_options_are_named(name: str) -> None:
    inputs = inputs_of(name, torch.float32, ROWS)
    for ops in (eager, builtin, fused):
        for p in (1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match=rf"^dropout_p must be in \[0, 1\), got {p}$"):
                getattr(ops, name)(**inputs, dropout_p=p, seed=1)
    for op in (getattr(ops, name) for ops in (eager, fused)):
        with pytest.raises(ValueError, match=r"^dropout_p > 0 needs a seed$"):
            op(**inputs, dropout_p=0.1)
        for (seed, error, message), p in itertools.product(BAD_SEEDS, (0.0, 0.5)):
            with pytest.raises(error, match=message.format(first=next(iter(inputs)))):
                op(**inputs, dropout_p=p, seed=seed)


TENSORS = [
    (case, name)
    for case in (*OP_CASES.values(), *(WITHOUT_GRADIENT[s.name] for s in TOKEN))
    for name in case.inputs()
]
FIRST = dict(  # messages for a first tensor without dimensions
    causal_attention="shape (B, H, T, D)", causal_attention_packed="shape (B, T, 3, H, D)",
    cross_entropy="shape (M, V)", linear_cross_entropy="shape (M, C)",
    embed_layer_norm="shape (V, C)",
)  # fmt: skip
ANY = dict(weight="V", wpe="T", idx="B")  # a message names the number of rows that may differ


@pytest.mark.parametrize(("case", "name"), TENSORS, ids=lambda x: getattr(x, "op", x))
def test_a_bad_tensor_is_named(case: Case, name: str) -> None:
    """One that is missing, no tensor, of another dtype, shape or rank, or on another device."""
    inputs, token, op = case.inputs(), case.spec.kind == "token", case.op
    x = inputs[name]
    first = next(n for n, x in inputs.items() if token is False or x.dtype.is_floating_point)
    inputs |= case.spec.options(case.shape, 0.8, 5)
    kind = "float32 or float16 or bfloat16" if x.is_floating_point() else "int64"
    message = f"{name} must be a tensor of {kind}, got"
    bad: list[tuple[Any, type[Exception], str]] = [([1.0], TypeError, f"{message} list")]
    if "bias" not in name:
        bad.append((None, TypeError, f"{message} NoneType"))
    others = [torch.float64, torch.int64 if x.is_floating_point() else torch.int32]
    bad += [(x.to(d), TypeError, f"{message} {d}") for d in others]
    if name != first:
        bad.append((x.to("meta"), ValueError, f"{name} is on meta, but {first} is on {x.device}"))
    if not token and name == first:
        wanted = FIRST.get(op)
        message = f"{wanted}, got ()" if wanted else "at least one dimension, got shape ()"
        bad.append((x.sum(), ValueError, f"{name} must have {message}"))
    elif not token:
        longer = torch.cat([x, x], -1)
        wanted = f"({ANY[name]}, {x.shape[1]})" if name in ANY and x.dim() > 1 else tuple(x.shape)
        message = f"{name} must have shape {wanted}, got {tuple(longer.shape)}"
        bad.append((longer, ValueError, message))
    for value, error, message in bad:
        with pytest.raises(error, match=rf"^{re.escape(message)}$"):
            getattr(fused, op)(**inputs | {name: value})
