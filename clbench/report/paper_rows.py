"""The measured half of Tables 10 and 11: rows, differences from the print, marks, verdicts, notes.

Room: row 5 (no torch). Phantom and patients are never subtracted from each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clbench.report.agreement import FirstStep
from clbench.report.marks import ALPHA, Contest, mark
from clbench.report.paper_lines import (
    Column,
    Line,
    columns10,
    columns11,
    printed_lines,
    split_shared,
)
from clbench.report.paper_tables import BENCH, WHAT, assemble
from clbench.report.printed import BESIDE
from clbench.report.render import Table
from clbench.report.runs import PHANTOM, Group, collect, hole_notes, same_seeds
from clbench.report.scale import Scale
from clbench.report.verdict_column import verdicts
from clbench.taxonomy import STRUCTURES, canonical


def measured_table(
    which: int,
    *,
    source: str,
    results: Path,
    bench: str,
    scoring: str,
    seeds: Sequence[int] | None,
    ref: str,
    scale: Scale,
) -> Table:
    """Table 10 or 11 with measured rows; see `clbench.report.paper_tables.paper_table`."""
    groups = collect(results, bench=bench, scoring=scoring, seeds=seeds)
    own = bench == BENCH[which]
    columns = _columns(which, groups, own=own)
    phantom = any(not g.patients for g in groups)
    ordered = _ordered(which, groups) if own else [(None, "", g) for g in groups]
    lines: list[Line] = []
    shared: list[tuple[int, int]] = []
    if source == "both":
        _both(which, columns, ordered, phantom, lines, shared)
    else:
        _measured(columns, ordered, lines, shared, word=False)
    later = {i for at, n in shared for i in range(at + 1, at + n)}
    last = {j for j, c in enumerate(columns) if c.step > 1}
    contests = {}
    for j, c in enumerate(columns):
        cells = {
            i: line.group
            for i, line in enumerate(lines)
            if line.origin == "measured" and line.group and j in line.cells
            and not (i in later and c.step == 1)
        }  # fmt: skip
        contests[j] = Contest(step=c.step, members=c.members, cells=cells)
    ranked = same_seeds(groups)
    marked = mark(contests) if ranked else mark({})
    notes = _notes(groups, columns, scoring)
    notes += [f"no finished run of {s} (beside {p})" for p, s, g in ordered if p and g is None]
    notes += hole_notes(groups)
    if marked.m:
        notes.append(
            "light red (*): the best leads the next with p_Holm ≤ "
            f"{ALPHA:g}; dagger (†): not testable at this n; paired by patient, seeds averaged, "
            "two-sided, Wilcoxon signed-rank for one structure, stratified sign-flip for a mean; "
            f"m = {marked.m}, n = {_range(marked.n)} patients"
        )
    if source == "both" and phantom:
        notes.append("no difference is formed: phantom and patients are different data")
    elif source == "both":
        notes.append("difference: measured minus printed; other training runs, maybe other cases")
    words, tested = verdicts(results, groups, bench=bench, scoring=scoring, seeds=seeds, ref=ref)
    notes.append(tested)
    title = "measured" + (f" on the {PHANTOM}" if phantom else "")
    return assemble(
        which,
        columns,
        lines,
        shared,
        title=title if source == "measured" else f"printed (patients) and {title}",
        notes=notes,
        marks=marked.marks,
        verdicts={
            i: words.get(line.group.label, "")
            for i, line in enumerate(lines)
            if line.origin == "measured" and line.group and last & set(line.cells)
        },
        data="phantom" if phantom else "patients",
        what=""
        if own
        else f"{bench} in the layout of Table {which} ({WHAT[which]}), different data",
        scale=scale,
    )


def _columns(which: int, groups: Sequence[Group], *, own: bool) -> list[Column]:
    """The paper's columns with their structures, or the groups another benchmark has."""
    columns = columns10() if which == 10 else columns11()
    if not groups:
        return columns
    one = groups[0].runs[0]
    means = one.means
    if which == 11 and not (own and {c.name for c in columns} <= set(means)):
        columns = [
            Column(name=name, header=name, step=s)
            for name, members in means.items()
            for s in range(max(one.learned_at[m] for m in members), one.last + 1)
        ]
    members = {
        c.name: tuple(means[c.name] if c.name in means else [canonical(c.name)])
        for c in columns
        if c.name in means or (which == 10 and c.name not in ("Organ Mean", "Mean"))
    }
    return [replace(c, members=members.get(c.name, ())) for c in columns]


def _ordered(which: int, groups: Sequence[Group]) -> list[tuple[str | None, str, Group | None]]:
    """(printed method, strategy, runs) in the paper's order, then the rest; None = no run."""
    found: list[tuple[str | None, str, Group | None]] = []
    for printed, strategy in BESIDE[which].items():
        mine = [g for g in groups if g.strategy == strategy]
        found += [(printed, strategy, g) for g in mine] or [(printed, strategy, None)]
    beside = set(BESIDE[which].values())
    return found + [(None, g.strategy, g) for g in groups if g.strategy not in beside]


def _line(
    columns: Sequence[Column],
    printed: str | None,
    strategy: str,
    group: Group | None,
    *,
    word: bool,
) -> Line:
    """One measured row; of an absent strategy, a row of holes."""
    label = strategy if group is None else group.label
    encoding = "clip" if group is None else group.encoding
    if strategy == "universal" and encoding != "clip" and encoding not in label:
        label += f" [{encoding}]"
    if word and group is not None and not group.patients:
        label += " (PHANTOM)"
    none = {j for j, c in enumerate(columns) if c.step == 1 and c.name in ("Liver tumor", "Mean")}
    line = Line(label=label, origin="measured", cells={}, group=group, beside=printed or "")
    if group is not None:
        at = group.runs[0].learned_at
        none = {j for j, c in enumerate(columns) if any(at.get(m, 0) > c.step for m in c.members)}
    line.none = frozenset(none)
    for j, c in enumerate(columns):
        if j not in none:
            value, sd = (math.nan, math.nan) if group is None else group.value(c.step, c.members)
            line.cells[j], line.sd[j] = value, sd
    return line


def _runs_of_shared(lines: Sequence[Line]) -> list[int]:
    """Lengths of stretches of rows that begin from the same checkpoints."""
    lengths: list[int] = []
    last: tuple[FirstStep, ...] | None = None
    for line in lines:
        key = line.group.first_step if line.group and not line.group.absent else None
        if lengths and key is not None and key == last:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = key
    return lengths


def _measured(
    columns: Sequence[Column],
    ordered: Sequence[tuple[str | None, str, Group | None]],
    lines: list[Line],
    shared: list[tuple[int, int]],
    *,
    word: bool,
) -> None:
    """Rows of measured numbers alone; a shared step 1 is one cell."""
    made = [_line(columns, p, s, g, word=word) for p, s, g in ordered]
    at = len(lines)
    for n in _runs_of_shared(made):
        shared.append((at, n))
        at += n
    lines += made


def _both(
    which: int,
    columns: Sequence[Column],
    ordered: Sequence[tuple[str | None, str, Group | None]],
    phantom: bool,
    lines: list[Line],
    shared: list[tuple[int, int]],
) -> None:
    """Printed and measured rows in turn; a step 1 that several share has a row of its own."""
    printed, n = printed_lines(which, columns)
    full = {line.label: dict(line.cells) for line in printed}
    rows = split_shared(printed[:n], columns) + printed[n:] if n > 1 else printed
    mine: dict[str, list[Line]] = {}
    for p, s, g in ordered:
        if p:
            mine.setdefault(p, []).append(_line(columns, p, s, g, word=True))
    sharing = [m for p in [line.label for line in printed[:n]] for m in mine[p]]
    if n > 1 and len(sharing) == n and _runs_of_shared(sharing) == [n]:
        mine[rows[0].label] = [split_shared(sharing, columns)[0]]
    for row in rows:
        row.begins = True
        lines.append(row)
        for line in mine.get(row.label, []):
            lines.append(line)
            if line.group is not None and not phantom:
                lines.append(_difference(full.get(row.label, row.cells), line, row.label))
    at = len(lines)
    rest = [x for x in ordered if x[0] is None]
    _measured(columns, rest, lines, shared, word=True)
    if at < len(lines):
        lines[at].begins = True


def _difference(printed: Mapping[int, float], line: Line, beside: str) -> Line:
    """Measured minus printed, where both exist."""
    return Line(
        label="  difference",
        origin="difference",
        beside=beside,
        cells={j: v - printed[j] for j, v in line.cells.items() if j in printed},
        group=line.group,
    )


def _notes(groups: Sequence[Group], columns: Sequence[Column], scoring: str) -> list[str]:
    """What the measured numbers are."""
    if not groups:
        return ["no finished run"]
    one = groups[0].runs[0]
    notes = [
        f"{scoring} scoring; mean over seeds of means over structures of means over test cases"
    ]
    sizes: dict[str, set[int]] = {}
    for c, s in one.learned_at.items():
        cell = one.r.get((one.last, c))
        if cell is not None:
            sizes.setdefault(one.sources[s - 1], set()).add(cell.cases)
    notes.append(
        "test cases that count, per structure: "
        + ", ".join(f"{_range((min(n), max(n)))} {s}" for s, n in sizes.items())
    )
    single = {c.members for c in columns if len(c.members) == 1}
    for name, members in dict.fromkeys((c.name, c.members) for c in columns if len(c.members) > 1):
        words = ", ".join(STRUCTURES[m].prompt for m in members if (m,) not in single)
        of = f"{len(members)} structures" + (f" ({words})" if words else "")
        notes.append(f"{name}: of {of}, all of the same weight")
    record = one.record
    notes.append(
        f"profile {record['identity']['profile']['name']}, data {record['data_fingerprint']}"
    )
    return notes


def _range(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"
