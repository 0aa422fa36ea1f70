"""What two result files differ in, beyond the noise of both."""

from collections.abc import Iterator
from typing import Any

Values = dict[str, Any]
LEAST = 0.03  # of the time: less is not told, however quiet the card
Times = dict[tuple[str, ...], tuple[float, float | None]]

# By section, what names a row.
KEYS = {
    "kernels": ("op", "size", "dtype", "dropout", "mode", "provider"),
    "train": ("variant", "dtype"),
    "decode": ("ops", "way", "batch"),
}


def rows(values: Values, section: str) -> Times:
    """Seconds and their interquartile distance, None where nobody knows, by name."""
    found: Times = {}
    for r in values.get(section, {}).get("rows", []):
        seconds = r.get("seconds", r.get("seconds_a_token"))
        if seconds is not None:
            found[tuple(str(r[key]) for key in KEYS[section])] = (seconds, r.get("iqr"))
    return found


def changed(a: Values, b: Values) -> Iterator[tuple[str, tuple[str, ...], float, float]]:
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
    for key in ("name", "torch", "triton", "driver"):
        x, y = (_environment(values).get(key) for values in (a, b))
        if x != y:
            lines.append(f"NOTE: another {'device' if key == 'name' else key}: {x} and {y}")
    if found:
        lines += ["", "| change | before | after | what |", "|---|---|---|---|"]
    for section, name, x, y in found:
        word = f"{x / y:.2f}x faster" if y < x else f"{y / x:.2f}x slower"
        what = f"{section}: {', '.join(name)}"
        lines.append(f"| {word} | {_time(x)} | {_time(y)} | {what} |")
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
