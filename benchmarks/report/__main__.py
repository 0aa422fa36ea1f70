"""Writes a Markdown report of a benchmark result, or compares two results.

    python -m benchmarks.report                   report of the newest file in benchmarks/results
    python -m benchmarks.report FILE              report of this result file
    python -m benchmarks.report --compare A B     differences between A and B beyond the noise

A folder next to the result file gets report.md and its plots. Every number is in the file or
follows from numbers in it; a number that was computed and not measured is labelled as computed.
It needs matplotlib.
"""

import contextlib
from pathlib import Path

from benchmarks.measure import result_file
from benchmarks.report import diff, plots, tables
from irongpt.files import replace_file


def write(file: Path, out: Path | None = None) -> Path:
    """Writes the report of a result file into `out`; by default a folder next to it."""
    values = result_file.load(file)
    folder = out or file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    name = tables.environment(values).get("name", "an unknown device")
    parts = [f"# IronGPT on {name}", tables.about(values, file.name)]
    for name, heading, text in tables.parts(tables.measured(values)):
        parts.append(f"## {heading}")
        for picture, data in plots.draw(name, values[name]).items():
            replace_file(folder / f"{picture}.png", data)
            parts.append(f"![{picture}]({picture}.png)")
        parts.append(text)
    replace_file(folder / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())
    return folder


def newest() -> Path:
    """The result file whose last section was measured last. Raises SystemExit if there is none."""
    dates: dict[Path, str] = {}  # ISO 8601, UTC
    for file in result_file.FOLDER.glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError):
            sections = [s for s in result_file.load(file).values() if isinstance(s, dict)]
            dates[file] = max(s.get("environment", {}).get("date", "") for s in sections)
    if not dates:
        raise SystemExit(f"there is no result in {result_file.FOLDER}: make bench writes one")
    return max(dates, key=lambda file: dates[file])


def main(argv: list[str] | None = None) -> None:
    parser = result_file.parser("benchmarks.report", __doc__)
    help = "result file [the newest in benchmarks/results]"
    parser.add_argument("file", nargs="?", metavar="FILE", type=Path, help=help)
    help = "folder of the report [FILE without its .json]"
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=help)
    help = "print the differences of two result files that exceed the noise"
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help=help)
    args = parser.parse_args(argv)
    try:
        if args.compare:
            a, b = (result_file.load(file) for file in args.compare)
            print(diff.text(a, b, *(file.name for file in args.compare)))
            return
        folder = write(args.file or newest(), args.out)
    except (OSError, ValueError) as e:
        parser.error(str(e))
    print(f"written to {folder / 'report.md'}")


if __name__ == "__main__":
    main()
