"""The benchmarks of the ops without a gradient: who has a time, and that nothing is left undone."""

from typing import Any

import pytest
import torch
from irongpt_kernels import builtin, eager
from irongpt_kernels.op_inputs import TOP_K
from irongpt_kernels.op_specs import OpSpec

from benchmarks.ops import __main__ as kernels
from benchmarks.ops import inplace_ops
from benchmarks.ops.cases import Case, Shape, dropping
from benchmarks.ops.providers import by, computes

CPU = torch.device("cpu")
TINY = Shape(B=2, H=2, T=8, D=16, V=13, L=1)
each_op = pytest.mark.parametrize("op", inplace_ops.OPS)


def case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, "nano", TINY, dtype, dropping(op))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_has_an_op_has_its_time(op: str, dtype: torch.dtype) -> None:
    names = ("eager", "builtin", "naive")
    rows = kernels.measure_case(case(op, dtype), CPU, names, 2)
    assert [r["provider"] for r in rows] == [name for name in names if computes(name, op)]
    for r in rows:
        assert r["mode"] == "call"
        assert r["seconds"] > 0
        assert r["least_bytes"] > 0
        if r["provider"] == "eager":
            assert r["accuracy"]["ok"]
    assert len(rows) == (2 if op in ("adamw", "muon", "norm_linear", *inplace_ops.AS_EAGER) else 3)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_keep_the_rule(op: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (row,) = kernels.measure_case(case(op, dtype), device, ("fused",), 1)
    assert row["accuracy"]["ok"], row
    assert row["seconds"] > 0


def changed_by_eager(one: Case) -> list[str]:
    x, before = one.inputs(CPU), one.inputs(CPU)
    by(eager, one, CPU)(x)
    return [name for name, t in x.items() if not torch.equal(t, before[name])]


@each_op
def test_what_is_left_undone_is_beyond_the_rule(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the inputs that eager changes (weights, moments, 16-bit copies, steps, caches,
    tokens, counts) as if nobody had written it, and each output that is no input, wrong."""
    one, right = case(op, torch.float16), OpSpec.run
    names = changed_by_eager(one)
    assert len(names) == {"adamw": 8, "muon": 4, "decode_attention": 2, "sample_tokens": 2}.get(
        op, 0
    )
    x = one.inputs(CPU)
    given = {t.data_ptr() for t in x.values()}
    fresh = sum(t.data_ptr() not in given for t in by(eager, one, CPU)(x))
    for undone in [*names, *range(fresh)]:

        def run(self: OpSpec, ops: Any, *args: Any, undone: Any = undone, **options: Any) -> tuple:
            x = args[1]
            before = {name: t.clone() for name, t in x.items()}
            out = right(self, ops, *args, **options)
            if ops is builtin and isinstance(undone, str):
                x[undone].copy_(before[undone])
            elif ops is builtin:
                given = {t.data_ptr() for t in x.values()}
                [t for t in out if t.data_ptr() not in given][undone].view(-1)[-1] += 1
            return out

        monkeypatch.setattr(OpSpec, "run", run)
        monkeypatch.setattr("benchmarks.ops.providers.computes", lambda name, op: True)
        (row,) = kernels.measure_case(one, CPU, ("builtin",), 1)
        assert not row["accuracy"]["ok"], (op, undone)


def test_the_copies_are_the_weights_and_nothing_is_clipped() -> None:
    for op in inplace_ops.OPTIMIZERS:
        one = case(op, torch.float16)
        x, before = one.inputs(CPU), one.inputs(CPU)
        for _ in range(3):
            by(builtin, one, CPU)(x)
        assert torch.equal(x["matrices.copies"], x["matrices.params"].half())
        grads = [name for name in x if name.endswith("grads")]
        assert all(torch.equal(x[name], before[name]) for name in grads)


def test_a_naive_sample_is_of_the_likeliest() -> None:
    one = case("sample_tokens")
    best = one.inputs(CPU)["logits"].topk(TOP_K if one.shape.V > TOP_K else 3)
    x = one.inputs(CPU)
    x["logits"] = x["logits"].scatter(1, best.indices, 50.0)
    tokens, counts = inplace_ops.naive(one.op, one.p)(x)
    assert all(tokens[b, 0] in best.indices[b] for b in range(len(tokens)))
    before = one.inputs(CPU)
    assert torch.equal(tokens[:, 1:], before["tokens"][:, 1:])
    assert torch.equal(counts, before["counts"] + 1)
