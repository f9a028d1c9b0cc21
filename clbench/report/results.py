"""Runs read back for tables and figures: checked, completed or marked as holes, grouped by method.

A cell whose test cases are not all there is a hole with its reason, never a
partial mean; runs that answer different questions are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.evaluation.metrics.continual import Cell
from clbench.store import run_folder
from clbench.store.record import RunRecord, refuse_mixture
from clbench.store.run_folder import Score
from clbench.types import Floats

PHANTOM = "PHANTOM, not patients"
"""In the title of every table and figure made from phantom runs."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run folder; its record is read at once, its scores when first asked for, and once."""

    folder: Path
    """Run folder."""
    record: Mapping[str, Any]
    """`run.json`."""

    @classmethod
    def read(cls, folder: Path) -> StoredRun:
        """Read `run.json`.

        Raises:
            StoreError: missing or damaged.
        """
        return cls(folder=folder, record=run_folder.read_record(folder))

    @cached_property
    def rows(self) -> tuple[Score, ...]:
        """All rows of `scores.csv`.

        Raises:
            StoreError: missing or damaged.
        """
        return tuple(run_folder.read_scores(self.folder / "scores.csv"))

    @cached_property
    def _by_metric(self) -> dict[tuple[str, str], list[Score]]:
        found: dict[tuple[str, str], list[Score]] = {}
        for row in self.rows:
            found.setdefault((row.scoring, row.metric), []).append(row)
        return found

    def rows_of(self, scoring: str, metric: str) -> list[Score]:
        """Rows of one metric; `nsd` is surface Dice at each structure's own tolerance.

        Args:
            scoring: `strict` or `paper`.
            metric: `dice`, `nsd`, `hd95_mm`, …
        """
        if metric == "nsd":
            return [r for r in self.rows if r.scoring == scoring and r.measures(metric)]
        return self._by_metric.get((scoring, metric), [])

    @property
    def metrics(self) -> frozenset[str]:
        """Names of all metrics in its scores."""
        return frozenset(metric for _, metric in self._by_metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run, read back."""

    stored: StoredRun
    """Its files."""
    r: Mapping[tuple[int, str], Cell]
    """R of the run, see `clbench.evaluation.metrics.continual.cells`; holes are NaN."""
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
    def folder(self) -> Path:
        """Run folder."""
        return self.stored.folder

    @property
    def record(self) -> Mapping[str, Any]:
        """`run.json`."""
        return self.stored.record

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
    stored: StoredRun,
    scoring: str,
    metric: str = "dice",
    patient_of: Mapping[str, str] | None = None,
) -> Measured:
    """One metric of a run, case by case and as R.

    Args:
        stored: the run's files.
        scoring: `strict` or `paper`.
        metric: which score.
        patient_of: "source/case" → patient; None: as the run's own record says.

    Raises:
        StoreError: missing or damaged.
    """
    record = stored.record
    steps = record["course"]["steps"]
    sources = tuple(step["source"] for step in steps)
    learned_at = {c: i for i, step in enumerate(steps, 1) for c in step["learns"]}
    rows = stored.rows_of(scoring, metric)
    patient_of = record["course"].get("patient_of", {}) if patient_of is None else patient_of
    r = continual.cells(rows, sources, scoring=scoring, metric=metric, patient_of=patient_of)
    cases: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        own = sources[row.learned_at - 1] == row.eval_set
        if own:
            cases.setdefault((row.step, row.structure), {})[row.case] = row.value
    holes = _holes(record, cases, learned_at)
    for key in holes:
        r[key] = Cell(value=math.nan, cases=len(cases.get(key, {})), missed=0)
    return Measured(
        stored=stored,
        r=r,
        cases={
            (t, c): continual.per_patient(found, sources[learned_at[c] - 1], patient_of)
            for (t, c), found in cases.items()
        },
        learned_at=learned_at,
        sources=sources,
        patient_of=patient_of,
        first=first_step(
            stored.rows_of(scoring, "dice"), str(record.get("shared_step1") or stored.folder)
        ),
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
            continual.mean(r.values.get((step, c), math.nan) for c in members) for r in self.runs
        ]
        return continual.mean(per_seed), continual.spread(per_seed)

    def table(self, at: Mapping[str, int]) -> dict[str, Floats]:
        """Per-patient scores in the form of `clbench.statistics.class_macro`.

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


def group_runs(
    stored: Sequence[StoredRun],
    *,
    scoring: str,
    metric: str = "dice",
    seeds: Sequence[int] | None = None,
) -> list[Group]:
    """Finished runs of a benchmark, grouped by everything but the seed.

    Args:
        stored: run folders of one benchmark, finished or not.
        scoring: `strict` or `paper`.
        metric: which score.
        seeds: the seeds every strategy must have; None takes those there are. A group that lacks
            one is a hole as a whole.

    Raises:
        StoreError: they do not belong in one table.
    """
    done = [s for s in stored if s.record["status"] == "finished"]
    if seeds is not None:
        done = [s for s in done if s.record["identity"]["seed"] in seeds]
    refuse_mixture([RunRecord.from_json(s.record, s.folder / "run.json") for s in done])
    patient_of = patients_of([s.record for s in done])
    keyed: dict[tuple[str, str], list[StoredRun]] = {}
    for s in done:
        identity = s.record["identity"]
        rest = {k: identity[k] for k in ("strategy", "vectors", "weights")}
        keyed.setdefault((s.record["strategy"], run_folder.run_id(rest)), []).append(s)
    names = [name for name, _ in keyed]
    groups = []
    for (name, _), members in keyed.items():
        members.sort(key=lambda s: s.record["identity"]["seed"])
        one = members[0].record
        label = name
        if names.count(name) > 1:  # say what tells the variants of a strategy apart
            others = [m[0].record for (n, _), m in keyed.items() if n == name]
            label += f" ({_differs(one, others)})"
        have = {s.record["identity"]["seed"] for s in members}
        groups.append(
            Group(
                label=label,
                strategy=name,
                runs=tuple(read_run(s, scoring, metric, patient_of) for s in members),
                unfinished=sum(
                    s.record["strategy"] == name and s.record["status"] != "finished"
                    for s in stored
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


# --------------------------------------------------------------------------------------------------
# Agreement: what runs of one table must say alike, beside their settings: patients, and step 1.
# Who is behind a test case is recorded by the run. Two runs that name one
# checkpoint of step 1 are believed only where they also score alike after it.


def patients_of(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Who is behind each test case that is no patient by itself: "source/case" → patient.

    Records of earlier versions do not say; they take what the others say about the same cases.

    Raises:
        StoreError: two runs name different patients for one case.
    """
    found: dict[str, str] = {}
    for record in records:
        for case, patient in record["course"].get("patient_of", {}).items():
            if found.setdefault(case, patient) != patient:
                raise StoreError(
                    "two runs name different patients for one test case",
                    where=f"{record['strategy']}/{record['run_id']}, {case}",
                    expected=found[case],
                    got=patient,
                    next_step="keep them in different results folders (--out, --results)",
                )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """Where a run starts from; equal ones are one and the same training."""

    name: str
    """Of the checkpoint, which strategies may share."""
    scores: str
    """Checksum of all scores after step 1."""


def first_step(rows: Iterable[Score], name: str) -> FirstStep:
    """The first step of a run, from its checkpoint's name and its Dice scores."""
    seen = sorted(
        f"{r.eval_set}/{r.case} {r.structure} {r.value!r} {r.status}" for r in rows if r.step == 1
    )
    return FirstStep(name=name, scores=hashlib.sha256("\n".join(seen).encode()).hexdigest())


def torn(a: Sequence[FirstStep | None], b: Sequence[FirstStep | None]) -> list[int]:
    """Places at which two runs name one checkpoint of step 1, and score differently after it."""
    return [
        i
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        if x is not None and y is not None and x.name == y.name and x != y
    ]


def torn_notes(groups: Sequence[Group]) -> list[str]:
    """One line per seed and checkpoint of step 1 whose runs do not score alike after it."""
    by_name: dict[tuple[int, str], dict[str, list[str]]] = {}
    for g in groups:
        for seed, first in zip(g.seeds, g.first_step, strict=True):
            by_name.setdefault((seed, first.name), {}).setdefault(first.scores, []).append(g.label)
    return [
        f"not shared: {' and '.join(', '.join(labels) for labels in by_scores.values())} name one "
        f"checkpoint of step 1 (seed {seed}) but score differently after it: step 1 counts as "
        "theirs alone; run them again with --fresh"
        for (seed, _), by_scores in by_name.items()
        if len(by_scores) > 1
    ]


# --------------------------------------------------------------------------------------------------
# The card of the past: which images of earlier steps a run was taught from, and of which level.
# The ledger of `run.json` is the source; `clbench.training.past_data` and the catalog
# enforce it while a run goes on.


LISTED = 20
"""So many ids are written out."""


def past_opened(record: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """(cases of other steps that training opened, training cases of all earlier steps)."""
    opened: set[str] = set()
    trains = [set(cases) for cases in record["course"]["train"]]
    for step, by_purpose in record["ledger"].items():
        for purpose in ("train", "pseudo"):
            opened |= set(by_purpose.get(purpose, ())) - trains[int(step) - 1]
    return opened, set().union(*trains[:-1]) - trains[-1]


def past_card(record: Mapping[str, Any]) -> str:
    """`none (enforced)`, `stored cases: n of m (…)` or `all n (upper bound)`.

    `images` is declared by strategies that may see all; how many of them they saw is counted.
    """
    if record.get("external"):
        return "not known, the predictions were made elsewhere"
    opened, there = past_opened(record)
    if not opened:
        return "none (enforced)"
    if there and opened >= there and record.get("past", "images") == "images":
        return f"all {len(opened)} (upper bound)"
    ids = ", ".join(sorted(opened)[:LISTED]) + (", …" if len(opened) > LISTED else "")
    kind = "stored cases: " if record.get("past") == "cases" else ""
    return f"{kind}{len(opened)} of {len(there)} ({ids})"
