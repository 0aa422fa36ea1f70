"""The machine of a measurement: hardware, software, the state of the GPU, and peak rates."""

import os
import platform
import re
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import emulate, launch_table

from irongpt import __version__, driver, gpu_state, timing
from irongpt.device import dtype_name

ROOT = Path(__file__).resolve().parents[2]
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes of a copy, more than any cache holds
PERIOD = 2.0  # seconds between two queries of the GPU's state

State = dict[str, Any]
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "flash-attn")


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """The machine and the software. commit: that of this source, if git cannot tell."""
    facts: dict[str, Any] = {
        "device": device.type,
        "name": name(device),
        "commit": commit or git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "irongpt": __version__,
        **{package: driver.installed(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{p.major}.{p.minor}",
            "emulated": emulate.enabled(),
            "tiles": launch_table.digest(device),  # empty: the default
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": driver.version(),
        }
    return facts


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu()


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return str(models[0]) if models else platform.processor() or platform.machine()


def git_commit(checkout: Path = ROOT) -> str:
    """The commit of a checkout, with -dirty if tracked *.py files differ; unknown without git."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=checkout, capture_output=True, text=True, timeout=20
        )
        done.check_returncode()
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != checkout.resolve():
            return "unknown"  # it lies within another checkout
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def state(device: torch.device) -> State | None:
    """Clocks, power, temperature and throttling now; None on a CPU or if NVML is missing."""
    now = gpu_state.query(device) if device.type == "cuda" else None
    keys = ("sm_mhz", "memory_mhz", "watt", "limit_watt", "celsius", "throttled_by")
    return None if now is None else {key: now[key] for key in keys}


class Watch:
    """The GPU's state before, during and after a measurement."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.began, self.before = device, time.perf_counter(), state(device)
        self.seen: list[State] = []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        if self.before is not None:
            self.thread.start()

    def end(self, wait: bool) -> None:
        """Ends the thread, which looks once more. wait: until it has done so."""
        self.ended.set()
        if wait and self.thread.is_alive():
            self.thread.join()

    def report(self) -> State:
        """The states up to now; `after` is the last one."""
        seconds = round(time.perf_counter() - self.began, 1)
        seen = list(self.seen)
        after = seen[-1] if seen else self.before
        states: State = {"seconds": seconds, "before": self.before, "after": after}
        for key in ("sm_mhz", "watt", "celsius"):
            if values := [s[key] for s in seen if s[key] is not None]:
                states[f"{key}_from_to"] = [min(values), max(values)]
        known = [s["throttled_by"] for s in seen if s["throttled_by"] is not None]
        states["throttled_by"] = sorted(set().union(*known)) if known else None
        return states

    def _look(self) -> None:
        ended = False
        while not ended:
            ended = self.ended.wait(PERIOD)
            if (now := state(self.device)) is not None:
                self.seen.append(now)


def peak_rates(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """Measures bytes/s of a copy and FLOP/s of a large matmul on this device."""
    gpu, n = device.type == "cuda", COPIED[device.type]
    x = torch.ones(n, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copying = median_seconds(lambda i: y.copy_(x), device)
    flops = {}
    for dtype in dtypes:
        size = 8192 if gpu and dtype != torch.float32 else 4096 if gpu else 512
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(lambda i, a=a, b=b: a @ b, device)  # type: ignore[misc]
        flops[dtype_name(dtype)] = 2 * size**3 / seconds
    return {"copy_bytes_per_s": 2 * n / copying, "gemm_flops_per_s": flops}


def median_seconds(call: timing.Call, device: torch.device, rounds: int = 10) -> float:
    """The time of a call, timed alone."""
    with timing.stream(device):
        timed = timing.measure({"": call}, 1, device, rounds)[""]
    assert isinstance(timed, timing.Timing), timed
    return timed.median
