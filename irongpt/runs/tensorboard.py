"""The records of a run as TensorBoard's event files, next to metrics.jsonl.

A training process deletes earlier event files and writes all records so far into a new one. So a
resumed run continues its curves, even one that had no event files before.
"""

import math
import time
from collections.abc import Iterable
from importlib.util import find_spec

from irongpt.config import check
from irongpt.runs.run_folder import Record, RunFolder

SCALARS = {
    "loss/training": "train_loss",
    "loss/validation": "val_loss",
    "loss/bits per byte": "bits_per_byte",
    "optimizer/learning rate": "lr",
    "optimizer/gradient norm": "grad_norm",
    "optimizer/loss scale": "loss_scale",
    "speed/tokens per second": "tokens_per_s",
    "speed/MFU": "mfu",
}


def check_installed() -> None:
    """Raises UserError if the package is not there."""
    message = "--tensorboard needs the package tensorboard: pip install tensorboard"
    check(find_spec("tensorboard") is not None, message)


class Events:
    """Writes records as events. Raises OSError if a file cannot be written."""

    def __init__(self, run: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for old in run.path.glob("events.out.tfevents.*"):
            old.unlink()
        records = run.records()
        # The wall time of an event is the time that the training has taken, from a fixed start.
        self.start = time.time() - (records[-1].get("seconds") or 0.0 if records else 0.0)
        self.writer = SummaryWriter(str(run.path))
        self.add(records)

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            step, at = record["step"], self.start + (record.get("seconds") or 0.0)
            for tag, key in SCALARS.items():
                value = record.get(key)
                if value is not None and math.isfinite(value):
                    self.writer.add_scalar(tag, value, step, at)
            if record.get("sample"):
                text = "    " + record["sample"].replace("\n", "\n    ")  # Markdown's code
                self.writer.add_text("sample", text, step, at)
        self.writer.flush()
