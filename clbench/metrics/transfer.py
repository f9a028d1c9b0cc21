"""What was kept and what was learned: forgetting, backward transfer and their kin.

Room: row 1 (no torch). Everything starts from R[t][c], the mean score of structure c after step t
on the test cases of the source that taught it. Structures weigh the same (class macro). A mean over
an incomplete set is NaN, never a partial mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from clbench.store import Score

Matrix = Mapping[tuple[int, str], float]
"""(1-based step, structure) → R."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One entry of R."""

    value: float
    """Mean over the patients that count; NaN where there is none. A patient with several cases
    counts once, with their mean."""
    cases: int
    """How many cases count."""
    missed: int
    """Of these, cases in which the structure was missed completely."""


def cells(
    rows: Iterable[Score],
    sources: Sequence[str],
    *,
    scoring: str,
    metric: str = "dice",
    patient_of: Mapping[str, str] = {},
) -> dict[tuple[int, str], Cell]:
    """R of one run, each structure on the test cases of the source that taught it.

    Args:
        rows: scores of one run.
        sources: name of the source of each step.
        scoring: `strict` or `paper`.
        metric: which score; `nsd` is the surface Dice at each structure's own tolerance.
        patient_of: "source/case" → patient; a case that is absent is a patient.

    Returns:
        (step, structure) → cell. A case counts where its score is a number, that is where its truth
        holds the structure (false alarms on an empty truth are counted by status, not by Dice).
    """
    found: dict[tuple[int, str], list[Score]] = {}
    for r in rows:
        if r.scoring == scoring and r.measures(metric) and r.eval_set == sources[r.learned_at - 1]:
            found.setdefault((r.step, r.structure), []).append(r)
    return {key: _cell(values, patient_of) for key, values in found.items()}


def _cell(rows: Sequence[Score], patient_of: Mapping[str, str]) -> Cell:
    by_case = {r.case: r.value for r in rows}
    means = per_patient(by_case, rows[0].eval_set, patient_of)
    return Cell(
        value=mean(v for v in means.values() if not math.isnan(v)),
        cases=sum(not math.isnan(v) for v in by_case.values()),
        missed=sum(r.status == "fn_only" for r in rows),
    )


def per_patient(
    values: Mapping[str, float], source: str, patient_of: Mapping[str, str]
) -> dict[str, float]:
    """Patient → mean over those of the patient's cases that have a number; NaN where none has.

    Args:
        values: case → score; NaN where the truth is empty.
        source: where the cases come from.
        patient_of: "source/case" → patient; a case that is absent is a patient.
    """
    found: dict[str, list[float]] = {}
    for case, value in values.items():
        mine = found.setdefault(patient_of.get(f"{source}/{case}", case), [])
        if not math.isnan(value):
            mine.append(value)
    return {patient: mean(mine) for patient, mine in found.items()}


def mean(values: Iterable[float]) -> float:
    """Plain mean; NaN for nothing, and where any value is NaN."""
    have = list(values)
    return math.fsum(have) / len(have) if have else math.nan


def _best(values: Iterable[float]) -> float:
    """Largest value; NaN where any is NaN, since the missing one may be the largest."""
    have = list(values)
    return math.nan if any(math.isnan(v) for v in have) else max(have)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN below two values."""
    if len(values) < 2:
        return math.nan
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


def accuracy(
    r: Matrix, learned_at: Mapping[str, int], step: int, which: Callable[[int], bool]
) -> float:
    """Mean R after `step` over the structures whose step fulfils `which`.

    Source: old, new and all of class-incremental segmentation (Cermelli et al., CVPR 2020).
    """
    return mean(r.get((step, c), math.nan) for c, s in learned_at.items() if which(s))


def backward_transfer(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: R after the last minus R after its own.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017 (GEM), by class. Below 0 is forgetting.
    """
    return {
        c: r.get((last, c), math.nan) - r.get((s, c), math.nan)
        for c, s in learned_at.items()
        if s < last
    }


def backward_transfer_all_pairs(r: Matrix, learned_at: Mapping[str, int], last: int) -> float:
    """Mean of R[t] - R[own step] over every later step t and structure.

    Source: Díaz-Rodríguez et al., 2018. Equals the mean of `backward_transfer` for two steps only.
    """
    return mean(
        r.get((t, c), math.nan) - r.get((s, c), math.nan)
        for t in range(2, last + 1)
        for c, s in learned_at.items()
        if s < t
    )


def forgetting(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: its best R so far minus R after the last step.

    Source: Chaudhry et al., ECCV 2018. The best is taken over the steps before the last, so a gain
    in the last step shows as a negative value.
    Differs: not at all; others call other things forgetting, see the next two functions.
    """
    return {
        c: _best(r.get((t, c), math.nan) for t in range(s, last)) - r.get((last, c), math.nan)
        for c, s in learned_at.items()
        if s < last
    }


def forgetting_first_last(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: R after its own step minus R after the last.

    Source: the forgetting metric of Avalanche 0.6; minus `backward_transfer`, structure by
    structure.
    Differs: from Chaudhry's where a later step beat the structure's own.
    """
    return {c: -v for c, v in backward_transfer(r, learned_at, last).items()}


def forgetting_mammoth(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: its best R of all steps minus R after the last.

    Source: the forgetting metric of the mammoth library.
    Differs: from Chaudhry's in that the last step competes too, so a gain shows as 0.
    """
    return {
        c: _best(r.get((t, c), math.nan) for t in range(s, last + 1)) - r.get((last, c), math.nan)
        for c, s in learned_at.items()
        if s < last
    }


def learning_accuracy(r: Matrix, learned_at: Mapping[str, int], *, first: int = 2) -> float:
    """Mean R of each structure right after the step that taught it, from step `first` on.

    Source: Riemer et al., ICLR 2019. From step 2 on it is the plasticity of the method.
    """
    return mean(r.get((s, c), math.nan) for c, s in learned_at.items() if s >= first)


def average_incremental(r: Matrix, learned_at: Mapping[str, int], last: int) -> float:
    """Mean over the steps of the mean R of all structures learned so far.

    Source: Rebuffi et al., CVPR 2017 (iCaRL).
    """
    return mean(accuracy(r, learned_at, t, t.__ge__) for t in range(1, last + 1))


def intransigence(
    r: Matrix, joint: Matrix, learned_at: Mapping[str, int], *, first: int = 2
) -> dict[str, float]:
    """Per structure: R of a joint model of steps 1 to its own, minus R right after its own step.

    Source: Chaudhry et al., ECCV 2018.
    """
    return {
        c: joint.get((s, c), math.nan) - r.get((s, c), math.nan)
        for c, s in learned_at.items()
        if s >= first
    }


def relative_to_joint(
    r: Matrix, joint: Matrix, learned_at: Mapping[str, int], last: int
) -> dict[str, float]:
    """Per structure: R after the last step minus R of the joint model of all steps.

    Source: the gap to joint training that class-incremental segmentation prints (Cermelli et al.,
    CVPR 2020).
    Differs: a difference; a ratio explodes on tumors.
    """
    return {c: r.get((last, c), math.nan) - joint.get((last, c), math.nan) for c in learned_at}


def domain_transfer(
    rows: Iterable[Score],
    sources: Sequence[str],
    *,
    scoring: str,
    metric: str = "dice",
    patient_of: Mapping[str, str] = {},
) -> dict[tuple[str, str], Cell]:
    """How a structure does on a source that is only taught later: (structure, source) → cell.

    Scores are those after the step right before the source is first taught: with BTCV before LiTS,
    the liver learned on BTCV and looked for on LiTS after step 1.

    Source: forward transfer (Lopez-Paz and Ranzato, NeurIPS 2017), of the domain.
    Differs: forward transfer itself asks for the score of a structure before it is taught, when
        a model that grows by classes has no output for it.
    """
    first = {name: sources.index(name) + 1 for name in sources}
    found: dict[tuple[str, str], list[Score]] = {}
    for row in rows:
        taught = first.get(row.eval_set, 0)
        if (
            row.scoring == scoring
            and row.measures(metric)
            and row.status != "not_annotated"
            and row.step == taught - 1
            and row.eval_set != sources[row.learned_at - 1]
        ):
            found.setdefault((row.structure, row.eval_set), []).append(row)
    return {key: _cell(values, patient_of) for key, values in found.items()}


def harmonic(old: float, new: float) -> float:
    """2 old new / (old + new); 0 where both are 0."""
    return 0.0 if old + new == 0 else 2 * old * new / (old + new)
