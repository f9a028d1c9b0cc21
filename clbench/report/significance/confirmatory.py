"""Significance: the confirmatory analysis, the reference strategy against each other one.

Per endpoint of `clbench.report.significance.endpoints`: a stratified sign-flip
permutation test over patients, Holm's correction over the other strategies, a crossed bootstrap
interval over seeds and patients, an equivalence test with a declared margin, and the smallest
difference the sample could have shown. Seeds are averaged before a test: they are no patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clbench.report.scores import Scores, StrategyScores
from clbench.report.significance.endpoints import (
    ENDPOINTS,
    Endpoint,
    hole,
    shared_first,
    table,
    terms,
    torn_first,
)
from clbench.report.study import Protocol
from clbench.statistics.bootstrap import crossed_interval, seed_means
from clbench.statistics.class_macro import (
    equivalence_flip,
    macro_mean,
    per_patient_weights,
    sign_flip,
    strata,
)
from clbench.statistics.corrections import Verdict, holm, verdict
from clbench.statistics.equivalence import Equivalence
from clbench.statistics.intervals import (
    Interval,
    detectable_effect,
    probability_of_improvement,
    t_interval,
)
from clbench.statistics.paired_tests import PairedTest
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One endpoint, reference minus other."""

    endpoint: Endpoint
    """The question."""
    a: str
    """Reference."""
    b: str
    """The other."""
    hole: str = ""
    """Why there is no number; empty = there is."""
    seeds: tuple[int, ...] = ()
    """Paired training runs."""
    patients: Mapping[str, int] | None = None
    """Eval set → patients with at least one cell."""
    classes: int = 0
    """Structures that count."""
    classes_absent: tuple[str, ...] = ()
    """Structures without a single valid cell."""
    mean_a: float = math.nan
    """The reference's own value."""
    mean_b: float = math.nan
    """The other's."""
    interval: Interval | None = None
    """Difference with its crossed bootstrap interval."""
    test: PairedTest | None = None
    """Sign-flip test."""
    p_holm: float = math.nan
    """Corrected over the family."""
    m: int = 0
    """Size of the family."""
    equivalence: Equivalence | None = None
    """Two one-sided sign-flip tests at the declared margin."""
    p_equivalent: float = math.nan
    """Its p, Holm-corrected over the family."""
    over_seeds: Interval | None = None
    """Mean difference over paired seeds, t interval; None for one seed."""
    seed_wins: Interval | None = None
    """Share of paired seeds in which the reference is ahead."""
    detectable: float = math.nan
    """Smallest difference found with power 0.8 at alpha / m, Dice."""
    with_empty: float = math.nan
    """Difference with empty truths scored 1 or 0."""
    with_empty_p: float = math.nan
    """Uncorrected p of the same."""
    verdict: Verdict | None = None
    """The word."""
    first_shared: bool = False
    """Both have one checkpoint after step 1."""
    cautions: tuple[str, ...] = ()
    """What a reader must know, in words."""

    @property
    def n(self) -> int:
        """Patients."""
        return sum((self.patients or {}).values())


def confirm(scores: Scores, protocol: Protocol) -> list[Comparison]:
    """Every endpoint against every other strategy, in that order; holes included."""
    found = []
    for endpoint in ENDPOINTS:
        if endpoint is not ENDPOINTS[0] and scores.last < 2:
            continue
        family = [_compare(scores, endpoint, other, protocol) for other in scores.others]
        found += _judge(family, protocol)
    return found


def common_seeds(methods: Sequence[StrategyScores]) -> tuple[int, ...]:
    """Seeds that all of them have."""
    shared = set.intersection(*(set(m.seeds) for m in methods))
    return tuple(sorted(shared))


def _compare(
    scores: Scores, endpoint: Endpoint, other: StrategyScores, protocol: Protocol
) -> Comparison:
    ref = scores.reference
    seeds = common_seeds([ref, other])
    start = Comparison(endpoint=endpoint, a=ref.label, b=other.label, seeds=seeds)
    missing = [w for w in (hole(scores, m, endpoint) for m in (ref, other)) if w]
    if missing:
        return replace(start, hole=missing[0])
    if not seeds:
        return replace(start, hole=f"{ref.label} and {other.label} have no seed in common")
    a, b = (table(scores, m, endpoint, seeds) for m in (ref, other))
    difference = {name: a[name] - b[name] for name in a}
    test = sign_flip(difference, seed=protocol.seed, draws=protocol.draws, alpha=protocol.alpha)
    interval = crossed_interval(
        difference, seed=protocol.seed, draws=protocol.resamples, level=protocol.level
    )
    equal = equivalence_flip(
        difference, low=-protocol.margin, high=protocol.margin, seed=protocol.seed,
        draws=protocol.draws,
    )  # fmt: skip
    ea, eb = (table(scores, m, endpoint, seeds, with_empty=True) for m in (ref, other))
    empty = sign_flip(
        {name: ea[name] - eb[name] for name in ea}, seed=protocol.seed, draws=protocol.draws,
        alpha=protocol.alpha,
    )  # fmt: skip
    per_seed = [seed_means(x) for x in (a, b)]
    first = shared_first(ref, other, seeds)
    absent = [c for c in _classes(scores, endpoint) if _is_absent(scores, ref, c)]
    left_out = sorted({*ref.seeds, *other.seeds} - {*seeds})
    return replace(
        start,
        patients={part.name: part.n for part in strata(difference)},
        classes=len(_classes(scores, endpoint)) - len(absent),
        classes_absent=tuple(absent),
        mean_a=macro_mean(a),
        mean_b=macro_mean(b),
        interval=interval,
        test=test,
        equivalence=equal,
        over_seeds=t_interval(per_seed[0] - per_seed[1], level=protocol.level)
        if len(seeds) > 1
        else None,
        seed_wins=probability_of_improvement(*per_seed, level=protocol.level)
        if len(seeds) > 1
        else None,
        with_empty=empty.statistic,
        with_empty_p=empty.p,
        first_shared=first,
        detectable=detectable_difference(
            difference, alpha=protocol.alpha / max(1, len(scores.others))
        ),
        cautions=(
            *interval.flags,
            *test.flags,
            *((f"seeds without a partner left out: {left_out}",) if left_out else ()),
            *(
                f"one checkpoint of step 1 is named, but the scores after it differ (seed {s})"
                for s in torn_first(ref, other, seeds)
            ),
        ),
    )


def _judge(family: Sequence[Comparison], protocol: Protocol) -> list[Comparison]:
    """Correct a family and give each member its word."""
    adjusted = holm([math.nan if c.test is None else c.test.p for c in family])
    equal = holm([math.nan if c.equivalence is None else c.equivalence.p for c in family])
    judged = []
    for c, p, p_equal in zip(family, adjusted.adjusted, equal.adjusted, strict=True):
        if c.test is None or c.interval is None:
            judged.append(replace(c, m=adjusted.m))
            continue
        word = verdict(
            estimate=c.interval.estimate,
            p_adjusted=float(p),
            smallest_p=c.test.smallest_p,
            m=adjusted.m,
            alpha=protocol.alpha,
            p_equivalent=float(p_equal),
            n_seeds=len(c.seeds),
            seed_interval=None if c.over_seeds is None else (c.over_seeds.low, c.over_seeds.high),
        )
        judged.append(
            replace(
                c, p_holm=float(p), p_equivalent=float(p_equal), m=adjusted.m, verdict=word,
                cautions=(*c.cautions, *_contradictions(c, float(p), word, protocol)),
            )
        )  # fmt: skip
    return judged


def _contradictions(c: Comparison, p: float, word: Verdict, protocol: Protocol) -> list[str]:
    """Where a second way to look at the same numbers says something else."""
    assert c.interval is not None  # noqa: S101  # for the type checker: judged ones have numbers
    assert c.test is not None  # noqa: S101
    found, alpha = [], protocol.alpha
    covers_zero = c.interval.low <= 0 <= c.interval.high
    if not math.isnan(c.interval.low) and covers_zero == (c.test.p <= alpha):
        found.append(
            "the interval over seeds and patients "
            + ("covers 0, the test over patients rejects 0" if covers_zero else
               "leaves 0 out, the test over patients does not reject 0")
        )  # fmt: skip
    if (c.with_empty_p <= alpha) != (c.test.p <= alpha):
        found.append("scoring empty truths 1 or 0 changes the result")
    if p <= alpha and c.over_seeds is not None and not math.isnan(c.over_seeds.low):
        low, high = c.over_seeds.low, c.over_seeds.high
        if low <= 0 <= high:
            found.append("the interval over paired training runs covers 0")
    outermost = max(-c.interval.low, c.interval.high)
    if word.word == "equivalent" and outermost >= protocol.margin:
        found.append("the interval over seeds and patients reaches beyond the margin")
    return found


def _classes(scores: Scores, endpoint: Endpoint) -> list[str]:
    return list(terms(endpoint, scores.learned_at, scores.last))


def _is_absent(scores: Scores, method: StrategyScores, structure: str) -> bool:
    cells = method.cells[scores.last, scores.home(structure), structure]
    return bool(np.isnan(cells.values).all())


def detectable_difference(
    difference: Mapping[str, Floats], *, alpha: float, power: float = 0.8
) -> float:
    """Smallest class-macro difference the sample finds with this power, in Dice; approximate.

    The standard error of the stratified mean takes the place of SD/sqrt(n), and one degree of
    freedom is paid per further eval set. nan where a set has fewer than two patients.

    Args:
        difference: eval set → (seeds, patients, classes), A minus B in Dice; nan = no such cell.
        alpha: level, already divided by the family's size if Holm's first step is meant.
        power: chance to find the difference.

    Source: noncentral t, as `clbench.statistics.intervals.detectable_effect`.
    """
    parts = strata(difference)
    weights, start, variance = per_patient_weights(parts), 0, 0.0
    for part in parts:
        if part.n == 0:
            continue
        own = weights[start : start + part.n]
        start += part.n
        if part.n < 2:
            return math.nan
        variance += part.n * float(own.var(ddof=1))
    n = weights.size - sum(part.n > 0 for part in parts) + 1
    return (
        detectable_effect(n, alpha=alpha, power=power) * math.sqrt(variance * n) if n else math.nan
    )
