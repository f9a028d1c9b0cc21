"""Columns and rows of Tables 10 and 11 in the making, and the printed ones."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from clbench.report.tables.render import EMPTY, SHARE, Scale

if TYPE_CHECKING:
    from clbench.report.scores import StrategyScores

LETTER = {"printed": "p", "measured": "m"}
"""What marks a cell's origin in text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column: a structure or a mean, after one step."""

    name: str
    """Name in the printed file, or of the benchmark's group."""
    header: str
    """What stands above."""
    step: int
    """1-based step."""
    members: tuple[str, ...] = ()
    """Structures whose plain mean it is, as the runs say; empty until runs are read."""


@dataclass(kw_only=True)
class Line:
    """One row in the making."""

    label: str
    """First column."""
    origin: str
    """`printed`, `measured` or `difference`."""
    cells: dict[int, float]
    """Column → number; NaN = a hole. Absent = blank, because a shared cell says it."""
    none: frozenset[int] = frozenset()
    """Columns that cannot exist: a structure before its step."""
    texts: dict[int, str] = field(default_factory=dict)
    """Column → text as printed."""
    sd: dict[int, float] = field(default_factory=dict)
    """Column → sd over seeds."""
    group: StrategyScores | None = None
    """Runs behind a measured row."""
    beside: str = ""
    """The printed method a measured row or a difference stands beside."""
    begins: bool = False
    """Begins a group of rows."""

    def text(self, column: int, scale: Scale) -> str:
        """What is set in type."""
        if column in self.none:
            return NONE
        if column not in self.cells:
            return ""
        value = self.cells[column]
        if math.isnan(value):
            return EMPTY
        if self.origin == "difference":
            return scale.signed(value)
        as_printed = self.texts.get(column) if scale is SHARE else None
        return f"{as_printed or scale.number(value)} {LETTER[self.origin]}"


def columns10() -> list[Column]:
    """Table 10: 13 organs, the tumor, two means; each after both steps."""
    headers = dict.fromkeys((c.cls, c.header) for c in printed10())
    return [Column(name=name, header=header, step=s) for name, header in headers for s in (1, 2)]


def columns11() -> list[Column]:
    """Table 11: three groups, each from the step that teaches it."""
    found = dict.fromkeys((c["group"], int(c["step"])) for c in printed11())
    groups = list(dict.fromkeys(g for g, _ in found))
    return [
        Column(name=g, header=g, step=s)
        for g, s in sorted(found, key=lambda x: (groups.index(x[0]), x[1]))
    ]


def printed_lines(which: int, columns: Sequence[Column]) -> tuple[list[Line], int]:
    """The printed rows, and how many of the first share their cells of step 1."""
    at = {(c.name, c.step): j for j, c in enumerate(columns)}
    lines = {m: Line(label=m, origin="printed", cells={}) for m in BESIDE[which]}
    if which == 11:
        for cell in printed11():
            if (j := at.get((cell["group"], int(cell["step"])))) is not None:
                line = lines[cell["method"]]
                line.cells[j], line.texts[j] = float(cell["dsc"]), cell["dsc"]
        return list(lines.values()), 1
    shared = 1
    for c in printed10():
        methods = c.rowspan_methods.split("|")
        shared = max(shared, len(methods))
        for method in methods:
            j, line = at[c.cls, c.step], lines[method]
            if c.value == NONE:
                line.none |= {j}
            else:
                line.cells[j], line.texts[j] = float(c.value), c.value
    return list(lines.values()), shared


def shared_label(lines: Sequence[Line]) -> str:
    """Names of rows that stand for one cell."""
    return ", ".join(line.label for line in lines)


def split_shared(lines: Sequence[Line], columns: Sequence[Column]) -> list[Line]:
    """Rows that share step 1, as one row of step 1 and a row each of the later steps."""
    first = {j for j, c in enumerate(columns) if c.step == 1}
    one = lines[0]
    head = Line(
        label=shared_label(lines), origin=one.origin, none=one.none & first, group=one.group,
        beside=", ".join(dict.fromkeys(x.beside for x in lines if x.beside)),
        cells={j: v for j, v in one.cells.items() if j in first},
        texts={j: v for j, v in one.texts.items() if j in first},
        sd={j: v for j, v in one.sd.items() if j in first},
    )  # fmt: skip
    for line in lines:
        line.cells = {j: v for j, v in line.cells.items() if j not in first}
        line.none -= first
    return [head, *lines]


# --------------------------------------------------------------------------------------------------
# The numbers printed in the paper's Tables 10 and 11, from the data package, and their quirks.
# The files are the paper's, cell by cell; nothing is computed here.


NONE = "N/A"
"""As the paper prints what does not exist: a structure before the step that teaches it."""
AGGREGATES = ("Organ Mean", "Mean")
"""Columns of Table 10 that are means over structures."""
BESIDE = {
    10: {"LwF": "lwf_ct", "ILT": "ilt_ct", "PLOP": "plop_ct", "Ours": "universal"},
    11: {
        "LwF": "lwf_ct", "ILT": "ilt_ct", "PLOP": "plop_ct",
        "Ours (1-hot)": "universal_onehot", "Ours (CLIP)": "universal",
    },
}  # fmt: skip
"""Table → printed method → the strategy that runs it as the authors did."""
QUIRKS = {
    10: (
        "LwF, ILT and PLOP share the model of step 1: its cell is printed once",
        "Organ Mean: of 13 structures; Mean: of 14; every structure has the same weight",
        "PLOP's Mean after step 2 is printed as 0.768; its cells give 0.767",
        "the printed Liver is taken to be that of BTCV; the paper does not say",
    ),
    11: (
        "0.891 is printed in all three rows of LwF, ILT and PLOP: one shared model of step 1",
        "printed cells are means of 7, 3 and 4 structures; none can be checked from its parts",
        "the paper's text calls the third row Ours (CLIP); in the table it is the fifth",
        "the paper prints no mean over all groups",
    ),
}
"""Table → what a reader of the printed numbers must know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """One printed cell of Table 10."""

    row_owner: str
    """Method in whose row it stands."""
    rowspan_methods: str
    """Methods it holds for, joined by |."""
    step: int
    """1 or 2."""
    cls: str
    """Name in the paper's Table 2, or an aggregate."""
    header: str
    """Printed header."""
    value: str
    """Printed text."""


def _read(name: str) -> list[dict[str, str]]:
    text = resources.files("clbench.published").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def printed10() -> list[Printed]:
    """The cells of Table 10 in the order of the file."""
    return [
        Printed(
            row_owner=r["row_owner"], rowspan_methods=r["rowspan_methods"], step=int(r["step"]),
            cls=r["class"], header=r["printed_header"], value=r["printed_value"],
        )
        for r in _read("table10.csv")
    ]  # fmt: skip


def printed11() -> list[Mapping[str, str]]:
    """The cells of Table 11 in the order of the file: method, group, step, dsc."""
    return list(_read("table11.csv"))
