"""`irongpt export RUN FILE.gguf`: gguf's own reader finds the tensors and the vocabulary."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, assert_mistake, assert_refused

from irongpt.data.tokenizer import from_json
from irongpt.runs import checkpoint

gguf = pytest.importorskip("gguf")
CODE = Path(importlib.__file__).read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_reads_the_file(cli, tmp_path, dtype) -> None:
    (tmp_path / "text.txt").write_text(CODE)
    bpe = "--tokenizer bpe --vocab-size 320 --iters 1".split()
    cli("train", *TINY, *bpe, "--out", "run")
    cli("export", "run", "model.gguf", "--dtype", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    weights, _, vocabulary, _ = checkpoint.load(tmp_path / "run/best")
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 2 + 2 * 12 + 2
    for ours, name in (
        ("wte", "token_embd"),
        ("blocks.1.attn.qkv", "blk.1.attn_qkv"),
        ("blocks.1.attn.proj", "blk.1.attn_output"),
        ("blocks.0.mlp.fc", "blk.0.ffn_up"),
        ("blocks.0.mlp.proj", "blk.0.ffn_down"),
        ("ln_f", "output_norm"),
    ):
        expected = weights[f"{ours}.weight"].numpy()
        if expected.ndim == 2:
            expected = expected.astype(dtype)
        assert np.array_equal(tensors[f"{name}.weight"], expected), name
        assert tensors[f"{name}.weight"].dtype == expected.dtype, name
    assert not tensors["blk.0.attn_norm.bias"].any()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    tokenizer = from_json(vocabulary)
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end
    assert len(fields["tokenizer.ggml.merges"]) == 63
    assert_mistake(cli, "model.gguf exists: choose another file", "export", "run", "model.gguf")
    assert_mistake(cli, "its folder does not exist", "export", "run", "no/model.gguf")


def test_a_mistake_writes_nothing(cli, run, monkeypatch) -> None:
    assert_refused(cli, "has one token per character", "export", run, "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(cli, "needs the package gguf: pip install gguf", "export", run, "model.gguf")
