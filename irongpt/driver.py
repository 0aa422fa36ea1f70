"""The NVIDIA driver of this machine, and the torch that it can run."""

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

DEVICE_FILE = Path("/dev/nvidia0")
# The oldest driver for each major version of CUDA, and packages of PyPI that are built for it.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility".
OLDEST = {13: 580, 12: 525}
# The interpreter of Triton 3.6 fails with NumPy 2.4, that of 3.7 does not.
PACKAGES = {
    13: "torch==2.13.0 triton==3.7.1",
    12: "torch==2.10.0 triton==3.6.0 numpy==2.3.5",
}

# The oldest driver that compiles a version of PTX. Source: NVIDIA, PTX ISA, "Release History".
OLDEST_FOR_PTX = {(8, 4): 550, (8, 5): 555, (8, 6): 565, (8, 7): 570, (8, 8): 575, (9, 0): 580}

OLDEST_PACKAGES = {"torch": (2, 10), "triton": (3, 6)}  # that IronGPT runs with


def installed(package: str) -> str | None:
    """The version of a Python package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version() -> str | None:
    """The version, such as 550.54.15, by nvidia-smi; None if that is missing or fails."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\d+\.[\d.]+", done.stdout)
    return found[0] if found and done.returncode == 0 else None


def why_gpu_not_found(torch: str, cuda: str | None, reason: str) -> str | None:
    """Explains why torch finds no GPU on a machine that has one, and what to do; None without one.

    torch: its version. cuda: the CUDA that it is built for, if any. reason: what torch reports.
    """
    driver = version()
    if driver is None and not DEVICE_FILE.exists():
        return None
    number = int(driver.split(".")[0]) if driver else 0
    fits = [PACKAGES[major] for major, oldest in OLDEST.items() if number >= oldest]
    installs = [f"run `pip install --force-reinstall {packages}`" for packages in fits[:1]]
    ways = ["update the driver", *installs]
    needed = OLDEST.get(int((cuda or "0").split(".")[0]), 0)
    if driver is None:
        why = "finds no GPU, and nvidia-smi fails: repair the NVIDIA driver"
    elif cuda is None:
        why = f"is built without CUDA, and NVIDIA driver {driver} is here: {ways[-1]}"
    elif number < needed:
        why = (
            f"is built for CUDA {cuda}, which needs NVIDIA driver {needed} or newer, and this is "
            f"{driver}: {', or '.join(ways)}"
        )
    else:
        why = (
            f"finds no GPU, though NVIDIA driver {driver} is here ({reason}): check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"torch {torch} {why}, or use the CPU: --device cpu"


def too_old_for(ptx: str) -> str | None:
    """Explains why the driver here cannot compile such PTX; None if it can, or is unknown."""
    installed, found = version(), re.search(r"\.version (\d+)\.(\d+)", ptx)
    if installed is None or found is None:
        return None
    isa = int(found[1]), int(found[2])
    oldest = max((d for known, d in OLDEST_FOR_PTX.items() if known <= isa), default=0)
    if int(installed.split(".")[0]) >= oldest:
        return None
    return (
        f"the PTX {isa[0]}.{isa[1]} of this Triton needs NVIDIA driver {oldest} or newer to be "
        f"compiled for this GPU, and this is {installed}"
    )
