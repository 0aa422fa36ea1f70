"""Counts the kernels and launches of a function, by PyTorch's profiler."""

import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from irongpt.device import synchronize

# How the names of the CUDA calls begin that launch work on a device.
LAUNCH = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


def counts(function: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """The number of kernels, copies and fills of a call on the device, and of launches by the host,
    where a graph is one launch. None on a CPU and if the profiler sees no kernel."""
    if device.type != "cuda":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    # As PyTorch does for CUDA graphs: tearing down the profiler may crash.
    os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        function()
        synchronize(device)
    ours = [e for e in trace.events() or [] if not getattr(e, "is_user_annotation", False)]
    kernels = sum(e.device_type == DeviceType.CUDA for e in ours)
    launches = sum(e.device_type == DeviceType.CPU and e.name.startswith(LAUNCH) for e in ours)
    return (kernels, launches) if kernels else (None, None)
