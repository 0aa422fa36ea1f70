"""A signal while the text of a run is tokenized: no process stays, and no file if it can act."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY

PROGRAM = """
import sys, time
from tqdm import tqdm
from irongpt import cli
from irongpt.data import pre_tokens

def update(bar, n):
    print("tokenizing", flush=True)
    time.sleep(60)

tqdm.update = update
pre_tokens.CHUNK = 500
pre_tokens._cores = lambda n_bytes: int(sys.argv[1])
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[2:]))
"""


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("cores", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGKILL)]
)
def test_a_signal_while_the_text_is_tokenized(tmp_path, cores: int, number: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "text.txt").write_text("all happy families are alike\n" * 500)
    flags = [*TINY, "--tokenizer", "bpe", "--vocab-size", "320", "--out", "new/run"]
    process = subprocess.Popen(
        [sys.executable, "program.py", str(cores), "train", *flags],
        cwd=tmp_path,
        env=os.environ | {"IRONGPT_DATA": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line == "tokenizing\n" for line in process.stdout)
    pool = children(process.pid)
    assert len(pool) >= (cores if cores > 1 else 0)
    process.send_signal(number)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        name = signal.Signals(number).name
        assert process.returncode == 128 + number
        assert err == f"irongpt: stopped by {name} before the training began\n"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["program.py", "text.txt"]
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pool):
        assert time.monotonic() < deadline, "a process is alive"
        time.sleep(0.02)
