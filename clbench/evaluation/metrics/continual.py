"""Continual-learning metrics: forgetting, backward transfer, intransigence and their kin.

Everything starts from R[t][c], the mean score of structure c after step t
on the test cases of the source that taught it. Structures weigh the same (class macro). A mean over
an incomplete set is NaN, never a partial mean. The functions take a score of which larger is
better; `course_metrics` turns one of which smaller is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from clbench.store.run_folder import Score

Matrix = Mapping[tuple[int, str], float]
"""(1-based step, structure) → R."""


def matrix(
    rows: Iterable[Score],
    sources: Sequence[str],
    *,
    scoring: str,
    metric: str = "dice",
    patient_of: Mapping[str, str] = {},
) -> dict[tuple[int, str], float]:
    """R of one run, each structure on the test cases of the source that taught it.

    Args:
        rows: scores of one run.
        sources: name of the source of each step.
        scoring: `strict` or `paper`.
        metric: which score; `nsd` is the surface Dice at each structure's own tolerance.
        patient_of: "source/case" → patient; a case that is absent is a patient.

    Returns:
        (step, structure) → mean over patients, a patient with several cases counting once, with
        their mean; NaN where there is none. A case counts where its score is a number, that is
        where its truth holds the structure (false alarms on an empty truth are counted by status,
        not by Dice).

    Example:
        >>> from clbench.evaluation.metrics.continual import matrix
        >>> from clbench.store.run_folder import Score
        >>> def score(case: str, value: float) -> Score:
        ...     return Score(
        ...         bench="tumor_ext", bench_version=1, strategy="universal", seed=0, step=1,
        ...         eval_set="lits", case=case, structure="liver", learned_at=1, scoring="strict",
        ...         metric="dice", value=value, gt_vox=8, pred_vox=8, status="ok",
        ...     )
        >>> rows = [score("1", 0.5), score("2", 1.0), score("3", 0.25)]
        >>> matrix(rows, ["lits"], scoring="strict", patient_of={"lits/1": "A", "lits/2": "A"})
        {(1, 'liver'): 0.5}
    """
    by_patient: dict[tuple[int, str], dict[str, list[float]]] = {}
    for r in rows:
        if r.scoring == scoring and r.measures(metric) and r.eval_set == sources[r.learned_at - 1]:
            patients = by_patient.setdefault((r.step, r.structure), {})
            if not math.isnan(r.value):
                patient = patient_of.get(f"{r.eval_set}/{r.case}", r.case)
                patients.setdefault(patient, []).append(r.value)
    return {key: mean(map(mean, patients.values())) for key, patients in by_patient.items()}


def mean(values: Iterable[float]) -> float:
    """Plain mean; NaN for nothing, and where any value is NaN.

    Example:
        >>> from clbench.evaluation.metrics.continual import mean
        >>> mean([0.25, 0.75]), mean([]), mean([0.25, float("nan")])
        (0.5, nan, nan)
    """
    have = list(values)
    return math.fsum(have) / len(have) if have else math.nan


def _best(values: Iterable[float]) -> float:
    """Largest value; NaN where any is NaN, since the missing one may be the largest."""
    have = list(values)
    return math.nan if any(math.isnan(v) for v in have) else max(have)


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN below two values.

    Example:
        >>> from clbench.evaluation.metrics.continual import spread
        >>> spread([1.0, 2.0, 3.0]), spread([1.0])
        (1.0, nan)
    """
    if len(values) < 2:
        return math.nan
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1))


def accuracy(
    r: Matrix, learned_at: Mapping[str, int], step: int, which: Callable[[int], bool]
) -> float:
    """Mean R after `step` over the structures whose step fulfils `which`.

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        step: 1-based step after which the scores are taken.
        which: whether structures taught at this step take part.

    Example:
        >>> from clbench.evaluation.metrics.continual import accuracy
        >>> r = {(2, "liver"): 0.5, (2, "spleen"): 1.0, (2, "kidney"): 0.25}
        >>> learned_at = {"liver": 1, "spleen": 1, "kidney": 2}
        >>> accuracy(r, learned_at, 2, lambda step: step < 2)  # old
        0.75
        >>> accuracy(r, learned_at, 2, lambda step: step == 2)  # new
        0.25

    Source: old, new and all of class-incremental segmentation (Cermelli et al., CVPR 2020).
    """
    return mean(r.get((step, c), math.nan) for c, s in learned_at.items() if which(s))


def backward_transfer(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: R after the last minus R after its own.

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import backward_transfer
        >>> r = {(1, "liver"): 0.75, (2, "liver"): 0.5, (2, "kidney"): 0.25}
        >>> backward_transfer(r, {"liver": 1, "kidney": 2}, 2)
        {'liver': -0.25}

    Source: Lopez-Paz and Ranzato, NeurIPS 2017 (GEM), by class. Below 0 is forgetting.
    """
    return {
        c: r.get((last, c), math.nan) - r.get((s, c), math.nan)
        for c, s in learned_at.items()
        if s < last
    }


def backward_transfer_all_pairs(r: Matrix, learned_at: Mapping[str, int], last: int) -> float:
    """Mean of R[t] - R[own step] over every later step t and structure.

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import backward_transfer_all_pairs
        >>> r = {(1, "liver"): 0.75, (2, "liver"): 0.5, (3, "liver"): 0.25}
        >>> r |= {(2, "kidney"): 0.5, (3, "kidney"): 0.75, (3, "colon"): 0.5}
        >>> learned_at = {"liver": 1, "kidney": 2, "colon": 3}
        >>> round(backward_transfer_all_pairs(r, learned_at, 3), 4)  # (-0.25 - 0.5 + 0.25) / 3
        -0.1667

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

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import forgetting
        >>> r = {(1, "liver"): 0.5, (2, "liver"): 0.75, (3, "liver"): 0.25}
        >>> forgetting(r, {"liver": 1}, 3)
        {'liver': 0.5}

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

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import forgetting_first_last
        >>> r = {(1, "liver"): 0.5, (2, "liver"): 0.75, (3, "liver"): 0.25}
        >>> forgetting_first_last(r, {"liver": 1}, 3)
        {'liver': 0.25}

    Source: the forgetting metric of Avalanche 0.6; minus `backward_transfer`, structure by
    structure.
    Differs: from Chaudhry's where a later step beat the structure's own.
    """
    return {c: -v for c, v in backward_transfer(r, learned_at, last).items()}


def forgetting_mammoth(r: Matrix, learned_at: Mapping[str, int], last: int) -> dict[str, float]:
    """Per structure learned before the last step: its best R of all steps minus R after the last.

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import forgetting, forgetting_mammoth
        >>> r = {(1, "liver"): 0.5, (2, "liver"): 0.25, (3, "liver"): 0.75}
        >>> forgetting_mammoth(r, {"liver": 1}, 3), forgetting(r, {"liver": 1}, 3)
        ({'liver': 0.0}, {'liver': -0.25})

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

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        first: structures of earlier steps are left out.

    Example:
        >>> from clbench.evaluation.metrics.continual import learning_accuracy
        >>> r = {(1, "liver"): 0.75, (2, "liver"): 0.5, (2, "kidney"): 0.25}
        >>> learned_at = {"liver": 1, "kidney": 2}
        >>> learning_accuracy(r, learned_at), learning_accuracy(r, learned_at, first=1)
        (0.25, 0.5)

    Source: Riemer et al., ICLR 2019. From step 2 on it is the plasticity of the method.
    """
    return mean(r.get((s, c), math.nan) for c, s in learned_at.items() if s >= first)


def average_incremental(r: Matrix, learned_at: Mapping[str, int], last: int) -> float:
    """Mean over the steps of the mean R of all structures learned so far.

    Args:
        r: scores by (step, structure).
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import average_incremental
        >>> r = {(1, "liver"): 0.75, (2, "liver"): 0.5, (2, "kidney"): 0.0}
        >>> average_incremental(r, {"liver": 1, "kidney": 2}, 2)  # (0.75 + 0.25) / 2
        0.5

    Source: Rebuffi et al., CVPR 2017 (iCaRL).
    """
    return mean(accuracy(r, learned_at, t, t.__ge__) for t in range(1, last + 1))


def intransigence(
    r: Matrix, joint: Matrix, learned_at: Mapping[str, int], *, first: int = 2
) -> dict[str, float]:
    """Per structure: R of a joint model of steps 1 to its own, minus R right after its own step.

    Args:
        r: scores by (step, structure).
        joint: the same of joint training; after step t it has seen the data of steps 1 to t at
            once.
        learned_at: structure → 1-based step that teaches it.
        first: structures of earlier steps are left out.

    Example:
        >>> from clbench.evaluation.metrics.continual import intransigence
        >>> r, joint = {(2, "kidney"): 0.5}, {(2, "kidney"): 0.75}
        >>> intransigence(r, joint, {"liver": 1, "kidney": 2})
        {'kidney': 0.25}

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

    Args:
        r: scores by (step, structure).
        joint: the same of joint training.
        learned_at: structure → 1-based step that teaches it.
        last: number of steps.

    Example:
        >>> from clbench.evaluation.metrics.continual import relative_to_joint
        >>> r, joint = {(2, "kidney"): 0.5}, {(2, "kidney"): 0.75}
        >>> relative_to_joint(r, joint, {"kidney": 2}, 2)
        {'kidney': -0.25}

    Source: the gap to joint training that class-incremental segmentation prints (Cermelli et al.,
    CVPR 2020).
    Differs: a difference; a ratio explodes on tumors.
    """
    return {c: r.get((last, c), math.nan) - joint.get((last, c), math.nan) for c in learned_at}


def harmonic(old: float, new: float) -> float:
    """2 old new / (old + new); 0 where both are 0.

    Example:
        >>> from clbench.evaluation.metrics.continual import harmonic
        >>> round(harmonic(0.5, 0.25), 4), harmonic(0.0, 0.0)
        (0.3333, 0.0)
    """
    return 0.0 if old + new == 0 else 2 * old * new / (old + new)


# --------------------------------------------------------------------------------------------------
# Every measure of a run by name, each a number or n/a with the reason.


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantity:
    """A number, or none with the reason."""

    value: float
    """NaN where it does not exist."""
    reason: str = ""
    """Why there is no number; empty where there is one."""

    def __post_init__(self) -> None:
        """A number needs no reason, and its absence does."""
        if math.isnan(self.value) != bool(self.reason):
            raise ValueError(f"value {self.value} with reason {self.reason!r}")


Key = tuple[int, str]
"""(1-based step, structure): where a score stands in R."""
ONE_STEP = "one step: nothing comes before or after"
NO_DIRECTION = "neither larger nor smaller values are better"
NO_HARMONIC = "the harmonic mean is one of shares, of which larger is better"
NO_STRUCTURE = "no structure that counts here: none is taught in such a step, or annotated"


@dataclass(frozen=True, kw_only=True, slots=True)
class CourseScores:
    """R of one run, and which step teaches which structure: what a measure is computed from."""

    r: Matrix
    """R of the run."""
    joint: Matrix | None
    """R of joint training with the same seed, or None."""
    learned_at: Mapping[str, int]
    """Structure → 1-based step that teaches it."""
    last: int
    """Number of steps."""
    higher_is_better: bool | None = True
    """Which scores are the better ones; None: neither. Where smaller ones are, R is negative."""

    @property
    def old(self) -> list[str]:
        """Structures of the steps before the last."""
        return [c for c, s in self.learned_at.items() if s < self.last]

    @property
    def new(self) -> list[str]:
        """Structures of the last step."""
        return [c for c, s in self.learned_at.items() if s == self.last]

    @property
    def from_step_2(self) -> list[str]:
        """Structures of all steps but the first."""
        return [c for c, s in self.learned_at.items() if s > 1]

    def at_end(self, names: Iterable[str]) -> list[Key]:
        """Scores after the last step."""
        return [(self.last, c) for c in names]

    def at_own(self, names: Iterable[str]) -> list[Key]:
        """Scores right after the step that teaches a structure."""
        return [(self.learned_at[c], c) for c in names]

    def since_own(self, names: Iterable[str]) -> list[Key]:
        """Scores after the step that teaches a structure and after every later one."""
        return [(t, c) for c in names for t in range(self.learned_at[c], self.last + 1)]


@dataclass(frozen=True, slots=True)
class Measure:
    """One number about a whole course, class-macro, and what it takes to compute it."""

    name: str
    """Short name in files."""
    label: str
    """Words for readers."""
    formula: Callable[[CourseScores], float] = lambda c: math.nan
    """The number."""
    needs: Callable[[CourseScores], Sequence[Key]] = lambda c: ()
    """The scores it needs; where one is missing there is no number, never a partial mean."""
    kind: Literal["difference", "mean", "ratio", "harmonic"] = field(
        default="difference", kw_only=True
    )
    """What the number is: only a mean has the unit and the direction of the score itself."""
    joint: bool = field(default=False, kw_only=True)
    """The same scores are needed of joint training."""
    one_step: bool = field(default=False, kw_only=True)
    """It exists for a course of a single step."""
    never: str = field(default="", kw_only=True)
    """Why no course here can have it; empty where one can."""

    def of(self, course: CourseScores) -> Quantity:
        """The number, or the reason why there is none."""

        def nothing(reason: str) -> Quantity:
            return Quantity(value=math.nan, reason=reason)

        if self.never:
            return nothing(self.never)
        if self.kind == "harmonic" and course.higher_is_better is not True:
            return nothing(NO_HARMONIC)
        if self.kind in ("difference", "ratio") and course.higher_is_better is None:
            return nothing(NO_DIRECTION)
        sides = [("", course.r)]
        if self.joint:
            if course.joint is None:
                return nothing("there is no run of joint training with this seed")
            sides.append(("joint training: ", course.joint))
        try:
            value = self.formula(course)
        except ZeroDivisionError:  # of a ratio to joint training, the only one
            return nothing("joint training scores 0")
        if course.last == 1 and not self.one_step:
            return nothing(ONE_STEP)
        for whose, scores in sides:
            absent = [key for key in self.needs(course) if math.isnan(scores.get(key, math.nan))]
            if absent:
                step, name = absent[0]
                more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
                return nothing(f"{whose}{name} has no score after step {step}{more}")
        if math.isnan(value):
            return nothing(NO_STRUCTURE)
        turned = self.kind == "mean" and course.higher_is_better is False
        return Quantity(value=0.0 - value if turned else value)


def _old(c: CourseScores) -> float:
    return accuracy(c.r, c.learned_at, c.last, lambda step: step < c.last)


def _new(c: CourseScores) -> float:
    return accuracy(c.r, c.learned_at, c.last, lambda step: step == c.last)


def _all(c: CourseScores) -> float:
    return accuracy(c.r, c.learned_at, c.last, lambda step: True)


def _all_by_step(c: CourseScores) -> float:
    steps = sorted(set(c.learned_at.values()))
    return mean(accuracy(c.r, c.learned_at, c.last, step.__eq__) for step in steps)


def _end(c: CourseScores) -> list[Key]:
    return c.at_end(c.learned_at)


def _old_ends(c: CourseScores) -> list[Key]:
    return [*c.at_own(c.old), *c.at_end(c.old)]


def _old_path(c: CourseScores) -> list[Key]:
    return c.since_own(c.old)


def _macro(
    by_structure: Callable[[Matrix, Mapping[str, int], int], dict[str, float]],
) -> Callable[[CourseScores], float]:
    """Mean over structures of a function of R."""
    return lambda c: mean(by_structure(c.r, c.learned_at, c.last).values())


MEASURES = (
    Measure(
        "old", "old structures, after the last step", _old, lambda c: c.at_end(c.old), kind="mean"
    ),
    Measure(
        "new",
        "new structures of the last step",
        _new,
        lambda c: c.at_end(c.new),
        kind="mean",
        one_step=True,
    ),
    Measure("all", "all structures, after the last step", _all, _end, kind="mean", one_step=True),
    Measure(
        "all_by_step",
        "the same, every step weighing the same",
        _all_by_step,
        _end,
        kind="mean",
        one_step=True,
    ),
    Measure("bwt", "backward transfer (GEM: last row)", _macro(backward_transfer), _old_ends),
    Measure(
        "bwt_all_pairs",
        "backward transfer (Díaz-Rodríguez: all pairs)",
        lambda c: backward_transfer_all_pairs(c.r, c.learned_at, c.last),
        _old_path,
    ),
    Measure(
        "forgetting",
        "forgetting (Chaudhry: best before the last step)",
        _macro(forgetting),
        _old_path,
    ),
    Measure(
        "forgetting_first_last",
        "forgetting (first minus last)",
        _macro(forgetting_first_last),
        _old_ends,
    ),
    Measure(
        "forgetting_mammoth",
        "forgetting (mammoth: best of all steps)",
        _macro(forgetting_mammoth),
        _old_path,
    ),
    Measure(
        "learning",
        "learning accuracy, from step 2 (plasticity)",
        lambda c: learning_accuracy(c.r, c.learned_at),
        lambda c: c.at_own(c.from_step_2),
        kind="mean",
    ),
    Measure(
        "learning_all",
        "learning accuracy, all steps",
        lambda c: learning_accuracy(c.r, c.learned_at, first=1),
        lambda c: c.at_own(c.learned_at),
        kind="mean",
        one_step=True,
    ),
    Measure(
        "average_incremental",
        "average incremental",
        lambda c: average_incremental(c.r, c.learned_at, c.last),
        lambda c: c.since_own(c.learned_at),
        kind="mean",
        one_step=True,
    ),
    Measure(
        "harmonic",
        "harmonic mean of old and new",
        lambda c: harmonic(_old(c), _new(c)),
        _end,
        kind="harmonic",
    ),
    Measure(
        "forward",
        "forward transfer",
        never="class-incremental: no output exists before a structure is taught",
    ),
    Measure(
        "intransigence",
        "intransigence (joint minus own step), from step 2",
        lambda c: mean(intransigence(c.r, c.joint or {}, c.learned_at).values()),
        lambda c: c.at_own(c.from_step_2),
        joint=True,
    ),
    Measure(
        "delta_joint",
        "all structures, minus joint",
        lambda c: mean(relative_to_joint(c.r, c.joint or {}, c.learned_at, c.last).values()),
        _end,
        joint=True,
        one_step=True,
    ),
    Measure(
        "relative_joint",
        "all structures, relative to joint",
        lambda c: _all(c) / mean((c.joint or {}).get(key, math.nan) for key in _end(c)),
        _end,
        kind="ratio",
        joint=True,
        one_step=True,
    ),
)
"""In the order of a table; each formula names its source."""
NAMES: dict[str, str] = {measure.name: measure.label for measure in MEASURES}
"""Name → words for readers, in the order of a table."""


def course_metrics(
    r: Matrix,
    learned_at: Mapping[str, int],
    last: int,
    *,
    joint: Matrix | None = None,
    higher_is_better: bool | None = True,
) -> dict[str, Quantity]:
    """All measures of one run, class-macro.

    Args:
        r: R of the run (values of `cells`).
        learned_at: structure → 1-based step.
        last: number of steps.
        joint: R of the run of joint training with the same seed, if there is one.
        higher_is_better: of the score, as `clbench.evaluation.metrics.case.Metric` has it. Where
            smaller is better (a distance), the smallest R is the best one, and a difference is
            turned: worse is below 0 in transfer and minus joint, above 0 in forgetting and
            intransigence, whatever the score. None: neither; only means of the score exist.

    Returns:
        Name (see `NAMES`) → number or reason. A score that is missing makes every measure that
        needs it n/a, never a partial mean.

    Example:
        >>> from clbench.evaluation.metrics.continual import course_metrics
        >>> r = {(1, "liver"): 0.75, (2, "liver"): 0.5, (2, "kidney"): 0.25}
        >>> measures = course_metrics(r, {"liver": 1, "kidney": 2}, 2)
        >>> measures["all"].value, measures["bwt"].value, measures["forgetting"].value
        (0.375, -0.25, 0.25)
        >>> measures["intransigence"].reason
        'there is no run of joint training with this seed'
        >>> distance = {(1, "liver"): 5.0, (2, "liver"): 25.0, (2, "kidney"): 3.0}
        >>> of = course_metrics(distance, {"liver": 1, "kidney": 2}, 2, higher_is_better=False)
        >>> of["old"].value, of["bwt"].value, of["forgetting"].value
        (25.0, -20.0, 20.0)

    Source: each function of this module names its own.
    """
    if higher_is_better is False:
        r = {key: -value for key, value in r.items()}
        joint = None if joint is None else {key: -value for key, value in joint.items()}
    course = CourseScores(
        r=r, joint=joint, learned_at=learned_at, last=last, higher_is_better=higher_is_better
    )
    return {measure.name: measure.of(course) for measure in MEASURES}
