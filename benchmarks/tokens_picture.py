"""Draws texts with a tint for each of their tokens, by a vocabulary that is trained on each text.

python -m benchmarks.tokens_picture --out docs/tokens.svg
"""

import argparse
from html import escape
from pathlib import Path

from irongpt.data import corpus, tokens
from irongpt.data.corpus import Corpus
from irongpt.data.tokenizer import Tokenizer

TINTS = ("#ffe08a", "#b5e3ff", "#c9f2c0", "#ffc9d6")
WIDTH, HEIGHT, MARGIN = 8.4, 20, 12  # of a character, of a line, around the text
COLUMNS = 88
FILL = 8.8  # width of a tint, so that no gap shows between two of them


class Drawing:
    """An SVG of monospaced text. Lines have at most COLUMNS characters."""

    def __init__(self) -> None:
        self.boxes: list[str] = []
        self.glyphs: list[str] = []
        self.row, self.column = 0, 0

    def add(self, tokenizer: Tokenizer, text: str) -> None:
        """Draws a text below the others."""
        for i, token in enumerate(tokenizer.encode(text).tolist()):
            tint = TINTS[i % len(TINTS)]
            for char in tokenizer.token_bytes[token].decode(errors="replace"):
                if self.column == COLUMNS and char != "\n":
                    self.row, self.column = self.row + 1, 0
                x, y = MARGIN + self.column * WIDTH, MARGIN + self.row * HEIGHT
                self.boxes.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{FILL}" height="18" fill="{tint}"/>'
                )
                shown, color = ("⏎", "#888") if char == "\n" else (char, "#111")
                if char != " ":
                    self.glyphs.append(
                        f'<text x="{x:.1f}" y="{y + 14}" fill="{color}">{escape(shown)}</text>'
                    )
                self.column += 1
                if char == "\n":
                    self.row, self.column = self.row + 1, 0

    def svg(self) -> str:
        width, height = 2 * MARGIN + COLUMNS * WIDTH, 2 * MARGIN + self.row * HEIGHT
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
            f'width="{width:.0f}" font-family="monospace" font-size="14">'
            f'<rect width="100%" height="100%" fill="white"/>'
            f"{''.join(self.boxes + self.glyphs)}</svg>\n"
        )


def excerpt(text: Corpus, start: str, n_lines: int) -> str:
    """Lines of the validation text from one that begins with `start` on."""
    lines = b"\n".join(text.val).decode().split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    return "\n".join(lines[first : first + n_lines])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a picture of the tokens of texts")
    parser.add_argument("--out", type=Path, default=Path("docs/tokens.svg"))
    args = parser.parse_args(argv)
    drawing = Drawing()
    for name, start, n_lines in (("war-and-peace", "“", 9), ("python-code", "def ", 15)):
        text = corpus.load(name, say=print)
        tokenizer, _ = tokens.tokenize(text, "bpe", tokens.SMALL)
        drawing.add(tokenizer, excerpt(text, start, n_lines) + "\n\n")
    args.out.write_text(drawing.svg(), encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
