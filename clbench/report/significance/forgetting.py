"""Forgetting of each strategy by itself: is a loss shown, or is one ruled out?

"Keeps" is not a large p: it is a loss shown to be smaller than the declared margin
(non-inferiority). All strategies are one family, the reference too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from clbench.report.scores import Scores
from clbench.report.significance.confirmatory import family_of, statistical_cautions
from clbench.report.significance.endpoints import KEPT, hole, table
from clbench.report.study import Protocol
from clbench.statistics.class_macro import strata
from clbench.statistics.max_t import FamilyComparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """Forgetting of one strategy by itself: last step minus own step."""

    method: str
    """Strategy."""
    hole: str = ""
    """Why there is no number."""
    seeds: tuple[int, ...] = ()
    """Training runs."""
    patients: Mapping[str, int] | None = None
    """Eval set → patients with at least one cell."""
    result: FamilyComparison | None = None
    """Change, p-values, interval and verdict; None for a hole."""
    m: int = 0
    """Strategies in the family."""
    flipped: int = 0
    """Patients whose signs are flipped in the family."""
    cautions: tuple[str, ...] = ()
    """What a reader must know, in words."""


def own_forgetting(scores: Scores, protocol: Protocol) -> list[Own]:
    """Per strategy: the change of its old structures from their own step to the last."""
    if scores.last < 2:
        return []
    rows = [
        Own(method=m.label, hole=hole(scores, m, KEPT), seeds=m.seeds) for m in scores.strategies
    ]
    whole = [k for k, row in enumerate(rows) if not row.hole]
    tables = [table(scores, scores.strategies[k], KEPT, rows[k].seeds) for k in whole]
    family = family_of(tables, protocol, kind="change")
    rows = [replace(row, m=family.m, flipped=family.patients) for row in rows]
    for k, change, result in zip(whole, tables, family.comparisons, strict=True):
        rows[k] = replace(
            rows[k],
            patients={part.name: part.n for part in strata(change)},
            result=result,
            cautions=statistical_cautions(result),
        )
    return rows
