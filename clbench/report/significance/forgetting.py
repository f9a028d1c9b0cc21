"""Forgetting of each strategy by itself: is a loss shown, or is one ruled out?

"Keeps" is not a large p: it is a loss shown to be smaller than the declared margin
(non-inferiority). All strategies are one family, the reference too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clbench.report.scores import Scores
from clbench.report.significance.confirmatory import Tested, family_of, statistical_cautions
from clbench.report.significance.endpoints import KEPT, hole, table
from clbench.report.study import Protocol
from clbench.statistics.class_macro import strata


@dataclass(frozen=True, kw_only=True)
class Own(Tested):
    """Forgetting of one strategy by itself: last step minus own step."""

    method: str
    """Strategy."""


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
