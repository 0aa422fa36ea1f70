"""The tables of the kernels: every provider at the model's own shape, then along the sweeps."""

from collections.abc import Callable
from typing import Any

from benchmarks import roofline
from benchmarks.measure import result_file
from benchmarks.ops import inplace_ops
from benchmarks.ops.cases import DROPS, MODEL_SHAPES, TOTAL, modes

Values = dict[str, Any]
Key = tuple[Any, ...]
Timed = dict[str, dict[str, Values]]  # rows by provider and mode

# What a size does not tell.
NOTES = {
    "layer_norm": "Its rows are the float32 residual stream, whatever the dtype of a training.",
    "dropout_add_layer_norm": "The residual stream is float32; the branch has the dtype above.",
    "adamw": "It updates all weights of the model and includes the gradient norm.",
    "muon": "It updates the blocks' matrices; it includes the gradient norm, not the iteration.",
    "embed_tokens": "The embeddings are float32, whatever the dtype of a training.",
    "sample_tokens": "naive and compile use PyTorch's generator; checked near temperature 0.",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def kernels(section: Values) -> str:
    own = [r for r in section["rows"] if r["sweep"] in MODEL_SHAPES]
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
    for key in dict.fromkeys(_key(r) for r in own):
        rows = [r for r in own if _key(r) == key]
        parts.append(_op(key, rows, section["peak_rates"]))
    swept = [r for r in section["rows"] if r["sweep"] not in MODEL_SHAPES]
    if swept:
        parts.append(
            "### Sweeps\n\nTimes are in microseconds, of forward + backward where the op has a "
            "gradient. In brackets is the speedup over builtin (over naive for ops that builtin "
            "takes from eager). The last columns are fused's rates and its share of the limit."
        )
    for series in dict.fromkeys(_series(r) for r in swept):
        rows = [r for r in swept if _series(r) == series and r["mode"] in TOTAL]
        parts.append(_sweep(series, rows, section["peak_rates"]))
    return "\n\n".join(part for part in parts if part)


def _key(r: Values) -> Key:
    return r["op"], r["size"], r["dtype"], r["dropout"]


def _series(r: Values) -> Key:
    return r["op"], r["sweep"], r["dtype"], r["dropout"]


def _op(key: Key, rows: list[Values], peak_rates: Values) -> str:
    """Two tables of an op's providers, the fastest first: times, then rates and memory."""
    op, size, dtype, p = key
    by: Timed = {}
    for r in rows:
        by.setdefault(r["provider"], {})[r["mode"]] = r
    total = modes(op)[-1]
    timed = {name: found for name, found in by.items() if found[total].get("seconds")}
    timed = dict(sorted(timed.items(), key=lambda item: item[1][total]["seconds"]))
    notes = [NOTES[op]] if op in NOTES else []
    for name, found in timed.items():
        plain = [
            f"{m} ({r['no_graph_reason']})" for m, r in found.items() if r.get("no_graph_reason")
        ]
        if plain:
            notes.append(
                f"**{name} in no graph, so these are Python's times too:** " + "; ".join(plain)
            )
        if any(r.get("group") for r in found.values()):
            notes.append(
                f"{name}: measured after the others, because memory was short, so not interleaved."
            )
    if any(r.get("cold") is False for found in timed.values() for r in found.values()):
        notes.append("Its inputs are so small that they stay in the L2 cache.")
    without = [
        f"{name}: {m[total]['skipped_reason']}" for name, m in by.items() if name not in timed
    ]
    notes += ["No time: " + "; ".join(without)] if without else []
    heading = f"### {op}, {size}, {dtype}{dropout(op, p)}"
    return "\n\n".join([heading, _times(op, timed), _rates(op, timed, peak_rates), *notes])


def base_of(op: str) -> str:
    """Returns the baseline of the speedups of an op."""
    return "naive" if op in inplace_ops.AS_EAGER else "builtin"


def beyond(r: Values) -> str:
    """Marks the time of a provider that exceeds the tolerance."""
    return "" if r["accuracy"]["ok"] else " †"


def dropout(op: str, p: float) -> str:
    """Names the dropout of an op that has one; empty for the others."""
    return f", dropout {p:g}" if op in DROPS else ""


def _times(op: str, timed: Timed) -> str:
    order = modes(op)
    head = ["provider", *(head for m in order for head in (m, "±", "x")), "host us", "error"]
    reference = base_of(op)
    base = {m: r["seconds"] for m, r in timed.get(reference, {}).items()}
    body = []
    for name, found in timed.items():
        total = found[order[-1]]
        shown = f"{name} ({total['backend']})" if total.get("backend") else name
        cells = [shown + beyond(total)]
        for m in order:
            r = found[m]
            cells += [f"{r['seconds'] * 1e6:,.1f}{'*' if r.get('no_graph_reason') else ''}"]
            cells += [result_file.spread(r["iqr"], 1e6)]
            cells += [f"{base[m] / r['seconds']:.2f}" if m in base and name != reference else ""]
        host = f"{total['host_seconds'] * 1e6:,.0f}" if total.get("host_seconds") else ""
        body.append([*cells, host, f"{total['accuracy']['share']:.0%}"])
    return table(head, body)


RATES: dict[str, tuple[str, Callable[[float], str]]] = {  # by what it says: unit, of `derive`
    "GB/s": ("bytes_per_s", lambda x: digits(x / 1e9)),
    "TFLOP/s": ("flops_per_s", lambda x: digits(x / 1e12)),
    "copy": ("share_of_copy", lambda x: f"{x:.1%}"),
    "matmul": ("share_of_gemm", lambda x: f"{x:.1%}"),
    "MiB": ("peak_bytes", lambda x: digits(x / 2**20)),
}


def digits(x: float) -> str:
    """Three of them, more before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _rates(op: str, timed: Timed, peak_rates: Values) -> str:
    """Rates and memory by mode. A CPU has no peak memory; an op without matmuls has no FLOPs."""
    order = modes(op)
    known = {
        name: [r | roofline.derive(r, peak_rates) for r in (found[m] for m in order)]
        for name, found in timed.items()
    }
    multiplies = any(r.get("least_flops") for rows in known.values() for r in rows)
    shown = {
        what: (key, form)
        for what, (key, form) in RATES.items()
        if any(r.get(key) is not None for rows in known.values() for r in rows)
        if multiplies or key not in ("flops_per_s", "share_of_gemm")
    }
    if not shown:
        return ""
    head = ["provider", *(f"{what} {m}" for what in shown for m in order)]
    body = [
        [
            name + beyond(rows[-1]),
            *(_cell(r.get(key), form) for key, form in shown.values() for r in rows),
        ]
        for name, rows in known.items()
    ]
    return table(head, body)


def _sweep(series: Key, rows: list[Values], peak_rates: Values) -> str:
    """A line for each size, a column for each provider."""
    op, sweep, dtype, p = series
    reference = base_of(op)
    names = list(dict.fromkeys(r["provider"] for r in rows))
    body: list[list[str]] = []
    notes: dict[str, None] = {}  # in order, each once
    for size in dict.fromkeys(r["size"] for r in rows):
        by = {r["provider"]: r for r in rows if r["size"] == size}
        base = by.get(reference, {}).get("seconds")
        cells = []
        for name in names:
            r = by.get(name, {})
            if r.get("seconds") is None:
                cells.append("-")
                notes[f"{name}: {r.get('skipped_reason', 'not measured')}"] = None
                continue
            ratio = f" ({base / r['seconds']:.2f})" if base and name != reference else ""
            star = "*" if r.get("no_graph_reason") else ""
            cells.append(f"{r['seconds'] * 1e6:,.1f}{star}{beyond(r)}{ratio}")
        cells += _ours(by.get("fused", {}), peak_rates) if "fused" in names else []
        body.append([size, *cells])
    head = ["size", *names]
    head += ["fused: GB/s", "TFLOP/s", "of the peak rate"] if "fused" in names else []
    parts = [f"**{op} over {sweep}, {dtype}{dropout(op, p)}**", table(head, body)]
    parts += [_memory(names, rows)] if any(r.get("peak_bytes") is not None for r in rows) else []
    if any("*" in cell for row in body for cell in row):
        notes["* in no graph: Python's time too"] = None
    if any("†" in cell for row in body for cell in row):
        notes["† exceeds the tolerance"] = None
    if any(r.get("cold") is False for r in rows):
        notes["some inputs are so small that they stay in the cache"] = None
    parts += ["Without a time (-) and other notes: " + "; ".join(notes)] if notes else []
    return "\n\n".join(parts)


def _ours(row: Values, peak_rates: Values) -> list[str]:
    d = roofline.derive(row, peak_rates)
    if not d:
        return [""] * 3
    flops = digits(d["flops_per_s"] / 1e12) if d["flops_per_s"] else ""
    return [digits(d["bytes_per_s"] / 1e9), flops, f"{d['share_of_peak']:.0%}"]


def _memory(names: list[str], rows: list[Values]) -> str:
    key, form = RATES["MiB"]
    body = []
    for size in dict.fromkeys(r["size"] for r in rows):
        by = {r["provider"]: r.get(key) for r in rows if r["size"] == size}
        body.append([size, *(_cell(by.get(n), form) or "-" for n in names)])
    return table(["MiB at the peak", *names], body)
