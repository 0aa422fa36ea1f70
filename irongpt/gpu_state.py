"""The state of a GPU that PyTorch does not report: clocks, power, temperature, by NVML."""

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
QUERIES: dict[str, tuple[Any, ...]] = {  # a function of NVML and its argument, by our name
    "sm_mhz": ("ClockInfo", SM),
    "max_sm_mhz": ("MaxClockInfo", SM),
    "memory_mhz": ("ClockInfo", MEMORY),
    "watt": ("PowerUsage",),  # NVML has milliwatts
    "limit_watt": ("EnforcedPowerLimit",),
    "default_limit_watt": ("PowerManagementDefaultLimit",),
    "celsius": ("Temperature", 0),
    "throttled_by": ("CurrentClocksThrottleReasons",),
}


def query(device: torch.device) -> dict[str, Any] | None:
    """The state of a CUDA device now, by the names of QUERIES, each None if the GPU does not
    report it; None without nvidia-ml-py or an NVIDIA driver."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # NVML has its own
        return None

    def get(name: str, *args: Any) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(gpu, *args)
        except nvml.NVMLError:
            return None

    now = {name: get(*of) for name, of in QUERIES.items()}
    known = {name: value for name, value in now.items() if value is not None}
    now |= {name: value / 1e3 for name, value in known.items() if name.endswith("watt")}
    if (reasons := now["throttled_by"]) is not None:
        now["throttled_by"] = [x for bit, x in THROTTLE.items() if reasons & bit]
    return now
