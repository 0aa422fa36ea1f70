"""The plots of training steps and whole trainings, and the looks that all plots share."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.training import matmuls

Values = dict[str, Any]

COLORS = {  # one for each provider, ours stands out
    "fused": "#e8590c",
    "builtin": "#1c7ed6",
    "eager": "#868e96",
    "naive": "#adb5bd",
    "compile": "#2b8a3e",
    "flash": "#4dabf7",
    "cudnn": "#1864ab",
    "efficient": "#748ffc",
    "math": "#ced4da",
    "liger": "#9c36b5",
    "flash-attn": "#c2255c",
}


def figure_of(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def step(section: Values) -> Figure | None:
    """Milliseconds a step: the matrix products, timed alone, and all else."""
    dtypes = [d for d in section["matmuls"] if any(_has(r, d) for r in section["rows"])]
    if not dtypes:
        return None
    counts = [sum(_has(r, d) for r in section["rows"]) for d in dtypes]
    figure = figure_of(9, 1.1 * len(dtypes) + 0.36 * sum(counts))
    grid = figure.subplots(len(dtypes), 1, height_ratios=counts, squeeze=False)
    for axes, dtype in zip(grid[:, 0], dtypes, strict=True):
        rows = sorted((r for r in section["rows"] if _has(r, dtype)), key=lambda r: r["seconds"])
        alone = section["matmuls"][dtype]
        handles: list[Any] = [Patch(color="#495057", label="matmuls, timed alone")]
        for y, r in enumerate(rows):
            ms, color = 1e3 * r["seconds"], COLORS.get(r["variant"].split()[0], "#f08c00")
            base = min(1e3 * matmuls.of_step(alone, r["variant"]), ms)
            axes.barh(y, base, color="#495057")
            axes.barh(y, ms - base, left=base, color=color)
            axes.errorbar(
                ms, y, xerr=0.5e3 * (r["iqr"] or 0.0), color="black", linewidth=1, capsize=2
            )
            k = r["tokens_per_s"] / 1e3
            rate = f"  {ms:.3g} ms, {k:,.{0 if k >= 100 else 1}f} k tokens/s"
            axes.text(ms + 0.5e3 * (r["iqr"] or 0.0), y, rate, va="center", fontsize=8)
        if "lower_bound_seconds" in alone:
            floor = 1e3 * alone["lower_bound_seconds"]
            line = axes.axvline(floor, color="black", linestyle=":", label="computed lower bound")
            handles.append(line)
        axes.set_yticks(range(len(rows)), [r["variant"] for r in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(right=1.35 * 1e3 * rows[-1]["seconds"])
        axes.set_xlabel(f"ms a training step, {section['preset']}, {dtype}")
        handles.append(Patch(color="#f08c00", label="all else, in the colour of its ops"))
        place = dict(loc="lower left", bbox_to_anchor=(0, 1), ncol=3)
        axes.legend(handles=handles, fontsize=8, frameon=False, **place)
        plain(axes)
    return figure


def _has(row: Values, dtype: str) -> bool:
    return bool(row["dtype"] == dtype and row.get("seconds"))


def memory(section: Values) -> Figure | None:
    rows = [r for r in section["rows"] if r.get("peak_bytes")]
    if not rows:
        return None
    figure = figure_of(9, 0.9 + 0.28 * len(rows))
    axes = figure.add_subplot()
    rows.sort(key=lambda r: r["peak_bytes"])
    names = [f"{r['variant']}, {r['dtype']}" for r in rows]
    colors = [COLORS.get(r["variant"].split()[0], "#f08c00") for r in rows]
    sizes = [r["peak_bytes"] / 2**30 for r in rows]
    axes.barh(range(len(rows)), sizes, color=colors)
    for y, size in enumerate(sizes):
        axes.text(size, y, f" {size:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("GiB at the peak of a training step, with weights and moments")
    plain(axes)
    return figure


def losses(section: Values, key: str, label: str) -> Figure | None:
    """Loss over steps, and over seconds of training."""
    rows = [r for r in section["rows"] if r.get(key)]
    if not rows:
        return None
    figure = figure_of(12, 4.2)
    once = len({r["ops"] for r in rows}) == len(rows)
    colors = [COLORS[r["ops"]] if once else f"C{i}" for i, r in enumerate(rows)]
    for axes, column, name in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("steps", "seconds"), strict=True
    ):
        for i, r in enumerate(rows):
            x, y = [p[column] for p in r[key]], [p[2] for p in r[key]]
            style = ["-", "--", ":"][i % 3]  # equal losses are seen as such
            axes.plot(x, y, style, color=colors[i], linewidth=2, label=r["run"])
        for target in {r["target"] for r in rows if r["target"] is not None}:
            axes.axhline(target, color="black", linewidth=0.8)
        axes.set_xlabel(name if column == 0 else "seconds of training")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        plain(axes)
    figure.axes[0].set_ylabel(f"{label} (nats a token)")
    return figure
