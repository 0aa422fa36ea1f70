"""`irongpt compare`: the results of a candidate's ops against eager PyTorch and float64."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import emulate
from irongpt_kernels.runtime import launch_table as tiles

from irongpt import __version__, launch_cache, ops
from irongpt import device as devices
from irongpt.compare import table as report
from irongpt.compare.model import Curve, Setting, compare_step, setting, train_both
from irongpt.compare.ops import DROPOUT_P, FULL, SMALL, Check, Row, cases, compare_case
from irongpt.config import check
from irongpt.console import duration, say
from irongpt.files import check_result, finite, write_result


def compare(
    device: str,
    dtypes: list[str],
    json_file: Path | None,
    plot: Path | None,
    candidate: str = "fused",
) -> int:
    """Prints how far `candidate` is from eager, op by op and as a model. Returns 1 if an error
    exceeds tolerance, else 0.

    device: auto, cpu, cuda or cuda:N. dtypes: names, or empty for all that the device computes.
    Every number goes to `json_file`, a plot to `plot`. Raises UserError for flags that do not fit.
    """
    start = time.perf_counter()
    target = devices.pick(device)
    chosen = _dtypes(dtypes, target)
    for path in (json_file, plot):
        if path is not None:
            check_result(path)
    if plot is not None:  # matplotlib is needed for the plot only
        from irongpt.compare import plot as compare_plot
    module = ops.load(candidate, target)
    devices.make_deterministic()
    full, drops = target.type == "cuda", candidate != "builtin"
    whole = setting(full, drops)

    names = ", ".join(devices.dtype_name(d) for d in chosen)
    say(f"{candidate} against eager and float64, in {names}")
    say(f"on {devices.describe(target)}")
    if note := ops.slow_note(candidate, target):
        say(note)
    if note := launch_cache.note(candidate, target):
        say(note)
    if not drops:
        say(
            f"no dropout: {candidate} takes its masks from PyTorch's generator, eager from the seed"
        )
    say("")
    say(report.heading(candidate))
    rows: list[Row] = []
    checks: list[Check] = []
    sizes = FULL if full else SMALL
    for group in zip(
        *(cases(k, sizes[k], DROPOUT_P if drops else 0.0) for k in sizes), strict=True
    ):
        for case in group:
            found = [compare_case(case, module, dtype, target, drops) for dtype in chosen]
            rows += (new := [row for part, _ in found for row in part])
            checks += (new_checks := [c for _, part in found for c in part])
            say(report.group(f"{case.op}, {case.shape}: {case.sizes}", new, new_checks))
    new, curves, new_checks = _model(whole, module, chosen, target)
    rows, checks = rows + new, checks + new_checks
    say(report.group(f"model, one step: {whole.sizes}", new, []))
    for curve in curves:
        say(report.training(curve))

    seconds = time.perf_counter() - start
    failures = report.failures(rows, checks, candidate)
    if json_file is not None:
        environment = {
            "irongpt": __version__,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "device": devices.describe(target),
            "candidate": candidate,
            "tiles": tiles.digest(target),
            "dtypes": [devices.dtype_name(d) for d in chosen],
            "seconds": round(seconds, 1),
        }
        write_result(json_file, to_json(environment, rows, checks, curves))
    if plot is not None:
        title = f"{candidate} against eager on {devices.describe(target)}"
        write_result(plot, compare_plot.png(rows, curves, candidate, title))
    say("")
    for line in failures:
        say(line)
    say(f"{report.summary(rows, checks)}; {duration(seconds)}")
    return 1 if failures else 0


def to_json(
    environment: dict[str, Any], rows: list[Row], checks: list[Check], curves: list[Curve]
) -> bytes:
    """All numbers as JSON. Those that are not finite become null."""
    values = {
        **environment,
        "ok": all(row.ok for row in rows) and all(c.ok for c in checks),
        "rows": [
            {
                **{k: v for k, v in vars(row).items() if k not in ("errors", *_VALUES)},
                "ok": row.ok,
                "errors": {
                    norm: {**e._asdict(), "ratio": e.ratio} for norm, e in row.errors.items()
                },
                "worst": {"index": row.index, **{k: getattr(row, k) for k in _VALUES[1:]}},
            }
            for row in rows
        ],
        "checks": [vars(c) | {"detail": "" if c.ok else c.detail} for c in checks],
        "training": [{**vars(c), "difference": c.differences} for c in curves],
    }
    return (json.dumps(finite(values), indent=1, allow_nan=False) + "\n").encode()


_VALUES = ("index", "candidate", "eager", "float64")


def _model(
    whole: Setting, module: Any, dtypes: Iterable[torch.dtype], device: torch.device
) -> tuple[list[Row], list[Curve], list[Check]]:
    rows, curves, checks = [], [], []
    for dtype in dtypes:
        try:
            rows += compare_step(whole, module, dtype, device)
            curves.append(train_both(whole, module, dtype, device))
            checks.append(curves[-1].check())
        except Exception as e:  # as in compare_case, this is a finding and the others go on
            detail = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            checks.append(
                Check("model", "one step", devices.dtype_name(dtype), "runs", False, detail)
            )
    return rows, curves, checks


def _dtypes(names: list[str], device: torch.device) -> list[torch.dtype]:
    if device.type == "cpu":
        check(
            "bfloat16" not in names,
            "--dtype bfloat16 needs a GPU: Triton's interpreter computes it wrongly; "
            "use float32 or float16",
        )
        names = names or ["float32", "float16"]
    if not names:
        half = emulate.capability(device) >= (8, 0)
        names = ["float32", "float16", *(["bfloat16"] if half else [])]
    return [devices.precision(name, device).dtype for name in dict.fromkeys(names)]


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
