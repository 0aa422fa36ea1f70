"""The ledger counts the bytes of an operation and the launches of our ops correctly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from irongpt_kernels import fused
from numerics import DEVICE, OPS, UPDATES, inputs_of
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks import ledger
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB

A, B = 4 * 6, 6 * 5
# PyTorch ops by which an op validates its integers on a CPU.
CHECKS = {"cross_entropy": 6, "linear_cross_entropy": 4, "embed_layer_norm": 4}
# The custom ops of an op and of its gradients: norms compute those of their parameters, and of
# embeddings, by separate ops.
OWN = dict(layer_norm=3, dropout_add_layer_norm=3, embed_layer_norm=4, linear_cross_entropy=1)


def test_a_matmul_moves_three_matrices_and_a_view_moves_no_bytes() -> None:
    with ledger.Ledger() as book:
        y = torch.ones(4, 6).half() @ torch.ones(6, 5).half()
        y.t()[:2].view(1, 2, 4)
    assert book.launches["matmuls"] == 1
    assert book.bytes["matmuls"] == 2 * (A + B + 4 * 5)
    assert book.bytes["casts"] == (A + B) * (4 + 2)


def test_an_updated_tensor_counts_twice_and_an_expanded_tensor_counts_once() -> None:
    x, row = torch.zeros(8, 5), torch.ones(5)
    for write, read_too in ((x.add_, True), (x.copy_, False)):
        with ledger.Ledger() as book:
            write(row.expand(8, 5))
        assert book.bytes["copies, adds"] == 4 * (40 * (1 + read_too) + 5)


class _Inside(TorchDispatchMode):
    """Counts launches by Triton and by PyTorch inside each of our custom ops."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.op = ""

    def add(self, name: str) -> None:
        self.count[name] = self.count.get(name, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, outer = func._schema.name, self.op
        if not name.startswith("irongpt::"):
            out = func(*args, **(kwargs or {}))
            if name == "aten::fill_":  # the tests fill uninitialized memory with NaN
                return out
            if outer and ledger.traffic(func, args, kwargs or {}, out):
                self.add(outer)
            return out
        self.op = name
        try:
            with self:  # a mode does not see the calls in an implementation otherwise
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        finally:
            self.op = outer


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    inside = _Inside()
    kind: Any = InterpretedFunction if DEVICE == "cpu" else JITFunction
    plain: Callable[..., Any] = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.add(inside.op)
        with torch.utils._python_dispatch._disable_current_modes():
            return plain(self, *args, **kwargs)

    with monkeypatch.context() as m, inside:
        m.setattr(kind, "run", run)
        yield inside.count


@pytest.mark.parametrize("name", [n for n in OPS if n != "softmax"])
def test_our_ops_launch_as_many_kernels_as_the_ledger_counts(name: str, monkeypatch) -> None:
    """Without biases, like the iron model."""
    inputs = {n: x for n, x in inputs_of(name, torch.float32).items() if n != "bias"}
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    if "attention" in name:
        inputs = {n: torch.nn.functional.pad(x, (0, 11)) for n, x in inputs.items()}
    floats = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    with launches(monkeypatch) as count:
        out = getattr(fused, name)(**inputs)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, floats, [torch.ones_like(x) for x in out])
    counted = {n: k for n, k in count.items() if n}
    if DEVICE == "cpu":
        counted = {n: k - CHECKS.get(n.split("::")[1], 0) for n, k in counted.items()}
    assert counted == {n: ledger.LAUNCHES.get(n, 1) for n in counted}
    assert len(counted) == OWN.get(name, 2)


def test_the_optimizer_launches_as_many_kernels_as_the_ledger_counts(monkeypatch) -> None:
    lists = [[torch.ones(5, device=DEVICE) for _ in range(3)] for _ in range(4)]
    scalars = [torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)]
    steps = torch.zeros(3, device=DEVICE)
    with launches(monkeypatch) as count:
        stats = fused.grad_norm(lists[0], *scalars, steps, max_norm=1.0, growth_interval=5)
        fused.sum_shards(torch.ones(2, 5, device=DEVICE), *scalars, steps, max_norm=1.0)
        options = dict(beta1=0.9, beta2=0.99, weight_decays=[0.0] * 3)
        params, grads, m, v = lists
        fused.adamw(params, [], grads, m, v, steps, scalars[0], stats, **options)
        momentum, y = torch.ones(2, 5, 1, device=DEVICE), torch.ones(2, 5, 1, device=DEVICE)
        matrices = [p.view(5, 1) for p in params[:2]]
        fused.muon_momentum(matrices, momentum, stats, beta=0.9, dtype=torch.float32)
        fused.muon_update(matrices, [], y, scalars[0], stats, scale=1.0, weight_decay=0.0)
    assert {n: k for n, k in count.items() if n} == {
        f"irongpt::{n}": ledger.LAUNCHES.get(f"irongpt::{n}", 1) for n in UPDATES
    }


@pytest.fixture(scope="module")
def iron() -> ledger.Ledger:
    return ledger.step(fused, torch.float16)[0]


@pytest.mark.parametrize(
    ("preset", "optimizer", "launches", "moved"),
    [("iron", 3, 147, 8.77e9), ("fast", 52, 196, 3.07e9), ("code", 52, 203, 5.6e9)],
)
def test_a_fused_step_does_not_grow(
    preset: str, optimizer: int, launches: int, moved: float
) -> None:
    """Lower these numbers when the step needs less. cuBLAS runs 75 matmuls, three per weight; 37
    launches of Muon, which fast and code use, are its iteration."""
    book, trainer = ledger.step(fused, torch.float16, preset)
    assert book.launches["matmuls"] == 75
    assert book.launches["optimizer"] <= optimizer
    assert sum(book.launches.values()) <= launches
    assert sum(book.bytes.values()) <= moved
    assert trainer.model.config.vocab_size == (4096 if preset == "code" else WAR_AND_PEACE_VOCAB)


def test_the_attention_of_sm_90_has_one_backward_kernel_in_16_bits(iron) -> None:
    hopper, trainer = ledger.step(fused, torch.float16, arch=90)
    layers = trainer.model.config.n_layer
    assert iron.launches["attention"] - hopper.launches["attention"] == layers
    assert hopper.bytes == iron.bytes
    full, _ = ledger.step(fused, torch.float32, arch=90)
    assert full.launches["attention"] == iron.launches["attention"]


@pytest.mark.parametrize("preset", ["iron", "code"])
def test_the_lower_bound_is_below_the_bytes_that_a_step_moves(preset: str) -> None:
    book, trainer = ledger.step(fused, torch.float16, preset)
    least = ledger.least_bytes(trainer.model.config, trainer.config, 2)
    assert least["matmuls"] == book.bytes["matmuls"]
    assert all(n <= 1.001 * book.bytes[group] for group, n in least.items())
    without = [sum(moved.values()) - moved["optimizer"] for moved in (least, book.bytes)]
    assert without[0] > 0.9 * without[1]  # Muon's iteration has no least bytes


def test_the_command_prints_that_its_figures_are_computed(capsys, monkeypatch) -> None:
    monkeypatch.setitem(PRESETS["nano"].model, "n_layer", 1)
    options = "--preset nano --dtype float32 --optimizer adamw"
    ledger.main(options.split())
    out = capsys.readouterr().out
    assert out.count("computed, not measured") == 3
    assert out.count("optimizer") == 3
