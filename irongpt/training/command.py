"""`irongpt train`: trains in one process or in several, and prints the outcome."""

import contextlib

import torch

from irongpt import __version__
from irongpt.config import Flags, flag
from irongpt.console import Clock, EarlyStop, make_output_optional, say
from irongpt.training.distributed import World, together
from irongpt.training.loop import TrainingLoop
from irongpt.training.start import new_run, resumed_run

LOCAL_FLAGS = ("data", "out", "resume", "device")  # may differ between the processes


def train(flags: Flags, start: float) -> int:
    """Returns the exit code. start: time.perf_counter() when the process began."""
    make_output_optional()
    return together(lambda world: _train(flags, start, world))


def _train(flags: Flags, start: float, world: World) -> int:
    clock = Clock(start)
    world.check_equal(
        {
            "version of irongpt": __version__,
            "version of torch": torch.__version__,
            "command": "--resume" if "resume" in flags else "a new run",
            **{flag(name): value for name, value in flags.items() if name not in LOCAL_FLAGS},
        }
    )
    with contextlib.ExitStack() as cleanup:
        # torchrun's processes may be waiting for each other, where no exception reaches them.
        with EarlyStop() if world.size == 1 else contextlib.nullcontext():
            if "resume" in flags:
                path = flags.pop("resume")
                training = resumed_run(path, flags, clock, world, cleanup)
            else:
                training = new_run(flags, clock, world, cleanup)
        cleanup.callback(training.trainer.close)
        return _report(training, clock)


def _report(training: TrainingLoop, clock: Clock) -> int:
    """Trains, and prints the outcome."""
    clock.parts["set-up"] = clock.total()
    path, trainer = training.run.path, training.trainer
    say(f"run       {path}, from step {trainer.step:,}")
    idle = training.finished()
    stopped_by = training.fit()
    if stopped_by is not None:
        say(f"stopped at step {trainer.step:,}, saved; continue: irongpt train --resume {path}")
    elif idle:
        say(f"nothing to do: the run is finished; {training.ending()[1]} continues it")
    else:
        say(f"{training.outcome()}; generate text: irongpt generate {path}")
    loss, bits = ((training.result or {}).get(name) for name in ("val_loss", "bits_per_byte"))
    if loss is not None and bits is not None:
        text = f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        say(f"result    best/ has {text} over the entire validation text")
    say(f"time      {clock.summary()}")
    return 0 if stopped_by is None else 128 + stopped_by
