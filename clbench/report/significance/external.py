"""External test sets: is the order of strategies after the last step the same there?

Compared are the structures that an external test set annotates, internally on test cases of the
sources that taught them. A reversal is two claims, see `clbench.statistics.ranking.rank_reversals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.confirmatory import common_seeds
from clbench.report.study import Protocol
from clbench.statistics.class_macro import macro_mean, strata
from clbench.statistics.ranking import PairOfSets, RankReversals, rank_reversals
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalRanking:
    """Strategies after the last step on the internal and on one external test set."""

    eval_set: str
    """The external test set."""
    structures: tuple[str, ...]
    """Those it annotates: the only ones that count, on both sides."""
    labels: tuple[str, ...]
    """Strategies that take part; pairs of `reversals` are positions in it."""
    internal: tuple[float, ...]
    """Their means on test cases of the sources that taught the structures."""
    external: tuple[float, ...]
    """Their means on the external test set."""
    patients: tuple[int, int]
    """Patients with a score: internal, external."""
    seeds: tuple[int, ...]
    """Seeds that all of them have."""
    reversals: RankReversals
    """All pairs."""
    left_out: tuple[str, ...] = ()
    """Strategies that could not take part, and why."""
    beyond: tuple[str, ...] = ()
    """Strategies with seeds that others lack, and which these are."""

    @property
    def turned(self) -> tuple[PairOfSets, ...]:
        """Pairs in another order, the smallest p first."""
        return tuple(sorted((p for p in self.reversals.pairs if p.turns), key=lambda p: p.p))

    def shown(self, alpha: float) -> tuple[PairOfSets, ...]:
        """Pairs whose reversal is shown at a level."""
        return tuple(pair for pair in self.turned if pair.p <= alpha)

    def in_order(self, pair: PairOfSets) -> tuple[str, str]:
        """The two strategies of a pair, the one that is ahead internally first."""
        names = self.labels[pair.first], self.labels[pair.second]
        return names if pair.internal > 0 else names[::-1]


def external_ranking(internal: Scores, external: Scores, protocol: Protocol) -> ExternalRanking:
    """Hold the order of strategies on an external test set against the internal one.

    Args:
        internal: the runs on the course's own test cases.
        external: the same runs on an external test set, see `scores_of`.
        protocol: level and sign patterns.
    """
    at = dict.fromkeys(external.learned_at, external.last)
    there = {m.label: m for m in external.strategies}
    pairs: list[tuple[StrategyScores, StrategyScores]] = []
    left_out = []
    for inside in internal.strategies:
        outside = there[inside.label]
        why = inside.hole(at.items()) or outside.hole(at.items())
        if why:
            left_out.append(f"{inside.label}: {why}")
        else:
            pairs.append((inside, outside))
    seeds = common_seeds([inside for inside, _ in pairs]) if pairs else ()
    if pairs and not seeds:
        left_out.append("no seed is common to all strategies: nothing is compared")
        pairs = []
    sides: list[list[dict[str, Floats]]] = [
        [pair[side].table(at, seeds) for pair in pairs] for side in (0, 1)
    ]
    return ExternalRanking(
        eval_set=external.on,
        structures=tuple(at),
        labels=tuple(inside.label for inside, _ in pairs),
        internal=tuple(map(macro_mean, sides[0])),
        external=tuple(map(macro_mean, sides[1])),
        patients=(_patients(sides[0]), _patients(sides[1])),
        seeds=seeds,
        reversals=rank_reversals(
            *sides, alpha=protocol.alpha, draws=protocol.draws, seed=protocol.seed
        ),
        left_out=tuple(left_out),
        beyond=tuple(
            f"{inside.label} {', '.join(map(str, more))}"
            for inside, _ in pairs
            if (more := [s for s in inside.seeds if s not in seeds])
        ),
    )


def _patients(tables: list[dict[str, Floats]]) -> int:
    """Patients with a score; the same for every strategy that takes part."""
    first: Mapping[str, Floats] = tables[0] if tables else {}
    return sum(part.n for part in strata(first))
