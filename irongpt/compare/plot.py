"""The plot of `irongpt compare`: error ratios and training curves."""

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from irongpt import figures
from irongpt.compare.model import CHECKED_STEPS, MAX_DIFFERENCE, Curve
from irongpt.compare.ops import Row, factor

COLORS = {"float32": "tab:blue", "float16": "tab:orange", "bfloat16": "tab:green"}
SHOWN = 10.0  # larger ratios are shown at the edge


def png(rows: list[Row], curves: list[Curve], candidate: str, title: str) -> bytes:
    """Left the error ratios with their tolerance, right the training curves, as bytes of a PNG."""
    ops = list(dict.fromkeys(r.op for r in rows))
    labels = sorted(dict.fromkeys(map(_label, rows)), key=lambda label: ops.index(label[0]))
    size = 13, max(7.5, 1.5 + 0.14 * len(labels))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1.6, 1))
    _draw_ratios(figure.add_subplot(grid[:, 0]), rows, labels, candidate)
    losses = figure.add_subplot(grid[0, 1])
    below = grid[1, 1].subgridspec(1, max(1, len(curves)))
    difference_axes = [*below.subplots(sharey=True, squeeze=False)[0]] if curves else []
    _draw_curves(losses, difference_axes, curves, candidate)
    return figures.png(figure)


def _draw_ratios(axes: Axes, rows: list[Row], lines: list[tuple[str, str]], candidate: str) -> None:
    """A line for every op and tensor, a point for every shape and dtype."""
    labels = {label: y for y, label in enumerate(lines)}
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    for r in rows:
        ratio, color = r.errors["max"].ratio, COLORS[r.dtype]
        x = SHOWN if not ratio < SHOWN else max(ratio, 1 / SHOWN)
        y = labels[_label(r)] + 0.2 * (dtypes.index(r.dtype) - (len(dtypes) - 1) / 2)
        style: dict[str, Any] = dict(marker="o", color=color, markersize=4, label=r.dtype)
        if not r.ok:
            style |= dict(marker="X", color="tab:red", markersize=8, clip_on=False, zorder=5)
            style |= dict(label="exceeds tolerance")
        elif ratio > factor(r.tensor):
            style |= dict(markerfacecolor="white", label="within one rounding")
        axes.plot(x, y, linestyle="", **style)
    for (_, tensor), y in labels.items():
        limit = [factor(tensor)] * 2
        axes.plot(limit, [y - 0.5, y + 0.5], color="black", linewidth=1, label="tolerance")
    ops = [op for op, _ in labels]
    for y in range(1, len(ops)):
        if ops[y] != ops[y - 1]:
            axes.axhline(y - 0.5, color="0.8", linewidth=0.8)
    axes.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(1 / SHOWN / 1.1, SHOWN * 1.1)
    ticks = [0.1, 0.2, 0.5, 1, 2, 3, 5, 10]
    axes.set_xticks(ticks, [f"≤{ticks[0]}", *map(str, ticks[1:-1]), f"≥{ticks[-1]}"])
    axes.set_xticks([], minor=True)
    shown = [f"{op}  {tensor}" for op, tensor in labels]
    axes.set_yticks(list(labels.values()), shown, fontsize=8, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"largest error of {candidate} / largest error of eager, both from float64")
    names = {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = dict(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, fontsize=8)
    axes.legend(names.values(), names.keys(), **place)


def _draw_curves(
    losses: Axes, difference_axes: list[Axes], curves: list[Curve], candidate: str
) -> None:
    """The losses of all dtypes together; the differences from eager in a panel per dtype, because
    only float32 has a tolerance."""
    for c, axes in zip(curves, difference_axes, strict=True):
        steps, color = range(1, len(c.eager) + 1), COLORS[c.dtype]
        losses.plot(steps, c.eager, color=color, alpha=0.35, linewidth=5, label=f"eager, {c.dtype}")
        losses.plot(steps, c.candidate, color=color, linewidth=1.2, label=f"{candidate}, {c.dtype}")
        axes.plot(steps, c.differences, color=color, marker=".", linewidth=1, label=c.dtype)
        if c.dtype == "float32":
            end = min(CHECKED_STEPS, len(c.eager))
            limit = [MAX_DIFFERENCE] * 2
            axes.plot([1, end], limit, color="black", linewidth=1, label="tolerance")
        axes.set_yscale("symlog", linthresh=1e-8)  # logarithmic with a zero: losses may be equal
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
    losses.set_ylabel("training loss (nats per token)")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    if difference_axes:
        difference_axes[0].set_ylabel("relative difference")
        losses.legend(fontsize=8)
    for axes in (losses, *difference_axes):
        axes.grid(alpha=0.3)
    for axes in difference_axes:
        axes.set_ylim(bottom=0)  # after all panels are plotted, since they share the axis
        axes.legend(fontsize=8)


def _label(row: Row) -> tuple[str, str]:
    """Parameters of all blocks share a line."""
    return row.op, re.sub(r"blocks\.\d+\.", "", row.tensor)
