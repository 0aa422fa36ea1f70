"""Times every provider of an op whose results are accurate enough.

    python -m benchmarks.ops                 the iron model's shape; without a GPU nano's
    python -m benchmarks.ops --sweeps        and along T, head dimension, batch and width

The accuracy check comes first: outputs and gradients are compared with eager in float64 by the
tolerance of irongpt_kernels.tolerance. Our kernels are not timed if they exceed it, and a baseline
is not timed if it exceeds it by far. A provider that uses another generator for its dropout mask
is checked without dropout.

Backward is timed alone on the graph of an earlier forward; `total` is forward + backward; an op
without a gradient has one mode, `call`. The bytes and FLOPs of a row are the least that the op
needs, not what a provider moved.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.measure import environment, result_file
from benchmarks.ops import cases as workloads
from benchmarks.ops.accuracy import AccuracyCheck, passes, tensors_of
from benchmarks.ops.cases import MODEL_SHAPES, Case, Inputs
from benchmarks.ops.providers import NAMES, Provider, computes, missing, providers
from irongpt import device as devices
from irongpt import timing
from irongpt.timing import Work, free, reason

ROUNDS = {"cuda": 20, "cpu": 9}
LARGE = 1 << 28  # elements of all T x T matrices, from which on one copy of the inputs will do:
# who has the matrices in memory moves many times the L2, for who has not, arithmetic decides
LEAN = ("fused", "flash-attn", "flash", "cudnn", "efficient", "builtin", "liger", "compile")
Row = dict[str, Any]


class Measured(NamedTuple):
    """peak: bytes of memory. cold: whether a call finds its inputs out of the L2 cache."""

    timing: timing.Timing
    peak: int | None
    cold: bool | None


def measure_case(
    case: Case, device: torch.device, names: tuple[str, ...] = NAMES, rounds: int | None = None
) -> list[Row]:
    """A row for every provider and mode; one that has no time says why."""
    try:
        with timing.stream(device):
            rows = _measure(case, device, names, rounds or ROUNDS[device.type])
    except Exception as e:  # the next case goes on
        here = [name for name in names if computes(name, case.op)]
        rows = [row(case, case.modes[-1], None, name, reason(e), None) for name in here]
    free(device)
    return rows


def compiled_here(case: Case, device: torch.device) -> bool:
    """Compiling takes longer than all else, so it is done where it tells most: at the model's own
    shape, and of the sweeps for attention and GELU. On a CPU, at the own shape and for GELU."""
    swept = case.op.startswith("causal_attention") and device.type == "cuda"
    return case.sweep in MODEL_SHAPES or case.op == "gelu" or swept


def _measure(case: Case, device: torch.device, names: tuple[str, ...], rounds: int) -> list[Row]:
    accuracy = AccuracyCheck(case, device)
    accuracies: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    here: dict[str, Provider] = {}
    if not compiled_here(case, device) and "compile" in names and computes("compile", case.op):
        names = tuple(name for name in names if name != "compile")
        refused["compile"] = "not compiled in this sweep: it would take longer than all else"
    for name, provider in providers(case, device, names).items():
        try:
            accuracies[name] = accuracy(name, provider.own_masks)
        except Exception as e:  # a backend that does not take this case
            refused[name] = reason(e)
            continue
        if passes(name, accuracies[name]):
            here[name] = provider
        else:
            refused[name] = (
                f"wrong: {accuracies[name]['share']:.2g} x the error that the tolerance allows"
            )
    del accuracy
    free(device)
    rows = []
    times: dict[str, Measured | str]
    for mode in case.modes:
        try:
            times = _times(case, device, here, mode, rounds)
        except torch.cuda.OutOfMemoryError as e:
            times = dict.fromkeys(here, f"{reason(e)}, by the inputs alone")
        for name, found in times.items():
            if isinstance(found, str):  # no other mode is tried
                refused[name] = found
                del here[name]
            else:
                rows.append(row(case, mode, here[name], name, found, accuracies[name]))
    for name, why in refused.items():
        rows.append(row(case, case.modes[-1], None, name, why, accuracies.get(name)))
    return rows


def _times(
    case: Case, device: torch.device, here: dict[str, Provider], mode: str, rounds: int
) -> dict[str, Measured | str]:
    inputs = [case.inputs(device)]
    cost = case.cost(mode)
    used = sum(x.nbytes for x in inputs[0].values())
    used = min(used, cost[0])  # an embedding reads a few rows of many
    sets = timing.copies(used, device)
    if case.shape.B * case.shape.H * case.shape.T**2 > LARGE:
        sets = 1
    inputs += [case.inputs(device, seed) for seed in range(1, sets)]
    # Those that need little memory first: what does not fit is what needs most.
    names = sorted(here, key=lambda n: LEAN.index(n) if n in LEAN else len(LEAN))
    upstream: list[list[Tensor]] = []
    if mode in ("backward", "total"):
        outputs, refused = _outputs(here, names, inputs[0])
        if outputs is None:
            return {name: refused[name] for name in here}
        upstream = [workloads.upstream(outputs) for _ in inputs]
        del outputs
    works = {name: work(here[name], mode, inputs, upstream) for name in names}
    timings = timing.measure(works, sets, device, rounds)
    moved = used if sets > 1 else cost[0]
    cold = timing.cold(sets * moved, device)
    found: dict[str, Measured | str] = {}
    for name, t in timings.items():
        peak = None if isinstance(t, str) else timing.peak_bytes(works[name], device)
        found[name] = t if isinstance(t, str) else Measured(t, peak, cold)
    return {name: found[name] for name in here}


def _outputs(
    here: dict[str, Provider], names: list[str], inputs: Inputs
) -> tuple[tuple[Tensor, ...] | None, dict[str, str]]:
    """Of the first provider that runs; where none does, why. A check without dropout lets pass who
    refuses with it."""
    refused = {}
    for name in names:
        try:
            with here[name].around():
                return tuple(x.detach() for x in tensors_of(here[name].function(inputs))), {}
        except Exception as e:
            refused[name] = reason(e)
    return None, refused


def work(provider: Provider, mode: str, inputs: list[Inputs], upstream: list[list[Tensor]]) -> Work:
    """A provider's calls in a mode. They return what stays: outputs and gradients."""
    leaves = [[x for x in one.values() if x.requires_grad] for one in inputs]

    def forward(i: int) -> tuple[Tensor, ...]:
        return tensors_of(provider.function(inputs[i]))

    def backward(outputs: tuple[Tensor, ...], i: int, again: bool = True) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves[i], upstream[i], retain_graph=again)

    def both(i: int) -> list[Tensor]:
        outputs = forward(i)
        return [*(x.detach() for x in outputs), *backward(outputs, i, again=False)]

    if mode == "backward":
        return Work(backward, forward, provider.around)
    if mode == "total":
        return Work(both, around=provider.around)
    return Work(lambda i: [x.detach() for x in forward(i)], around=provider.around)


def row(
    case: Case,
    mode: str,
    provider: Provider | None,
    name: str,
    found: Measured | str,
    accuracy: dict[str, Any] | None,
) -> Row:
    """All that is known of a provider, as the results hold it. Times are in seconds."""
    values: Row = {
        "op": case.op,
        "sweep": case.sweep,
        "shape": vars(case.shape),
        "size": case.size,
        "dtype": devices.dtype_name(case.dtype),
        "dropout": case.p if case.op in workloads.DROPS else 0.0,
        "mode": mode,
        "provider": name,
        "backend": provider.backend if provider else None,
        "accuracy": accuracy,
    }
    cost = case.cost(mode)
    values |= {"least_bytes": cost[0], "least_flops": cost[1]}
    if isinstance(found, str):
        return values | {"skipped_reason": found}
    t = found.timing
    return values | {
        "seconds": t.median,
        "iqr": t.iqr,
        "sample_seconds": t.samples,
        "graph": t.graph,
        "no_graph_reason": t.no_graph_reason,
        "group": t.group,
        "host_seconds": t.host,
        "peak_bytes": found.peak,
        "cold": found.cold,
    }


def line(r: Row, peak_rates: dict[str, Any]) -> str:
    """A row for a terminal."""
    head = f"{r['op']:24} {r['size']:24} {r['dtype']:8} {r['mode']:8} {r['provider']:10}"
    if "seconds" not in r:
        return f"{head} -  {result_file.short(r['skipped_reason'])}"
    derived = roofline.derive(r, peak_rates)
    share = f"{derived['share_of_peak']:6.1%} of the peak rate" if derived else ""
    if not r["accuracy"]["ok"]:
        share += f"  EXCEEDS THE TOLERANCE: {r['accuracy']['share']:.1f} x"
    spread = result_file.spread(r["iqr"], 1e6)
    plain = ""
    if r["no_graph_reason"]:
        plain = f"  NO GRAPH, Python's time: {result_file.short(r['no_graph_reason'])}"
    return f"{head} {r['seconds'] * 1e6:10.1f} us +- {spread:>6}  {share}{plain}"


def halves(device: torch.device) -> list[torch.dtype]:
    """The 16-bit types of a card, the one that it trains in first; a CPU's float32."""
    own = devices.precision("auto", device).dtype
    return [own, torch.float16] if own == torch.bfloat16 else [own]


def cases_of(device: torch.device, quick: bool = False, swept: tuple[str, ...] = ()) -> list[Case]:
    """The model's own shape in 16 bits and in float32, then the sweeps in 16 bits.

    quick: as iron trains on this card, in its own 16-bit type and with dropout, and no more.
    """
    gpu, own = device.type == "cuda", halves(device)
    types = list(dict.fromkeys([*own[: 1 if quick else None], torch.float32]))
    cases = workloads.own_cases(gpu, types, dropout_off=not quick)
    return cases + list(workloads.sweep_cases(gpu, own[: 1 if quick else None], swept))


@contextlib.contextmanager
def begun(
    section: result_file.Section, names: tuple[str, ...], types: list[torch.dtype]
) -> Iterator[None]:
    """The section that rows are added to. Peak rates are measured before and after the rows,
    because a hot GPU is slower."""
    device = section.device
    with section:
        section.put(missing=missing(device, names), rows=[])
        section.put(peak_rates=environment.peak_rates(device, types))
        yield
        if device.type == "cuda":
            section.put(peak_rates_after=environment.peak_rates(device, types))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="every op by every provider")
    parser.add_argument(
        "--sweeps", nargs="*", choices=workloads.SWEEPS, metavar="NAME", help="these, or all"
    )
    parser.add_argument("--ops", nargs="+", choices=workloads.OPS, default=workloads.OPS)
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rounds", type=int, help="samples of each [20, 9 on a CPU]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one 16-bit type and float32, iron's dropout, compiled in the former only",
    )
    result_file.add_options(parser)
    args = parser.parse_args(argv)
    device = devices.pick(args.device)
    swept = () if args.sweeps is None else tuple(args.sweeps) or workloads.SWEEPS
    cases = [case for case in cases_of(device, args.quick, swept) if case.op in args.ops]
    types = list(dict.fromkeys([case.dtype for case in cases]))
    section = result_file.Section("kernels", device, args)
    with begun(section, tuple(args.providers), types):
        for name, why in section.values["missing"].items():
            print(f"no {name}: {why}")
        for case in cases:
            names = tuple(args.providers)
            if args.quick and case.dtype != types[0]:
                names = tuple(name for name in names if name != "compile")
            rows = measure_case(case, device, names, args.rounds)
            if len(names) < len(args.providers) and computes("compile", case.op):
                why = f"not compiled in {devices.dtype_name(case.dtype)}: --quick"
                rows.append(row(case, case.modes[-1], None, "compile", why, None))
            for r in rows:
                print(line(r, section.values["peak_rates"]), flush=True)
            section.put(rows=section.values["rows"] + rows)
    print(f"written to {section.path}")


if __name__ == "__main__":
    main()
