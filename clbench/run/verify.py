"""Verification of a run: checksums, layout, and every number computed again; the first difference.

What can be checked depends on what is there: checksums need a run that recorded them,
scores need the stored predictions and the data. The rest is said to be unchecked.
"""

from __future__ import annotations

import csv
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from clbench.data.catalog import Catalog, exam_cases
from clbench.errors import ClbenchError, StoreError
from clbench.evaluation.metrics.case import word_of
from clbench.evaluation.metrics.overlap import Counts, dice, dice_paper
from clbench.evaluation.metrics.stability_gap import FILE, read_trace
from clbench.evaluation.predictions import prediction_of
from clbench.evaluation.scoring import context_of, measure_on_file, metric_rows, score_case
from clbench.nets.text_encodings import encoded
from clbench.run.cost_table import RECORDED
from clbench.run.identity import described, foreign_code, step_identities
from clbench.run.record import benchmark_of, catalog_of, profile_of, strategy_of
from clbench.store import checkpoint, checksums, run_folder
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score

Key = tuple[int, str, str, str, str, str]
"""Step, eval set, case, structure, scoring, metric: one row of `scores.csv`."""


@dataclass(kw_only=True)
class Verified:
    """A run in which no difference was found."""

    folder: Path
    """The run."""
    checked: list[str] = field(default_factory=list)
    """What was held against what."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be, and why."""
    predictions: int = 0
    """Stored predictions from which scores were computed again."""

    def lines(self) -> list[str]:
        """The summary."""
        return [
            f"{self.folder}: no difference found",
            *(f"  checked: {line}" for line in self.checked),
            *(f"  not checked: {line}" for line in self.unchecked),
        ]


def verify_run(folder: Path, *, data: str | None = None, cache: Path | None = None) -> Verified:
    """Check a run folder.

    Args:
        folder: the run.
        data: where the data lies now, as in `clbench run --data`; None: where the run found it.
        cache: where preprocessed volumes and the phantom are kept; None: where the run kept them.

    Returns:
        What was checked, and what could not be.

    Raises:
        StoreError: the first difference: file, row, column, expected, got.
        DataError: data was named that cannot be read.
    """
    content = run_folder.read_record(folder)
    report = Verified(folder=folder, checked=[f"run.json, schema {run_folder.SCHEMA}"])
    changed: list[StoreError] = []
    if checksums.check_record(folder, content):
        changed = list(checksums.check_files(folder, content))
        report.checked.append(f"checksums of run.json and {len(content['files'])} files")
    else:
        report.unchecked.append("checksums: the run recorded none")
    record = RunRecord.from_json(content, folder / "run.json")
    _identity(folder, record)
    # damage in the scores is named by row and column, where it can be found there
    if first := next((e for e in changed if e.where != folder / "scores.csv"), None):
        raise first
    if record.status == "finished" or record.steps_done:
        rows = _scores(folder, record)
        report.checked.append(f"scores.csv: {len(rows)} rows against run.json and themselves")
        _again(folder, record, rows, report, data, cache)
    if changed:
        raise changed[0]
    if record.status != "finished":
        report.unchecked.append("the steps to come: the run is not finished")
    _checkpoints(folder, record, report)
    _cost(folder, record, report)
    if (folder / FILE).exists():
        read_trace(folder / FILE, record.course.test_cases)
        report.checked.append(FILE)
    report.unchecked.append("means and forgetting: none is stored, tables compute them from rows")
    return report


def _identity(folder: Path, record: RunRecord) -> None:
    """The run's id must be that of its identity, and its cases those of the splits in there."""
    steps, course = record.course.steps, record.course
    sides: list[tuple[str, object, object]]
    sides = [("run_id", record.identity.run_id, record.run_id)]
    for number, (step, split) in enumerate(zip(steps, record.identity.splits, strict=False)):
        for part, cases in (("train", course.train), ("test", course.test)):
            named = split.get(part, ()) if isinstance(split, Mapping) else ()
            expected = [f"{step.source}/{case}" for case in named]
            if named:
                sides.append((f"course.{part}, step {number + 1}", expected, [*cases[number]]))
    for what, wanted, got in sides:
        if got != wanted:
            raise StoreError(
                "a run's record does not belong to its identity",
                where=f"{folder / 'run.json'}, {what}",
                expected=wanted,
                got=got,
                next_step="take the record from a copy, or run again with --fresh",
            )


# ----------------------------------------------------------------------------------- scores alone


def _scores(folder: Path, record: RunRecord) -> dict[Key, tuple[int, Score]]:
    """Key → (line, row): every row that must be there once, true to the record and to itself."""
    path = folder / "scores.csv"
    rows: dict[Key, tuple[int, Score]] = {}
    scores = run_folder.read_scores(path)
    steps = record.course.steps
    learned = {name: i for i, s in enumerate(steps, 1) for name in s.learns}
    identity = record.identity
    same = {"bench": identity.bench, "bench_version": identity.bench_version}
    same |= {"strategy": record.strategy, "seed": record.seed}
    for line, row in enumerate(scores, 2):
        key = key_of(row)
        if key in rows:
            first = f"one such row, in line {rows[key][0]}"
            raise _differs(path, line, row, "structure", first, "another")
        rows[key] = line, row
        for column, value in {**same, "learned_at": learned.get(row.structure)}.items():
            if getattr(row, column) != value:
                raise _differs(path, line, row, column, value, getattr(row, column))
        _itself(path, line, row)
    if path.read_bytes() != run_folder.scores_bytes(scores):
        raise StoreError(
            "the scores are not written as clbench writes them",
            where=path,
            expected="sorted rows, values by repr",
            next_step="take the file from a copy, or run again with --fresh",
        )
    if not record.external:  # predictions made elsewhere may have declared holes
        _complete(path, record, rows)
    return rows


def _itself(path: Path, line: int, row: Score) -> None:
    """A Dice must come from whole voxels, and the status from their numbers."""
    if row.gt_vox is None or row.pred_vox is None:
        if row.status != "not_annotated" or not math.isnan(row.value):
            expected, got = "not_annotated, without a value", f"{row.status}, {row.value!r}"
            raise _differs(path, line, row, "status", expected, got)
        return
    counts = Counts(both_vox=0, pred_vox=row.pred_vox, gt_vox=row.gt_vox)
    if row.status != counts.status:
        raise _differs(path, line, row, "status", counts.status, row.status)
    if not row.metric.startswith("dice"):
        return
    of = dice_paper if row.scoring == "paper" else dice
    total = row.pred_vox + row.gt_vox + (row.scoring == "paper")
    both = 0 if math.isnan(row.value) else round(row.value * total / 2)
    possible = 0 <= both <= min(row.pred_vox, row.gt_vox)
    nearest = of(Counts(both_vox=both, pred_vox=row.pred_vox, gt_vox=row.gt_vox))
    if not possible or repr(nearest) != repr(row.value):
        expected = f"a Dice of {row.pred_vox} and {row.gt_vox} voxels, such as {nearest!r}"
        raise _differs(path, line, row, "value", expected, repr(row.value))


def _complete(path: Path, record: RunRecord, rows: Mapping[Key, tuple[int, Score]]) -> None:
    """Every learned structure of every test case must have its rows."""
    learned: list[str] = []
    tests = sorted(record.course.test_cases)
    for number, step in enumerate(record.course.steps[: record.steps_done], 1):
        learned += step.learns
        for case in tests:
            source, _, name = case.partition("/")
            for structure, scoring in product(learned, run_folder.SCORINGS):
                if (number, source, name, structure, scoring, "dice") not in rows:
                    raise StoreError(
                        "a row of the scores is missing",
                        where=path,
                        expected=f"step {number}, {case}, {structure}, {scoring}, dice",
                        got="no such row",
                        next_step="take the file from a copy, or run again with --fresh",
                    )


# ------------------------------------------------------------------------------- scores from masks


def _again(
    folder: Path,
    record: RunRecord,
    rows: Mapping[Key, tuple[int, Score]],
    report: Verified,
    data: str | None,
    cache: Path | None,
) -> None:
    """Compute every row again from the stored predictions and the data."""
    stored = sorted((folder / "predictions").glob("step*/*.npz"))
    if record.external or not stored:
        report.unchecked.append("scores against predictions: the run keeps no predictions")
        return
    try:
        catalog = catalog_of(record, data=data, cache=cache)
    except ClbenchError as err:
        if data is not None:
            raise
        report.unchecked.append(f"scores against predictions: no data to compare with ({err.what})")
        return
    _steps(folder, record, catalog, report)
    done, seen = 0, set()
    for number, source, case in exam_cases(catalog):
        volume = catalog.open(number, case, "test")
        for step in range(1, record.steps_done + 1):
            path = run_folder.prediction_path(folder, step, source, case)
            structures = catalog.benchmark.structures(step)
            context = context_of(record, catalog.benchmark, step)
            bits = prediction_of(path, volume, structures).bits
            seen.add(path)
            again = score_case(bits, structures, volume, context)
            at = (step, source, case)
            of_case = [r for _, r in rows.values() if (r.step, r.eval_set, r.case) == at]
            names = [r.metric for r in of_case if not r.metric.startswith("dice")]
            if metrics := tuple(dict.fromkeys(map(word_of, names))):
                truth = volume.native_bits()
                scores = measure_on_file(bits, structures, volume, truth, metrics)
                again += metric_rows(scores, structures, volume, metrics, context)
            done += _compare(folder / "scores.csv", of_case, again, rows)
    if strangers := [p for p in stored if p not in seen]:
        raise StoreError("a stored prediction is of no test case of the run", where=strangers[0])
    report.predictions = len(seen)
    report.checked.append(f"{done} scores against {len(seen)} predictions and the data")


def _compare(
    path: Path,
    recorded: Sequence[Score],
    computed: Sequence[Score],
    rows: Mapping[Key, tuple[int, Score]],
) -> int:
    again = {key_of(r): r for r in computed}
    for row in recorded:
        line = rows[key_of(row)][0]
        if (new := again.get(key_of(row))) is None:
            raise _differs(path, line, row, "metric", "a metric clbench computes", row.metric)
        for column in ("value", "gt_vox", "pred_vox", "status"):
            old, now = getattr(row, column), getattr(new, column)
            if repr(old) != repr(now):
                raise _differs(path, line, row, column, repr(now), repr(old))
    return len(recorded)


def key_of(row: Score) -> Key:
    """What names a row within a run."""
    return row.step, row.eval_set, row.case, row.structure, row.scoring, row.metric


def _differs(
    path: Path, line: int, row: Score, column: str, expected: object, got: object
) -> StoreError:
    return StoreError(
        "a score is not what it must be",
        where=f"{path}, line {line} (step {row.step}, {row.eval_set}/{row.case}, {row.structure}, "
        f"{row.scoring}, {row.metric}), column {column}",
        expected=expected,
        got=got,
        next_step="take the file from a copy, or run again with --fresh",
    )


# ----------------------------------------------------------------------------------- other files


def _checkpoints(folder: Path, record: RunRecord, report: Verified) -> None:
    """Checkpoints must open, and be of the step their name says."""
    learned: list[str] = []
    before: str | None = None
    for number, step in enumerate(record.course.steps, 1):
        learned += step.learns
        path = run_folder.checkpoint_path(folder, number, record.shared_step1)
        if not path.is_file():
            report.unchecked.append(f"checkpoint of step {number}: not kept here")
            before = None
            continue
        content = checkpoint.load(path)
        if (content["step"], content["structures"]) != (number, learned):
            raise StoreError(
                "a checkpoint is of another step",
                where=path,
                expected=f"step {number}: {', '.join(learned)}",
                got=f"step {content['step']}: {', '.join(content['structures'])}",
            )
        origin = (record.step_origins or {}).get(str(number), {})
        if before is not None and origin.get("before") not in (None, before):
            raise StoreError(
                "a step was taught from another model than that of the step before it",
                where=path,
                expected=f"taught from {before}",
                got=origin["before"],
                next_step="run again with --fresh",
            )
        before = checkpoint.state_digest(content)
        report.checked.append(f"checkpoint of step {number}")


def _steps(folder: Path, record: RunRecord, catalog: Catalog, report: Verified) -> None:
    """Each step must be the one that course, data and settings ask for."""
    if not record.step_origins:  # made before 0.2
        return
    what = "what the steps depend on"
    try:
        benchmark, profile, strategy = benchmark_of(record), profile_of(record), strategy_of(record)
        vectors = encoded(benchmark.structures(len(benchmark.steps)), profile.text)
    except ClbenchError as err:
        report.unchecked.append(f"{what}: {err.what}")
        return
    recorded = record.identity
    mark = hashlib.sha256(vectors.array.tobytes()).hexdigest()
    same = described(strategy, strategy.version) == recorded.strategy and mark == recorded.vectors
    if not same or foreign_code(strategy, profile):
        report.unchecked.append(f"{what}: strategy, text vectors or their code may be others today")
        return
    if record.with_defaults is not None:  # it is no part of the identity
        traced = record.with_defaults["profile"]["examine"]["trace_every"]
        profile = replace(profile, examine=replace(profile.examine, trace_every=traced))
    steps = step_identities(
        recorded,
        benchmark=benchmark,
        catalog=catalog,
        profile=profile,
        strategy=strategy,
        vectors=vectors,
    )
    for number, origin in sorted(record.step_origins.items()):
        if (expected := run_folder.run_id(steps[int(number) - 1])) != origin["identity"]:
            raise StoreError(
                "a step is not the one that course, data and settings ask for",
                where=f"{folder / 'run.json'}, step_origins, step {number}",
                expected=expected,
                got=origin["identity"],
                next_step="run again with --fresh",
            )
    report.checked.append(f"{what}, against the course and the data: {len(record.step_origins)}")


def _cost(folder: Path, record: RunRecord, report: Verified) -> None:
    """`cost.csv` must repeat what the record holds."""
    path = folder / "cost.csv"
    if not path.exists():
        report.unchecked.append("cost.csv: not there")
        return
    anew = f"`clbench cost {shlex.quote(str(folder))}` writes the file anew"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise StoreError("costs cannot be read", where=path, got=err, next_step=anew) from err
    for line, cells in enumerate(lines, 2):
        cost = record.cost.get(cells.get("step", ""), {})
        flat = {**cost, **cost.get("train", {})}
        for column in RECORDED:
            expected = repr(flat[column]) if column in flat else ""
            if cells.get(column) != expected:
                raise StoreError(
                    "a cost is not what the record says",
                    where=f"{path}, line {line}, column {column}",
                    expected=expected,
                    got=cells.get(column),
                    next_step=anew,
                )
    report.checked.append(f"cost.csv: {len(lines)} steps against run.json")
