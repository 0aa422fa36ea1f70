"""Result files: benchmarks/results/<device>/<date>-<commit>.json, a section for each benchmark.

Several commands can fill a file, because each section has its own environment. Each write replaces
the file atomically. A repeated measurement goes to another file, -2, -3 and so on, unless --result
names one.
"""

import argparse
import json
import math
import os
import re
import sys
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


HELP = {  # of the options that all benchmarks share
    "--device": "cpu, cuda or cuda:N; auto is a GPU if there is one [auto]",
    "--out": "folder of all results [benchmarks/results]",
    "--result": "result file to write [FOLDER/<device>/<date>-<commit>.json]",
    "--commit": "commit to record as that of this source [git's]",
}


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of a module, as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_options(parser: argparse.ArgumentParser, device: bool = True, kind: str = "") -> None:
    """Adds the options that all benchmarks share. kind: as in `path`."""
    if device:
        parser.add_argument("--device", metavar="NAME", default="auto", help=HELP["--device"])
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=FOLDER, help=HELP["--out"])
    help = HELP["--result"].replace(".json", f"-{kind}.json" if kind else ".json")
    parser.add_argument("--result", metavar="FILE", type=Path, help=help)
    parser.add_argument("--commit", metavar="NAME", help=HELP["--commit"])


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
    add_options(parser)
    args = parser.parse_args(argv)
    return args, pick(args.device)


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def path(out: Path, device: torch.device, commit: str | None, kind: str = "") -> Path:
    """kind: a part of the name for other kinds of measurements."""
    commit = commit or environment.git_commit()
    how = ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        how = "interpreted"
    elif device.type == "cuda" and emulate.enabled():
        how = f"sm_{emulate.ARCH}"
    name = "-".join(part for part in (str(date.today()), commit, kind, how) if part)
    return out / slug(environment.name(device)) / f"{name}.json"


def fresh(file: Path, *sections: str) -> Path:
    """The file, or the first one after it that holds none of the sections yet."""
    free, n = file, 1
    while free.exists() and not _read(free).keys().isdisjoint(sections):
        n += 1
        free = file.with_stem(f"{file.stem}-{n}")
    return free


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
        self.path: Path = args.result or fresh(path(args.out, device, args.commit), name)
        self.values: Values = {"environment": environment.describe(device, args.commit)}
        self.watch = environment.Watch(device)

    def __enter__(self) -> "Section":
        self.watch.__enter__()
        return self

    def put(self, **values: Any) -> None:
        self.values |= values
        self.values["state"] = self.watch.report()
        save(self.path, self.name, self.values)

    def __exit__(self, *exc: object) -> None:
        self.watch.__exit__(*exc)
        if (e := exc[1]) is not None:
            self.values["ended_by"] = f"{type(e).__name__}: {e}"[:300]
        self.put()
        if e is None:
            print(f"written to {self.path}")


def loss(value: float | None) -> str:
    """A loss with four decimals; nan for None, which a file has for a loss that is not finite."""
    return "nan" if value is None or math.isnan(value) else f"{value:.4f}"
