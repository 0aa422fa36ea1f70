"""What two result files differ in, beyond the noise of both."""

from collections.abc import Iterator
from typing import Any

from benchmarks.measure import result_file

Values = dict[str, Any]
Name = tuple[str, ...]
Times = dict[Name, tuple[float, float | None]]

LEAST = 0.03  # of the time: smaller changes are not reported
LEAST_MEMORY = 0.01  # of the bytes, which an allocator rounds

# By section, what names a row: of times that were taken often enough to know their noise, ...
KEYS: dict[str, Name] = {
    "kernels": ("op", "sweep", "size", "dtype", "dropout", "mode", "provider"),
    "train": ("variant", "dtype"),
    "decode": ("ops", "way", "batch", "tokens"),
}
# ... and of whole trainings, of which there is one each.
TRAININGS: dict[str, Name] = {
    "target": ("run", "dtype"),
    "runs": ("run", "dtype"),
    "nano": ("name",),
}


# What makes a section another's work.
WORK = (
    *(("train", "preset"), ("train", "batch_size"), ("decode", "preset"), ("decode", "dtype")),
    *(("target", "text_sha256"), ("runs", "text_sha256")),
)


def named(values: Values, section: str, keys: Name) -> dict[Name, Values]:
    """The rows of a section that say all of `keys`."""
    found = values.get(section, {}).get("rows", [])
    return {tuple(str(r[key]) for key in keys): r for r in found if all(key in r for key in keys)}


def rows(values: Values, section: str) -> Times:
    """Seconds and their interquartile distance, None if unknown, by name."""
    found: Times = {}
    for name, r in named(values, section, KEYS[section]).items():
        seconds = r.get("seconds", r.get("seconds_per_token"))
        if seconds is not None:
            found[name] = (seconds, r.get("iqr"))
    return found


def memory(a: Values, b: Values) -> Iterator[tuple[str, Name, int, int]]:
    """(section, name, peak bytes in a, in b) where they differ by more than 1 %."""
    for section, keys in KEYS.items():
        before, after = named(a, section, keys), named(b, section, keys)
        for name in (name for name in before if name in after):
            x, y = (found[name].get("peak_bytes") for found in (before, after))
            if x is not None and y is not None and abs(y - x) > LEAST_MEMORY * x:
                yield section, name, x, y


def trainings(a: Values, b: Values) -> Iterator[str]:
    """A line for each whole training in both: seconds and validation loss, without a verdict."""
    for section, keys in TRAININGS.items():
        before, after = named(a, section, keys), named(b, section, keys)
        for name, x in before.items():
            if name in after and "seconds" in x and "seconds" in after[name]:
                y = after[name]
                losses = f"{_loss(x)} to {_loss(y)}"
                seconds = f"{x['seconds']:.1f} to {y['seconds']:.1f} s"
                yield f"{section}: {', '.join(name)}: {seconds}, validation loss {losses}"


def _loss(row: Values) -> str:
    evaluated = row.get("evaluated")
    loss = evaluated[-1][2] if evaluated else row.get("validation_loss")
    return result_file.loss(loss)


def changed(a: Values, b: Values) -> Iterator[tuple[str, Name, float, float]]:
    """(section, name, seconds in a, seconds in b) where they differ by more than the noise.

    The noise is the sum of both interquartile distances, and 3 % of the time at least. Where one of
    them is not known, nothing is said to differ: see `unknown`.
    """
    for section in KEYS:
        before, after = rows(a, section), rows(b, section)
        for name, (x, dx) in before.items():
            if name in after:
                y, dy = after[name]
                if dx is not None and dy is not None and abs(y - x) > max(dx + dy, LEAST * x):
                    yield section, name, x, y


def less_exact(values: Values) -> set[tuple[str, Name]]:
    """(section, name) of the times whose provider exceeds the tolerance."""
    return {
        (section, name)
        for section, keys in KEYS.items()
        for name, r in named(values, section, keys).items()
        if r.get("accuracy") and not r["accuracy"]["ok"]
    }


def unknown(a: Values, b: Values) -> int:
    """How many times are in both files, without their noise in one of them."""
    found = 0
    for section in KEYS:
        before, after = rows(a, section), rows(b, section)
        both = before.keys() & after.keys()
        found += sum(before[name][1] is None or after[name][1] is None for name in both)
    return found


def text(a: Values, b: Values, name_a: str, name_b: str) -> str:
    """A line for each change, the largest first, and what one file has and the other has not."""
    found = sorted(changed(a, b), key=lambda c: c[3] / c[2])
    total = sum(len(rows(a, s).keys() & rows(b, s).keys()) for s in KEYS)
    lines = [f"{name_b} against {name_a}: {len(found)} of {total} times differ beyond the noise"]
    if few := unknown(a, b):
        lines.append(f"NOTE: of {few} times the noise is not known, from too few samples")
    for key in ("name", "torch", "triton", "driver", "threads", "emulated", "interpreted", "tiles"):
        x, y = (_environment(values).get(key) for values in (a, b))
        if x != y:
            lines.append(f"NOTE: another {'device' if key == 'name' else key}: {x} and {y}")
    for section, key in WORK:
        x, y = (values.get(section, {}).get(key) for values in (a, b))
        if x != y and None not in (x, y):
            lines.append(f"NOTE: {section}: another {key}, {x} and {y}: not the same work")
    if found:
        lines += ["", "| change | before | after | what |", "|---|---|---|---|"]
    marked = less_exact(a) | less_exact(b)
    for section, name, x, y in found:
        word = f"{x / y:.2f}x faster" if y < x else f"{y / x:.2f}x slower"
        what = f"{section}: {', '.join(name)}{' †' if (section, name) in marked else ''}"
        lines.append(f"| {word} | {_time(x)} | {_time(y)} | {what} |")
    found_memory = sorted(memory(a, b), key=lambda c: c[3] - c[2])
    if found_memory:
        lines += ["", "| memory | before | after | what |", "|---|---|---|---|"]
    for section, name, p, q in found_memory:
        sizes = f"{p / 2**20:,.1f} MiB | {q / 2**20:,.1f} MiB"
        change = f"{q / p - 1:+.0%}" if p else "new"
        lines.append(f"| {change} | {sizes} | {section}: {', '.join(name)} |")
    if any((section, name) in marked for section, name, *_ in found):
        lines += ["", "†: exceeds the tolerance"]
    if once := list(trainings(a, b)):
        lines += ["", "Whole trainings, one of each, so their noise is not known:", *once]
    for s in KEYS:
        for one, other, word in ((a, b, "gone"), (b, a, "new")):
            only = sorted(rows(one, s).keys() - rows(other, s).keys())
            if only and s in a and s in b:
                shown = "; ".join(", ".join(name) for name in only[:3])
                lines.append(f"{word} in {s}: {len(only)} times ({shown}, ...)")
    return "\n".join(lines)


def _environment(values: Values) -> Values:
    for section in values.values():
        found = section.get("environment") if isinstance(section, dict) else None
        if isinstance(found, dict) and "name" in found:  # else variables that tests were given
            return dict(found)
    return {}


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
