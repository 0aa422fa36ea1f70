"""Writes a Markdown report of a benchmark result, or compares two results.

    python -m benchmarks.report                   report of the newest file in benchmarks/results
    python -m benchmarks.report FILE              report of this result file
    python -m benchmarks.report --compare A B     differences between A and B beyond the noise

A folder next to the result file gets report.md and its plots. Every number is in the file or
follows from numbers in it; a number that was computed and not measured is labelled as computed.
It needs matplotlib.
"""

from pathlib import Path
from typing import Any

from benchmarks.measure import result_file
from benchmarks.report import diff, plots, tables
from irongpt.files import replace_file

Values = dict[str, Any]


def markdown(values: Values, name: str, pictures: dict[str, bytes]) -> str:
    """The report, which names the pictures by their files."""
    parts: list[str] = [f"# {tables.title(values)}", tables.about(values, name)]
    for heading, text, shown in tables.sections(tables.measured(values)):
        parts.append(f"## {heading}")
        parts += [f"![{p}]({p}.png)" for p in shown if p in pictures]
        parts.append(text)
    return "\n\n".join(part for part in parts if part) + "\n"


def write(file: Path, out: Path | None = None) -> Path:
    """Writes the report of a result file into `out`; by default a folder next to it."""
    values = result_file.load(file)
    folder = out or file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(tables.measured(values))
    for name, data in pictures.items():
        replace_file(folder / f"{name}.png", data)
    text = markdown(values, file.name, pictures)
    replace_file(folder / "report.md", text.encode())
    return folder


def newest() -> Path:
    """The result file with the latest date inside it. Raises SystemExit if there is none."""
    files = {f: date for f in result_file.FOLDER.glob("*/*.json") if (date := _date(f))}
    if not files:
        raise SystemExit(f"there is no result in {result_file.FOLDER}: make bench writes one")
    return max(files, key=lambda f: files[f])


def _date(file: Path) -> str:
    """When the last section was measured (ISO 8601, UTC); empty if this is not a result file."""
    try:
        values = result_file.load(file)
    except (OSError, ValueError):
        return ""
    sections = [s for s in values.values() if isinstance(s, dict)]
    return max((str(s.get("environment", {}).get("date", "")) for s in sections), default="")


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
