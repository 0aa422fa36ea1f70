"""The words and tables of the report, as Markdown."""

from collections.abc import Iterator
from typing import Any

from benchmarks import roofline
from benchmarks.measure import result_file
from benchmarks.ops.cases import TOTAL
from benchmarks.report.tables_kernels import dropout, kernels, table
from benchmarks.report.tables_train import decode, runs, train
from benchmarks.roofline import T4
from irongpt.config import PRESETS

Values = dict[str, Any]

SECTIONS = ("kernels", "train", "decode", "runs", "target", "nano")  # with an environment each


def environment(values: Values) -> Values:
    for name in SECTIONS:
        if name in values:
            return dict(values[name]["environment"])
    return {}


def title(values: Values) -> str:
    return f"IronGPT on {environment(values).get('name', 'an unknown device')}"


def about(values: Values, name: str) -> str:
    """What it was measured on, and whether the card was held back."""
    e = environment(values)
    software = ", ".join(f"{k} {e[k]}" for k in ("torch", "triton", "python") if e.get(k))
    card = "".join(
        f", {k} {e[key]}" for k, key in (("driver", "driver"), ("CUDA", "cuda")) if e.get(key)
    )
    lines = [
        f"From `{name}`: commit `{e.get('commit')}`, {str(e.get('date'))[:10]}; {software}{card}; "
        f"{e.get('cpu')}, {e.get('threads')} threads."
    ]
    every = [values[name].get("environment", {}) for name in SECTIONS if name in values]
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
    for section in SECTIONS:
        if why := values.get(section, {}).get("ended_by"):
            lines.append(f"> {section}: broke off before its end ({result_file.short(why)}).")
        state = values.get(section, {}).get("state") or {}
        if state.get("throttled_by"):
            lines.append(
                f"> {section}: the card was held back by {', '.join(state['throttled_by'])}."
            )
        if state.get("before"):
            lines.append(f"- {section}: {_state(state)}")
    for section, key, when in (
        ("kernels", "peak_rates", "before the kernels"),
        ("kernels", "peak_rates_after", "after the kernels"),
        ("train", "peak_rates", "before the training steps"),
    ):
        peak_rates = values.get(section, {}).get(key)
        if peak_rates:
            rates = ", ".join(
                f"{k} {v / 1e12:.3g}" for k, v in peak_rates["gemm_flops_per_s"].items()
            )
            lines.append(
                f"- Measured peak rates of this device, {when}: copy "
                f"{peak_rates['copy_bytes_per_s'] / 1e9:,.4g} GB/s (read and written); large "
                f"matmul, TFLOP/s: {rates}."
            )
    return "\n\n".join(lines)


def _state(state: Values) -> str:
    parts = [f"{state['seconds']:.0f} s"]
    for key, unit in (("sm_mhz", "MHz"), ("watt", "W"), ("celsius", "degrees C")):
        before, after = ((state.get(w) or {}).get(key) for w in ("before", "after"))
        low, high = state.get(f"{key}_from_to", (before, after))
        parts.append(f"{low} to {high} {unit} ({before} before, {after} after)")
    return ", ".join(parts)


def measured(values: Values) -> Values:
    """Without sections that broke off before they had anything to tell."""
    needed = {"kernels": ("rows", "peak_rates"), "train": ("rows", "peak_rates", "matmuls")}
    needed |= {name: ("rows",) for name in SECTIONS if name not in needed}
    empty = {
        name
        for name, keys in needed.items()
        if name in values and not all(values[name].get(key) for key in keys)
    }
    return {name: section for name, section in values.items() if name not in empty}


def sections(values: Values) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(heading, Markdown, names of the pictures that belong there). values: see `measured`."""
    if "train" in values:
        yield "A training step", train(values["train"]), ("step", "memory")
    if "target" in values:
        yield "Seconds to a validation loss", runs(values["target"]), ("target",)
    if "decode" in values:
        yield "Generation", decode(values["decode"]), ()
    if "kernels" in values:
        pictured = ("speedup", "speedup-calls", "roofline", "sweep-T", "memory-T")
        yield "Kernels", kernels(values["kernels"]), pictured
        yield "A T4", t4(values), ()
    if "runs" in values:
        yield "Runs from one seed", runs(values["runs"]), ("runs",)
    if "nano" in values:
        yield "On a CPU, against nanoGPT's own recipe", nano(values["nano"]), ()
    if "stages" in values:
        yield "Stages", stages(values), ()


def nano(section: Values) -> str:
    step = section["iron_step"] or dict.fromkeys(("batch", "irongpt_ms", "nanogpt_ms"), "?")
    rows = [
        [r["name"], f"{r['seconds']:.1f}", f"{r['validation_loss']:.3f}", f"{r['peak_rss_mb']:.0f}"]
        for r in section["rows"]
    ]
    text = table(["run", "seconds", "validation loss", "MB at the peak"], rows)
    return f"nanoGPT at {section.get('nanogpt', 'an unknown commit')}.\n\n{text}\n\n" + (
        f"A step of the iron model, {step['batch']} sequences: {step['irongpt_ms']} ms, nanoGPT's "
        f"{step['nanogpt_ms']} ms."
    )


def stages(values: Values) -> str:
    rows = [
        [name, s["status"], f"{s['seconds']:.0f}", s["says"].replace("|", "/")]
        for name, s in values["stages"].items()
    ]
    return table(["stage", "", "seconds", ""], rows)


def is_t4(section: Values) -> bool:
    return "T4" in section["environment"]["name"].split()


def _step(values: Values, preset: str) -> float | None:
    """Seconds of a step of ours in float16, as trained: measured alone, or in a whole training."""
    section = values.get("train", {})
    usual = (preset, PRESETS[preset].train["batch_size"])
    own = (section.get("preset"), section.get("batch_size")) == usual
    for r in section.get("rows", []) if own else []:
        if (r["variant"], r["dtype"]) == ("fused as trained", "float16") and "seconds" in r:
            return float(r["seconds"])
    for r in values.get("target", {}).get("rows", []):
        key = (r["preset"], r["ops"], r.get("dtype"))
        if key == (preset, "fused", "float16") and r["steps"] > r["warm_steps"]:
            return float(r["seconds"] / (r["steps"] - r["warm_steps"]))
    return None


def t4(values: Values) -> str:
    """Measured nowhere but on a T4: elsewhere the column is empty, beside it what is computed."""
    section = values["kernels"]
    here = is_t4(section)
    known: dict[tuple[str, str, float], Values] = {}
    for r in section["rows"]:
        if r["sweep"] == "iron" and r["dtype"] != "float32" and r["mode"] in TOTAL:
            slot = known.setdefault((r["op"], r["size"], r["dropout"]), dict(r, fused=None))
            if r["provider"] == "fused" and here:
                slot["fused"] = r.get("seconds")
    rows = []
    for preset in ("iron", "fast"):
        step = _step(values, preset) if here else None
        bound = roofline.t4_step(preset)
        cells = ["" if x is None else f"{x * 1e6:,.0f}" for x in (step, bound)]
        rows.append([f"a training step, {preset}", *cells])
    for (op, size, p), r in known.items():
        if "least_bytes" not in r:
            continue
        bound = roofline.op_seconds(r, "float16", T4)
        measured = f"{r['fused'] * 1e6:,.0f}" if r["fused"] else ""
        rows.append([f"{op}, {size}{dropout(op, p)}", measured, f"{bound * 1e6:,.0f}"])
    text = (
        "Times are in microseconds, in float16. The bound is computed, not measured: least bytes "
        f"at {T4['copy_bytes_per_s'] / 1e9:.0f} GB/s or FLOPs at "
        f"{T4['gemm_flops_per_s']['float16'] / 1e12:.0f} TFLOP/s, whichever is longer."
    )
    return text + "\n\n" + table(["op", "fused on a T4, measured", "bound, computed"], rows)
