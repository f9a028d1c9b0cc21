"""Marks in tables: best bold, runner-up underlined, a lead marked only where a test carries it.

The one rule: the best value of a column is bold, the next underlined; if
several are best, all are bold and none is underlined. A lead is `proven` where best against
runner-up has an adjusted p <= alpha, and `untestable` where so few patients cannot show any.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from clbench.report.tables.render import Mark

if TYPE_CHECKING:
    from clbench.report.paper.rows import Column
    from clbench.report.scores import StrategyScores
    from clbench.report.study import Protocol
    from clbench.types import Floats

DIGITS = 9  # means of the same numbers in another order are equal
K = TypeVar("K", bound=Hashable)


def best_and_second(values: Mapping[K, float]) -> dict[K, Mark]:
    """Who is best and who comes next; NaN takes no part, and one alone is not best.

    Returns:
        All that share the highest value; and all that share the next, unless the highest is shared.
    """
    have = {k: round(v, DIGITS) for k, v in values.items() if not math.isnan(v)}
    if len(have) < 2:
        return {}
    highest, *lower = sorted(have.values(), reverse=True)
    best: dict[K, Mark] = {k: "best" for k, v in have.items() if v == highest}
    if len(best) > 1:
        return best
    return best | {k: "second" for k, v in have.items() if v == lower[0]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """Marks of measured cells."""

    marks: Mapping[tuple[int, int], set[Mark]]
    """(row, column) → marks."""
    m: int
    """Comparisons in the family."""
    n: tuple[int, int]
    """Smallest and largest number of patients of a comparison."""


def mark(
    cells: Mapping[int, tuple[Column, Mapping[int, StrategyScores]]], protocol: Protocol
) -> Marked:
    """Marks of measured cells, all over the same cases and seeds.

    One comparison per column, best against runner-up: paired by patient, seeds averaged first; all
    columns compared are one family. Looking at the best two of many is no advantage: the gap
    between the top two of K equals is on average smaller than the gap of a pair named beforehand.

    Args:
        cells: place of a column → the column, and row → runs behind its cell.
        protocol: level, correction and sign patterns of the tests.
    """
    from clbench.report.significance.confirmatory import family_of

    marks: dict[tuple[int, int], set[Mark]] = {}
    leads: dict[tuple[int, int], Mapping[str, Floats]] = {}
    for j, (column, runs) in cells.items():
        if column.step == 1 and len({s.first_steps for s in runs.values()}) == 1:
            continue  # one checkpoint, however often it is printed
        values = {i: s.over_seeds(column.step, column.members)[0] for i, s in runs.items()}
        ranked = best_and_second(values)
        marks |= {(i, j): {word} for i, word in ranked.items()}
        if second := [i for i, word in ranked.items() if word == "second"]:
            (winner,) = ranked.keys() - second
            at = dict.fromkeys(column.members, column.step)
            ours, theirs = (runs[i].table(at) for i in (winner, min(second)))
            leads[winner, j] = {name: ours[name] - theirs[name] for name in ours}
    family = family_of(list(leads.values()), protocol)
    for key, lead in zip(leads, family.comparisons, strict=True):
        if lead.verdict.word == "not testable":
            marks[key].add("untestable")
        elif lead.p <= protocol.alpha:
            marks[key].add("proven")
    n = [lead.mean.n for lead in family.comparisons] or [0]
    return Marked(marks=marks, m=family.m, n=(min(n), max(n)))
