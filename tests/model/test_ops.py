"""--ops eager, builtin and fused from the command line, and the reasons why fused cannot run."""

import sys

import pytest
import torch
from conftest import TINY
from irongpt_kernels import builtin, eager, fused
from irongpt_kernels.runtime import launch
from numerics import DEVICE
from run_helpers import history

from irongpt import ops
from irongpt.config import GPTConfig
from irongpt.errors import UserError
from irongpt.training import loop

CPU = torch.device("cpu")
SHAPE = GPTConfig(vocab_size=16, n_layer=2, n_head=1, n_embd=16, context=16, dropout=0.0)
FLAGS = f"--n-layer 1 --n-head 1 --batch-size 2 --device {DEVICE} --dtype float32".split()
HEAD_OF_16 = [*TINY, *FLAGS]


def test_each_name_is_its_module():
    modules = {"eager": eager, "builtin": builtin, "fused": fused}
    assert {name: ops.load(name, torch.device(DEVICE), SHAPE) for name in modules} == modules


@pytest.fixture
def _no_samples(monkeypatch):
    """The interpreter takes a minute for 200 tokens."""
    monkeypatch.setattr(loop.TrainingLoop, "_sample", lambda self: "")


@pytest.mark.usefixtures("_no_samples")
def test_fused_trains_like_eager_and_warns_where_it_is_slow(cli, tmp_path):
    flags = [*HEAD_OF_16, "--iters", "3", "--eval-every", "3", "--dropout", "0.1"]
    cli("train", *flags, "--ops", "eager", "--out", "eager")
    result = cli("train", *flags, "--fused", "--out", "fused")
    slow = "the kernels run in Triton's interpreter on the CPU, slowly" in result.out
    assert slow == (DEVICE == "cpu")
    ours, eagers = ([r["val_loss"] for r in history(tmp_path / x)] for x in ("fused", "eager"))
    assert ours == pytest.approx(eagers, rel=2e-5)


@pytest.mark.usefixtures("_no_samples")
def test_a_run_changes_its_ops_and_generates_with_any(cli, tmp_path):
    flags = [*HEAD_OF_16, "--iters", "2", "--eval-every", "2"]
    cli("train", *flags, "--ops", "eager", "--out", "run")
    cli("train", "--resume", "run", "--iters", 3, "--fused")
    texts = []
    for name in ("eager", "builtin", "fused"):
        result = cli("generate", "run", "--ops", name, "--tokens", 20)
        assert ("slowly" in result.err) == (name == "fused" and DEVICE == "cpu")
        texts.append(result.out)
    assert texts[0] == texts[1] == texts[2]


def test_fused_without_a_gpu_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and the device is cpu"):
        ops.load("fused", CPU, SHAPE)


def test_fused_on_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=r"compute capability 7\.5 or newer"):
        ops.load("fused", torch.device("cuda", 0), SHAPE)


def test_fused_without_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "irongpt_kernels.runtime.launch", None)
    monkeypatch.delattr("irongpt_kernels.runtime.launch")
    with pytest.raises(UserError, match="needs Triton, which cannot be imported"):
        ops.load("fused", CPU, SHAPE)
