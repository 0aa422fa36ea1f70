"""The benchmarks of the ops: what is timed, what gets a time and what does not."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from irongpt_kernels import builtin, eager, op_specs
from irongpt_kernels.op_inputs import TOP_K
from irongpt_kernels.op_specs import OpSpec

from benchmarks.measure import result_file
from benchmarks.ops import __main__ as kernels
from benchmarks.ops import cases
from benchmarks.ops.accuracy import BASELINES, passes
from benchmarks.ops.cases import IRON, MODES, OPS, Case, Shape
from benchmarks.ops.providers import NAMES, by, computes, missing, providers
from benchmarks.report import tables

CPU = torch.device("cpu")
PEAK_RATES = dict(copy_bytes_per_s=1, gemm_flops_per_s={})
OPTIMIZERS = {spec.name for spec in op_specs.OPTIMIZERS}
TOKEN = {spec.name for spec in op_specs.TOKEN}
NO_GRADIENT = [op for op in OPS if op in OPTIMIZERS | TOKEN]
TINY = Shape(B=1, H=2, T=16, D=16, V=13)
PYTORCH = ("eager", "naive", "builtin", "math")  # what a CPU has without compiling


def case(op: str, dtype: torch.dtype = torch.float32, p: float = 0.0) -> Case:
    return Case(op, "nano", TINY, dtype, p)


@pytest.mark.parametrize("op", [op for op in OPS if op not in NO_GRADIENT])
def test_every_provider_gets_a_time_for_every_mode(op: str) -> None:
    p = 0.2 if op in cases.DROPS else 0.0
    rows = kernels.measure_case(case(op, p=p), CPU, PYTORCH, rounds=2)
    named = {(r.provider, r.mode) for r in rows}
    attention = op.startswith("causal_attention")
    wanted = PYTORCH if attention else ("eager", "builtin")
    assert named == {(name, mode) for name in wanted for mode in MODES}
    for r in rows:
        assert r.seconds > 0
        assert len(r.sample_seconds) == 2
        assert passes(r.provider, r.accuracy)
        assert r.provider != "eager" or 0 <= r.accuracy.share <= 1
        # eager and fused are checked with their dropout, which others draw at random
        assert r.accuracy.dropout == (p if r.provider == "eager" else 0.0)
        assert r.least_bytes > 0
        assert (r.least_flops > 0) == attention


def planted(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: float = 1.0, slope: float = 1.0
) -> None:
    """builtin's op times `wrong`, or with gradients that are `slope` times too large."""
    right = getattr(builtin, op)

    def broken(*args: object, **options: object) -> torch.Tensor:
        y = wrong * right(*args, **options)
        return y.detach() + slope * (y - y.detach())

    monkeypatch.setattr(builtin, op, broken)


@pytest.mark.parametrize("mistake", [dict(wrong=1.01), dict(slope=1.01), dict(wrong=math.nan)])
def test_a_red_gate_prints_no_speed(
    monkeypatch: pytest.MonkeyPatch, mistake: dict[str, float]
) -> None:
    planted(monkeypatch, "gelu", **mistake)
    rows = kernels.measure_case(case("gelu"), CPU, ("eager", "builtin"), rounds=2)
    by = {r.provider: r for r in rows}
    assert by["eager"].timed
    assert not by["builtin"].timed
    assert not by["builtin"].accuracy.ok
    assert "wrong" in by["builtin"].skipped_reason
    assert " +- " not in kernels.line(by["builtin"], {})
    json.dumps(result_file.finite(by["builtin"].to_json()), allow_nan=False)


def test_a_rival_that_errs_by_a_little_has_its_time_and_its_error_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To leave out a faster one would flatter us; our own kernels have no such allowance."""
    planted(monkeypatch, "gelu", wrong=1 + 2e-6)
    rows = kernels.measure_case(case("gelu"), CPU, ("builtin",), rounds=2)
    accuracy = rows[-1].accuracy
    assert not accuracy.ok
    assert 1 < accuracy.share < BASELINES
    assert not passes("fused", accuracy)
    text = tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})
    assert f"| {accuracy.share:.0%} |" in text
    assert "| builtin † |" in text
    assert "EXCEEDS THE TOLERANCE" in kernels.line(rows[-1], PEAK_RATES)
    swept = tables.kernels(
        {"rows": [replace(r, sweep="T") for r in rows], "peak_rates": PEAK_RATES}
    )
    assert " † |" in swept


def test_in_16_bits_too() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rows = kernels.measure_case(case("causal_attention_packed", dtype), CPU, PYTORCH, 1)
        assert {r.provider for r in rows if r.timed} == set(PYTORCH)


def test_the_kernels_are_held_to_the_gate_with_their_dropout() -> None:
    """On a CPU in Triton's interpreter, which tests have on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = kernels.measure_case(case("dropout_add_layer_norm", p=0.2), device, ("fused",), 1)
    assert [r.accuracy.dropout for r in rows] == [0.2] * 3
    assert all(r.accuracy.ok for r in rows)


def test_what_cannot_run_says_why_and_the_rest_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(builtin, "gelu", failing)
    rows = kernels.measure_case(case("gelu"), CPU, ("eager", "builtin"), rounds=1)
    refused = [r for r in rows if r.skipped_reason]
    assert [(r.provider, r.skipped_reason) for r in refused] == [("builtin", "out of memory")]
    assert len(rows) == 1 + len(MODES)


def test_who_refuses_only_with_dropout_has_no_time_then() -> None:
    """PyTorch's flash attention on a CPU passes the accuracy check, which has no dropout."""
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash", "builtin"), 1)
    (refused,) = [r for r in rows if r.provider == "flash"]
    assert "No available kernel" in refused.skipped_reason
    assert {r.mode for r in rows if r.provider == "builtin"} == set(MODES)
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash",), 1)
    assert [r.provider for r in rows if r.skipped_reason] == ["flash"]


def test_the_backend_that_pytorch_picks_is_named() -> None:
    rows = kernels.measure_case(case("causal_attention_packed"), CPU, ("builtin", "math"), 1)
    assert {r.provider: r.backend for r in rows} == {"builtin": "flash", "math": None}
    text = tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})
    assert "| builtin (flash) |" in text


def test_a_row_without_a_graph_is_marked() -> None:
    (row,) = kernels.measure_case(case("gelu"), CPU, ("builtin",), 3)[2:]
    row = replace(row, graph=False, no_graph_reason="it waits for the device")
    rows = [replace(row, mode=mode) for mode in MODES]
    assert "NO GRAPH" in kernels.line(row, PEAK_RATES)
    assert "it waits for the device" in tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})
    swept = [replace(r, sweep="batch") for r in rows]
    assert "* in no graph" in tables.kernels({"rows": swept, "peak_rates": PEAK_RATES})


def test_what_is_not_compiled_in_a_sweep_says_so() -> None:
    wide = replace(case("layer_norm"), sweep="width")
    rows = kernels.measure_case(wide, CPU, ("builtin", "compile"), 1)
    (row,) = [r for r in rows if r.provider == "compile"]
    assert "not compiled in this sweep" in row.skipped_reason


def test_the_own_shape_has_both_16_bit_types_and_dropout_on_and_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `iron` trains and as `fast` does; a quick look has what iron does on this card alone."""
    card = torch.device("cuda")
    monkeypatch.setattr(
        kernels.devices, "precision", lambda name, device: SimpleNamespace(dtype=torch.bfloat16)
    )
    own = kernels.cases_of(card)
    assert {c.sweep for c in own} == {"iron"}
    wanted = {(d, p) for d in (torch.bfloat16, torch.float16, torch.float32) for p in (0.0, 0.2)}
    for op in cases.DROPS:
        assert {(c.dtype, c.p) for c in own if c.op == op} == wanted
    once = len(cases.FLOAT32)
    assert len(own) == len(set(own)) == 3 * (len(OPS) - once + len(cases.DROPS)) + once
    both = kernels.cases_of(card, quick=True, swept=("V",))
    assert {c.dtype for c in both if c.sweep == "V"} == {torch.bfloat16}
    quick = kernels.cases_of(card, quick=True)
    assert {(c.dtype, c.p) for c in quick if c.op in cases.DROPS} == {
        (torch.bfloat16, 0.2), (torch.float32, 0.2)
    }  # fmt: skip
    assert not any(kernels.not_compiled(c, card) for c in own)
    assert {c.shape.B for c in own if c.op in TOKEN} == {1}


def test_layer_norm_takes_the_float32_residual_stream() -> None:
    """As in the model, whose embeddings are float32 under autocast."""
    x = case("layer_norm", torch.float16).inputs(CPU)["x"]
    assert x.dtype == torch.float32
    in_16, in_32 = (case("layer_norm", d).cost("total") for d in (torch.float16, torch.float32))
    assert in_16 == in_32


def test_every_op_is_swept_over_its_rows_and_columns() -> None:
    swept = list(cases.sweep_cases(True, [torch.float16, torch.bfloat16]))
    assert {c.op for c in swept if c.sweep == "batch"} == set(OPS) - set(OPTIMIZERS)
    columns = {c.op for c in swept if c.sweep in ("T", "D", "width", "V")}
    assert columns == set(OPS) - set(NO_GRADIENT) | {"decode_attention"}
    assert {c.dtype for c in swept} == {torch.float16, torch.bfloat16}
    for sweep in ("T", "D", "batch"):
        attention = [c.p for c in swept if c.op == "causal_attention" and c.sweep == sweep]
        assert set(attention) == {0.0, 0.2}


def test_providers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from irongpt_kernels.runtime import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    found = missing(CPU)
    assert "needs an NVIDIA GPU" in found["fused"]
    assert set(found) >= {"fused", "liger", "flash-attn"}
    assert "fused" not in providers(case("gelu"), CPU)
    assert set(found) <= set(NAMES)


def test_floors_are_the_kernels_own_cost_functions() -> None:
    """Against counts by hand: the iron model, 16 bits."""
    tokens, C = 16384, 384
    q = tokens * C * 2  # bytes of one of q, k, v
    stats = 8 * tokens * 6
    attention = Case("causal_attention", "iron", IRON, torch.float16)
    assert attention.cost("forward") == (4 * q + stats, 2 * 64 * 6 * 256 * 257 * 64)
    assert attention.cost("total")[0] == 12 * q + 2 * stats
    assert Case("gelu", "iron", IRON, torch.float16).cost("total") == (5 * 4 * q, 0)


def test_the_gate_is_at_a_size_that_float64_fits() -> None:
    long = Case("causal_attention", "T", Shape(B=2, T=8192), torch.float16).small().shape
    assert (long.B, long.H, long.T) == (1, 1, 8192)
    assert Case("causal_attention", "iron", IRON, torch.float16).small().shape == IRON


def test_sweeps_keep_the_tokens() -> None:
    swept = [c for c in cases.sweep_cases(True, [torch.float16]) if c.sweep == "T"]
    assert {c.shape.T for c in swept} == {64, 128, 256, 512, 1024, 2048, 4096, 8192}
    assert {c.shape.B * c.shape.T for c in swept if c.op not in NO_GRADIENT} == {16384}
    assert {c.p for c in swept} == {0.0, 0.2}


SMALL = Shape(B=2, H=2, T=8, D=16, V=13, L=1)
each_op = pytest.mark.parametrize("op", NO_GRADIENT)


def small(op: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, "nano", SMALL, dtype, cases.dropping(op))


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_has_an_op_has_its_time(op: str, dtype: torch.dtype) -> None:
    names = ("eager", "builtin", "naive")
    rows = kernels.measure_case(small(op, dtype), CPU, names, 2)
    assert [r.provider for r in rows] == [name for name in names if computes(name, op)]
    for r in rows:
        assert r.mode == "call"
        assert r.seconds > 0
        assert r.least_bytes > 0
        if r.provider == "eager":
            assert r.accuracy.ok
    assert len(rows) == (2 if op in ("adamw", "muon", "norm_linear", *cases.AS_EAGER) else 3)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_keep_the_rule(op: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (row,) = kernels.measure_case(small(op, dtype), device, ("fused",), 1)
    assert row.accuracy.ok, row
    assert row.seconds > 0


def changed_by_eager(one: Case) -> list[str]:
    x, before = one.inputs(CPU), one.inputs(CPU)
    by(eager, one, CPU)(x)
    return [name for name, t in x.items() if not torch.equal(t, before[name])]


@each_op
def test_what_is_left_undone_is_beyond_the_rule(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the inputs that eager changes (weights, moments, 16-bit copies, steps, caches,
    tokens, counts) as if nobody had written it, and each output that is no input, wrong."""
    one, right = small(op, torch.float16), OpSpec.run
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
        assert not row.accuracy.ok, (op, undone)


def test_the_copies_are_the_weights_and_nothing_is_clipped() -> None:
    for op in OPTIMIZERS:
        one = small(op, torch.float16)
        x, before = one.inputs(CPU), one.inputs(CPU)
        for _ in range(3):
            by(builtin, one, CPU)(x)
        assert torch.equal(x["matrices.copies"], x["matrices.params"].half())
        grads = [name for name in x if name.endswith("grads")]
        assert all(torch.equal(x[name], before[name]) for name in grads)


def test_a_naive_sample_is_of_the_likeliest() -> None:
    one = small("sample_tokens")
    best = one.inputs(CPU)["logits"].topk(TOP_K if one.shape.V > TOP_K else 3)
    x = one.inputs(CPU)
    x["logits"] = x["logits"].scatter(1, best.indices, 50.0)
    tokens, counts = providers(one, CPU, ("naive",))["naive"].function(x)
    assert all(tokens[b, 0] in best.indices[b] for b in range(len(tokens)))
    before = one.inputs(CPU)
    assert torch.equal(tokens[:, 1:], before["tokens"][:, 1:])
    assert torch.equal(counts, before["counts"] + 1)
