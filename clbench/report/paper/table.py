"""The paper's Tables 10 and 11: as printed, as measured, or both, each cell marked with its origin.

A measured number is a mean over
seeds of plain means over structures; where anything of it is missing, the cell is a hole.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clbench.errors import SettingError
from clbench.report.paper.columns import (
    BESIDE,
    NONE,
    QUIRKS,
    Column,
    Line,
    columns10,
    columns11,
    printed10,
    printed11,
    printed_lines,
    split_shared,
)
from clbench.report.paper.marks import Contest, mark, printed_marks
from clbench.report.scores import PHANTOM, FirstStep, Scores, StrategyScores
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import confirm
from clbench.report.significance.endpoints import FINAL
from clbench.report.tables.render import EMPTY, SHARE, Mark, Scale, Table
from clbench.spec import registry
from clbench.spec.settings import load_profile
from clbench.spec.taxonomy import canonical, structure

BENCH = {10: "tumor_ext", 11: "body_ext"}
"""Table → the benchmark whose runs may stand beside the printed numbers."""
WHAT = {10: "tumor extension", 11: "body extension"}


def paper_table(
    which: int,
    study: Analysis,
    *,
    source: str = "both",
    seeds: Sequence[int] | None = None,
    scale: Scale = SHARE,
) -> Table:
    """Table 10 or 11.

    Args:
        which: 10 or 11.
        study: the runs, not looked at for `printed`, the reference and the protocol. Runs of any
            other benchmark than the table's stand alone.
        source: `printed`, `measured` or `both`.
        seeds: those every strategy must have; see `clbench.report.study.Study.scores`.
        scale: how the numbers are written.

    Raises:
        StoreError: the measured runs do not belong in one table.
        SettingError: another benchmark's runs beside the printed numbers.
    """
    if source != "measured" and study.bench != BENCH[which]:
        raise SettingError(
            f"the paper's Table {which} has no numbers of this benchmark",
            where="--bench",
            expected=f"{BENCH[which]}; other data stand in a table of their own: --source measured",
            got=study.bench,
        )
    columns = columns10() if which == 10 else columns11()
    if source == "printed":
        lines, shared = printed_lines(which, columns)
        return assemble(
            which, columns, lines, [(0, shared)], title="printed in the paper", scale=scale
        )

    return measured_table(which, study, source=source, seeds=seeds, scale=scale)


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
    """One line per cell at full precision; the printed half alone equals its file.

    Args:
        which: 10 or 11.
        columns: of the table, left to right.
        lines: of the table, top to bottom.
        marks: (line, column) → marks of the cell.
        data: where measured values come from; empty = printed values alone.
        verdicts: line → verdict in words; None: no such column.
    """
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


# --------------------------------------------------------------------------------------------------
# The measured half of Tables 10 and 11: rows, differences from the print, marks, verdicts, notes.
# Phantom and patients are never subtracted from each other.


def measured_table(
    which: int,
    study: Analysis,
    *,
    source: str,
    seeds: Sequence[int] | None,
    scale: Scale,
) -> Table:
    """Table 10 or 11 with measured rows; see `clbench.report.paper.table.paper_table`.

    Args:
        which: 10 or 11.
        study: the runs, their reference and protocol.
        source: `measured` or `both`.
        seeds: only these; None: all.
        scale: how scores are written.
    """
    scores = study.scores(seeds=seeds)
    groups = scores.strategies if scores else ()
    own = study.bench == BENCH[which]
    columns = _columns(which, scores, own=own)
    phantom = bool(scores and scores.phantom)
    ordered = _ordered(which, groups) if own else [(None, "", g) for g in groups]
    lines: list[Line] = []
    shared: list[tuple[int, int]] = []
    if source == "both":
        not_compared = _not_compared(which, scores)
        _both(which, columns, ordered, not not_compared, lines, shared)
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
    marked = mark(contests if scores and scores.same_seeds else {}, study.protocol)
    notes = _measured_notes(scores, columns, study.scoring)
    notes += [f"no finished run of {s} (beside {p})" for p, s, g in ordered if p and g is None]
    notes += scores.notes() if scores else []
    if marked.n[1]:
        notes.append(
            "light red (*): the best leads the next with an adjusted p ≤ "
            f"{study.protocol.alpha:g}; dagger (†): too few patients to test; paired by patient, "
            f"seeds averaged, two-sided sign flips, {study.protocol.adjusted_by} over m = "
            f"{marked.m} columns, n = {_range(marked.n)} patients"
        )
    if source == "both":
        notes.append(
            f"no difference is formed: {not_compared}"
            if not_compared
            else "difference: measured minus printed; the same cases, other training runs"
        )
    words, tested = verdicts(study, scores, seeds)
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
        else f"{study.bench} in the layout of Table {which} ({WHAT[which]}), different data",
        scale=scale,
    )


def _not_compared(which: int, scores: Scores | None) -> str:
    """Why no measured number is set against a printed one; empty = split and profile are equal."""
    if scores is None:
        return "no finished run"
    if scores.phantom:
        return "phantom and patients are different data"
    record = scores.record
    paper, asked = load_profile("paper"), record.identity.profile
    recorded = (record.with_defaults or {}).get("profile", {})
    for group in ("data", "train"):
        own = json.loads(json.dumps(dataclasses.asdict(getattr(paper, group))))
        if asked.get("name") != "paper" or recorded.get(group, own) != own:
            return f"the runs' profile ({asked.get('name')}) is not the paper's"
    steps = registry.benchmark(BENCH[which]).steps
    for step, split in zip(steps, record.identity.splits, strict=False):
        if step.split.draw is not None:
            return "the paper does not say which cases it tests"
        if any(set(getattr(step.split, k)) != set(split.get(k, ())) for k in ("train", "test")):
            return f"the split of step {step.name!r} is not the paper's"
    return ""


def _columns(which: int, scores: Scores | None, *, own: bool) -> list[Column]:
    """The paper's columns with their structures, or the groups another benchmark has."""
    columns = columns10() if which == 10 else columns11()
    if scores is None:
        return columns
    means = scores.means
    if which == 11 and not (own and {c.name for c in columns} <= set(means)):
        columns = [
            Column(name=name, header=name, step=s)
            for name, members in means.items()
            for s in range(max(scores.learned_at[m] for m in members), scores.last + 1)
        ]
    members = {
        c.name: tuple(means[c.name] if c.name in means else [canonical(c.name)])
        for c in columns
        if c.name in means or (which == 10 and c.name not in ("Organ Mean", "Mean"))
    }
    return [replace(c, members=members.get(c.name, ())) for c in columns]


def _ordered(
    which: int, groups: Sequence[StrategyScores]
) -> list[tuple[str | None, str, StrategyScores | None]]:
    """(printed method, strategy, runs) in the paper's order, then the rest; None = no run."""
    found: list[tuple[str | None, str, StrategyScores | None]] = []
    for printed, strategy in BESIDE[which].items():
        mine = [g for g in groups if g.strategy == strategy]
        found += [(printed, strategy, g) for g in mine] or [(printed, strategy, None)]
    beside = set(BESIDE[which].values())
    return found + [(None, g.strategy, g) for g in groups if g.strategy not in beside]


def _line(
    columns: Sequence[Column],
    printed: str | None,
    strategy: str,
    group: StrategyScores | None,
    *,
    word: bool,
) -> Line:
    """One measured row; of an absent strategy, a row of holes."""
    label = strategy if group is None else group.label
    encoding = "clip" if group is None else str(group.records[0].text_encoding.get("encoding"))
    if strategy == "universal" and encoding != "clip" and encoding not in label:
        label += f" [{encoding}]"
    if word and group is not None and not group.records[0].patients:
        label += " (PHANTOM)"
    none = {j for j, c in enumerate(columns) if c.step == 1 and c.name in ("Liver tumor", "Mean")}
    line = Line(label=label, origin="measured", cells={}, group=group, beside=printed or "")
    if group is not None:
        none = {
            j
            for j, c in enumerate(columns)
            if any(
                m in group.home and (c.step, group.home[m], m) not in group.cells for m in c.members
            )
        }
    line.none = frozenset(none)
    for j, c in enumerate(columns):
        if j not in none:
            line.cells[j], line.sd[j] = (
                group.over_seeds(c.step, c.members) if group else (math.nan, math.nan)
            )
    return line


def _runs_of_shared(lines: Sequence[Line]) -> list[int]:
    """Lengths of stretches of rows that begin from the same checkpoints."""
    lengths: list[int] = []
    last: tuple[FirstStep, ...] | None = None
    for line in lines:
        key = line.group.first_steps if line.group and not line.group.absent else None
        if lengths and key is not None and key == last:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = key
    return lengths


def _measured(
    columns: Sequence[Column],
    ordered: Sequence[tuple[str | None, str, StrategyScores | None]],
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
    ordered: Sequence[tuple[str | None, str, StrategyScores | None]],
    compared: bool,
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
            if line.group is not None and compared:
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


def _measured_notes(scores: Scores | None, columns: Sequence[Column], scoring: str) -> list[str]:
    """What the measured numbers are."""
    if scores is None:
        return ["no finished run"]
    one = scores.strategies[0]
    notes = [
        f"{scoring} scoring; mean over seeds of means over structures of means over test cases"
    ]
    sizes: dict[str, set[int]] = {}
    for c, source in one.home.items():
        sizes.setdefault(source, set()).add(int(one.cells[scores.last, source, c].cases[0]))
    notes.append(
        "test cases that count, per structure: "
        + ", ".join(f"{_range((min(n), max(n)))} {s}" for s, n in sizes.items())
    )
    single = {c.members for c in columns if len(c.members) == 1}
    for name, members in dict.fromkeys((c.name, c.members) for c in columns if len(c.members) > 1):
        words = ", ".join(structure(m).prompt for m in members if (m,) not in single)
        of = f"{len(members)} structures" + (f" ({words})" if words else "")
        notes.append(f"{name}: of {of}, all of the same weight")
    record = scores.record
    notes.append(f"profile {record.identity.profile['name']}, data {record.data_fingerprint}")
    return notes


def _range(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"


# --------------------------------------------------------------------------------------------------
# The last column of Tables 10 and 11: what the confirmatory test says about each strategy.


HOLE = "hole"
_SEEN_BY_OTHER = {"better": "worse", "worse": "better"}


def verdicts(
    study: Analysis, scores: Scores | None, seeds: Sequence[int] | None
) -> tuple[dict[str, str], str]:
    """The word for each strategy against the reference, seen from the strategy.

    Args:
        study: the runs, the reference and the protocol.
        scores: the strategies of the table.
        seeds: the table's seeds; None: all there are, and the tests of the study are the table's.

    Returns:
        Label → word, and a line that says what was tested. No word where nothing can be compared.
    """
    whole = [s for s in scores.strategies if not s.absent] if scores else []
    if scores is None or len(whole) < 2:
        return {}, "no verdict: two strategies with finished runs are needed"
    ref, protocol = study.reference, study.protocol
    names = [g.label for g in whole if ref in (g.label, g.strategy)]
    if len(names) != 1:
        return {}, f"no verdict: {len(names)} finished strategies answer to the reference {ref!r}"
    comparisons = study.comparisons
    if seeds is not None:
        chosen = study.reference_first(replace(scores, strategies=tuple(whole)))
        comparisons = confirm(chosen, protocol)
    found = {**{s.label: HOLE for s in scores.strategies}, names[0]: "reference"}
    cautious, m = False, 0
    for c in comparisons:
        if c.endpoint is FINAL and c.verdict is not None:
            found[c.b] = _SEEN_BY_OTHER.get(c.verdict.word, c.verdict.word)
            cautious, m = cautious or bool(c.verdict.scope), c.m
    scope = ", for these training runs" if cautious else ""
    return found, (
        f"verdict: mean of all structures after the last step, against {names[0]}; sign "
        f"flips of patients, {protocol.adjusted_by} (m = {m}), alpha {protocol.alpha:g}, "
        f"equivalence margin {protocol.margin:g}{scope}"
    )
