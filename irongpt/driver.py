"""The NVIDIA driver of this machine, and the torch that it can run."""

import re
import shutil
import subprocess
from pathlib import Path

CARD = Path("/dev/nvidia0")
# The oldest driver for each major version of CUDA, and packages of PyPI that are built for it.
# Source: NVIDIA, CUDA Compatibility, "Minor Version Compatibility".
OLDEST = {13: 580, 12: 525}
PACKAGES = {13: "torch==2.13.0 triton==3.7.1", 12: "torch==2.10.0 triton==3.6.0"}

OLDEST_PACKAGES = {"torch": (2, 10), "triton": (3, 6)}  # that IronGPT runs with


def version() -> str | None:
    """The version, such as 550.54.15, by nvidia-smi; None where that is missing or fails."""
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


def unseen(torch: str, cuda: str | None, reason: str) -> str | None:
    """Why a torch finds no GPU on a machine that has one, and what to do; None without a GPU.

    torch, cuda: its version, and the CUDA that it is built for, if any. reason: torch's own.
    """
    driver = version()
    if driver is None and not CARD.exists():
        return None
    on_cpu = "or use the CPU: --device cpu"
    if driver is None:
        return f"torch {torch} finds no GPU, and nvidia-smi fails: mend the NVIDIA driver, {on_cpu}"
    number = int(driver.split(".")[0])
    fits = next((major for major, oldest in OLDEST.items() if number >= oldest), None)
    install = "update the driver" + (
        f", or run `pip install --force-reinstall {PACKAGES[fits]}`" if fits else ""
    )
    if cuda is None:
        return f"torch {torch} is built without CUDA, and NVIDIA driver {driver} is here: " + (
            f"{install.removeprefix('update the driver, or ')}, {on_cpu}"
        )
    oldest = OLDEST.get(int(cuda.split(".")[0]), 0)
    if number < oldest:
        return (
            f"torch {torch} is built for CUDA {cuda}, which needs NVIDIA driver {oldest} or newer, "
            f"and this is {driver}: {install}, {on_cpu}"
        )
    return (
        f"torch {torch} finds no GPU, though NVIDIA driver {driver} is here ({reason}): check "
        f"nvidia-smi and CUDA_VISIBLE_DEVICES, {on_cpu}"
    )
