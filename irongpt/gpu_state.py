"""The state of a GPU that PyTorch does not report: driver, clocks, power, temperature, by NVML."""

from dataclasses import dataclass
from typing import Any

import torch

THROTTLE = {  # bits of NVML's clock event reasons that mean lower clocks than possible
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
SM, MEMORY = 1, 2  # NVML's clocks


@dataclass(frozen=True)
class GpuState:
    """A field is None where the GPU does not report it."""

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

    def get(name: str, *args: int) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(gpu, *args)
        except nvml.NVMLError:
            return None

    try:
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return None

    def watt(name: str) -> float | None:
        milliwatt = get(name)
        return None if milliwatt is None else milliwatt / 1e3

    reasons = get("CurrentClocksThrottleReasons")
    return GpuState(
        sm_mhz=get("ClockInfo", SM),
        max_sm_mhz=get("MaxClockInfo", SM),
        memory_mhz=get("ClockInfo", MEMORY),
        watt=watt("PowerUsage"),
        limit_watt=watt("EnforcedPowerLimit"),
        default_limit_watt=watt("PowerManagementDefaultLimit"),
        celsius=get("Temperature", 0),
        throttled_by=None
        if reasons is None
        else [x for bit, x in THROTTLE.items() if reasons & bit],
    )


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without nvidia-ml-py or a driver."""
    nvml = _nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def _nvml() -> Any:
    """The module pynvml of nvidia-ml-py, initialised; None where that fails."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
