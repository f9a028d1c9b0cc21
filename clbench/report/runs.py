"""Runs read back for tables and figures: checked, completed or marked as holes, grouped by method.

Room: row 5 (no torch). A cell whose test cases are not all there is a hole with its reason, never a
partial mean; runs that answer different questions are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import store
from clbench.metrics import transfer
from clbench.metrics.transfer import Cell
from clbench.report.agreement import FirstStep, first_step, patients_of, torn_notes

Floats = NDArray[np.float64]
PHANTOM = "PHANTOM, not patients"
"""In the title of every table and figure made from phantom runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run, read back."""

    folder: Path
    """Run folder."""
    record: Mapping[str, Any]
    """`run.json`."""
    r: Mapping[tuple[int, str], Cell]
    """R of the run, see `clbench.metrics.transfer.cells`; holes are NaN."""
    cases: Mapping[tuple[int, str], Mapping[str, float]]
    """(step, structure) → patient of the source that taught it → score, NaN where none exists;
    several cases of one patient are averaged first."""
    learned_at: Mapping[str, int]
    """Structure → 1-based step."""
    sources: tuple[str, ...]
    """Source of each step."""
    patient_of: Mapping[str, str]
    """"source/case" → patient, for cases that are no patients by themselves."""
    first: FirstStep
    """Where it starts from."""
    holes: Mapping[tuple[int, str], str] = field(default_factory=dict)
    """(step, structure) → why it has no number."""

    @property
    def means(self) -> dict[str, tuple[str, ...]]:
        """Table groups: name → structures, in the order they are complete, smaller ones first."""
        groups = self.record["course"]["groups"]
        return {
            name: tuple(groups[name])
            for name in sorted(
                groups,
                key=lambda n: (max(self.learned_at[c] for c in groups[n]), len(groups[n]), n),
            )
        }

    @property
    def values(self) -> dict[tuple[int, str], float]:
        """R without counts."""
        return {key: cell.value for key, cell in self.r.items()}

    @property
    def last(self) -> int:
        """Number of steps."""
        return len(self.sources)

    @property
    def seed(self) -> int:
        """Its seed."""
        return int(self.record["identity"]["seed"])


def read_run(
    folder: Path,
    scoring: str,
    metric: str = "dice",
    patient_of: Mapping[str, str] | None = None,
) -> Measured:
    """Read a run folder's record and scores.

    Args:
        folder: run folder.
        scoring: `strict` or `paper`.
        metric: which score.
        patient_of: "source/case" → patient; None: as the run's own record says.

    Raises:
        StoreError: missing or damaged.
    """
    record = store.read_record(folder)
    steps = record["course"]["steps"]
    sources = tuple(step["source"] for step in steps)
    learned_at = {c: i for i, step in enumerate(steps, 1) for c in step["learns"]}
    rows = store.read_scores(folder / "scores.csv")
    patient_of = record["course"].get("patient_of", {}) if patient_of is None else patient_of
    r = transfer.cells(rows, sources, scoring=scoring, metric=metric, patient_of=patient_of)
    cases: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        own = sources[row.learned_at - 1] == row.eval_set
        if own and row.scoring == scoring and row.measures(metric):
            cases.setdefault((row.step, row.structure), {})[row.case] = row.value
    holes = _holes(record, cases, learned_at)
    for key in holes:
        r[key] = Cell(value=math.nan, cases=len(cases.get(key, {})), missed=0)
    return Measured(
        folder=folder,
        record=record,
        r=r,
        cases={
            (t, c): transfer.per_patient(found, sources[learned_at[c] - 1], patient_of)
            for (t, c), found in cases.items()
        },
        learned_at=learned_at,
        sources=sources,
        patient_of=patient_of,
        first=first_step(rows, str(record.get("shared_step1") or folder), scoring),
        holes=holes,
    )


def _holes(
    record: Mapping[str, Any],
    cases: Mapping[tuple[int, str], Mapping[str, float]],
    learned_at: Mapping[str, int],
) -> dict[tuple[int, str], str]:
    """Cells that lack a test case of their source."""
    steps = record["course"]["steps"]
    tests: dict[str, list[str]] = {}
    for step, named in zip(steps, record["course"]["test"], strict=True):
        tests.setdefault(step["source"], []).extend(
            name.removeprefix(f"{step['source']}/") for name in named
        )
    found = {}
    for c, s in learned_at.items():
        expected = dict.fromkeys(tests[steps[s - 1]["source"]])
        for t in range(s, len(steps) + 1):
            have = cases.get((t, c), {})
            if absent := [case for case in expected if case not in have]:
                found[t, c] = (
                    "not scored"
                    if not have
                    else f"{len(absent)} of {len(expected)} test cases missing "
                    f"({steps[s - 1]['source']}/{absent[0]}{', …' if len(absent) > 1 else ''})"
                )
    return found


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
    absent: tuple[int, ...] = ()
    """Seeds that were asked for and have no finished run: every number of the group is a hole."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs."""
        return tuple(r.seed for r in self.runs)

    @property
    def patients(self) -> bool:
        """False on the phantom."""
        return bool(self.runs[0].record["patients"])

    @property
    def encoding(self) -> str:
        """Text encoding of its heads."""
        return str(self.runs[0].record["text_encoding"].get("encoding"))

    @property
    def first_step(self) -> tuple[FirstStep, ...]:
        """Step 1, one per seed; strategies that share it have equal ones."""
        return tuple(r.first for r in self.runs)

    def value(self, step: int, members: Sequence[str]) -> tuple[float, float]:
        """Mean and sd over seeds of the plain mean of some structures; NaN where any is missing."""
        if self.absent:
            return math.nan, math.nan
        per_seed = [
            transfer.mean(r.values.get((step, c), math.nan) for c in members) for r in self.runs
        ]
        return transfer.mean(per_seed), transfer.spread(per_seed)

    def table(self, at: Mapping[str, int]) -> dict[str, Floats]:
        """Per-patient scores in the form of `clbench.macro`.

        Args:
            at: structure → step after which it is looked at.

        Returns:
            Source → (seeds, patients, structures), NaN where a case has no score. Sources and
            structures keep their order, patients that of the first run.
        """
        one = self.runs[0]
        by_source: dict[str, list[str]] = {}
        for c in at:
            by_source.setdefault(one.sources[one.learned_at[c] - 1], []).append(c)
        found = {}
        for source, members in by_source.items():
            patients = dict.fromkeys(p for c in members for p in one.cases.get((at[c], c), {}))
            found[source] = np.array(
                [
                    [
                        [run.cases.get((at[c], c), {}).get(p, math.nan) for c in members]
                        for p in patients
                    ]
                    for run in self.runs
                ]
            ).reshape(len(self.runs), len(patients), len(members))
        return found


def collect(
    results: Path,
    *,
    bench: str,
    scoring: str,
    metric: str = "dice",
    seeds: Sequence[int] | None = None,
) -> list[Group]:
    """Finished runs of a benchmark, grouped by everything but the seed.

    Args:
        results: folder of runs.
        bench: benchmark.
        scoring: `strict` or `paper`.
        metric: which score.
        seeds: the seeds every strategy must have; None takes those there are. A group that lacks
            one is a hole as a whole.

    Raises:
        StoreError: they do not belong in one table.
    """
    folders = store.find_runs(results, bench=bench)
    records = {f: store.read_record(f) for f in folders}
    done = [f for f in folders if records[f]["status"] == "finished"]
    if seeds is not None:
        done = [f for f in done if records[f]["identity"]["seed"] in seeds]
    store.refuse_mixture([records[f] for f in done])
    patient_of = patients_of([records[f] for f in done])
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
        have = {records[f]["identity"]["seed"] for f in members}
        groups.append(
            Group(
                label=label,
                strategy=name,
                runs=tuple(read_run(f, scoring, metric, patient_of) for f in members),
                unfinished=sum(
                    records[f]["strategy"] == name and records[f]["status"] != "finished"
                    for f in folders
                ),
                absent=tuple(s for s in seeds or () if s not in have),
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
    """A hyperparameter or the version of a run's strategy; a run older than it has none, or 1."""
    found = record.get("with_defaults", record["identity"])["strategy"]
    return found.get(key, 1 if key == "version" else None)


def same_seeds(groups: Iterable[Group]) -> bool:
    """Whether all groups with numbers rest on the same seeds, so that rows may be compared."""
    return len({g.seeds for g in groups if not g.absent}) <= 1


def hole_notes(groups: Sequence[Group]) -> list[str]:
    """One line for everything that is missing: absent seeds, missing cases, unfinished runs."""
    notes = []
    for g in groups:
        if g.absent:
            notes.append(f"hole: {g.label} has no finished run of seed {_list(g.absent)}")
        by_reason: dict[str, list[tuple[int, str]]] = {}
        for run in g.runs:
            for key, reason in run.holes.items():
                by_reason.setdefault(f"seed {run.seed}: {reason}", []).append(key)
        for reason, keys in by_reason.items():
            steps = sorted({t for t, _ in keys})
            names = list(dict.fromkeys(c for _, c in keys))
            what = names[0] if len(names) == 1 else f"{len(names)} structures"
            notes.append(f"hole: {g.label}, {what} after step {_list(steps)}, {reason}")
        if g.unfinished:
            notes.append(f"left out: {g.unfinished} unfinished run(s) of {g.label}")
    if several := {case: p for g in groups for r in g.runs for case, p in r.patient_of.items()}:
        notes.append(
            f"a patient counts once: {len(several)} test cases are scans of "
            f"{len(set(several.values()))} patients, averaged first"
        )
    notes += torn_notes(groups)
    if not same_seeds(groups):
        each = "; ".join(f"{g.label}: {_list(g.seeds)}" for g in groups if not g.absent)
        notes.append(f"not the same seeds everywhere ({each}): rows are not ranked")
    if groups and max(len(g.runs) for g in groups) == 1:
        notes.append("one seed: conditional on one training run")
    return notes


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
