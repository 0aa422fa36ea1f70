"""The head whose rows are padded for cuBLAS: no loss, gradient, file or text has the padding."""

import importlib
from dataclasses import replace
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from conftest import TINY
from irongpt_kernels import builtin, eager
from model_helpers import CONFIG, build, tokens
from numerics import DEVICE, GRADIENTS, OUTPUTS, assert_exact, assert_rule
from run_helpers import history
from torch import Tensor

from irongpt import device as devices
from irongpt import model as models
from irongpt.config import GPTConfig
from irongpt.model import GPT, padded_vocab

V = CONFIG.vocab_size  # 65


@pytest.fixture
def padded(monkeypatch) -> None:
    """Pads on the CPU too."""
    monkeypatch.setattr(models, "PADDED_ON", ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("size", "rows"),
    [(1, 8), (104, 104), (109, 112), (1023, 1024), (1025, 1088), (4104, 4104), (50257, 50304)],
)
def test_the_head_is_padded_to_whole_rows(size: int, rows: int) -> None:
    assert padded_vocab(size) == rows


def loss_and_gradients(model: GPT) -> tuple[Tensor, list[Tensor]]:
    model.to(DEVICE)
    loss = model.loss(tokens().to(DEVICE), tokens(seed=2).to(DEVICE))
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", ["eager", "builtin", "fused"])
def test_loss_and_gradients_are_those_without_padding(name: str, monkeypatch) -> None:
    if name == "fused":
        pytest.importorskip("triton")
    ops, config = importlib.import_module(f"irongpt_kernels.{name}"), replace(CONFIG, n_layer=1)
    monkeypatch.setattr(models, "PADDED_ON", ())
    baseline, oracle = (loss_and_gradients(m) for m in (build(config), build(config).double()))
    seen = Mock(side_effect=ops.linear_cross_entropy)
    monkeypatch.setattr(ops, "linear_cross_entropy", seen)
    monkeypatch.setattr(models, "PADDED_ON", ("cpu", "cuda"))
    loss, gradients = loss_and_gradients(build(config, ops))
    (_, weight, _), options = seen.call_args
    assert weight.shape == (72, CONFIG.n_embd)
    assert (weight[V:] == 0).all()
    assert options["classes"] == V
    assert_rule(OUTPUTS, loss, baseline[0], oracle[0])
    for found in zip(gradients, baseline[1], oracle[1], strict=True):
        assert_rule(GRADIENTS, *found)


@pytest.mark.usefixtures("padded")
def test_a_vocabulary_of_whole_rows_keeps_its_bits() -> None:
    idx = tokens() % 64
    model = build(replace(CONFIG, vocab_size=64))
    wanted = eager.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert torch.equal(model.loss(idx, idx), wanted)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_padding_has_the_dtype_of_the_matmuls(dtype: torch.dtype) -> None:
    model = build()
    model.make_low_precision_params(dtype)
    with devices.autocast(torch.device("cpu"), dtype):
        loss = model.loss(tokens(), tokens(seed=2))
    loss.backward()
    assert loss.isfinite()
    assert model.wte.weight.grad.shape == (V, CONFIG.n_embd)
    assert model.wte.weight.grad.isfinite().all()


@pytest.mark.usefixtures("padded")
def test_a_large_logit_is_not_hidden_by_the_padding() -> None:
    """exp(0 - max) of a padding logit of 0 would be the largest term of this sum."""
    model = GPT(GPTConfig(3, n_layer=1, n_head=1, n_embd=8, context=4, dropout=0.0), eager).double()
    with torch.no_grad():
        model.wte.weight.copy_(-torch.arange(1.0, 4)[:, None].expand(3, 8))
        model.ln_f.weight.fill_(20.0)
    idx = torch.tensor([[0, 1, 2, 1]])
    wanted = eager.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
    assert_exact(model.loss(idx, idx), wanted)


@pytest.mark.usefixtures("padded")
def test_files_and_texts_have_no_padding(cli, tmp_path, monkeypatch) -> None:
    steps = Mock(side_effect=eager.linear_cross_entropy)
    monkeypatch.setattr(builtin, "linear_cross_entropy", steps)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "#")  # its other characters are a multiple of 8
    arguments = [*TINY, *"--shards 2 --decay constant --iters 20".split()]
    cli("train", *arguments, "--out", "whole")
    assert steps.call_count > 40
    (_, weight, _), options = steps.call_args
    assert len(weight) % 8 == 0
    assert options["classes"] < len(weight)
    with monkeypatch.context() as patch:
        patch.setattr(models, "PADDED_ON", ())
        cli("train", *arguments, "--out", "plain")
    whole, plain = ([r["val_loss"] for r in history(tmp_path / x)] for x in ("whole", "plain"))
    assert whole == pytest.approx(plain, abs=1e-4)
    weights, state = (
        safetensors.torch.load_file(tmp_path / "whole/last" / f"{name}.safetensors")
        for name in ("model", "optimizer")
    )
    size = len(weights["wte.weight"])
    assert size % 8 != 0
    assert len(state["exp_avg.wte.weight"]) == size
    sample = cli("generate", "whole", "--tokens", 40).out
    with monkeypatch.context() as patch:
        patch.setattr(models, "PADDED_ON", ())
        assert cli("generate", "whole", "--tokens", 40).out == sample
    cli("export", "whole", "exported")
    exported = safetensors.torch.load_file(tmp_path / "exported/model.safetensors")
    assert len(exported["transformer.wte.weight"]) == size
