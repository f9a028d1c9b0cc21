"""Significance: the confirmatory analysis, the reference strategy against each other one.

One family per endpoint of `clbench.report.significance.endpoints`: step-down max-T over the other
strategies with joint sign flips of patients, at 0 and at both margins, and a simultaneous interval
that matches these tests (`clbench.statistics.max_t`). Seeds are averaged before a test: they are no
patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.endpoints import (
    ENDPOINTS,
    Endpoint,
    asked,
    hole,
    shared_first,
    structures_of,
    table,
    torn_first,
)
from clbench.report.study import Protocol
from clbench.statistics.bootstrap import seed_means
from clbench.statistics.class_macro import macro_mean, strata
from clbench.statistics.intervals import Interval, probability_of_improvement
from clbench.statistics.macro_estimate import (
    ONE_DECIDES,
    ONE_PATIENT,
    ONE_RUN,
    cells_of,
    estimate_of,
)
from clbench.statistics.max_t import Family, FamilyComparison, compare_family
from clbench.statistics.verdicts import Kind, Verdict
from clbench.types import Floats

HOLE = "hole"
"""The word of a comparison without a number."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A number that is tested in a family, or a hole."""

    hole: str = ""
    """Why there is no number; empty = there is."""
    seeds: tuple[int, ...] = ()
    """Training runs, paired where two strategies are compared."""
    patients: Mapping[str, int] = field(default_factory=dict)
    """Eval set → patients with at least one cell."""
    result: FamilyComparison | None = None
    """Difference or change, p-values, interval and verdict; None for a hole."""
    m: int = 0
    """Size of the family."""
    flipped: int = 0
    """Patients whose signs are flipped in the family."""
    cautions: tuple[str, ...] = ()
    """What a reader must know, in words."""

    @property
    def n(self) -> int:
        """Patients."""
        return sum(self.patients.values())

    @property
    def word(self) -> str:
        """The verdict's word, or `hole`."""
        return HOLE if self.result is None else self.result.verdict.word


@dataclass(frozen=True, kw_only=True)
class Comparison(Tested):
    """One endpoint, reference minus other."""

    endpoint: Endpoint
    """The question."""
    a: str
    """Reference."""
    b: str
    """The other."""
    classes: int = 0
    """Structures that count."""
    mean_a: float = math.nan
    """The reference's own value."""
    mean_b: float = math.nan
    """The other's."""
    seed_wins: Interval | None = None
    """Share of paired seeds in which the reference is ahead; None for one seed."""
    with_empty: float = math.nan
    """Difference with empty truths scored 1 or 0."""
    with_empty_p: float = math.nan
    """Uncorrected p of the same."""
    first_shared: bool = False
    """Both have one checkpoint after step 1."""

    @property
    def verdict(self) -> Verdict | None:
        """The word; None for a hole."""
        return None if self.result is None else self.result.verdict


def confirm(
    scores: Scores, protocol: Protocol, endpoints: Sequence[Endpoint] = ENDPOINTS
) -> list[Comparison]:
    """Every endpoint that the course has against every other strategy, in that order.

    Holes are included.

    Args:
        scores: the runs, the reference first.
        protocol: level, margin, correction and sign patterns.
        endpoints: which questions, the one after the last step first.
    """
    return [c for endpoint in asked(scores, endpoints) for c in _judge(scores, endpoint, protocol)]


def common_seeds(methods: Sequence[StrategyScores]) -> tuple[int, ...]:
    """Seeds that all of them have."""
    shared = set.intersection(*(set(m.seeds) for m in methods))
    return tuple(sorted(shared))


def family_of(
    tables: Sequence[Mapping[str, Floats]], protocol: Protocol, kind: Kind = "difference"
) -> Family:
    """Test some differences together, as the protocol says.

    Args:
        tables: differences per comparison: eval set → (seeds, patients, structures).
        protocol: level, margin, correction and sign patterns.
        kind: `difference` between strategies, or a strategy's own `change`.
    """
    return compare_family(
        tables,
        alpha=protocol.alpha,
        margin=protocol.margin,
        kind=kind,
        correction=protocol.correction,
        draws=protocol.draws,
        seed=protocol.seed,
    )


def _judge(scores: Scores, endpoint: Endpoint, protocol: Protocol) -> list[Comparison]:
    """The family of one endpoint; two strategies with one checkpoint are not tested."""
    rows = [_described(scores, endpoint, other, protocol) for other in scores.others]
    whole = [k for k, row in enumerate(rows) if not row.hole]
    if scores.last == 1:
        alike = [k for k in whole if rows[k].first_shared]
        whole = [k for k in whole if k not in alike]
        for k in alike:
            same = _difference(scores, endpoint, k, rows[k].seeds, with_empty=False)
            rows[k] = replace(rows[k], result=_one_checkpoint(same))
    tables, with_empty = (
        [_difference(scores, endpoint, k, rows[k].seeds, with_empty=empty) for k in whole]
        for empty in (False, True)
    )
    family = family_of(tables, protocol)
    differ = any(
        not np.array_equal(a[name], b[name], equal_nan=True)
        for a, b in zip(tables, with_empty, strict=True)
        for name in a
    )
    empty = family_of(with_empty, protocol) if differ else family
    rows = [replace(row, m=family.m, flipped=family.patients) for row in rows]
    for k, result, beside in zip(whole, family.comparisons, empty.comparisons, strict=True):
        rows[k] = replace(
            rows[k],
            result=result,
            with_empty=beside.mean.estimate,
            with_empty_p=beside.p_unadjusted,
            cautions=(
                *rows[k].cautions,
                *statistical_cautions(result),
                *("scoring empty truths 1 or 0 changes the result",)
                * (
                    (beside.p_unadjusted <= protocol.alpha)
                    != (result.p_unadjusted <= protocol.alpha)
                ),
            ),
        )
    return rows


def _one_checkpoint(same: Mapping[str, Floats]) -> FamilyComparison:
    """The result of a strategy beside another one whose model it shares.

    Args:
        same: differences, all 0: eval set → (seeds, patients, structures).
    """
    mean = estimate_of(cells_of(same))
    return FamilyComparison(
        mean=mean, ahead=(0, mean.n, math.nan, math.nan), verdict=Verdict(word="shared")
    )


def statistical_cautions(result: FamilyComparison) -> tuple[str, ...]:
    """What a reader must know about the numbers, in words."""
    mean = result.mean
    return (
        *((ONE_RUN,) if mean.n_seeds == 1 else ()),
        *((f"{ONE_PATIENT}, and there is no interval",) if mean.single else ()),
        *((ONE_DECIDES,) if mean.largest_share > 0.5 else ()),
    )


def _difference(
    scores: Scores, endpoint: Endpoint, k: int, seeds: tuple[int, ...], *, with_empty: bool
) -> dict[str, Floats]:
    """Reference minus the k-th other: eval set → (seeds, patients, structures)."""
    a, b = (
        table(scores, m, endpoint, seeds, with_empty=with_empty)
        for m in (scores.reference, scores.others[k])
    )
    return {name: a[name] - b[name] for name in a}


def _described(
    scores: Scores, endpoint: Endpoint, other: StrategyScores, protocol: Protocol
) -> Comparison:
    """A comparison without its tests; or the hole in it."""
    ref = scores.reference
    seeds = common_seeds([ref, other])
    start = Comparison(endpoint=endpoint, a=ref.label, b=other.label, seeds=seeds)
    missing = [w for w in (hole(scores, m, endpoint) for m in (ref, other)) if w]
    if missing:
        return replace(start, hole=missing[0])
    if not seeds:
        return replace(start, hole=f"{ref.label} and {other.label} have no seed in common")
    a, b = (table(scores, m, endpoint, seeds) for m in (ref, other))
    left_out = sorted({*ref.seeds, *other.seeds} - {*seeds})
    return replace(
        start,
        patients={part.name: part.n for part in strata({name: a[name] - b[name] for name in a})},
        classes=len(structures_of(scores, endpoint)),
        mean_a=macro_mean(a),
        mean_b=macro_mean(b),
        seed_wins=probability_of_improvement(seed_means(a), seed_means(b), level=protocol.level)
        if len(seeds) > 1
        else None,
        first_shared=shared_first(ref, other, seeds),
        cautions=(
            *((f"seeds without a partner left out: {left_out}",) if left_out else ()),
            *(
                f"one checkpoint of step 1 is named, but the scores after it differ (seed {s})"
                for s in torn_first(ref, other, seeds)
            ),
        ),
    )
