"""What an extension cost, as tables: old structures before and after, and the new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from clbench.deployment.extension.agreement import Agreement, read_agreement
from clbench.report.tables.render import EMPTY, Table, number, signed
from clbench.statistics.intervals import Interval, t_interval
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score

PatientScores = Mapping[tuple[int, str], Mapping[str, float]]
"""(step, structure) → patient → mean Dice over the patient's cases."""


def extension_tables(folder: Path) -> list[Table]:
    """The answer of an extension, computed from `scores.csv` and `agreement.csv` of its run.

    Raises:
        StoreError: the run is no extension, is not finished, or is damaged.
    """
    record = RunRecord.read(folder)
    rows = read_agreement(folder)
    last = len(record.course.steps)
    learned = record.course.steps[last - 1].learns
    old = [name for name in record.course.structures if name not in learned]
    scores = patient_scores(run_folder.read_scores(folder / "scores.csv"), record)
    return [_old(old, scores, rows, record), _new(learned, scores, last)]


def patient_scores(scores: Sequence[Score], record: RunRecord) -> PatientScores:
    """Strict Dice by step and structure, a mean per patient; where it is defined.

    Args:
        scores: of the run.
        record: names the patients.
    """
    values: dict[tuple[int, str], dict[str, list[float]]] = {}
    for row in scores:
        if (row.scoring, row.metric) == ("strict", "dice") and not math.isnan(row.value):
            who = record.course.patient_of.get(f"{row.eval_set}/{row.case}", row.case)
            own = values.setdefault((row.step, row.structure), {})
            own.setdefault(f"{row.eval_set}/{who}", []).append(row.value)
    return {
        key: {patient: math.fsum(v) / len(v) for patient, v in by_patient.items()}
        for key, by_patient in values.items()
    }


def _old(
    names: Sequence[str], scores: PatientScores, rows: Sequence[Agreement], record: RunRecord
) -> Table:
    last = len(record.course.steps)
    cells = []
    for name in names:
        before, after = (scores.get((step, name), {}) for step in (last - 1, last))
        both = [p for p in before if p in after]
        change = t_interval([after[p] - before[p] for p in both])
        agreed = [r for r in rows if r.structure == name and not math.isnan(r.agreement)]
        values = [r.agreement for r in agreed]
        held_out = [r.agreement for r in agreed if r.part == "test"]
        cells.append(
            (
                name,
                number(_mean([before[p] for p in both])),
                number(_mean([after[p] for p in both])),
                _change(change),
                str(len(both)),
                number(_mean(values)),
                number(min(values, default=math.nan)),
                number(_mean(held_out)),
                str(len(agreed)),
            )
        )
    changed = sum(r.before_vox + r.after_vox - 2 * r.both_vox for r in rows)
    if any(row[4] != "0" for row in cells):
        truth = "Dice: strict, on the test cases that annotate the structure; the change is a mean "
        truth += "over patients with Student's t interval."
    else:
        truth = "Dice: no test case annotates an old structure, so what was lost is not known."
    agreement = (
        "agreement: Dice of the old and the new model's masks, a mean over the cases in which "
        f"either finds the structure, of {len({r.case for r in rows})}. It says what changed, not "
        "who is right; the new step learned from all but the test cases."
    )
    return Table(
        title=f"Old structures before and after: {record.strategy}, {record.identity.bench}",
        columns=(
            "structure", "Dice before", "after", "change (95 %)", "patients",
            "agreement", "lowest", "on test cases", "cases",
        ),
        rows=tuple(cells),
        notes=(
            truth,
            agreement,
            f"{changed} voxels of old structures differ in all."
            if changed
            else "every old mask is equal to the bit.",
        ),
    )  # fmt: skip


def _new(names: Sequence[str], scores: PatientScores, last: int) -> Table:
    rows = []
    for name in names:
        values = list(scores.get((last, name), {}).values())
        mean = t_interval(values)
        rows.append((name, number(mean.estimate), _ends(mean), str(len(values))))
    return Table(
        title="New structures",
        columns=("structure", "Dice", "95 %", "test patients"),
        rows=tuple(rows),
        notes=("an interval over so few patients is wide: test on more before relying on it.",)
        if any(int(row[3]) < 10 for row in rows)
        else (),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _ends(interval: Interval) -> str:
    if math.isnan(interval.low):
        return EMPTY
    return f"{max(0.0, interval.low):.3f} to {min(1.0, interval.high):.3f}"


def _change(interval: Interval) -> str:
    if math.isnan(interval.low):
        return signed(interval.estimate)
    return f"{signed(interval.estimate)} ({signed(interval.low)} to {signed(interval.high)})"
