"""The model: equality with transformers' GPT-2, causality, cache, seeds."""

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from irongpt_kernels import builtin, eager
from model_helpers import CONFIG, build, tokens
from numerics import OUTPUTS, assert_exact, assert_rule
from torch import Tensor

from irongpt.config import PRESETS, GPTConfig
from irongpt.interchange.gpt2_layout import to_config_json, to_gpt2
from irongpt.model import GPT, Attention, KVCache

WITH_DROPOUT = replace(CONFIG, dropout=0.3)
both_ops = pytest.mark.parametrize("ops", [eager, builtin], ids=["eager", "builtin"])
with_and_without_bias = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def as_transformers(model: GPT) -> torch.nn.Module:
    """The same weights in transformers' GPT-2. `test_import` tests `to_gpt2` with its files."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config, dtype = model.config, model.wte.weight.dtype
    values = to_config_json(config, None, "float32") | {"attn_implementation": "eager"}
    reference = GPT2LMHeadModel(GPT2Config(**values))
    reference.load_state_dict(to_gpt2(model.state_dict(), config, dtype), strict=False)
    return reference.to(dtype).eval()


def test_the_gradient_of_the_embedding_has_the_same_bits_in_every_run() -> None:
    """Most tokens of a batch occur several times, and threads share the sums of their gradients."""
    config = GPTConfig(4096, n_layer=1, n_head=2, n_embd=32, context=64, dropout=0.0)
    idx = torch.randint(4096, (2, 4, 64), generator=torch.Generator().manual_seed(1)) ** 2 // 4096
    torch.manual_seed(1)
    model, found = GPT(config, builtin), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            x = F.embedding(idx[0], model.wte.weight)
            (gradient,) = torch.autograd.grad(x.square().sum(), model.wte.weight)
            torch.set_num_threads(threads)
            (whole,) = torch.autograd.grad(model.loss(*idx), model.wte.weight)
            found.append((gradient, whole))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@both_ops
def test_float32_logits_of_the_iron_model_are_within_1e_4_of_transformers(ops) -> None:
    config = GPTConfig(vocab_size=104, bias=True, **{**PRESETS["iron"].model, "dropout": 0.0})
    torch.manual_seed(1)
    model = GPT(config, ops).eval()
    idx = torch.randint(104, (1, config.context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, reference = model(idx), as_transformers(model)(idx).logits
    assert logits.std() > 0.1  # so 1e-4 is small
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=0)


@both_ops
def test_logits_and_gradients_equal_those_of_transformers(ops) -> None:
    model = build(ops=ops).double().eval()
    reference = as_transformers(model)
    idx, targets = tokens(), tokens(seed=2)
    logits = reference(idx).logits
    assert_exact(model(idx), logits)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model.loss(idx, targets).backward()
    theirs, qkv = reference.transformer, model.blocks[0].attn.qkv
    assert_exact(model.wte.weight.grad, theirs.wte.weight.grad)
    assert_exact(model.wpe.weight.grad, theirs.wpe.weight.grad)
    assert_exact(qkv.weight.grad, theirs.h[0].attn.c_attn.weight.grad.T)
    assert_exact(qkv.bias.grad, theirs.h[0].attn.c_attn.bias.grad)


@both_ops
@with_and_without_bias
def test_float32_logits_are_within_tolerance(ops, bias: bool) -> None:
    config = replace(CONFIG, bias=bias)
    with torch.no_grad():
        candidate, baseline = (build(config, x)(tokens()) for x in (ops, eager))
        assert_rule(OUTPUTS, candidate, baseline, build(config).double()(tokens()))


@pytest.mark.parametrize("branch_std", [0.02, 0.05])
def test_the_initialization_is_that_of_gpt_2(branch_std: float) -> None:
    torch.manual_seed(0)
    config = replace(
        CONFIG, n_layer=8, n_embd=128, vocab_size=500, context=100, branch_std=branch_std
    )
    model = GPT(config, eager)
    for name, p in model.state_dict().items():
        if p.dim() == 1:
            norm = ".ln_" in "." + name and name.endswith("weight")
            assert torch.equal(p, torch.full_like(p, float(norm))), name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
        if name.endswith(("qkv.weight", "fc.weight")):
            std = branch_std
        sigma = 1 / math.sqrt(2 * p.numel())  # of a standard deviation, relative
        assert abs(float(p.std()) / std - 1) < 5 * sigma, name
        assert abs(float(p.mean())) < 5 * std / math.sqrt(p.numel()), name


@both_ops
@pytest.mark.parametrize("training", [False, True])
def test_a_later_token_changes_no_earlier_logit(ops, training: bool) -> None:
    model = build(WITH_DROPOUT, ops).train(training)
    idx = tokens()
    for cut in (1, 7, CONFIG.context - 1):
        changed = idx.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % CONFIG.vocab_size
        torch.manual_seed(0)
        one = model(idx, seed=4)
        torch.manual_seed(0)
        other = model(changed, seed=4)
        torch.testing.assert_close(one[:, :cut], other[:, :cut], rtol=0, atol=0)
        assert (one[:, cut] != other[:, cut]).any()


def test_positions_past_the_context_are_rejected() -> None:
    with pytest.raises(ValueError, match="25 positions, but the context is 24"):
        build()(tokens(T=25))


def test_a_cache_gets_the_keys_and_values_of_its_rows() -> None:
    model, idx = build().double().eval(), tokens(B=3)
    whole = KVCache(CONFIG, 3, torch.float64, idx.device)
    with torch.no_grad():
        assert torch.equal(model(idx, cache=whole), model(idx))
        parts = KVCache(CONFIG, 3, torch.float64, idx.device)
        for rows in ([2, 0], [1]):
            parts.rows = torch.tensor(rows)
            model(idx[rows, :17], cache=parts)
    assert whole.k.abs().sum(-1).min() > 0
    for a, b in ((parts.k, whole.k), (parts.v, whole.v)):
        assert_exact(a[:, :, :, :17], b[:, :, :, :17])
        assert not a[:, :, :, 17:].any()


def test_a_seed_determines_the_dropout() -> None:
    model, idx = build(WITH_DROPOUT), tokens()
    first = model(idx, seed=5)
    torch.manual_seed(99)
    assert torch.equal(first, model(idx, seed=5))
    assert torch.equal(first, model(idx, seed=torch.tensor(5)))
    assert not torch.equal(first, model(idx, seed=6))
    with pytest.raises(ValueError, match="seed"):
        model(idx)


@both_ops
def test_evaluation_applies_no_dropout(ops) -> None:
    model, idx = build(WITH_DROPOUT, ops).eval(), tokens()
    assert torch.equal(model(idx, seed=5), model(idx))
    assert torch.equal(model(idx), build(CONFIG, ops)(idx))
    assert not torch.equal(model(idx), model.train()(idx, seed=5))


def test_every_dropout_of_the_model_has_its_own_seed(monkeypatch) -> None:
    parent = Mock()
    for name in ("causal_attention_packed", "dropout_add_layer_norm"):
        op = Mock(side_effect=getattr(eager, name))
        monkeypatch.setattr(eager, name, op)
        parent.attach_mock(op, name)
    build(WITH_DROPOUT)(tokens(), seed=1000)
    seeds = range(1000, 1000 + 3 * CONFIG.n_layer)
    wanted = [dict(dropout_p=0.3, seed=seed) for seed in seeds]
    assert [call.kwargs for call in parent.mock_calls] == wanted


@both_ops
def test_loss_is_the_cross_entropy_of_the_logits(ops) -> None:
    model, idx, targets = build(ops=ops).double(), tokens(), tokens(seed=2)
    targets[0, :5] = -100
    wanted = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    assert_exact(model.loss(idx, targets), wanted)
    assert model.loss(idx, targets).shape == ()
    random = build(WITH_DROPOUT).double()
    logits = random(idx, seed=3).flatten(0, 1)
    assert_exact(random.loss(idx, targets, seed=3), F.cross_entropy(logits, targets.flatten()))


@with_and_without_bias
def test_gradients_of_the_loss_are_its_finite_differences(bias: bool) -> None:
    """Dropout on, every parameter at once along one random direction."""
    model = build(replace(WITH_DROPOUT, n_layer=2, n_embd=8, bias=bias)).double()
    names, values = zip(*model.named_parameters(), strict=True)
    idx, targets = tokens(T=9), tokens(T=9, seed=2)

    def loss(*params: Tensor) -> Tensor:
        logits = torch.func.functional_call(
            model, dict(zip(names, params, strict=True)), (idx,), {"seed": 7}
        )
        return eager.cross_entropy(logits.flatten(0, 1), targets.flatten())

    leaves = [p.detach().clone().requires_grad_() for p in values]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_attention_passes_the_projection_to_its_op_without_a_copy(monkeypatch) -> None:
    op = Mock(side_effect=eager.causal_attention_packed)
    monkeypatch.setattr(eager, "causal_attention_packed", op)
    attention, projections = Attention(CONFIG, eager, 0), []
    attention.qkv.register_forward_hook(lambda _, __, y: projections.append(y))
    attention(torch.randn(2, 24, 32), 0.0, None, None)
    op.assert_called_once()
    (qkv,) = op.call_args.args
    assert qkv.shape == (2, 24, 3, 2, 16)
    assert qkv.data_ptr() == projections[0].data_ptr()
