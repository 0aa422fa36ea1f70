"""The tables of the kernels: every provider at the model's own shape, then along the sweeps."""

from typing import Any

from benchmarks import results

Values = dict[str, Any]
Key = tuple[Any, ...]

# What a size does not tell.
NOTES = {
    "layer_norm": "Its rows are the float32 residual stream, whatever the type of a training.",
    "dropout_add_layer_norm": "The residual stream is float32, the branch of the type above.",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def kernels(section: Values) -> str:
    own = [r for r in section["rows"] if r["sweep"] in ("iron", "smoke")]
    parts = []
    if section.get("missing"):
        parts.append("Not here: " + "; ".join(f"{k} ({v})" for k, v in section["missing"].items()))
    parts.append(
        "Microseconds, median of the samples; GB/s, TFLOP/s and shares are of the least bytes and "
        "FLOPs that the op needs, forward and backward, against this device's measured roofs. "
        "Host: what Python takes to issue forward and backward once."
    )
    for key in dict.fromkeys(_key(r) for r in own):
        rows = [r for r in own if _key(r) == key]
        parts.append(_op(key, rows, section["roofs"]))
    swept = [r for r in section["rows"] if r["sweep"] not in ("iron", "smoke")]
    if swept:
        parts.append(
            "### Sweeps\n\nMicroseconds of forward and backward, and times as fast as builtin in "
            "brackets; the last column is fused's share of the nearer roof."
        )
    for series in dict.fromkeys(_series(r) for r in swept):
        rows = [r for r in swept if _series(r) == series and r["mode"] == "both"]
        parts.append(_sweep(series, rows, section["roofs"]))
    return "\n\n".join(part for part in parts if part)


def _key(r: Values) -> Key:
    return r["op"], r["size"], r["dtype"], r["dropout"]


def _series(r: Values) -> Key:
    return r["op"], r["sweep"], r["dtype"], r["dropout"]


def _op(key: Key, rows: list[Values], roofs: Values) -> str:
    op, size, dtype, p = key
    by: dict[str, dict[str, Values]] = {}
    for r in rows:
        by.setdefault(r["provider"], {})[r["mode"]] = r
    base = by.get("builtin", {}).get("both", {}).get("seconds")
    timed = {name: modes for name, modes in by.items() if modes["both"].get("seconds")}
    body = [
        _provider(name, modes, base, roofs)
        for name, modes in sorted(timed.items(), key=lambda item: item[1]["both"]["seconds"])
    ]
    head = ["provider", "forward", "backward", "both", "±", "x builtin", "GB/s", "TFLOP/s"]
    head += ["copy", "product", "MiB", "host us", "of the bound"]
    dropout = f", dropout {p:g}" if p else ""
    notes = [NOTES[op]] if op in NOTES else []
    for name, modes in timed.items():
        plain = [f"{m} ({r['plain_because']})" for m, r in modes.items() if r.get("plain_because")]
        if plain:
            notes.append(
                f"**{name} in no graph, so these are Python's times too:** " + "; ".join(plain)
            )
        if any(r.get("group") for r in modes.values()):
            notes.append(f"{name}: measured after the others, for want of memory, not in turns.")
    without = [
        f"{name}: {m['both']['none_because']}" for name, m in by.items() if name not in timed
    ]
    notes += ["No time: " + "; ".join(without)] if without else []
    return "\n\n".join([f"### {op}, {size}, {dtype}{dropout}", table(head, body), *notes])


def _provider(name: str, modes: dict[str, Values], base: float | None, roofs: Values) -> list[str]:
    both = modes["both"]
    d = results.derive(both, roofs)
    marked = f"{name} ({both['backend']})" if both.get("backend") else name
    times = (modes[m] for m in ("forward", "backward", "both"))
    return [
        marked,
        *(f"{r['seconds'] * 1e6:,.1f}{'*' if r.get('plain_because') else ''}" for r in times),
        results.spread(both["iqr"], 1e6),
        f"{base / both['seconds']:.2f}" if base else "",
        f"{d['bytes_per_s'] / 1e9:,.3g}" if d else "",
        f"{d['flops_per_s'] / 1e12:.3g}" if d and d["flops_per_s"] else "",
        f"{d['share_of_copy']:.1%}" if d else "",
        f"{d['share_of_gemm']:.1%}" if d and d["share_of_gemm"] else "",
        f"{both['peak_bytes'] / 2**20:,.0f}" if both.get("peak_bytes") else "",
        f"{both['host_seconds'] * 1e6:,.0f}" if both.get("host_seconds") else "",
        f"{both['gate']['share']:.0%}",
    ]


def _sweep(series: Key, rows: list[Values], roofs: Values) -> str:
    """A line for each size, a column for each provider."""
    op, sweep, dtype, p = series
    names = list(dict.fromkeys(r["provider"] for r in rows))
    body: list[list[str]] = []
    notes: dict[str, None] = {}  # in order, each once
    for size in dict.fromkeys(r["size"] for r in rows):
        by = {r["provider"]: r for r in rows if r["size"] == size}
        base = by.get("builtin", {}).get("seconds")
        cells = []
        for name in names:
            r = by.get(name, {})
            if r.get("seconds") is None:
                cells.append("-")
                notes[f"{name}: {r.get('none_because', 'not measured')}"] = None
                continue
            ratio = f" ({base / r['seconds']:.2f})" if base and name != "builtin" else ""
            star = "*" if r.get("plain_because") else ""
            cells.append(f"{r['seconds'] * 1e6:,.1f}{star}{ratio}")
        d = results.derive(by.get("fused", {}), roofs)
        body.append([size, *cells, f"{d['share_of_roof']:.0%}" if d else ""])
    dropout = f", dropout {p:g}" if p else ""
    text = f"**{op} over {sweep}, {dtype}{dropout}**\n\n" + table(
        ["size", *names, "fused: of the roof"], body
    )
    if any("*" in cell for row in body for cell in row):
        notes["* in no graph: Python's time too"] = None
    return text + ("\n\nWithout a time (-) and other notes: " + "; ".join(notes) if notes else "")
