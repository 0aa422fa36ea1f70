"""The plots of the report, from nothing but a result file."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.measure.result_file import Values
from benchmarks.measure.rows import KernelRow
from benchmarks.ops.cases import MODEL_SHAPES, WITH_DROPOUT
from benchmarks.report.tables import variant_label
from benchmarks.report.tables_kernels import base_of, mark
from benchmarks.roofline import derive
from benchmarks.training import matmuls
from irongpt.figures import png

PAPER = dict(facecolor="white", edgecolor="none", pad=0.5)  # below a text that a line crosses
COLORS = {  # by provider; that of ours is warm, most others are blue or gray
    "fused": "#e8590c",
    "builtin": "#1c7ed6",
    "chunked": "#15aabf",
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
OTHER = "#f08c00"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _at_model(section: Values) -> tuple[str, list[KernelRow]]:
    """The rows of the model's shape with a time, in the dtype that comes first."""
    rows = [r for r in section["rows"] if r.sweep in MODEL_SHAPES and r.timed]
    dtype = rows[0].dtype if rows else ""
    return dtype, [r for r in rows if r.dtype == dtype]


def _label(r: KernelRow) -> str:
    return f"{r.op}, no dropout" if r.op in WITH_DROPOUT and not r.dropout else r.op


def speedup(section: Values, mode: str, what: str) -> Figure | None:
    """Speedup over builtin, or over naive if builtin is eager's: a bar for every provider."""
    dtype, rows = _at_model(section)
    rows = [r for r in rows if r.mode == mode]
    base = {_label(r): r.seconds for r in rows if r.provider == base_of(r.op)}
    if not base:
        return None
    bars = {op: [r for r in rows if _label(r) == op] for op in base}
    figure = _figure(9, 1.2 + 0.24 * sum(len(b) + 1 for b in bars.values()))
    axes = figure.add_subplot()
    y, ticks, largest = 0.0, [], 1.0
    for op in bars:
        begin = y
        for r in sorted(bars[op], key=lambda r: r.seconds):
            ratio = base[op] / r.seconds
            largest = max(largest, ratio)
            axes.barh(y, ratio, height=0.85, color=COLORS[r.provider])
            marked = mark(r) + ("  (no graph)" if r.no_graph_reason else "")
            label = f" {r.provider}  {ratio:.2f}{marked}"
            weight = "bold" if r.provider == "fused" else "normal"
            axes.text(ratio, y, label, va="center", fontsize=8, fontweight=weight, bbox=PAPER)
            y += 1
        ticks.append((begin + y - 1) / 2)
        y += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(ticks, list(bars), fontsize=9)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(0, 1.25 * largest)
    axes.set_xlabel(f"times as fast as builtin (else naive), {what}, {dtype}")
    _plain(axes)
    return figure


def roofline(section: Values) -> Figure | None:
    """Left: attention under the measured peak rates. Right: each op's share of its limit."""
    dtype, rows = _at_model(section)
    peak_rates = section["peak_rates"]
    rate, bandwidth = peak_rates["gemm_flops_per_s"].get(dtype), peak_rates["copy_bytes_per_s"]
    if not rows or rate is None:
        return None
    figure = _figure(12, 6.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    ridge = rate / bandwidth
    corner = [ridge / 30, ridge, ridge * 8]
    left.plot(corner, [min(rate, bandwidth * x) / 1e12 for x in corner], color="0.3")
    swept = [
        r
        for r in section["rows"]
        if r.timed and r.dtype == dtype and r.mode == "total" and r.least_flops
        if r.sweep in (*MODEL_SHAPES, "T")
    ]
    for r in swept:
        point = r.least_flops / r.least_bytes, r.least_flops / r.seconds / 1e12
        left.scatter(*point, s=22, color=COLORS[r.provider], zorder=3)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("FLOPs per byte (lower bound)")
    left.set_ylabel("TFLOP/s")
    rates = f"copy {bandwidth / 1e9:,.4g} GB/s, matmul {rate / 1e12:,.3g} TFLOP/s"
    lengths = sorted({r.shape["T"] for r in swept})
    sizes = f", T {lengths[0]} to {lengths[-1]}" if lengths else ""
    title = f"attention, forward and backward, {dtype}{sizes}\nmeasured peak rates: {rates}"
    left.set_title(title, fontsize=9)
    left.grid(alpha=0.25)
    _shares(right, [r for r in rows if r.mode != "total"], peak_rates)
    _legend(right, rows + swept)
    return figure


def _shares(axes: Axes, rows: list[KernelRow], peak_rates: Values) -> None:
    """A line for every op and direction, a point for every provider."""
    names = [_label(r) if r.mode == "call" else f"{_label(r)}, {r.mode}" for r in rows]
    labels = list(dict.fromkeys(names))
    for r, name in zip(rows, names, strict=True):
        share, color = derive(r, peak_rates).share_of_peak, COLORS[r.provider]
        fill = "none" if r.exceeds_tolerance else color
        marker, size, zorder = ("D", 8, 4) if r.provider == "fused" else ("o", 5, 3)
        at = 100 * share, labels.index(name)
        axes.plot(*at, marker, color=color, mfc=fill, markersize=size, zorder=zorder)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.axvline(100, color="0.3", linewidth=0.8)
    axes.set_xlabel(
        "percent of the nearer limit (least bytes or FLOPs); hollow: exceeds the tolerance"
    )
    axes.grid(axis="x", alpha=0.25)
    axes.grid(axis="y", alpha=0.15)


def _legend(axes: Axes, rows: list[KernelRow], bound: bool = False) -> None:
    """Right of the axes, with every provider in the figure."""
    for provider in dict.fromkeys(r.provider for r in rows):
        axes.plot([], [], "o", color=COLORS[provider], label=provider)
    if bound:
        axes.plot([], [], "k:", label="computed lower bound")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def sweep(section: Values, key: str, label: str, factor: float) -> Figure | None:
    """A quantity of attention over T at a constant number of tokens, with dropout and without."""
    rows = [r for r in section["rows"] if (r.sweep, r.op) == ("T", "causal_attention")]
    rows = [r for r in rows if r.timed and getattr(r, key)]
    if not rows:
        return None
    dtype = rows[0].dtype
    rows = [r for r in rows if r.dtype == dtype and r.mode == "total"]
    figure = _figure(12, 4.6)
    for axes, p in zip(figure.subplots(1, 2, sharey=True), (0.0, 0.2), strict=True):
        part = sorted((r for r in rows if r.dropout == p), key=lambda r: r.shape["T"])
        for provider in dict.fromkeys(r.provider for r in rows):
            drawn = [r for r in part if r.provider == provider]
            axes.plot(
                [r.shape["T"] for r in drawn],
                [getattr(r, key) * factor for r in drawn],
                marker="o",
                markersize=4,
                linewidth=2.6 if provider == "fused" else 1.3,
                color=COLORS[provider],
            )
        for r in (r for r in part if r.exceeds_tolerance):
            at = r.shape["T"], getattr(r, key) * factor
            axes.plot(*at, "o", markersize=4, color=COLORS[r.provider], mfc="white")
        if key == "seconds":
            bounds = [derive(r, section["peak_rates"]).lower_bound_seconds for r in part]
            y = [bound * factor for bound in bounds]
            axes.plot([r.shape["T"] for r in part], y, "k:", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        tokens = part[0].shape["B"] * part[0].shape["T"] if part else 0
        axes.set_title(f"attention, dropout {p:g}, {dtype}, {tokens:,} tokens", fontsize=10)
        axes.set_xlabel("T")
        axes.grid(alpha=0.25)
        _plain(axes)
    _legend(axes, rows, key == "seconds")
    figure.axes[0].set_ylabel(f"{label}, forward and backward")
    return figure


def step(section: Values) -> Figure | None:
    """Milliseconds per step: the matmuls, timed alone, and the rest."""
    timed = sorted((r for r in section["rows"] if r.timed), key=lambda r: r.seconds)
    if not timed:
        return None
    dtypes = [d for d in section["matmuls"] if any(r.dtype == d for r in timed)]
    by_dtype = [[r for r in timed if r.dtype == dtype] for dtype in dtypes]
    figure = _figure(9, 1.1 * len(dtypes) + 0.36 * len(timed))
    counts = [len(rows) for rows in by_dtype]
    grid = figure.subplots(len(dtypes), 1, height_ratios=counts, squeeze=False)
    for axes, dtype, rows in zip(grid[:, 0], dtypes, by_dtype, strict=True):
        alone = section["matmuls"][dtype]
        colors = [COLORS.get(r.variant.split()[0], OTHER) for r in rows]
        for y, r in enumerate(rows):
            ms, half = 1e3 * r.seconds, 0.5e3 * (r.iqr if r.iqr == r.iqr else 0.0)
            base = min(1e3 * matmuls.of_step(alone, r.variant), ms)
            axes.barh(y, base, color="#495057")
            axes.barh(y, ms - base, left=base, color=colors[y])
            axes.errorbar(ms, y, xerr=half, color="black", linewidth=1, capsize=2)
            k = r.tokens_per_s / 1e3
            rate = f"  {ms:.3g} ms, {k:,.{0 if k >= 100 else 1}f} k tokens/s"
            axes.text(ms + half, y, rate, va="center", fontsize=8)
        bound = 1e3 * alone["lower_bound_seconds"]
        line = axes.axvline(bound, color="black", linestyle=":")
        axes.set_yticks(range(len(rows)), [variant_label(r.variant) for r in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(right=1.35 * 1e3 * rows[-1].seconds)
        axes.set_xlabel(f"ms per training step of {section['preset']}, {dtype}")
        named = {  # the rest has the color of the implementation
            "matmuls, timed alone": Patch(color="#495057"),
            "everything but the matmuls": tuple(Patch(color=c) for c in dict.fromkeys(colors)),
            "computed lower bound": line,
        }
        axes.legend(
            list(named.values()), list(named), loc="lower left", bbox_to_anchor=(0, 1), ncol=3,
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, fontsize=8, frameon=False,
        )  # fmt: skip
        _plain(axes)
    return figure


def losses(section: Values, key: str, label: str) -> Figure | None:
    """Loss over steps, and over seconds of training."""
    rows = [r for r in section["rows"] if getattr(r, key)]
    if not rows:
        return None
    figure = _figure(12, 4.2)
    once = len({r.ops for r in rows}) == len(rows)
    for column, (axes, name) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ("steps", "seconds of training"), strict=True)
    ):
        for i, r in enumerate(rows):
            x, y = [p[column] for p in getattr(r, key)], [p[2] for p in getattr(r, key)]
            color, style = COLORS[r.ops] if once else f"C{i}", ["-", "--", ":"][i % 3]
            axes.plot(x, y, style, color=color, linewidth=2, label=r.run)
        for target in {r.target for r in rows if r.target is not None}:
            axes.axhline(target, color="black", linewidth=0.8)
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
        _plain(axes)
    figure.axes[0].set_ylabel(f"{label} (nats a token)")
    return figure


# The functions that draw a section, by the names of the pictures.
PLOTS: dict[str, dict[str, Callable[[Values], Figure | None]]] = {
    "kernels": {
        "speedup": lambda s: speedup(s, "total", "forward and backward"),
        "speedup-calls": lambda s: speedup(s, "call", "ops without a gradient"),
        "roofline": roofline,
        "sweep-T": lambda s: sweep(s, "seconds", "microseconds", 1e6),
        "memory-T": lambda s: sweep(s, "peak_bytes", "MiB at the peak", 2**-20),
    },
    "train": {"step": step},
    "runs": {"runs": lambda s: losses(s, "curve", "training loss")},
    "target": {"target": lambda s: losses(s, "evaluated", "validation loss")},
}


def draw(name: str, section: Values) -> dict[str, bytes]:
    """PNGs of a section by the names of the pictures."""
    figures = {picture: make(section) for picture, make in PLOTS.get(name, {}).items()}
    return {picture: png(figure) for picture, figure in figures.items() if figure}
