"""A line for each section of a result file."""

import re
import statistics
from typing import Any

from benchmarks.measure import result_file
from benchmarks.ops.accuracy import passes

Values = dict[str, Any]


def stage(name: str, known: Values) -> str:
    """What a stage has found, from the file that it wrote to; empty where it has found nothing."""
    section = known.get(name)
    if section is None:
        return ""
    tell = {
        "doctor": _doctor,
        "tests": tests,
        "emulated": tests,
        "compare": _compare,
        "kernels": _kernels,
        "train": _train,
        "decode": _decode,
        "runs": _runs,
    }
    return tell[name](section) if name in tell else ""


def pytest_counts(lines: list[str]) -> dict[str, int]:
    """passed, failed, ... from pytest's last line of them."""
    for line in reversed(lines):
        found = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)\b", line)
        if found and re.search(r" in [\d.]+s", line):
            return {
                word.removesuffix("s") if word == "errors" else word: int(n) for n, word in found
            }
    return {}


def counts_line(counts: Values) -> str:
    words = ("passed", "failed", "error", "skipped")
    return ", ".join(f"{counts[w]} {w}" for w in words if counts.get(w)) or "nothing ran to its end"


def tests(section: Values) -> str:
    files = section["files"]
    total = {
        word: sum(f.get(word, 0) for f in files.values())
        for word in ("passed", "failed", "error", "skipped")
    }
    unfinished = [name for name, f in files.items() if f["status"] == "timed out"]
    text = counts_line(total)
    return text + (f"; not to their end: {', '.join(unfinished)}" if unfinished else "")


def _doctor(section: Values) -> str:
    return "; ".join(section["problems"])[:150] or "no problems"


def _compare(section: Values) -> str:
    bad = sum(not r["ok"] for r in section["rows"]) + sum(not c["ok"] for c in section["checks"])
    rows = len(section["rows"])
    return f"{'FAIL' if bad else 'ok'}: {rows} tensors, {len(section['checks'])} checks, {bad} bad"


def _kernels(section: Values) -> str:
    if not section["rows"]:
        return ""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}  # seconds of both, by provider
    for r in section["rows"]:
        times = cases.setdefault((r["op"], r["size"], r["dtype"], r["dropout"]), {})
        if "seconds" in r and r["mode"] == "total":
            times[r["provider"]] = r["seconds"]
    wrong = {
        f"{r['provider']} {r['op']}"
        for r in section["rows"]
        if r["accuracy"] and not passes(r["provider"], r["accuracy"])
    }
    ratios = {
        k: t["builtin"] / t["fused"] for k, t in cases.items() if {"builtin", "fused"} <= set(t)
    }
    text = f"{len(cases)} cases"
    if ratios:
        worst = min(ratios, key=lambda k: ratios[k])
        middle = statistics.median(ratios.values())
        text += (
            f"; fused {middle:.2f} times as fast as builtin in the middle, forward and backward, "
            f"{ratios[worst]:.2f} at worst ({worst[0]}, {worst[2]})"
        )
    return text + (f"; WRONG: {', '.join(sorted(wrong))}" if wrong else "")


def _train(section: Values) -> str:
    parts = []
    for dtype in dict.fromkeys(r["dtype"] for r in section["rows"]):
        rows = [r for r in section["rows"] if r["dtype"] == dtype and "seconds" in r]
        rows.sort(key=lambda r: r["seconds"])
        times = [f"{r['variant']} {r['seconds'] * 1e3:.3g} ms" for r in rows]
        parts.append(f"{dtype}: {', '.join(times)}")
    return "; ".join(parts)


def _decode(section: Values) -> str:
    return ", ".join(
        f"{r['ops']} {r['way']} {r['batch']}: "
        + (f"{r['tokens_per_s']:,.0f}/s" if "tokens_per_s" in r else r["skipped_reason"])
        for r in section["rows"]
    )


def _runs(section: Values) -> str:
    return ", ".join(
        f"{r['run']} {result_file.loss(r['curve'][-1][2])} after {r['steps']}"
        if r.get("curve")
        else f"{r['run']}: {r.get('skipped_reason', 'nothing')}"
        for r in section["rows"]
    )
