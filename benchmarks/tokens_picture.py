"""Draws a text with a tint for each of its tokens, as docs/tokens.svg.

    python -m benchmarks.tokens_picture RUN [FILE ...] --out docs/tokens.svg

RUN is a training run, whose tokenizer is used; the FILEs are drawn below each other.
"""

import argparse
from html import escape
from pathlib import Path

from irongpt.data.tokenizer import Tokenizer
from irongpt.runs.run_folder import load_checkpoint, open_run

TINTS = ("#ffe08a", "#b5e3ff", "#c9f2c0", "#ffc9d6")
WIDTH, HEIGHT, MARGIN = 8.4, 20, 12  # of a character, of a line, around the text
COLUMNS = 88


def picture(tokenizer: Tokenizer, text: str) -> str:
    """An SVG of the text, whose lines have at most COLUMNS characters."""
    boxes, glyphs = [], []
    row, column = 0, 0
    for i, token in enumerate(tokenizer.encode(text).tolist()):
        for char in tokenizer.token_bytes[token].decode(errors="replace"):
            if column == COLUMNS and char != "\n":
                row, column = row + 1, 0
            x, y = MARGIN + column * WIDTH, MARGIN + row * HEIGHT
            tint = TINTS[i % len(TINTS)]
            boxes.append(f'<rect x="{x:.1f}" y="{y}" width="{WIDTH}" height="18" fill="{tint}"/>')
            shown = "⏎" if char == "\n" else char
            style = ' fill="#999"' if char == "\n" else ""
            if char != " ":
                glyphs.append(f'<text x="{x:.1f}" y="{y + 14}"{style}>{escape(shown)}</text>')
            row, column = (row + 1, 0) if char == "\n" else (row, column + 1)
    width, height = 2 * MARGIN + COLUMNS * WIDTH, 2 * MARGIN + (row + 1) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" font-family="monospace" font-size="14">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(boxes + glyphs)}</svg>\n'
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a picture of a text's tokens")
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/tokens.svg"))
    args = parser.parse_args(argv)
    _, _, tokenizer, _ = load_checkpoint(open_run(args.run), "last")
    text = "\n".join(file.read_text(encoding="utf-8") for file in args.files)
    args.out.write_text(picture(tokenizer, text), encoding="utf-8")
    count = len(tokenizer.encode(text))
    print(f"{args.out}: {count:,} tokens, {len(text.encode()) / count:.2f} bytes per token")


if __name__ == "__main__":
    main()
