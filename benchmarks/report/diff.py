"""The differences between two result files that exceed the noise of both."""

import math
from typing import Any

from benchmarks.measure.result_file import Values, loss
from benchmarks.measure.rows import Row
from benchmarks.report.tables import environment
from benchmarks.report.tables_kernels import table

Name = tuple[str, ...]  # the section of a row, then its key

LEAST = 0.03  # share of the time: smaller changes are not reported
LEAST_MEMORY = 0.01  # share of the bytes, which an allocator rounds
SAMPLED = ("kernels", "train", "decode")  # sections whose rows have enough samples for the noise
MEASURED = ("kernels", "train")  # those whose rows have a peak of the memory
RUNS = ("target", "runs", "nano")  # sections with one sample in a row
WORK = (  # keys whose values must be equal in the sections of both files
    *(("train", "preset"), ("train", "batch_size"), ("decode", "preset"), ("decode", "dtype")),
    *(("target", "text_sha256"), ("runs", "text_sha256")),
)


def rows(values: Values, *sections: str) -> dict[Name, Any]:
    """The rows that have a time, by name."""
    return {
        (name, *row.key): row
        for name in sections
        for row in values.get(name, {}).get("rows", [])
        if row.timed
    }


def pairs(a: Values, b: Values, *sections: str) -> dict[Name, tuple[Any, Any]]:
    """The rows that have a time in both files."""
    before, after = rows(a, *sections), rows(b, *sections)
    return {name: (before[name], after[name]) for name in before if name in after}


def differs(x: Row, y: Row) -> bool:
    """Whether two times differ by more than the noise: the sum of both interquartile ranges, and
    at least 3 % of the time. False if a range is not known."""
    change = abs(y.seconds - x.seconds)
    return change > x.iqr + y.iqr and change > LEAST * x.seconds


def text(a: Values, b: Values, name_a: str, name_b: str) -> str:
    """A line for each change, the largest first, and the times that only one file has."""
    both = pairs(a, b, *SAMPLED)
    changed = [(name, x, y) for name, (x, y) in both.items() if differs(x, y)]
    count = f"{len(changed)} of {len(both)} times"
    lines = [f"{name_b} against {name_a}: {count} differ beyond the noise"]
    if few := sum(math.isnan(x.iqr + y.iqr) for x, y in both.values()):
        lines.append(f"NOTE: of {few} times the noise is not known, from too few samples")
    for key in ("name", "torch", "triton", "driver", "threads", "emulated", "interpreted", "tiles"):
        one, other = (environment(values).get(key) for values in (a, b))
        if one != other:
            what = "device" if key == "name" else key
            lines.append(f"NOTE: another {what}: {one} and {other}")
    for section, key in WORK:
        one, other = (values.get(section, {}).get(key) for values in (a, b))
        if one != other and None not in (one, other):
            lines.append(f"NOTE: {section}: another {key}, {one} and {other}: not the same work")
    times = []
    for name, x, y in sorted(changed, key=lambda c: c[2].seconds / c[1].seconds):
        ratio = y.seconds / x.seconds
        word = f"{1 / ratio:.2f}x faster" if ratio < 1 else f"{ratio:.2f}x slower"
        exceeds = any(getattr(row, "exceeds_tolerance", False) for row in (x, y))
        what = _shown(name) + (" †" if exceeds else "")
        times.append([word, _time(x.seconds), _time(y.seconds), what])
    peaks = {}  # bytes in a and in b, by name
    for name, (x, y) in pairs(a, b, *MEASURED).items():
        if None not in (x.peak_bytes, y.peak_bytes):
            peaks[name] = x.peak_bytes, y.peak_bytes
    memory = []
    for name, (x, y) in sorted(peaks.items(), key=lambda peak: peak[1][1] - peak[1][0]):
        if abs(y - x) > LEAST_MEMORY * x:
            change = f"{y / x - 1:+.0%}" if x else "new"
            memory.append([change, f"{x / 2**20:,.1f} MiB", f"{y / 2**20:,.1f} MiB", _shown(name)])
    for what, cells in (("change", times), ("memory", memory)):
        if cells:
            lines += ["", table([what, "before", "after", "what"], cells)]
    if any("†" in cells[-1] for cells in times):
        lines += ["", "†: exceeds the tolerance"]
    if complete := pairs(a, b, *RUNS):
        lines += ["", "Complete training runs, one of each, so their noise is not known:"]
    for name, (x, y) in complete.items():
        losses = f"{loss(x.validation_loss)} to {loss(y.validation_loss)}"
        seconds = f"{x.seconds:.1f} to {y.seconds:.1f} s"
        lines.append(f"{_shown(name)}: {seconds}, validation loss {losses}")
    for section in (s for s in SAMPLED if s in a and s in b):
        for one, other, word in ((a, b, "gone"), (b, a, "new")):
            only = sorted(rows(one, section).keys() - rows(other, section).keys())
            if only:
                shown = "; ".join(", ".join(name[1:]) for name in only[:3])
                lines.append(f"{word} in {section}: {len(only)} times ({shown}, ...)")
    return "\n".join(lines)


def _shown(name: Name) -> str:
    return f"{name[0]}: {', '.join(name[1:])}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
