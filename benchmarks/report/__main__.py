"""The page of a result file, and what two of them differ in.

    python -m benchmarks.report                   of the newest file in benchmarks/results
    python -m benchmarks.report FILE              -> FILE's folder/<name>/report.md and report.html
    python -m benchmarks.report --compare A B     what is faster or slower in B, beyond the noise

report.md has its pictures beside it; report.html holds them. Every number is the file's, or follows
from its numbers; what was computed and not measured is called so.
"""

import argparse
import base64
import html
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import result_file
from benchmarks.report import diff, plots, tables
from irongpt.files import replace_file

Values = dict[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae3; }
h3 { margin: 1.8rem 0 .4rem; font-size: 1rem; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .22rem .65rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #8a94a6; font-weight: 600; }
td { border-bottom: 1px solid #e6e9ef; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { background: #fff3e6; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
blockquote { border-left: 4px solid #c0392b; margin: 1rem 0; padding: .2rem 1rem; }
code { font-size: 13px; background: #f2f4f8; padding: 0 .25em; }
"""


def markdown(values: Values, name: str, drawn: dict[str, bytes]) -> str:
    """The page; its pictures are named by their files."""
    parts: list[str] = [f"# {tables.title(values)}", tables.about(values, name)]
    for heading, text, shown in tables.sections(tables.measured(values)):
        parts.append(f"## {heading}")
        parts += [f"![{p}]({p}.png)" for p in shown if p in drawn]
        parts.append(text)
    return "\n\n".join(part for part in parts if part) + "\n"


def page(text: str, drawn: dict[str, bytes]) -> str:
    """The same page as one HTML file that needs no other."""
    body: list[str] = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.startswith("|"):
            block = []
            while i < len(lines) and lines[i].startswith("|"):
                block.append(lines[i])
                i += 1
            body.append(_table(block))
            continue
        if match := re.match(r"(#+) (.*)", line):
            level = len(match[1])
            body.append(f"<h{level}>{_inline(match[2])}</h{level}>")
        elif match := re.match(r"!\[(.*)\]\((.*)\.png\)", line):
            data = base64.b64encode(drawn[match[2]]).decode()
            body.append(f'<img alt="{html.escape(match[1])}" src="data:image/png;base64,{data}">')
        elif line.startswith("> "):
            body.append(f"<blockquote>{_inline(line[2:])}</blockquote>")
        elif line.startswith("- "):
            body.append(f"<p>&bull; {_inline(line[2:])}</p>")
        elif line:
            body.append(f"<p>{_inline(line)}</p>")
        i += 1
    title = html.escape(lines[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<main>\n" + "\n".join(body) + "\n</main>\n</html>\n"
    )


def _table(lines: list[str]) -> str:
    def cells(line: str, tag: str) -> str:
        parts = line.strip().strip("|").split("|")
        return "".join(f"<{tag}>{_inline(c.strip())}</{tag}>" for c in parts)

    head, _, *rows = lines
    out = [f"<tr>{cells(head, 'th')}</tr>"]
    for row in rows:
        ours = ' class="ours"' if re.match(r"\|\s*\*{0,2}fused", row) else ""
        out.append(f"<tr{ours}>{cells(row, 'td')}</tr>")
    return '<div class="table"><table>' + "\n".join(out) + "</table></div>"


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]*)\*\*", r"<b>\1</b>", text)


def write(file: Path, out: Path | None = None) -> Path:
    """Draws the page of a result file into `out`; a folder beside it unless told otherwise."""
    values = result_file.load(file)
    folder = out or file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(tables.measured(values))
    for name, data in drawn.items():
        replace_file(folder / f"{name}.png", data)
    text = markdown(values, file.name, drawn)
    replace_file(folder / "report.md", text.encode())
    replace_file(folder / "report.html", page(text, drawn).encode())
    return folder


def newest() -> Path:
    """The result file that was written last. Raises SystemExit if there is none."""
    files = [f for f in result_file.FOLDER.glob("*/*.json") if _is_result(f)]
    if not files:
        raise SystemExit(f"there is no result in {result_file.FOLDER}: make bench writes one")
    return max(files, key=lambda f: f.stat().st_mtime)


def _is_result(file: Path) -> bool:
    try:
        result_file.load(file)
    except (OSError, ValueError):
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the page of a result file")
    parser.add_argument("file", nargs="?", type=Path, help="[the newest in benchmarks/results]")
    parser.add_argument("--out", type=Path, help="folder [FILE without its .json]")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    args = parser.parse_args(argv)
    if args.compare:
        a, b = (result_file.load(file) for file in args.compare)
        print(diff.text(a, b, *(file.name for file in args.compare)))
        return
    folder = write(args.file or newest(), args.out)
    print(f"written to {folder / 'report.md'} and {folder / 'report.html'}")


if __name__ == "__main__":
    main()
