"""Makes .venv for the Makefile, and .venv/constraints.txt: the torch that this machine can run.

- The torch of this Python, if it is new enough and finds a GPU (Colab, Kaggle, images of rented
  machines): .venv then uses the packages of this Python, and nothing large is downloaded.
- Else the torch of constraints.txt, which is built for CUDA 13, or with an older NVIDIA driver one
  that is built for CUDA 12. `irongpt.driver` has the versions.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(".venv")


def own_torch():
    """Whether this Python has a torch and a Triton that are new enough and find a GPU."""
    from importlib.metadata import PackageNotFoundError, version

    from irongpt.driver import OLDEST_PACKAGES

    if sys.prefix != sys.base_prefix:  # a venv made in a venv does not see its packages
        return False
    try:
        for name, oldest in OLDEST_PACKAGES.items():
            if tuple(map(int, re.findall(r"\d+", version(name))[:2])) < oldest:
                return False
        import torch

        return torch.cuda.is_available()
    except (ImportError, OSError, PackageNotFoundError):
        return False


def constraints(own):
    """The lines of constraints.txt, with another torch and Triton where the driver needs them."""
    from irongpt import driver

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rest = [line for line in lines if not re.match("(torch|triton|numpy)==", line)]
    if own:
        return rest
    installed = driver.version()
    number = int(installed.split(".")[0]) if installed else max(driver.OLDEST.values())
    if number >= driver.OLDEST[13]:
        return lines
    print(
        f"NVIDIA driver {installed} is older than 580: .venv gets {driver.PACKAGES[12]} (CUDA 12)"
    )
    return rest + driver.PACKAGES[12].split()


def main():
    """Returns an exit code. A mistake is one line."""
    if sys.version_info < (3, 11):  # noqa: UP036 (make may start this with any Python 3)
        return "error: Python 3.11 or newer is needed: make PYTHON=python3.13 ..."
    settings = VENV / "pyvenv.cfg"
    if (VENV / "bin" / "pip").exists() or (VENV / "constraints.txt").exists():
        own = "include-system-site-packages = true" in settings.read_text()
    else:
        own = own_torch()
        options = ["--system-site-packages"] if own else []
        if importlib.util.find_spec("ensurepip") is None:
            if not (own and importlib.util.find_spec("pip")):
                name = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
                return f"error: this Python has no ensurepip: apt install {name} (or python3-venv)"
            options.append("--without-pip")  # the pip of this Python is visible in .venv
        subprocess.run([sys.executable, "-m", "venv", "--clear", *options, str(VENV)], check=True)
    (VENV / "constraints.txt").write_text("\n".join(constraints(own)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
