"""IRONGPT_EMULATE=sm_75: the target that Triton sees and the code that its loader gets, without a
GPU."""

from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from irongpt_kernels.runtime import emulate, launch
from run_helpers import compiling

from irongpt import device as devices
from irongpt import ops

GPU = torch.device("cuda", 0)

# In a separate process, since Triton must not interpret and `install` cannot be undone. Triton
# remembers the target of a device: under emulation the GPU is another one.
LAUNCH = """
import os, torch, triton, triton.language as tl
from irongpt_kernels.runtime import launch, turing
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Utils:
    def load_binary(self, name, kernel, shared, device):
        if name == "small_dot":
            print("ELF" if kernel[:4] == b"\\x7fELF" else kernel.rstrip(b"\\0").decode())
            print("ends in 0:", kernel[-1] == 0)
        return 1, 2, 32, 0, 1024
    def get_device_properties(self, device):
        return dict(max_shared_mem=232_448)

class H200:
    utils = Utils()
    def get_current_device(self): return device
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def launcher_cls(self, source, metadata): return lambda *args, **kwargs: None

@triton.jit
def large(a_ptr, c_ptr, K: tl.constexpr):
    i, k = tl.arange(0, 128), tl.arange(0, K)
    a, b = tl.load(a_ptr + i[:, None] * K + k), tl.load(a_ptr + k[:, None] * 128 + i)
    tl.store(c_ptr + i[:, None] * 128 + i, tl.dot(a, b))

driver.set_active(H200())
torch.cuda.get_device_capability = lambda device: (9, 0)
x, y = torch.zeros(128, 256, dtype=torch.float16), torch.zeros(128, 128)
for device, emulated in enumerate(("", "sm_75")):
    os.environ["IRONGPT_EMULATE"] = emulated
    print(f"emulated: {emulated}")
    launch.prepare(torch.device("cuda", device))
    turing.small_dot[(1,)](x, x, y)
    large[(1,)](x, y, 256)
"""


def test_the_driver_gets_ptx_and_the_shared_memory_of_a_t4_under_emulation(tmp_path) -> None:
    script = tmp_path / "script.py"  # a file, since Triton reads the source
    script.write_text(LAUNCH)
    done = compiling(script)
    own, found = done.stdout.split("emulated: sm_75\n")  # it has its own code and memory before
    assert own.startswith("emulated: \nELF")
    assert ".target sm_75" in found
    assert "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32" in found
    assert "ends in 0: True" in found
    assert "OutOfResources" in done.stderr
    assert "65536" in done.stderr


@pytest.fixture
def h200(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv(emulate.VARIABLE, "sm_75")


def test_the_package_treats_the_gpu_as_a_t4(h200, monkeypatch) -> None:
    assert launch.architecture(GPU) == 75
    assert launch.num_sms(GPU) == 40
    dtype, why = devices.precision("auto", GPU)
    assert dtype == torch.float16
    assert "7.5 (emulated)" in why
    assert "timings do not predict a T4's" in ops.notes("fused", GPU)[0]
    assert ops.notes("builtin", GPU) == []
    monkeypatch.delenv(emulate.VARIABLE)
    assert launch.architecture(GPU) == 90
    assert devices.precision("auto", GPU).dtype == torch.bfloat16
    assert ops.notes("fused", GPU) == []


def test_launches_query_torch_once(h200, monkeypatch) -> None:
    monkeypatch.delenv(emulate.VARIABLE)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    capability = Mock(return_value=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for _ in range(3):
        launch.prepare(GPU)
        assert launch.architecture(GPU) == 90
    assert launch.architecture(torch.device("cuda", 1)) == 90
    assert capability.call_args_list == [call(GPU), call(torch.device("cuda", 1))]


def test_no_other_gpu_can_be_emulated(monkeypatch) -> None:
    monkeypatch.setenv(emulate.VARIABLE, "sm_80")
    with pytest.raises(ValueError, match="IRONGPT_EMULATE must be sm_75 or unset, got 'sm_80'"):
        emulate.enabled()


def test_a_launch_goes_to_the_device_of_the_tensors(monkeypatch) -> None:
    device = MagicMock()
    monkeypatch.setattr(torch.cuda, "device", device)
    with launch.device_context(torch.device("cuda", 1)), launch.device_context(torch.device("cpu")):
        pass
    device.assert_called_once_with(torch.device("cuda", 1))
    device.return_value.__enter__.assert_called_once_with()
