"""Training on a GPU: no synchronization in a step, the same bits in every run, peak memory.

Without a GPU, the tests that can do so run in Triton's interpreter.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TINY
from irongpt_kernels import Ops, builtin, eager, fused
from numerics import DEVICE, HALVES, each_dtype
from op_cases import OP_CASES, Case
from torch.utils._python_dispatch import TorchDispatchMode

from irongpt import device as devices
from irongpt.config import PRESETS, GPTConfig, TrainConfig
from irongpt.cuda_graph import WARMUP
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

SHAPE = GPTConfig(vocab_size=29, n_layer=1, n_head=2, n_embd=32, context=8, dropout=0.2)
RECIPE = TrainConfig(
    iters=10, batch_size=1, lr=1e-3, warmup=2, decay="constant", weight_decay=0.1, eval_every=10
)
each_ops = pytest.mark.parametrize(
    "ops", [eager, builtin, fused], ids="eager builtin fused".split()
)


def trainer(
    ops: Ops, dtype: torch.dtype, shape: GPTConfig = SHAPE, recipe: TrainConfig = RECIPE
) -> Trainer:
    torch.manual_seed(1)
    ids = torch.arange(100 * shape.context) ** 2 // 5 % shape.vocab_size
    device = torch.device(DEVICE)
    return Trainer(GPT(shape, ops).to(device), ids, recipe, device, dtype)


class _Waited(Exception):  # noqa: N818
    pass


class _NothingWaits(TorchDispatchMode):
    """Raises where the host reads values of a tensor or makes one of its numbers (lift_fresh), for
    which it would wait on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        waiting = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.lift_fresh)
        waiting += (aten.item, aten.is_nonzero)  # as PyTorch calls the first in inference mode
        if func.overloadpacket in waiting:
            raise _Waited(func)
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    if DEVICE == "cpu":
        with _NothingWaits():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inference", [False, True])
def test_a_wait_is_caught(inference: bool) -> None:
    x = torch.ones(3, device=DEVICE)
    with torch.inference_mode(inference), nothing_waits():
        x += 1
        total = x.sum()
        waits = (total.item, total.__bool__, x.nonzero, lambda: torch.tensor(0.0, device=DEVICE))
        for wait in waits:
            with pytest.raises((RuntimeError, _Waited)):
                wait()
    assert x.sum().item() == 6


@each_ops
@each_dtype
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_host_never_waits_in_a_step(ops: Ops, dtype, optimizer: str) -> None:
    devices.make_deterministic()  # as a run does: PyTorch then selects other kernels
    t = trainer(ops, dtype, recipe=replace(RECIPE, optimizer=optimizer, grad_accum=2))
    t.train_step()  # copies the epoch's batches to the device
    with nothing_waits():
        row = t.train_step()
    assert row.isfinite().all()


def assert_same_bits(trainers: list[Trainer], steps: int) -> None:
    results = []
    for t in trainers:
        rows = torch.stack([t.train_step() for _ in range(steps)])
        results.append([rows, *t.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_dtype
def test_two_trainings_give_the_same_bits(dtype: torch.dtype) -> None:
    devices.make_deterministic()
    assert_same_bits([trainer(fused, dtype) for _ in range(2)], steps=2)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_a_resumed_fused_run_has_the_bits_of_an_uninterrupted_one(
    cli, tmp_path, monkeypatch, dtype: torch.dtype
) -> None:
    for name in ("safetensors", "matplotlib", "tqdm"):  # a run needs them, a kernel does not
        pytest.importorskip(name)
    from run_helpers import assert_same

    from irongpt.training import loop

    monkeypatch.setitem(PRESETS["nano"].train, "eval_windows", 2)
    if DEVICE == "cpu":  # a sample takes a minute in the interpreter
        monkeypatch.setattr(loop.TrainingLoop, "_sample", lambda self: "")
    flags = "--n-layer 1 --n-head 1 --batch-size 2 --dropout 0.1 --decay constant --eval-every 1"
    flags += f" --fused --device {DEVICE} --dtype {str(dtype)[6:]}"
    train = ["train", *TINY, *flags.split()]
    cli(*train, "--iters", "3", "--out", "uninterrupted")
    cli(*train, "--iters", "1", "--out", "stopped")
    cli("train", "--resume", "stopped", "--iters", "3")
    assert_same(tmp_path / "stopped", tmp_path / "uninterrupted")


@pytest.mark.gpu
@each_ops
@each_dtype
def test_a_graph_gives_the_bits_of_its_steps(ops: Ops, dtype: torch.dtype) -> None:
    devices.make_deterministic()
    shape = replace(SHAPE, dropout=0.0) if ops is builtin else SHAPE  # its masks are PyTorch's own
    recipes = [replace(RECIPE, graph=graph, grad_accum=2) for graph in (False, True)]
    assert_same_bits([trainer(ops, dtype, shape, recipe) for recipe in recipes], steps=8)


@pytest.mark.gpu
def test_the_host_never_waits_for_a_replay() -> None:
    t = trainer(fused, torch.float16)
    for _ in range(WARMUP + 2):
        t.train_step()
    with nothing_waits():
        row = t.train_step()
    assert row.isfinite().all()


each_op = pytest.mark.parametrize("case", OP_CASES.values(), ids=list(OP_CASES))


@pytest.mark.gpu
@each_op
def test_an_op_runs_on_the_stream_of_its_caller(case: Case) -> None:
    """After the kernels that make its inputs there: they are NaN until a long wait is over."""
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    wanted = case.results(fused, inputs, upstream)
    floats = {n: x for n, x in inputs.items() if x.is_floating_point()}
    delayed = {n: torch.full_like(x, float("nan")) for n, x in floats.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for n, x in floats.items():
            delayed[n].copy_(x)
        results = case.results(fused, inputs | delayed, upstream)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_op
def test_an_op_runs_on_the_device_of_its_inputs(case: Case) -> None:
    inputs = case.inputs()
    upstream = case.upstream(inputs)
    wanted = case.results(fused, inputs, upstream)
    moved = {n: x.to("cuda:1") for n, x in inputs.items()}
    assert torch.cuda.current_device() == 0
    results = case.results(fused, moved, tuple(g.to("cuda:1") for g in upstream))
    assert {x.device for x in results} == {torch.device("cuda", 1)}
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, wanted, strict=True))


def peak_bytes(ops: Ops) -> int:
    """Peak GPU memory of the iron preset's second step."""
    gc.collect()
    torch.cuda.empty_cache()
    shape = GPTConfig(vocab_size=112, **PRESETS["iron"].model)
    recipe = TrainConfig(**PRESETS["iron"].train)
    dtype = devices.precision("auto", torch.device(DEVICE)).dtype
    t = trainer(ops, dtype, shape, recipe)
    t.train_step()  # makes the optimizer's moments
    torch.cuda.reset_peak_memory_stats()
    t.train_step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
def test_fused_training_takes_a_third_of_eagers_memory() -> None:
    ours, reference = peak_bytes(fused), peak_bytes(eager)
    assert ours <= reference / 3, f"{ours / 2**20:.0f} MiB fused, {reference / 2**20:.0f} MiB eager"
