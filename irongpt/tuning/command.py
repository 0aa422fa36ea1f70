"""`irongpt tune`: launch options of the kernels, measured on this GPU. Only where it is asked for.

A kernel's candidates, and what is shipped, run the same op of a training of the preset: first on a
small batch, where what is beyond the numeric rule is out, then compiled as launched, where what
spills or does not fit is out, then timed in turns. The fastest is timed once more against what is
shipped, and is kept if it is faster beyond the noise both times.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from irongpt_kernels import Ops
from irongpt_kernels.runtime import emulate, launch_table

from irongpt import device as devices
from irongpt import launch_cache as cache
from irongpt import ops
from irongpt.config import PRESETS, GPTConfig, check
from irongpt.console import say
from irongpt.tuning.timing import Clock, Gpu, Launch, beats, in_turns
from irongpt.tuning.workload import FUNCTIONS, Gate, Work

SHIPPED = 0  # the number of what is shipped, among the candidates
ROUNDS, CALLS = 15, 20
QUICK_ROUNDS, QUICK_CALLS = 6, 10
QUICK_EVERY = 3  # candidates of which one is measured


@dataclass(frozen=True)
class Row:
    """A candidate. out: why it was not timed. samples: seconds."""

    options: launch_table.Options | None  # None: as shipped
    samples: tuple[float, ...] = ()
    out: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def tune(device: str, preset: str, dtype: str, quick: bool) -> int:
    """Measures every kernel that has a choice, prints what came out and keeps the winners."""
    target = devices.pick(device)
    check(
        target.type == "cuda",
        "irongpt tune measures on an NVIDIA GPU, and there is none: the tiles that are shipped "
        "need no tuning",
    )
    check(
        not emulate.on(),
        f"{emulate.VARIABLE} is set: what this GPU measures is nothing for a T4, unset it",
    )
    check(
        cache.wanted(), f"{cache.VARIABLE}=off is set: what is measured would not be used, unset it"
    )
    model = GPTConfig(vocab_size=1, **PRESETS[preset].model)
    chosen = devices.precision(dtype, target).dtype
    module = ops.load("fused", target, model)
    batch = int(PRESETS[preset].train["batch_size"])
    calls, rounds = (QUICK_CALLS, QUICK_ROUNDS) if quick else (CALLS, ROUNDS)
    name = devices.dtype_name(chosen)
    say(f"tuning for {preset}, {batch} windows in {name}, on {devices.describe(target)}")
    say("minutes, most of them for compiling; the device should have nothing else to do")
    entries = list(cache.load(target).entries)
    clock = Gpu(target, calls)
    for kernel in FUNCTIONS:
        work = Work(kernel, model, batch, chosen, target)
        rows = measure(work, module, clock, candidates(work, quick), rounds)
        say("\n" + table(work, rows))
        entries = updated(entries, work, rows)
    file = cache.save(target, entries)
    if entries:
        digest = launch_table.table_digest(launch_table.table_of(entries))
        say(f"\nkept in {file}: table {digest}, for all that starts from now on; other tiles add")
        say(f"up in another order. {cache.VARIABLE}=off runs what is shipped, and so does no file")
    else:
        say("\nnothing is faster than what is shipped beyond the noise: nothing is kept")
    return 0


def candidates(work: Work, quick: bool = False) -> list[launch_table.Options]:
    """What may be launched in place of what is shipped."""
    from irongpt_kernels.aot import tiles
    from irongpt_kernels.runtime import launch

    found = tiles.launches(work.key, launch.architecture(work.device))
    return found[::QUICK_EVERY] if quick else found


def measure(
    work: Work, module: Ops, clock: Clock, found: list[launch_table.Options], rounds: int
) -> list[Row]:
    """A row for what is shipped, and one for each candidate. Leaves what is shipped in use."""
    gate, inputs = Gate(work), [work.inputs(work.batch)]
    rows: list[Row] = []
    launches: dict[int, list[Launch]] = {}
    try:
        for number, options in enumerate([None, *found]):
            launch_table.use(work.device, {} if options is None else {work.key: options})
            row = Row(options)
            try:
                launches[number] = _prepared(work, module, clock, gate, inputs)
            except Exception as e:  # a candidate that cannot run is a result
                check(number != SHIPPED, f"{work.kernel} as it is shipped: {_brief(e)}")
                row = replace(row, out=_brief(e))
            rows.append(row)
    finally:
        launch_table.use(work.device, {})
    samples = in_turns(clock, launches, rounds)
    rows = [replace(row, samples=tuple(samples.get(i, ()))) for i, row in enumerate(rows)]
    best = fastest(rows)
    if best == SHIPPED or not beats(list(rows[best].samples), list(rows[SHIPPED].samples)):
        return rows
    # The least of many medians is low by luck too: it has to be shown without the others.
    again = in_turns(clock, {i: launches[i] for i in (SHIPPED, best)}, 2 * rounds)
    for i, seen in again.items():
        rows[i] = replace(rows[i], samples=tuple(seen))
    return rows


def _prepared(
    work: Work, module: Ops, clock: Clock, gate: Gate, inputs: list[dict[str, torch.Tensor]]
) -> list[Launch]:
    """A launch for each copy of the inputs. Raises for what is wrong, spills or cannot run."""
    if beyond := gate.wrong(module):
        raise _Out(f"beyond the rule in {', '.join(beyond)}")
    kernel = FUNCTIONS[work.kernel]
    first = clock.record(lambda: work.run(module, inputs[0]), kernel)
    shipped = launch_table.digest(work.device) == ""
    if first.spilled and not shipped:
        raise _Out(f"spills {first.spilled} bytes")
    while len(inputs) < clock.copies(first.bytes):
        inputs.append(work.inputs(work.batch, seed=len(inputs)))
    rest = [clock.record(lambda x=x: work.run(module, x), kernel) for x in inputs[1:]]  # type: ignore[misc]
    return [first, *rest]


class _Out(Exception):  # noqa: N818
    pass


def _brief(e: Exception) -> str:
    text = str(e) if isinstance(e, _Out) else f"{type(e).__name__}: {e}"
    return " ".join(text.split())[:100]


def fastest(rows: list[Row]) -> int:
    return min((i for i, row in enumerate(rows) if row.samples), key=lambda i: rows[i].median)


def winner(rows: list[Row]) -> Row | None:
    """The fastest, where it beats what is shipped beyond the noise."""
    best, shipped = rows[fastest(rows)], rows[SHIPPED]
    return (
        best if best is not shipped and beats(list(best.samples), list(shipped.samples)) else None
    )


def updated(entries: list[dict[str, Any]], work: Work, rows: list[Row]) -> list[dict[str, Any]]:
    """The entries with what was found for a kernel in place of what they had for it."""
    names = ("kernel", "size", "itemsize")
    kept = [e for e in entries if tuple(e[name] for name in names) != work.key]
    if (best := winner(rows)) is not None:
        times = dict(us=1e6 * best.median, shipped_us=1e6 * rows[SHIPPED].median)
        kept.append(
            dict(zip(names, work.key, strict=True))
            | dict(options=best.options)
            | {name: round(x, 2) for name, x in times.items()}
        )
    return kept


def table(work: Work, rows: list[Row]) -> str:
    """The fastest first, then what was not timed."""
    kernel, size, _ = work.key
    what = "head dimension" if kernel.startswith("attention") else "columns"
    lines = [f"{kernel}, {what} {size}: us, of the shipped one's"]
    shipped, best = rows[SHIPPED], winner(rows)
    for row in sorted((r for r in rows if r.samples), key=lambda r: r.median):
        mark = "  kept" if row is best else ""
        ratio = row.median / shipped.median
        lines.append(f"  {_named(row):44} {1e6 * row.median:9.2f} {ratio:6.2f}{mark}")
    lines += [f"  {_named(row):44} {row.out}" for row in rows if row.out]
    return "\n".join(lines)


def _named(row: Row) -> str:
    if row.options is None:
        return "as shipped"
    short = dict(
        BLOCK_M="M", BLOCK_N="N", num_warps="warps", num_stages="stages", maxnreg="registers"
    )
    return ", ".join(f"{short.get(k, k)} {v}" for k, v in row.options.items())
