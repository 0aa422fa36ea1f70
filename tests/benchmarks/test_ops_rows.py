"""The benchmarks of the ops: which cases there are, and which providers have a time for them."""

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
from benchmarks.measure.rows import KernelRow
from benchmarks.ops import __main__ as kernels
from benchmarks.ops import cases
from benchmarks.ops.accuracy import BASELINE_FACTOR, passes
from benchmarks.ops.cases import IRON, MODES, OPS, Case, Shape, default_p
from benchmarks.ops.providers import NAMES, by, computes, missing, providers
from benchmarks.report import tables

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CARD = torch.device("cuda")
PEAK_RATES = dict(copy_bytes_per_s=1, gemm_flops_per_s={})
PYTORCH = ("eager", "naive", "builtin", "math")  # what a CPU has without compiling
EVERY = (*PYTORCH, "chunked")
OPTIMIZERS = {spec.name for spec in op_specs.OPTIMIZERS}
TOKEN = {spec.name for spec in op_specs.TOKEN}
NO_GRADIENT = [op for op in OPS if op in OPTIMIZERS | TOKEN]
LAYERS = [op for op in OPS if op not in NO_GRADIENT]
TINY = Shape(B=2, H=2, T=16, D=16, V=13, L=1)


def case(op: str, dtype: torch.dtype = torch.float32, p: float | None = None) -> Case:
    """p: of the layers 0, unless it is given."""
    usual = default_p(op) if op in NO_GRADIENT else 0.0
    return Case(op, "nano", TINY, dtype, usual if p is None else p)


def measured(op: str, names: tuple[str, ...], rounds: int = 1, **options: Any) -> list[KernelRow]:
    return kernels.measure_case(case(op, **options), CPU, names, rounds)


def page(rows: list[KernelRow]) -> str:
    return tables.kernels({"rows": rows, "peak_rates": PEAK_RATES})


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, torch.float32) for op in OPS]
    + [(op, torch.bfloat16) for op in (*NO_GRADIENT, "causal_attention_packed")]
    + [("causal_attention_packed", torch.float16)],
)
def test_every_provider_that_has_an_op_is_timed_in_every_mode(op: str, dtype: torch.dtype) -> None:
    p = 0.2 if op in cases.WITH_DROPOUT else None
    rows = measured(op, EVERY, rounds=2, p=p, dtype=dtype)
    attention = op.startswith("causal_attention")
    if op in LAYERS:
        wanted = PYTORCH if attention else ("eager", "builtin")
        if op == "linear_cross_entropy" and "chunked" not in missing(CPU):
            wanted = (*wanted, "chunked")
    else:
        wanted = tuple(name for name in PYTORCH if computes(name, op))
        alone = (*OPTIMIZERS, "norm_linear", *cases.AS_EAGER)
        assert len(wanted) == (2 if op in alone else 3)
    modes = MODES if op in LAYERS else ("call",)
    assert {r.key[-2:] for r in rows} == {(mode, name) for name in wanted for mode in modes}
    for r in rows:
        assert r.seconds > 0
        assert len(r.sample_seconds) == 2
        assert passes(r.provider, r.accuracy)
        assert r.provider != "eager" or 0 <= r.accuracy.share <= 1
        if op in LAYERS:  # eager is checked with its dropout; other generators have other masks
            assert r.accuracy.dropout == (p if r.provider == "eager" and p else 0.0)
            assert (r.least_flops > 0) == (attention or op == "linear_cross_entropy")
        assert r.least_bytes > 0


def injected(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: float = 1.0, slope: float = 1.0
) -> None:
    """builtin's op times `wrong`, or with gradients that are `slope` times too large."""
    right = getattr(builtin, op)

    def broken(*args: object, **options: object) -> torch.Tensor:
        y = wrong * right(*args, **options)
        return y.detach() + slope * (y - y.detach())

    monkeypatch.setattr(builtin, op, broken)


@pytest.mark.parametrize("mistake", [dict(wrong=1.01), dict(slope=1.01), dict(wrong=math.nan)])
def test_a_failed_accuracy_check_has_no_time(monkeypatch, mistake: dict[str, float]) -> None:
    injected(monkeypatch, "gelu", **mistake)
    *timed, row = measured("gelu", ("eager", "builtin"))
    assert [r.provider for r in timed if r.timed] == ["eager"] * 3
    assert not row.timed
    assert not row.accuracy.ok
    assert "wrong" in row.skipped_reason
    assert " +- " not in kernels.line(row, {})
    json.dumps(result_file.finite(row.to_json()), allow_nan=False)


def test_a_baseline_with_a_small_error_has_its_time_and_its_error(monkeypatch) -> None:
    """To leave out a faster one would flatter us; our own kernels have no such allowance."""
    injected(monkeypatch, "gelu", wrong=1 + 2e-6)
    rows = measured("gelu", ("builtin",))
    accuracy = rows[-1].accuracy
    assert not accuracy.ok
    assert 1 < accuracy.share < BASELINE_FACTOR
    assert not passes("fused", accuracy)
    assert f"| {accuracy.share:.0%} |" in page(rows)
    assert "| builtin † |" in page(rows)
    assert "EXCEEDS THE TOLERANCE" in kernels.line(rows[-1], PEAK_RATES)
    assert " † |" in page([replace(r, sweep="T") for r in rows])


@pytest.mark.parametrize("op", [*NO_GRADIENT, "dropout_add_layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_are_within_tolerance_with_their_dropout(op: str, dtype: torch.dtype) -> None:
    """On a CPU in Triton's interpreter, which the tests turn on."""
    one = case(op, dtype, default_p(op))
    rows = kernels.measure_case(one, DEVICE, ("fused",), 1)
    assert [r.mode for r in rows] == list(one.modes)
    for row in rows:
        assert row.accuracy.ok, row
        assert row.accuracy.dropout == one.p
        assert row.seconds > 0


def test_a_provider_that_fails_has_a_reason_and_the_others_have_times(monkeypatch) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(builtin, "gelu", failing)
    rows = measured("gelu", ("eager", "builtin"))
    refused = [r for r in rows if r.skipped_reason]
    assert [(r.provider, r.skipped_reason) for r in refused] == [("builtin", "out of memory")]
    assert len(rows) == 1 + len(MODES)


def test_a_provider_that_fails_only_with_dropout_has_no_time() -> None:
    """PyTorch's flash attention on a CPU passes the accuracy check, which has no dropout."""
    rows = measured("causal_attention", ("flash", "builtin"), p=0.2)
    (refused,) = [r for r in rows if r.provider == "flash"]
    assert "No available kernel" in refused.skipped_reason
    assert {r.mode for r in rows if r.provider == "builtin"} == set(MODES)
    (alone,) = measured("causal_attention", ("flash",), p=0.2)
    assert "No available kernel" in alone.skipped_reason


def test_the_backend_that_pytorch_picks_is_named() -> None:
    rows = measured("causal_attention_packed", ("builtin", "math"))
    assert {r.provider: r.backend for r in rows} == {"builtin": "flash", "math": None}
    assert "| builtin (flash) |" in page(rows)


def test_a_row_without_a_graph_is_marked() -> None:
    row = replace(measured("gelu", ("builtin",))[-1], no_graph_reason="it waits for the device")
    rows = [replace(row, mode=mode) for mode in MODES]
    assert "NO GRAPH" in kernels.line(row, PEAK_RATES)
    assert "it waits for the device" in page(rows)
    assert "* in no graph" in page([replace(r, sweep="batch") for r in rows])


def test_a_sweep_that_is_not_compiled_has_the_reason() -> None:
    wide = replace(case("layer_norm"), sweep="width")
    (row,) = [r for r in kernels.measure_case(wide, CPU, ("builtin", "compile"), 1) if not r.timed]
    assert row.provider == "compile"
    assert "not compiled in this sweep" in row.skipped_reason


def test_the_model_shape_has_both_16_bit_dtypes_and_dropout_on_and_off(monkeypatch) -> None:
    """As `iron` and `fast` train. With --quick only as iron trains on this GPU."""
    picked = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(kernels.devices, "precision", lambda name, device: picked)
    all_cases = cases.cases_of(CARD)
    assert {c.sweep for c in all_cases} == {"iron"}
    wanted = {(d, p) for d in (torch.bfloat16, torch.float16, torch.float32) for p in (0.0, 0.2)}
    for op in cases.WITH_DROPOUT:
        assert {(c.dtype, c.p) for c in all_cases if c.op == op} == wanted
    once = len(cases.FLOAT32)
    count = 3 * (len(OPS) - once + len(cases.WITH_DROPOUT)) + once
    assert len(all_cases) == len(set(all_cases)) == count
    both = cases.cases_of(CARD, quick=True, swept=("V",))
    assert {c.dtype for c in both if c.sweep == "V"} == {torch.bfloat16}
    quick = cases.cases_of(CARD, quick=True)
    wanted = {(torch.bfloat16, 0.2), (torch.float32, 0.2)}
    assert {(c.dtype, c.p) for c in quick if c.op in cases.WITH_DROPOUT} == wanted
    assert not any(kernels.not_compiled(c, CARD) for c in all_cases)
    assert {c.dtype for c in quick if kernels.not_compiled(c, CARD, True)} == {torch.float32}
    assert {c.shape.B for c in all_cases if c.op in TOKEN} == {1}


def test_layer_norm_takes_the_float32_residual_stream() -> None:
    """As in the model, whose embeddings are float32 under autocast."""
    x = case("layer_norm", torch.float16).inputs(CPU)["x"]
    assert x.dtype == torch.float32
    in_16, in_32 = (case("layer_norm", d).cost("total") for d in (torch.float16, torch.float32))
    assert in_16 == in_32


def test_every_op_is_swept_over_its_rows_and_columns() -> None:
    swept = list(cases.sweep_cases(True, [torch.float16, torch.bfloat16]))
    assert {c.op for c in swept if c.sweep == "batch"} == set(OPS) - OPTIMIZERS
    columns = {c.op for c in swept if c.sweep in ("T", "D", "width", "V")}
    token = {"decode_attention", "embed_tokens", "norm_linear", "sample_tokens"}
    assert columns == {*LAYERS, *token}
    assert {c.dtype for c in swept} == {torch.float16, torch.bfloat16}
    for sweep in ("T", "D", "batch"):
        attention = [c.p for c in swept if c.op == "causal_attention" and c.sweep == sweep]
        assert set(attention) == {0.0, 0.2}
    over_T = [c for c in swept if c.sweep == "T"]
    assert {c.shape.T for c in over_T} == {64, 128, 256, 512, 1024, 2048, 4096, 8192}
    assert {c.shape.B * c.shape.T for c in over_T if c.op in LAYERS} == {16384}


def test_missing_providers_are_named(monkeypatch) -> None:
    from irongpt_kernels.runtime import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    found = missing(CPU)
    assert "needs an NVIDIA GPU" in found["fused"]
    assert {"fused", "liger", "flash-attn"} <= set(found) <= set(NAMES)
    assert "fused" not in providers(case("gelu"), CPU)


def test_least_bytes_and_flops_by_hand() -> None:
    """The iron model, 16 bits."""
    tokens, C = 16384, 384
    q = tokens * C * 2  # bytes of one of q, k, v
    stats = 8 * tokens * 6
    attention = Case("causal_attention", "iron", IRON, torch.float16)
    assert attention.cost("forward") == (4 * q + stats, 2 * 64 * 6 * 256 * 257 * 64)
    assert attention.cost("total")[0] == 12 * q + 2 * stats
    assert Case("gelu", "iron", IRON, torch.float16).cost("total") == (5 * 4 * q, 0)


def test_accuracy_is_checked_at_a_size_that_float64_fits() -> None:
    long = Case("causal_attention", "T", Shape(B=2, T=8192), torch.float16).small().shape
    assert (long.B, long.H, long.T) == (1, 1, 8192)
    assert Case("causal_attention", "iron", IRON, torch.float16).small().shape == IRON


def changed_by_eager(one: Case) -> list[str]:
    x, before = one.inputs(CPU), one.inputs(CPU)
    by(eager, one, CPU)(x)
    return [name for name, t in x.items() if not torch.equal(t, before[name])]


@pytest.mark.parametrize("op", NO_GRADIENT)
def test_an_output_that_is_not_written_exceeds_the_tolerance(op: str, monkeypatch) -> None:
    """Each of the inputs that eager changes (weights, moments, 16-bit copies, steps, caches,
    tokens, counts) is left as it was, and each output that is no input is wrong."""
    one, right = case(op, torch.float16), OpSpec.run
    names = changed_by_eager(one)
    counts = {"adamw": 8, "muon": 4, "sum_shards": 1, "decode_attention": 2, "sample_tokens": 2}
    assert len(names) == counts.get(op, 0)
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


@pytest.mark.parametrize("op", ["adamw", "muon"])
def test_an_optimizer_updates_the_copies_and_clips_no_gradient(op: str) -> None:
    one = case(op, torch.float16)
    x, before = one.inputs(CPU), one.inputs(CPU)
    for _ in range(3):
        by(builtin, one, CPU)(x)
    assert torch.equal(x["matrices.copies"], x["matrices.params"].half())
    assert all(torch.equal(x[name], before[name]) for name in x if name.endswith("grads"))


def test_naive_samples_one_of_the_likeliest_tokens() -> None:
    one = case("sample_tokens")
    x, before = one.inputs(CPU), one.inputs(CPU)
    best = x["logits"].topk(TOP_K if one.shape.V > TOP_K else 3)
    x["logits"] = x["logits"].scatter(1, best.indices, 50.0)
    tokens, counts = providers(one, CPU, ("naive",))["naive"].function(x)
    assert all(tokens[b, 0] in best.indices[b] for b in range(len(tokens)))
    assert torch.equal(tokens[:, 1:], before["tokens"][:, 1:])
    assert torch.equal(counts, before["counts"] + 1)
