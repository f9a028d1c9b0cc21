"""Columns and rows of Tables 10 and 11: printed, measured, and the difference of the two.

Every row has the same form, whatever its origin. Phantom and patients are never subtracted from
each other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from clbench.report.paper.printed import BESIDE, NONE, printed_cells
from clbench.report.tables.render import EMPTY, SHARE, Scale
from clbench.spec.taxonomy import canonical

if TYPE_CHECKING:
    from clbench.report.scores import Scores, StrategyScores


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


class Cell(NamedTuple):
    """One number of a row."""

    value: float = math.nan
    """NaN: a hole."""
    sd: float = math.nan
    """Over seeds."""
    text: str = ""
    """As printed; `N/A` where no number can exist, a structure before its step."""


@dataclass(kw_only=True)
class Row:
    """One row of Table 10 or 11."""

    label: str
    """First column."""
    origin: str
    """`printed`, `measured` or `difference`."""
    cells: dict[int, Cell] = field(default_factory=dict)
    """Column → number; absent: blank, because a shared cell says it."""
    runs: StrategyScores | None = None
    """Runs behind a measured row or a difference."""
    beside: str = ""
    """The printed method a measured row or a difference stands beside."""
    begins: bool = False
    """Begins a group of rows."""
    shares: int = 1
    """Rows, from this one down, that share its cells of step 1; 0: a row above holds them."""
    verdict: str = ""
    """What the confirmatory test says."""

    def numbers(self, columns: Sequence[Column]) -> dict[int, Cell]:
        """The cells that this row shows and that can have a number."""
        return {
            j: cell
            for j, cell in self.cells.items()
            if cell.text != NONE and (self.shares or columns[j].step > 1)
        }

    def text(self, j: int, column: Column, scale: Scale) -> str:
        """What is set in type.

        Args:
            j: place of the column.
            column: the column.
            scale: how numbers are written.
        """
        if j not in self.cells or (column.step == 1 and not self.shares):
            return ""
        cell = self.cells[j]
        if cell.text == NONE:
            return NONE
        if math.isnan(cell.value):
            return EMPTY
        if self.origin == "difference":
            return scale.signed(cell.value)
        printed = cell.text if scale is SHARE else ""
        return f"{printed or scale.number(cell.value)} {self.origin[0]}"


def columns_of(which: int, scores: Scores | None = None, *, own: bool = True) -> list[Column]:
    """The paper's columns with their structures, or the groups another benchmark has.

    Args:
        which: 10 or 11.
        scores: the runs; None: the printed columns alone.
        own: the benchmark is the paper's.
    """
    steps: dict[tuple[str, str], set[int]] = {}
    for cell in printed_cells(which):
        steps.setdefault((cell.name, cell.header), set()).add(cell.step)
    columns = [
        Column(name=name, header=header, step=step)
        for (name, header), taught in steps.items()
        for step in sorted(taught)
    ]
    if scores is None:
        return columns
    means = scores.means
    if which == 11 and not (own and {c.name for c in columns} <= set(means)):
        columns = [
            Column(name=name, header=name, step=step)
            for name, members in means.items()
            for step in range(max(scores.learned_at[m] for m in members), scores.last + 1)
        ]
    return [replace(c, members=_members(c.name, means, which)) for c in columns]


def _members(name: str, means: Mapping[str, tuple[str, ...]], which: int) -> tuple[str, ...]:
    if name in means:
        return means[name]
    return (canonical(name),) if which == 10 and name not in ("Organ Mean", "Mean") else ()


def printed_rows(which: int, columns: Sequence[Column]) -> list[Row]:
    """The printed rows of Table 10 or 11."""
    places = {(c.name, c.step): j for j, c in enumerate(columns)}
    rows = {method: Row(label=method, origin="printed") for method in BESIDE[which]}
    for cell in printed_cells(which):
        if (j := places.get((cell.name, cell.step))) is None:
            continue
        value = math.nan if cell.text == NONE else float(cell.text)
        for method in cell.methods:
            rows[method].cells[j] = Cell(value=value, text=cell.text)
            if len(cell.methods) > 1:
                rows[method].shares = len(cell.methods) if method == cell.methods[0] else 0
    return list(rows.values())


def measured_rows(
    which: int, columns: Sequence[Column], strategies: Sequence[StrategyScores], *, own: bool
) -> list[Row]:
    """A row per strategy, in the paper's order, then the rest; of an absent one, a row of holes.

    Args:
        which: 10 or 11.
        columns: of the table.
        strategies: the runs.
        own: the benchmark is the paper's; others have the rows of their runs alone.
    """
    beside = BESIDE[which] if own else {}
    rows = []
    for printed, name in beside.items():
        same = (s for s in strategies if s.strategy == name)
        rows += [_measured(columns, printed, name, s) for s in (*same,) or (None,)]
    rest = [s for s in strategies if s.strategy not in beside.values()]
    return rows + [_measured(columns, "", s.strategy if own else "", s) for s in rest]


def _measured(
    columns: Sequence[Column], beside: str, strategy: str, runs: StrategyScores | None
) -> Row:
    row = Row(label=strategy, origin="measured", runs=runs, beside=beside)
    if runs is None:
        never = ("Liver tumor", "Mean")
        texts = [NONE if c.step == 1 and c.name in never else "" for c in columns]
        row.cells = {j: Cell(text=text) for j, text in enumerate(texts)}
        return row
    row.label = runs.label
    encoding = str(runs.records[0].text_encoding.get("encoding"))
    if strategy == "universal" and encoding != "clip" and encoding not in row.label:
        row.label += f" [{encoding}]"
    home = runs.home
    for j, c in enumerate(columns):
        if not in_course(c, runs):
            row.cells[j] = Cell(text=NONE)
            continue
        before = any((c.step, home[m], m) not in runs.cells for m in c.members)
        row.cells[j] = Cell(text=NONE) if before else Cell(*runs.over_seeds(c.step, c.members))
    return row


def in_course(column: Column, runs: StrategyScores) -> bool:
    """Whether the course of some runs has the column's structures, and its step."""
    steps = len(runs.records[0].course.steps)
    return bool(column.members) and column.step <= steps and set(column.members) <= set(runs.home)


def share_first_step(rows: Sequence[Row]) -> None:
    """Let neighbors that begin from the same checkpoints share their cells of step 1."""
    for _, neighbors in groupby(rows, _first_steps):
        first, *others = neighbors
        first.shares = 1 + len(others)
        for row in others:
            row.shares = 0


def _first_steps(row: Row) -> Hashable:
    return row.runs.first_steps if row.runs and not row.runs.absent else id(row)


def beside_each_other(
    columns: Sequence[Column], printed: list[Row], measured: Sequence[Row], *, compared: bool
) -> list[Row]:
    """Printed and measured rows in turn; a step 1 that several share has a row of its own.

    Args:
        columns: of the table.
        printed: the printed rows.
        measured: the measured ones.
        compared: whether a difference is formed.
    """
    whole = {row.label: row.cells for row in printed}
    matching: dict[str, list[Row]] = {}
    for row in measured:
        if row.runs and not row.runs.records[0].patients:
            row.label += " (PHANTOM)"
        matching.setdefault(row.beside, []).append(row)
    if (n := printed[0].shares) > 1:
        sharing = [m for row in printed[:n] for m in matching[row.label]]
        printed = [_take_first_step(printed[:n], columns), *printed]
        if len(sharing) == n and len({_first_steps(m) for m in sharing}) == 1:
            matching[printed[0].label] = [_take_first_step(sharing, columns)]
    rows = []
    for row in printed:
        row.begins = True
        rows.append(row)
        for mine in matching.get(row.label, []):
            rows.append(mine)
            if mine.runs is not None and compared:
                rows.append(_difference(whole.get(row.label, row.cells), mine, row.label))
    rest = matching.get("", [])
    share_first_step(rest)
    if rest:
        rest[0].begins = True
    return rows + rest


def _take_first_step(rows: Sequence[Row], columns: Sequence[Column]) -> Row:
    """Take the cells of step 1, which all share, out of some rows, into a row of their own."""
    first = {j for j, c in enumerate(columns) if c.step == 1}
    head = replace(
        rows[0],
        label=", ".join(row.label for row in rows),
        beside=", ".join(dict.fromkeys(row.beside for row in rows if row.beside)),
        cells={j: cell for j, cell in rows[0].cells.items() if j in first},
        shares=1,
    )
    for row in rows:
        row.cells = {j: cell for j, cell in row.cells.items() if j not in first}
        row.shares = 1
    return head


def _difference(printed: Mapping[int, Cell], measured: Row, beside: str) -> Row:
    """Measured minus printed, where both can exist."""
    cells = {
        j: Cell(cell.value - printed[j].value)
        for j, cell in measured.cells.items()
        if j in printed and NONE not in (cell.text, printed[j].text)
    }
    return Row(
        label="  difference", origin="difference", beside=beside, cells=cells, runs=measured.runs
    )
