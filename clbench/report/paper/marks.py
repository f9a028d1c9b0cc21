"""Marks in tables: best bold, runner-up underlined, a lead marked only where a test carries it.

The one rule: the best value of a column is bold, the next underlined; if
several are best, all are bold and none is underlined. A lead is `proven` where best against
runner-up has p_Holm <= alpha, and `untestable` where this many patients could not have shown it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from clbench.report.tables.render import Mark

if TYPE_CHECKING:
    from clbench.report.scores import StrategyScores
    from clbench.report.study import Protocol
    from clbench.statistics.paired_tests import PairedTest

DIGITS = 9  # means of the same numbers in another order are equal
K = TypeVar("K", bound=Hashable)


def best_and_second(values: Mapping[K, float]) -> tuple[set[K], set[K]]:
    """Who is best and who comes next; NaN takes no part, and one alone is not best.

    Returns:
        All that share the highest value; all that share the next, or none where the highest is
        shared.
    """
    have = {k: round(v, DIGITS) for k, v in values.items() if not math.isnan(v)}
    if len(have) < 2:
        return set(), set()
    order = sorted(set(have.values()), reverse=True)
    best = {k for k, v in have.items() if v == order[0]}
    if len(best) > 1:
        return best, set()
    return best, {k for k, v in have.items() if v == order[1]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """One column: which cell holds whose runs."""

    step: int
    """After which step."""
    members: tuple[str, ...]
    """The structures whose plain mean the column holds."""
    cells: Mapping[int, StrategyScores]
    """Row → runs behind its cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """Marks of measured cells."""

    marks: Mapping[tuple[int, int], frozenset[Mark]]
    """(row, contest) → marks."""
    m: int
    """Comparisons in the family."""
    n: tuple[int, int]
    """Smallest and largest number of patients of a comparison."""


def mark(contests: Mapping[int, Contest], protocol: Protocol) -> Marked:
    """Marks of measured cells, all over the same cases and seeds.

    One comparison per column, best against runner-up: paired by patient, seeds averaged first;
    Wilcoxon signed-rank for one structure, stratified sign-flip for a mean of several; two-sided,
    Holm over all columns compared. Looking at the best two of many is no advantage: the gap between
    the top two of K equals is on average smaller than the gap of a pair named beforehand.

    Args:
        contests: column → who competes there.
        protocol: level, sign patterns and seed of the tests.
    """
    from clbench.statistics.corrections import holm

    found: dict[tuple[int, int], set[Mark]] = {}
    tests: dict[tuple[int, int], PairedTest] = {}
    for j, contest in contests.items():
        if contest.step == 1 and len({g.first_steps for g in contest.cells.values()}) == 1:
            continue  # one checkpoint, however often it is printed
        values = {
            i: s.over_seeds(contest.step, contest.members)[0] for i, s in contest.cells.items()
        }
        best, second = best_and_second(values)
        for i in best:
            found[i, j] = {"best"}
        for i in second:
            found[i, j] = {"second"}
        if second:
            (winner,) = best
            a, b = contest.cells[winner], contest.cells[min(second)]
            tests[winner, j] = compare(a, b, dict.fromkeys(contest.members, contest.step), protocol)
    family = holm([t.p for t in tests.values()])
    for (i, j), test, p in zip(tests, tests.values(), family.adjusted, strict=True):
        if math.isnan(test.p) or test.smallest_p * family.m > protocol.alpha:
            found[i, j].add("untestable")
        elif p <= protocol.alpha:
            found[i, j].add("proven")
    n = [t.n for t in tests.values()] or [0]
    return Marked(
        marks={key: frozenset(marks) for key, marks in found.items()},
        m=family.m,
        n=(min(n), max(n)),
    )


def compare(
    a: StrategyScores, b: StrategyScores, at: Mapping[str, int], protocol: Protocol
) -> PairedTest:
    """The test of A against B: patients paired, seeds averaged.

    Args:
        a: runs of one strategy.
        b: runs of another, scored on the same cases under the same seeds.
        at: structure → after which step.
        protocol: level, sign patterns and seed.
    """
    from clbench.statistics.class_macro import sign_flip
    from clbench.statistics.paired_tests import wilcoxon

    ours, theirs = a.table(at), b.table(at)
    difference = {s: ours[s].mean(axis=0) - theirs[s].mean(axis=0) for s in ours}
    if len(at) == 1:
        (only,) = difference.values()
        return wilcoxon(only.ravel(), alpha=protocol.alpha)
    return sign_flip(difference, seed=protocol.seed, draws=protocol.draws, alpha=protocol.alpha)


def printed_marks(
    columns: Sequence[int], values: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], frozenset[Mark]]:
    """Marks of printed cells: best and runner-up only; a printed lead cannot be tested.

    Args:
        columns: columns to mark.
        values: (row, column) → printed number.
    """
    found: dict[tuple[int, int], frozenset[Mark]] = {}
    for j in columns:
        best, second = best_and_second({i: v for (i, k), v in values.items() if k == j})
        found |= {(i, j): frozenset[Mark]({"best"}) for i in best}
        found |= {(i, j): frozenset[Mark]({"second"}) for i in second}
    return found
