"""`irongpt train`: a training from its flags to its last line, in one process or in several."""

import contextlib
import os

from irongpt.config import Flags
from irongpt.console import Clock, output_is_optional, say
from irongpt.errors import DivergenceError, UserError
from irongpt.training import distributed
from irongpt.training.distributed import World
from irongpt.training.loop import TrainingLoop
from irongpt.training.start import new_run, resumed_run


def train(flags: Flags, start: float) -> int:
    """Returns the exit code. start: time.perf_counter() when the process began."""
    world = distributed.join()
    with contextlib.ExitStack() as stack:
        if world.rank:  # the process 0 prints
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        else:
            stack.enter_context(output_is_optional())
        try:
            code = _train(flags, start, world)
        except (UserError, DivergenceError) as e:
            if world.fail():
                raise
            return 2 if isinstance(e, UserError) else 1
        except RuntimeError:
            world.explain()
            raise
        world.close()
        return code


def _train(flags: Flags, start: float, world: World) -> int:
    clock = Clock(start)
    if "resume" in flags:
        training = resumed_run(flags.pop("resume"), flags, clock, world)
    else:
        training = new_run(flags, clock, world)
    try:
        return _report(training, clock)
    finally:
        training.run.release()


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
        longer = "a larger --iters"
        if training.reached_target():
            longer = "a lower --target-loss"
        elif training.out_of_patience():
            longer = "a larger --patience"
        say(f"nothing to do: the run is finished; {longer} continues it")
    else:
        say(f"{training.outcome()}; generate text: irongpt generate {path}")
    if training.result and training.result["val_loss"] is not None:
        loss, bits = training.result["val_loss"], training.result["bits_per_byte"]
        text = f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        say(f"result    best/ has {text} over the entire validation text")
    say(f"time      {clock.summary()}")
    return 0 if stopped_by is None else 128 + stopped_by
