"""Interleaved training steps: groups that fit in memory, failures, the time limit, the report; and
the roofline model of a step."""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from irongpt_kernels import builtin

from benchmarks import roofline
from benchmarks.measure import result_file
from benchmarks.measure.rows import StepRow
from benchmarks.presets import Setting, random_setting
from benchmarks.report import tables
from benchmarks.training import __main__ as train
from benchmarks.training import matmuls, steps, variants
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.data.batches import Tokens

CPU = torch.device("cpu")
MODEL = GPTConfig(vocab_size=13, n_layer=1, n_head=1, n_embd=16, context=8, dropout=0.0)
RECIPE = TrainConfig(
    iters=10, batch_size=2, lr=1e-3, warmup=2, decay="constant", weight_decay=0.1, eval_every=10
)
SETTING = Setting(MODEL, RECIPE, Tokens.of(torch.arange(1000) % MODEL.vocab_size))


class Fake:
    """A variant that takes `size` of two units of memory. fails: the number of the failing call."""

    held = 0

    def __init__(self, size: int = 1, fails: int | None = None, seconds: float = 0.0) -> None:
        if size + Fake.held > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.size, self.fails, self.seconds, self.calls = size, fails, seconds, 0
        Fake.held += size

    def __del__(self) -> None:
        Fake.held -= getattr(self, "size", 0)

    def warm_up(self) -> None:
        pass

    def seconds_a_step(self, steps: int) -> float:
        self.calls += 1
        time.sleep(self.seconds)
        if self.calls == self.fails:
            raise RuntimeError("it broke")
        return 1.0 + self.calls

    def counts(self) -> tuple[int, int]:
        return 5, 2


def measured(folder: Path, made: dict[str, Any], seconds: float = 60.0) -> dict[str, StepRow]:
    """Rows by variant. made: the options of each `Fake` by its name."""
    args = argparse.Namespace(out=folder, result=None, commit="abc", steps=1, rounds=4)
    with result_file.Section("train", CPU, args) as section:
        section.put(rows=[], peak_rates={"peak": {"float32": 1e12}})
        run = steps.Steps(section, SETTING, "float32", args)
        makers = {name: partial(Fake, **options) for name, options in made.items()}
        run.measure(makers, time.perf_counter() + seconds)
    rows = result_file.load(section.path)["train"]["rows"]
    assert [r.variant for r in rows] == list(made)  # each once
    return {r.variant: r for r in rows}


def test_variants_that_do_not_fit_together_are_measured_in_groups(tmp_path) -> None:
    sizes = dict(a=1, b=1, c=1, huge=3, d=1)
    rows = measured(tmp_path, {name: dict(size=size) for name, size in sizes.items()})
    assert rows.pop("huge").skipped_reason == "out of memory"
    assert {name: r.group for name, r in rows.items()} == dict(a=0, b=0, c=1, d=2)
    assert all(r.samples == 4 and r.kernels == 5 for r in rows.values())


def test_a_variant_that_fails_keeps_its_samples_and_the_others_continue(tmp_path) -> None:
    rows = measured(tmp_path, {"a": {}, "b": dict(fails=3)})
    assert rows["a"].samples == 4
    assert rows["b"].samples == 2
    assert rows["b"].stop_reason == "RuntimeError: it broke"
    assert math.isnan(rows["b"].iqr)  # two samples have none


def test_no_round_begins_after_the_time_limit(tmp_path) -> None:
    rows = measured(tmp_path, {"a": dict(seconds=0.5), "b": {}}, seconds=0.6)
    assert rows["a"].samples < 4
    assert "was over" in rows["b"].skipped_reason


@pytest.mark.parametrize(
    ("variant", "builtin"),
    [
        ("eager", "builtin"), ("fused graph", "builtin graph"),
        ("fused as trained", "builtin as trained"), ("naive compiled", "builtin compiled"),
        ("eager max-autotune", "builtin max-autotune"), ("nanoGPT", "builtin AdamW"),
        ("nanoGPT compiled", "builtin AdamW compiled"),
    ],
)  # fmt: skip
def test_a_variant_is_compared_with_builtin_launched_in_the_same_way(
    variant: str, builtin: str
) -> None:
    assert tables.baseline_of(variant) == builtin
    assert {variant, builtin} <= set(train.names(gpu=True, nanogpt=True))


def section_of(**seconds: float) -> dict[str, Any]:
    row = dict(dtype="float16", samples=1, tokens_per_s=1.0, mfu=0.5, first_seconds=1.0)
    rows = [
        StepRow(variant=name.replace("_", " "), seconds=s, **row) for name, s in seconds.items()
    ]
    return {
        "preset": "iron", "model": vars(MODEL), "batch_size": 2, "rows": rows,
        "peak_rates": {"peak": {"float16": 65e12}, "peak_from": {"float16": "data sheet"}},
        "matmuls": {"float16": dict(seconds=1.0, flops=1.0, lower_bound_seconds=2.0)},
    }  # fmt: skip


def test_the_table_of_steps_names_the_baseline_and_the_peak_of_the_mfu() -> None:
    section = section_of(fused=8.0, fused_graph=3.0, builtin=10.0, builtin_graph=6.0, eager=20.0)
    text = tables.train(section | dict(nanogpt="3adf61e154c3fe3f"))
    assert "| fused (CUDA graph) | 3000.00 | ? | 2.00 builtin (CUDA graph) |" in text
    assert "| fused | 8000.00 | ? | 1.25 builtin |" in text
    assert "65 TFLOP/s (data sheet)" in text
    assert "nanoGPT at 3adf61e154." in text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (
            dict(fused=8.0, fused_graph=3.0, builtin=10.0, builtin_graph=6.0, eager=20.0),
            "fused (CUDA graph), is 2.00 times as fast as builtin (CUDA graph), 3.33 times as fast "
            "as builtin, 6.67 times as fast as eager, and takes 1.50 times the computed lower b",
        ),
        (
            dict(fused=2.0, fused_graph=3.0, builtin=4.0, builtin_graph=3.0),
            "fused, is 2.00 times as fast as builtin, 1.50 times as fast as builtin (CUDA graph)",
        ),
        (
            dict(fused=1.0, nanoGPT=4.0, nanoGPT_compiled=3.0),
            "fused, is 3.00 times as fast as nanoGPT (torch.compile), and takes 0.50 times",
        ),
        (
            dict(fused=1.0, nanoGPT=3.0, builtin_compiled=2.5, builtin_AdamW_compiled=2.0),
            "fused, is 2.00 times as fast as builtin (AdamW, torch.compile), 3.00 times as fast as "
            "nanoGPT, and takes",
        ),
    ],
)
def test_ours_is_compared_with_the_best_that_are_launched_so_then_compiled_then_nanogpt(
    seconds: dict[str, float], said: str
) -> None:
    assert f"Ours at its fastest, {said}" in tables.train(section_of(**seconds))


@pytest.mark.parametrize("name", ["fused compild", "nanoGPT"])
def test_an_unknown_variant_is_a_mistake(name: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--device", "cpu", "--variants", "builtin", name])
    assert f"no variant here is {name}; there are builtin, naive," in capsys.readouterr().err


def test_a_batch_of_no_sequences_is_a_mistake(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--device", "cpu", "--batch-size", "0"])
    assert capsys.readouterr().err.endswith("error: --batch-size must be at least 1\n")


@pytest.mark.gpu
def test_kernels_and_launches_of_a_step_are_counted() -> None:
    """A CUDA graph has as many kernels as a plain step, and fewer launches."""
    device = torch.device("cuda")
    plain, graph = (
        variants.trained(SETTING, builtin, torch.float32, device, graph=g) for g in (False, True)
    )
    for one in (plain, graph):
        one.warm_up()
    (kernels, launches), (in_graph, launched) = plain.counts(), graph.counts()
    assert kernels > 50
    assert in_graph == pytest.approx(kernels, rel=0.2)
    assert launched < launches / 4


def test_a_compiled_model_is_trained_as_the_trainer_calls_it(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda loss, **options: loss)
    compiled = variants.trained(SETTING, builtin, torch.float32, CPU, mode="default")
    plain = variants.trained(SETTING, builtin, torch.float32, CPU)
    rows = [variant.step() for variant in (compiled, plain)]
    assert all(isinstance(row, torch.Tensor) for row in rows)
    assert torch.equal(*rows)  # type: ignore[arg-type]


def test_matmuls_of_a_step_have_the_flops_that_the_model_counts() -> None:
    config = GPTConfig(vocab_size=104, **PRESETS["iron"].model)
    flops = sum(3 * n * 2 * M * K * N for _, n, M, K, N in roofline.matmul_shapes(config, 64))
    C, T, tokens = config.n_embd, config.context, 64 * config.context
    attention = 12 * config.n_layer * C * T * tokens
    norms = 6 * (2 * config.n_layer + 1) * C * tokens  # counted as weights of matmuls
    assert flops == tokens * config.flops_per_token() - attention - norms


def test_flops_and_bytes_of_muon_by_hand() -> None:
    """FLOPs for iron's matrices: the Gram matrix of the smaller side C twice, matmuls of it, and
    two matmuls with the matrix. Bytes: the momentum, and the iteration's input and output."""
    config = GPTConfig(vocab_size=104, **PRESETS["fast"].model)
    C, L = config.n_embd, config.n_layer
    longer = (3 + 1 + 4 + 4) * C  # the longer sides of a block's four
    gram, square = 2 * C * C * longer, 4 * 2 * C**3
    first, second = 3 + 2 + 2 * 2, 2 + 1 + 2  # squares of G, matmuls of factors, p G p
    flops = L * (4 * gram + (first + second) * square)
    assert roofline.muon_flops(config) == flops
    blocks, n = 12 * C * C * L, config.n_params()
    weights, moment, read = 8, 8, 2  # both read and written in float32; a gradient is 16 bits
    assert roofline.optimizer_bytes(config, "adamw", 4) == (weights + 2 * moment + 2 * 4) * n
    adamw, muon = (roofline.optimizer_bytes(config, name, 2) for name in ("adamw", "muon"))
    assert adamw == 32 * (n - blocks) + (weights + 2 * moment + 2 * read + 2) * blocks
    # Momentum and gradients are read twice, for the norm; the iteration has an input and an output.
    assert muon == 32 * (n - blocks) + (weights + moment + 4 + 3 * read + 2 + 2 * 2) * blocks


def test_matmuls_of_a_step_without_muon_are_those_of_the_model() -> None:
    found = dict(seconds=2.0, optimizer=dict(seconds=1.0))
    wanted = {"fused graph": 3.0, "nanoGPT compiled": 2.0, "builtin AdamW": 2.0}
    assert {name: matmuls.of_step(found, name) for name in wanted} == wanted
    assert matmuls.of_step(dict(seconds=2.0), "builtin") == 2.0


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_can_be_timed(preset: str) -> None:
    model, recipe, tokens = random_setting(preset)
    assert len(tokens.train) > recipe.batch_size * model.context
    assert tokens.train.max() < model.vocab_size
    assert roofline.t4_step(preset) > 0
