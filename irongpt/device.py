"""The device, the dtype with the reason for it, and the peak FLOP/s, which the MFU needs."""

import contextlib
import os
import re
import time
import warnings
from typing import NamedTuple

import torch
from irongpt_kernels.runtime import emulate

from irongpt import driver
from irongpt.errors import UserError, short_reason

HARMLESS = (  # warnings of PyTorch on a GPU that a user can ignore
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "Synchronization debug mode is a prototype feature",
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Dense 16-bit tensor-core FLOP/s with float32 accumulation, from NVIDIA's data sheets. A key is a
# regular expression that matches the whole name of the GPU without NVIDIA, Tesla or GeForce:
# other variants of a card (Ti, D, laptop, NVL, a MIG slice, a virtual GPU) have other peaks.
PEAK_16_BIT = {
    r"B200": 2250e12,
    r"H200": 989e12,
    r"H200 NVL": 835e12,
    r"H100 80GB HBM3": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": 312e12,
    r"A10G": 70e12,
    r"A10": 125e12,
    r"A30": 165e12,
    r"A40": 150e12,
    r"RTX A6000": 155e12,
    r"L40S": 362e12,
    r"L40": 181e12,
    r"L4": 121e12,
    r"V100-SXM2-(16|32)GB": 125e12,
    r"V100-PCIE-(16|32)GB": 112e12,
    r"T4": 65e12,
    r"RTX 5090": 209e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
    r"RTX 2080 Ti": 54e12,
}
MAKER = re.compile(r"NVIDIA |Tesla |GeForce ")


class Precision(NamedTuple):
    dtype: torch.dtype
    reason: str


def pick(name: str) -> torch.device:
    """The device called `name`; auto is a GPU if there is one. Raises UserError."""
    try:
        emulate.enabled()
    except ValueError as e:
        raise UserError(str(e)) from e
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and (why := why_gpu_not_found()):
        raise UserError(why)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no NVIDIA GPU; use --device cpu")
    count, index = torch.cuda.device_count(), name.partition(":")[2]
    if int(index or 0) >= count:
        raise UserError(f"--device {name}: there are {count} GPUs, and the first is cuda:0")
    for note in HARMLESS:
        warnings.filterwarnings("ignore", note)
    return torch.device("cuda", int(index or torch.cuda.current_device()))


def why_gpu_not_found() -> str | None:
    """Explains why torch finds no GPU on a machine that has one, and what to do. None if torch
    finds one, or if there is none; a GPU that CUDA_VISIBLE_DEVICES hides counts as absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its reason is in the line that is returned
        if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return None
        try:
            torch.cuda.init()
            reason = "no reason is given"
        except (RuntimeError, AssertionError) as e:
            reason = short_reason(e)
    return driver.why_gpu_not_found(torch.__version__, torch.version.cuda, reason)


def precision(name: str, device: torch.device) -> Precision:
    """The dtype that `--dtype name` selects on this device, and the reason.

    It depends on the compute capability: torch.cuda.is_bf16_supported() is true on a T4, where
    bfloat16 is emulated and slow.
    """
    if device.type == "cpu":
        default = Precision(torch.float32, "the default on a CPU")
        return default if name == "auto" else Precision(DTYPES[name], "requested")
    major, minor = emulate.capability(device)
    card = f"compute capability {major}.{minor}{' (emulated)' if emulate.enabled() else ''}"
    if name == "bfloat16" and major < 8:
        raise UserError(f"--dtype bfloat16 is only emulated on {card}: use float16 or auto")
    if name != "auto":
        return Precision(DTYPES[name], "requested")
    if major >= 8:
        return Precision(torch.bfloat16, f"{card} supports it natively")
    if major == 7:
        return Precision(torch.float16, f"{card} has no bfloat16; with loss scaling")
    return Precision(torch.float32, f"{card} has no tensor cores")


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Matmuls in `dtype`; weights, the residual stream and statistics stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def reserve_workspace() -> None:
    """Makes cuBLAS deterministic. PyTorch reads the variable at the first matmul of a process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def make_deterministic() -> None:
    """Makes every run give the same bits in one environment. Call it before the first matmul.

    warn_only is not used: with it PyTorch's attention would still use atomics on a GPU.
    """
    reserve_workspace()
    # The setting of use_deterministic_algorithms, which would also import torch.compile: 1 to 2 s.
    torch.set_deterministic_debug_mode("error")
    # By default PyTorch then also fills new memory, which helps debugging and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"the CPU with {threads} thread{'s' if threads > 1 else ''}"
    p = torch.cuda.get_device_properties(device)
    return f"{p.name} ({device}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor})"


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The FLOP/s that count as 100 % MFU, and their source.

    For 16-bit dtypes on a known GPU they come from its data sheet, else from a timed matmul.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = MAKER.sub("", torch.cuda.get_device_name(device))
        for known, flops in PEAK_16_BIT.items():
            if re.fullmatch(known, name):
                return flops, "data sheet"
    return _gemm_flops(device, dtype), "measured with a large matmul"


def _gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 128
    generator = torch.Generator(device).manual_seed(0)  # not the one that training uses
    a = torch.randn(n, n, generator=generator, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
