"""A table as data, and how it looks on a terminal, in Markdown, CSV, LaTeX and HTML.

What a cell says is decided elsewhere; here it is only set in type. No mark
is a color alone: the best is bold or ¹, the runner-up underlined or ², a proven lead has an
asterisk.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import groupby
from typing import Literal

from clbench.evaluation.metrics import continual

EMPTY = "–"
"""A number that does not exist, or is not there yet."""
FORMATS = ("terminal", "md", "csv", "tex", "html")
"""What `render` can make."""
Mark = Literal["best", "second", "proven", "untestable"]
"""What a cell deserves; the rule is in `clbench.report.paper.marks`."""
_FITS = 9  # columns of a LaTeX table that need no scaling
_INDENT = r"\hspace{1em}"
_MINUS = re.compile(r"(?<![\w.)\-])-(?=\.?\d)")
"""A hyphen that is the sign of a number, in a cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What is printed; cells are text."""

    title: str
    """One line."""
    columns: tuple[str, ...]
    """Headers."""
    rows: tuple[tuple[str, ...], ...]
    """Cells."""
    notes: tuple[str, ...] = ()
    """Lines below: what the numbers are, how many, what is missing."""
    keys: int = 1
    """Leading columns that name a row."""
    block: int = 0
    """Wide tables are printed in blocks of that many further columns; 0 = in one."""
    narrow: int = 0
    """The same on a terminal; 0 = `block`."""
    over: tuple[str, ...] = ()
    """A header above each column; equal neighbors are joined, "" has none."""
    tail: int = 0
    """Trailing columns that stand in the last block only, beyond its size."""
    marks: Mapping[tuple[int, int], frozenset[Mark]] = field(default_factory=dict)
    """(row, column) → what the cell deserves."""
    spans: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """(row, column) → rows it holds for, counted from this one down; those below are ""."""
    rules: frozenset[int] = frozenset()
    """Rows that begin a group: a line stands above them."""
    long: Table | None = None
    """What CSV gets instead: one line per cell, at full precision."""


def exact(value: object, nan: str = "") -> str:
    """A value for CSV: a float at full precision, a tuple by spaces, None as nothing.

    Args:
        value: what to write.
        nan: what stands for NaN.
    """
    if isinstance(value, float):
        return nan if math.isnan(value) else repr(float(value))
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else ""
        if value is None
        else str(value)
    )


def long_table(columns: str, rows: Iterable[Sequence[object]], nan: str = "") -> Table:
    """What CSV gets: one line per cell at full precision.

    Args:
        columns: their names, by spaces.
        rows: values, see `exact`.
        nan: what stands for NaN.
    """
    lines = tuple(tuple(exact(value, nan) for value in row) for row in rows)
    return Table(title="", columns=tuple(columns.split()), rows=lines)


def number(value: float, digits: int = 3) -> str:
    """A score as text; the dash where there is none."""
    return EMPTY if math.isnan(value) else f"{value:z.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """A difference as text, always with its sign; the dash where there is none."""
    return EMPTY if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def render(table: Table, format_: str) -> str:
    """The table as `terminal`, `md`, `csv`, `tex` (a float to input) or `html` (a whole page)."""
    make = {
        "terminal": _terminal, "md": _markdown, "csv": _csv, "tex": _latex, "html": _page,
    }  # fmt: skip
    return make[format_](table)


def _blocks(table: Table, size: int = 0) -> list[list[int]]:
    """Columns of each block, the keys repeated."""
    end = len(table.columns) - table.tail
    size = size or table.block or max(1, end - table.keys)
    keys = range(table.keys)
    blocks = [
        [*keys, *range(at, min(at + size, end))] for at in range(table.keys, max(end, 1), size)
    ] or [[*keys]]  # a table without runs has its keys alone
    blocks[-1] += range(end, len(table.columns))
    return blocks


def _joined(table: Table, pick: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The upper header of a block: text, and the columns it covers."""
    if not table.over:
        return []
    return [(name, list(same)) for name, same in groupby(pick, lambda j: table.over[j])]


def _decorated(table: Table, decorate: Callable[[str, frozenset[Mark]], str]) -> list[list[str]]:
    """The rows with their marks, every spanning cell set on its middle row.

    Args:
        table: the table.
        decorate: text and marks of a cell → text, for formats that cannot span.
    """
    rows = [
        [
            decorate(text, table.marks[i, j]) if text and (i, j) in table.marks else text
            for j, text in enumerate(row)
        ]
        for i, row in enumerate(table.rows)
    ]
    for (i, j), span in table.spans.items():
        rows[i][j], rows[i + (span - 1) // 2][j] = "", rows[i][j]
    return rows


def superscript(marks: frozenset[Mark]) -> str:
    """The part of a mark that needs no type face."""
    return "*" * ("proven" in marks) + "†" * ("untestable" in marks)


# --------------------------------------------------------------------------------------- terminal


def _terminal(table: Table) -> str:
    cells = _decorated(
        table,
        lambda text, marks: (
            text + "¹" * ("best" in marks) + "²" * ("second" in marks) + superscript(marks)
        ),
    )
    cells = [[" ".join(text.split("\n")) for text in row] for row in [table.columns, *cells]]
    lines = [table.title]
    for pick in _blocks(table, table.narrow):
        width = {j: max(len(r[j]) for r in cells) for j in pick}
        over = _joined(table, pick)
        for name, columns in over:
            room = sum(width[j] for j in columns) + 2 * (len(columns) - 1)
            width[columns[-1]] += max(0, len(name) - room)
        lines.append("")
        if over:
            parts = [
                name.center(sum(width[j] for j in columns) + 2 * (len(columns) - 1))
                for name, columns in over
            ]
            lines.append("  ".join(parts).rstrip())
        for i, row in enumerate(cells, -1):
            parts = [
                row[j].ljust(width[j]) if j < table.keys else row[j].rjust(width[j]) for j in pick
            ]
            lines += [""] * (i > 0 and i in table.rules) + ["  ".join(parts).rstrip()]
            lines += ["  ".join("─" * width[j] for j in pick)] * (i < 0)
    return "\n".join([*lines, *(["", *table.notes] if table.notes else [])])


# --------------------------------------------------------------------------------------- Markdown


_TAG, _ENTITY = re.compile(r"<(?=[A-Za-z/!?])"), re.compile(r"&(?=#?\w+;)")


def markdown_cell(text: str) -> str:
    r"""A text as one cell of a Markdown table, or one item of a list: no line break, bar or tag.

    What stands between backticks is shown as it is, so only its bars and breaks are kept apart; a
    `<` or `&` that begins no tag and no entity stays, as in `p < 0.05`.

    Example:
        >>> from clbench.report.tables.render import markdown_cell
        >>> markdown_cell("a|b <i> & `x<y`")
        'a\\|b &lt;i> & `x<y`'
    """
    parts = re.split(r"(`[^`]*`)", " ".join(text.splitlines()).replace("|", "\\|"))
    return "".join(
        part if i % 2 else _TAG.sub("&lt;", _ENTITY.sub("&amp;", part))
        for i, part in enumerate(parts)
    )


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def decorate(text: str, marks: frozenset[Mark]) -> str:
        text = f"**{text}**" if "best" in marks else text
        text = f"<ins>{text}</ins>" if "second" in marks else text
        return text + superscript(marks).replace("*", "\\*")

    safe = replace(table, rows=tuple(tuple(map(markdown_cell, row)) for row in table.rows))
    cells = _decorated(safe, decorate)
    heads = [
        markdown_cell(f"{over}, {name}" if over else name)
        for over, name in zip(table.over or [""] * len(table.columns), table.columns, strict=True)
    ]
    lines = [f"**{markdown_cell(table.title)}**"]
    for pick in _blocks(table):
        ruler = ["---" if j < table.keys else "---:" for j in pick]
        lines += ["", line([heads[j] for j in pick]), "|" + "|".join(ruler) + "|"]
        lines += [line([row[j] for j in pick]) for row in cells]
    notes = [f"{markdown_cell(note)}  " for note in table.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])]).rstrip()


# -------------------------------------------------------------------------------------------- CSV


def _csv(table: Table) -> str:
    table = table.long or table
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue().rstrip("\n")


# ------------------------------------------------------------------------------------------ LaTeX

_TEX = {
    "\n": " ",
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "≤": r"$\le$", "≥": r"$\ge$", "Δ": r"$\Delta$",
    "→": r"$\to$", "▲": r"$\uparrow$", "▼": r"$\downarrow$", "≈": r"$\approx$", "≠": r"$\ne$",
    "△": r"$\triangle$", "▽": r"$\bigtriangledown$", "‡": r"$^{\ddagger}$",
    "∅": r"$\emptyset$", "○": r"$\circ$", "†": r"$^{\dagger}$", EMPTY: "--",
    **{c: f"$^{{{n}}}$" for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}  # fmt: skip


def _tex(text: str) -> str:
    body = "".join(_TEX.get(c, c) for c in text.lstrip(" "))
    return _INDENT + body if text.startswith(" ") else body


def _tex_cell(text: str, marks: frozenset[Mark], keys: bool) -> str:
    if not text:
        return ""
    body = _tex(text if keys else _MINUS.sub("−", text))
    if not keys and text in (EMPTY, "N/A"):
        return rf"\textcolor{{gray}}{{{body}}}"
    body = rf"\textbf{{{body}}}" if "best" in marks else body
    body = rf"\underline{{{body}}}" if "second" in marks else body
    body += "$^{*}$" * ("proven" in marks) + r"$^{\dagger}$" * ("untestable" in marks)
    return (r"\cellcolor{red!12}" if "proven" in marks else "") + body


def _latex(table: Table) -> str:
    float_ = "table*" if table.over else "table"
    lines = [
        r"% \usepackage{booktabs,multirow,graphicx} \usepackage[table]{xcolor}",
        rf"\begin{{{float_}}}[tb]", r"\centering", rf"\caption{{{_tex(table.title)}}}",
    ]  # fmt: skip
    for pick in _blocks(table):
        spec = "".join("l" if j < table.keys else "r" for j in pick)
        wide = len(pick) > _FITS
        lines += [r"\resizebox{\linewidth}{!}{%"] if wide else []
        lines += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
        if over := _joined(table, pick):
            at, heads, rules = 1, [], []
            for name, columns in over:
                n = len(columns)
                heads.append(
                    rf"\multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" if name else "&" * (n - 1)
                )
                rules += [rf"\cmidrule(lr){{{at}-{at + n - 1}}}"] * bool(name)
                at += n
            lines += [" & ".join(heads) + r" \\", " ".join(rules)]
        lines += [" & ".join(_tex(table.columns[j]) for j in pick) + r" \\", r"\midrule"]
        for i, row in enumerate(table.rows):
            cells = []
            for j in pick:
                cell = _tex_cell(row[j], table.marks.get((i, j), frozenset()), j < table.keys)
                span = table.spans.get((i, j), 1)
                cells.append(rf"\multirow{{{span}}}{{*}}{{{cell}}}" if span > 1 else cell)
            lines += [r"\addlinespace"] if i in table.rules and i else []
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}" + "}" * wide, r"\par\medskip"]
    lines += [rf"\par\raggedright\footnotesize {_tex(note)}" for note in table.notes]
    return "\n".join([*lines, rf"\end{{{float_}}}"])


# ------------------------------------------------------------------------------------------- HTML


def html_fragment(table: Table) -> str:
    """The table as HTML without a page around it; its CSS is `table.css`."""
    parts = [f'<div class="caption">{html.escape(table.title)}</div>']
    for pick in _blocks(table):
        parts.append('<table class="clbench"><thead>')
        if over := _joined(table, pick):
            cells = "".join(
                f'<th class="over" colspan="{len(same)}" scope="colgroup">{html.escape(name)}</th>'
                if name
                else f'<td colspan="{len(same)}"></td>'
                for name, same in over
            )
            parts.append(f"<tr>{cells}</tr>")
        heads = "".join(
            f'<th scope="col"{_class("key" * (j < table.keys))}>'
            f"{html.escape(table.columns[j])}</th>"
            for j in pick
        )
        parts.append(f"<tr>{heads}</tr></thead><tbody>")
        for i in range(len(table.rows)):
            cells = "".join(_html_cell(table, i, j) for j in pick if not _covered(table, i, j))
            parts.append(f"<tr{_class('rule' * (i in table.rules and i > 0))}>{cells}</tr>")
        parts.append("</tbody></table>")
    if table.notes:
        notes = "<br>\n".join(html.escape(note) for note in table.notes)
        parts.append(f'<p class="notes">{notes}</p>')
    return "\n".join(parts)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _covered(table: Table, row: int, column: int) -> bool:
    """Whether a cell lies below the first row of a spanning one."""
    return any(j == column and i < row < i + n for (i, j), n in table.spans.items())


def _html_cell(table: Table, i: int, j: int) -> str:
    text, marks = table.rows[i][j], table.marks.get((i, j), frozenset())
    body = html.escape(text.strip())
    body = f"<strong>{body}</strong>" if "best" in marks else body
    body = f"<u>{body}</u>" if "second" in marks else body
    if sup := superscript(marks):
        body += f"<sup>{sup}</sup>"
    names = [
        "key" * (j < table.keys),
        "indent" * text.startswith(" "),
        "absent" * (j >= table.keys and text in (EMPTY, "N/A")),
        "proven" * ("proven" in marks),
    ]
    span = f' rowspan="{n}"' if (n := table.spans.get((i, j), 1)) > 1 else ""
    return f"<td{_class(' '.join(filter(None, names)))}{span}>{body}</td>"


def _page(table: Table) -> str:
    css = resources.files("clbench.report.tables").joinpath("table.css").read_text("utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(table.title)}</title><style>{css}</style></head>\n"
        f"<body>\n{html_fragment(table)}\n</body></html>"
    )


# --------------------------------------------------------------------------------------------------
# Scale: how a Dice is written, as 0.817 or in percent as 81.7.
# Only what is read changes; CSV keeps full precision, from 0 to 1.


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A factor and its digits."""

    factor: float
    """What a number is multiplied with."""
    digits: int
    """Behind the point."""
    unit: str
    """What a title says: `Dice`, `Dice, %`."""

    def number(self, value: float) -> str:
        """A score; the dash where there is none."""
        return number(self.factor * value, self.digits)

    def signed(self, value: float) -> str:
        """A difference, always with its sign."""
        return signed(self.factor * value, self.digits)

    def over_seeds(self, values: Sequence[float]) -> str:
        """Mean ± sd over seeds; the mean alone for one seed."""
        sd = continual.spread(values)
        text = self.number(continual.mean(values))
        return text if math.isnan(sd) or text == EMPTY else f"{text} ± {self.number(sd)}"


SHARE = Scale(factor=1.0, digits=3, unit="Dice")
"""From 0 to 1, as the paper prints its tables."""
PERCENT = Scale(factor=100.0, digits=1, unit="Dice, %")
"""From 0 to 100, as the paper's text has it."""
