"""Plots the losses of a run (loss.png) and collects its samples (sample.txt)."""

import math
from typing import Any

from irongpt.figures import default_style, png
from irongpt.files import replace_file
from irongpt.runs.run_folder import Record, RunFolder


def draw(run: RunFolder) -> None:
    """Writes loss.png if metrics.jsonl has a record, and sample.txt if one has a sample."""
    records = run.records()
    if not records:
        return
    if text := samples(records):
        replace_file(run.path / "sample.txt", text.encode())
    with default_style():
        data = loss_png(records, run.path.name.encode(errors="replace").decode())
    replace_file(run.path / "loss.png", data)


def loss_png(records: list[Record], title: str) -> bytes:
    """Training and validation loss over the steps, as the bytes of a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    train = [(r["step"], r["train_loss"]) for r in records if r["train_loss"] is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*_columns(train), color="C0", linewidth=1, alpha=0.6, label="training")
    if val:
        axes.plot(*_columns(val), "o-", color="C1", markersize=4, label="validation")
        step, best = min(val, key=lambda point: point[1])
        above: dict[str, Any] = dict(xytext=(0, 8), textcoords="offset points", ha="center")
        axes.annotate(f"{best:.3f}", (step, best), color="C1", **above)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("loss (nats per token)")
    rates = [(r["bits_per_byte"] / r["val_loss"]) for r in records if r.get("bits_per_byte")]
    if rates and math.isfinite(rates[-1]):  # the two differ by a constant factor
        rate = rates[-1]
        right = axes.secondary_yaxis("right", functions=(lambda x: x * rate, lambda x: x / rate))
        right.set_ylabel("bits per byte of text")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def samples(records: list[Record]) -> str:
    """The text that the model generated at each evaluation, in order."""
    return "\n".join(
        f"--- step {r['step']:,}, validation loss {r['val_loss']} ---\n{r['sample'].strip()}\n"
        for r in records
        if r.get("sample")
    )


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
