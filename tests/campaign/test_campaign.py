"""A small sample of each campaign, and what the command prints, keeps and returns."""

import json

import pytest
from irongpt_kernels import fused

from tests.campaign import __main__ as campaign
from tests.campaign import checkpoints, process

SAMPLES = dict(
    ops=range(30),
    checkpoints=range(6),
    inputs=range(3, 400, 45),
    kill=range(2),
    disk=(*range(5, 500, 120), 600),  # the last one is resumed
)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_of_a_campaign(name, tmp_path):
    numbers = SAMPLES[name]
    assert [k for k, _ in campaign.cases(name, 2026, numbers, tmp_path)] == [*numbers]


def test_a_fault_is_named_and_repeated(tmp_path, capsys, monkeypatch):
    """Cases before it are not run again after it is mended."""
    state = tmp_path / "state.json"
    with monkeypatch.context() as patch:
        patch.setattr(fused, "layer_norm", lambda x, *args, **kwargs: x * 1.0)
        assert campaign.main(["ops", "--resume", str(state)]) == 1
        fault = json.loads(state.read_text())["done"]
        assert f"ops --seed 1 --only {fault}\n" in capsys.readouterr().out
        assert campaign.main(["ops", "--only", str(fault)]) == 1
    assert campaign.main(["ops", "--resume", str(state), "--n", str(fault + 1)]) == 0
    assert f"ops, seed 1: {fault + 1} cases passed" in capsys.readouterr().out
    assert sum(json.loads(state.read_text())["kinds"].values()) == fault + 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise TypeError", "it raised"),
        ("bytearray(1 << 31)", "it raised"),
        ("import os; os.abort()", "a crash, signal 6"),
        ("import time; time.sleep(9)", "it does not end"),
        ("import os; os.system('true')", "a crash, signal 6"),
    ],
)
def test_what_a_command_must_not_do(code, message, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 1.0)
    monkeypatch.setattr(process, "main", lambda args: exec(code) or 0)
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError, match=message):
        process.command(tmp_path / "work", before=checkpoints.no_code)
