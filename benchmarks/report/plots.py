"""The plots of the report, from nothing but a result file."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.ops.cases import DROPS, MODEL_SHAPES
from benchmarks.report.plots_train import COLORS, figure_of, losses, memory, plain, step
from benchmarks.report.tables_kernels import base_of, beyond
from benchmarks.roofline import derive

Values = dict[str, Any]
PAPER = dict(facecolor="white", edgecolor="none", pad=0.5)  # below a text that a line crosses


def draw(values: Values) -> dict[str, bytes]:
    """PNGs by name; none for what the file does not hold."""
    figures: dict[str, Figure | None] = {}
    if "kernels" in values:
        section = values["kernels"]
        figures["speedup"] = speedup(section, "total", "forward and backward")
        figures["speedup-calls"] = speedup(section, "call", "ops without a gradient")
        figures["roofline"] = roofline(section)
        figures["sweep-T"] = sweep(section, "seconds", "microseconds", 1e6)
        figures["memory-T"] = sweep(section, "peak_bytes", "MiB at the peak", 2**-20)
    if "train" in values:
        figures["step"] = step(values["train"])
        figures["memory"] = memory(values["train"])
    if "runs" in values:
        figures["runs"] = losses(values["runs"], "curve", "training loss")
    if "target" in values:
        figures["target"] = losses(values["target"], "evaluated", "validation loss")
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _own(section: Values) -> tuple[str, list[Values]]:
    """The rows of the model's own shape with a time, in the dtype that comes first."""
    rows = [r for r in section["rows"] if r["sweep"] in MODEL_SHAPES and r.get("seconds")]
    dtype = rows[0]["dtype"] if rows else ""
    return dtype, [r for r in rows if r["dtype"] == dtype]


def _label(r: Values) -> str:
    return f"{r['op']}, no dropout" if r["op"] in DROPS and not r["dropout"] else str(r["op"])


def speedup(section: Values, mode: str, what: str) -> Figure | None:
    """How many times as fast as builtin, or naive where that has none of its own: a bar for
    every provider."""
    dtype, rows = _own(section)
    rows = [r for r in rows if r["mode"] == mode]
    base = {_label(r): r["seconds"] for r in rows if r["provider"] == base_of(r["op"])}
    if not base:
        return None
    bars = {op: [r for r in rows if _label(r) == op] for op in base}
    count = sum(len(b) + 1 for b in bars.values())
    figure = figure_of(9, 1.2 + 0.24 * count)
    axes = figure.add_subplot()
    y, ticks, largest = 0.0, [], 1.0
    for op in bars:
        begin = y
        for r in sorted(bars[op], key=lambda r: r["seconds"]):
            ratio = base[op] / r["seconds"]
            largest = max(largest, ratio)
            axes.barh(y, ratio, height=0.85, color=COLORS[r["provider"]])
            marked = beyond(r) + ("  (no graph)" if r.get("no_graph_reason") else "")
            label = f" {r['provider']}  {ratio:.2f}{marked}"
            weight = "bold" if r["provider"] == "fused" else "normal"
            axes.text(ratio, y, label, va="center", fontsize=8, fontweight=weight, bbox=PAPER)
            y += 1
        ticks.append(((begin + y - 1) / 2, op))
        y += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([t for t, _ in ticks], [op for _, op in ticks], fontsize=9)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.25 * largest)
    axes.set_xlabel(f"times as fast as builtin (else naive), {what}, {dtype}")
    plain(axes)
    return figure


def roofline(section: Values) -> Figure | None:
    """Left: attention under the measured peak rates. Right: each op's share of its limit."""
    dtype, rows = _own(section)
    peak_rates = section["peak_rates"]
    rate, bandwidth = peak_rates["gemm_flops_per_s"].get(dtype), peak_rates["copy_bytes_per_s"]
    known = [(r, derive(r, peak_rates)) for r in rows if "least_bytes" in r]
    if not known or rate is None:
        return None
    figure = figure_of(12, 6.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    ridge = rate / bandwidth
    corner = [ridge / 30, ridge, ridge * 8]
    left.plot(corner, [min(rate, bandwidth * x) / 1e12 for x in corner], color="0.3")
    swept = [
        (r, derive(r, peak_rates))
        for r in section["rows"]
        if r.get("seconds") and r["dtype"] == dtype and r.get("least_flops")
        if r["sweep"] in (*MODEL_SHAPES, "T")
    ]
    swept = [(r, d) for r, d in swept if r["mode"] == "total"]
    for provider in dict.fromkeys(r["provider"] for r, _ in swept):
        points = [
            (r["least_flops"] / r["least_bytes"], d["flops_per_s"] / 1e12)
            for r, d in swept
            if r["provider"] == provider
        ]
        left.scatter(*zip(*points, strict=True), s=22, color=COLORS[provider], zorder=3)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("FLOPs per byte (lower bound)")
    left.set_ylabel("TFLOP/s")
    roof = f"copy {bandwidth / 1e9:,.4g} GB/s, matmul {rate / 1e12:,.3g} TFLOP/s"
    lengths = sorted({r["shape"]["T"] for r, _ in swept})
    sizes = f", T {lengths[0]} to {lengths[-1]}" if lengths else ""
    title = f"attention, forward and backward, {dtype}{sizes}\nmeasured peak rates: {roof}"
    left.set_title(title, fontsize=9)
    left.grid(alpha=0.25)
    _shares(right, [(r, d) for r, d in known if r["mode"] != "total"])
    _legend(right, [r for r, _ in known + swept])
    return figure


def _shares(axes: Axes, known: list[tuple[Values, Values]]) -> None:
    """A line for every op and direction, a point for every provider."""

    def label(r: Values) -> str:
        return _label(r) if r["mode"] == "call" else f"{_label(r)}, {r['mode']}"

    labels = list(dict.fromkeys(label(r) for r, _ in known))
    for r, d in known:
        y = labels.index(label(r))
        ours = r["provider"] == "fused"
        axes.plot(
            100 * d["share_of_peak"],
            y,
            "D" if ours else "o",
            color=COLORS[r["provider"]],
            markerfacecolor=COLORS[r["provider"]] if r["accuracy"]["ok"] else "none",  # less exact
            markersize=8 if ours else 5,
            zorder=4 if ours else 3,
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.axvline(100, color="0.3", linewidth=0.8)
    axes.set_xlabel(
        "percent of the nearer limit (least bytes or FLOPs); hollow: exceeds the tolerance"
    )
    axes.grid(axis="x", alpha=0.25)
    axes.grid(axis="y", alpha=0.15)


def _legend(axes: Axes, rows: list[Values], floor: bool = False) -> None:
    """Right of the axes, of every provider that the figure shows anywhere."""
    for provider in dict.fromkeys(r["provider"] for r in rows):
        axes.plot([], [], "o", color=COLORS[provider], label=provider)
    if floor:
        axes.plot([], [], "k:", label="computed lower bound")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def sweep(section: Values, key: str, label: str, factor: float) -> Figure | None:
    """A quantity of attention over T at a constant number of tokens, with dropout and without."""
    rows = [r for r in section["rows"] if r["sweep"] == "T" and r["op"] == "causal_attention"]
    rows = [r for r in rows if r.get(key)]
    if not rows:
        return None
    dtype = rows[0]["dtype"]
    rows = [r for r in rows if r["dtype"] == dtype and r["mode"] == "total"]
    figure = figure_of(12, 4.6)
    floor = key == "seconds" and any("least_bytes" in r for r in rows)
    for axes, p in zip(figure.subplots(1, 2, sharey=True), (0.0, 0.2), strict=True):
        part = [r for r in rows if r["dropout"] == p]
        for provider in dict.fromkeys(r["provider"] for r in part):
            points = sorted(
                (r["shape"]["T"], r[key] * factor) for r in part if r["provider"] == provider
            )
            wide = 2.6 if provider == "fused" else 1.3
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                linewidth=wide,
                color=COLORS[provider],
            )
        for r in part:
            if not r["accuracy"]["ok"]:  # hollow: exceeds the tolerance
                at = r["shape"]["T"], r[key] * factor
                axes.plot(*at, "o", markersize=4, color=COLORS[r["provider"]], mfc="white")
        if floor and part:
            floors = {
                (r["shape"]["T"], derive(r, section["peak_rates"])["lower_bound_seconds"] * factor)
                for r in part
            }
            axes.plot(*zip(*sorted(floors), strict=True), "k:", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        tokens = part[0]["shape"]["B"] * part[0]["shape"]["T"] if part else 0
        axes.set_title(f"attention, dropout {p:g}, {dtype}, {tokens:,} tokens", fontsize=10)
        axes.set_xlabel("T")
        axes.grid(alpha=0.25)
        plain(axes)
    _legend(axes, rows, floor)
    figure.axes[0].set_ylabel(f"{label}, forward and backward")
    return figure
