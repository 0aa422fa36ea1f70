"""A run's output (a progress bar on a terminal, plain lines elsewhere), signals and timing."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PLAIN_EVERY = 10.0  # seconds between lines of progress where there is no terminal


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    try:
        bars = sys.modules.get("tqdm")  # imported with the first bar
        above = bars.tqdm.external_write_mode(file=sys.stdout) if bars else contextlib.nullcontext()
        with above:
            print(text, flush=True)
    except BrokenPipeError:  # the reader of our output has closed it; the run continues
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Clock:
    """The seconds that a process has spent, by activity."""

    def __init__(self, start: float) -> None:
        """start: time.perf_counter() when the process began."""
        self.start = start
        self.parts: dict[str, float] = {}

    def total(self) -> float:
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

    def summary(self) -> str:
        """`1:02 in total: 50.1 s training, 8.2 s evaluation, ...`; the parts add up."""
        total = self.total()
        parts = {**self.parts, "other": total - sum(self.parts.values())}
        listed = [f"{duration(s)} {name}" for name, s in parts.items() if s >= 0.05]
        return f"{duration(total)} in total: {', '.join(listed)}"


class Progress:
    """Progress of a run: tqdm's bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, steps: int, start: int) -> None:
        from tqdm import tqdm

        self.terminal = sys.stderr.isatty()
        self.bar: tqdm[Any] = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not self.terminal,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
        )
        self.steps, self.printed_at = steps, time.monotonic()

    def advance(self, step: int) -> None:
        self.bar.update()
        self._plain(f"step {step:,} of {self.steps:,}", 3 * PLAIN_EVERY)  # steps are slow

    def show(self, record: dict[str, Any]) -> None:
        text = (
            f"loss {record['train_loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s, "
            f"MFU {record['mfu']:.1%}"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self._plain(f"step {record['step']:,} of {self.steps:,}: {text}", PLAIN_EVERY)

    def _plain(self, text: str, after: float) -> None:
        """Prints a line if there is no terminal and the last one is `after` seconds old."""
        if not self.terminal and time.monotonic() - self.printed_at >= after:
            say(text)
            self.printed_at = time.monotonic()

    def close(self) -> None:
        self.bar.close()


class Interrupt:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a flag that the training loop checks.

    A second signal ends the process at once.
    """

    signals = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else []))

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Interrupt":
        self.before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for s in self.signals:
            signal.signal(s, signal.SIG_DFL)
