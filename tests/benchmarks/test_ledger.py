"""What the ledger books: bytes of one operation by hand, launches as the launchers launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from numerics import DEVICE, UPDATES, small_inputs
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks import ledger, roofline
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig, TrainConfig

A, B = 4 * 6, 6 * 5
CHECKS = 6  # of targets on a CPU: comparisons, and, or, an index


def test_a_matrix_product_moves_its_three_matrices_and_a_view_nothing() -> None:
    with ledger.Ledger() as book:
        y = torch.ones(4, 6).half() @ torch.ones(6, 5).half()
        y.t()[:2].view(1, 2, 4)
    assert book.operations["matmuls"] == {"aten::mm": 1}
    assert book.bytes["matmuls"] == 2 * (A + B + 4 * 5)
    assert book.bytes["casts"] == (A + B) * (4 + 2)


def test_what_is_updated_is_read_and_written_and_what_is_expanded_is_read_once() -> None:
    x, row = torch.zeros(8, 5), torch.ones(5)
    with ledger.Ledger() as book:
        x += row.expand(8, 5)
    assert book.bytes["copies, adds"] == 4 * (2 * 40 + 5)
    with ledger.Ledger() as book:
        x.copy_(row.expand(8, 5))
    assert book.bytes["copies, adds"] == 4 * (40 + 5)


class _Inside(TorchDispatchMode):
    """Counts Triton's launches and those of PyTorch, within our operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.within = ""

    def book(self, name: str) -> None:
        self.count[name] = self.count.get(name, 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, outer = func._schema.name, self.within
        if not name.startswith("irongpt::"):
            out = func(*args, **(kwargs or {}))
            if name == "aten::fill_":  # what nobody has written is NaN, in a test
                return out
            if outer and ledger.traffic(func, args, kwargs or {}, out):
                self.book(outer)
            return out
        self.within = name
        try:
            with self:  # its implementation, which a mode does not see into otherwise
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        finally:
            self.within = outer


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    inside = _Inside()
    kind: Any = InterpretedFunction if DEVICE == "cpu" else JITFunction
    plain: Callable[..., Any] = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.book(inside.within)
        with torch.utils._python_dispatch._disable_current_modes():
            return plain(self, *args, **kwargs)

    with monkeypatch.context() as m, inside:
        m.setattr(kind, "run", run)
        yield inside.count


@pytest.mark.parametrize("name", [n for n in small_inputs() if n != "softmax"])
def test_our_operations_launch_what_the_ledger_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the iron model calls them: without biases."""
    inputs = {n: x for n, x in small_inputs(torch.float32)[name].items() if n != "bias"}
    inputs = {n: x.to(DEVICE) for n, x in inputs.items()}
    if "attention" in name:
        inputs = {n: torch.nn.functional.pad(x, (0, 11)) for n, x in inputs.items()}
    floats = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    with launches(monkeypatch) as count:
        out = getattr(fused, name)(**inputs)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(out, floats, [torch.ones_like(x) for x in out])
    booked = {n: k for n, k in count.items() if n}
    if DEVICE == "cpu" and name == "cross_entropy":
        booked["irongpt::cross_entropy"] -= CHECKS
    assert booked == {n: ledger.LAUNCHES.get(n, 1) for n in booked}
    assert len(booked) == 2


def test_the_optimizer_launches_what_the_ledger_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[torch.ones(5, device=DEVICE) for _ in range(3)] for _ in range(4)]
    scalars = [torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)]
    steps = torch.zeros(3, device=DEVICE)
    with launches(monkeypatch) as count:
        stats = fused.grad_norm(lists[0], *scalars, steps, max_norm=1.0, growth_interval=5)
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
def books() -> dict[str, ledger.Ledger]:
    modules = {"eager": eager, "builtin": builtin, "fused": fused}
    return {n: ledger.step(ops, torch.float16)[0] for n, ops in modules.items() if n != "eager"}


def test_a_fused_step_of_iron_does_not_grow(books: dict[str, ledger.Ledger]) -> None:
    """Lower these with the step. 75 are matmuls of cuBLAS, three for each weight."""
    book = books["fused"]
    assert book.launches["matmuls"] == 75
    assert book.launches["optimizer"] <= 3
    assert sum(book.launches.values()) <= 172
    assert sum(book.bytes.values()) <= 8.9e9


def test_a_fused_step_of_fast_does_not_grow() -> None:
    """Lower these with the step. Of the optimizer 37 are Muon's iteration."""
    book, _ = ledger.step(fused, torch.float16, "fast")
    assert book.launches["optimizer"] <= 52
    assert sum(book.launches.values()) <= 221
    assert sum(book.bytes.values()) <= 3.1e9


def test_the_floor_is_below_what_is_moved(books: dict[str, ledger.Ledger]) -> None:
    config = GPTConfig(WAR_AND_PEACE_VOCAB, **PRESETS["iron"].model)
    least = roofline.group_bytes(config, TrainConfig(**PRESETS["iron"].train), 2)
    book = books["fused"]
    assert least["matmuls"] == book.bytes["matmuls"]
    assert all(n <= 1.001 * book.bytes[group] for group, n in least.items())
    assert sum(least.values()) > 0.9 * sum(book.bytes.values())


def test_the_command_says_that_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert PRESETS["nano"].model["n_layer"] == 4
    options = "--preset nano --dtype float32 --optimizer adamw --top 3"
    assert ledger.main(options.split()) == 0
    out = capsys.readouterr().out
    assert out.count("computed, not measured") == 3
    assert "adamw 1" in out
