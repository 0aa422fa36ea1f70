"""One token at a time against whole windows; and as a graph replays it, by a double on a CPU."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from model_helpers import CONFIG, build, tokens
from numerics import DEVICE, OUTPUTS, assert_exact, assert_rule, each_dtype
from sanitizer import sanitize
from test_gpu import nothing_waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from irongpt import device as devices
from irongpt.config import SampleConfig
from irongpt.cuda_graph import Graph
from irongpt.generation import decode, sample
from irongpt.generation.decode import Decoder

GREEDY = SampleConfig(temperature=0.0)
both_ops = pytest.mark.parametrize("ops", [eager, builtin], ids=["eager", "builtin"])


class Given(Decoder):
    """Goes on with tokens that are given, and keeps the logits."""

    def start(self, idx: Tensor, prompt: int) -> Tensor:
        """Logits of all but the first `prompt` - 1 positions of idx (B, T)."""
        self.idx, self.logits = idx, []
        self.read({b: row[:prompt].tolist() for b, row in enumerate(idx)})
        for _ in range(prompt, idx.shape[1] + 1):
            self.step()
        return torch.stack(self.logits, 1)

    def _draw(self, logits: Tensor) -> None:
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
def test_fused_logits_keep_to_the_rule(dtype: torch.dtype, B: int) -> None:
    idx = tokens(B, 19).to(DEVICE)
    with torch.no_grad():
        logits = [
            Given(build(ops=ops).to(DEVICE).eval(), B, GREEDY, dtype).start(idx, 17)
            for ops in (fused, eager)
        ]
        oracle = build().double().to(DEVICE)(idx)[:, 16:]
    assert_rule(OUTPUTS, *logits, oracle)


class Double(Graph):
    """A graph as far as a CPU goes: a replay runs the step while the host's numbers are away."""

    replays = 0

    def _aside(self) -> None:
        return self.step()

    def _capture(self) -> None:
        self.graph = SimpleNamespace(replay=self._replay)

    def _replay(self) -> None:
        Double.replays += 1
        decoder: Any = self.step.__self__
        known = decoder.drawn, decoder.positions
        decoder.drawn = decoder.positions = None
        with nothing_waits():
            self.step()
        decoder.drawn, decoder.positions = known


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_write_what_steps_write(ops, dtype: torch.dtype, monkeypatch) -> None:
    devices.make_deterministic()  # as a run is: it changes which kernels PyTorch takes
    model, prompts = build(ops=ops), [[1, 2, 3], list(range(40)), [7]]
    for config in (SampleConfig(tokens=80, top_k=20, top_p=0.9), replace(GREEDY, tokens=30)):
        plain = list(sample.generate_texts(model, prompts, config, dtype))
        with monkeypatch.context() as patch:

            class Graphed(Decoder):
                def __init__(self, *args: Any) -> None:
                    super().__init__(*args)
                    self.run = Double(self.step, self.tokens.device, decode.WARMUP)

            patch.setattr(sample, "Decoder", Graphed)
            Double.replays = 0
            graphed = list(sample.generate_texts(model, prompts, config, dtype, ahead=32))
        assert Double.replays == config.tokens - decode.WARMUP
        assert graphed == plain


def test_a_graph_without_a_result_gives_none() -> None:
    model = build()
    with torch.inference_mode():
        decoder = Decoder(model, 1, GREEDY)
        decoder.read({0: [1]})
        run = Double(decoder.step, decoder.tokens.device, 1)
        assert [run() for _ in range(3)] == [None] * 3
    assert decoder.counts.tolist() == [[3, 3]]


class _Kernels(TorchDispatchMode):
    """Counts the calls that would be a kernel each, but for those of our own ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        makes = ("empty", "view", "select", "detach", "slice", "alias", "unbind", "permute", "as_")
        name, out = func.name(), func(*args, **kwargs or {})
        copies = "reshape" not in name or out.data_ptr() != args[0].data_ptr()
        if not name.startswith("irongpt") and not any(m in name for m in makes) and copies:
            self.found.append(name)
        return out


@pytest.mark.skipif(DEVICE != "cpu", reason="counts launches of the interpreter")
def test_a_token_of_six_layers_is_33_kernels() -> None:
    config = replace(CONFIG, n_layer=6, bias=False)
    with torch.inference_mode():
        decoder = Decoder(build(config, fused).eval(), 1, SampleConfig(), torch.float16)
        decoder.read({0: [1]})
        with sanitize() as report, _Kernels() as torchs:
            decoder.step()
    assert torchs.found == []
    assert len(report.kernels) == 33


@pytest.mark.gpu
@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
@pytest.mark.parametrize("texts", [1, 6])
@each_dtype
def test_a_graph_writes_what_its_steps_write(ops, texts: int, dtype: torch.dtype) -> None:
    """Through several windows, under determinism, and a second time in the same process."""
    devices.make_deterministic()
    model = build(ops=ops).to(DEVICE)
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(texts)]
    for config in (SampleConfig(tokens=100, top_k=20, top_p=0.9), replace(GREEDY, tokens=40)):
        rows = [
            list(sample.generate_texts(model, prompts, config, dtype, graph))
            for graph in (False, True, True)
        ]
        assert rows[0] == rows[1] == rows[2]


@pytest.mark.gpu
def test_the_host_never_waits_for_a_token() -> None:
    with torch.inference_mode():
        decoder = Decoder(build(ops=fused).to(DEVICE).eval(), 2, SampleConfig(), torch.float16)
        decoder.read({0: [1], 1: [2]})
        for _ in range(4):
            decoder.run()
        with nothing_waits():
            decoder.run()
    assert decoder.counts[0, 0] == 5
