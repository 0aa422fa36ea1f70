"""Result files: benchmarks/results/<device>/<date>-<commit>.json, a section for each benchmark.

Several commands can fill a file, because each section has its own environment. Each write replaces
the file atomically. A repeated measurement goes to another file, -2, -3 and so on, unless --result
names one.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from irongpt_kernels.runtime import emulate

from benchmarks.measure import environment
from benchmarks.measure.rows import KINDS, Row
from irongpt import device as devices
from irongpt.errors import UserError
from irongpt.files import finite, replace_file

FORMAT = 2
FOLDER = Path(__file__).resolve().parents[1] / "results"
Values = dict[str, Any]


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of a module, as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_options(add: Callable[..., Any], device: bool = True, name: str = "") -> None:
    """Adds the options that all benchmarks share. add: the `add_argument` of a parser. name: the
    last part of a file's name."""
    if device:
        help = "cpu, cuda or cuda:N; auto is a GPU if there is one [auto]"
        add("--device", metavar="NAME", default="auto", help=help)
    help = "folder of all results [benchmarks/results]"
    add("--out", metavar="FOLDER", type=Path, default=FOLDER, help=help)
    help = f"result file to write [FOLDER/<device>/<date>-<commit>{name}.json]"
    add("--result", metavar="FILE", type=Path, help=help)
    add("--commit", metavar="NAME", help="commit to record as that of this source [git's]")


def pick(name: str) -> torch.device:
    """The device of --device. A mistake, or a GPU that torch does not see, ends the benchmark with
    one line and exit code 2."""
    try:
        return devices.pick(name)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from e


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[Any, torch.device]:
    """The options of a benchmark, the shared ones included, and its device."""
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    return args, pick(args.device)


def path(args: argparse.Namespace, device: torch.device, *sections: str, name: str = "") -> Path:
    """The file to write: that of --result, or the first one that holds none of the sections yet.
    name: as in `add_options`."""
    if args.result:
        return Path(args.result)
    name = f"{date.today()}-{args.commit or environment.git_commit()}{name}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        name += "-interpreted"
    elif device.type == "cuda" and emulate.enabled():
        name += f"-sm_{emulate.ARCH}"
    folder = re.sub(r"[^A-Za-z0-9]+", "-", environment.name(device)).strip("-")
    for n in itertools.count(1):
        file = args.out / folder / f"{name}{f'-{n}' if n > 1 else ''}.json"
        if not file.exists() or _read(file).keys().isdisjoint(sections):
            break
    return Path(file)


def load(file: Path) -> Values:
    """A result file, its rows as objects. Raises ValueError for anything else."""
    values = _read(file)
    for name, kind in KINDS.items():
        section = values.get(name, {})
        if "rows" in section:
            section["rows"] = [kind.from_json(row) for row in section["rows"]]
    return values


def _read(file: Path) -> Values:
    values = json.loads(file.read_bytes())
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{file} is not a result file of format {FORMAT}: measure it again")
    return values


def save(file: Path, section: str, values: Values) -> None:
    """Puts a section into a file that may hold others."""
    known = _read(file) if file.exists() else {"format": FORMAT}
    if "rows" in values:
        rows = [r.to_json() if isinstance(r, Row) else r for r in values["rows"]]
        values = values | {"rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, encode(known | {section: values}))


def encode(values: Values) -> bytes:
    """JSON with a list of numbers on one line, so that it can be read and compared by line."""
    text = json.dumps(finite(values, digits=6), indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: "[" + " ".join(m[0][1:-1].split()) + "]", text)
    return (text + "\n").encode()


class Section:
    """A section that is being measured: each `put` saves it, with the state of the GPU."""

    def __init__(self, name: str, device: torch.device, args: argparse.Namespace) -> None:
        self.name, self.device = name, device
        self.path = path(args, device, name)
        self.values: Values = {"environment": environment.describe(device, args.commit)}
        self.watch = environment.Watch(device)

    def __enter__(self) -> "Section":
        return self

    def put(self, **values: Any) -> None:
        self.values |= values
        self.values["state"] = self.watch.report()
        save(self.path, self.name, self.values)

    def __exit__(self, *exc: object) -> None:
        e = exc[1]
        self.watch.end(wait=e is None)  # after an error the time may be short
        if e is not None:
            self.values["ended_by"] = f"{type(e).__name__}: {e}"[:300]
        self.put()
        if e is None:
            print(f"written to {self.path}")


def loss(value: float | None) -> str:
    """A loss with four decimals; nan for None, which a file has for a loss that is not finite."""
    return "nan" if value is None or math.isnan(value) else f"{value:.4f}"
