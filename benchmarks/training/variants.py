"""The training steps to time: of a Trainer with some ops, compiled or not, and of nanoGPT."""

import contextlib
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import profiler
from benchmarks.measure.rows import StepRow
from benchmarks.presets import Setting
from irongpt import device as devices
from irongpt.config import GPTConfig
from irongpt.cuda_graph import Graph
from irongpt.data.batches import TrainBatches
from irongpt.errors import UserError
from irongpt.model import GPT
from irongpt.training.trainer import Trainer

WARM = 5  # warm-up steps, within which a trainer captures its CUDA graph


class Variant:
    """A training step to time. deterministic: as in `irongpt train`."""

    def __init__(
        self, step: Callable[[], object], device: torch.device, deterministic: bool = False
    ) -> None:
        self.step, self.device, self.deterministic = step, device, deterministic

    def seconds_a_step(self, steps: int) -> float:
        """Mean wall time of a step, which includes the time of the host."""
        with self._algorithms():
            devices.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            devices.synchronize(self.device)
            return (time.perf_counter() - start) / steps

    def warm_up(self) -> None:
        self.seconds_a_step(WARM if self.device.type == "cuda" else 1)

    def counts(self) -> tuple[int | None, int | None]:
        """The kernels and the launches of a step, see `profiler`."""
        with self._algorithms():
            return profiler.counts(self.step, self.device)

    @contextlib.contextmanager
    def _algorithms(self) -> Iterator[None]:
        if self.deterministic:
            devices.make_deterministic()
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def peak_of(device: torch.device, row: StepRow) -> Iterator[None]:
    """Measures the row's peak_bytes: the peak of the allocated bytes less those allocated before.

    The memory pool of a CUDA graph counts while it is captured, so a variant must be made and
    warmed up inside."""
    gc.collect()  # trainers without a graph and models whose loss is compiled are in cycles
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    row.peak_bytes = torch.cuda.max_memory_allocated(device) - before


def trained(
    setting: Setting,
    module: Any,
    dtype: torch.dtype,
    device: torch.device,
    mode: str | None = None,
    deterministic: bool = False,
    graph: bool = False,
    **recipe: Any,
) -> Variant:
    """The training step of our model. mode: that of torch.compile, or None.

    graph: run the step as one CUDA graph, if the trainer supports it. recipe: fields of the
    setting's recipe to replace.
    """
    train_config = dataclasses.replace(setting.recipe, graph=graph, **recipe)
    torch.manual_seed(train_config.seed)
    model = GPT(setting.model, module).to(device)
    trainer = Trainer(model, setting.tokens, train_config, device, dtype)
    if mode is not None:
        # Each variant compiles its model again, and earlier variants keep theirs.
        torch._dynamo.config.recompile_limit = 64
        compiled = torch.compile(model.loss, mode=mode, dynamic=False)

        def loss(x: Tensor, y: Tensor, *, seed: Any = None, **options: Any) -> Tensor:
            # A tensor, because a number that changes at every step would recompile each time.
            at = torch.as_tensor(0 if seed is None else seed, device=device)
            value: Tensor = compiled(x, y, seed=at, **options)
            return value

        setattr(model, "loss", loss)  # noqa: B010 (a method, for mypy)

    def step() -> object:
        row = trainer.train_step()
        if isinstance(trainer.run_step, Graph) and trainer.run_step.failed:
            raise RuntimeError("the CUDA graph could not be captured")
        return row

    return Variant(step, device, deterministic)


def nanogpt_model(checkout: Path, config: GPTConfig) -> torch.nn.Module:
    """nanoGPT's model of the same shape."""
    if not (checkout / "model.py").is_file():
        raise UserError(f"{checkout} is not a checkout of nanoGPT: model.py is missing")
    sys.path.insert(0, str(checkout.resolve()))
    import model as theirs  # type: ignore[import-not-found]

    names = ("vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    same = {name: getattr(config, name) for name in names}
    made: torch.nn.Module = theirs.GPT(theirs.GPTConfig(block_size=config.context, **same))
    return made


def nanogpt(
    setting: Setting,
    checkout: Path,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool = False,
) -> Variant:
    """The step of nanoGPT's model of the same shape, on our batches, with nanoGPT's optimizer.

    compiled: by torch.compile, which is the default of its train.py.
    """
    ours, train = setting.model, setting.recipe
    torch.manual_seed(train.seed)
    model: Any = nanogpt_model(checkout, ours).to(device)
    optimizer = model.configure_optimizers(
        train.weight_decay, train.lr, (train.beta1, train.beta2), device.type
    )
    called = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ids = setting.tokens.train.to(device)
    batches = TrainBatches(ids, ours.context, train.batch_size, train.seed)
    count = itertools.count()

    def step() -> None:
        x, y = (t.contiguous() for t in batches(next(count)))
        with devices.autocast(device, dtype):
            _, loss = called(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Variant(step, device)
