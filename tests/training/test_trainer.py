"""The training step, the evaluation and the state that a checkpoint holds."""

import math
from dataclasses import replace

import pytest
import torch
from irongpt_kernels import builtin, eager

from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.data.batches import evenly_spaced
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

CPU = torch.device("cpu")
SHAPE = GPTConfig(vocab_size=11, n_layer=2, n_head=2, n_embd=16, context=16, dropout=0.0)
SETTINGS = dict(iters=40, batch_size=8, warmup=2, lr=0.01, optimizer="adamw")
RECIPE = TrainConfig(**PRESETS["nano"].train | SETTINGS)
IDS = torch.arange(3000) ** 2 // 5 % 11


def trainer(ops=builtin, dtype=torch.float32, dropout=0.0, **recipe) -> Trainer:
    torch.manual_seed(1)
    model = GPT(replace(SHAPE, dropout=dropout), ops)
    return Trainer(model, IDS, replace(RECIPE, **recipe), CPU, dtype)


def train(t: Trainer, steps: int) -> torch.Tensor:
    return torch.stack([t.train_step() for _ in range(steps)])


def assert_same_params(a: Trainer, b: Trainer) -> None:
    assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


class Frozen:
    """Ops of an optimizer that changes nothing."""

    grad_norm = staticmethod(builtin.grad_norm)
    adamw = staticmethod(lambda *args, **kwargs: None)


@pytest.mark.parametrize("split", [(4, 2), (2, 4), (1, 8)])
def test_accumulated_gradients_are_those_of_the_whole_batch(split, monkeypatch):
    """In float64, by the gradients that the optimizer gets and their norm."""
    batch_size, grad_accum = split
    given = []
    for t in (trainer(), trainer(batch_size=batch_size, grad_accum=grad_accum)):
        t.model.double()
        monkeypatch.setattr(t.optimizer, "ops", Frozen)
        row = t.train_step()
        given.append([row[0], row[1], *(p.grad for p in t.model.parameters())])
    for at_once, accumulated in zip(*given, strict=True):
        torch.testing.assert_close(accumulated.double(), at_once.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_training_follows_float32(dtype):
    wide, narrow = trainer(), trainer(dtype=dtype)
    losses, rows = train(wide, 20)[:, 0], train(narrow, 20)
    # 2^-7 is bfloat16's step; float16's is finer.
    torch.testing.assert_close(rows[:, 0], losses, rtol=2**-7, atol=0)
    assert rows[0, 2] == (65536 if dtype == torch.float16 else 1)
    assert all(p.dtype == torch.float32 for p in narrow.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("grad_accum", [1, 3])
def test_low_precision_params_give_the_bits_of_autocast(
    monkeypatch, dtype: torch.dtype, optimizer: str, grad_accum: int
) -> None:
    """Autocast casts every weight at its use, and its gradient back to float32."""
    options = dict(ops=eager, dtype=dtype, dropout=0.2, optimizer=optimizer, grad_accum=grad_accum)
    copied = trainer(**options)
    assert {c.dtype for c in copied.optimizer.low_precision_params.values()} == {dtype}
    assert len(copied.optimizer.low_precision_params) == 4 * SHAPE.n_layer
    rows = train(copied, 5)
    with monkeypatch.context() as m:
        m.setattr(GPT, "make_low_precision_params", lambda self, dtype: {})
        cast = trainer(**options)
    assert torch.equal(train(cast, 5), rows)
    assert copied.evaluate() == cast.evaluate()
    assert_same_params(copied, cast)
    for weight, copy in copied.optimizer.low_precision_params.items():
        assert torch.equal(copy, weight.to(dtype))


def test_loading_weights_updates_the_low_precision_params() -> None:
    t, other = trainer(dtype=torch.float16), trainer(dtype=torch.float16)
    train(t, 3)
    other.model.load_state_dict(t.model.state_dict())
    assert other.evaluate_all() == t.evaluate_all()
    assert {w.dtype for w in t.model.state_dict().values()} == {torch.float32}
    assert set(t.model.state_dict()) == set(trainer().model.state_dict())


def test_the_average_of_the_weights_is_evaluated_in_16_bits_too() -> None:
    t = trainer(dtype=torch.float16)
    train(t, 3)
    other = trainer(dtype=torch.float16)
    with t.optimizer.averaged():
        other.model.load_state_dict(t.model.state_dict())
    assert t.evaluate_all() != other.evaluate_all()
    batches = evenly_spaced(t.val_ids, t.model.config.context, t.eval_batch, t.config.eval_windows)
    assert t.evaluate() == other._mean_loss(batches, lambda: True)


def test_evaluation_is_the_mean_over_all_sequences_without_dropout():
    t = trainer(dropout=0.9)
    loss = t.evaluate()
    assert t.evaluate() == loss
    assert t.model.training
    t.eval_batch = 7  # the last batch is smaller
    assert t.evaluate() == pytest.approx(loss, rel=1e-6)


def test_evaluation_stops_when_asked_and_restores_the_mode_after_an_error(monkeypatch):
    t = trainer()
    t.eval_batch = 4
    answers = iter([True, False])
    assert t.evaluate(lambda: next(answers)) is None
    assert t.model.training
    monkeypatch.setattr(t.model, "loss", lambda x, y: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        t.evaluate()
    assert t.model.training


def test_an_evaluation_with_a_limit_stops_where_the_first_batches_are_above_it(monkeypatch):
    t = trainer()
    t.eval_batch = 4
    whole, seen, loss = t.evaluate(), [], t.model.loss
    monkeypatch.setattr(t.model, "loss", lambda x, y: seen.append(0) or loss(x, y))
    assert t.evaluate(limit=whole) == whole
    batches = len(seen)
    assert batches > 1
    assert t.evaluate(limit=whole - 1e-6) == whole  # close: the other batches could be lower
    assert len(seen) == 2 * batches
    assert t.evaluate(limit=whole / 2) == math.inf
    assert len(seen) == 2 * batches + 1


def test_every_dropout_of_a_run_has_its_own_seed():
    """The dropouts of a forward pass have consecutive seeds, as test_model checks."""
    dropouts, used = 3 * SHAPE.n_layer, []
    for run_seed in (1, 2):
        t = trainer(seed=run_seed, grad_accum=2)
        for _ in range(3):
            t.train_step()
            used += [seed + i for seed in t.seeds.tolist() for i in range(dropouts)]
    assert len(set(used)) == len(used) == 2 * 3 * 2 * dropouts  # runs, steps, accumulation


@pytest.mark.parametrize("ops", [eager, builtin])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restored_state_goes_on_bitwise(ops, dtype, optimizer):
    options = dict(ops=ops, dtype=dtype, dropout=0.1, optimizer=optimizer)
    rows, first = train(trainer(**options), 10), trainer(**options)
    train(first, 6)
    weights = {k: v.clone() for k, v in first.model.state_dict().items()}
    tensors = {k: v.clone() for k, v in first.optimizer_tensors().items()}
    for _ in range(2):  # the second load must see what the first one saw
        second = trainer(**options)
        second.model.load_state_dict(weights)
        second.restore(6, tensors)
        assert torch.equal(train(second, 4), rows[6:])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_part_of_the_state_is_needed(optimizer):
    t = trainer(dropout=0.1, dtype=torch.float16, optimizer=optimizer)
    train(t, 3)
    tensors = t.optimizer_tensors()
    for name in tensors:
        if not name.startswith("scaler."):
            others = {k: v for k, v in tensors.items() if k != name}
            with pytest.raises(KeyError):
                trainer(optimizer=optimizer).restore(3, others)


def test_a_run_can_change_its_dtype():
    t = trainer(dtype=torch.float16)
    train(t, 3)
    other = trainer()
    other.restore(3, t.optimizer_tensors())
    assert other.optimizer.scale == 1
    back = trainer(dtype=torch.float16)
    back.restore(3, other.optimizer_tensors())
    assert back.optimizer.scale == 65536


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_survives_many_overflows(optimizer):
    """Twenty steps in a row whose gradients overflow change the loss scale alone."""
    t, clean = (trainer(dtype=torch.float16, optimizer=optimizer) for _ in range(2))
    hook = t.model.ln_f.weight.register_hook(lambda g: g * float("inf"))
    assert not train(t, 20)[:, 1].isfinite().any()
    hook.remove()
    assert_same_params(t, clean)
    t.step, t.optimizer.scale[...] = 0, 65536
    assert torch.equal(train(t, 5), train(clean, 5))


@torch.no_grad()
def test_the_first_nonfinite_tensor_is_named():
    for name in ("blocks.1.mlp.fc.weight", "wte.weight"):
        t = trainer()
        t.model.get_parameter(name)[0] = float("nan")
        assert t.first_nonfinite() == f"the weight {name}"
    t = trainer()
    t.model.blocks[1].mlp.fc.weight.fill_(3e38)
    assert t.first_nonfinite() == "the output of blocks.1.mlp.proj"
    t = trainer()
    t.model.blocks[0].mlp.fc.weight.register_hook(lambda g: g * float("nan"))
    with torch.enable_grad():
        assert t.first_nonfinite() == "the gradient of blocks.0.mlp.fc.weight"
        assert trainer().first_nonfinite().startswith("none")
