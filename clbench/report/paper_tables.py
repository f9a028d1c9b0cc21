"""The paper's Tables 10 and 11: as printed, as measured, or both, each cell marked with its origin.

Room: row 5 (no torch; numpy and scipy only where runs are read). A measured number is a mean over
seeds of plain means over structures; where anything of it is missing, the cell is a hole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench.errors import SettingError
from clbench.report.marks import printed_marks
from clbench.report.paper_lines import Column, Line, columns10, columns11, printed_lines
from clbench.report.printed import NONE, QUIRKS, printed10, printed11
from clbench.report.render import EMPTY, Mark, Table
from clbench.report.scale import SHARE, Scale

BENCH = {10: "tumor_ext", 11: "body_ext"}
"""Table → the benchmark whose runs may stand beside the printed numbers."""
WHAT = {10: "tumor extension", 11: "body extension"}


def paper_table(
    which: int,
    *,
    source: str = "both",
    results: Path = Path("results"),
    bench: str | None = None,
    scoring: str = "strict",
    seeds: Sequence[int] | None = None,
    ref: str = "universal",
    scale: Scale = SHARE,
) -> Table:
    """Table 10 or 11.

    Args:
        which: 10 or 11.
        source: `printed`, `measured` or `both`.
        results: folder of runs; not looked at for `printed`.
        bench: whose runs; default the benchmark of the table. Any other stands alone.
        scoring: of the measured cells.
        seeds: those every strategy must have; see `clbench.report.runs.collect`.
        ref: reference strategy of the verdicts.
        scale: how the numbers are written.

    Raises:
        StoreError: the measured runs do not belong in one table.
        SettingError: another benchmark's runs beside the printed numbers.
    """
    bench = bench or BENCH[which]
    if source != "measured" and bench != BENCH[which]:
        raise SettingError(
            f"the paper's Table {which} has no numbers of this benchmark",
            where="--bench",
            expected=f"{BENCH[which]}; other data stand in a table of their own: --source measured",
            got=bench,
        )
    columns = columns10() if which == 10 else columns11()
    if source == "printed":
        lines, shared = printed_lines(which, columns)
        return assemble(
            which, columns, lines, [(0, shared)], title="printed in the paper", scale=scale
        )
    from clbench.report.paper_rows import measured_table

    return measured_table(
        which, source=source, results=results, bench=bench, scoring=scoring, seeds=seeds, ref=ref,
        scale=scale,
    )  # fmt: skip


def assemble(
    which: int,
    columns: Sequence[Column],
    lines: Sequence[Line],
    shared: Sequence[tuple[int, int]],
    *,
    title: str,
    notes: Sequence[str] = (),
    marks: Mapping[tuple[int, int], frozenset[Mark]] | None = None,
    verdicts: Mapping[int, str] | None = None,
    data: str = "",
    what: str = "",
    scale: Scale = SHARE,
) -> Table:
    """Rows to a table.

    Args:
        which: 10 or 11.
        columns: columns.
        lines: rows.
        shared: (first row, how many) that share their cells of step 1.
        title: what the numbers are.
        notes: lines below.
        marks: (row, column) → marks of measured cells.
        verdicts: row → word of a last column; none where nothing can be compared.
        data: `phantom` or `patients`; empty where nothing is measured.
        what: what the table is called, if not by the paper's number.
        scale: how the numbers are written.
    """
    printed = [i for i, line in enumerate(lines) if line.origin == "printed"]
    later = {i for at, n in shared for i in range(at + 1, at + n)}
    values = {
        (i, j): lines[i].cells[j]
        for i in printed
        for j in lines[i].cells
        if not (i in later and columns[j].step == 1)
    }
    everywhere = range(len(columns))
    found = {**printed_marks(everywhere, values), **(marks or {})}
    keys = 2 if data else 1
    spans: dict[tuple[int, int], int] = {}
    has = bool(verdicts and any(verdicts.values()))
    rows = []
    for i, line in enumerate(lines):
        texts = [line.text(j, scale) for j in everywhere]
        if i in later:
            texts = ["" if columns[j].step == 1 else text for j, text in enumerate(texts)]
        seeds = str(len(line.group.runs)) if line.group and line.origin == "measured" else ""
        tail = (verdicts.get(i, ""),) if has and verdicts else ()
        rows.append((line.label, *((seeds,) if data else ()), *texts, *tail))
    for at, n in shared:
        if n > 1:
            spans |= {(at, keys + j): n for j, c in enumerate(columns) if c.step == 1}
    return Table(
        title=f"{what or f'Table {which}, {WHAT[which]}'}, {scale.unit}: {title}",
        columns=(
            "method", *(("seeds",) if data else ()), *(f"Step {c.step}" for c in columns),
            *(("verdict",) if has else ()),
        ),
        over=(
            *("" for _ in range(keys)), *(c.header for c in columns), *(("",) if has else ()),
        ),
        rows=tuple(rows),
        notes=_notes(which, bool(printed), bool(data), notes),
        keys=keys,
        block=16,
        narrow=8,
        tail=int(has),
        marks={(i, keys + j): m for (i, j), m in found.items()},
        spans=spans,
        rules=frozenset(i for i, line in enumerate(lines) if line.begins),
        long=long_table(which, columns, lines, found, data, verdicts),
    )  # fmt: skip


def _notes(which: int, printed: bool, measured: bool, more: Sequence[str]) -> tuple[str, ...]:
    """Lines below the table."""
    return (
        *(("p: printed in the paper, not measured", *QUIRKS[which]) if printed else ()),
        *(("m: measured",) if measured else ()),
        *more,
        f"{NONE}: cannot exist, the structure is taught later"
        + (f"; {EMPTY}: a hole, runs are missing or incomplete" if measured else ""),
        "bold (¹): best of a column within one origin; underlined (²): the next, where one is best",
        *(
            ("no printed lead is marked as proven: there is no score per patient",)
            if printed
            else ()
        ),
    )


def long_table(
    which: int,
    columns: Sequence[Column],
    lines: Sequence[Line],
    marks: Mapping[tuple[int, int], frozenset[Mark]],
    data: str,
    verdicts: Mapping[int, str] | None,
) -> Table:
    """One line per cell at full precision; the printed half alone equals its file."""
    if not data and which == 10:
        heads = (
            "row_owner", "rowspan_methods", "step", "class", "printed_header", "printed_value",
        )  # fmt: skip
        cells = tuple(
            (c.row_owner, c.rowspan_methods, str(c.step), c.cls, c.header, c.value)
            for c in printed10()
        )
        return Table(title="", columns=heads, rows=cells)
    if not data:
        names = ("method", "group", "step", "dsc")
        return Table(
            title="", columns=names, rows=tuple(tuple(c[n] for n in names) for c in printed11())
        )
    rows = []
    for i, line in enumerate(lines):
        for j in sorted({*line.cells, *line.none}):
            c, value = columns[j], line.cells.get(j, math.nan)
            exact = NONE if j in line.none else "" if math.isnan(value) else repr(value)
            sd = line.sd.get(j, math.nan)
            rows.append(
                (
                    line.label, line.beside, str(c.step), c.name, c.header, line.origin,
                    "patients" if line.origin == "printed" else data,
                    line.texts.get(j, exact), "" if math.isnan(sd) else repr(sd),
                    str(len(line.group.runs)) if line.group else "",
                    " ".join(map(str, line.group.seeds)) if line.group else "",
                    str(len(c.members)) if c.members else "",
                    " ".join(sorted(marks.get((i, j), ()))),
                    verdicts.get(i, "") if verdicts else "",
                )
            )  # fmt: skip
    return Table(
        title="",
        columns=(
            "method", "beside", "step", "class", "header", "origin", "data", "value", "sd", "seeds",
            "seed_list", "structures", "marks", "verdict",
        ),
        rows=tuple(rows),
    )  # fmt: skip
