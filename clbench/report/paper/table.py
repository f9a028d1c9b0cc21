"""The paper's Tables 10 and 11: as printed, as measured, or both, each cell marked with its origin.

A measured number is a mean over
seeds of plain means over structures; where anything of it is missing, the cell is a hole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clbench.errors import SettingError
from clbench.report.paper.marks import Marked, best_and_second, mark
from clbench.report.paper.printed import BENCH, NONE, QUIRKS, WHAT, published_table
from clbench.report.paper.rows import (
    Column,
    Row,
    beside_each_other,
    columns_of,
    in_course,
    measured_rows,
    printed_rows,
    share_first_step,
)
from clbench.report.scores import Scores, on_phantom
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.confirmatory import HOLE, confirm
from clbench.report.significance.endpoints import FINAL
from clbench.report.tables.render import EMPTY, SHARE, Mark, Scale, Table, long_table
from clbench.spec import registry
from clbench.spec.settings import load_profile
from clbench.spec.taxonomy import structure

_SEEN_BY_OTHER = {"better": "worse", "worse": "better"}
Marks = Mapping[tuple[int, int], set[Mark]]
"""(row, column) → marks."""


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
    own = study.bench == BENCH[which]
    if source != "measured" and not own:
        raise SettingError(
            f"the paper's Table {which} has no numbers of this benchmark",
            where="--bench",
            expected=f"{BENCH[which]}; other data stand in a table of their own: --source measured",
            got=study.bench,
        )
    scores = None if source == "printed" else study.scores(seeds=seeds)
    columns = columns_of(which, scores, own=own)
    notes, marks = [], {}
    if source == "printed":
        rows = printed_rows(which, columns)
    else:
        rows = _rows(which, columns, scores, source=source, own=own)
        marked = _mark(columns, rows, scores, study)
        marks = dict(marked.marks)
        notes = _measured_notes(columns, rows, scores, study, marked)
        if source == "both":
            why = _not_compared(which, scores)
            notes.append(
                f"no difference is formed: {why}"
                if why
                else "difference: measured minus printed; the same cases, other training runs"
            )
        notes.append(_judge(columns, rows, study, scores, seeds))
    what = f"Table {which}, {WHAT[which]}"
    if not own:
        what = f"{study.bench} in the layout of Table {which} ({WHAT[which]}), different data"
    origin = {"printed": "printed in the paper", "both": "printed (patients) and measured"}
    table = _assemble(columns, rows, marks | _printed_marks(columns, rows), source, scale)
    return replace(
        table,
        title=f"{what}, {scale.unit}: {origin.get(source, source)}{on_phantom(scores)}",
        notes=_notes(which, source, notes),
        long=published_table(which)
        if source == "printed"
        else _long(columns, rows, table, phantom=bool(scores and scores.phantom)),
    )


def _assemble(
    columns: Sequence[Column], rows: Sequence[Row], marks: Marks, source: str, scale: Scale
) -> Table:
    """Columns, rows and marks as they are set in type."""
    keys = 1 if source == "printed" else 2
    judged = any(row.verdict for row in rows)
    lines = []
    for row in rows:
        seeds = str(len(row.runs.runs)) if row.runs and row.origin == "measured" else ""
        texts = (row.text(j, c, scale) for j, c in enumerate(columns))
        lines.append((*(row.label, seeds)[:keys], *texts, *(row.verdict,) * judged))
    verdict = ("verdict",) * judged
    return Table(
        title="",
        columns=(*("method", "seeds")[:keys], *(f"Step {c.step}" for c in columns), *verdict),
        over=(*("",) * keys, *(c.header for c in columns), *("",) * judged),
        rows=tuple(lines),
        keys=keys,
        block=16,
        narrow=8,
        tail=int(judged),
        marks={(i, keys + j): frozenset(words) for (i, j), words in marks.items()},
        spans={
            (i, keys + j): row.shares
            for i, row in enumerate(rows)
            for j, c in enumerate(columns)
            if row.shares > 1 and c.step == 1
        },
        rules=frozenset(i for i, row in enumerate(rows) if row.begins),
    )


def _rows(
    which: int, columns: Sequence[Column], scores: Scores | None, *, source: str, own: bool
) -> list[Row]:
    rows = measured_rows(which, columns, scores.strategies if scores else (), own=own)
    if source == "measured":
        share_first_step(rows)
        return rows
    compared = not _not_compared(which, scores)
    return beside_each_other(columns, printed_rows(which, columns), rows, compared=compared)


def _printed_marks(
    columns: Sequence[Column], rows: Sequence[Row]
) -> dict[tuple[int, int], set[Mark]]:
    """Best and runner-up of the printed cells; a printed lead cannot be tested."""
    printed = {i: row.numbers(columns) for i, row in enumerate(rows) if row.origin == "printed"}
    return {
        (i, j): {word}
        for j in range(len(columns))
        for i, word in best_and_second(
            {i: cells[j].value for i, cells in printed.items() if j in cells}
        ).items()
    }


def _mark(
    columns: Sequence[Column], rows: Sequence[Row], scores: Scores | None, study: Analysis
) -> Marked:
    """Marks of the measured cells; none where strategies lack seeds of each other."""
    measured = {i: row for i, row in enumerate(rows) if row.origin == "measured" and row.runs}
    numbers = {i: row.numbers(columns) for i, row in measured.items()}
    cells = {
        j: (c, {i: row.runs for i, row in measured.items() if row.runs and j in numbers[i]})
        for j, c in enumerate(columns)
    }
    return mark(cells if scores and scores.same_seeds else {}, study.protocol)


def _notes(which: int, source: str, more: Sequence[str]) -> tuple[str, ...]:
    """Lines below the table."""
    printed, measured = source != "measured", source != "printed"
    return (
        *(("p: printed in the paper, not measured", *QUIRKS[which]) if printed else ()),
        *("m: measured",) * measured,
        *more,
        f"{NONE}: cannot exist, the structure is taught later"
        + f"; {EMPTY}: a hole, runs are missing or incomplete" * measured,
        "bold (¹): best of a column within one origin; underlined (²): the next, where one is best",
        *("no printed lead is marked as proven: there is no score per patient",) * printed,
    )


def _long(columns: Sequence[Column], rows: Sequence[Row], table: Table, *, phantom: bool) -> Table:
    """One line per cell at full precision."""
    lines = []
    for i, row in enumerate(rows):
        data = "phantom" if phantom and row.origin != "printed" else "patients"
        of_runs = (len(row.runs.runs), row.runs.seeds) if row.runs else (None, None)
        for j, cell in sorted(row.cells.items()):
            c, marks = columns[j], table.marks.get((i, table.keys + j), ())
            lines.append(
                (
                    row.label, row.beside, c.step, c.name, c.header, row.origin, data,
                    cell.text or cell.value, cell.sd, *of_runs, len(c.members) or None,
                    tuple(sorted(marks)), row.verdict,
                )
            )  # fmt: skip
    return long_table(
        "method beside step class header origin data value sd seeds seed_list structures marks "
        "verdict",
        lines,
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


def _measured_notes(
    columns: Sequence[Column],
    rows: Sequence[Row],
    scores: Scores | None,
    study: Analysis,
    marked: Marked,
) -> list[str]:
    """What the measured numbers are, what is missing, and how leads are tested."""
    absent = [
        f"no finished run of {row.label} (beside {row.beside})"
        for row in rows
        if row.origin == "measured" and row.runs is None
    ]
    if scores is None:
        return ["no finished run", *absent]
    sizes: dict[str, set[int]] = {}
    one = scores.strategies[0]
    for c, source in one.home.items():
        sizes.setdefault(source, set()).add(int(one.cells[scores.last, source, c].cases[0]))
    means = "mean over seeds of means over structures of means over test cases"
    notes = [
        f"{study.scoring} scoring; {means}",
        "test cases that count, per structure: "
        + ", ".join(f"{_range((min(n), max(n)))} {s}" for s, n in sizes.items()),
    ]
    single = {c.members for c in columns if len(c.members) == 1}
    for name, members in dict.fromkeys((c.name, c.members) for c in columns if len(c.members) > 1):
        prompts = ", ".join(structure(m).prompt for m in members if (m,) not in single)
        of = f"{len(members)} structures" + (f" ({prompts})" if prompts else "")
        notes.append(f"{name}: of {of}, all of the same weight")
    profile = scores.record.identity.profile["name"]
    if foreign := [c for c in columns if not in_course(c, one)]:
        named = dict.fromkeys(f"{c.header}, step {c.step}" for c in foreign)
        notes.append(
            f"{NONE}, since the course {scores.bench} does not have it: {'; '.join(named)}"
        )
    notes += [f"profile {profile}, data {scores.record.data_fingerprint}", *absent]
    notes += scores.notes()
    if marked.n[1]:
        notes.append(
            "light red (*): the best leads the next with an adjusted p ≤ "
            f"{study.protocol.alpha:g}; dagger (†): too few patients to test; paired by patient, "
            f"seeds averaged, two-sided sign flips, {study.protocol.adjusted_by} over m = "
            f"{marked.m} columns, n = {_range(marked.n)} patients"
        )
    return notes


def _range(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"


def _judge(
    columns: Sequence[Column],
    rows: Sequence[Row],
    study: Analysis,
    scores: Scores | None,
    seeds: Sequence[int] | None,
) -> str:
    """Give each measured row that reaches a later step its verdict, seen from the strategy.

    Args:
        columns: of the table.
        rows: of the table; their verdicts are set.
        study: the runs, the reference and the protocol.
        scores: the strategies of the table.
        seeds: the table's seeds; None: all there are, and the tests of the study are the table's.

    Returns:
        A line that says what was tested, or why there is no verdict.
    """
    whole = [s for s in scores.strategies if not s.absent] if scores else []
    if scores is None or len(whole) < 2:
        return "no verdict: two strategies with finished runs are needed"
    ref, protocol = study.reference, study.protocol
    names = [s.label for s in whole if ref in (s.label, s.strategy)]
    if len(names) != 1:
        return f"no verdict: {len(names)} finished strategies answer to the reference {ref!r}"
    comparisons = study.comparisons
    if seeds is not None:
        chosen = study.reference_first(replace(scores, strategies=tuple(whole)))
        comparisons = confirm(chosen, protocol)
    tested = {c.b: c for c in comparisons if c.endpoint is FINAL and c.verdict is not None}
    verdicts = {names[0]: "reference"} | {
        label: _SEEN_BY_OTHER.get(c.verdict.word, c.verdict.word)
        for label, c in tested.items()
        if c.verdict
    }
    for row in rows:
        later = any(columns[j].step > 1 for j in row.numbers(columns))
        if row.origin == "measured" and row.runs and later:
            row.verdict = verdicts.get(row.runs.label, HOLE)
    scope = any(c.verdict and c.verdict.scope for c in tested.values())
    m = max((c.m for c in tested.values()), default=0)
    return (
        f"verdict: mean of all structures after the last step, against {names[0]}; sign "
        f"flips of patients, {protocol.adjusted_by} (m = {m}), alpha {protocol.alpha:g}, "
        f"equivalence margin {protocol.margin:g}" + ", for these training runs" * scope
    )
