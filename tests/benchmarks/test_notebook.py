"""The code cells of the T4 notebook run in their order on the CPU, with the nano preset."""

import json
import os
import re
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from run_helpers import compiling

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "benchmarks" / "t4.ipynb"

# This replaces Jupyter. A line that begins with ! is a command: it runs in this process, to
# import torch once, with Python's values for the braces. Lines with % would install packages.
# The stages of the suite, too, run in this process, except for pytest.
JUPYTER = """
import contextlib, io, os, runpy, shlex, subprocess, sys, types

from pydoc_data import topics
from unittest import mock

from irongpt import doctor
from irongpt.config import PRESETS

doctor.training_bytes = lambda *args: 2**30  # it has separate tests
PRESETS["nano"].train.update(eval_windows=8, sample_tokens=20)
PRESETS["nano"].model.update(n_layer=1, n_head=2, n_embd=32, context=16)
topics.topics = dict(sorted(topics.topics.items())[:10])  # of python-docs
popen = subprocess.Popen

def run(words):
    with mock.patch.object(sys, "argv", words):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            return e.code or 0
    return 0

class Stage:
    pid = 2**30  # of no process

    def __init__(self, words, cwd, env, **options):
        self.stdout = output = io.StringIO()
        with contextlib.chdir(cwd), mock.patch.dict(os.environ, env):
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                self.returncode = run(words[2:])
        output.seek(0)

    def wait(self):
        return self.returncode

def start(words, **options):
    module = isinstance(words, list) and words[1] == "-m" and words[2] != "pytest"
    return (Stage if module else popen)(words, **options)

subprocess.Popen = start

def command(line):
    python, m, *words = shlex.split(line)
    assert (python, m) == ("python", "-m"), line
    print("$", line, flush=True)
    assert run(words) == 0, line

def display(path):
    print("shown:", os.path.getsize(path), "bytes", flush=True)

shows = types.SimpleNamespace(Markdown=str, Image=str, display=display)
sys.modules["IPython"] = types.SimpleNamespace(version_info=(9, 0))  # matplotlib asks
sys.modules["IPython.display"] = shows
"""


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def python(cell: dict) -> str:
    """A cell's source as plain Python."""
    lines = []
    for line in "".join(cell["source"]).splitlines():
        indent, rest = re.fullmatch(r"(\s*)(.*)", line).groups()
        if rest.startswith("!"):
            line = f"{indent}command(f{rest[1:]!r})"
        elif rest.startswith("%"):
            line = f"{indent}pass"
        lines.append(line)
    return "\n".join(lines)


def test_the_notebook_runs(tmp_path) -> None:
    parameters, *cells = code_cells()
    assert parameters["metadata"]["tags"] == ["parameters"]
    stages = "tests compare kernels train decode runs"  # a cell runs doctor; gpu is as tests
    smaller = f"SOURCE, MINUTES, ITERS, STAGES = {str(ROOT)!r}, 14, 2, {stages!r}"
    script = "\n".join([JUPYTER, python(parameters), smaller, *map(python, cells)])
    (tmp_path / "cells.py").write_text(script)
    env = {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = compiling("cells.py", cwd=tmp_path, timeout=480, **env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("shown:") > 4  # the page, its pictures, the loss
    for stage in stages.split():
        assert re.search(rf"^{stage} +ok ", done.stdout, re.MULTILINE), done.stdout[-2000:]
    assert done.stdout.count("finished at step 2") == 2
    packed = zipfile.ZipFile(tmp_path / "irongpt-results.zip").namelist()
    assert {"fast/loss.png", "iron/sample.txt"} <= set(packed)
    assert any(name.startswith("results/") and name.endswith(".json") for name in packed)


def cell_with(text: str) -> str:
    return next(source for source in map(python, code_cells()) if text in source)


def test_an_uploaded_zip_is_unpacked_and_found(tmp_path, monkeypatch) -> None:
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as file:
        file.writestr("irongpt-main/benchmarks/suite/__init__.py", "")
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, "jupyter's")
    exec(cell_with("zipfile"), {"SOURCE": "up.zip"})
    assert Path.cwd() == tmp_path / "IronGPT" / "irongpt-main"
    assert os.environ["MPLBACKEND"] == "agg"


def test_pip_keeps_the_torch_that_is_there(tmp_path, monkeypatch) -> None:
    values = {"Path": Path}
    exec(cell_with("tempfile"), values)
    assert f"torch=={version('torch')}\n" in values["KEEP"].read_text()
    (line,) = (x for c in code_cells() for x in c["source"] if x.startswith("%pip"))
    assert "--constraint {KEEP}" in line


def test_the_notebook_stops_if_the_gpu_is_gone_after_pip(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="does not find the GPU of this machine"):
        exec(cell_with("HAD_GPU and"), {"HAD_GPU": True, "os": os})


@pytest.mark.parametrize(
    ("said", "trained"),
    [
        ("2 GPUs are worth using: x", "several"),
        ("2 GPUs are not worth using: x", "one"),
        ("2 GPUs", "one"),
    ],
)
def test_iron_uses_two_gpus_only_if_they_pay(
    tmp_path, monkeypatch, said: str, trained: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "gpus.json").write_text(json.dumps({"facts": {"scaling": said}}))
    lines: list[str] = []
    given = dict(train=str, torch=torch, Path=Path, OUT=tmp_path, command=lines.append)
    exec(cell_with("gpus.json"), given)
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2 -m irongpt"
    start = {"several": torchrun, "one": "python -m irongpt"}[trained]
    assert lines == [f"{torchrun} doctor --json {tmp_path}/gpus.json", f"{start} train iron"]


def test_the_notebook_is_stored_without_output() -> None:
    for cell in code_cells():
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
