"""The choice of device and dtype, on faked GPUs, and the peak FLOP/s."""

import functools

import pytest
import torch
from fake_gpu import fake_gpu

from irongpt import device
from irongpt.errors import UserError

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a GPU of some name and compute capability."""
    return functools.partial(fake_gpu, monkeypatch)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # T4: reports bfloat16 support, but emulates it
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_the_dtype_depends_on_the_compute_capability(gpu, capability, dtype):
    gpu(capability=capability)
    precision = device.precision("auto", GPU)
    assert precision.dtype == dtype
    assert precision.reason


def test_emulated_bfloat16_is_rejected(gpu):
    gpu(capability=(7, 5))
    with pytest.raises(UserError, match=r"bfloat16 is only emulated on compute capability 7\.5"):
        device.precision("bfloat16", GPU)
    assert device.precision("float16", GPU).dtype == torch.float16


def test_the_default_dtype_of_a_cpu_is_float32():
    cpu = torch.device("cpu")
    assert device.precision("auto", cpu).dtype == torch.float32
    assert device.precision("bfloat16", cpu).dtype == torch.bfloat16


def test_auto_selects_a_gpu_if_there_is_one(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick("auto") == torch.device("cpu")
    gpu(count=2)
    assert device.pick("auto") == GPU
    assert device.pick("cuda:1") == torch.device("cuda", 1)
    assert device.pick("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "mps", ""])
def test_an_invalid_device_name(gpu, name):
    gpu()
    with pytest.raises(UserError, match="--device must be"):
        device.pick(name)


def test_a_missing_gpu(gpu, monkeypatch):
    gpu(count=2)
    with pytest.raises(UserError, match="there are 2 GPUs"):
        device.pick("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        device.pick("cuda")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
        ("GRID T4-8Q", 0),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 0),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 0),
        ("NVIDIA GeForce RTX 2080 Ti", 54),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 0),
        ("NVIDIA GeForce RTX 4090 D", 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A4000", 0),
        ("NVIDIA T400", 0),
        ("NVIDIA GeForce RTX 3060", 0),
    ],
)
def test_the_peak_of_a_card_is_in_the_table_or_measured(gpu, monkeypatch, name, tera):
    gpu(name)
    monkeypatch.setattr(device, "_gemm_flops", lambda device, dtype: 1e12)
    wanted = (tera * 1e12, "data sheet") if tera else (1e12, "measured with a large matmul")
    assert device.peak_flops(GPU, torch.float16) == wanted


def test_the_measured_peak_of_a_cpu_is_plausible_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    flops, _ = device.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < flops < 1e14
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_is_off_for_float32_and_casts_matmuls_otherwise():
    cpu = torch.device("cpu")
    a = torch.ones(2, 2)
    for dtype in device.DTYPES.values():
        with device.autocast(cpu, dtype):
            assert (a @ a).dtype == dtype
