"""The times of a training step on one GPU and on all of them, and of the gradients' exchange.

    torchrun --nproc-per-node 2 -m irongpt doctor
    torchrun --nproc-per-node 2 -m benchmarks.scaling

`measure` times them in the processes of torchrun, a few steps of each in turn, so that a warm GPU
or another program slows all alike. `by_torchrun` starts these processes.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from irongpt import device as devices
from irongpt import ops
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig, TrainConfig
from irongpt.cuda_graph import WARMUP
from irongpt.data.batches import Tokens
from irongpt.errors import UserError
from irongpt.model import GPT
from irongpt.training.distributed import World
from irongpt.training.trainer import Trainer

MIN_SPEEDUP = 1.25  # from which several GPUs are recommended
LIMIT = 50.0  # seconds, which may include compiling the kernels
TOKENS = 100_000  # random ones, because a step's time does not depend on the text


@dataclass
class Scaling:
    """Seconds per step, a number for each round: on one GPU, on all, and of the exchange alone.

    bytes: the number that a process receives in an exchange.
    """

    preset: str
    dtype: str
    ops: str
    kind: str  # what computes: GPU or process
    count: int
    bytes: int
    one: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    exchange: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        return statistics.median(self.one) / statistics.median(self.all)

    def with_times_of(self, other: "Scaling") -> "Scaling":
        """Both measurements as one."""
        names = ("one", "all", "exchange")
        return replace(self, **{n: getattr(self, n) + getattr(other, n) for n in names})

    def __str__(self) -> str:
        """The result in one sentence."""
        one, every, exchange = (
            f"{statistics.median(times) * 1e3:.1f} ms"
            for times in (self.one, self.all, self.exchange)
        )
        many = f"{self.count} {self.kind}{'s' if self.kind == 'GPU' else 'es'}"
        return (
            f"{many} are {'' if self.speedup >= MIN_SPEEDUP else 'not '}worth using: a step of "
            f"{self.preset} takes {one} on one and {every} on all, {self.speedup:.2f} times as "
            f"fast; the exchange of {self.bytes / 1e6:.1f} MB takes {exchange}"
        )


def measure(
    world: World, device: torch.device, preset: str, rounds: int = 5, steps: int = 0
) -> Scaling:
    """Returns the times of this process. Only process 0 has times of `one`, for which on a CPU it
    gets the threads of all.

    steps: per round; 0 selects 10 on a GPU and 3 on a CPU.
    """
    dtype = devices.precision("auto", device).dtype
    steps = steps or (10 if device.type == "cuda" else 3)
    model = GPTConfig(vocab_size=WAR_AND_PEACE_VOCAB, **PRESETS[preset].model)
    name = "fused" if device.type == "cuda" else "builtin"
    try:
        module = ops.load(name, device, model)
    except UserError:  # `irongpt doctor` shows the reason among its other facts
        name = "builtin"
        module = ops.load(name, device, model)
    generator = torch.Generator().manual_seed(1)
    tokens = Tokens.of(torch.randint(model.vocab_size, (TOKENS,), generator=generator))
    devices.make_deterministic()

    def trainer(world: World) -> Trainer:
        recipe = TrainConfig(**PRESETS[preset].train | {"shards": world.size})
        torch.manual_seed(recipe.seed)
        return Trainer(GPT(model, module).to(device), tokens, recipe, device, dtype, world)

    together = trainer(world)
    alone = trainer(World()) if world.rank == 0 else None
    shards = together.shards
    assert shards is not None
    received = shards.rows.nbytes // world.size * (world.size - 1)
    kind = "GPU" if device.type == "cuda" else "process"
    times = Scaling(preset, devices.dtype_name(dtype), name, kind, world.size, received)
    threads = torch.get_num_threads()
    warm = WARMUP + 2 if device.type == "cuda" else 1
    try:
        for turn in range(rounds + 1):
            count = steps if turn else warm
            world.gather(None)
            if alone is not None:
                torch.set_num_threads(threads * (world.size if device.type == "cpu" else 1))
                times.one.append(_seconds(alone.train_step, count, device))
                torch.set_num_threads(threads)
            world.gather(None)
            times.all.append(_seconds(together.train_step, count, device))
            times.exchange.append(_seconds(shards.exchange, count, device))
    finally:
        together.close()
    for samples in (times.one, times.all, times.exchange):
        del samples[:1]  # warm-up, in which kernels are compiled
    return times


def _seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    devices.synchronize(device)
    return (time.perf_counter() - start) / count


def by_torchrun(count: int, limit: float = LIMIT) -> str:
    """The result for the GPUs of this machine, or the reason why there is none. limit: seconds."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "doctor.json")
        words = [sys.executable, "-m", *torchrun, "-m", "irongpt", "doctor", "--json", str(file)]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(limit)
            return str(json.loads(file.read_bytes())["facts"]["scaling"])
        except (subprocess.TimeoutExpired, OSError, ValueError, KeyError, TypeError):
            return (
                f"{count} GPUs, not measured in {limit:.0f} s: "
                f"torchrun --nproc-per-node {count} -m irongpt doctor does, or prints why not"
            )
        finally:
            child.terminate()  # torchrun ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
            child.wait()
