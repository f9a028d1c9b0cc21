"""Marks in tables: best bold, runner-up underlined, a lead marked only where a test carries it.

The one rule: the best value of a column is bold, the next underlined; if
several are best, all are bold and none is underlined. A lead is `proven` where best against
runner-up has an adjusted p <= alpha, and `untestable` where so few patients cannot show any.
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
    from clbench.types import Floats

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

    One comparison per column, best against runner-up: paired by patient, seeds averaged first; all
    columns compared are one family. Looking at the best two of many is no advantage: the gap
    between the top two of K equals is on average smaller than the gap of a pair named beforehand.

    Args:
        contests: column → who competes there.
        protocol: level, correction and sign patterns of the tests.
    """
    from clbench.report.significance.confirmatory import family_of

    found: dict[tuple[int, int], set[Mark]] = {}
    leads: dict[tuple[int, int], Mapping[str, Floats]] = {}
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
            at = dict.fromkeys(contest.members, contest.step)
            ours, theirs = (contest.cells[i].table(at) for i in (winner, min(second)))
            leads[winner, j] = {name: ours[name] - theirs[name] for name in ours}
    family = family_of(list(leads.values()), protocol)
    for key, lead in zip(leads, family.comparisons, strict=True):
        if lead.verdict.word == "not testable":
            found[key].add("untestable")
        elif lead.p <= protocol.alpha:
            found[key].add("proven")
    n = [lead.mean.n for lead in family.comparisons] or [0]
    return Marked(
        marks={key: frozenset(marks) for key, marks in found.items()},
        m=family.m,
        n=(min(n), max(n)),
    )


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
