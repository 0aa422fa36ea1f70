"""`irongpt doctor`: what it says of machines that are well, and of those that are not."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_mistake
from irongpt_kernels.runtime import emulate

from irongpt import doctor

SMI = "550.54, 585, 1590, 5001, 28.1, 70.00, 70.00, 45"


@pytest.fixture(autouse=True)
def _a_gpu_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(emulate.VARIABLE, raising=False)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Pretends that there is a GPU. Returns a function that changes it."""
    properties = dict(
        name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30, multi_processor_count=40,
        uuid="ab-cd",
    )  # fmt: skip

    def change(free: float = 14.5, smi: str = SMI, **changed: object) -> None:
        p = SimpleNamespace(**properties | changed)
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: p,
            "get_device_capability": lambda device: (p.major, p.minor),
            "mem_get_info": lambda device: (int(free * 2**30), p.total_memory),
        }
        for name, f in cuda.items():
            monkeypatch.setattr(torch.cuda, name, f)
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n{smi_line(smi)}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    change()
    return change


def smi_line(answer: str) -> str:
    return f'echo "{answer}"' if answer else "exit 9"


def examined() -> doctor.Report:
    return doctor.examine(torch.device("cuda", 0))


def test_a_t4_that_is_well(card, tmp_path) -> None:
    report = examined()
    assert report.amiss == []
    assert report.advice == []
    text = str(report)
    assert "Tesla T4 (cuda:0, 15 GiB, capability 7.5)" in text
    assert "40 multiprocessors" in text
    assert "driver 550.54" in text
    assert "585 of 1590 MHz" in text
    assert "28.1 of 70.00 W, 45 degrees C" in text
    assert "float16 (compute capability 7.5 has no bfloat16; with loss scaling)" in text
    assert "bfloat16 is emulated and slow: not used" in text
    assert "preset iron" in text
    assert "--fused runs; attention tiles: forward" in text
    assert "14.5 of 15.0 GiB are free" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    assert "--id=GPU-ab-cd" in (tmp_path / "asked").read_text()


def test_a_newer_card(card) -> None:
    card(name="NVIDIA H200", major=9, minor=0)
    text = str(examined())
    assert "bfloat16 (compute capability 9.0 computes it natively)" in text
    assert "bfloat16 is native" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            dict(smi=SMI.replace("70.00, 70.00", "50.00, 70.00")),
            "50 W, below the card's 70",
        ),
        (dict(smi=SMI.replace(", 45", ", 91")), "91 degrees C: the card lowers"),
        (dict(smi=""), "nvidia-smi does not answer"),
        (dict(smi="550.54, 585"), "nvidia-smi does not answer"),
    ],
)
def test_what_makes_it_slow_is_advice(card, changed: dict, said: str) -> None:
    card(**changed)
    report = examined()
    assert report.amiss == []
    assert said in " ".join(report.advice)


def test_a_field_that_the_card_does_not_have(card) -> None:
    card(smi=SMI.replace("28.1, 70.00, 70.00", "[N/A], [N/A], [N/A]"))
    report = examined()
    assert report.advice == []
    assert "[N/A] of [N/A] W" in str(report)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(free=1.0), "1.0 GiB are free: end what else uses the GPU"),
        (dict(major=7, minor=0), "compute capability 7.5 or newer: use --ops builtin"),
    ],
)
def test_what_stops_a_run_is_amiss(card, cli, changed: dict, said: str) -> None:
    card(**changed)
    result = cli("doctor")
    assert result.code == 1
    assert said in " ".join(result.out.split())


def test_an_old_or_missing_package(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise doctor.PackageNotFoundError(name)
        return "2.9.1+cu128"

    monkeypatch.setattr(doctor, "version", version)
    report = doctor.examine(torch.device("cpu"))
    assert "torch 2.9.1+cu128, no triton" in report.facts["software"]
    assert any("torch 2.9.1+cu128 is too old: 2.10 or newer" in x for x in report.amiss)
    assert any("triton is not installed" in x for x in report.amiss)


def test_on_a_cpu(cli, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi there
    result = cli("doctor", "--device", "cpu", "--json", "report.json")
    assert result.code == 0
    assert "training  float32 (a CPU); preset nano" in result.out
    assert "no NVIDIA GPU" in result.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"]["training"].startswith("float32")
    assert report["amiss"] == []


def test_a_driver_without_a_torch_for_it(cli, tmp_path, monkeypatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("doctor")
    assert result.code == 1
    assert "finds no GPU: install a torch with CUDA" in " ".join(result.out.split())


def test_mistakes(cli, monkeypatch) -> None:
    assert_mistake(cli("doctor", "--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N")
    assert_mistake(cli("doctor", "--json", "no/report.json"), "its folder does not exist")
    monkeypatch.setenv("IRONGPT_EMULATE", "sm_80")
    assert_mistake(cli("doctor"), "IRONGPT_EMULATE must be sm_75 or unset, got 'sm_80'")


def test_products_are_compiled_not_looked_up() -> None:
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "irongpt", "doctor", "--device", "cpu"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert "float32 by scalar FMA, float16 by tensor cores (sm_75)" in " ".join(done.stdout.split())
