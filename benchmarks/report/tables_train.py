"""The tables of training and writing: steps, tokens, whole runs."""

from typing import Any

from benchmarks.measure import result_file
from benchmarks.report.tables_kernels import table
from benchmarks.training import matmuls

Values = dict[str, Any]


def alike(variant: str) -> str:
    """Whom a variant is compared with: builtin, launched and compiled in the same way."""
    if variant.startswith("nanoGPT"):  # which has no other optimizer
        return variant.replace("nanoGPT", "builtin AdamW")
    return " ".join(["builtin", *variant.split()[1:]])


def train(section: Values) -> str:
    parts = []
    model, peaks = section["model"], section["peak_rates"]
    for dtype, alone in section["matmuls"].items():
        rows = [r for r in section["rows"] if r["dtype"] == dtype]
        times = {r["variant"]: r["seconds"] for r in rows if "seconds" in r}
        body = []
        for r in sorted(rows, key=lambda r: r.get("seconds") or 1e9):
            if r.get("seconds") is None:
                body.append(
                    [r["variant"], *["-"] * 9, result_file.short(r.get("skipped_reason", ""))]
                )
                continue
            other = alike(r["variant"])
            note = [f"first call {r['first_seconds']:.0f} s"]
            note += ["not interleaved with the first"] if r.get("group") else []
            if "stop_reason" in r:
                note.append(f"stopped: {result_file.short(r['stop_reason'])}")
            body.append(
                [
                    r["variant"],
                    f"{r['seconds'] * 1e3:.2f}",
                    result_file.spread(r["iqr"], 1e3),
                    f"{times[other] / r['seconds']:.2f} {other}"
                    if other in times and other != r["variant"]
                    else "",
                    f"{r['tokens_per_s']:,.0f}",
                    f"{r['mfu']:.1%}",
                    f"{matmuls.of_step(alone, r['variant']) / r['seconds']:.0%}",
                    f"{r['peak_bytes'] / 2**30:.2f}" if r.get("peak_bytes") else "",
                    str(r.get("kernels") or ""),
                    str(r.get("launches") or ""),
                    "; ".join(note),
                ]
            )
        head = ["variant", "ms", "± ms", "times as fast as", "tokens/s", "MFU", "matmuls", "GiB"]
        head += ["kernels", "launches", ""]
        text = (
            f"### {dtype}\n\nThe {section['preset']} preset, {section['batch_size']} sequences of "
            f"{model['context']} a step. Its matmuls alone take "
            f"{alone['seconds'] * 1e3:.2f} ms, "
            f"{alone['flops'] / alone['seconds'] / 1e12:.3g} TFLOP/s."
        )
        if "optimizer" in alone:
            text += (
                f" Muon's iteration takes {alone['optimizer']['seconds'] * 1e3:.2f} ms more, in "
                "all but nanoGPT and builtin AdamW."
            )
        if "lower_bound_seconds" in alone:
            text += (
                f" Computed lower bound, with all other bytes moved at copy bandwidth: "
                f"{alone['lower_bound_seconds'] * 1e3:.2f} ms."
            )
        text += (
            f" MFU is relative to {peaks['peak'][dtype] / 1e12:.3g} TFLOP/s "
            f"({peaks['peak_from'][dtype]}). The column kernels counts kernels, "
            "copies and fills per step; launches counts the host's launches, a CUDA graph as one."
        )
        if section.get("nanogpt"):
            text += f" nanoGPT at {section['nanogpt']}."
        parts += [text, figures(times, alone), table(head, body)]
    return "\n\n".join(part for part in parts if part)


def figures(times: dict[str, float], alone: Values) -> str:
    """What our step is to be measured by: our fastest against each way that others have."""
    ours = {name: t for name, t in times.items() if name.startswith("fused")}
    if not ours:
        return ""
    best = min(ours, key=lambda name: ours[name])
    others = {
        "naive": ("naive", "eager"),
        "naive in a CUDA graph": ("naive graph", "eager graph"),
        "PyTorch's fused functions": ("builtin",),
        "those in a CUDA graph": ("builtin graph", "builtin as trained"),
        "the best of torch.compile": [
            name for name in times
            if not name.startswith("fused") and ("compiled" in name or "autotune" in name)
        ],
        "nanoGPT": ("nanoGPT", "nanoGPT compiled"),
    }  # fmt: skip
    said = []
    for what, names in others.items():
        known = [name for name in names if name in times]
        if known:
            fastest = min(known, key=lambda name: times[name])
            said.append(f"{times[fastest] / ours[best]:.2f} times as fast as {what} ({fastest})")
    if "lower_bound_seconds" in alone:
        over = ours[best] / alone["lower_bound_seconds"]
        said.append(f"{over:.2f} times the computed lower bound")
    return f"Ours at its fastest, {best}, is " + ", ".join(said) + "."


def decode(section: Values) -> str:
    rows = []
    for r in section["rows"]:
        name = [f"{r['ops']}, {r['way']}", str(r["batch"])]
        if "skipped_reason" in r:
            rows.append([*name, *["-"] * 3, result_file.short(r["skipped_reason"])])
            continue
        steady = r.get("steady_tokens_per_s")
        rates = [f"{r['tokens_per_s']:,.0f}", f"{steady:,.0f}" if steady else ""]
        rows.append(
            [*name, *rates, f"{r['seconds_per_token'] * 1e6:,.0f}", str(r.get("nodes", ""))]
        )
    text = f"The {section['preset']} model in {section['dtype']}, from one token to a full window."
    head = ["ops, way", "sequences", "tokens/s", "after the first", "us/token", "nodes/token"]
    return text + "\n\n" + table(head, rows)


def runs(section: Values) -> str:
    rows = []
    for r in section["rows"]:
        if "skipped_reason" in r:
            rows.append([r["run"], *["-"] * 5, result_file.short(r["skipped_reason"])])
            continue
        last = r["evaluated"][-1] if r["evaluated"] else None
        notes = [] if r["finite"] else ["STOPPED: the loss is not finite"]
        if r["target"] is not None:
            notes.append(f"{r['target']} {'reached' if r['reached'] else 'not reached'}")
        rows.append(
            [
                r["run"],
                str(r["steps"]),
                f"{r['seconds']:.1f}",
                f"{r['tokens_per_s']:,.0f}",
                result_file.loss(r["curve"][-1][2]) if r["curve"] else "",
                result_file.loss(last[2]) if last else "",
                "; ".join(notes),
            ]
        )
    head = ["run", "steps", "seconds", "tokens/s", "training loss", "validation loss", ""]
    return f"On {section['text']}.\n\n" + table(head, rows)
