"""Times every op in every implementation (provider) whose results are accurate enough.

    python -m benchmarks.ops                 the iron model's shape; without a GPU nano's
    python -m benchmarks.ops --sweeps        also for other T, head dimensions D, batch sizes,
                                             widths and vocabularies V

The accuracy check comes first: outputs and gradients are compared with eager in float64 by the
tolerance of irongpt_kernels.tolerance. Our kernels are not timed if they exceed it, and a baseline
is not timed if it exceeds it by far. A provider that uses another generator for its dropout mask
is checked without dropout.

Backward is timed alone on the graph of an earlier forward; `total` is forward + backward; an op
without a gradient has one mode, `call`. The bytes and FLOPs of a row are the least that the op
needs, not those of the provider.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from irongpt_kernels import op_inputs
from torch import Tensor

from benchmarks import roofline
from benchmarks.measure import environment, result_file
from benchmarks.measure.rows import Accuracy, KernelRow, short
from benchmarks.ops.accuracy import AccuracyCheck, passes, tensors_of
from benchmarks.ops.cases import MODEL_SHAPES, OPS, SWEEPS, Case, Inputs, cases_of, dtypes_of
from benchmarks.ops.providers import NAMES, Provider, computes, missing, providers
from irongpt import device as devices
from irongpt import timing
from irongpt.timing import Work, free, reason

ROUNDS = {"cuda": 20, "cpu": 9}
# From so many elements of all T x T matrices on there is one copy of the inputs: a provider that
# stores the matrices moves far more than the L2 cache holds, and the others are compute-bound.
LARGE = 1 << 28
# Providers that need little memory come first, so that those that need most do not fit.
LEAN = ("fused", "flash-attn", "flash", "cudnn", "efficient", "builtin", "liger", "compile")


def measure_case(
    case: Case,
    device: torch.device,
    names: tuple[str, ...] = NAMES,
    rounds: int | None = None,
    quick: bool = False,
) -> list[KernelRow]:
    """A row for every provider and mode, with a time or a `skipped_reason`."""
    try:
        with timing.stream(device):
            rows = _measure(case, device, names, rounds or ROUNDS[device.type], quick)
    except Exception as e:  # the next case goes on
        here = [name for name in names if computes(name, case.op)]
        rows = [row(case, case.modes[-1], name, skipped_reason=reason(e)) for name in here]
    free(device)
    return rows


def not_compiled(case: Case, device: torch.device, quick: bool = False) -> str | None:
    """The reason to leave out torch.compile; None if it is timed. Compiling takes longer than
    anything else, so it is timed only at the model's shape and in the sweeps of GELU and, on a GPU,
    of attention; with `quick` only in 16 bits."""
    gpu = device.type == "cuda"
    if quick and gpu and case.dtype == torch.float32:
        return "not compiled in float32: --quick"
    swept = case.op == "gelu" or (gpu and case.op.startswith("causal_attention"))
    if case.sweep in MODEL_SHAPES or swept:
        return None
    return "not compiled in this sweep: it would take longer than all else"


def _measure(
    case: Case, device: torch.device, names: tuple[str, ...], rounds: int, quick: bool
) -> list[KernelRow]:
    accuracy = AccuracyCheck(case, device)
    accuracies: dict[str, Accuracy] = {}
    refused: dict[str, str] = {}
    here = providers(case, device, names)
    for name, provider in here.items():
        if name == "compile" and (why := not_compiled(case, device, quick)):
            refused[name] = why
            continue
        try:
            accuracies[name] = found = accuracy(name, provider.own_masks)
        except Exception as e:  # a backend that does not support this case
            refused[name] = reason(e)
            continue
        if not passes(name, found):
            refused[name] = f"wrong: {found.share:.2g} x the error that the tolerance allows"
    del accuracy
    free(device)
    rows = []
    for mode in case.modes:
        here = {name: p for name, p in here.items() if name not in refused}
        try:
            times = _times(case, device, here, mode, rounds)
        except Exception as e:  # no provider runs, or not even the inputs fit in memory
            times = dict.fromkeys(here, reason(e))
        for name, t in times.items():
            if isinstance(t, str):  # no other mode is tried
                refused[name] = t
            else:
                backend = here[name].backend
                rows.append(row(case, mode, name, accuracies[name], backend=backend, **t))
    for name, why in refused.items():
        rows.append(row(case, case.modes[-1], name, accuracies.get(name), skipped_reason=why))
    return rows


def _times(
    case: Case, device: torch.device, here: dict[str, Provider], mode: str, rounds: int
) -> dict[str, dict[str, Any] | str]:
    """By provider, the fields of its row, or the reason for which it has no time."""
    inputs = [case.inputs(device)]
    least_bytes, _ = case.cost(mode)
    # An embedding reads a few rows of many.
    used = min(sum(x.nbytes for x in inputs[0].values()), least_bytes)
    sets = timing.copies(used, device)
    if case.shape.B * case.shape.H * case.shape.T**2 > LARGE:
        sets = 1
    inputs += [case.inputs(device, seed) for seed in range(1, sets)]
    names = sorted(here, key=lambda n: LEAN.index(n) if n in LEAN else len(LEAN))
    upstream: list[list[Tensor]] = []
    if mode in ("backward", "total"):
        outputs = _outputs([here[name] for name in names], inputs[0])
        upstream = [
            [op_inputs.upstream(i, x, x.dtype) for i, x in enumerate(outputs)] for _ in inputs
        ]
        del outputs
    works = {name: work(here[name], mode, inputs, upstream) for name in names}
    timings = timing.measure(works, sets, device, rounds)
    cold = timing.cold(sets * used if sets > 1 else least_bytes, device)
    fields: dict[str, dict[str, Any] | str] = {}
    for name in here:
        t = timings[name]
        fields[name] = t if isinstance(t, str) else dict(
            seconds=t.median, iqr=t.iqr, sample_seconds=t.samples, graph=t.graph,
            no_graph_reason=t.no_graph_reason, group=t.group, host_seconds=t.host,
            peak_bytes=timing.peak_bytes(works[name], device), cold=cold,
        )  # fmt: skip
    return fields


def _outputs(runners: list[Provider], inputs: Inputs) -> tuple[Tensor, ...]:
    """The outputs of the first provider that runs. One that passed the check without dropout may
    fail with dropout. Raises the last error if all fail."""
    error: Exception = RuntimeError("no provider is left")
    for provider in runners:
        try:
            with provider.around():
                return tuple(x.detach() for x in tensors_of(provider.function(inputs)))
        except Exception as e:
            error = e
    raise error


def work(provider: Provider, mode: str, inputs: list[Inputs], upstream: list[list[Tensor]]) -> Work:
    """The calls of a provider in a mode. They return the tensors that must stay in memory: outputs
    and gradients."""
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
    case: Case, mode: str, provider: str, accuracy: Accuracy | None = None, **values: Any
) -> KernelRow:
    """values: further fields of the row."""
    least_bytes, least_flops = case.cost(mode)
    return KernelRow(
        op=case.op, sweep=case.sweep, shape=vars(case.shape), size=case.size,
        dtype=devices.dtype_name(case.dtype), dropout=case.p if case.spec.dropout else 0.0,
        mode=mode, provider=provider, accuracy=accuracy, least_bytes=least_bytes,
        least_flops=least_flops, **values,
    )  # fmt: skip


def line(r: KernelRow, peak_rates: dict[str, Any]) -> str:
    """A row for a terminal."""
    if not r.timed:
        return r.line()
    notes = [f"{roofline.derive(r, peak_rates).share_of_peak:6.1%} of the peak rate"]
    if r.accuracy and r.exceeds_tolerance:
        notes.append(f"EXCEEDS THE TOLERANCE: {r.accuracy.share:.1f} x")
    if r.no_graph_reason:
        notes.append(f"NO GRAPH, Python's time: {short(r.no_graph_reason)}")
    return r.line(*notes)


@contextlib.contextmanager
def begun(section: result_file.Section, names: tuple[str, ...]) -> Iterator[None]:
    """The section that rows are added to. Peak rates are measured before and after the rows,
    because a hot GPU is slower."""
    device = section.device
    dtypes = dtypes_of(device)
    with section:
        section.put(missing=missing(device, names), rows=[])
        section.put(peak_rates=environment.peak_rates(device, dtypes))
        yield
        if device.type == "cuda":
            section.put(peak_rates_after=environment.peak_rates(device, dtypes))


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.ops", __doc__)
    for option, nargs, names, default, help in (
        ("--sweeps", "*", SWEEPS, None, "also time these sweeps, or all if none is named"),
        ("--ops", "+", OPS, OPS, "time only these ops"),
        ("--providers", "+", NAMES, NAMES, "time only these implementations"),
    ):
        help += f": {', '.join(names)} [{'all' if default else 'no sweep'}]"
        parser.add_argument(
            option, nargs=nargs, choices=names, default=default, metavar="NAME", help=help
        )
    help = "samples of each implementation [20, 9 on a CPU]"
    parser.add_argument("--rounds", type=int, help=help)
    help = "time only float32, one 16-bit dtype, iron's dropout; torch.compile only in 16 bits"
    parser.add_argument("--quick", action="store_true", help=help)
    args, device = result_file.parsed(parser, argv)
    swept = () if args.sweeps is None else tuple(args.sweeps) or SWEEPS
    cases = [case for case in cases_of(device, args.quick, swept) if case.op in args.ops]
    names = tuple(args.providers)
    section = result_file.Section("kernels", device, args)
    with begun(section, names):
        for name, why in section.values["missing"].items():
            print(f"no {name}: {why}")
        for case in cases:
            rows = measure_case(case, device, names, args.rounds, args.quick)
            for r in rows:
                print(line(r, section.values["peak_rates"]), flush=True)
            section.put(rows=section.values["rows"] + rows)


if __name__ == "__main__":
    main()
