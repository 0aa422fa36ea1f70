"""The benchmarks of the ops: what is timed, what gets a time and what does not."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from irongpt_kernels import builtin

from benchmarks.measure import result_file
from benchmarks.ops import __main__ as kernels
from benchmarks.ops import cases, inplace_ops
from benchmarks.ops.accuracy import BASELINES, passes
from benchmarks.ops.cases import IRON, MODES, OPS, Case, Shape
from benchmarks.ops.providers import NAMES, missing, providers
from benchmarks.report import tables

CPU = torch.device("cpu")
PEAK_RATES = dict(copy_bytes_per_s=1, gemm_flops_per_s={})
TINY = Shape(B=1, H=2, T=16, D=16, V=13)
PYTORCH = ("eager", "naive", "builtin", "math")  # what a CPU has without compiling


def case(op: str, dtype: torch.dtype = torch.float32, p: float = 0.0) -> Case:
    return Case(op, "nano", TINY, dtype, p)


@pytest.mark.parametrize("op", [op for op in OPS if op not in inplace_ops.OPS])
def test_every_provider_gets_a_time_for_every_mode(op: str) -> None:
    p = 0.2 if op in cases.DROPS else 0.0
    rows = kernels.measure_case(case(op, p=p), CPU, PYTORCH, rounds=2)
    named = {(r["provider"], r["mode"]) for r in rows}
    attention = op.startswith("causal_attention")
    wanted = PYTORCH if attention else ("eager", "builtin")
    assert named == {(name, mode) for name in wanted for mode in MODES}
    for r in rows:
        assert r["seconds"] > 0
        assert len(r["sample_seconds"]) == 2
        assert passes(r["provider"], r["accuracy"])
        assert r["provider"] != "eager" or 0 <= r["accuracy"]["share"] <= 1
        # eager and fused are checked with their dropout, which others draw at random
        assert r["accuracy"]["dropout"] == (p if r["provider"] == "eager" else 0.0)
        assert r["least_bytes"] > 0
        assert (r["least_flops"] > 0) == attention


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
    by = {r["provider"]: r for r in rows}
    assert "seconds" in by["eager"]
    assert "seconds" not in by["builtin"]
    assert not by["builtin"]["accuracy"]["ok"]
    assert "wrong" in by["builtin"]["skipped_reason"]
    assert "us +-" not in kernels.line(by["builtin"], {})
    json.dumps(result_file.finite(by["builtin"]), allow_nan=False)


def test_a_rival_that_errs_by_a_little_has_its_time_and_its_error_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To leave out a faster one would flatter us; our own kernels have no such allowance."""
    planted(monkeypatch, "gelu", wrong=1 + 2e-6)
    rows = kernels.measure_case(case("gelu"), CPU, ("builtin",), rounds=2)
    accuracy = rows[-1]["accuracy"]
    assert not accuracy["ok"]
    assert 1 < accuracy["share"] < BASELINES
    assert not passes("fused", accuracy)
    text = tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})
    assert f"| {accuracy['share']:.0%} |" in text
    assert "| builtin † |" in text
    assert "EXCEEDS THE TOLERANCE" in kernels.line(rows[-1], PEAK_RATES)
    swept = tables.kernels({"rows": [r | dict(sweep="T") for r in rows], "peak_rates": PEAK_RATES})
    assert " † |" in swept


def test_in_16_bits_too() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rows = kernels.measure_case(case("causal_attention_packed", dtype), CPU, PYTORCH, 1)
        assert {r["provider"] for r in rows if "seconds" in r} == set(PYTORCH)


def test_the_kernels_are_held_to_the_gate_with_their_dropout() -> None:
    """On a CPU in Triton's interpreter, which tests have on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = kernels.measure_case(case("dropout_add_layer_norm", p=0.2), device, ("fused",), 1)
    assert [r["accuracy"]["dropout"] for r in rows] == [0.2] * 3
    assert all(r["accuracy"]["ok"] for r in rows)


def test_what_cannot_run_says_why_and_the_rest_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(builtin, "gelu", failing)
    rows = kernels.measure_case(case("gelu"), CPU, ("eager", "builtin"), rounds=1)
    refused = [r for r in rows if "skipped_reason" in r]
    assert [(r["provider"], r["skipped_reason"]) for r in refused] == [("builtin", "out of memory")]
    assert len(rows) == 1 + len(MODES)


def test_who_refuses_only_with_dropout_has_no_time_then() -> None:
    """PyTorch's flash attention on a CPU passes the accuracy check, which has no dropout."""
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash", "builtin"), 1)
    (refused,) = [r for r in rows if r["provider"] == "flash"]
    assert "No available kernel" in refused["skipped_reason"]
    assert {r["mode"] for r in rows if r["provider"] == "builtin"} == set(MODES)
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash",), 1)
    assert [r["provider"] for r in rows if "skipped_reason" in r] == ["flash"]


def test_the_backend_that_pytorch_picks_is_named() -> None:
    rows = kernels.measure_case(case("causal_attention_packed"), CPU, ("builtin", "math"), 1)
    assert {r["provider"]: r["backend"] for r in rows} == {"builtin": "flash", "math": None}
    text = tables.kernels(
        {"rows": rows, "peak_rates": dict(copy_bytes_per_s=1, gemm_flops_per_s={})}
    )
    assert "| builtin (flash) |" in text


def test_a_row_without_a_graph_is_marked() -> None:
    (row,) = kernels.measure_case(case("gelu"), CPU, ("builtin",), 3)[2:]
    row |= dict(graph=False, no_graph_reason="it waits for the device", forward=None)
    rows = [row | dict(mode=mode) for mode in MODES]
    peak_rates = dict(copy_bytes_per_s=1, gemm_flops_per_s={})
    assert "NO GRAPH" in kernels.line(row, peak_rates)
    assert "it waits for the device" in tables.kernels({"rows": rows, "peak_rates": peak_rates})
    swept = [r | dict(sweep="batch") for r in rows]
    assert "* in no graph" in tables.kernels({"rows": swept, "peak_rates": peak_rates})


def test_what_is_not_compiled_in_a_sweep_says_so() -> None:
    wide = replace(case("layer_norm"), sweep="width")
    rows = kernels.measure_case(wide, CPU, ("builtin", "compile"), 1)
    (row,) = [r for r in rows if r["provider"] == "compile"]
    assert "not compiled in this sweep" in row["skipped_reason"]


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
    assert all(kernels.compiled_here(c, card) for c in own)
    assert {c.shape.B for c in own if c.op in inplace_ops.TOKEN} == {1}


def test_layer_norm_takes_the_float32_residual_stream() -> None:
    """As in the model, whose embeddings are float32 under autocast."""
    x = case("layer_norm", torch.float16).inputs(CPU)["x"]
    assert x.dtype == torch.float32
    in_16, in_32 = (case("layer_norm", d).cost("total") for d in (torch.float16, torch.float32))
    assert in_16 == in_32


def test_every_op_is_swept_over_its_rows_and_columns() -> None:
    swept = list(cases.sweep_cases(True, [torch.float16, torch.bfloat16]))
    assert {c.op for c in swept if c.sweep == "batch"} == set(OPS) - set(inplace_ops.OPTIMIZERS)
    columns = {c.op for c in swept if c.sweep in ("T", "D", "width", "V")}
    token = {"decode_attention", "embed_tokens", "norm_linear", "sample_tokens"}
    assert columns == set(OPS) - set(inplace_ops.OPS) | token
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
    assert {c.shape.B * c.shape.T for c in swept if c.op not in inplace_ops.OPS} == {16384}
    assert {c.p for c in swept} == {0.0, 0.2}
