"""What nvidia-smi knows of a card and PyTorch does not: clocks, power, heat."""

import subprocess
from collections.abc import Sequence


def query(uuid: str, names: Sequence[str]) -> dict[str, str] | None:
    """The fields `names`, as `nvidia-smi --help-query-gpu` has them; None where it does not answer.

    uuid: of the card, with or without its prefix GPU-.
    """
    card = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(names)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [x.strip() for x in done.stdout.split(",")]
    if done.returncode or len(values) != len(names):
        return None
    return dict(zip(names, values, strict=True))


def number(text: str) -> float | None:
    """A field's number; None for [N/A], what a card does not have."""
    try:
        return float(text)
    except ValueError:
        return None
