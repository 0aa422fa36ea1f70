"""The optimizer's ops, grad_norm, sum_shards and adamw, against eager in float64."""

import importlib
from types import ModuleType

import pytest
import torch
from irongpt_kernels import builtin, eager, fused
from numerics import DEVICE, HALVES, OUTPUTS, assert_rule, each_dtype, values
from torch import Tensor

norm_kernel = importlib.import_module("irongpt_kernels.fused.grad_norm")
each_ops = pytest.mark.parametrize("ops", [builtin, fused], ids=["builtin", "fused"])
SHAPES = [(33, 80), (2049,), (2048,), (1,), (3, 5), (4200,), (16,)]
COPIES = 2  # of the first weights
BETAS = dict(beta1=0.9, beta2=0.999)
# PyTorch's CUDA kernel rounds the betas to float32 and computes 1 - beta^step in float32, so of
# betas near 1 few digits remain. These are exact, and their differences from 1 are large.
BETAS_OF_CUDA = dict(beta1=0.5, beta2=0.75)


class State:
    """Weights, copies of the first ones, gradients, moments and all else of a few steps."""

    def __init__(
        self, dtype: torch.dtype, narrow: bool, shapes: list[tuple[int, ...]] = SHAPES
    ) -> None:
        self.params = [values(*s, seed=i) for i, s in enumerate(shapes)]
        self.copies = [p.to(dtype) for p in self.params[:COPIES]]
        self.narrow = dtype if narrow else torch.float32
        self.m = [0.1 * values(*s, seed=20 + i) for i, s in enumerate(shapes)]
        self.v = [0.01 * values(*s, seed=40 + i).square() for i, s in enumerate(shapes)]
        self.steps = 3.0 * torch.arange(len(shapes), device=DEVICE)  # a restored run's may differ
        self.scale = torch.tensor(64.0, device=DEVICE)
        self.good = torch.tensor(0, device=DEVICE)
        self.lr = torch.tensor(0.01, device=DEVICE)
        self.decays = [0.1 * (len(s) - 1) for s in shapes]

    def double(self) -> "State":
        for name in ("params", "m", "v"):
            setattr(self, name, [t.double() for t in getattr(self, name)])
        for name in ("steps", "scale", "lr"):
            setattr(self, name, getattr(self, name).double())
        return self

    def grads(self, step: int, size: float = 1.0) -> list[Tensor]:
        made = [size * values(*p.shape, seed=99 * step + i) for i, p in enumerate(self.params)]
        return [g.to(self.narrow) if i < COPIES else g for i, g in enumerate(made)]

    def step(
        self,
        ops: ModuleType,
        grads: list[Tensor],
        max_norm: float = 1.0,
        betas: dict[str, float] = BETAS,
    ) -> Tensor:
        wide = self.params[0].dtype == torch.float64
        grads = [g.double() if wide else g.clone() for g in grads]
        stats = ops.grad_norm(
            grads, self.scale, self.good, self.steps, max_norm=max_norm, growth_interval=3
        )
        ops.adamw(
            self.params, self.copies, grads, self.m, self.v, self.steps, self.lr, stats,
            **betas, weight_decays=self.decays,
        )  # fmt: skip
        return stats

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.m, *self.v, *self.copies, self.steps, self.scale, self.good]


def betas_for(ops: ModuleType) -> dict[str, float]:
    return BETAS_OF_CUDA if ops is builtin and DEVICE == "cuda" else BETAS


@each_ops
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.float32, False), *((half, narrow) for half in HALVES for narrow in (False, True))],
    ids=str,
)
def test_five_steps(ops: ModuleType, dtype: torch.dtype, narrow: bool) -> None:
    """With gradients that are clipped and others that are not."""
    ours, theirs = (State(dtype, narrow) for _ in range(2))
    oracle = State(dtype, narrow).double()
    for step in range(5):
        grads = ours.grads(step, [0.01, 50.0][step % 2])
        states = (ours, ops), (theirs, eager), (oracle, eager)
        rows = [s.step(o, grads, betas=betas_for(ops)) for s, o in states]
        assert_rule(OUTPUTS, rows[0][:2], rows[1][:2], rows[2][:2])
        assert rows[0][2] == 0
        for name in ("params", "m", "v"):
            for tensors in zip(*(getattr(s, name) for s in (ours, theirs, oracle)), strict=True):
                assert_rule(OUTPUTS, *tensors)
    for copy, p in zip(ours.copies, ours.params, strict=False):
        assert torch.equal(copy, p.to(dtype))
    assert torch.equal(ours.steps, State(dtype, narrow).steps + 5)
    assert (ours.scale, ours.good) == (theirs.scale, theirs.good) == (128, 2)


@pytest.mark.parametrize("step", [1, 2, 10, 400, 100_000])
@each_ops
def test_any_step_has_its_bias_corrected(ops: ModuleType, step: int) -> None:
    states = [State(torch.float32, False, SHAPES[3:5]) for _ in range(3)]
    states[2].double()
    for s, o in zip(states, (ops, eager, eager), strict=True):
        s.steps += step - 1
        s.m = [torch.zeros_like(m) for m in s.m]
        s.v = [torch.zeros_like(v) for v in s.v]
        s.params = [torch.zeros_like(p) for p in s.params]  # what is left is the update
        s.step(o, states[0].grads(1), betas=betas_for(ops))
    for tensors in zip(*(s.params for s in states), strict=True):
        assert_rule(OUTPUTS, *tensors)


@each_ops
@pytest.mark.parametrize(
    ("bad", "where"),
    [(float("inf"), 0), (float("-inf"), 3), (float("nan"), 6), (float("nan"), 0)],
)
def test_an_overflow_changes_only_the_scale(ops: ModuleType, bad: float, where: int) -> None:
    state = State(torch.float16, True)
    state.step(ops, state.grads(0))
    before = [t.clone() for t in state.tensors()]
    grads = state.grads(1)
    grads[where].view(-1)[-1] = bad
    row = state.step(ops, grads)
    assert not row[0].isfinite()
    assert row[2] == 1
    *kept, scale, good = state.tensors()
    assert all(map(torch.equal, kept, before))
    assert (scale, good) == (32, 0)
    state.step(ops, state.grads(2))
    assert not any(map(torch.equal, state.tensors()[:-2], before))


@pytest.mark.parametrize("ops", [eager, builtin, fused], ids=["eager", "builtin", "fused"])
def test_the_scale_doubles_and_halves_within_its_bounds(ops) -> None:
    scale, good = torch.tensor(65536.0, device=DEVICE), torch.tensor(0, device=DEVICE)
    steps, g = torch.zeros(1, device=DEVICE), torch.ones(3, device=DEVICE)

    def after(value: float, growth_interval: int) -> float:
        ops.grad_norm(
            [value * g], scale, good, steps, max_norm=1.0, growth_interval=growth_interval
        )
        return float(scale)

    inf = float("inf")
    found = [after(x, 3) / 65536 for x in (1, 1, inf, 1, 1, 1, 1, 1, 1)]
    assert found == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]
    assert steps == 8
    assert [after(inf, 1) for _ in range(40)][-1] == 1
    assert [after(1.0, 1) for _ in range(40)][-1] == 2**24
    assert after(inf, 0) == 2**24  # without loss scaling


def test_more_weights_than_a_launch_takes(monkeypatch) -> None:
    whole, parts = (State(torch.float16, True) for _ in range(2))
    rows = [whole.step(fused, whole.grads(0))]
    monkeypatch.setattr(norm_kernel, "MAX_TENSORS", 3)
    monkeypatch.setattr(norm_kernel, "SUMS", 4)
    rows.append(parts.step(fused, parts.grads(0)))
    torch.testing.assert_close(*rows)
    for a, b in zip(whole.tensors(), parts.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_any_layout() -> None:
    straight, other = (State(torch.float16, True, [(40, 24), (24, 8)]) for _ in range(2))
    grads = straight.grads(0)
    rows = straight.step(fused, grads)
    assert torch.equal(rows, other.step(fused, [g.t().contiguous().t() for g in grads]))
    assert all(map(torch.equal, straight.tensors(), other.tensors()))


@each_ops
@each_dtype
@pytest.mark.parametrize(("count", "size"), [(1, 5), (3, 2048), (4, 5000)])
def test_shards_are_added_in_their_order(ops: ModuleType, dtype, count: int, size: int) -> None:
    """To the bit, by every implementation; the norm is that of the sum. Rows may lie apart."""
    wide = 30 * values(count, size + 8, dtype=dtype)
    shards = wide[:, :size]
    total = torch.zeros(size, device=DEVICE)
    for shard in shards:
        total = total + shard.float()
    rows = []
    for module, given in ((ops, shards), (eager, shards), (eager, shards.double())):
        state = State(torch.float32, False)
        found, stats = module.sum_shards(given, state.scale, state.good, state.steps, max_norm=1.0)
        rows.append(stats[:2])
        assert torch.equal(found.float(), total) or given.dtype == torch.float64
        assert torch.equal(state.steps, State(torch.float32, False).steps + 1)
    assert_rule(OUTPUTS, *(r.to(torch.float32) for r in rows[:2]), rows[2].double())
    state = State(torch.float16, False)
    wide[-1, size - 1] = float("inf")
    stats = ops.sum_shards(
        shards, state.scale, state.good, state.steps, max_norm=1.0, growth_interval=3
    )[1]
    assert (stats[2], state.scale) == (1, 32)
    assert torch.equal(state.steps, State(torch.float32, False).steps)
    if count == 3:
        turned = shards.t().contiguous().t()
        fresh = (State(torch.float16, False) for _ in range(2))
        a, b = (
            ops.sum_shards(x, s.scale, s.good, s.steps, max_norm=1.0)[0]
            for x, s in zip((shards, turned), fresh, strict=True)
        )
        assert torch.equal(a, b)
