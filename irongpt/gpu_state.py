"""The state of a GPU that PyTorch does not report: driver, clocks, power, temperature, by NVML.

nvidia-ml-py is imported at the first use, and everything is None without it or without a driver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

THROTTLE = {  # bits of NVML's clock event reasons that mean lower clocks than possible
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuState:
    """A field is None where the GPU does not report it."""

    driver: str | None
    sm_mhz: int | None
    max_sm_mhz: int | None
    memory_mhz: int | None
    watt: float | None
    limit_watt: float | None
    default_limit_watt: float | None
    celsius: int | None
    throttled_by: list[str] | None


def query(device: torch.device) -> GpuState | None:
    """The state of a CUDA device now; None without nvidia-ml-py or an NVIDIA driver."""
    nvml = _nvml()
    if nvml is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return None

    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(gpu, *args)
        except nvml.NVMLError:
            return None

    def watt(function: Callable[..., Any]) -> float | None:
        milliwatt = ask(function)
        return None if milliwatt is None else milliwatt / 1e3

    return GpuState(
        driver=driver_version(),
        sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        max_sm_mhz=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        memory_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        watt=watt(nvml.nvmlDeviceGetPowerUsage),
        limit_watt=watt(nvml.nvmlDeviceGetEnforcedPowerLimit),
        default_limit_watt=watt(nvml.nvmlDeviceGetPowerManagementDefaultLimit),
        celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        throttled_by=throttled_by(ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)),
    )


def throttled_by(reasons: int | None) -> list[str] | None:
    """The names of the bits in NVML's clock event reasons."""
    return None if reasons is None else [text for bit, text in THROTTLE.items() if reasons & bit]


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without nvidia-ml-py or a driver."""
    nvml = _nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def _nvml() -> Any:
    """The initialised module, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
