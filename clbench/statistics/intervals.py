"""How sure we are: confidence intervals of paired differences and of proportions over patients.

Intervals that cannot exist at a given n are nan
with a flag that says so, never a narrower promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from clbench.errors import DataError, SettingError
from clbench.statistics.paired_tests import DECIMALS, existing, midranks, signed_rank_null

_EXACT_UP_TO = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float = math.nan
    """The value estimated; nan without data."""
    low: float = math.nan
    """Lower end; nan where no interval of this level exists."""
    high: float = math.nan
    """Upper end."""
    n: int = 0
    """Units it rests on (patients unless the function says otherwise)."""
    coverage: float | None = None
    """Confidence actually guaranteed where it is a step function of n, or None."""
    flags: tuple[str, ...] = ()
    """What a reader must know, in words."""


def percent(level: float) -> str:
    """A confidence in words, not rounded to another one.

    Example:
        >>> from clbench.statistics.intervals import percent
        >>> percent(0.95), percent(0.975), percent(0.999)
        ('95 %', '97.5 %', '99.9 %')
    """
    return f"{100 * level:.6g} %"


def hodges_lehmann(differences: ArrayLike, *, level: float = 0.95) -> Interval:
    """Hodges-Lehmann pseudomedian with the exact interval that belongs to the Wilcoxon test.

    The median of all averages of two differences (each with itself too). The interval runs between
    two of these averages; `coverage` is its true confidence, at least `level`. With ties the
    coverage is a lower bound.

    Args:
        differences: (n,) A minus B, rounded to 6 decimals here.
        level: confidence asked for.

    Raises:
        SettingError: the level is not between 0 and 1.

    Example:
        >>> from clbench.statistics.intervals import hodges_lehmann
        >>> interval = hodges_lehmann([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        >>> round(interval.estimate, 4), interval.low, interval.high, interval.coverage
        (0.35, 0.1, 0.6, 0.96875)
        >>> hodges_lehmann([0.1, 0.2, 0.3]).flags
        ('no 95 % interval exists at n = 3 (at most 75 %)',)

    Source: Hodges & Lehmann 1963; equals R's `wilcox.test(conf.int=TRUE, exact=TRUE)`.
    """
    _check_level(level)
    values = np.round(existing(differences), DECIMALS)
    n = values.size
    first, second = np.triu_indices(n)
    walsh = np.sort((values[first] + values[second]) / 2)
    estimate = float(np.median(walsh)) if n else math.nan
    if n <= _EXACT_UP_TO:
        below = np.cumsum(signed_rank_null(np.arange(1.0, n + 1)))[::2]  # whole sums only
        k = int(np.searchsorted(below, (1 - level) / 2 * (1 + 1e-12), side="right"))
        coverage: float | None = 1 - 2 * float(below[k - 1]) if k else None
    else:
        spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        k = math.floor(n * (n + 1) / 4 - _normal_quantile((1 + level) / 2) * spread)
        coverage = level
    if k == 0:
        best = max(0.0, 1 - 2.0 ** (1 - n))
        flag = f"no {percent(level)} interval exists at n = {n} (at most {percent(best)})"
        return Interval(estimate=estimate, n=n, coverage=best, flags=(flag,))
    return Interval(
        estimate=estimate, low=float(walsh[k - 1]), high=float(walsh[-k]), n=n, coverage=coverage
    )


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean with Student's t interval; nan ends below two values.

    Args:
        values: (n,) paired differences over patients, or one mean per seed.
        level: confidence asked for.

    Example:
        >>> from clbench.statistics.intervals import t_interval
        >>> interval = t_interval([1.0, 2.0, 3.0])  # 2 ± 4.302653 / sqrt(3)
        >>> interval.estimate, round(interval.low, 4), round(interval.high, 4)
        (2.0, -0.4841, 4.4841)

    Source: scipy.special.stdtrit (quantile of t with n - 1 degrees of freedom).
    Differs: not from `ttest_1samp(...).confidence_interval`, which warns of a loss of precision
        where all values are equal.
    """
    _check_level(level)
    sample = existing(values)
    n = sample.size
    estimate = float(sample.mean()) if n else math.nan
    if n < 2:
        return Interval(estimate=estimate, n=n, flags=("fewer than two values: no interval",))
    from scipy import special

    error = float(sample.std(ddof=1)) / math.sqrt(n)
    reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach, n=n)


def wilson(k: float, n: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion k/n; inside [0, 1] even at 0 of n and n of n.

    Args:
        k: successes; halves are allowed for ties.
        n: patients (or seeds).
        level: confidence asked for.

    Raises:
        DataError: k outside 0..n.

    Example:
        >>> from clbench.statistics.intervals import wilson
        >>> interval = wilson(5, 5)
        >>> interval.estimate, round(interval.low, 4), interval.high
        (1.0, 0.5655, 1.0)
        >>> interval = wilson(2.5, 5)  # a tie counts half
        >>> round(interval.low, 4), round(interval.high, 4)
        (0.1704, 0.8296)

    Source: Wilson 1927; equals scipy's `binomtest(...).proportion_ci(method="wilson")`, which
        refuses half counts.
    """
    _check_level(level)
    if not 0 <= k <= n:
        raise DataError("a proportion needs 0 <= k <= n", expected=f"k in 0..{n}", got=k)
    if n == 0:
        return Interval(flags=("no patients",))
    z = _normal_quantile((1 + level) / 2)
    share = k / n
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(
        estimate=share,
        low=0.0 if k == 0 else max(0.0, center - reach),
        high=1.0 if k == n else min(1.0, center + reach),
        n=n,
    )


def probability_of_improvement(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Share of paired seeds in which A beats B, ties half; `n` counts seeds.

    Args:
        a: (seeds,) one score per training run of A.
        b: (seeds,) the same runs of B.
        level: confidence asked for.

    Raises:
        DataError: the lists differ in length.

    Example:
        >>> from clbench.statistics.intervals import probability_of_improvement
        >>> interval = probability_of_improvement([0.5, 0.7, 0.6, 0.8], [0.4, 0.6, 0.6, 0.9])
        >>> interval.estimate, interval.n  # two wins and half a tie of four seeds
        (0.625, 4)

    Source: Bouthillier et al. 2021 (P(A > B), meaningful above 0.75).
    Differs: a Wilson interval instead of a bootstrap over seeds, because 5 wins of 5 would give the
        bootstrap the interval [1, 1].
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise DataError("seeds must be paired", expected=first.shape, got=second.shape)
    d = np.round(existing(first - second), DECIMALS)
    return wilson(float((d > 0).sum() + (d == 0).sum() / 2), d.size, level=level)


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise SettingError("no such confidence", expected="0 < level < 1", got=level)


# --------------------------------------------------------------------------------------------------
# How large a difference is: effect sizes, and the smallest effect a sample can find.


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), in [-1, 1]; 0 if all equal.

    Zeros are dropped, as in the Wilcoxon test. nan without pairs.

    Example:
        >>> from clbench.statistics.intervals import rank_biserial
        >>> round(rank_biserial([0.1, 0.2, -0.3]), 4)  # (1 + 2 - 3) / 6
        0.0
        >>> round(rank_biserial([0.2, 0.3, -0.1]), 4)  # (2 + 3 - 1) / 6
        0.6667

    Source: Kerby 2014; pingouin's `RBC`.
    """
    values = np.round(existing(differences), DECIMALS)
    if values.size == 0:
        return math.nan
    values = values[values != 0]
    if values.size == 0:
        return 0.0
    ranks = midranks(np.abs(values))
    return float((np.sign(values) * ranks).sum() / ranks.sum())


def cohen_dz(differences: ArrayLike) -> float:
    """Mean difference in units of its own standard deviation (n - 1); nan if that is 0.

    Example:
        >>> from clbench.statistics.intervals import cohen_dz
        >>> cohen_dz([1.0, 2.0, 3.0])  # mean 2, standard deviation 1
        2.0

    Source: Cohen 1988, paired form.
    Differs: pingouin's paired `cohen_d` divides by the spread of the scores instead.
    """
    values = existing(differences)
    if values.size < 2:
        return math.nan
    sd = float(values.std(ddof=1))
    return float(values.mean()) / sd if sd > 1e-12 else math.nan


def detectable_effect(n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest dz a two-sided paired t-test finds with this power; times the SD gives Dice.

    Args:
        n: patients.
        alpha: level, already divided by the family's size if Holm's first step is meant.
        power: chance to find the effect.

    Returns:
        dz; nan for n below 2.

    Raises:
        SettingError: not 0 < alpha < power < 1.

    Example:
        >>> from clbench.statistics.intervals import detectable_effect
        >>> round(detectable_effect(34), 3)  # 34 patients find half a standard deviation
        0.495

    Source: noncentral t (scipy.special.nctdtr), as G*Power and statsmodels' `TTestPower`.
    """
    if not (0 < alpha < power < 1):
        raise SettingError("no such power", expected="0 < alpha < power < 1", got=(alpha, power))
    if n < 2:
        return math.nan
    from scipy import special

    limit = float(special.stdtrit(n - 1, 1 - alpha / 2))

    def shortfall(dz: float) -> float:
        shift = dz * math.sqrt(n)
        wrong_side = float(special.nctdtr(n - 1, shift, -limit))
        # scipy gives nan where the tail beyond the wrong limit is too small to compute.
        missed = float(special.nctdtr(n - 1, shift, limit))
        return 1 - missed + (0.0 if math.isnan(wrong_side) else wrong_side) - power

    low, high = 0.0, 0.125
    while shortfall(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):  # bisection to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if shortfall(middle) < 0 else (low, middle)
    return high
