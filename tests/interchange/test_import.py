"""`irongpt import`: a GPT-2 of transformers computes, and trains, the same in our model."""

import argparse
import importlib
import json
import shutil
import string
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_mistake, assert_refused
from numerics import DEVICE
from safetensors.torch import load_file, save_file

from irongpt.cli import main
from irongpt.config import GPTConfig, TrainConfig
from irongpt.data import pre_tokens
from irongpt.data.corpus import Corpus
from irongpt.data.tokenizer import BPETokenizer
from irongpt.data.tokens import encode
from irongpt.generation.sample import trained_model
from irongpt.interchange import importer
from irongpt.interchange.gpt2_layout import to_gpt2
from irongpt.interchange.importer import read_tokenizer
from irongpt.runs import checkpoint
from irongpt.training.optimizer import lr_at
from irongpt.training.trainer import Trainer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CODE = Path(argparse.__file__).read_text()
V = 321  # no multiple of 8, as GPT-2's 50,257
OPS = ["eager", "builtin", "fused"]


def gpt2_tokenizer():
    """A vocabulary of GPT-2's kind, trained by the library."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([CODE], trainer)
    made.add_special_tokens(["<|endoftext|>"])
    return made


def save_gpt2(folder: Path, **sizes: int) -> Path:
    """Lets transformers write a small GPT-2 with random weights and biases."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, **sizes, bos_token_id=V - 1, eos_token_id=V - 1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    made = gpt2_tokenizer()
    transformers.GPT2Tokenizer(tokenizer_object=made).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    return save_gpt2(folder, n_positions=32, n_embd=32, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory) -> Path:
    """For the fused ops: Triton's interpreter is slow."""
    folder = tmp_path_factory.mktemp("small") / "gpt2"
    return save_gpt2(folder, n_positions=16, n_embd=16, n_layer=1, n_head=1)


def imported_from(folder: Path) -> Path:
    run = folder.with_name("run")
    if not run.exists():
        assert main(["import", str(folder), str(run)]) == 0
    return run


@pytest.fixture(scope="module", params=OPS)
def case(request) -> tuple[str, Path, str]:
    """Ops, the folder of a model for them, and their device."""
    if request.param == "fused":
        return request.param, request.getfixturevalue("small_gpt2"), DEVICE
    return request.param, request.getfixturevalue("gpt2"), "cpu"


@pytest.fixture
def few_tensors(monkeypatch) -> None:
    """In a launch of the optimizer: selecting one of many is slow in the interpreter."""
    monkeypatch.setattr(
        importlib.import_module("irongpt_kernels.fused.grad_norm"), "MAX_TENSORS", 4
    )


def reference(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


def test_logits_and_gradients_equal_those_of_transformers(case) -> None:
    ops, folder, device = case
    theirs = reference(folder).to(device)
    model, tokenizer = trained_model(imported_from(folder), "last", ops, device)
    size = (1, 1, 16, 16) if ops == "fused" else (2, 2, 32, 32)
    assert model.config == GPTConfig(V, *size, dropout=0.0, bias=True)
    T = model.config.context
    ids = tokenizer.encode(CODE[5000:6000])[: 2 * (T + 1)].view(2, T + 1).to(device)
    idx, targets = ids[:, :-1], ids[:, 1:]
    logits = theirs(idx).logits
    with torch.no_grad():
        torch.testing.assert_close(model(idx), logits, atol=1e-4, rtol=1e-5)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model.loss(idx, targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    ours = to_gpt2(gradients, model.config, torch.float32)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name  # so the tolerance is small
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("few_tensors")
def test_ten_training_steps_equal_those_of_transformers(case) -> None:
    ops, folder, where = case
    model, tokenizer = trained_model(imported_from(folder), "last", ops, where)
    config = TrainConfig(
        iters=10, batch_size=1 if ops == "fused" else 4, lr=1e-3, warmup=2, decay="linear",
        weight_decay=0.1, eval_every=10, ops=ops,
    )  # fmt: skip
    device = torch.device(where)
    text = "def f(x):\n    return x + 1\n\n\n" * 100  # not CODE, which each Python has its own of
    trainer = Trainer(model, tokenizer.encode(text), config, device, torch.float32)
    theirs = reference(folder).to(device)
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    matrices, vectors = (
        [p for p in theirs.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
    )
    losses, expected = [], []
    for step in range(config.iters):
        x, y = trainer.train_batches(step)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.grad_clip)
        optimizer.step()
        expected.append(loss.item())
        losses.append(trainer.train_step()[0].item())
    assert expected[-1] < expected[0] - 0.2
    assert losses == pytest.approx(expected, abs=1e-4)
    ours = to_gpt2(model.state_dict(), model.config, torch.float32)
    for name, p in theirs.named_parameters():
        change, difference = p.detach() - before[name], p.detach() - ours[name]
        if name.endswith("c_attn.bias"):  # softmax does not depend on the bias of the keys
            C = model.config.n_embd
            change[C : 2 * C] = difference[C : 2 * C] = 0
        assert difference.norm() <= 0.01 * change.norm(), name


def test_the_tokenizer_of_gpt_2_has_the_same_ids(gpt2, monkeypatch) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    tokenizer = trained_model(imported_from(gpt2), "last", "eager", "cpu")[1]
    assert isinstance(tokenizer, BPETokenizer)
    texts = [CODE, string.printable, "a\n\nb \n c\r\n\n\n", "12345 ½ ʼ naïve Ѐ 中文 🙂", ""]
    for text in texts:
        assert tokenizer.encode(text).tolist() == theirs.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "x\n\ny" * 50_000  # a text is cut up for several processes
    monkeypatch.setattr(pre_tokens, "CHUNK", 999)
    found = encode(Corpus("text", (text.encode(),), (b"x\n\n",)), tokenizer)
    assert found.train.tolist() == theirs.encode(text).ids


def test_the_names_of_openai_and_merges_as_strings(gpt2, cli, tmp_path) -> None:
    """The hub's openai-community/gpt2 has no prefix, mask buffers, and fewer settings."""
    shutil.copytree(gpt2, tmp_path / "hub")
    tensors = load_file(tmp_path / "hub/model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "hub/model.safetensors")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    keep = {"model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}
    config = {k: v for k, v in config.items() if k in keep}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    vocabulary = json.loads((tmp_path / "hub/tokenizer.json").read_text())
    del vocabulary["pre_tokenizer"]["use_regex"]
    vocabulary["model"]["merges"] = [" ".join(m) for m in vocabulary["model"]["merges"]]
    (tmp_path / "hub/tokenizer.json").write_text(json.dumps(vocabulary))
    for folder, run in ((gpt2, "a"), ("hub", "b")):
        cli("import", folder, run)
    a, b = (checkpoint.load(tmp_path / run / "last") for run in "ab")
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    assert a[2] == b[2]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_own_export_comes_back(cli, tmp_path, run, dtype) -> None:
    cli("export", run, "exported", "--dtype", dtype)
    cli("import", "exported", "back")
    weights, _, tokenizer, _ = checkpoint.load(tmp_path / run / "best")
    back = checkpoint.load(tmp_path / "back/last")
    assert back[0].keys() == weights.keys()  # no biases
    assert back[2] == tokenizer
    for name, w in weights.items():
        assert torch.equal(back[0][name], w.to(getattr(torch, dtype)).float())
    generated = [cli("generate", r, "--tokens", 20, "--temperature", 0).out for r in (run, "back")]
    assert generated[0] == generated[1]


@pytest.mark.usefixtures("few_tensors")
def test_an_imported_run_is_trained_and_resumed_with_fused_ops(
    cli, tmp_path, small_gpt2, monkeypatch
) -> None:
    """The first start may change the recipe, as long as no step is taken; later ones may not."""
    monkeypatch.setitem(importer.RECIPE, "sample_tokens", 0)  # Triton's interpreter is slow
    monkeypatch.setitem(importer.RECIPE, "eval_windows", 1)
    (tmp_path / "text.txt").write_text(CODE[:800])
    cli("import", small_gpt2, "run")
    assert_mistake(cli, "has no text yet: give it one with --data", "train", "--resume", "run")
    wrong = ["--data", "text.txt", "--n-layer", 3]
    assert_mistake(cli, "--n-layer", "train", "--resume", "run", *wrong)
    first = "--data text.txt --iters 1 --eval-every 1 --batch-size 1 --grad-accum 1 --fused"
    result = cli("train", "--resume", "run", *first.split(), "--lr", 1e-3, "--dropout", 0.1)
    assert "finished at step 1" in result.out
    assert_mistake(cli, "--lr cannot change", "train", "--resume", "run", "--lr", 1)
    (tmp_path / "other.txt").write_text(CODE)
    assert "is not the text" in cli("train", "--resume", "run", "--data", "other.txt").out
    more = cli("train", "--resume", "run", "--iters", 3, "--ops", "builtin")
    assert "finished at step 3" in more.out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["train"]["lr"], config["model"]["dropout"]) == (1e-3, 0.1)


def edit(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, path)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
MISTAKES = {
    "no such folder": (shutil.rmtree, "has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not a JSON object"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 10**5), "is not a JSON object"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has no model.safetensors",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "is damaged",
    ),
    "another head": (
        lambda f: change_tensor(f, "lm_head.weight", torch.zeros(V, 32)),
        "its head is not the token embedding",
    ),
    "a missing bias": (
        lambda f: change_tensor(f, "transformer.h.0.mlp.c_fc.bias", None),
        "it has no tensor h.0.mlp.c_fc.bias",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a run": (lambda f: f.with_name("run").touch(), "run exists and is not empty"),
}
CONFIGS = (  # changes of config.json
    (dict(model_type="llama"), "its model_type is 'llama', and our model needs 'gpt2'"),
    (dict(activation_function="relu"), "activation_function"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(n_inner=64), "n_inner is 64"),
    (dict(n_layer="2"), "n_layer is '2'"),
    (dict(vocab_size=384), "does not fit"),
    (dict(n_layer=3), "no tensor h.2.ln_1.weight"),
    (dict(n_layer=1), "tensors that our model lacks"),
    (dict(n_embd=64), "does not fit its config.json"),
)
TOKENIZERS = (  # changes of tokenizer.json
    dict(pre_tokenizer={"type": "Whitespace"}),
    dict(pre_tokenizer=BYTE_LEVEL),
    dict(normalizer={"type": "NFC"}),
)
MISTAKES |= {
    str(changes): (partial(edit, name="config.json", **changes), message)
    for changes, message in CONFIGS
}
MISTAKES |= {
    str(changes): (partial(edit, name="tokenizer.json", **changes), "its tokenizer.json is neither")
    for changes in TOKENIZERS
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_writes_nothing(cli, tmp_path, gpt2, mistake) -> None:
    damage, message = MISTAKES[mistake]
    shutil.copytree(gpt2, tmp_path / "model")
    damage(tmp_path / "model")
    assert_refused(cli, message, "import", "model", "run")


def test_a_tokenizer_of_gpt_2_survives_its_file() -> None:
    tokenizer = BPETokenizer(((40, 41), (256, 42)), gpt2=True)
    assert read_tokenizer(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer
    assert tokenizer.token_bytes[:2] == [b"!", b'"']
    assert read_tokenizer(BPETokenizer(((40, 41),)).to_json()) == BPETokenizer(((40, 41),))
