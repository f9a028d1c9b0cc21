"""Evidence: the runs of one benchmark as arrays over seeds and patients, holes named.

A patient is the unit: scans of one patient are averaged. A case that should
have a score and has none is a hole, and every number that would need it is left out with a word;
a structure that a case does not annotate, or does not contain, is no hole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clbench.errors import StoreError, unknown_name
from clbench.report.results import PHANTOM, FirstStep, Group, patients_of
from clbench.statistics.class_macro import by_patient
from clbench.store.run_folder import Score
from clbench.types import Floats

Key = tuple[int, str, str]
"""(1-based step, eval set, structure)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Scores of one structure after one step on one eval set."""

    values: Floats
    """(seeds, patients); nan = not annotated, not contained, or a hole."""
    with_empty: Floats
    """The same with an empty truth scored 1 (nothing predicted) or 0 (a false alarm)."""
    missed: int
    """Cells in which the structure was missed completely."""
    hole: str = ""
    """Which score is missing, in words; empty = none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One strategy with all its seeds."""

    label: str
    """Name in tables."""
    strategy: str
    """Registered name."""
    seeds: tuple[int, ...]
    """Seeds, sorted."""
    first_steps: tuple[FirstStep | None, ...]
    """Per seed: the first step, which other strategies may share; None where it is not known."""
    cells: Mapping[Key, Cells]
    """What was scored."""
    records: tuple[Mapping[str, Any], ...]
    """`run.json` of each seed."""
    metrics: frozenset[str]
    """Names of all metrics in its files."""
    unfinished: int
    """Runs left out because they are not finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Everything a report says something about."""

    bench: str
    """Benchmark."""
    version: int
    """Its version."""
    phantom: bool
    """Made from the phantom, not from patients."""
    scoring: str
    """`strict` or `paper`."""
    metric: str
    """Which score."""
    sources: tuple[str, ...]
    """Source of each step."""
    learned_at: Mapping[str, int]
    """Structure → 1-based step."""
    patients: Mapping[str, tuple[str, ...]]
    """Eval set → patients, in order of the split."""
    scans: Mapping[str, int]
    """Eval set → test cases; more than patients where a patient has several."""
    methods: tuple[Method, ...]
    """By label; the reference first."""
    splits: Sequence[Mapping[str, Any]]
    """Split of each step, as recorded."""
    metrics: frozenset[str] = frozenset()
    """Names of all metrics the runs hold."""

    @property
    def reference(self) -> Method:
        """The strategy all others are compared with."""
        return self.methods[0]

    @property
    def others(self) -> tuple[Method, ...]:
        """The strategies compared with the reference."""
        return self.methods[1:]

    @property
    def last(self) -> int:
        """Number of steps."""
        return len(self.sources)

    def home(self, structure: str) -> str:
        """The eval set on which a structure counts: that of the source that taught it."""
        return self.sources[self.learned_at[structure] - 1]

    def title(self) -> str:
        """Benchmark and version; says PHANTOM where it must."""
        return f"{self.bench} v{self.version}" + (f" on the {PHANTOM}" if self.phantom else "")


def evidence_of(
    groups: Sequence[Group], *, where: Path, reference: str, scoring: str, metric: str = "dice"
) -> Evidence:
    """The runs of a benchmark as arrays.

    Args:
        groups: all finished runs, at least one.
        where: their folder, for errors.
        reference: label or registered name of the reference strategy.
        scoring: `strict` or `paper`.
        metric: which score, the larger the better.

    Raises:
        StoreError: rows that belong to another run, or several variants of the reference.
        UnknownName: no finished run of the reference.
    """
    chosen = _reference(groups, reference, where)
    record = groups[0].runs[0].record
    course = record["course"]
    sources = tuple(step["source"] for step in course["steps"])
    tests: dict[str, list[str]] = {}
    for source, cases in zip(sources, course["test"], strict=True):
        known = tests.setdefault(source, [])
        known += [c for c in (_bare(source, c) for c in cases) if c not in known]
    splits = record["identity"]["splits"]
    if isinstance(splits, Mapping):  # as older runs recorded them
        splits = list(splits.values())
    patient_of = patients_of(run.record for group in groups for run in group.runs)
    ids = {s: [patient_of.get(f"{s}/{c}", c) for c in cases] for s, cases in tests.items()}
    learned_at = {c: i for i, step in enumerate(course["steps"], 1) for c in step["learns"]}
    ordered = [chosen, *(g for g in groups if g is not chosen)]
    methods = tuple(
        _method(g, tests, ids, learned_at, sources, scoring=scoring, metric=metric) for g in ordered
    )
    return Evidence(
        bench=record["identity"]["bench"],
        version=record["identity"]["bench_version"],
        phantom=not record["patients"],
        scoring=scoring,
        metric=metric,
        sources=sources,
        learned_at=learned_at,
        patients={s: tuple(dict.fromkeys(p)) for s, p in ids.items()},
        scans={s: len(p) for s, p in ids.items()},
        methods=methods,
        splits=splits,
        metrics=frozenset().union(*(m.metrics for m in methods)),
    )


def _reference(groups: Sequence[Group], ref: str, where: Path) -> Group:
    found = [g for g in groups if g.label == ref] or [g for g in groups if g.strategy == ref]
    if not found:
        raise unknown_name("finished run of a strategy", ref, [g.label for g in groups], where)
    if len(found) > 1:
        raise StoreError(
            "the reference has several variants",
            where=where,
            expected="one of: " + ", ".join(repr(g.label) for g in found),
            got=ref,
            next_step="give --ref the variant's whole label, in quotation marks",
        )
    return found[0]


def _bare(source: str, case: str) -> str:
    return case.removeprefix(f"{source}/")


def _method(
    group: Group,
    tests: Mapping[str, Sequence[str]],
    ids: Mapping[str, Sequence[str]],
    learned_at: Mapping[str, int],
    sources: Sequence[str],
    *,
    scoring: str,
    metric: str,
) -> Method:
    seeds = tuple(int(run.record["identity"]["seed"]) for run in group.runs)
    if len(set(seeds)) < len(seeds):
        raise StoreError(
            "two runs of one strategy have the same seed and settings",
            where=group.runs[0].folder.parent,
            got=seeds,
            next_step="remove the older one",
        )
    tables: list[dict[Key, dict[str, Score]]] = []
    metrics: set[str] = set()
    for run in group.runs:
        _refuse_strangers(run.stored.rows, run.record, run.folder)
        metrics |= run.stored.metrics
        table: dict[Key, dict[str, Score]] = {}
        for row in run.stored.rows_of(scoring, metric):
            cells = table.setdefault((row.step, row.eval_set, row.structure), {})
            if row.case in cells:
                raise StoreError(
                    "a case is scored twice",
                    where=run.folder / "scores.csv",
                    got=f"{row.eval_set}/{row.case}, {row.structure}, step {row.step}",
                    next_step="run again with --fresh",
                )
            cells[row.case] = row
        tables.append(table)
    keys = {key for table in tables for key in table}
    keys |= {
        (t, sources[at - 1], c) for c, at in learned_at.items() for t in range(at, len(sources) + 1)
    }
    return Method(
        label=group.label,
        strategy=group.strategy,
        seeds=seeds,
        first_steps=tuple(
            run.first if run.record.get("shared_step1") else None for run in group.runs
        ),
        cells={
            key: _cells([t.get(key, {}) for t in tables], seeds, tests[key[1]], ids[key[1]], key)
            for key in sorted(keys)
            if key[1] in tests
        },
        records=tuple(run.record for run in group.runs),
        metrics=frozenset(metrics),
        unfinished=group.unfinished,
    )


def _cells(
    tables: Sequence[Mapping[str, Score]],
    seeds: Sequence[int],
    cases: Sequence[str],
    patients: Sequence[str],
    key: Key,
) -> Cells:
    values = np.full((len(tables), len(cases)), np.nan)
    with_empty, missed, holes = values.copy(), 0, []
    for s, table in enumerate(tables):
        for i, case in enumerate(cases):
            row = table.get(case)
            if row is None or (math.isnan(row.value) and row.status in ("ok", "fn_only")):
                holes.append(f"case {key[1]}/{case} has no {key[2]} score at seed {seeds[s]}")
                continue
            values[s, i] = with_empty[s, i] = row.value
            missed += row.status == "fn_only"
            if row.status in ("both_empty", "fp_only"):
                with_empty[s, i] = float(row.status == "both_empty")
                values[s, i] = np.nan
    more = f" (and {len(holes) - 1} more)" if len(holes) > 1 else ""
    return Cells(
        values=by_patient(values[..., None], patients)[..., 0],
        with_empty=by_patient(with_empty[..., None], patients)[..., 0],
        missed=missed,
        hole=f"{holes[0]} after step {key[0]}{more}" if holes else "",
    )


def _refuse_strangers(rows: Sequence[Score], record: Mapping[str, Any], folder: Path) -> None:
    """A score file must belong to the run whose folder it lies in."""
    identity = record["identity"]
    own = (identity["bench"], identity["bench_version"], record["strategy"], identity["seed"])
    for row in rows:
        theirs = (row.bench, row.bench_version, row.strategy, row.seed)
        if theirs != own:
            raise StoreError(
                "the scores belong to another run",
                where=folder / "scores.csv",
                expected=own,
                got=theirs,
                next_step="put the right file back, or run again with --fresh",
            )
