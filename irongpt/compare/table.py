"""The printed output of `irongpt compare`: the table, and the failures."""

import re
import textwrap
from collections import Counter

from irongpt_kernels.tolerance import GRADIENTS, OUTPUTS

from irongpt.compare.model import CHECKED_STEPS, Curve
from irongpt.compare.ops import Check, Row

WIDTH = 100  # columns


def heading(candidate: str) -> str:
    """Explains the columns and names them."""
    return (
        "error: largest difference from eager in float64; rms: root mean square difference\n"
        "x: relative to the error of eager in the same dtype\n"
        f"tolerance (tol.): {OUTPUTS} x eager's error for an output, {GRADIENTS} x for a gradient, "
        "plus one rounding error\n\n"
        f"  {'':8} {'':28} {'':>8} {'':>8}  {'error':>6} {'rms':>6} {'% of':>6}\n"
        f"  {'dtype':8} {'tensor':28} {candidate:>8} {'eager':>8}  {'x':>6} {'x':>6} {'tol.':>6}"
        "  worst at"
    )


def group(title: str, rows: list[Row], checks: list[Check]) -> str:
    """A title with the checks that passed, and a line for every tensor.

    For a parameter that every block of a model has, only the block nearest to its tolerance is
    shown; the JSON has all of them.
    """
    names = {c.name for c in checks} - {c.name for c in checks if not c.ok}
    notes = {
        "repeatable": "same bits in two runs",
        "dropout mask": "eager's dropout mask",
        "integers": "eager's integers",
    }
    passed = ", ".join(text for name, text in notes.items() if name in names)
    nearest: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.dtype, re.sub(r"blocks\.\d+", "blocks.*", row.tensor)
        if key not in nearest or not _share(row) <= _share(nearest[key]):
            nearest[key] = row
    lines = [_line(row) for row in nearest.values()]
    marks = [f"  {c.dtype:8} {c.name}: FAIL" for c in checks if not c.ok]
    return "\n".join(["", f"{title}{passed and '; '}{passed}", *lines, *marks])


def training(curve: Curve) -> str:
    """A training curve in one line."""
    steps, checked = len(curve.eager), curve.differences[:CHECKED_STEPS]
    part = f" (first {len(checked)}: {max(checked):.1e})" if len(checked) < steps else ""
    return (
        f"  {curve.dtype:8} trained {steps} steps, loss {curve.eager[0]:.3f} to "
        f"{curve.eager[-1]:.3f}; relative difference "
        f"{max(curve.differences):.1e}{part}"
    )


def failures(rows: list[Row], checks: list[Check], candidate: str) -> list[str]:
    """A few lines for every tensor that exceeds tolerance and every check that fails."""
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
        at, of_eager, exact = r.worst["candidate"], r.worst["eager"], r.worst["float64"]
        found.append(
            f"     worst at {_index(r)}: {candidate} {at:.8g}, eager {of_eager:.8g}, "
            f"float64 {exact:.8g}"
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
    return f"{verdict}: {len(rows) - len(bad)} of {len(rows)} tensors pass; {done}"


def _line(row: Row) -> str:
    largest, rms = row.errors["max"], row.errors["rms"]
    share = _share(row)
    used = f"{share:6.0%}" if share < 99 else f"{share:6.0e}"
    return (
        f"  {row.dtype:8} {row.tensor:28} {largest.candidate:8.1e} {largest.eager:8.1e}  "
        f"{_ratio(largest.ratio):>6} {_ratio(rms.ratio):>6} {used}  "
        f"{_index(row)}{'' if row.ok else '  FAIL'}"
    )


def _index(row: Row) -> str:
    return "[" + ",".join(map(str, row.worst["index"])) + "]"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1000 else f"{ratio:.0e}"


def _share(row: Row) -> float:
    """The error relative to the tolerance, by the worse norm."""
    return max(e.share for e in row.errors.values())
