"""Forgetting of each strategy by itself: is a loss shown, or is one ruled out?

"Does not forget" is not a large p: it is a loss shown to be smaller than
the declared margin (non-inferiority).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clbench.report.scores import Scores
from clbench.report.significance.endpoints import KEPT, hole, table
from clbench.report.study import Protocol
from clbench.statistics.bootstrap import crossed_interval
from clbench.statistics.class_macro import equivalence_flip, sign_flip
from clbench.statistics.corrections import SEEDS_TO_GENERALIZE, holm
from clbench.statistics.intervals import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """Forgetting of one strategy by itself: last step minus own step."""

    method: str
    """Strategy."""
    hole: str = ""
    """Why there is no number."""
    seeds: tuple[int, ...] = ()
    """Training runs."""
    interval: Interval | None = None
    """Mean change with its crossed bootstrap interval."""
    p_changed: float = math.nan
    """Two-sided sign-flip p of "no change"."""
    p_changed_holm: float = math.nan
    """Holm over the strategies."""
    p_not_worse: float = math.nan
    """One-sided p of "loses less than the margin" (non-inferiority)."""
    p_not_worse_holm: float = math.nan
    """Holm over the strategies."""
    smallest_p: float = math.nan
    """Smallest two-sided p this n can give."""
    m: int = 0
    """Strategies in the family."""
    word: str = ""
    """`forgets`, `forgets, less than the margin`, `keeps`, `gains`, `inconclusive` or
    `not testable`."""
    scope: str = ""
    """`for these training runs` where the seeds do not support more; else empty."""


def own_forgetting(scores: Scores, protocol: Protocol) -> list[Own]:
    """Per strategy: the change of its old structures from their own step to the last.

    "Does not forget" is a claim of its own: the loss is shown to be smaller than the margin.
    """
    if scores.last < 2:
        return []
    rows = []
    for method in scores.strategies:
        why = hole(scores, method, KEPT)
        if why:
            rows.append(Own(method=method.label, hole=why))
            continue
        change = table(scores, method, KEPT, method.seeds)
        test = sign_flip(change, seed=protocol.seed, draws=protocol.draws, alpha=protocol.alpha)
        equal = equivalence_flip(
            change, low=-protocol.margin, high=protocol.margin, seed=protocol.seed,
            draws=protocol.draws,
        )  # fmt: skip
        rows.append(
            Own(
                method=method.label,
                seeds=method.seeds,
                interval=crossed_interval(
                    change, seed=protocol.seed, draws=protocol.resamples, level=protocol.level
                ),
                p_changed=test.p,
                p_not_worse=equal.p_above_low,
                smallest_p=test.smallest_p,
            )
        )
    changed, kept = holm([r.p_changed for r in rows]), holm([r.p_not_worse for r in rows])
    judged = []
    for row, p, q in zip(rows, changed.adjusted, kept.adjusted, strict=True):
        word = _own_word(row, float(p), float(q), changed.m, protocol.alpha)
        judged.append(
            replace(
                row, p_changed_holm=float(p), p_not_worse_holm=float(q), m=changed.m, word=word,
                scope=_scope(row, word, protocol.margin),
            )
        )  # fmt: skip
    return judged


def _own_word(row: Own, p_changed: float, p_not_worse: float, m: int, alpha: float) -> str:
    if row.interval is None:
        return ""
    if row.smallest_p * m > alpha or math.isnan(p_changed):
        return "not testable"
    if p_changed <= alpha and row.interval.estimate < 0:
        return "forgets, less than the margin" if p_not_worse <= alpha else "forgets"
    if p_changed <= alpha and row.interval.estimate > 0:
        return "gains"
    return "keeps" if p_not_worse <= alpha else "inconclusive"


def _scope(row: Own, word: str, margin: float) -> str:
    """A claim goes beyond these runs only with enough seeds whose interval says the same."""
    if row.interval is None or word == "not testable":
        return ""
    low, high = row.interval.low, row.interval.high
    agrees = {"forgets": high < 0, "gains": low > 0, "keeps": low > -margin}.get(word, False)
    return "" if len(row.seeds) >= SEEDS_TO_GENERALIZE and agrees else "for these training runs"
