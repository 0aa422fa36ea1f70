"""A model as a Python object, and derivatives that are refused."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from torch.optim.swa_utils import AveragedModel

from irongpt.config import GPTConfig
from irongpt.model import GPT

IDS = torch.arange(8)[None]


@pytest.fixture(params=[builtin, eager, fused], ids=lambda ops: ops.__name__.rpartition(".")[2])
def model(request) -> GPT:
    config = GPTConfig(11, n_layer=1, n_head=2, n_embd=32, context=8, dropout=0.0)
    return GPT(config, request.param)


def saved(model: GPT) -> GPT:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_and_apart(model, copied):
    model.make_low_precision_params(torch.bfloat16)
    other = copied(model)
    assert other.ops is other.blocks[0].attn.ops is model.ops
    other.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    ours, theirs = (m.blocks[0].mlp.fc for m in (model, other))
    assert theirs.low_precision_weight.equal(theirs.weight.bfloat16())
    assert ours.low_precision_weight.equal(ours.weight.bfloat16())
    assert theirs.low_precision_weight.is_leaf
    assert not ours.weight.equal(theirs.weight)


def test_a_model_that_is_made_without_memory_drops_the_same(model):
    with torch.device("meta"):
        empty = GPT(replace(model.config, dropout=0.5), model.ops)
    made = empty.to_empty(device="cpu")
    made.seed_offsets.fill_(7)
    made.load_state_dict(model.state_dict())
    whole = GPT(made.config, model.ops)
    whole.load_state_dict(model.state_dict())
    with torch.random.fork_rng():  # for the dropout of builtin
        results = [torch.manual_seed(0) and m(IDS, seed=torch.tensor(3)) for m in (made, whole)]
    assert torch.equal(*results)
    assert torch.equal(made.seed_offsets, whole.seed_offsets)


def test_an_average_of_models(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    assert average(IDS).equal(model(IDS))


def test_a_forward_mode_derivative_is_refused():
    x = torch.randn(2, 16)
    with pytest.raises(NotImplementedError, match="gelu has no forward-mode"):
        torch.func.jvp(fused.gelu, (x,), (x,))
    weight = torch.ones(16)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda w: fused.layer_norm(x, w), (weight,), (weight,))
    torch.func.jvp(lambda y: fused.gelu(x) + y, (x,), (x,))  # not of the op
