"""The state of a GPU that PyTorch does not report: clocks, power, temperature, by NVML."""

from dataclasses import dataclass
from typing import Any

import torch

THROTTLE = {  # bits of NVML's clock event reasons for lower clocks than the maximum
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
    watt: float | None  # power, its limit, and the GPU's default limit
    limit_watt: float | None
    default_limit_watt: float | None
    celsius: int | None
    throttled_by: list[str] | None


def query(device: torch.device) -> GpuState | None:
    """The state of a CUDA device now; None without nvidia-ml-py or an NVIDIA driver."""
    nvml = _nvml()
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")

    def get(name: str, *args: Any) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(*args)
        except nvml.NVMLError:
            return None

    gpu = nvml and get("HandleByUUID", f"GPU-{uuid}")
    if gpu is None:
        return None
    names = ("PowerUsage", "EnforcedPowerLimit", "PowerManagementDefaultLimit")
    watt, limit, default = (None if x is None else x / 1e3 for x in (get(n, gpu) for n in names))
    reasons = get("CurrentClocksThrottleReasons", gpu)
    throttled = None if reasons is None else [x for bit, x in THROTTLE.items() if reasons & bit]
    return GpuState(
        sm_mhz=get("ClockInfo", gpu, SM),
        max_sm_mhz=get("MaxClockInfo", gpu, SM),
        memory_mhz=get("ClockInfo", gpu, MEMORY),
        watt=watt,
        limit_watt=limit,
        default_limit_watt=default,
        celsius=get("Temperature", gpu, 0),
        throttled_by=throttled,
    )


def _nvml() -> Any:
    """The module pynvml of nvidia-ml-py, initialised; None where that fails."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml
    except pynvml.NVMLError:
        return None
