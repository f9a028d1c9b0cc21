"""Tables: a title, columns, rows, notes; printed to the terminal, Markdown, CSV or LaTeX.

Room: row 5 (no torch). Every printed number is computed here from `scores.csv`; a mean over an
incomplete set is an empty cell.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench import store
from clbench.errors import StoreError
from clbench.metrics import transfer
from clbench.metrics.transfer import Cell

EMPTY = "–"  # noqa: RUF001  # the dash of tables
"""A number that does not exist, or is not there yet."""
PHANTOM = "PHANTOM, not patients"
"""In the title of every table made from phantom runs."""


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
    long: Table | None = None
    """What CSV gets instead: one line per cell, at full precision."""


def render(table: Table, format_: str) -> str:
    """The table as `terminal`, `md`, `csv` or `tex`."""
    return {"terminal": _terminal, "md": _markdown, "csv": _csv, "tex": _latex}[format_](table)


def _blocks(table: Table) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    size = table.block or max(1, len(table.columns) - table.keys)
    found = []
    for at in range(table.keys, len(table.columns), size):
        pick = [*range(table.keys), *range(at, min(at + size, len(table.columns)))]
        found.append(
            (
                tuple(table.columns[i] for i in pick),
                [tuple(row[i] for i in pick) for row in table.rows],
            )
        )
    return found


def _terminal(table: Table) -> str:
    lines = [table.title]
    for columns, rows in _blocks(table):
        width = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]

        def line(cells: Sequence[str], width: Sequence[int] = width) -> str:
            parts = [
                c.ljust(w) if i < table.keys else c.rjust(w)
                for i, (c, w) in enumerate(zip(cells, width, strict=True))
            ]
            return "  ".join(parts).rstrip()

        lines += ["", line(columns), "  ".join("─" * w for w in width), *map(line, rows)]
    return "\n".join([*lines, *(["", *table.notes] if table.notes else [])])


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    lines = [f"**{table.title}**"]
    for columns, rows in _blocks(table):
        marks = ["---" if i < table.keys else "---:" for i in range(len(columns))]
        lines += ["", line(columns), "|" + "|".join(marks) + "|", *map(line, rows)]
    notes = [f"{note}  " for note in table.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])]).rstrip()


def _csv(table: Table) -> str:
    table = table.long or table
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue().rstrip("\n")


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", EMPTY: "--",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def _latex(table: Table) -> str:
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}}}"]
    for columns, rows in _blocks(table):
        spec = "l" * table.keys + "r" * (len(columns) - table.keys)
        lines += [
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            " & ".join(map(_tex, columns)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_tex, row)) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    lines += [rf"\par\footnotesize {_tex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"])


# ------------------------------------------------------------------------------- measured numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run, read back."""

    folder: Path
    """Run folder."""
    record: Mapping[str, Any]
    """`run.json`."""
    r: Mapping[tuple[int, str], Cell]
    """R of the run, see `clbench.metrics.transfer.cells`."""
    learned_at: Mapping[str, int]
    """Structure → 1-based step."""
    sources: tuple[str, ...]
    """Source of each step."""

    @property
    def values(self) -> dict[tuple[int, str], float]:
        """R without counts."""
        return {key: cell.value for key, cell in self.r.items()}

    @property
    def last(self) -> int:
        """Number of steps."""
        return len(self.sources)


def read_run(folder: Path, scoring: str) -> Measured:
    """Read a run folder's record and scores.

    Raises:
        StoreError: missing or damaged.
    """
    record = store.read_record(folder)
    steps = record["course"]["steps"]
    sources = tuple(step["source"] for step in steps)
    rows = store.read_scores(folder / "scores.csv")
    return Measured(
        folder=folder,
        record=record,
        r=transfer.cells(rows, sources, scoring=scoring),
        learned_at={c: i for i, step in enumerate(steps, 1) for c in step["learns"]},
        sources=sources,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    """Name in tables."""
    strategy: str
    """Registered name."""
    runs: tuple[Measured, ...]
    """In order of seed."""
    unfinished: int = field(default=0)
    """Runs left out because they are not finished."""


def collect(results: Path, *, bench: str, scoring: str) -> list[Group]:
    """Finished runs of a benchmark, grouped by everything but the seed.

    Raises:
        StoreError: they do not belong in one table.
    """
    folders = store.find_runs(results, bench=bench)
    records = {f: store.read_record(f) for f in folders}
    done = [f for f in folders if records[f]["status"] == "finished"]
    store.refuse_mixture([records[f] for f in done])
    keyed: dict[tuple[str, str], list[Path]] = {}
    for f in done:
        identity = records[f]["identity"]
        rest = {k: identity[k] for k in ("strategy", "vectors", "weights")}
        keyed.setdefault((records[f]["strategy"], store.run_id(rest)), []).append(f)
    names = [name for name, _ in keyed]
    groups = []
    for (name, _), members in keyed.items():
        members.sort(key=lambda f: records[f]["identity"]["seed"])
        one = records[members[0]]
        label = name
        if names.count(name) > 1:  # say what tells the variants of a strategy apart
            others = [records[m[0]] for (n, _), m in keyed.items() if n == name]
            label += f" ({_differs(one, others)})"
        groups.append(
            Group(
                label=label,
                strategy=name,
                runs=tuple(read_run(f, scoring) for f in members),
                unfinished=sum(
                    records[f]["strategy"] == name and records[f]["status"] != "finished"
                    for f in folders
                ),
            )
        )
    return sorted(groups, key=lambda g: g.label)


def _differs(one: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    changed = {key for o in others for key in o["identity"]["strategy"]} - {"class"}
    words = [
        f"{key}={_option(one, key)}"
        for key in sorted(changed)
        if any(_option(o, key) != _option(one, key) for o in others)
    ]
    if any(o["identity"]["vectors"] != one["identity"]["vectors"] for o in others):
        words.append(str(one["text_encoding"].get("encoding")))
    if any(o["identity"]["weights"] != one["identity"]["weights"] for o in others):
        words.append(f"weights {str(one['identity']['weights'])[:8]}")
    return ", ".join(words)


def _option(record: Mapping[str, Any], key: str) -> Any:
    """A hyperparameter of a run's strategy; a run older than the option has none."""
    found = record.get("with_defaults", record["identity"])["strategy"]
    return found.get(key)


def number(value: float, digits: int = 3) -> str:
    """A score as text; the dash where there is none."""
    return EMPTY if math.isnan(value) else f"{value:.{digits}f}"


def over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sd over seeds; the mean alone for one seed."""
    sd = transfer.spread(values)
    text = number(transfer.mean(values), digits)
    return text if math.isnan(sd) or text == EMPTY else f"{text} ± {sd:.{digits}f}"


def run_report(folder: Path, *, scoring: str) -> list[Table]:
    """What one run ends with: the score of every structure after each step, and the forgetting."""
    run = read_run(folder, scoring)
    record, last = run.record, run.last
    steps = range(1, last + 1)
    ceiling = transfer.cells(
        store.read_scores(folder / "scores.csv"),
        run.sources,
        scoring="strict",
        metric="dice_ceiling",
    )
    gone = transfer.forgetting(run.values, run.learned_at, last)
    rows = []
    for name, own in run.learned_at.items():
        after = [run.r.get((t, name)) for t in steps]
        final = after[-1]
        rows.append(
            (
                name,
                run.sources[own - 1],
                *(EMPTY if c is None else number(c.value) for c in after),
                number(gone.get(name, math.nan)),
                str(final.cases) if final else EMPTY,
                str(final.missed) if final else EMPTY,
                number(ceiling[last, name].value) if (last, name) in ceiling else EMPTY,
            )
        )
    for title, members in record["course"]["groups"].items():
        old = [gone[c] for c in members if c in gone]
        rows.append(
            (
                title,
                f"mean of {len(members)}",
                *(
                    number(transfer.mean(run.values.get((t, c), math.nan) for c in members))
                    for t in steps
                ),
                number(transfer.mean(old)) if len(old) == len(members) else EMPTY,
                EMPTY, EMPTY, EMPTY,
            )
        )  # fmt: skip
    scores = Table(
        title=f"{_title(record)}: {record['strategy']}, seed {record['identity']['seed']}, "
        f"Dice ({scoring} scoring)",
        columns=(
            "structure", "test cases of", *(f"after step {t}" for t in steps),
            "forgetting", "cases", "missed", "ceiling",
        ),
        rows=tuple(rows),
        keys=2,
        notes=(
            "forgetting: best score of an earlier step minus the score after the last.",
            "missed: cases in which nothing was found.",
            "ceiling: the truth itself taken to the network's grid and back (strict scoring).",
        ),
    )  # fmt: skip
    bwt = transfer.backward_transfer(run.values, run.learned_at, last)
    kept = Table(
        title="What was kept and what was learned",
        columns=("measure", "value"),
        rows=(
            ("old structures, each after its own step",
             number(transfer.mean(run.values.get((s, c), math.nan)
                                  for c, s in run.learned_at.items() if s < last))),
            ("old structures, after the last step",
             number(transfer.accuracy(run.values, run.learned_at, last, last.__gt__))),
            ("forgetting (mean over old structures)", number(transfer.mean(gone.values()))),
            ("backward transfer (mean over old structures)", number(transfer.mean(bwt.values()))),
            ("new structures, each after its own step",
             number(transfer.learning_accuracy(run.values, run.learned_at))),
            ("all structures, after the last step",
             number(transfer.accuracy(run.values, run.learned_at, last, lambda s: True))),
        ),
        notes=(_past(record),),
    )  # fmt: skip
    return [scores, kept] if last > 1 else [scores]


def _past(record: Mapping[str, Any]) -> str:
    """Which past data training opened, from the ledger."""
    steps = record["course"]["steps"]
    opened = 0
    for number_, by_purpose in record["ledger"].items():
        own = set(record["course"]["train"][int(number_) - 1])
        for purpose in ("train", "pseudo"):
            opened += len(set(by_purpose.get(purpose, ())) - own)
    return (
        f"past images opened in training: {opened or 'none'} (enforced; {len(steps)} steps, "
        "see ledger in run.json)"
    )


def _title(record: Mapping[str, Any]) -> str:
    identity = record["identity"]
    return f"{identity['bench']} v{identity['bench_version']}" + (
        "" if record["patients"] else f" on the {PHANTOM}"
    )


def summary(*, results: Path, bench: str, scoring: str) -> Table:
    """One row per strategy: what it knew, what it lost, what it learned."""
    groups = collect(results, bench=bench, scoring=scoring)
    if not groups:
        raise StoreError(
            "there are no finished runs of this benchmark",
            where=results / bench,
            next_step=f"clbench run --bench {bench} --strategy universal",
        )
    rows = []
    for g in groups:
        last, at = g.runs[0].last, g.runs[0].learned_at
        first = [c for c, s in at.items() if s == 1]
        begin = [transfer.mean(r.values[1, c] for c in first) for r in g.runs]
        end = [transfer.mean(r.values[last, c] for c in first) for r in g.runs]
        lowest = min(
            ((r.values[1, c], c, r.record["identity"]["seed"]) for r in g.runs for c in first),
            key=lambda x: x[0],
        )
        minutes = [
            sum(step["train"]["train_s"] + step["train"]["prepare_s"]
                for step in r.record["cost"].values()) / 60
            for r in g.runs
        ]  # fmt: skip
        rows.append(
            (
                g.label,
                ", ".join(str(r.record["identity"]["seed"]) for r in g.runs),
                over_seeds(begin),
                f"{lowest[0]:.3f} ({lowest[1]}, seed {lowest[2]})",
                over_seeds(end),
                over_seeds([a - b for a, b in zip(begin, end, strict=True)]),
                over_seeds([transfer.learning_accuracy(r.values, at) for r in g.runs]),
                over_seeds([transfer.accuracy(r.values, at, last, lambda s: True) for r in g.runs]),
                over_seeds(minutes, 1),
            )
        )
    record = groups[0].runs[0].record
    cases = ", ".join(
        f"{len(test)} {step['source']}"
        for step, test in zip(record["course"]["steps"], record["course"]["test"], strict=True)
    )
    notes = [
        f"Dice ({scoring} scoring), class means over test cases ({cases}); mean ± sd over seeds.",
        f"profile {record['identity']['profile']['name']}, data {record['data_fingerprint']}.",
        "Training time includes the shared first step.",
    ]
    if unfinished := sum(g.unfinished for g in groups):
        notes.append(f"left out: {unfinished} unfinished run(s)")
    return Table(
        title=f"{_title(record)}: summary",
        columns=(
            "strategy", "seeds", "step 1 structures, after step 1", "lowest of them, any seed",
            "the same, after the last step", "lost", "new structures", "all, after the last step",
            "training, min",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )  # fmt: skip


def table10(*, source: str, results: Path, scoring: str) -> Table:
    """The paper's Table 10; see `clbench.report.paper_tables`."""
    from clbench.report.paper_tables import table10 as make

    return make(source=source, results=results, scoring=scoring)
