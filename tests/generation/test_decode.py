"""Decoding with a cache against the full forward pass, and as a CUDA graph would replay it."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from cpu_graph import CpuGraph
from irongpt_kernels import builtin, eager, fused
from model_helpers import CONFIG, build, tokens
from numerics import DEVICE, OUTPUTS, assert_exact, assert_rule, each_dtype
from sanitizer import sanitize
from test_gpu import nothing_waits
from torch import Tensor

from benchmarks.ledger import Ledger
from irongpt import device as devices
from irongpt.config import SampleConfig
from irongpt.generation import decode, sample
from irongpt.generation.decode import Decoder

GREEDY = SampleConfig(temperature=0.0)
both_ops = pytest.mark.parametrize("ops", [eager, builtin], ids=["eager", "builtin"])


class Given(Decoder):
    """Continues with given tokens instead of samples, and keeps the logits."""

    def start(self, idx: Tensor, prompt: int) -> Tensor:
        """Logits of all but the first `prompt` - 1 positions of idx (B, T)."""
        self.idx, self.logits = idx, []
        self.prefill(idx[:, :prompt].tolist(), range(len(idx)))
        for _ in range(prompt, idx.shape[1] + 1):
            self.step()
        return torch.stack(self.logits, 1)

    def _sample(self, logits: Tensor) -> None:
        self.logits.append(logits)
        n = int(self.counts[0, 0])
        position = int(self.counts[0, 1]) + 1
        self.tokens[:, n % self.tokens.shape[1]] = self.idx[:, position % self.idx.shape[1]]
        self.counts += 1


@both_ops
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prompt", [1, 5, 23, 24])
def test_a_cache_changes_no_logit_at_any_length(ops, bias: bool, prompt: int) -> None:
    config, idx = replace(CONFIG, bias=bias), tokens()
    with torch.no_grad():
        cached = Given(build(config, ops).eval(), 2, GREEDY).start(idx, prompt)
        baseline, oracle = build(config)(idx), build(config).double()(idx)
        assert_rule(OUTPUTS, cached, *(x[:, prompt - 1 :] for x in (baseline, oracle)))
        exact = Given(build(config, ops).double().eval(), 2, GREEDY).start(idx, prompt)
        assert_exact(exact, oracle[:, prompt - 1 :])


@each_dtype
@pytest.mark.parametrize("B", [2, 5])
def test_fused_logits_are_within_tolerance(dtype: torch.dtype, B: int) -> None:
    config, idx = replace(CONFIG, n_layer=2), tokens(B, 18).to(DEVICE)
    with torch.no_grad():
        logits = [
            Given(build(config, ops).to(DEVICE).eval(), B, GREEDY, dtype).start(idx, 17)
            for ops in (fused, eager)
        ]
        oracle = build(config).double().to(DEVICE)(idx)[:, 16:]
    assert_rule(OUTPUTS, *logits, oracle)


class Graphed(Decoder):
    """Decodes with a stand-in for the graph."""

    events: ClassVar[list[str]] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = dict(events=self.events, warmup=decode.WARMUP)
        self.graph = CpuGraph(self.step, "sampled", **options)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_generate_the_tokens_of_steps(ops, dtype: torch.dtype, monkeypatch) -> None:
    devices.make_deterministic()  # as a run does: PyTorch then selects other kernels
    model, prompts = build(ops=ops), [[1, 2, 3], list(range(40)), [7]]
    for config in (SampleConfig(tokens=40, top_k=20, top_p=0.9), replace(GREEDY, tokens=26)):
        plain = list(sample.generate_batch(model, prompts, config, dtype))
        with monkeypatch.context() as patch:
            patch.setattr(sample, "Decoder", Graphed)
            Graphed.events.clear()
            patch.setitem(sample.READ_EVERY, "cpu", 32)
            graphed = list(sample.generate_batch(model, prompts, config, dtype))
        assert Graphed.events.count("replay") == config.tokens - decode.WARMUP
        assert graphed == plain


@pytest.mark.skipif(DEVICE != "cpu", reason="counts launches of the interpreter")
def test_a_token_of_six_layers_is_33_kernels() -> None:
    config = replace(CONFIG, n_layer=6, bias=False)
    with torch.inference_mode():
        decoder = Decoder(build(config, fused).eval(), 1, SampleConfig(), torch.float16)
        decoder.prefill([[1]], [0])
        with sanitize() as launched, Ledger() as book:
            decoder.step()
    assert len(launched) == sum(book.launches.values()) == 33  # and none of PyTorch's


@pytest.mark.gpu
@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
@pytest.mark.parametrize("B", [1, 6])
@each_dtype
def test_a_graph_generates_the_tokens_of_its_steps(ops, B: int, dtype: torch.dtype) -> None:
    """Past the context several times, under determinism, and twice in the same process."""
    devices.make_deterministic()
    model = build(ops=ops).to(DEVICE)
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(B)]
    for config in (SampleConfig(tokens=100, top_k=20, top_p=0.9), replace(GREEDY, tokens=40)):
        rows = [
            list(sample.generate_batch(model, prompts, config, dtype, graph))
            for graph in (False, True, True)
        ]
        assert rows[0] == rows[1] == rows[2]


@pytest.mark.gpu
def test_the_host_never_waits_in_a_decoding_step() -> None:
    with torch.inference_mode():
        decoder = Decoder(build(ops=fused).to(DEVICE).eval(), 2, SampleConfig(), torch.float16)
        decoder.prefill([[1], [2]], [0, 1])
        for _ in range(4):
            decoder.run()
        with nothing_waits():
            decoder.run()
    assert decoder.counts[0, 0] == 5
