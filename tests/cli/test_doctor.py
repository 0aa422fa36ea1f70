"""`irongpt doctor` on machines that are fine and on machines with problems, some of them faked."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_mistake
from irongpt_kernels.runtime import emulate

from irongpt import doctor, gpu_state

T4 = dict(
    init=0, driver="550.54", sm=585, max_sm=1590, memory=5001, watt=28.1, limit=70, default=70
)


class NVMLError(Exception):
    pass


def fake_nvml(celsius: int = 45, missing: tuple[str, ...] = (), **changed: object) -> object:
    """A pynvml module for one GPU. missing: fields that it does not have."""
    values = T4 | dict(celsius=celsius, reasons=0x1 | 0x4 | 0x20) | changed

    def get(name: str, unit: int = 1):
        def ask(*gpu: object):
            if name in missing:
                raise NVMLError
            return values[name] * unit

        return ask

    def by_uuid(uuid: str) -> str:
        assert uuid == "GPU-ab-cd"
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=get("init"),
        nvmlSystemGetDriverVersion=get("driver"),
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetClockInfo=lambda gpu, clock: get(clock)(),
        nvmlDeviceGetMaxClockInfo=get("max_sm"),
        nvmlDeviceGetPowerUsage=get("watt", 1000),
        nvmlDeviceGetEnforcedPowerLimit=get("limit", 1000),
        nvmlDeviceGetPowerManagementDefaultLimit=get("default", 1000),
        nvmlDeviceGetTemperature=get("celsius"),
        nvmlDeviceGetCurrentClocksThrottleReasons=get("reasons"),
    )


@pytest.fixture(autouse=True)
def _no_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(emulate.VARIABLE, raising=False)


@pytest.fixture
def nvml(monkeypatch):
    """Replaces pynvml by `fake_nvml`, or by an ImportError."""

    def install(module: object = None, **changed: object) -> None:
        module = fake_nvml(**changed) if module is None else module
        monkeypatch.setitem(sys.modules, "pynvml", module or None)

    return install


@pytest.fixture
def card(monkeypatch, nvml):
    """Fakes a T4. Returns a function that changes it."""

    def change(free: float = 14.5, capability=(7, 5), name="Tesla T4", **changed: object) -> None:
        major, minor = capability
        p = SimpleNamespace(
            name=name, major=major, minor=minor, total_memory=15 * 2**30,
            multi_processor_count=40, uuid="ab-cd",
        )  # fmt: skip
        cuda = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: p,
            "get_device_capability": lambda device: capability,
            "mem_get_info": lambda device: (int(free * 2**30), p.total_memory),
        }
        for function, fake in cuda.items():
            monkeypatch.setattr(torch.cuda, function, fake)
        monkeypatch.setattr(doctor, "training_bytes", lambda *_: 2**30)  # see test_memory
        nvml(**changed)

    change()
    return change


def examined() -> doctor.Report:
    return doctor.examine(torch.device("cuda", 0))


def test_a_t4_without_problems(card) -> None:
    report = examined()
    assert report.problems == report.advice == []
    text = str(report)
    for part in (
        "Tesla T4 (cuda:0, 15 GiB, capability 7.5)",
        "40 multiprocessors",
        "driver 550.54",
        "585 of 1590 MHz, memory 5001 MHz, 28.1 of 70 W, 45 degrees C",
        "float16 (compute capability 7.5 has no bfloat16; with loss scaling)",
        "bfloat16 is emulated and slow: not used",
        "preset is iron",
        "--fused runs; attention tiles: forward",
        "14.5 of 15.0 GiB are free",
    ):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert len(text.splitlines()) <= 24


def test_a_newer_card(card) -> None:
    card(name="NVIDIA H200", capability=(9, 0))
    text = str(examined())
    assert "bfloat16 (compute capability 9.0 supports it natively)" in text
    assert "bfloat16 is native" in text


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        (dict(limit=50), "50 W, below the GPU's default of 70 W"),
        (dict(celsius=91), "91 degrees C: the GPU lowers"),
        (dict(module=False), "nvidia-ml-py is missing or fails"),
        (dict(missing=("init",)), "nvidia-ml-py is missing or fails"),
    ],
)
def test_causes_of_slowness_are_advice(card, changed: dict, advice: str) -> None:
    card(**changed)
    report = examined()
    assert report.problems == []
    assert advice in " ".join(report.advice)


def test_a_field_that_the_card_does_not_report(card) -> None:
    card(missing=("watt", "limit", "default", "reasons"))
    report = examined()
    assert report.advice == []
    assert "unknown of unknown W" in str(report)
    state = gpu_state.query(torch.device("cuda", 0))
    assert state is not None
    assert state.throttled_by is state.watt is None


def test_throttle_reasons_are_named(card) -> None:
    state = gpu_state.query(torch.device("cuda", 0))
    assert state is not None
    assert state.throttled_by == ["power cap", "heat (software)"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (dict(free=1.0), "1.0 GiB are free: end other processes on the GPU"),
        (dict(capability=(7, 0)), "compute capability 7.5 or newer: use --ops builtin"),
    ],
)
def test_a_problem_gives_exit_code_1(card, cli, changed: dict, problem: str) -> None:
    card(**changed)
    result = cli("doctor")
    assert result.code == 1
    assert problem in " ".join(result.out.split())


def test_an_old_or_missing_package(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise doctor.PackageNotFoundError(name)
        return "2.9.1+cu128"

    monkeypatch.setattr(doctor, "version", version)
    report = doctor.examine(torch.device("cpu"))
    assert "torch 2.9.1+cu128, no triton" in report.facts["software"]
    assert any("torch 2.9.1+cu128 is too old: 2.10 or newer" in x for x in report.problems)
    assert any("triton is not installed" in x for x in report.problems)


def test_on_a_cpu(cli, nvml, tmp_path) -> None:
    nvml(module=False)
    result = cli("doctor", "--device", "cpu", "--json", "report.json")
    assert result.code == 0
    assert "training  float32 (the default on a CPU); the default preset is nano" in result.out
    assert "no NVIDIA GPU" in result.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"]["training"].startswith("float32")
    assert report["problems"] == []


def test_a_driver_without_a_torch_for_it(cli, nvml, monkeypatch) -> None:
    nvml()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("doctor")
    assert result.code == 1
    text = " ".join(result.out.split())
    assert "NVIDIA driver 550.54 is installed, but torch" in text
    assert "finds no GPU: install a torch with CUDA" in text


def test_mistakes(cli, monkeypatch) -> None:
    assert_mistake(cli("doctor", "--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N")
    assert_mistake(cli("doctor", "--json", "no/report.json"), "its folder does not exist")
    monkeypatch.setenv("IRONGPT_EMULATE", "sm_80")
    assert_mistake(cli("doctor"), "IRONGPT_EMULATE must be sm_75 or unset, got 'sm_80'")


def test_matmuls_are_compiled_to_find_tensor_cores() -> None:
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    code = "import torch; from irongpt.doctor import Report, _matmuls; r = Report(); "
    code += "_matmuls(r, torch.device('cpu')); print(r)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "float32 by scalar FMA, float16 by tensor cores (sm_75)" in " ".join(done.stdout.split())
