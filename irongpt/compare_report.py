"""What `irongpt compare` shows: the table, what breaks the rule, the picture."""

import io
import math
import re
import textwrap
from collections import Counter

from irongpt_kernels.tolerance import GRADIENTS, OUTPUTS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from irongpt.compare_model import JUDGED_DIFFERENCE, JUDGED_STEPS, Curve
from irongpt.compare_ops import Check, Row

COLORS = {"float32": "tab:blue", "float16": "tab:orange", "bfloat16": "tab:green"}
WIDTH = 100  # columns
SHOWN = 10.0  # ratios above are drawn at the edge


def heading(candidate: str) -> str:
    """Explains the columns and names them."""
    return (
        "error: largest distance from float64; rms: root mean square; x: times eager's\n"
        f"bound: what the rule allows, {OUTPUTS} x eager's error for an output and {GRADIENTS} x "
        "for a gradient, plus a rounding\n\n"
        f"  {'':8} {'':28} {'':>8} {'':>8}  {'error':>6} {'rms':>6} {'of':>6}\n"
        f"  {'dtype':8} {'tensor':28} {candidate:>8} {'eager':>8}  {'x':>6} {'x':>6} {'bound':>6}"
        "  worst at"
    )


def group(title: str, rows: list[Row], checks: list[Check]) -> str:
    """A title with what was checked, and a line for every tensor.

    Of a parameter that every block of a model has, the block that is nearest to its limit; all of
    them are in the JSON.
    """
    passed = [name for name in dict.fromkeys(c.name for c in checks) if _all_ok(name, checks)]
    notes = {"repeatable": "same bits in two runs", "dropout mask": "eager's dropout mask"}
    said = ", ".join(notes[name] for name in passed if name in notes)
    nearest: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.dtype, re.sub(r"blocks\.\d+", "blocks.*", row.tensor)
        if key not in nearest or not _share(row) <= _share(nearest[key]):
            nearest[key] = row
    lines = [_line(row) for row in nearest.values()]
    marks = [f"  {c.dtype:8} {c.name}: FAIL" for c in checks if not c.ok]
    return "\n".join(["", f"{title}{'; ' if said else ''}{said}", *lines, *marks])


def training(curve: Curve) -> str:
    """A line of what a training curve showed."""
    steps, judged = len(curve.eager), curve.differences[:JUDGED_STEPS]
    mark = "" if curve.check().ok else "  FAIL"
    return (
        f"  {curve.dtype:8} trained {steps} steps, loss {curve.eager[0]:.3f} to "
        f"{curve.eager[-1]:.3f}: apart {max(judged):.1e} in the first {len(judged)}, "
        f"{max(curve.differences):.1e} in all{mark}"
    )


def failures(rows: list[Row], checks: list[Check], candidate: str) -> list[str]:
    """A few lines for everything that breaks the rule."""
    found = []
    for r in rows:
        if r.ok:
            continue
        kind = "gradient" if r.tensor.startswith("d ") else "output"
        found.append(f"FAIL {r.op}, {r.shape}, {r.dtype}, {kind} {r.tensor}")
        found += [
            f"     {norm} error {e.candidate:.2e}, eager's {e.eager:.2e}, allowed {e.bound:.2e}"
            for norm, e in r.errors.items()
            if not e.ok
        ]
        found.append(
            f"     worst at {_index(r.index)}: {candidate} {r.candidate:.8g}, eager {r.eager:.8g}, "
            f"float64 {r.float64:.8g}"
        )
    for c in checks:
        if not c.ok:
            found.append(f"FAIL {c.op}, {c.shape}, {c.dtype}, {c.name}")
            found += [f"     {line}" for line in textwrap.wrap(c.detail, WIDTH - 5)]
    return found


def summary(rows: list[Row], checks: list[Check]) -> str:
    bad = [r for r in rows if not r.ok]
    done = ", ".join(
        f"{name} {sum(c.ok for c in checks if c.name == name)}/{n}"
        for name, n in Counter(c.name for c in checks).items()
    )
    verdict = "FAIL" if bad or not all(c.ok for c in checks) else "ok"
    return f"{verdict}: {len(rows) - len(bad)} of {len(rows)} tensors within the rule; {done}"


def _line(row: Row) -> str:
    largest, rms = row.errors["max"], row.errors["rms"]
    share = _share(row)
    used = f"{share:6.0%}" if share < 99 else f"{share:6.0e}"
    return (
        f"  {row.dtype:8} {row.tensor:28} {largest.candidate:8.1e} {largest.eager:8.1e}  "
        f"{_ratio(largest.ratio):>6} {_ratio(rms.ratio):>6} {used}  "
        f"{_index(row.index)}{'' if row.ok else '  FAIL'}"
    )


def _all_ok(name: str, checks: list[Check]) -> bool:
    return all(c.ok for c in checks if c.name == name)


def _index(index: list[int]) -> str:
    return "[" + ",".join(map(str, index)) + "]"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


def _share(row: Row) -> float:
    """Of what the rule allows, by the norm that is nearest to it; infinite if it is no number."""
    shares = [e.candidate / e.bound for e in row.errors.values()]
    return max(math.inf if math.isnan(share) else share for share in shares)


def png(rows: list[Row], curves: list[Curve], candidate: str, title: str) -> bytes:
    """Left the error ratios with their limits, right the training curves, as bytes of a PNG."""
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1.6, 1))
    _draw_ratios(figure.add_subplot(grid[:, 0]), rows, candidate)
    losses = figure.add_subplot(grid[0, 1])
    _draw_curves(losses, figure.add_subplot(grid[1, 1], sharex=losses), curves, candidate)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_ratios(axes: Axes, rows: list[Row], candidate: str) -> None:
    """A line for every op and tensor, a point for every shape and dtype."""
    labels: dict[tuple[str, str], int] = {}
    for r in rows:
        labels.setdefault(_label(r), len(labels))
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    for r in rows:
        ratio = r.errors["max"].ratio
        x = SHOWN if not ratio < SHOWN else max(ratio, 1 / SHOWN)
        y = labels[_label(r)] + 0.2 * (dtypes.index(r.dtype) - (len(dtypes) - 1) / 2)
        if r.ok:
            inside = ratio <= _factor(r.tensor)
            face = COLORS[r.dtype] if inside else "white"  # white: by the floor
            axes.plot(x, y, "o", color=COLORS[r.dtype], markerfacecolor=face, markersize=4)
        else:
            axes.plot(x, y, "X", color="tab:red", markersize=8, clip_on=False, zorder=5)
    for (_, tensor), y in labels.items():
        limit = _factor(tensor)
        axes.plot([limit, limit], [y - 0.5, y + 0.5], color="black", linewidth=1)
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
    handles = [
        Line2D([], [], color=COLORS[d], marker="o", linestyle="", markersize=4, label=d)
        for d in dtypes
    ]
    handles.append(Line2D([], [], color="black", linewidth=1, label="limit"))
    if any(r.ok and r.errors["max"].ratio > _factor(r.tensor) for r in rows):
        label = "within one rounding"
        handles.append(
            Line2D([], [], color="0.3", marker="o", linestyle="", mfc="white", label=label)
        )
    if any(not r.ok for r in rows):
        label = "breaks the rule"
        handles.append(Line2D([], [], color="tab:red", marker="X", linestyle="", label=label))
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.06), ncols=6, fontsize=8
    )


def _draw_curves(losses: Axes, apart: Axes, curves: list[Curve], candidate: str) -> None:
    for c in curves:
        steps, color = range(1, len(c.eager) + 1), COLORS[c.dtype]
        losses.plot(steps, c.eager, color=color, alpha=0.35, linewidth=5, label=f"eager, {c.dtype}")
        losses.plot(steps, c.candidate, color=color, linewidth=1.2, label=f"{candidate}, {c.dtype}")
        apart.plot(steps, c.differences, color=color, marker=".", linewidth=1, label=c.dtype)
    if any(c.dtype == "float32" for c in curves):
        end = min(JUDGED_STEPS, max(len(c.eager) for c in curves))
        label = "limit for float32"
        apart.plot([1, end], [JUDGED_DIFFERENCE] * 2, color="black", linewidth=1, label=label)
    losses.set_ylabel("training loss (nats per token)")
    losses.tick_params(labelbottom=False)
    apart.set_ylabel("relative difference")
    apart.set_yscale("symlog", linthresh=1e-8)  # logarithmic, and has a zero: losses may be equal
    apart.set_ylim(bottom=0)
    apart.xaxis.set_major_locator(MaxNLocator(integer=True))
    apart.set_xlabel("step")
    for axes in (losses, apart):
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=8)


def _factor(tensor: str) -> int:
    return GRADIENTS if tensor.startswith("d ") else OUTPUTS


def _label(row: Row) -> tuple[str, str]:
    """Parameters of all blocks share a line."""
    return row.op, re.sub(r"blocks\.\d+\.", "", row.tensor)
