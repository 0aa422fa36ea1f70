"""The benchmarks: what gets a time and what does not, what a row says, what a file holds."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from irongpt_kernels import builtin, eager

from benchmarks import changes, environment, kernels, products, results, tables, updates, workloads
from benchmarks.gate import RIVALS, passes
from benchmarks.providers import NAMES, missing, providers
from benchmarks.workloads import IRON, MODES, OPS, Case, Shape
from irongpt.config import PRESETS, GPTConfig

CPU = torch.device("cpu")
TINY = Shape(B=1, H=2, T=16, D=16, V=13)
PYTORCH = ("eager", "textbook", "builtin", "math")  # what a CPU has without compiling


def case(op: str, dtype: torch.dtype = torch.float32, p: float = 0.0) -> Case:
    return Case(op, "nano", TINY, dtype, p)


@pytest.mark.parametrize("op", OPS)
def test_every_provider_gets_a_time_for_every_mode(op: str) -> None:
    p = 0.2 if op in workloads.DROPS else 0.0
    rows = kernels.measure_case(case(op, p=p), CPU, PYTORCH, rounds=2)
    named = {(r["provider"], r["mode"]) for r in rows}
    attention = op.startswith("causal_attention")
    wanted = PYTORCH if attention else ("eager", "builtin")
    modes = ("call",) if op in updates.OPS else MODES
    assert named == {(name, mode) for name in wanted for mode in modes}
    for r in rows:
        assert r["seconds"] > 0
        assert len(r["seconds_of_samples"]) == 2
        assert passes(r["provider"], r["gate"])
        assert r["provider"] != "eager" or 0 <= r["gate"]["share"] <= 1
        # eager and fused are checked with their dropout, which others draw at random
        assert r["gate"]["dropout"] == (p if r["provider"] == "eager" else 0.0)
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
    assert not by["builtin"]["gate"]["ok"]
    assert "wrong" in by["builtin"]["none_because"]
    assert "us +-" not in kernels.line(by["builtin"], {})
    json.dumps(results.finite(by["builtin"]), allow_nan=False)


def test_a_rival_that_errs_by_a_little_has_its_time_and_its_error_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To leave out a faster one would flatter us; our own kernels have no such allowance."""
    planted(monkeypatch, "gelu", wrong=1 + 2e-6)
    rows = kernels.measure_case(case("gelu"), CPU, ("builtin",), rounds=2)
    gate = rows[-1]["gate"]
    assert not gate["ok"]
    assert 1 < gate["share"] < RIVALS
    assert not passes("fused", gate)
    text = tables.kernels({"rows": rows, "roofs": dict(copy_bytes_per_s=1, gemm_flops_per_s={})})
    assert f"| **{gate['share']:.0%}** |" in text


def test_in_16_bits_too() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        rows = kernels.measure_case(case("causal_attention_packed", dtype), CPU, PYTORCH, 1)
        assert {r["provider"] for r in rows if "seconds" in r} == set(PYTORCH)


def test_the_kernels_are_held_to_the_gate_with_their_dropout() -> None:
    """On a CPU in Triton's interpreter, which tests have on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = kernels.measure_case(case("dropout_add_layer_norm", p=0.2), device, ("fused",), 1)
    assert [r["gate"]["dropout"] for r in rows] == [0.2] * 3
    assert all(r["gate"]["ok"] for r in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", updates.OPS)
def test_the_kernels_without_a_gradient_are_held_to_the_gate(op: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = Case(op, "nano", Shape(B=2, H=2, T=8, D=16, V=13, L=1), dtype)
    (row,) = kernels.measure_case(small, device, ("fused",), 1)
    assert row["gate"]["ok"], row
    assert row["seconds"] > 0


@pytest.mark.parametrize("op", updates.OPS)
def test_what_changes_in_place_is_held_to_the_gate(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, caches, tokens: each output of the op with one wrong element."""
    right = updates.call
    n = len(right(eager, case(op))(case(op).inputs(CPU)))
    for i in range(n):

        def call(ops: ModuleType, wanted: Case, i: int = i) -> Callable[..., tuple]:
            function = right(ops, wanted)

            def broken(x: workloads.Inputs) -> tuple:
                out = [t.clone() for t in function(x)]
                if ops is builtin:
                    out[i].view(-1)[-1] += 1
                return tuple(out)

            return broken

        monkeypatch.setattr(updates, "call", call)
        (row,) = kernels.measure_case(case(op), CPU, ("builtin",), 1)
        assert "wrong" in row["none_because"], (op, i)


def test_the_optimizers_change_what_they_say() -> None:
    """By AdamW: weights, both moments, and the 16-bit copies; by Muon: weights and momentum."""
    for op, names in (("adamw", ("params", "moment0", "moment1")), ("muon", ("params", "moment0"))):
        one = case(op, torch.float16)
        x, before = one.inputs(CPU), one.inputs(CPU)
        updates.call(builtin, one)(x)
        changed = {name for name, t in x.items() if not torch.equal(t, before[name])}
        assert {f"matrices.{name}" for name in (*names, "copies")} <= changed
        assert torch.equal(x["matrices.copies"], x["matrices.params"].half())


def test_what_cannot_run_says_why_and_the_rest_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(builtin, "gelu", failing)
    rows = kernels.measure_case(case("gelu"), CPU, ("eager", "builtin"), rounds=1)
    refused = [r for r in rows if "none_because" in r]
    assert [(r["provider"], r["none_because"]) for r in refused] == [("builtin", "out of memory")]
    assert len(rows) == 1 + len(MODES)


def test_who_refuses_only_with_dropout_has_no_time_then() -> None:
    """PyTorch's flash attention on a CPU: the gate is without dropout, so it passes that."""
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash", "builtin"), 1)
    (refused,) = [r for r in rows if r["provider"] == "flash"]
    assert "No available kernel" in refused["none_because"]
    assert {r["mode"] for r in rows if r["provider"] == "builtin"} == set(MODES)
    rows = kernels.measure_case(case("causal_attention", p=0.2), CPU, ("flash",), 1)
    assert [r["provider"] for r in rows if "none_because" in r] == ["flash"]


def test_the_backend_that_pytorch_picks_is_named() -> None:
    rows = kernels.measure_case(case("causal_attention_packed"), CPU, ("builtin", "math"), 1)
    assert {r["provider"]: r["backend"] for r in rows} == {"builtin": "flash", "math": None}
    text = tables.kernels({"rows": rows, "roofs": dict(copy_bytes_per_s=1, gemm_flops_per_s={})})
    assert "| builtin (flash) |" in text


def test_a_row_without_a_graph_is_marked() -> None:
    (row,) = kernels.measure_case(case("gelu"), CPU, ("builtin",), 3)[2:]
    row |= dict(graph=False, plain_because="it waits for the device", forward=None)
    rows = [row | dict(mode=mode) for mode in MODES]
    roofs = dict(copy_bytes_per_s=1, gemm_flops_per_s={})
    assert "NO GRAPH" in kernels.line(row, roofs)
    assert "it waits for the device" in tables.kernels({"rows": rows, "roofs": roofs})
    swept = [r | dict(sweep="batch") for r in rows]
    assert "* in no graph" in tables.kernels({"rows": swept, "roofs": roofs})


def test_what_is_not_compiled_in_a_sweep_says_so() -> None:
    wide = replace(case("layer_norm"), sweep="width")
    rows = kernels.measure_case(wide, CPU, ("builtin", "compile"), 1)
    (row,) = [r for r in rows if r["provider"] == "compile"]
    assert "not compiled in this sweep" in row["none_because"]


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
    for op in workloads.DROPS:
        assert {(c.dtype, c.p) for c in own if c.op == op} == wanted
    assert len(own) == len(set(own)) == 3 * (len(OPS) + len(workloads.DROPS))
    quick = kernels.cases_of(card, quick=True)
    assert {(c.dtype, c.p) for c in quick if c.op in workloads.DROPS} == {
        (torch.bfloat16, 0.2), (torch.float32, 0.2)
    }  # fmt: skip
    assert all(kernels.compiled_here(c, card) for c in own)
    assert {c.shape.B for c in own if c.op in updates.TOKEN} == {1}


def table_of(text: str, head: str) -> list[list[str]]:
    """The cells of the first table that begins so, its head included."""
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_of(providers: dict[str, float], sweep: str = "iron", **more: object) -> list[dict]:
    """Rows of attention in all modes; `providers`: seconds of both."""
    row = dict(op="causal_attention", sweep=sweep, size="s", dtype="float16", dropout=0.0)
    row |= dict(gate=dict(ok=True, share=0.5), iqr=0.0, host_seconds=1e-5, peak_bytes=3 << 20)
    row |= dict(least_bytes=8e9, least_flops=16e12) | more
    parts = dict(forward=0.25, backward=0.75, both=1.0)
    return [
        row | dict(provider=name, mode=mode, seconds=seconds * part)
        for name, seconds in providers.items()
        for mode, part in parts.items()
    ]


ROOFS = dict(copy_bytes_per_s=16e9, gemm_flops_per_s={"float16": 64e12})


def test_every_mode_has_its_rates_its_shares_and_its_memory() -> None:
    text = tables.kernels({"rows": rows_of({"fused": 1.0, "builtin": 2.0}), "roofs": ROOFS})
    head, _, ours, theirs = table_of(text, "provider | forward")
    assert ours[head.index("both") + 2] == "2.00"  # times as fast as builtin
    head, _, ours, theirs = table_of(text, "provider | GB/s")
    found = dict(zip(head, ours, strict=True))
    assert [found[f"GB/s {mode}"] for mode in MODES] == ["32", "10.7", "8"]
    assert [found[f"TFLOP/s {mode}"] for mode in MODES] == ["64", "21.3", "16"]
    assert [found[f"copy {mode}"] for mode in MODES] == ["200.0%", "66.7%", "50.0%"]
    assert [found[f"product {mode}"] for mode in MODES] == ["100.0%", "33.3%", "25.0%"]
    assert [found[f"MiB {mode}"] for mode in MODES] == ["3", "3", "3"]
    assert theirs[head.index("GB/s both")] == "4"


def test_a_sweep_has_ours_in_rates_and_everybody_s_memory() -> None:
    rows = rows_of({"fused": 1.0, "builtin": 2.0}, "T")
    text = tables.kernels({"rows": rows, "roofs": ROOFS})
    cells = table_of(text, "size")[2]
    assert cells == ["s", "1,000,000.0 (2.00)", "2,000,000.0", "8", "16", "50%"]
    assert table_of(text, "MiB at the peak")[2] == ["s", "3", "3"]
    without = [r | dict(peak_bytes=None) for r in rows if r["provider"] == "builtin"]
    text = tables.kernels({"rows": without, "roofs": ROOFS})
    assert "MiB at the peak" not in text
    assert "fused: GB/s" not in text


def test_layer_norm_takes_the_float32_residual_stream() -> None:
    """As in the model, whose embeddings are float32 under autocast."""
    x = case("layer_norm", torch.float16).inputs(CPU)["x"]
    assert x.dtype == torch.float32
    in_16, in_32 = (case("layer_norm", d).cost("both") for d in (torch.float16, torch.float32))
    assert in_16 == in_32


def test_every_op_is_swept_over_its_rows_and_columns() -> None:
    swept = list(workloads.sweep_cases(True, [torch.float16, torch.bfloat16]))
    assert {c.op for c in swept if c.sweep == "batch"} == set(OPS) - set(updates.OPTIMIZERS)
    columns = {c.op for c in swept if c.sweep in ("T", "D", "width", "V")}
    assert columns == set(OPS) - set(updates.OPS)
    assert {c.dtype for c in swept} == {torch.float16, torch.bfloat16}
    for sweep in ("T", "D", "batch"):
        attention = [c.p for c in swept if c.op == "causal_attention" and c.sweep == sweep]
        assert set(attention) == {0.0, 0.2}


def test_providers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from irongpt_kernels import launch

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
    assert attention.cost("both")[0] == 12 * q + 2 * stats
    assert Case("gelu", "iron", IRON, torch.float16).cost("both") == (5 * 4 * q, 0)


def test_what_follows_from_a_time() -> None:
    row = dict(seconds=2.0, least_bytes=100, least_flops=600, dtype="float16")
    roofs = dict(copy_bytes_per_s=100.0, gemm_flops_per_s={"float16": 400.0})
    d = results.derive(row, roofs)
    assert d["bytes_per_s"] == 50
    assert d["flops_per_s"] == 300
    assert (d["share_of_copy"], d["share_of_gemm"]) == (0.5, 0.75)
    assert (d["floor_seconds"], d["share_of_roof"]) == (1.5, 0.75)
    assert results.derive(dict(none_because="x", least_bytes=1), roofs) == {}


def test_the_gate_is_at_a_size_that_float64_fits() -> None:
    long = Case("causal_attention", "T", Shape(B=2, T=8192), torch.float16).small().shape
    assert (long.B, long.H, long.T) == (1, 1, 8192)
    assert Case("causal_attention", "iron", IRON, torch.float16).small().shape == IRON


def test_sweeps_keep_the_tokens() -> None:
    swept = [c for c in workloads.sweep_cases(True, [torch.float16]) if c.sweep == "T"]
    assert {c.shape.T for c in swept} == {64, 128, 256, 512, 1024, 2048, 4096, 8192}
    assert {c.shape.B * c.shape.T for c in swept} == {16384}
    assert {c.p for c in swept} == {0.0, 0.2}


def test_products_of_a_step_have_the_flops_that_the_model_counts() -> None:
    config = GPTConfig(vocab_size=109, **PRESETS["iron"].model)
    flops = sum(3 * n * 2 * M * K * N for _, n, M, K, N in products.shapes(config, 64))
    C, T, tokens = config.n_embd, config.context, 64 * config.context
    attention = 12 * config.n_layer * C * T * tokens
    norms = 6 * (2 * config.n_layer + 1) * C * tokens  # counted as weights that multiply
    assert flops == tokens * config.flops_per_token() - attention - norms


def test_a_step_with_muon_has_its_iteration_and_its_bytes() -> None:
    """By hand: iron's matrices, a Gram matrix of the smaller side C twice, products of it, and the
    matrix itself multiplied twice; of their bytes momentum and what goes in and out."""
    config = GPTConfig(vocab_size=109, **PRESETS["fast"].model)
    C, L = config.n_embd, config.n_layer
    longer = (3 + 1 + 4 + 4) * C  # the longer sides of a block's four
    gram, square = 2 * C * C * longer, 4 * 2 * C**3
    first, second = 3 + 2 + 2 * 2, 2 + 1 + 2  # squares of G, products of factors, p G p
    flops = L * (4 * gram + (first + second) * square)
    assert products.muon_flops(config) == flops
    own, n = 12 * C * C * L, config.n_params()
    weights, moment, read = 8, 8, 2  # both read and written in float32; a gradient is 16 bits
    assert products.optimizer_bytes(config, "adamw", 4) == (weights + 2 * moment + 2 * 4) * n
    adamw, muon = (products.optimizer_bytes(config, name, 2) for name in ("adamw", "muon"))
    assert adamw == 32 * (n - own) + (weights + 2 * moment + 2 * read + 2) * own
    # Momentum and gradients are read twice for its norm, and what the iteration takes and gives.
    assert muon == 32 * (n - own) + (weights + moment + 4 + 3 * read + 2 + 2 * 2) * own


def test_products_of_a_step_without_muon_are_those_of_the_model() -> None:
    found = dict(seconds=2.0, optimizer=dict(seconds=1.0))
    assert products.of_step(found, "fused graph") == 3.0
    assert products.of_step(found, "nanoGPT compiled") == 2.0
    assert products.of_step(found, "builtin AdamW") == 2.0
    assert products.of_step(dict(seconds=2.0), "builtin") == 2.0


def options(folder: Path, **more: object) -> argparse.Namespace:
    return argparse.Namespace(out=folder, result=None, commit="abc", **more)


def test_a_file_is_filled_by_several_commands(tmp_path: Path) -> None:
    for name in ("kernels", "train"):
        with results.Section(name, CPU, options(tmp_path)) as section:
            section.put(rows=[dict(x=math.inf, y=[1.0, 2.0])])
    (file,) = tmp_path.glob("*/*.json")
    assert file.name.endswith("-abc.json")
    values = results.load(file)
    assert set(values) == {"format", "kernels", "train"}
    e = values["kernels"]["environment"]
    assert e["commit"] == "abc"
    assert e["torch"] == torch.__version__
    assert values["train"]["rows"] == [dict(x=None, y=[1.0, 2.0])]
    assert '"y": [1.0, 2.0]' in file.read_text()


def test_what_is_measured_when_it_breaks_off_is_kept(tmp_path: Path) -> None:
    section = results.Section("runs", CPU, options(tmp_path))

    def measured() -> None:
        with section:
            section.put(rows=[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured()
    values = results.load(section.path)["runs"]
    assert values["rows"] == [1]
    assert values["ended_by"].startswith("KeyboardInterrupt")


def test_another_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no result file"):
        results.load(tmp_path / "a.json")


def file_of(seconds: float, iqr: float | None, name: str = "T4") -> dict:
    row = dict(variant="fused", dtype="float16", seconds=seconds, iqr=iqr)
    tests = {"environment": {"IRONGPT_EMULATE": "sm_75"}}  # says nothing of the device
    return {"format": 1, "tests": tests, "train": {"environment": {"name": name}, "rows": [row]}}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((1.0, 0.01), (0.5, 0.01), "2.00x faster"),
        ((1.0, 0.01), (1.5, 0.01), "1.50x slower"),
        ((1.0, 0.01), (1.02, 0.0), "0 of 1 times differ"),  # less than 3 %
        ((1.0, 0.3), (1.5, 0.3), "0 of 1 times differ"),  # within both spreads
    ],
)
def test_changes_beyond_the_noise(before: tuple, after: tuple, said: str) -> None:
    assert said in changes.text(file_of(*before), file_of(*after), "a", "b")


def test_a_difference_without_a_known_noise_is_none() -> None:
    text = changes.text(file_of(1.0, None), file_of(9.0, 0.01), "a", "b")
    assert "0 of 1 times differ" in text
    assert "of 1 times the noise is not known" in text


def test_another_device_is_noted() -> None:
    text = changes.text(file_of(1, 0), file_of(1, 0, "H200"), "a", "b")
    assert "NOTE: another device: T4 and H200" in text


def test_memory_and_whole_trainings_are_compared() -> None:
    def file(peak: int, seconds: float, loss: float) -> dict:
        step = dict(variant="fused", dtype="float16", seconds=1.0, iqr=0.0, peak_bytes=peak)
        run = dict(run="fast, fused", dtype="float16", seconds=seconds, evaluated=[[500, 1, loss]])
        nano = dict(name="nano", seconds=seconds, validation_loss=loss)
        parts = dict(train=[step], target=[run, dict(run="no", none_because="x")], nano=[nano])
        return {"format": 1} | {name: {"rows": rows} for name, rows in parts.items()}

    text = changes.text(file(100 << 20, 20.0, 1.375), file(50 << 20, 10.0, 1.25), "a", "b")
    assert "| -50% | 100.0 MiB | 50.0 MiB | train: fused, float16 |" in text
    assert "target: fast, fused, float16: 20.0 to 10.0 s, validation loss 1.375 to 1.250" in text
    assert "nano: nano: 20.0 to 10.0 s, validation loss 1.375 to 1.250" in text
    same = changes.text(*(file(100 << 20, 20.0, 1.375),) * 2, "a", "b")
    assert "MiB" not in same


@pytest.mark.parametrize("section", tables.SECTIONS)
def test_a_card_that_was_held_back_is_named_in_every_section(section: str) -> None:
    state = dict(seconds=1.0, before={}, throttled_by=["power cap"])
    values = {section: dict(environment={}, state=state)}
    assert f"> {section}: the card was held back by power cap." in tables.about(values, "x")


def test_the_throttle_reasons_of_a_card() -> None:
    state = environment._state(1590.0, 5000.0, 70.0, 70.0, 84.0, 0x1 | 0x4 | 0x20)
    assert state["throttled_by"] == ["power cap", "heat (software)"]
    assert environment._state(None, None, None, None, None, None)["throttled_by"] is None
