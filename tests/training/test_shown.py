"""What is only shown never ends a training: plots, samples, output. Signals stay as they were."""

import io
import os
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import matplotlib
import pytest
from conftest import TINY
from run_helpers import history

from irongpt import console
from irongpt.cli import main
from irongpt.doctor import Report
from irongpt.runs import plots
from irongpt.training import loop

QUICK = [*TINY, "--iters", "20"]
SPACE, PIPE = OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")


class Broken:
    """A stream that cannot be written, without the other methods of a file, such as Jupyter's. As a
    file it keeps what it could not write, so that each flush fails too."""

    def __init__(self, error: Exception | None = SPACE) -> None:
        self.error, self.text = error, ""

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        self.text += text
        return len(text)

    def flush(self) -> None:
        if self.error:
            raise self.error


@pytest.mark.parametrize("what", ["sample", "plot"])
def test_a_sample_or_a_plot_that_fails_is_reported_once(cli, tmp_path, monkeypatch, what):
    owner, name = {"sample": (loop, "generate_batch"), "plot": (plots, "loss_png")}[what]
    monkeypatch.setattr(owner, name, Mock(side_effect=RuntimeError("no fonts")))
    monkeypatch.setattr(loop, "PLOT_EVERY", 0.0)
    result = cli("train", *QUICK, "--out", "run")
    report = f"warning   the {what} failed, training continues: RuntimeError: no fonts\n"
    assert result.out.count(report) == 1
    assert [record["step"] for record in history(tmp_path / "run")] == [10, 20]
    assert (tmp_path / "run/sample.txt").exists() == (what == "plot")


@pytest.mark.usefixtures("real_plots")
def test_a_plot_does_not_depend_on_the_users_settings(cli, tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 1, "axes.titlesize": 99}):
        cli("train", *QUICK, "--out", "run")
    picture = (tmp_path / "run/loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert [int.from_bytes(picture[i : i + 4], "big") for i in (16, 20)] == [960, 540]


def test_matplotlib_is_imported_whatever_the_backend_in_the_environment():
    code = (
        "from irongpt.figures import default_style\n"
        "with default_style(): from matplotlib.figure import Figure; Figure()\n"
        "import os; assert os.environ['MPLBACKEND']"
    )
    environment = {**os.environ, "MPLBACKEND": "module://not.installed"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    "error",
    [SPACE, PIPE, ValueError("closed file"), RuntimeError("main thread is not in main loop")],
)
def test_standard_output_that_fails_ends_no_training(cli, tmp_path, monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    result = cli("train", *QUICK, "--out", "run")
    assert result.err.startswith("irongpt: cannot write to standard output: ")
    assert result.err.count("\n") == 1
    assert len(history(tmp_path / "run")) == 2


def test_a_stopped_training_keeps_its_exit_code_without_a_reader(cli, run, monkeypatch):
    stop = Mock(side_effect=lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(loop.TrainingLoop, "_step", stop)
    monkeypatch.setattr(sys, "stdout", Broken(PIPE))
    cli("train", "--resume", run, "--iters", 40, code=128 + signal.SIGTERM)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("state", ["none", "broken"])
def test_streams_of_any_kind(cli, tmp_path, monkeypatch, stream, state):
    broken = None if state == "none" else Broken()
    monkeypatch.setattr(sys, stream, broken)
    assert main(["train", *QUICK, "--out", "run"]) == 0
    assert main(["train", "--nope"]) == 2
    assert getattr(sys, stream) is broken


@pytest.mark.parametrize("command", ["generate run --tokens 3", "doctor"])
@pytest.mark.usefixtures("run")
def test_other_commands_need_standard_output(cli, monkeypatch, command):
    monkeypatch.setattr("irongpt.doctor.examine", lambda device: Report())
    monkeypatch.setattr(sys, "stdout", Broken())
    result = cli(*command.split(), code=2)
    assert (
        result.err == "irongpt: error: cannot write to standard output: No space left on device\n"
    )


def test_a_stream_of_jupyter_gets_the_text(cli, run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream := Broken(None))
    cli("generate", run, "--prompt", "all", "--tokens", 3)
    assert stream.text.startswith("all")


def test_the_settings_of_a_stream_are_put_back(run, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1", "ignore")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["generate", run, "--tokens", "3"]) == 0
    assert (stream.encoding, stream.errors) == ("latin-1", "ignore")


def test_a_progress_bar_that_cannot_be_drawn_becomes_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.tqdm.update", Mock(side_effect=OSError(5, "Input/output error")))
    monkeypatch.setattr(console, "PLAIN_EVERY", 0.0)
    progress = console.Progress(10, 0)
    progress.advance(1)
    progress.advance(2)
    progress.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("warning   the progress bar failed, training continues: OSError")
    assert out[1:] == ["step 1 of 10", "step 2 of 10"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    code = (
        "import sys\nfrom irongpt import console\nwith console.output():\n"
        "    assert open('file', 'w').fileno() > 2; print('text'); print('text', file=sys.stderr)"
    )
    command = f'"{sys.executable}" -c "{code}" {closed}'
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.signal is None
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.signal == signal.SIGTERM
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_jupyter_a_second_signal_has_its_former_effect(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with console.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.signal == signal.SIGINT


def test_a_training_in_a_thread(cli, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["train", *QUICK, "--out", "run"])))
    thread.start()
    thread.join()
    assert codes == [0]
