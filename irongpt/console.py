"""The output of commands (progress is a bar on a terminal, lines elsewhere), signals and timing."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO, cast

from irongpt.errors import UserError, one_line, short_reason

PLAIN_EVERY = 10.0  # seconds between lines of progress if there is no terminal


class Output:
    """Standard output or standard error of a command, whatever its other end is.

    An error of `write` or `flush` is given to `failed`. A closed stream, Jupyter's and other
    objects without all methods of a file, and with errors of any kind, are accepted.
    """

    def __init__(self, stream: TextIO | None, failed: Callable[[Exception], None]) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.failed = failed
        self.before = {name: getattr(stream, name, None) for name in ("encoding", "errors")}
        self.reconfigure(errors="backslashreplace")

    def reconfigure(self, **settings: str | None) -> None:
        with contextlib.suppress(Exception):
            self.stream.reconfigure(**settings)  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        if not hasattr(self.stream, "reconfigure"):  # it may not be able to write surrogates
            text = text.encode(errors="replace").decode()
        try:
            self.stream.write(text)
        except Exception as e:
            self.failed(e)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except Exception as e:
            self.failed(e)

    def finish(self) -> None:
        """Flushes, and puts the settings back. If a standard stream cannot be flushed, Python must
        not try again when it exits, with a message."""
        try:
            self.stream.flush()
        except Exception:
            if self.stream in (sys.__stdout__, sys.__stderr__):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.reconfigure(**self.before)

    def isatty(self) -> bool:
        try:
            return self.stream.isatty()
        except (AttributeError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Replaces the standard streams by `Output`: errors of standard error are ignored, and those of
    standard output raise UserError, or BrokenPipeError if its reader has closed it."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_closed_streams()

    def failed(error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise UserError(f"cannot write to standard output: {short_reason(error)}")

    out, err = Output(sys.stdout, failed), Output(sys.stderr, lambda error: None)
    with (
        contextlib.redirect_stdout(cast(TextIO, out)),
        contextlib.redirect_stderr(cast(TextIO, err)),
    ):
        try:
            yield
        finally:
            for stream in (out, err):
                stream.finish()


def _open_closed_streams() -> None:
    """Opens the null device as those of file descriptors 0 to 2 that the parent has closed.

    Else the next file would get such a number, and messages to standard error would end in it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def make_output_optional() -> None:
    """Lets the command continue if standard output fails; a line on standard error reports it."""
    reported: list[Exception] = []

    def failed(error: Exception) -> None:
        if not reported:
            reported.append(error)
            reason = f"cannot write to standard output: {short_reason(error)}; training continues"
            print(f"irongpt: {reason}", file=sys.stderr)

    if isinstance(sys.stdout, Output):
        sys.stdout.failed = failed


def read_standard_input(limit: int = -1) -> bytes:
    """Standard input, of any kind, or its first `limit` bytes. Raises UserError."""
    stream = sys.stdin
    if stream is None or stream.closed:
        raise UserError("the standard input is closed")
    try:
        if stream.isatty():
            say_on_stderr("reading the text from the terminal, until an end of file (Ctrl-D)")
        if hasattr(stream, "buffer"):
            return stream.buffer.read(limit)
        return stream.read(limit).encode()
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the standard input: {short_reason(e)}") from e


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    bars = sys.modules.get("tqdm")  # imported with the first bar
    above = bars.tqdm.external_write_mode(file=sys.stdout) if bars else contextlib.nullcontext()
    with above:
        print(text, flush=True)


def say_on_stderr(text: str) -> None:
    """Prints a line apart from generated text, which goes to standard output."""
    print(f"irongpt: {text}", file=sys.stderr)


class Attempt:
    """Runs optional work, such as a plot. Its errors are reported once and do not stop the run."""

    def __init__(self) -> None:
        self.failed: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            if what not in self.failed:
                self.failed.add(what)
                say(f"warning   {what} failed, training continues: {one_line(e)}")


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

    def __init__(self, steps: int, start: int, bar: bool = True) -> None:
        self.bar: Any = None
        self.attempt = Attempt()
        if bar and sys.stderr.isatty():
            with self.attempt("the progress bar"):
                from tqdm import tqdm

                self.bar = tqdm(
                    total=steps,
                    initial=start,
                    unit="step",
                    dynamic_ncols=True,
                    bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
                )
        self.steps, self.printed_at = steps, time.monotonic()

    def _on_bar(self, method: str) -> None:
        """Calls a method of the bar. If it cannot be drawn, lines replace it."""
        bar, self.bar = self.bar, None
        if bar is not None:
            with self.attempt("the progress bar"):
                getattr(bar, method)()
                self.bar = bar

    def advance(self, step: int) -> None:
        self._on_bar("update")
        self._plain(f"step {step:,} of {self.steps:,}", 3 * PLAIN_EVERY)  # steps are slow

    def show(self, record: dict[str, Any]) -> None:
        text = (
            f"loss {record['train_loss']:.3f}, {record['tokens_per_s']:,.0f} tokens/s, "
            f"MFU {record['mfu']:.1%}"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        self._plain(f"step {record['step']:,} of {self.steps:,}: {text}", PLAIN_EVERY)

    def _plain(self, text: str, after: float) -> None:
        """Prints a line if there is no bar and the last one is `after` seconds old."""
        if self.bar is None and time.monotonic() - self.printed_at >= after:
            say(text)
            self.printed_at = time.monotonic()

    def close(self) -> None:
        self._on_bar("close")


class Stopped(KeyboardInterrupt):
    """A signal, whose number is `signal`, before the training began."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


class Interrupt:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a flag that the training loop checks.

    A second signal ends the process at once, except in an interactive Python, where the previous
    handler acts. A signal that was ignored at the start, as by nohup, stays ignored. Outside of the
    main thread no handler is installed. twice: False under torchrun, which forwards to a process
    the Ctrl-C that the terminal has sent it already.
    """

    signals = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else []))

    def __init__(self, twice: bool = True) -> None:
        self.signal: int | None = None
        self.twice = twice
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            before = {s: signal.getsignal(s) for s in self.signals}
            self.before = {s: h for s, h in before.items() if h not in (signal.SIG_IGN, None)}
        for s in self.before:
            signal.signal(s, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        interactive = hasattr(sys, "ps1")
        for s, handler in self.before.items() if self.twice else ():
            signal.signal(s, handler if interactive else signal.SIG_DFL)


class EarlyStop(Interrupt):
    """Turns these signals into the exception Stopped, which ends the start of a run with a line."""

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if isinstance(exc[1], Stopped):
            name = signal.Signals(exc[1].signal).name
            print(f"irongpt: stopped by {name} before the training began", file=sys.stderr)

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        raise Stopped(number)
