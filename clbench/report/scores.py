"""Scores: the runs of a benchmark as one long pandas frame, checked once, and as arrays.

A patient is the unit: scans of one patient are averaged. A test case that should have a score and
has none is a hole, and so is a structure that no test case holds; every number that would need a
hole is left out, with the reason. A case that does not annotate or hold a structure is no hole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import StoreError, unknown_name
from clbench.evaluation.metrics import continual
from clbench.spec.taxonomy import structure
from clbench.statistics.class_macro import by_patient
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.types import Floats

if TYPE_CHECKING:
    import pandas as pd

PHANTOM = "PHANTOM, not patients"
"""In the title of every table and figure made from phantom runs."""
Key = tuple[int, str, str]
"""(1-based step, eval set, structure)."""
NO_SCORE_OF_A_MISS = ("assd_mm", "asd_bsp")
"""Metrics that are n/a where a structure was missed: such a case is counted, and is no hole."""
STATUS = {word: code for code, word in enumerate(run_folder.STATUSES)}
"""Status of a row → its number in arrays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder and its record."""

    folder: Path
    """Run folder."""
    record: RunRecord
    """`run.json`."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read `run.json`.

        Raises:
            StoreError: missing or damaged.
        """
        return cls(folder=folder, record=RunRecord.read(folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """Where a run starts from; equal ones are one and the same training."""

    name: str
    """Of the checkpoint, which strategies may share; the run folder where none is recorded."""
    scores: str
    """Checksum of all Dice scores after step 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Scores of one strategy for one structure after one step on one eval set."""

    values: Floats
    """(seeds, patients); nan = not annotated, not contained, or a hole."""
    with_empty: Floats
    """The same with an empty truth scored 1 (nothing predicted) or 0 (a false alarm)."""
    annotated: NDArray[np.bool_]
    """(seeds,) whether the structure is annotated in any case."""
    cases: NDArray[np.int64]
    """(seeds,) test cases with a number."""
    missed: NDArray[np.int64]
    """(seeds,) of these, cases in which the structure was missed completely."""
    reasons: tuple[str, ...]
    """Per seed: why there is no mean; empty = there is one."""
    hole: str = ""
    """The first of them, with structure, step and seed, or the seeds that were asked for and have
    no run; empty = every seed has a mean."""


@dataclass(frozen=True, kw_only=True)
class StrategyScores:
    """One strategy with all its seeds."""

    label: str
    """Name in tables."""
    strategy: str
    """Registered name."""
    runs: tuple[Run, ...]
    """In order of seed."""
    cells: Mapping[Key, Cells]
    """What was scored, and what should have been."""
    home: Mapping[str, str]
    """Structure → the eval set on which it counts: that of the source that taught it."""
    first_steps: tuple[FirstStep, ...]
    """Per seed; strategies that share step 1 have equal ones."""
    unfinished: int
    """Runs left out because they are not finished."""
    absent: tuple[int, ...] = ()
    """Seeds that were asked for and have no finished run: every mean is a hole."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its runs."""
        return tuple(run.record.seed for run in self.runs)

    def first_step(self, seed: int) -> FirstStep:
        """Where its run of a seed starts from."""
        return self.first_steps[self.seeds.index(seed)]

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """`run.json` of each seed."""
        return tuple(run.record for run in self.runs)

    @cached_property
    def r(self) -> tuple[dict[tuple[int, str], float], ...]:
        """Per seed R[step, structure], see `clbench.evaluation.metrics.continual`; nan = a hole."""
        matrices: tuple[dict[tuple[int, str], float], ...] = tuple({} for _ in self.runs)
        for (step, eval_set, name), cells in self.cells.items():
            if eval_set != self.home[name]:
                continue
            for matrix, values, reason in zip(matrices, cells.values, cells.reasons, strict=True):
                numbers = [] if reason else values[~np.isnan(values)].tolist()
                matrix[step, name] = continual.mean(numbers)
        return matrices

    def over_seeds(self, step: int, members: Sequence[str]) -> tuple[float, float]:
        """Mean and sd over seeds of the plain mean of some structures; nan where any is missing."""
        if self.absent:
            return math.nan, math.nan
        means = [continual.mean(r.get((step, c), math.nan) for c in members) for r in self.r]
        return continual.mean(means), continual.spread(means)

    def hole(self, at: Iterable[tuple[str, int]]) -> str:
        """Why there is no mean of some structures, in words; empty = there is one.

        Args:
            at: structures, each with the step after which it is looked at.
        """
        holes = (self.cells[step, self.home[c], c].hole for c, step in at)
        return next(filter(None, holes), "")

    def table(
        self,
        at: Mapping[str, int],
        seeds: Sequence[int] | None = None,
        *,
        with_empty: bool = False,
    ) -> dict[str, Floats]:
        """Scores per patient in the form of `clbench.statistics.class_macro`.

        Args:
            at: structure → step after which it is looked at.
            seeds: which seeds, in this order; None: all it has.
            with_empty: score an empty truth 1 or 0 instead of leaving it out.

        Returns:
            Eval set → (seeds, patients, structures), nan where a case has no score; empty where
            there is a hole or nothing to show.
        """
        pick = [self.seeds.index(s) for s in (self.seeds if seeds is None else seeds)]
        columns: dict[str, list[Floats]] = {}
        for c, step in at.items():
            cells = self.cells.get((step, self.home[c], c))
            if cells is None or cells.hole or not pick:
                return {}
            values = cells.with_empty if with_empty else cells.values
            columns.setdefault(self.home[c], []).append(values[pick])
        return {name: np.stack(values, axis=-1) for name, values in columns.items()}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One metric of all finished runs of a benchmark."""

    runs: tuple[Run, ...]
    """All of them, at least one."""
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
    patient_of: Mapping[str, str]
    """"source/case" → patient, for cases that are no patients by themselves."""
    metrics: frozenset[str]
    """Names of all metrics the runs hold."""
    on: str = ""
    """External test set or domain that everything is measured on; empty: the course's own test
    cases."""
    never_finished: Mapping[str, int] = field(default_factory=dict)
    """Strategy without a row, since no run of it or of these settings is finished → its runs."""
    strategies: tuple[StrategyScores, ...]
    """By label; in `clbench.report.study.Study.dice` the reference first."""

    @property
    def record(self) -> RunRecord:
        """The record of one of the runs, for what all have in common."""
        return self.runs[0].record

    @property
    def bench(self) -> str:
        """Benchmark."""
        return self.record.identity.bench

    @property
    def version(self) -> int:
        """Its version."""
        return self.record.identity.bench_version

    @property
    def phantom(self) -> bool:
        """Made from the phantom, not from patients."""
        return not self.record.patients

    @property
    def reference(self) -> StrategyScores:
        """The strategy all others are compared with: the first."""
        return self.strategies[0]

    @property
    def others(self) -> tuple[StrategyScores, ...]:
        """The strategies compared with the reference."""
        return self.strategies[1:]

    @property
    def last(self) -> int:
        """Number of steps."""
        return len(self.sources)

    @property
    def means(self) -> dict[str, tuple[str, ...]]:
        """Table groups: name → structures, in the order they are complete, smaller ones first."""
        groups = {
            name: tuple(members)
            for name, members in self.record.course.groups.items()
            if set(members) <= set(self.learned_at)
        }
        place = {n: (max(self.learned_at[c] for c in groups[n]), len(groups[n]), n) for n in groups}
        return {name: groups[name] for name in sorted(groups, key=place.__getitem__)}

    def home(self, structure: str) -> str:
        """The eval set on which a structure counts: that of the source that taught it."""
        return self.sources[self.learned_at[structure] - 1]

    @property
    def homes(self) -> tuple[str, ...]:
        """Eval sets on which a structure counts, in order of the steps."""
        counted = {self.home(name) for name in self.learned_at}
        return tuple(s for s in dict.fromkeys(self.sources) if s in counted)

    def title(self) -> str:
        """Benchmark and version, and what it is measured on; says PHANTOM where it must."""
        return title_of(self.record) + self._elsewhere

    @property
    def heading(self) -> str:
        """Benchmark, and what it is measured on where that is not its own test cases."""
        return self.bench + self._elsewhere

    @property
    def _elsewhere(self) -> str:
        if not self.on:
            return ""
        return (
            f", external test on {self.on}" if self.on in self.external else f", domain {self.on}"
        )

    @property
    def external(self) -> tuple[str, ...]:
        """External test sets of the course."""
        return tuple(test.source for test in self.record.course.external_tests)

    @property
    def domains(self) -> tuple[str, ...]:
        """Sources from which steps teach structures of earlier ones again, in order."""
        return tuple(dict.fromkeys(s.source for s in self.record.course.steps if s.again))

    @property
    def same_seeds(self) -> bool:
        """Whether all strategies with numbers rest on the same seeds, so that rows compare."""
        return len({s.seeds for s in self.strategies if not s.absent}) <= 1

    def holes(self) -> list[str]:
        """One line for every strategy and reason for which a mean is missing."""
        missing = (line for s in self.strategies for line in self._missing(s))
        return [*filter(lambda line: line.startswith("hole:"), missing), *self.without_row()]

    def without_row(self) -> list[str]:
        """One line for every strategy of which no run is finished."""
        return [
            f"hole: {name} has no finished run ({count} unfinished)"
            for name, count in self.never_finished.items()
        ]

    def _missing(self, s: StrategyScores) -> list[str]:
        """What is missing of one strategy: seeds, test cases, unfinished runs."""
        lines = []
        if s.absent:
            lines.append(f"hole: {s.label} has no finished run of seed {_list(s.absent)}")
        by_reason: dict[str, list[tuple[int, str]]] = {}
        for (step, eval_set, name), cells in s.cells.items():
            for seed, reason in zip(s.seeds, cells.reasons, strict=True):
                if reason and eval_set == self.home(name):
                    by_reason.setdefault(f"seed {seed}: {reason}", []).append((step, name))
        for reason, keys in by_reason.items():
            steps = sorted({t for t, _ in keys})
            names = list(dict.fromkeys(c for _, c in keys))
            what = names[0] if len(names) == 1 else f"{len(names)} structures"
            lines.append(f"hole: {s.label}, {what} after step {_list(steps)}, {reason}")
        if s.unfinished:
            lines.append(f"left out: {s.unfinished} unfinished run(s) of {s.label}")
        return lines

    def misses(self) -> list[str]:
        """One line for every strategy whose means leave out cases with a missed structure."""
        if self.metric not in NO_SCORE_OF_A_MISS:
            return []
        lines = []
        for s in self.strategies:
            at_end = [
                cells
                for (step, eval_set, name), cells in s.cells.items()
                if step == self.last and eval_set == s.home[name]
            ]
            missed = sum(int(cells.missed.sum()) for cells in at_end)
            cases = sum(int(cells.cases.sum()) for cells in at_end)
            if missed:
                lines.append(
                    f"left out: {s.label} missed the structure in {missed} of {missed + cases} "
                    f"cases after the last step, which have no {self.metric}"
                )
        return lines

    def notes(self) -> list[str]:
        """One line for everything that is missing: seeds, test cases, unfinished runs."""
        lines = [line for s in self.strategies for line in self._missing(s)]
        lines += [*self.without_row(), *self.misses()]
        if self.patient_of:
            patients = {(case.partition("/")[0], p) for case, p in self.patient_of.items()}
            lines.append(
                f"a patient counts once: {len(self.patient_of)} test cases are scans of "
                f"{len(patients)} patients, averaged first"
            )
        lines += _not_shared(self.strategies)
        if not self.same_seeds:
            whole = (s for s in self.strategies if not s.absent)
            each = "; ".join(f"{s.label}: {_list(s.seeds)}" for s in whole)
            lines.append(f"not the same seeds everywhere ({each}): rows are not ranked")
        if max(len(s.runs) for s in self.strategies) == 1:
            lines.append("one seed: conditional on one training run")
        return lines


def mean_over_have(values: Floats, axis: int) -> Floats:
    """Mean over the numbers there are along an axis; nan where there is none.

    Args:
        values: with nan where there is no number.
        axis: along which.
    """
    have = (~np.isnan(values)).sum(axis=axis)
    total = np.nan_to_num(values).sum(axis=axis)
    mean: Floats = np.divide(total, have, out=np.full(total.shape, np.nan), where=have > 0)
    return mean


def title_of(record: RunRecord) -> str:
    """Benchmark and version of a run; says PHANTOM where it must."""
    identity = record.identity
    name = f"{identity.bench} v{identity.bench_version}"
    return name if record.patients else f"{name} on the {PHANTOM}"


def on_phantom(scores: Scores | None) -> str:
    """The end of a title that does not name the benchmark's version."""
    return f" on the {PHANTOM}" if scores and scores.phantom else ""


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _not_shared(strategies: Iterable[StrategyScores]) -> list[str]:
    """One line per seed and checkpoint of step 1 whose runs do not score alike after it."""
    by_name: dict[tuple[int, str], dict[str, list[str]]] = {}
    for s in strategies:
        for seed, first in zip(s.seeds, s.first_steps, strict=True):
            by_name.setdefault((seed, first.name), {}).setdefault(first.scores, []).append(s.label)
    return [
        f"not shared: {' and '.join(', '.join(labels) for labels in by_scores.values())} name one "
        f"checkpoint of step 1 (seed {seed}) but score differently after it: step 1 counts as "
        "theirs alone; run them again with --fresh"
        for (seed, _), by_scores in by_name.items()
        if len(by_scores) > 1
    ]


# --------------------------------------------------------------------------------------------------
# The long frame: every row of every `scores.csv`, and who is behind each test case.


def patients_of(runs: Iterable[Run]) -> dict[str, str]:
    """Who is behind each test case that is no patient by itself: "source/case" → patient.

    A run that does not say takes what the others say about the same cases.

    Raises:
        StoreError: two runs name different patients for one case.
    """
    known: dict[str, str] = {}
    for run in runs:
        for case, patient in run.record.course.patient_of.items():
            if known.setdefault(case, patient) != patient:
                raise StoreError(
                    "two runs name different patients for one test case",
                    where=f"{run.record.strategy}/{run.record.run_id}, {case}",
                    expected=known[case],
                    got=patient,
                    next_step="keep them in different results folders (--out, --results)",
                )
    return known


def read_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Every row of every run's `scores.csv`, in one frame.

    Args:
        runs: at least one.

    Returns:
        The columns of `clbench.store.run_folder.Score`; `run`, the position in `runs`; `patient`.

    Raises:
        StoreError: a file is missing or damaged, belongs to another run, or scores a case twice.
    """
    import pandas as pd

    frame = pd.concat(map(_read, runs), keys=range(len(runs)), names=["run", None])
    frame = frame.reset_index(level="run").reset_index(drop=True)
    patient_of = patients_of(runs)
    frame["patient"] = frame["case"]
    if patient_of:
        named = (frame["eval_set"] + "/" + frame["case"]).map(patient_of)
        frame["patient"] = named.fillna(frame["case"])
    key = ["run", "scoring", "metric", "step", "eval_set", "structure", "case"]
    twice = frame[frame.duplicated(key)]
    if len(twice):
        row = twice.iloc[0]
        raise StoreError(
            "a case is scored twice",
            where=runs[int(row["run"])].folder / "scores.csv",
            got=f"{row['eval_set']}/{row['case']}, {row['structure']}, step {row['step']}",
            next_step="run again with --fresh",
        )
    return frame


_COUNTS = ("gt_vox", "pred_vox")
_NUMBERS = {"bench_version": int, "seed": int, "step": int, "learned_at": int, "value": float}


def _read(run: Run) -> pd.DataFrame:
    """The rows of one run; what pandas does not read at once is judged line by line."""
    import pandas as pd

    path = run.folder / "scores.csv"
    types: dict[str, Any] = dict.fromkeys(run_folder.COLUMNS, str)
    types |= {**_NUMBERS, **dict.fromkeys(_COUNTS, float)}
    try:
        frame = pd.read_csv(
            path,
            dtype=types,
            keep_default_na=False,
            na_values={"value": ["nan"], **{name: [""] for name in _COUNTS}},
        )
        whole = (
            tuple(frame.columns) == run_folder.COLUMNS
            and bool(frame["scoring"].isin(run_folder.SCORINGS).all())
            and bool(frame["status"].isin(run_folder.STATUSES).all())
        )
    except (OSError, ValueError):
        whole = False
    if not whole:
        rows = [dataclasses.astuple(row) for row in run_folder.read_scores(path)]
        frame = pd.DataFrame(rows, columns=run_folder.COLUMNS).astype(types)
    identity = run.record.identity
    own = {
        "bench": identity.bench,
        "bench_version": identity.bench_version,
        "strategy": run.record.strategy,
        "seed": run.record.seed,
    }
    for column, value in own.items():
        other = frame[frame[column] != value]
        if len(other):
            raise StoreError(
                "the scores belong to another run",
                where=path,
                expected=tuple(own.values()),
                got=tuple(other[list(own)].iloc[:1].to_dict("records")[0].values()),
                next_step="put the right file back, or run again with --fresh",
            )
    return frame


def rows_of(frame: pd.DataFrame, *, scoring: str, metric: str) -> pd.DataFrame:
    """The rows of one metric; `nsd` is surface Dice at each structure's own tolerance.

    Args:
        frame: of `read_frame`.
        scoring: `strict` or `paper`.
        metric: `dice`, `nsd`, `hd95_mm`, …
    """
    rows = frame[frame["scoring"] == scoring]
    if metric != "nsd":
        return rows[rows["metric"] == metric]
    own = {name: f"nsd_{structure(name).tolerance_mm:g}mm" for name in rows["structure"].unique()}
    return rows[rows["metric"] == rows["structure"].map(own)]


def count_patients(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """How many patients have a tumor, how many have none, and how many of each were told right.

    A patient has one, or is called positive, where any of its cases is. A case is called positive
    when a predicted lesion reaches a smallest size, wherever it lies; the size is part of the
    metric's name (`patient_positive`: any voxel, `patient_positive_50vox`: 50 voxels or more) and
    must be chosen on validation cases.

    Args:
        rows: of `patient_positive` metrics, see `read_frame`.
        by: columns; every combination of their values is counted.

    Returns:
        `true_positive`, `with_tumor`, `true_negative`, `without_tumor`, indexed by `by`.

    Source: the paper, Table 6.
    """
    cases = rows.assign(tumor=rows["gt_vox"] > 0, called=rows["value"] > 0)
    patients = cases.groupby([*by, "patient"])[["tumor", "called"]].any().astype(bool)
    tumor, called = patients["tumor"], patients["called"]
    counts = {
        "true_positive": tumor & called, "with_tumor": tumor,
        "true_negative": ~tumor & ~called, "without_tumor": ~tumor,
    }  # fmt: skip
    return patients.assign(**counts)[list(counts)].groupby(level=by).sum()


# --------------------------------------------------------------------------------------------------
# From rows to arrays.


def scores_of(
    frame: pd.DataFrame,
    runs: Sequence[Run],
    *,
    scoring: str,
    metric: str = "dice",
    seeds: Sequence[int] | None = None,
    unfinished: Sequence[Run] = (),
    on: str = "",
) -> Scores:
    """One metric of some runs, grouped by everything but the seed.

    Args:
        frame: of `read_frame(runs)`.
        runs: finished runs of one benchmark.
        scoring: `strict` or `paper`.
        metric: which score.
        seeds: the seeds every strategy must have, at least one run has; None takes those there
            are. A strategy that lacks one is a hole as a whole.
        unfinished: runs of the benchmark that are left out because they are not finished.
        on: external test set on which every structure that it annotates is measured, or domain on
            which every structure is that its step teaches, in place of the test cases of the source
            that taught it first; empty: these.

    Raises:
        StoreError: a strategy has two runs of one seed.
        UnknownName: no such external test set or domain.
    """
    chosen = {i: run for i, run in enumerate(runs) if seeds is None or run.record.seed in seeds}
    record = next(iter(chosen.values())).record
    sources, learned_at, tests = _measured_on(record, on)
    home = {c: sources[at - 1] for c, at in learned_at.items()}
    patient_of = patients_of(chosen.values())
    patients = {s: [patient_of.get(f"{s}/{c}", c) for c in cases] for s, cases in tests.items()}
    rows = rows_of(frame, scoring=scoring, metric=metric)
    native = frame[(frame["scoring"] == "strict") & (frame["gt_vox"] > 0)]
    structures = list(learned_at)
    size = (len(runs), len(sources))
    readers = {
        name: _reader(
            name,
            rows[rows["eval_set"] == name],
            size,
            structures,
            cases,
            patients[name],
            set(native.loc[native["eval_set"] == name, "structure"]),
            metric in NO_SCORE_OF_A_MISS,
        )
        for name, cases in sorted(tests.items())
    }
    first = _first_steps(rows_of(frame, scoring=scoring, metric="dice"), runs)
    begun = Counter(
        (run.record.strategy, settings_of(run.record))
        for run in unfinished
        if seeds is None or run.record.seed in seeds
    )
    strategies = []
    for label, members in labelled(chosen).items():
        own = tuple(chosen[i] for i in members)
        having = tuple(run.record.seed for run in own)
        absent = tuple(s for s in seeds or () if s not in having)
        if len(set(having)) < len(having):
            raise StoreError(
                "two runs of one strategy have the same seed and settings",
                where=own[0].folder.parent,
                got=having,
                next_step="remove the older one",
            )
        strategies.append(
            StrategyScores(
                label=label,
                strategy=own[0].record.strategy,
                runs=own,
                cells=_cells(readers, members, having, learned_at, sources, absent),
                home=home,
                first_steps=tuple(first[i] for i in members),
                unfinished=begun.pop((own[0].record.strategy, settings_of(own[0].record)), 0),
                absent=absent,
            )
        )
    return Scores(
        runs=tuple(chosen.values()),
        scoring=scoring,
        metric=metric,
        sources=sources,
        learned_at=learned_at,
        patients={s: tuple(dict.fromkeys(p)) for s, p in patients.items()},
        scans={s: len(p) for s, p in patients.items()},
        patient_of=patient_of,
        metrics=frozenset(frame["metric"].unique()),
        on=on,
        never_finished=_never_finished(begun, {run.record.strategy for run in chosen.values()}),
        strategies=tuple(sorted(strategies, key=lambda s: s.label)),
    )


def _never_finished(
    begun: Mapping[tuple[str, str], int], finished: Container[str]
) -> dict[str, int]:
    """Name in notes → unfinished runs of what has no finished one.

    Args:
        begun: strategy and its settings → unfinished runs.
        finished: strategies with finished runs, of other settings.
    """
    counts: Counter[str] = Counter()
    for (name, _), count in sorted(begun.items()):
        counts[f"{name} with other settings" if name in finished else name] += count
    return dict(counts)


def _measured_on(
    record: RunRecord, on: str
) -> tuple[tuple[str, ...], dict[str, int], dict[str, list[str]]]:
    """Test set of each step, structure → step that taught it, and test set → its cases.

    Args:
        record: of a run.
        on: see `scores_of`.

    Raises:
        StoreError: the course has neither external test sets nor domains.
        UnknownName: none of this name.
    """
    steps = record.course.steps
    learned_at = {c: i for i, step in enumerate(steps, 1) for c in step.learns}
    if not on:
        return tuple(step.source for step in steps), learned_at, test_cases(record)
    external = {test.source: test for test in record.course.external_tests}
    domains = dict.fromkeys(step.source for step in steps if step.again)
    if not external and not domains:
        raise StoreError(
            "the course has no external test sets",
            where=record.identity.bench,
            got=on,
            next_step="name sources that are only tested on in `[[external]]` of a course file",
        )
    if on not in external and on in domains:
        taught: dict[str, int] = {}
        for number, step in enumerate(steps, 1):
            for c in (*step.again, *step.learns) if step.source == on else ():
                taught.setdefault(c, number)
        in_order = {c: taught[c] for c in learned_at if c in taught}
        return (on,) * len(steps), in_order, {on: test_cases(record)[on]}
    if on not in external:
        raise unknown_name("external test set", on, [*external, *domains], record.identity.bench)
    annotated = {c: step for c, step in learned_at.items() if c in external[on].annotates}
    cases = [name.removeprefix(f"{on}/") for name in external[on].test]
    return (on,) * len(steps), annotated, {on: cases}


def _cells(
    readers: Mapping[str, Callable[[Any, bool], tuple[Cells, bool]]],
    members: list[int],
    seeds: Sequence[int],
    learned_at: Mapping[str, int],
    sources: Sequence[str],
    absent: Sequence[int],
) -> dict[Key, Cells]:
    """Scores of one strategy: what there is, and what should be there.

    Args:
        readers: eval set → `_reader` of it.
        members: positions of the strategy's runs.
        seeds: of these.
        learned_at: structure → 1-based step.
        sources: source of each step.
        absent: seeds that were asked for and have no run: then everything is a hole.
    """
    by_key = {}
    all_lack = f"no finished run of seed {_list(absent)}" if absent else ""
    for step in range(1, len(sources) + 1):
        for eval_set, read in readers.items():
            for place, c in sorted(enumerate(learned_at), key=lambda x: x[1]):
                due = sources[learned_at[c] - 1] == eval_set and step >= learned_at[c]
                cells, scored = read((members, step - 1, place), due)
                if due or scored:
                    holes = (
                        f"{c} after step {step}, seed {seed}: {reason}"
                        for seed, reason in zip(seeds, cells.reasons, strict=True)
                        if reason
                    )
                    by_key[step, eval_set, c] = replace(cells, hole=next(holes, all_lack))
    return by_key


def test_cases(record: RunRecord) -> dict[str, list[str]]:
    """Eval set → its test cases, in order of the splits; without external ones."""
    cases: dict[str, dict[str, None]] = {}
    for step, named in zip(record.course.steps, record.course.test, strict=True):
        source = step.source
        bare = (name.removeprefix(f"{source}/") for name in named)
        cases.setdefault(source, {}).update(dict.fromkeys(bare))
    return {source: list(names) for source, names in cases.items()}


def _reader(
    eval_set: str,
    rows: pd.DataFrame,
    size: tuple[int, int],
    structures: Sequence[str],
    tests: Sequence[str],
    patients: Sequence[str],
    in_files: Container[str],
    misses_drop_out: bool,
) -> Callable[[Any, bool], tuple[Cells, bool]]:
    """Rows of one metric on one eval set; cases and structures of no test are left out.

    Args:
        eval_set: its name.
        rows: of `rows_of`, of this set.
        size: (runs, steps).
        structures: in the order of their axis.
        tests: test cases, in order.
        patients: who is behind each test case.
        in_files: structures that the files of a test case hold, on their own grids.
        misses_drop_out: a case whose structure was missed has no number, and lacks none.

    Returns:
        A function of (runs, step, structure), each a position, and of whether every test case
        should have a score; it gives the scores, and whether there is any row.
    """
    import pandas as pd

    axes = [range(size[0]), range(1, size[1] + 1), structures, tests]
    names = ["run", "step", "structure", "case"]
    wide = rows.set_index(names)[["value", "status"]].reindex(
        pd.MultiIndex.from_product(axes, names=names)
    )
    shape = [len(axis) for axis in axes]
    value = wide["value"].to_numpy(dtype=np.float64).reshape(shape)
    status = wide["status"].map(STATUS).fillna(-1).to_numpy(dtype=np.int8).reshape(shape)
    scored = status >= 0
    empty = np.isin(status, [STATUS["both_empty"], STATUS["fp_only"]])
    held = np.isin(status, [STATUS["ok"], STATUS["fn_only"]])
    plain = np.where(empty, np.nan, value)
    with_empty = np.where(empty, status == STATUS["both_empty"], value)
    values, values_with_empty = (
        by_patient(x[..., None], patients)[..., 0] for x in (plain, with_empty)
    )
    missed = status == STATUS["fn_only"]
    due_value = held & ~missed if misses_drop_out else held
    lacking = ~scored | (due_value & np.isnan(value))

    def reason(
        scored: NDArray[np.bool_],
        lacking: NDArray[np.bool_],
        cases: int,
        missed: int,
        due: bool,
        name: str,
    ) -> str:
        """Why there is no mean of one run; empty = there is one."""
        if not scored.any():
            return "not scored"
        if n := int(lacking.sum()):
            more = ", …" if n > 1 else ""
            case = tests[int(lacking.argmax())]
            return f"{n} of {len(tests)} test cases missing ({eval_set}/{case}{more})"
        if cases or not due:
            return ""
        if missed:
            return f"missed in every test case of {eval_set} that holds it: there is no distance"
        if name in in_files:  # the grid of the paper's scoring is the model's
            return (
                f"no test case of {eval_set} holds it on the model's grid: what the files hold is "
                "lost in resampling (--scoring strict counts on the files' own grids)"
            )
        return f"no test case of {eval_set} holds it"

    def read(at: Any, due: bool) -> tuple[Cells, bool]:
        cases = (~np.isnan(plain[at])).sum(axis=-1)
        misses = missed[at].sum(axis=-1)
        of_runs = zip(scored[at], lacking[at], cases, misses, strict=True)
        cells = Cells(
            values=values[at],
            with_empty=values_with_empty[at],
            annotated=(scored[at] & (status[at] != STATUS["not_annotated"])).any(axis=-1),
            cases=cases,
            missed=misses,
            reasons=tuple(
                reason(own, lack, int(n), int(k), due, structures[at[2]])
                for own, lack, n, k in of_runs
            ),
        )
        return cells, bool(scored[at].any())

    return read


def _first_steps(dice: pd.DataFrame, runs: Sequence[Run]) -> list[FirstStep]:
    """Where each run starts from, from its checkpoint's name and its Dice after step 1."""
    import pandas as pd

    rows = dice[dice["step"] == 1]
    row = pd.util.hash_pandas_object(
        rows[["eval_set", "case", "structure", "value", "status"]], index=False
    )
    by_run = {i: np.sort(own.to_numpy()) for i, own in row.groupby(rows["run"])}
    return [
        FirstStep(
            name=str(run.record.shared_step1 or run.folder),
            scores=hashlib.sha256(by_run[i].tobytes() if i in by_run else b"").hexdigest(),
        )
        for i, run in enumerate(runs)
    ]


def labelled(runs: Mapping[int, Run]) -> dict[str, list[int]]:
    """Label → positions of its runs, by seed; one label for what differs in the seed alone."""
    variants: dict[tuple[str, str], list[int]] = {}
    for i, run in runs.items():
        variants.setdefault((run.record.strategy, settings_of(run.record)), []).append(i)
    wanted: dict[str, list[tuple[str, list[int]]]] = {}
    for (name, rest), members in variants.items():
        members.sort(key=lambda i: runs[i].record.seed)
        same = [runs[m[0]].record for (other, _), m in variants.items() if other == name]
        label = name
        if said := _difference(runs[members[0]].record, same):  # what tells its variants apart
            label += f" ({said})"
        if (tuned := runs[members[0]].record.tuned) is not None and not tuned["realistic"]:
            label += f" [{tuned['rule']}, unrealistic]"
        # A setting that no label names must not let one variant take the place of another.
        wanted.setdefault(label, []).append((f"{name} {rest}", members))
    return {
        label if len(same) == 1 else f"{label} #{hashlib.sha256(rest.encode()).hexdigest()[:8]}": m
        for label, same in wanted.items()
        for rest, m in same
    }


def settings_of(record: RunRecord) -> str:
    """Everything that tells variants of one strategy apart: equal for runs of one row."""
    own = record.identity
    return json.dumps([own.strategy, own.vectors, own.weights, *_tuned(record)], sort_keys=True)


def _tuned(record: RunRecord) -> list[str]:
    """What tells tuned runs of a strategy from others: rule and settings; nothing of untuned ones.

    Settings of the strategy itself stand in its options already.
    """
    if (tuned := record.tuned) is None:
        return []
    of_profile = [word for word in tuned["settings"] if not word.startswith("strategy.")]
    return [f"tuned by {tuned['rule']}", *of_profile]


def _text_vectors(one: RunRecord, others: Sequence[RunRecord]) -> list[str]:
    """The encoding of a variant; its prompt or checksum too, where others have it as well."""
    mine = one.identity.vectors
    parts = [str(one.text_encoding.get("encoding"))]
    alike = [
        o
        for o in others
        if o.identity.vectors != mine and o.text_encoding.get("encoding") == parts[0]
    ]
    if not alike:
        return parts
    prompt = one.text_encoding.get("prompt")
    if any(o.text_encoding.get("prompt") != prompt for o in alike):
        parts.append(f"prompt {prompt!r}" if prompt else "no prompt")
    if any(o.text_encoding.get("prompt") == prompt for o in alike):
        parts.append(f"vectors {str(mine)[:8]}")
    return parts


def _difference(one: RunRecord, others: Sequence[RunRecord]) -> str:
    """The settings of one variant in which some other differs."""
    names = {key for o in others for key in o.identity.strategy} - {"class"}
    options = one.strategy_options
    parts = [
        f"{key}={options.get(key)}"
        for key in sorted(names)
        if any(o.strategy_options.get(key) != options.get(key) for o in others)
    ]
    if any(o.identity.vectors != one.identity.vectors for o in others):
        parts += _text_vectors(one, others)
    if any(o.identity.weights != one.identity.weights for o in others):
        parts.append(f"weights {str(one.identity.weights)[:8]}")
    if any(_tuned(o) != _tuned(one) for o in others):
        parts += _tuned(one) or ["not tuned"]
    return ", ".join(parts)
