"""What a family of tests may claim: Holm, Benjamini-Hochberg, attainable p, and the verdict.

A p of nan is a comparison that could not be tested: it leaves the family, and
the family's size says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.errors import DataError
from clbench.statistics.paired_tests import smallest_sign_p
from clbench.types import Floats

Word = Literal["better", "worse", "equivalent", "inconclusive", "not testable", "shared"]
SEEDS_TO_GENERALIZE = 5  # with fewer, a seed effect alone can produce the verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """P-values corrected together."""

    adjusted: Floats
    """Corrected p-values in the order given; nan where nothing was tested."""
    m: int
    """Size of the family actually used: the p-values that are not nan."""
    untested: int
    """Comparisons left out because their p is nan."""
    method: Literal["holm", "benjamini-hochberg"]
    """The correction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One comparison in words."""

    word: Word
    """`better`, `worse`, `equivalent`, `inconclusive`, `not testable` or `shared`."""
    scope: str
    """`for these training runs` where the seeds do not support more; else empty."""
    reason: str
    """The numbers that decided, as a clause."""


def holm(p_values: ArrayLike) -> Family:
    """Holm's step-down correction: controls the chance of a single false claim in the family.

    Example:
        >>> from clbench.statistics.corrections import holm
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03]).adjusted.tolist()]  # 3 · 0.01, 2 · 0.03
        [0.03, 0.06, 0.06]

    Source: Holm 1979; equals statsmodels' `multipletests(method="holm")`.
    """
    p, tested = _checked(p_values)
    order, m = np.argsort(p[tested], kind="stable"), int(tested.sum())
    adjusted = np.empty(m)
    adjusted[order] = np.maximum.accumulate((m - np.arange(m)) * p[tested][order])
    return _family(p, tested, np.minimum(adjusted, 1.0), "holm")


def benjamini_hochberg(p_values: ArrayLike) -> Family:
    """Benjamini-Hochberg: controls the expected share of false claims; for exploratory tables.

    Example:
        >>> from clbench.statistics.corrections import benjamini_hochberg
        >>> [round(p, 6) for p in benjamini_hochberg([0.01, 0.04, 0.03]).adjusted.tolist()]
        [0.03, 0.04, 0.04]

    Source: Benjamini & Hochberg 1995, by `scipy.stats.false_discovery_control`.
    """
    from scipy import stats as scipy_stats

    p, tested = _checked(p_values)
    adjusted = scipy_stats.false_discovery_control(p[tested], method="bh")
    return _family(p, tested, adjusted, "benjamini-hochberg")


def largest_family(n_nonzero: int, alpha: float = 0.05) -> int:
    """How many comparisons a Holm family may hold before n pairs cannot reach alpha.

    Example:
        >>> from clbench.statistics.corrections import largest_family
        >>> largest_family(6), largest_family(10)  # 0.05 · 2^5 and 0.05 · 2^9, rounded down
        (1, 25)

    Source: the first Holm step needs m * 2^(1-n) <= alpha.
    """
    return math.floor(alpha / smallest_sign_p(n_nonzero))


def pairs_needed(m: int, alpha: float = 0.05) -> int:
    """Nonzero pairs needed so that a family of m comparisons can reach alpha at Holm's first step.

    Raises:
        DataError: m below 1.

    Example:
        >>> from clbench.statistics.corrections import pairs_needed
        >>> pairs_needed(1), pairs_needed(3)
        (6, 7)
    """
    if m < 1:
        raise DataError("a family holds at least one comparison", expected="m >= 1", got=m)
    n = 0
    while m * smallest_sign_p(n) > alpha:
        n += 1
    return n


def verdict(
    *,
    estimate: float,
    p_adjusted: float,
    smallest_p: float,
    m: int,
    alpha: float = 0.05,
    p_equivalent: float = math.nan,
    shared: bool = False,
    n_seeds: int = 1,
    seed_interval: tuple[float, float] | None = None,
) -> Verdict:
    """The word for one comparison of a family.

    Order: the same checkpoint is `shared` and never tested; a test whose smallest p times m exceeds
    alpha is `not testable`, never "not significant"; then better or worse; then equivalent; else
    inconclusive. The scope stays "for these training runs" unless there are at least 5 seeds and
    the interval over paired seeds lies on the same side of 0.

    Args:
        estimate: A minus B; its sign decides between better and worse.
        p_adjusted: corrected two-sided p; nan = not tested.
        smallest_p: the smallest p the test could give, before correction.
        m: size of the family.
        alpha: level.
        p_equivalent: p of the equivalence test with its declared margin; nan = none made.
        shared: both strategies have one checkpoint here.
        n_seeds: paired training runs.
        seed_interval: interval of the mean difference over paired seeds, if any.

    Example:
        >>> from clbench.statistics.corrections import verdict
        >>> verdict(estimate=0.03, p_adjusted=0.01, smallest_p=0.001, m=3)
        Verdict(word='better', scope='for these training runs', reason='adjusted p 0.01, m = 3')
        >>> verdict(estimate=0.03, p_adjusted=0.1, smallest_p=0.06, m=3).word
        'not testable'

    Source: this project's protocol.
    """
    if shared:
        return Verdict(word="shared", scope="", reason="one checkpoint serves both strategies")
    if math.isnan(p_adjusted):
        return Verdict(word="not testable", scope="", reason="no pairs to test")
    if smallest_p * m > alpha:
        reason = f"smallest attainable p {smallest_p:.2g}, {m} comparisons, alpha {alpha:g}"
        return Verdict(word="not testable", scope="", reason=reason)
    low, high = seed_interval or (-math.inf, math.inf)
    settled = n_seeds >= SEEDS_TO_GENERALIZE and (low > 0 if estimate > 0 else high < 0)
    scope = "" if settled else "for these training runs"
    if p_adjusted <= alpha and estimate != 0:
        word: Word = "better" if estimate > 0 else "worse"
        return Verdict(word=word, scope=scope, reason=f"adjusted p {p_adjusted:.2g}, m = {m}")
    if p_equivalent <= alpha:
        # Equal is a claim about a margin, not about a side of 0: the seeds cannot settle it here.
        return Verdict(
            word="equivalent",
            scope="for these training runs",
            reason=f"equivalence p {p_equivalent:.2g}",
        )
    return Verdict(
        word="inconclusive",
        scope="for these training runs",
        reason=f"adjusted p {p_adjusted:.2g}, m = {m}",
    )


def _checked(p_values: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    p = np.asarray(p_values, dtype=np.float64)
    tested = ~np.isnan(p)
    if p.ndim != 1 or np.any((p[tested] < 0) | (p[tested] > 1)):
        raise DataError(
            "these are not p-values", expected="one list of numbers in [0, 1] or nan", got=p
        )
    return p, tested


def _family(
    p: Floats,
    tested: NDArray[np.bool_],
    adjusted: Floats,
    method: Literal["holm", "benjamini-hochberg"],
) -> Family:
    """Put the corrected values back to where the comparisons stood; nan for the others."""
    placed = np.full(p.size, np.nan)
    placed[tested] = adjusted
    m = int(tested.sum())
    return Family(adjusted=placed, m=m, untested=p.size - m, method=method)
