"""The tables of the kernels: every provider at the model's shape, then along the sweeps."""

from collections.abc import Callable
from typing import Any

from benchmarks.measure.result_file import Values
from benchmarks.measure.rows import KernelRow, spread
from benchmarks.ops.cases import AS_EAGER, MODEL_SHAPES, TOTAL, WITH_DROPOUT, modes
from benchmarks.roofline import Rates, derive

Timed = dict[str, dict[str, KernelRow]]  # rows by provider and mode

NOTES = {
    "layer_norm": "Its rows are the float32 residual stream, whatever the dtype of the matmuls.",
    "dropout_add_layer_norm": "The residual stream is float32; the branch has the dtype above.",
    "adamw": "It updates all weights of the model and includes the gradient norm.",
    "muon": "It updates the blocks' matrices; it includes the gradient norm, not the iteration.",
    "sum_shards": "In place of the gradient norm if a step is cut into two shards.",
    "embed_tokens": "The embeddings are float32, whatever the dtype of the matmuls.",
    "sample_tokens": "naive and compile use PyTorch's generator; checked near temperature 0.",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def kernels(section: Values) -> str:
    """The part of the page about the kernels."""
    peak_rates = section["peak_rates"]
    at_model: dict[Any, list[KernelRow]] = {}
    swept: dict[Any, list[KernelRow]] = {}
    for r in section["rows"]:
        if r.sweep in MODEL_SHAPES:
            at_model.setdefault((r.op, r.size, r.dtype, r.dropout), []).append(r)
        else:
            swept.setdefault((r.op, r.sweep, r.dtype, r.dropout), []).append(r)
    parts = []
    if section.get("missing"):
        parts.append("Not here: " + "; ".join(f"{k} ({v})" for k, v in section["missing"].items()))
    parts.append(
        "Times are in microseconds: the median, the interquartile range (±) and the speedup over "
        "builtin (x), or over naive for ops that builtin takes from eager. GB/s and TFLOP/s count "
        "the least bytes and FLOPs that the op needs; copy and matmul are shares of the measured "
        "peak rates of this device. Host is the time that Python needs to launch the op once. "
        "Error is a share of the tolerance; a baseline that exceeds the tolerance is marked (†)."
    )
    parts += [_op(rows, peak_rates) for rows in at_model.values()]
    if swept:
        parts.append(
            "### Sweeps\n\nTimes are in microseconds, of forward + backward if the op has a "
            "gradient. In brackets is the speedup over builtin (over naive for ops that builtin "
            "takes from eager). The last columns are fused's rates and its share of the limit."
        )
    for rows in swept.values():
        parts.append(_sweep([r for r in rows if r.mode in TOTAL], peak_rates))
    return "\n\n".join(part for part in parts if part)


def _op(rows: list[KernelRow], peak_rates: Values) -> str:
    """Two tables of an op's providers, the fastest first: times, then rates and memory."""
    one, by = rows[0], Timed()
    for r in rows:
        by.setdefault(r.provider, {})[r.mode] = r
    total = modes(one.op)[-1]
    timed = {name: found for name, found in by.items() if found[total].timed}
    timed = dict(sorted(timed.items(), key=lambda item: item[1][total].seconds))
    notes = [NOTES[one.op]] if one.op in NOTES else []
    for name, found in timed.items():
        plain = [f"{m} ({r.no_graph_reason})" for m, r in found.items() if r.no_graph_reason]
        if plain:
            why = "; ".join(plain)
            notes.append(f"**{name} in no graph, so these are Python's times too:** {why}")
        if any(r.group for r in found.values()):
            notes.append(
                f"{name}: measured after the others, because memory was short, so not interleaved."
            )
    if any(r.cold is False for found in timed.values() for r in found.values()):
        notes.append("Its inputs are so small that they stay in the L2 cache.")
    without = [f"{name}: {m[total].skipped_reason}" for name, m in by.items() if name not in timed]
    notes += ["No time: " + "; ".join(without)] if without else []
    heading = f"### {one.op}, {one.size}, {one.dtype}{dropout(one)}"
    tables = [_times(one.op, timed), _rates(one.op, timed, peak_rates)]
    return "\n\n".join(part for part in (heading, *tables, *notes) if part)


def base_of(op: str) -> str:
    """Returns the baseline of the speedups of an op."""
    return "naive" if op in AS_EAGER else "builtin"


def mark(r: KernelRow) -> str:
    """Marks the time of a provider that exceeds the tolerance."""
    return " †" if r.exceeds_tolerance else ""


def dropout(r: KernelRow) -> str:
    """The dropout of an op that has one; empty for the others."""
    return f", dropout {r.dropout:g}" if r.op in WITH_DROPOUT else ""


def _times(op: str, timed: Timed) -> str:
    order = modes(op)
    head = ["provider", *(head for m in order for head in (m, "±", "x")), "host us", "error"]
    base = timed.get(base_of(op), {})
    body = []
    for name, found in timed.items():
        total = found[order[-1]]
        cells = [(f"{name} ({total.backend})" if total.backend else name) + mark(total)]
        for m in order:
            r = found[m]
            speedup = f"{base[m].seconds / r.seconds:.2f}" if base and found is not base else ""
            cells += [_microseconds(r), spread(r.iqr, 1e6), speedup]
        host = f"{total.host_seconds * 1e6:,.0f}" if total.host_seconds else ""
        error = f"{total.accuracy.share:.0%}" if total.accuracy else ""
        body.append([*cells, host, error])
    return table(head, body)


def _microseconds(r: KernelRow) -> str:
    return f"{r.seconds * 1e6:,.1f}{'*' if r.no_graph_reason else ''}"


def digits(x: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _mebibytes(r: KernelRow) -> str:
    return "" if r.peak_bytes is None else digits(r.peak_bytes / 2**20)


RATES: dict[str, Callable[[KernelRow, Rates], str]] = {
    "GB/s": lambda r, d: digits(d.bytes_per_s / 1e9),
    "TFLOP/s": lambda r, d: digits(d.flops_per_s / 1e12) if r.least_flops else "",
    "copy": lambda r, d: f"{d.share_of_copy:.1%}",
    "matmul": lambda r, d: f"{d.share_of_gemm:.1%}" if d.share_of_gemm and r.least_flops else "",
    "MiB": lambda r, d: _mebibytes(r),
    "of the peak rate": lambda r, d: f"{d.share_of_peak:.0%}",
}


def _rate(what: str, r: KernelRow, peak_rates: Values) -> str:
    """A cell of RATES; empty for a row without a time."""
    return RATES[what](r, derive(r, peak_rates)) if r.timed else ""


def _rates(op: str, timed: Timed, peak_rates: Values) -> str:
    """Rates and memory by mode. A CPU has no peak memory; an op without matmuls has no FLOPs."""
    columns = {"provider": [name + mark(found[modes(op)[-1]]) for name, found in timed.items()]}
    for what in ("GB/s", "TFLOP/s", "copy", "matmul", "MiB"):
        for m in modes(op):
            cells = [_rate(what, found[m], peak_rates) for found in timed.values()]
            if any(cells):
                columns[f"{what} {m}"] = cells
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return table(list(columns), rows) if len(columns) > 1 else ""


def _sweep(rows: list[KernelRow], peak_rates: Values) -> str:
    """A line for each size, a column for each provider."""
    one = rows[0]
    names = list(dict.fromkeys(r.provider for r in rows))
    rates = ["GB/s", "TFLOP/s", "of the peak rate"] if "fused" in names else []
    body, memory = [], []
    notes: dict[str, None] = {}  # in order, each once
    for size in dict.fromkeys(r.size for r in rows):
        by = {r.provider: r for r in rows if r.size == size}
        cells = []
        for name in names:
            r = by.get(name)
            if r is None or not r.timed:
                cells.append("-")
                notes[f"{name}: {r.skipped_reason if r else 'not measured'}"] = None
                continue
            base = by.get(base_of(one.op), r)
            ratio = f" ({base.seconds / r.seconds:.2f})" if base is not r and base.timed else ""
            cells.append(f"{_microseconds(r)}{mark(r)}{ratio}")
        cells += [_rate(what, by["fused"], peak_rates) if "fused" in by else "" for what in rates]
        body.append([size, *cells])
        memory.append([size, *(_mebibytes(by[n]) or "-" if n in by else "-" for n in names)])
    head = ["size", *names, *(f"fused: {what}" if what == "GB/s" else what for what in rates)]
    parts = [f"**{one.op} over {one.sweep}, {one.dtype}{dropout(one)}**", table(head, body)]
    if any(r.peak_bytes is not None for r in rows):
        parts.append(table(["MiB at the peak", *names], memory))
    marks = "".join(cell for row in body for cell in row)
    if "*" in marks:
        notes["* in no graph: Python's time too"] = None
    if "†" in marks:
        notes["† exceeds the tolerance"] = None
    if any(r.cold is False for r in rows):
        notes["some inputs are so small that they stay in the cache"] = None
    parts += ["Without a time (-) and other notes: " + "; ".join(notes)] if notes else []
    return "\n\n".join(parts)
