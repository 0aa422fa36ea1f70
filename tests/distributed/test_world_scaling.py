"""The speedup by several GPUs: the sentence, its measurement in two processes, and its readers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import fake_gpu
from irongpt_kernels import builtin
from processes import launch, shown, tiny

from benchmarks import ledger, roofline
from irongpt import doctor
from irongpt.cli import main
from irongpt.config import PRESETS
from irongpt.training import scaling
from irongpt.training.scaling import Scaling

FOUND = Scaling("iron", "float16", "fused", "GPU", 2, 21_600_000)


@pytest.mark.parametrize(
    ("every", "worth", "speedup"),
    [(0.040, "worth", 1.75), (0.056, "worth", 1.25), (0.057, "not worth", 1.23)],
)
def test_the_sentence_recommends_several_gpus_or_not(every: float, worth: str, speedup: float):
    assert str(replace(FOUND, one=[0.07, 0.07, 9.0], all=[every], exchange=[0.006])) == (
        f"2 GPUs are {worth} using: a step of iron takes 70.0 ms on one and {every * 1e3:.1f} ms "
        f"on all, {speedup} times as fast; the exchange of 21.6 MB takes 6.0 ms"
    )


def test_the_times_of_two_measurements_are_joined() -> None:
    one, other = replace(FOUND, one=[3.0], all=[1.0]), replace(FOUND, one=[1.0], all=[1.0])
    assert one.with_times_of(other).speedup == 2.0


def measured(rank: int, folder: Path) -> int:
    """`irongpt doctor` and the benchmark, each in a separate world."""
    from benchmarks import scaling as benchmark

    os.chdir(folder)
    tiny()
    doctor.examine = lambda device: doctor.Report()
    torch.set_num_threads(1)
    with open(f"{rank}.txt", "w") as file:
        sys.stdout = sys.stderr = file
        code = main(["doctor", "--device", "cpu", "--json", "doctor.json"])
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # another world in the same store
        options = "--device cpu --result result.json --commit abc --repeats 2 --rounds 2 --steps 1"
        return code or benchmark.main(options.split())


def test_two_processes_measure_and_the_first_reports(tmp_path) -> None:
    assert launch(2, measured, tmp_path) == [0, 0]
    assert shown(tmp_path, 1) == ""
    sentence = json.loads((tmp_path / "doctor.json").read_bytes())["facts"]["scaling"]
    assert sentence.startswith("2 processes ")
    assert "of nano takes" in sentence
    assert shown(tmp_path, 0).startswith("scaling   2 processes ")

    section = json.loads((tmp_path / "result.json").read_bytes())["scaling"]
    assert section["count"] == 2
    assert [len(section[name]) for name in ("one", "all", "exchange", "repeats")] == [4, 4, 4, 2]
    for repeat in section["repeats"]:
        ratio = repeat["all_seconds"] / repeat["one_seconds"]
        assert repeat["all_over_one"] == pytest.approx(ratio, rel=1e-4)
    assert section["sentence"].startswith("2 processes ")


def test_the_benchmark_needs_torchrun(capsys) -> None:
    from benchmarks import scaling as benchmark

    assert benchmark.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "error: one process: use torchrun --nproc-per-node 2 -m benchmarks.scaling\n"
    )


class Child:
    """Stands in for torchrun. writes: what its first process would report, None for ever."""

    writes: object = None

    def __init__(self, words: list[str], **options: object) -> None:
        self.words, self.events = words, []
        Child.last = self

    def wait(self, limit: float | None = None) -> int:
        if limit == scaling.LIMIT:
            if self.writes is None:
                raise subprocess.TimeoutExpired(self.words, limit)
            Path(self.words[-1]).write_text(json.dumps(self.writes))
        self.events.append("wait")
        return 0

    def terminate(self) -> None:
        self.events.append("terminate")

    def kill(self) -> None:
        self.events.append("kill")


@pytest.fixture
def child(monkeypatch) -> type[Child]:
    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(Child, "writes", None)
    return Child


def test_a_machine_with_two_gpus_is_measured_by_torchrun(child, cli, monkeypatch) -> None:
    fake_gpu(monkeypatch, count=2)
    monkeypatch.setattr(doctor, "examine", lambda device: doctor.Report())
    child.writes = {"facts": {"scaling": "2 GPUs are worth using: as given"}}
    done = cli("doctor")
    assert done.out == "scaling   2 GPUs are worth using: as given\n"
    assert done.err.count("\n") == 1
    words = " ".join(child.last.words[1:])
    start = "-m torch.distributed.run --standalone --nproc-per-node 2 -m irongpt doctor --json "
    assert words.startswith(start)


@pytest.mark.parametrize("writes", [None, {"facts": {}}, 5])
def test_gpus_that_cannot_be_measured_are_reported(child, writes: object) -> None:
    child.writes = writes
    assert scaling.by_torchrun(2).endswith(
        "torchrun --nproc-per-node 2 -m irongpt doctor does, or prints why not"
    )
    assert child.last.events[-4:] == ["terminate", "wait", "kill", "wait"]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_ledger_counts_the_bytes_of_the_exchange(gpus: int, monkeypatch) -> None:
    """float16 gradients of every weight, each tensor padded to 16 bytes, and four numbers."""
    monkeypatch.setitem(PRESETS["iron"].model, "n_layer", 1)
    world = ledger.Exchanges(gpus)
    _, trainer = ledger.step(builtin, torch.float16, "iron", world=world)
    weights = sum(-(-p.numel() // 8) * 8 for p in trainer.model.parameters())
    if gpus == 2:
        assert world.bytes == 2 * weights + 16
    elif gpus == 4:
        assert world.bytes == 3 * (2 * weights + 16)
    else:  # a part of the others' gradients, the other parts of the float32 sum, and the numbers
        part = -(-weights // gpus)
        assert world.bytes == 7 * (2 * part + 4 * part + 16)


def test_the_documented_steps_of_two_t4_are_the_computed_ones() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for preset in ("iron", "fast"):
        one = roofline.t4_step(preset)
        least, most = roofline.two_t4_step(preset)
        assert one / 2 < least < most < one
        assert f"| {preset} on two T4s | {least * 1e3:.1f} to {most * 1e3:.1f} ms |" in page
