"""`irongpt doctor` on machines with and without problems, and the memory that it computes."""

import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_mistake
from fake_gpu import fake_gpu
from irongpt_kernels import eager, fused
from irongpt_kernels.runtime import launch, turing

from irongpt import device as devices
from irongpt import doctor, gpu_state, ops
from irongpt.config import PRESETS, WAR_AND_PEACE_VOCAB, GPTConfig
from irongpt.doctor import training_bytes
from irongpt.errors import UserError

NVML = {  # the answers of NVML for a T4, by the end of the function's name
    "Init": None,
    "DeviceGetHandleByUUID": "a handle",
    "DeviceGetClockInfo": {1: 585, 2: 5001},
    "DeviceGetMaxClockInfo": {1: 1590},
    "DeviceGetPowerUsage": 28_100,
    "DeviceGetEnforcedPowerLimit": 70_000,
    "DeviceGetPowerManagementDefaultLimit": 70_000,
    "DeviceGetTemperature": {0: 45},
    "DeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x20,
}


class NVMLError(Exception):
    pass


def fake_nvml(**changed: object) -> object:
    """A pynvml module. An answer of NVMLError is raised."""

    def answer(x: object, *args: object) -> object:
        if x is NVMLError:
            raise NVMLError
        return x[args[-1]] if isinstance(x, dict) else x

    functions = {f"nvml{name}": partial(answer, x) for name, x in (NVML | changed).items()}
    return SimpleNamespace(NVMLError=NVMLError, **functions)


@pytest.fixture
def card(monkeypatch):
    """Fakes a T4. Returns a function that changes it."""
    monkeypatch.setattr(doctor, "training_bytes", lambda *_: 2**30)  # see the tests of memory

    def change(free: float = 14.5, capability=(7, 5), name="Tesla T4", **changed: object) -> None:
        total = fake_gpu(monkeypatch, name, capability).total_memory
        memory = (int(free * 2**30), total)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: memory)
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**changed))
        monkeypatch.setattr("irongpt.driver.version", lambda: "550.54.15")

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
        "driver 550.54.15",
        "585 of 1590 MHz, memory 5001 MHz, 28.1 of 70 W, 45 degrees C",
        "float16 (compute capability 7.5 has no bfloat16; with loss scaling)",
        "bfloat16 is emulated and slow: not used",
        "preset is iron",
        "--fused runs; attention tiles, queries x keys: forward",
        "14.5 of 15.0 GiB are free",
    ):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert len(text.splitlines()) <= 24


NOT_REPORTED = {
    f"DeviceGet{name}": NVMLError
    for name in ("PowerUsage", "EnforcedPowerLimit", "PowerManagementDefaultLimit")
}
NEWER = dict(name="NVIDIA H200", capability=(9, 0))
NO_NVML = "nvidia-ml-py is missing or fails"


@pytest.mark.parametrize(
    ("changed", "topic", "text"),
    [
        (NEWER, "facts", "bfloat16 (compute capability 9.0 supports it natively)"),
        (NEWER, "facts", "bfloat16 is native"),
        (NOT_REPORTED, "facts", "unknown of unknown W"),
        (dict(DeviceGetEnforcedPowerLimit=50_000), "advice", "50 W, below the GPU's default of 70"),
        (dict(DeviceGetTemperature={0: 91}), "advice", "91 degrees C: the GPU lowers"),
        (dict(Init=NVMLError), "advice", NO_NVML),
        (dict(DeviceGetHandleByUUID=NVMLError), "advice", NO_NVML),
        (dict(free=1.0), "problems", "1.0 GiB are free: end other processes on the GPU"),
        (dict(capability=(7, 0)), "problems", "compute capability 7.5 or newer: use --ops builtin"),
    ],
)
def test_a_report_has_facts_advice_and_problems(card, cli, changed, topic: str, text: str) -> None:
    card(**changed)
    result, report = cli("doctor", code=int(topic == "problems")), vars(examined())
    assert text in str(report[topic])
    assert text in " ".join(result.out.split())
    assert bool(report["problems"]) == (topic == "problems")
    assert bool(report["advice"]) == (topic == "advice")


@pytest.mark.parametrize("triton", ["8.7", "9.1"])
def test_emulation_needs_a_driver_that_compiles_the_ptx(card, cli, monkeypatch, triton) -> None:
    card(**NEWER)
    monkeypatch.setenv("IRONGPT_EMULATE", "sm_75")
    monkeypatch.setattr(launch, "prepare", lambda device: None)
    monkeypatch.setattr(turing, "small_dot_ptx", lambda: f"//\n.version {triton}\n.target sm_75\n")
    monkeypatch.setattr("irongpt.driver.version", lambda: "565.57.01")
    oldest = {"8.7": 570, "9.1": 580}[triton]
    line = f"IRONGPT_EMULATE: the PTX {triton} of this Triton needs NVIDIA driver {oldest} or newer"
    assert_mistake(cli, line, "compare")
    result = cli("doctor", code=1)
    assert line in " ".join(result.out.split())
    monkeypatch.setattr("irongpt.driver.version", lambda: f"{oldest}.86.10")
    assert line not in " ".join(cli("doctor").out.split())
    monkeypatch.setattr("irongpt.driver.version", lambda: None)
    assert line not in " ".join(cli("doctor").out.split())


def test_the_state_of_a_card(card) -> None:
    """Throttle reasons are named, and what the card does not report is None."""
    state = gpu_state.query(torch.device("cuda", 0))
    assert state["throttled_by"] == ["power cap", "temperature (software)"]
    card(**NOT_REPORTED, DeviceGetCurrentClocksThrottleReasons=NVMLError)
    state = gpu_state.query(torch.device("cuda", 0))
    assert state["throttled_by"] is state["watt"] is None


def test_an_old_or_missing_package(monkeypatch) -> None:
    monkeypatch.setattr("irongpt.driver.installed", {"torch": "2.9.1+cu128"}.get)
    report = doctor.Report()
    doctor._software(report, torch.device("cpu"))
    assert "torch 2.9.1+cu128, no triton" in report.facts["software"]
    assert any("torch 2.9.1+cu128 is too old: 2.10 or newer" in x for x in report.problems)
    assert any("triton is not installed" in x for x in report.problems)


def test_on_a_cpu_without_nvidia_ml_py(cli, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    result = cli("doctor", "--device", "cpu", "--json", "report.json")
    assert "training  float32 (the default on a CPU); the default preset is nano" in result.out
    assert "no NVIDIA GPU" in result.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["facts"]["training"].startswith("float32")
    assert report["problems"] == []


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the PATH that reports a driver; torch finds no GPU."""
    monkeypatch.setattr(doctor, "training_bytes", lambda *_: 2**30)  # see the tests of memory

    def install(driver: str, cuda: str | None) -> None:
        stub = tmp_path / "bin" / "nvidia-smi"
        stub.parent.mkdir()
        stub.write_text(f"#!/bin/sh\necho {driver}\n")
        stub.chmod(0o755)
        monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return install


UNSEEN = [
    ("550.54.15", "13.0", "needs NVIDIA driver 580 or newer, and this is 550.54.15: update the"),
    ("550.54.15", "13.0", "pip install --force-reinstall torch==2.10.0 triton==3.6.0"),
    ("550.54.15", None, "is built without CUDA"),
    ("590.44", "13.0", "finds no GPU, though NVIDIA driver 590.44 is here"),
]


@pytest.mark.parametrize("command", ["train", "compare", "doctor", "tune"])
@pytest.mark.parametrize(("driver", "cuda", "text"), UNSEEN)
def test_a_gpu_that_torch_does_not_see(cli, nvidia_smi, driver, cuda, text, command) -> None:
    nvidia_smi(driver, cuda)
    if command == "doctor":
        assert text in " ".join(cli(command, code=1).out.split())
        return
    assert "use the CPU: --device cpu" in assert_mistake(cli, text, command).err


def test_a_gpu_that_the_user_hides_counts_as_none(nvidia_smi, monkeypatch) -> None:
    nvidia_smi("550.54.15", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.pick("auto") == torch.device("cpu")


def test_a_missing_compiler_is_one_line(monkeypatch) -> None:
    from triton.runtime import driver

    class Broken:
        @property
        def utils(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(type(driver), "active", Broken())
    with pytest.raises(UserError, match=r"Failed to find C compiler.*apt install gcc python3-dev"):
        ops._build_launcher("use --ops builtin")


def test_mistakes(cli, monkeypatch) -> None:
    assert_mistake(cli, "its folder does not exist", "doctor", "--json", "no/report.json")
    monkeypatch.setenv("IRONGPT_EMULATE", "sm_80")
    assert_mistake(cli, "IRONGPT_EMULATE must be sm_75 or unset, got 'sm_80'", "doctor")


CONFIG = GPTConfig(29, n_layer=2, n_head=2, n_embd=32, context=16, dropout=0.2)
C, T, B, V, LAYERS = 32, 16, 4, 29, 2


def test_a_small_model_counted_by_hand() -> None:
    """Float32, fused: counts the numbers per token that the backward of a block needs."""
    got = training_bytes(CONFIG, B, fused, torch.float32)
    tokens, heads = B * T, 2
    parameters = V * C + T * C + LAYERS * (12 * C * C + 13 * C) + 2 * C
    # input of qkv, qkv, output of attention, m and l, sums of two norms, two norms, statistics,
    # fc without its bias, gelu; the residual stream and the two norms count once each
    block = C + 3 * C + C + 2 * heads + 2 * C + C + 4 + 4 * C + 4 * C
    head = C + V + 2
    by_hand = 4 * (4 * parameters + tokens * (LAYERS * block + head))
    assert got == pytest.approx(by_hand, rel=0.1)


def test_fused_ops_need_at_most_a_third_of_eagers_memory() -> None:
    config = GPTConfig(WAR_AND_PEACE_VOCAB, **PRESETS["iron"].model)
    batch = int(PRESETS["iron"].train["batch_size"])
    sizes = {ops: training_bytes(config, batch, ops, torch.float16) for ops in (eager, fused)}
    assert sizes[fused] <= sizes[eager] / 3


def test_only_eager_stores_the_attention_weights() -> None:
    """Four times the context needs four times the memory, except for a matrix of T x T."""

    def activations(ops, context: int) -> int:
        config = GPTConfig(29, n_layer=2, n_head=2, n_embd=32, context=context, dropout=0.2)
        both = [training_bytes(config, batch, ops, torch.float32) for batch in (1, 2)]
        return both[1] - both[0]

    assert activations(eager, 512) > 8 * activations(eager, 128)
    assert activations(fused, 512) < 4.1 * activations(fused, 128)
