"""The text and tables of the report, as Markdown."""

from collections.abc import Callable, Iterator

from benchmarks import roofline
from benchmarks.measure.result_file import Values, loss
from benchmarks.measure.rows import Row, StepRow, short, shown, spread
from benchmarks.ops.cases import TOTAL
from benchmarks.report.tables_kernels import dropout, kernels, table
from benchmarks.roofline import T4
from benchmarks.training import matmuls
from irongpt.config import PRESETS

NEEDED: dict[str, tuple[str, ...]] = {  # of a section: what it needs to be shown
    "kernels": ("rows", "peak_rates"),
    "train": ("rows", "peak_rates", "matmuls"),
    **dict.fromkeys(("decode", "runs", "target", "nano"), ("rows",)),
    "tokenizers": (),
    "scaling": ("sentence",),
}
SECTIONS = tuple(NEEDED)  # those with an environment each
LABELS = {  # how a variant of a training step runs: see benchmarks.training
    "graph": "CUDA graph",
    "as trained": "CUDA graph, deterministic",
    "compiled": "torch.compile",
    "compiled graph": "torch.compile, CUDA graph",
    "AdamW compiled": "AdamW, torch.compile",
    "max-autotune": "torch.compile, max-autotune",
}


def environment(values: Values) -> Values:
    """The machine of the first section."""
    for name in SECTIONS:
        if found := values.get(name, {}).get("environment"):
            return dict(found)
    return {}


def about(values: Values, name: str) -> str:
    """The machine and the software, and whether the driver limited the clocks."""
    e = environment(values)
    software = ("torch", "triton", "python", "driver", "cuda")
    versions = [f"{key} {e[key]}".replace("cuda", "CUDA") for key in software if e.get(key)]
    lines = [
        f"From `{name}`: commit `{e.get('commit')}`, {str(e.get('date'))[:10]}; "
        f"{', '.join(versions)}; {e.get('cpu')}, {e.get('threads')} threads."
    ]
    here = {section: values[section] for section in SECTIONS if section in values}
    every = [section.get("environment", {}) for section in here.values()]
    if any(one.get("interpreted") for one in every):
        lines.append(
            "> fused ran in Triton's interpreter: its times do not predict those of a GPU."
        )
    elif e.get("device") == "cpu":
        lines.append(
            "> These are CPU times, without our Triton kernels. Data that fits in the CPU's caches "
            "stays there, so a share of the copy bandwidth may exceed 100 %."
        )
    if any(one.get("emulated") for one in every):
        lines.append("> A newer GPU ran the code of a T4: these times do not predict a T4's.")
    for name, section in here.items():
        state = section.get("state") or {}
        if why := section.get("ended_by"):
            interrupted = why.startswith("KeyboardInterrupt")
            how = "interrupted" if interrupted else f"stopped by {short(why)}"
            lines.append(f"> {name}: {how}; its results up to then were saved.")
        if limits := state.get("throttled_by"):
            lines.append(f"> {name}: at times the driver limited the clocks: {', '.join(limits)}.")
        if state.get("before"):
            lines.append(f"- {name}: {_state(state)}")
    for name, key, when in (
        ("kernels", "peak_rates", "before the kernels"),
        ("kernels", "peak_rates_after", "after the kernels"),
        ("train", "peak_rates", "before the training steps"),
    ):
        if rates := here.get(name, {}).get(key):
            copy = f"{rates['copy_bytes_per_s'] / 1e9:,.4g} GB/s (read and written)"
            flops = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in rates["gemm_flops_per_s"].items())
            text = f"copy {copy}; large matmul, TFLOP/s: {flops}."
            lines.append(f"- Measured peak rates of this device, {when}: {text}")
    return "\n\n".join(lines)


def _state(state: Values) -> str:
    parts = [f"{state['seconds']:.0f} s"]
    for key, what, unit in (
        ("sm_mhz", "SM clock", "MHz"), ("watt", "power", "W"), ("celsius", "temperature", "°C")
    ):  # fmt: skip
        before, after = ((state.get(w) or {}).get(key) for w in ("before", "after"))
        known = (*state.get(f"{key}_from_to", (before, after)), before, after)
        low, high, begin, end = ("?" if x is None else f"{x:.0f}" for x in known)
        parts.append(f"{what} {low} to {high} {unit} ({begin} before, {end} after)")
    return ", ".join(parts)


def measured(values: Values) -> Values:
    """The values without the sections that broke off before their first result."""
    return {
        name: section
        for name, section in values.items()
        if all(section.get(key) for key in NEEDED.get(name, ()))
    }


def parts(values: Values) -> Iterator[tuple[str, str, str]]:
    """(name of the section, heading, Markdown). values: see `measured`."""
    makers: dict[str, tuple[str, Callable[[Values], str]]] = {
        "train": ("A training step", train),
        "target": ("Seconds to a validation loss", runs),
        "decode": ("Generation", decode),
        "kernels": ("Kernels", lambda section: f"{kernels(section)}\n\n## A T4\n\n{t4(values)}"),
        "runs": ("Runs from one seed", runs),
        "nano": ("On a CPU, against nanoGPT's own recipe", nano),
        "tokenizers": ("Tokenizers", tokenizers),
        "scaling": ("Several GPUs", lambda section: f"{section['sentence']}."),
        "stages": ("Stages", stages),
    }
    for name, (heading, make) in makers.items():
        if name in values:
            yield name, heading, make(values[name])


def tokenizers(section: Values) -> str:
    """The rows of benchmarks.tokenizers, a table for each of its parts."""
    parts = []
    for name in ("speed", "compressors", "runs", "trained"):
        if rows := section.get(name):
            cells = [[shown(value) for value in r.values()] for r in rows]
            parts.append(f"**{name}**\n\n{table([k.replace('_', ' ') for k in rows[0]], cells)}")
    return "\n\n".join(parts)


def baseline_of(variant: str) -> str:
    """The name of a variant's baseline: builtin, launched and compiled in the same way."""
    if variant.startswith("nanoGPT"):  # which has only AdamW
        return variant.replace("nanoGPT", "builtin AdamW")
    return " ".join(["builtin", *variant.split()[1:]])


def variant_label(variant: str) -> str:
    """A variant as the report names it, such as fused (CUDA graph)."""
    base, _, how = variant.partition(" ")
    return f"{base} ({LABELS.get(how, how)})" if how else base


def train(section: Values) -> str:
    """The part of the page about training steps."""
    parts = []
    for dtype, alone in section["matmuls"].items():
        rows = [r for r in section["rows"] if r.dtype == dtype]
        timed = sorted((r for r in rows if r.timed), key=lambda r: r.seconds)
        times = {r.variant: r.seconds for r in timed}
        body = [_step_cells(r, times, alone) for r in timed]
        body += [[variant_label(r.variant), *["-"] * 9, not_timed(r)] for r in rows if not r.timed]
        head = ["variant", "ms", "± ms", "times as fast as", "tokens/s", "MFU", "matmuls", "GiB"]
        text = (
            f"### {dtype}\n\nThe {section['preset']} preset, {section['batch_size']} sequences of "
            f"{section['model']['context']} a step. Its matmuls alone take "
            f"{alone['seconds'] * 1e3:.2f} ms, "
            f"{alone['flops'] / alone['seconds'] / 1e12:.3g} TFLOP/s."
        )
        if "optimizer" in alone:
            text += (
                f" Muon's iteration takes {alone['optimizer']['seconds'] * 1e3:.2f} ms more, in "
                "all but nanoGPT and those with AdamW."
            )
        peaks = section["peak_rates"]
        text += (
            " ± is the interquartile range, ? if there are too few samples."
            f" Computed lower bound, with all other bytes moved at copy bandwidth: "
            f"{alone['lower_bound_seconds'] * 1e3:.2f} ms. MFU is relative to "
            f"{peaks['peak'][dtype] / 1e12:.3g} TFLOP/s ({peaks['peak_from'][dtype]}). The column "
            "kernels counts kernels, copies and fills per step; launches counts the host's "
            "launches, a CUDA graph as one."
        )
        if section.get("nanogpt"):
            text += f" nanoGPT at {section['nanogpt'][:10]}."
        parts += [text, headline(times, alone), table([*head, "kernels", "launches", ""], body)]
    return "\n\n".join(part for part in parts if part)


def not_timed(row: Row) -> str:
    """The cell of a row without a time."""
    return f"not timed: {short(row.skipped_reason)}"


def _step_cells(r: StepRow, times: dict[str, float], alone: Values) -> list[str]:
    other = baseline_of(r.variant)
    note = [f"first call {r.first_seconds:.0f} s"]
    note += ["not interleaved with the first"] if r.group else []
    note += [f"stopped: {short(r.stop_reason)}"] if r.stop_reason else []
    ratio = ""
    if other in times and other != r.variant:
        ratio = f"{times[other] / r.seconds:.2f} {variant_label(other)}"
    return [
        variant_label(r.variant),
        f"{r.seconds * 1e3:.2f}",
        spread(r.iqr, 1e3),
        ratio,
        f"{r.tokens_per_s:,.0f}",
        f"{r.mfu:.1%}",
        f"{matmuls.of_step(alone, r.variant) / r.seconds:.0%}",
        f"{r.peak_bytes / 2**30:.2f}" if r.peak_bytes else "",
        str(r.kernels or ""),
        str(r.launches or ""),
        "; ".join(note),
    ]


def headline(times: dict[str, float], alone: Values) -> str:
    """A sentence: our fastest variant against the fastest of each group, and the lower bound.

    Those that are launched like ours, in a CUDA graph or one by one, come first, then the best of
    torch.compile, then nanoGPT.
    """
    labels = {name: variant_label(name) for name in sorted(times, key=lambda name: times[name])}
    best = next((name for name in labels if name.startswith("fused")), None)
    if best is None:
        return ""
    graph = [["builtin graph", "builtin as trained"], ["naive graph", "eager graph"]]
    launched = [["builtin"], ["naive", "eager"]]
    others = graph + launched if "graph" in labels[best] else launched + graph
    compiled = [name for name, label in labels.items() if "torch.compile" in label]
    others += [[name for name in compiled if not name.startswith(("fused", "nanoGPT"))]]
    others += [["nanoGPT", "nanoGPT compiled"]]
    said = []
    for names in others:
        if fastest := next((name for name in labels if name in names), None):
            ratio = times[fastest] / times[best]
            said.append(f"{ratio:.2f} times as fast as {labels[fastest]}")
    over = times[best] / alone["lower_bound_seconds"]
    said.append(f"and takes {over:.2f} times the computed lower bound")
    return f"Ours at its fastest, {labels[best]}, is {', '.join(said)}."


def decode(section: Values) -> str:
    """The part of the page about generation."""
    rows = []
    for r in section["rows"]:
        cells = ["-", "-", "-", not_timed(r)]
        if r.timed:
            steady = f"{r.steady_tokens_per_s:,.0f}" if r.steady_tokens_per_s else ""
            cells = [f"{r.tokens_per_s:,.0f}", steady, f"{r.seconds * 1e6:,.0f}"]
            cells.append("" if r.nodes is None else str(r.nodes))
        rows.append([f"{r.ops}, {r.way}", str(r.batch), *cells])
    text = f"The {section['preset']} model in {section['dtype']}, from one token to a full context."
    head = ["ops, way", "sequences", "tokens/s", "after the first", "us/token", "nodes/token"]
    return text + "\n\n" + table(head, rows)


def runs(section: Values) -> str:
    """The part of the page about complete training runs."""
    rows, head = [], ["run", "steps", "seconds", "tokens/s", "training loss", "validation loss"]
    per_byte = any(r.bits_per_byte is not None for r in section["rows"])
    head += ["bits per byte"] if per_byte else []
    for r in section["rows"]:
        if not r.timed:
            rows.append([r.run, *["-"] * (len(head) - 1), not_timed(r)])
            continue
        notes = [] if r.finite else ["STOPPED: the loss is not finite"]
        if r.target is not None:
            notes.append(f"{r.target} {'reached' if r.reached else 'not reached'}")
        cells = [r.run, str(r.steps), f"{r.seconds:.1f}", f"{r.tokens_per_s:,.0f}"]
        cells += [loss(curve[-1][2]) if curve else "" for curve in (r.curve, r.evaluated)]
        if per_byte:
            cells.append("" if r.bits_per_byte is None else f"{r.bits_per_byte:.3f}")
        rows.append([*cells, "; ".join(notes)])
    return f"On {section['text']}.\n\n" + table([*head, ""], rows)


def nano(section: Values) -> str:
    """The part of the page about nanoGPT's recipe on a CPU."""
    rows = [
        [r.name, f"{r.seconds:.1f}", f"{r.validation_loss:.3f}", f"{r.peak_rss_mb:.0f}"]
        for r in section["rows"]
    ]
    text = table(["run", "seconds", "validation loss", "MB at the peak"], rows)
    page = f"nanoGPT at {section.get('nanogpt', 'an unknown commit')}.\n\n{text}"
    if step := section.get("iron_step"):  # older files have it here, newer ones in "train"
        page += f"\n\nA step of the iron model, {step['batch']} sequences: "
        page += f"{step['irongpt_ms']} ms, nanoGPT's {step['nanogpt_ms']} ms."
    return page


def stages(section: Values) -> str:
    """How each stage of `make gpu` ended."""
    rows = [
        [name, s["status"], f"{s['seconds']:.0f}", s["says"].replace("|", "/")]
        for name, s in section.items()
    ]
    return table(["stage", "", "seconds", ""], rows)


def _t4_step(values: Values, preset: str) -> float | None:
    """Seconds of our step in float16, timed alone at the preset's size or in a complete run."""
    section = values.get("train", {})
    size = section.get("preset"), section.get("batch_size")
    if size == (preset, PRESETS[preset].train["batch_size"]):
        for r in section["rows"]:
            if r.timed and r.key == ("fused as trained", "float16"):
                return float(r.seconds)
    for r in values.get("target", {}).get("rows", []):
        if (r.preset, r.ops, r.dtype) == (preset, "fused", "float16") and r.steps > r.warm_steps:
            return float(r.seconds / (r.steps - r.warm_steps))
    return None


def t4(values: Values) -> str:
    """Lower bounds of a T4, and next to them the times if they were measured on one."""
    section = values["kernels"]
    steps = {f"a training step, {preset}": preset for preset in ("iron", "fast")}
    bounds = {name: roofline.t4_step(preset) for name, preset in steps.items()}
    times = {name: _t4_step(values, preset) for name, preset in steps.items()}
    for r in section["rows"]:
        if r.sweep == "iron" and r.dtype != "float32" and r.mode in TOTAL:
            name = f"{r.op}, {r.size}{dropout(r)}"
            bounds.setdefault(name, roofline.op_seconds(r, "float16", T4))
            if r.provider == "fused" and r.timed:
                times[name] = r.seconds

    if "T4" not in section["environment"]["name"].split():
        times.clear()
    rows = [
        [name, *("" if x is None else f"{x * 1e6:,.0f}" for x in (times.get(name), bound))]
        for name, bound in bounds.items()
    ]
    text = (
        "Times are in microseconds, in float16. The bound is computed, not measured: least bytes "
        f"at {T4['copy_bytes_per_s'] / 1e9:.0f} GB/s or FLOPs at "
        f"{T4['gemm_flops_per_s']['float16'] / 1e12:.0f} TFLOP/s, whichever is longer."
    )
    return text + "\n\n" + table(["op", "fused on a T4, measured", "bound, computed"], rows)
