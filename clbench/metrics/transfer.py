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
    """Mean over the cases that count; NaN where there is none."""
    cases: int
    """How many count."""
    missed: int
    """Of these, cases in which the structure was missed completely."""


def cells(
    rows: Iterable[Score], sources: Sequence[str], *, scoring: str, metric: str = "dice"
) -> dict[tuple[int, str], Cell]:
    """R of one run, each structure on the test cases of the source that taught it.

    Args:
        rows: scores of one run.
        sources: name of the source of each step.
        scoring: `strict` or `paper`.
        metric: which score.

    Returns:
        (step, structure) → cell. A case counts where its score is a number, that is where its truth
        holds the structure (false alarms on an empty truth are counted by status, not by Dice).
    """
    found: dict[tuple[int, str], list[tuple[float, str]]] = {}
    for r in rows:
        if r.scoring == scoring and r.metric == metric and r.eval_set == sources[r.learned_at - 1]:
            found.setdefault((r.step, r.structure), []).append((r.value, r.status))
    return {
        key: Cell(
            value=mean(v for v, _ in values if not math.isnan(v)),
            cases=sum(not math.isnan(v) for v, _ in values),
            missed=sum(s == "fn_only" for _, s in values),
        )
        for key, values in found.items()
    }


def mean(values: Iterable[float]) -> float:
    """Plain mean; NaN for nothing, and where any value is NaN."""
    have = list(values)
    return math.fsum(have) / len(have) if have else math.nan


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
    """
    return {
        c: max(r.get((t, c), math.nan) for t in range(s, last)) - r.get((last, c), math.nan)
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


def harmonic(old: float, new: float) -> float:
    """2 old new / (old + new); 0 where both are 0."""
    return 0.0 if old + new == 0 else 2 * old * new / (old + new)
