"""Rankings of all strategies after the last step: average ranks, bars, and how stable they are.

A ranking needs the same patients and seeds for everyone: strategies with a
hole are left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.confirmatory import common_seeds
from clbench.report.significance.endpoints import FINAL, hole, table
from clbench.report.significance.exploratory import patient_macro
from clbench.report.study import Protocol
from clbench.statistics.bootstrap import Stability, ranking_stability
from clbench.statistics.ranking import Comparison as Ranking
from clbench.statistics.ranking import (
    Friedman,
    Ties,
    friedman,
    max_t_pairs,
    tie_groups,
    wilcoxon_holm,
)
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class SetRanking:
    """All strategies over the patients of one eval set, after the last step."""

    eval_set: str
    """Whose patients."""
    names: tuple[str, ...]
    """Strategies that take part."""
    n: int
    """Patients with a score of every strategy."""
    friedman: Friedman | None
    """Omnibus test; None for fewer than 3 strategies or 2 patients."""
    pairs: Ranking | None
    """Average ranks, and bars of the test of all pairs; None for fewer than 2 strategies or no
    patient."""
    left_out: tuple[str, ...] = ()
    """Strategies that do not, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stable:
    """How the ranking of the final endpoint moves when patients and seeds are resampled."""

    stability: Stability | None
    """The shares; None where fewer than two strategies can be ranked."""
    seeds: tuple[int, ...] = ()
    """Seeds that all have."""
    left_out: tuple[str, ...] = ()
    """Strategies that could not take part, and why."""


def rankable(
    scores: Scores,
) -> tuple[list[StrategyScores], tuple[int, ...], tuple[str, ...]]:
    """Strategies with a whole final endpoint, their common seeds, and the words for what lacks."""
    holes = {m.label: hole(scores, m, FINAL) for m in scores.strategies}
    methods = [m for m in scores.strategies if not holes[m.label]]
    seeds = common_seeds(methods) if methods else ()
    why = ("no seed is common to all strategies",) * (bool(methods) and not seeds)
    unfinished = (f"{name}: no finished run" for name in scores.never_finished)
    return methods, seeds, (*filter(None, holes.values()), *unfinished, *why)


def rankings(scores: Scores, protocol: Protocol) -> list[SetRanking]:
    """Friedman and the test of all pairs over the patients of each eval set."""
    methods, seeds, left_out = rankable(scores)
    if methods and not seeds:
        left_out = (*left_out[:-1], f"{left_out[-1]}: nothing is ranked")
    rows = []
    macro = {m.label: patient_macro(scores, m, FINAL, seeds) for m in methods} if seeds else {}
    for name in scores.homes:
        own = {label: by_name[name] for label, by_name in macro.items()}
        whole = np.column_stack(list(own.values())) if own else np.empty((0, 0))
        n = int((~np.isnan(whole).any(axis=1)).sum()) if own else 0
        rows.append(
            SetRanking(
                eval_set=name,
                names=tuple(own),
                n=n,
                friedman=friedman(whole) if len(own) >= 3 and n >= 2 else None,
                pairs=_all_pairs(own, protocol) if len(own) >= 2 and n >= 1 else None,
                left_out=left_out,
            )
        )
    return rows


def _all_pairs(own: Mapping[str, Floats], protocol: Protocol) -> Ranking:
    if protocol.correction == "holm":
        return wilcoxon_holm(own, alpha=protocol.alpha)
    return max_t_pairs(own, alpha=protocol.alpha, draws=protocol.draws, seed=protocol.seed)


def stable(scores: Scores, protocol: Protocol) -> Stable:
    """Ranking stability of the final endpoint."""
    methods, seeds, left_out = rankable(scores)
    if len(methods) < 2 or not seeds:
        return Stable(stability=None, seeds=seeds, left_out=left_out)
    tables: Mapping[str, Mapping[str, Floats]] = {
        m.label: table(scores, m, FINAL, seeds) for m in methods
    }
    return Stable(
        stability=ranking_stability(tables, seed=protocol.seed, draws=protocol.rank_resamples),
        seeds=seeds,
        left_out=left_out,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tied:
    """Which strategies the test of all pairs cannot tell apart, by the final endpoint."""

    ties: Ties | None
    """None where no strategy can be ranked."""
    labels: tuple[str, ...] = ()
    """Strategies that take part, the best first."""
    seeds: tuple[int, ...] = ()
    """Seeds that all of them have."""
    left_out: tuple[str, ...] = ()
    """Strategies that could not, and why."""

    def groups(self, label: str) -> str:
        """Letters of a strategy's groups; empty = it takes no part."""
        if self.ties is None or label not in self.labels:
            return ""
        return self.ties.letters(self.labels.index(label))

    def together(self, one: str, other: str) -> bool:
        """Whether two strategies share a group; never where one takes no part."""
        if self.ties is None or not {one, other} <= set(self.labels):
            return False
        return self.ties.together(self.labels.index(one), self.labels.index(other))

    def ranks(self, label: str) -> tuple[int, int] | None:
        """Best and worst rank that the tests leave open; None = it takes no part."""
        if self.ties is None or label not in self.labels:
            return None
        return self.ties.ranks[self.labels.index(label)]


def ties_of(tables: Sequence[Mapping[str, Floats]], protocol: Protocol) -> Ties:
    """Tie groups of strategies by their scores, tested as the protocol says."""
    return tie_groups(
        tables,
        alpha=protocol.alpha,
        correction=protocol.correction,
        draws=protocol.draws,
        seed=protocol.seed,
    )


def tied(scores: Scores, protocol: Protocol) -> Tied:
    """Tie groups of the final endpoint, over the seeds that all strategies have."""
    methods, seeds, left_out = rankable(scores)
    if not seeds:
        return Tied(ties=None, left_out=left_out)
    ties = ties_of([table(scores, m, FINAL, seeds) for m in methods], protocol)
    labels = tuple(methods[k].label for k in ties.order)
    return Tied(ties=ties, labels=labels, seeds=seeds, left_out=left_out)
