"""Configs reject bad values by the name of the flag, and survive JSON; the presets."""

import json
from dataclasses import replace

import pytest
from irongpt_kernels import eager

from irongpt.config import (
    ADDED_LATER,
    PRESETS,
    WAR_AND_PEACE_VOCAB,
    GPTConfig,
    Preset,
    SampleConfig,
    TrainConfig,
    flag,
    from_json,
)
from irongpt.errors import UserError
from irongpt.model import GPT

MODEL = GPTConfig(vocab_size=65, n_layer=2, n_head=4, n_embd=32, context=16, dropout=0.1)
TRAIN = TrainConfig(**PRESETS["nano"].train)
SAMPLE = SampleConfig()
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        *[(MODEL, n, v) for n in ("vocab_size", "n_layer", "n_head", "n_embd") for v in (0, -1)],
        *[(MODEL, n, 10**4000) for n in ("vocab_size", "n_layer", "n_embd", "context")],
        (MODEL, "context", 0),
        (MODEL, "n_embd", 33),  # not divisible by 4 heads
        (MODEL, "n_head", 3),
        (MODEL, "n_embd", 100_000),  # 240 billion parameters
        *[(MODEL, "dropout", v) for v in (1.0, -0.1, NAN)],
        *[(TRAIN, n, v) for n in ("iters", "batch_size", "eval_every") for v in (0, -1)],
        (TRAIN, "grad_accum", 0),
        (TRAIN, "eval_windows", 0),
        *[(TRAIN, n, -1) for n in ("warmup", "weight_decay", "min_lr", "sample_tokens")],
        *[(TRAIN, n, 0) for n in ("lr", "grad_clip", "log_every")],
        *[(TRAIN, n, v) for n in ("lr", "weight_decay", "min_lr") for v in (NAN, INF, 10**400)],
        *[(TRAIN, "target_loss", v) for v in (NAN, INF, -INF)],
        *[(TRAIN, n, v) for n in ("beta1", "beta2", "ema") for v in (1.0, -0.1, NAN)],
        *[(TRAIN, "seed", v) for v in (-1, 2**31)],
        *[(TRAIN, n, "fast") for n in ("decay", "ops", "dtype")],
        (SAMPLE, "tokens", -1),
        *[(SAMPLE, "temperature", v) for v in (-0.1, NAN, INF)],
        (SAMPLE, "top_k", 0),
        *[(SAMPLE, "top_p", v) for v in (0.0, -0.1, 1.1, NAN)],
        *[(SAMPLE, "seed", v) for v in (-1, 2**63)],
    ],
    ids=lambda x: str(x)[:12] if not isinstance(x, (GPTConfig, TrainConfig, SampleConfig)) else "",
)
def test_a_bad_value_is_rejected_by_the_name_of_its_flag(config, name: str, value) -> None:
    with pytest.raises(UserError, match=flag(name)) as error:
        replace(config, **{name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (MODEL, "dropout", 0.0),
        (TRAIN, "warmup", 0),
        (TRAIN, "target_loss", None),
        (TRAIN, "seed", 2**31 - 1),
        (SAMPLE, "tokens", 0),
        (SAMPLE, "temperature", 0.0),
        (SAMPLE, "top_k", 1),
        (SAMPLE, "top_p", 1.0),
        (SAMPLE, "seed", 2**63 - 1),
    ],
)
def test_the_last_valid_value_is_accepted(config, name: str, value) -> None:
    assert getattr(replace(config, **{name: value}), name) == value


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_valid_and_survive_json(preset: Preset) -> None:
    for config in (GPTConfig(vocab_size=112, **preset.model), TrainConfig(**preset.train)):
        text = json.dumps(vars(config), allow_nan=False)
        assert from_json(type(config), json.loads(text)) == config


def test_the_iron_preset() -> None:
    model, train = PRESETS["iron"].model, PRESETS["iron"].train
    assert model == {"n_layer": 6, "n_head": 6, "n_embd": 384, "context": 256, "dropout": 0.2}
    assert (train["iters"], train["batch_size"], train["lr"]) == (5000, 64, 3e-4)


def test_the_fast_preset_has_the_iron_model_without_dropout() -> None:
    iron, fast = PRESETS["iron"], PRESETS["fast"]
    assert fast.model == iron.model | {"dropout": 0.0}
    sequences = [p.train["iters"] * p.train["batch_size"] for p in (iron, fast)]
    assert sequences[0] > 30 * sequences[1]


def test_the_best_preset_trains_on_at_most_ten_million_tokens() -> None:
    iron, best = PRESETS["iron"], PRESETS["best"]
    assert best.model | {"dropout": 0.2} == iron.model
    assert 9.9e6 < best.train["iters"] * best.train["batch_size"] * best.model["context"] <= 10e6


def test_an_int_is_accepted_for_a_float() -> None:
    assert from_json(GPTConfig, vars(MODEL) | {"dropout": 0}).dropout == 0
    assert from_json(TrainConfig, vars(TRAIN) | {"target_loss": 2}).target_loss == 2


@pytest.mark.parametrize(
    ("config", "change"),
    [
        *[(MODEL, {"n_layer": x}) for x in ("2", 2.0, True, None, [2])],
        *[(MODEL, change) for change in ({"bias": 1}, {"dropout": True}, {"n_layers": 2})],
        (MODEL, {"n_embd": -32}),
        (TRAIN, {"lr": None}),
        *[(TRAIN, {name: "x" * 10_000}) for name in ("decay", "iters")],
        (TRAIN, {"target_loss": "low"}),
    ],
)
def test_json_with_a_wrong_field_is_rejected(config, change: dict) -> None:
    with pytest.raises(UserError) as error:
        from_json(type(config), vars(config) | change)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("config", [MODEL, TRAIN], ids=["model", "train"])
def test_json_without_a_field_or_of_another_type_is_rejected(config) -> None:
    values = vars(config)
    needed = values.keys() - ADDED_LATER
    lacking = [{k: v for k, v in values.items() if k != name} for name in needed]
    for bad in lacking:
        with pytest.raises(UserError, match=r"fields of its .* are missing"):
            from_json(type(config), bad)
    for bad in (None, [], "config", 3):
        with pytest.raises(UserError, match=f"a {type(config).__name__} cannot be"):
            from_json(type(config), bad)


def test_fields_that_old_runs_do_not_have_get_their_defaults() -> None:
    values = {k: v for k, v in vars(TRAIN).items() if k not in ADDED_LATER}
    assert from_json(TrainConfig, values) == TRAIN
    values = {k: v for k, v in vars(MODEL).items() if k not in ADDED_LATER}
    assert from_json(GPTConfig, values) == MODEL


@pytest.mark.parametrize("bias", [False, True])
def test_n_params_counts_the_models_parameters(bias: bool) -> None:
    config = replace(MODEL, bias=bias)
    assert config.n_params() == sum(p.numel() for p in GPT(config, eager).parameters())


def test_iron_on_war_and_peace_has_10_8_million_parameters() -> None:
    config = GPTConfig(vocab_size=WAR_AND_PEACE_VOCAB, **PRESETS["iron"].model)
    assert round(config.n_params() / 1e6, 1) == 10.8


def test_flops_are_6_per_weight_and_12_per_width_and_position() -> None:
    config = replace(MODEL, n_layer=1, vocab_size=7)
    C, T = config.n_embd, config.context
    multiplied = 12 * C * C + 7 * C + 3 * C  # the block, the head, three norms
    assert config.flops_per_token() == 6 * multiplied + 12 * C * T
