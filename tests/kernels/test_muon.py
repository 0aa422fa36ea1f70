"""The ops of Muon, before and after its matmuls: each implementation against eager in float64."""

import importlib
from types import ModuleType

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from irongpt_kernels.fused import muon as kernel
from numerics import DEVICE, HALVES, LAYOUTS, OUTPUTS, assert_rule, values
from torch import Tensor

grad_norm = importlib.import_module("irongpt_kernels.fused.grad_norm")

each_ops = pytest.mark.parametrize("ops", [builtin, fused], ids=["builtin", "fused"])
SHAPES = [(3, 33, 40), (1, 1025, 1), (2, 32, 32), (5, 4, 16), (1, 1, 1), (2, 50, 60)]


class State:
    """Matrices of one shape, their copies, momentum, and what an optimizer's step gives them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, copies: bool) -> None:
        n, *matrix = shape
        self.params = [values(*matrix, seed=i) for i in range(n)]
        self.copies = [p.to(dtype, copy=True) for p in self.params] if copies else []
        self.momentum = 0.1 * values(*shape, seed=20)
        self.dtype = dtype
        self.stats = torch.tensor([3.0, 64.0, 0.0], device=DEVICE)  # norm, divisor, overflow
        self.lr = torch.tensor(0.01, device=DEVICE)

    def double(self) -> "State":
        for name in ("momentum", "stats", "lr"):
            setattr(self, name, getattr(self, name).double())
        self.params = [p.double() for p in self.params]
        return self

    def grads(self, step: int) -> list[Tensor]:
        return [
            (64 * values(*p.shape, seed=99 * step + i)).to(self.dtype)
            for i, p in enumerate(self.params)
        ]

    def ahead(self, ops: ModuleType, grads: list[Tensor]) -> Tensor:
        wide = self.momentum.dtype == torch.float64
        dtype = torch.float64 if wide else self.dtype
        return ops.muon_momentum(grads, self.momentum, self.stats, beta=0.95, dtype=dtype)

    def update(self, ops: ModuleType, update: Tensor) -> None:
        ops.muon_update(
            self.params, self.copies, update, self.lr, self.stats, scale=4.0, weight_decay=0.1
        )

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.copies, self.momentum]


@each_ops
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(  # in float32 a training has no copies
    ("dtype", "copies"), [(torch.float32, False), *((half, True) for half in HALVES)], ids=str
)
def test_three_steps(ops: ModuleType, dtype: torch.dtype, shape, copies: bool) -> None:
    states = [State(shape, dtype, copies) for _ in range(3)]
    ours = states[0]
    states[2].double()
    for step in range(3):
        grads = ours.grads(step)
        makers = (ops, eager, eager)
        ahead = [s.ahead(o, grads) for s, o in zip(states, makers, strict=True)]
        assert ahead[0].dtype == dtype
        assert_rule(OUTPUTS, *ahead)
        assert_rule(OUTPUTS, *(s.momentum for s in states))
        update = values(*shape, seed=7 + step).to(dtype)
        for s, o in zip(states, makers, strict=True):
            s.update(o, update)
        for tensors in zip(*(s.params for s in states), strict=True):
            assert_rule(OUTPUTS, *tensors)
    assert len(ours.copies) == (shape[0] if copies else 0)
    for copy, p in zip(ours.copies, ours.params, strict=False):
        assert torch.equal(copy, p.to(dtype))


@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
def test_each_matrix_has_norm_1_whatever_the_others(ops: ModuleType) -> None:
    state = State((3, 40, 30), torch.float32, False)
    state.momentum.zero_()
    grads = state.grads(0)
    grads[1] *= 1e-3
    grads[2].zero_()
    ahead = state.ahead(ops, grads)
    torch.testing.assert_close(
        ahead.norm(dim=(1, 2)), torch.tensor([1.0, 1.0, 0.0], device=DEVICE), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_changes_nothing(ops: ModuleType, bad: float) -> None:
    state = State((2, 33, 40), torch.float16, True)
    before = [t.clone() for t in state.tensors()]
    grads = state.grads(0)
    grads[1][-1, -1] = bad
    state.stats.copy_(torch.tensor([bad, bad, 1.0]))
    ahead = state.ahead(ops, grads)
    assert ahead.isfinite().all()
    state.update(ops, ahead)
    assert all(map(torch.equal, state.tensors(), before))
    state.stats.copy_(torch.tensor([3.0, 64.0, 0.0]))
    state.update(ops, state.ahead(ops, state.grads(1)))
    assert not any(map(torch.equal, state.tensors(), before))


def test_more_matrices_than_a_launch_takes(monkeypatch) -> None:
    assert 2 * grad_norm.BLOCK < 40 * 110 <= 3 * grad_norm.BLOCK
    whole, parts = (State((5, 40, 110), torch.float16, True) for _ in range(2))
    whole.update(fused, whole.ahead(fused, whole.grads(0)))
    monkeypatch.setattr(grad_norm, "MAX_TENSORS", 2)
    monkeypatch.setattr(kernel, "PARTS", 2)  # for three blocks
    parts.update(fused, parts.ahead(fused, parts.grads(0)))
    for a, b in zip(whole.tensors(), parts.tensors(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_updates_of_any_layout(layout: str) -> None:
    straight, other = (State((2, 40, 24), torch.float16, True) for _ in range(2))
    grads = [LAYOUTS[layout](g) for g in straight.grads(0)]
    ahead = straight.ahead(fused, [g.contiguous() for g in grads])
    update = LAYOUTS[layout](ahead)
    straight.update(fused, update.contiguous())
    assert torch.equal(ahead, other.ahead(fused, grads))
    other.update(fused, update)
    assert all(map(torch.equal, straight.tensors(), other.tensors()))


def test_kernels_read_from_a_multiple_of_16_bytes() -> None:
    x = torch.arange(20.0, device=DEVICE).half()
    assert grad_norm.aligned(x) is x
    moved = grad_norm.aligned(x[3:])
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, x[3:])
