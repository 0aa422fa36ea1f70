"""`irongpt compare`: the results of a candidate's ops against eager PyTorch and float64."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import emulate
from irongpt_kernels.runtime import launch_table as tiles

from irongpt import __version__, driver, ops
from irongpt import device as devices
from irongpt.compare import table as report
from irongpt.compare.model import Curve, compare_model, setting
from irongpt.compare.ops import Check, Row, all_cases, compare_case
from irongpt.config import DTYPES, check
from irongpt.console import duration, say
from irongpt.errors import UserError
from irongpt.figures import default_style
from irongpt.files import check_result, finite, write_result

Faults = Callable[[], list[str]]
ARCHS = ("sm_75", "sm_80", "sm_90")
Group = tuple[str, list[Row], list[Check], list[Curve]]  # a title, and what was found under it


def compare(
    device: str = "auto",
    dtypes: Sequence[str] = (),
    json_file: Path | None = None,
    plot: Path | None = None,
    candidate: str = "fused",
    arch: str | None = None,
) -> int:
    """Prints how far `candidate` is from eager, op by op and as a model. Returns 1 if an error
    exceeds tolerance, else 0.

    device: auto, cpu, cuda or cuda:N. dtypes: names, or empty for all that the device computes.
    Every number goes to `json_file`, which is written after each group of rows, and a plot to
    `plot`. arch: sm_75, sm_80 or sm_90 to execute the kernels that are compiled for it on the CPU.
    Raises UserError for flags that do not fit.
    """
    with execution(arch, device, candidate) as faults:
        target = torch.device("cpu") if arch else devices.pick(device)
        chosen = _dtypes(dtypes, target, arch)
        return _compare(target, chosen, json_file, plot, candidate, faults)


def _compare(
    target: torch.device,
    chosen: list[torch.dtype],
    json_file: Path | None,
    plot: Path | None,
    candidate: str,
    faults: Faults | None,
) -> int:
    start = time.perf_counter()
    check_result(json_file, plot)
    if plot is not None:  # matplotlib is needed for the plot only
        with default_style():
            from irongpt.compare import plot as compare_plot
    module = ops.load(candidate, target)
    devices.make_deterministic()
    full, with_dropout = target.type == "cuda", candidate != "builtin"
    training = setting(full, with_dropout)

    names = [devices.dtype_name(d) for d in chosen]
    say(f"{candidate} and eager ({', '.join(names)}), both compared with eager in float64")
    say(f"on {devices.describe(target)}")
    for note in ops.notes(candidate, target):
        say(note)
    if not with_dropout:
        say(
            f"no dropout: {candidate} takes its masks from PyTorch's generator, eager from the seed"
        )
    say(f"\n{report.heading(candidate)}")
    rows: list[Row] = []
    checks: list[Check] = []
    cases = all_cases(full, with_dropout)
    environment = {
        "irongpt": __version__,
        "torch": torch.__version__,
        "triton": driver.installed("triton"),
        "device": devices.describe(target),
        "candidate": candidate,
        "tiles": tiles.digest(target),
        "dtypes": names,
    }

    def save(groups: int, curves: list[Curve]) -> None:
        """groups: how many are complete. A comparison that is stopped keeps their numbers."""
        if json_file is not None:
            seconds = round(time.perf_counter() - start, 1)
            progress = dict(groups=groups, of_groups=len(cases) + 1, seconds=seconds)
            write_result(json_file, to_json(environment | progress, rows, checks, curves))

    def groups() -> Iterator[Group]:
        for case in cases:
            found = [compare_case(case, module, dtype, target, with_dropout) for dtype in chosen]
            new_rows, new_checks = ([*chain(*lists)] for lists in zip(*found, strict=True))
            yield f"{case.op}, {case.shape}: {case.sizes}", new_rows, new_checks, []
        new_rows, new_checks, curves = compare_model(training, module, chosen, target)
        if faults is not None:
            wrong = "; ".join(faults())
            new_checks.append(Check("kernels", "all", "all", "memory access", not wrong, wrong))
        yield f"model, one step: {training.sizes}", new_rows, new_checks, curves

    for number, (title, new_rows, new_checks, curves) in enumerate(groups(), 1):
        say(report.group(title, new_rows, new_checks))
        for curve in curves:
            say(report.training(curve))
        rows += new_rows
        checks += new_checks
        save(number, curves)

    seconds = time.perf_counter() - start
    failures = report.failures(rows, checks, candidate)
    if plot is not None:
        title = f"{candidate} against eager on {devices.describe(target)}"
        with default_style():
            png = compare_plot.png(rows, curves, candidate, title)
        write_result(plot, png)
    say("\n".join(["", *failures, f"{report.summary(rows, checks)}; {duration(seconds)}"]))
    return 1 if failures else 0


def to_json(
    environment: dict[str, Any], rows: list[Row], checks: list[Check], curves: list[Curve]
) -> bytes:
    """All numbers as JSON. Those that are not finite become null."""
    values = {
        **environment,
        "ok": all(row.ok for row in rows) and all(c.ok for c in checks),
        "rows": [_row(row) for row in rows],
        "checks": [vars(c) | {"detail": "" if c.ok else c.detail} for c in checks],
        "training": [{**vars(c), "difference": c.differences} for c in curves],
    }
    return (json.dumps(finite(values), indent=1, allow_nan=False) + "\n").encode()


def _row(row: Row) -> dict[str, Any]:
    errors = {norm: {**e._asdict(), "ratio": e.ratio} for norm, e in row.errors.items()}
    return {**vars(row), "errors": errors, "ok": row.ok}


def _dtypes(names: Sequence[str], device: torch.device, arch: str | None) -> list[torch.dtype]:
    native = device.type == "cuda" and emulate.capability(device) >= (8, 0)
    native = native or arch in ("sm_80", "sm_90")
    if device.type == "cpu" and not native:
        check(
            "bfloat16" not in names,
            "--dtype bfloat16 needs a GPU or --arch sm_80: Triton's interpreter computes it "
            "wrongly; use float32 or float16",
        )
    if not names:
        names = DTYPES if native else DTYPES[:2]
    return [devices.precision(name, device).dtype for name in dict.fromkeys(names)]


@contextmanager
def execution(arch: str | None, device: str, candidate: str) -> Iterator[Faults | None]:
    """In this context kernels are compiled for `arch` and executed on the CPU, and it yields a
    function that lists the wrong memory accesses so far.

    If arch is None they run on the device, or in Triton's interpreter with matmuls whose bits do
    not depend on NumPy's BLAS. Raises UserError for flags that contradict each other.
    """
    if arch is None:
        matmuls: AbstractContextManager[None] = nullcontext()
        with suppress(ImportError):  # without Triton there is no interpreter
            from irongpt_kernels.runtime import interpreter, launch

            matmuls = interpreter.repeatable_matmuls() if launch.INTERPRETED else matmuls
        with matmuls:
            yield None
        return
    check(arch in ARCHS, f"--arch must be {', '.join(ARCHS)}, got {arch!r}")
    check(candidate == "fused", f"--arch is for the kernels, and --ops {candidate} has none")
    check(device in ("auto", "cpu"), f"--arch runs on the CPU, not on --device {device}")
    try:
        from irongpt_kernels.ptx.driver import emulating
        from irongpt_kernels.runtime import launch
    except ImportError as e:
        raise UserError(f"--arch needs Triton, which cannot be imported ({e})") from e
    check(not launch.INTERPRETED, "--arch needs compiled kernels: unset TRITON_INTERPRET")
    with emulating(int(arch.removeprefix("sm_"))) as report:
        yield report.lines
