"""Text broken into lines by its measured width, so that no title is cut or runs into the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

FONT = "DejaVu Sans"
"""Of all text; it comes with matplotlib."""


@lru_cache(maxsize=4096)
def width_in(text: str, size_pt: float, weight: str = "normal") -> float:
    """Width of one line of text in inches.

    Args:
        text: the line.
        size_pt: font size.
        weight: `normal` or `bold`.
    """
    font = FontProperties(family=FONT, size=size_pt, weight=weight)
    width_pt, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width_pt) / 72


def wrapped(text: str, most_in: float, size_pt: float, weight: str = "normal") -> str:
    """Text in lines no wider than asked, broken at spaces; within a word only where it must be.

    Args:
        text: what to break; its own newlines stay.
        most_in: widest line in inches.
        size_pt: font size.
        weight: `normal` or `bold`.

    Example:
        >>> wrapped("short", 1.0, 7)
        'short'
    """

    def fits(line: str) -> bool:
        return width_in(line.rstrip(), size_pt, weight) <= most_in

    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\S+\s*|^\s+", paragraph):
            pieces = [word] if fits(word) else _pieces(word, fits)
            for piece in pieces:
                if line and not fits(line + piece):
                    lines.append(line.rstrip())
                    line = ""
                line += piece
        lines.append(line.rstrip())
    return "\n".join(lines)


def _pieces(word: str, fits: Callable[[str], bool]) -> list[str]:
    """A word too wide for a line: parts that fit, ending at a mark of a name where there is one."""
    pieces = []
    for part in re.findall(r"[^_/,=\-]*[_/,=\-]+|[^_/,=\-]+", word):
        while not fits(part) and len(part) > 1:
            stop = next((n for n in range(len(part) - 1, 1, -1) if fits(part[:n])), 1)
            pieces.append(part[:stop])
            part = part[stop:]
        pieces.append(part)
    return pieces


def more_lines_in(texts: Iterable[str], size_pt: float) -> float:
    """Height in inches that the tallest of some texts takes beyond one line.

    Args:
        texts: wrapped.
        size_pt: font size.
    """
    return max((t.count("\n") for t in texts), default=0) * size_pt * 1.2 / 72
