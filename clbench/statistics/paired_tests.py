"""Tests on one list of paired differences: is strategy A above strategy B over the same patients?

A difference is A minus B, one per patient; nan means the pair does not exist and is left out. Every
result says which null distribution it used and the smallest p its n can reach at all. Corrections
for many tests are in `corrections`, effect sizes and intervals in `intervals`, equality in
`equivalence`, the class-macro endpoint in `class_macro`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from clbench.errors import DataError
from clbench.types import Floats

Method = Literal["exact", "permutation", "normal", "t", "none"]

DECIMALS = 6  # .9-.8 and .8-.7 differ in floats; ranks need them equal
_EXACT_UP_TO = 200  # above, the normal curve equals the exact p to four digits


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """What a paired test found, and what it could have found."""

    test: str
    """The test's name."""
    statistic: float
    """The value tested; each test's docstring says which one."""
    p: float
    """Two-sided p-value; nan where nothing can be tested."""
    p_greater: float
    """One-sided p-value of "the differences lie above 0"."""
    p_less: float
    """One-sided p-value of "the differences lie below 0"."""
    n: int
    """Pairs that exist."""
    n_nonzero: int
    """Pairs that differ; this n sets the attainable p of the rank and sign tests."""
    method: Method
    """The null distribution used: `exact` (no ties), `permutation` (all sign patterns of the values
    as they are), `normal`, `t`, or `none`."""
    smallest_p: float
    """The smallest two-sided p that this n and method can give; 0 where there is no bound."""


def existing(differences: ArrayLike) -> Floats:
    """The differences that exist, as a vector.

    Raises:
        DataError: not one-dimensional, or an infinite value.

    Example:
        >>> from clbench.statistics.paired_tests import existing
        >>> existing([0.1, float("nan"), -0.2]).tolist()
        [0.1, -0.2]
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(
            "paired differences must be one list", expected="shape (patients,)", got=values.shape
        )
    if np.isinf(values).any():
        raise DataError(
            "a difference is infinite",
            expected="finite numbers, or nan for a pair that does not exist",
            got=values[np.isinf(values)][0],
            next_step="score missed structures with a finite worst value before testing",
        )
    return values[~np.isnan(values)]


def smallest_sign_p(n_nonzero: int) -> float:
    """2^(1-n): the smallest two-sided p of a test over the 2^n sign patterns; 1 for n = 0.

    Example:
        >>> from clbench.statistics.paired_tests import smallest_sign_p
        >>> smallest_sign_p(0), smallest_sign_p(5), smallest_sign_p(6)
        (1.0, 0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - n_nonzero))


def midranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing the mean of their ranks.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.paired_tests import midranks
        >>> midranks(np.array([0.3, 0.1, 0.3])).tolist()
        [2.5, 1.0, 2.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse.ravel()], dtype=np.float64)


def signed_rank_null(ranks: Floats) -> Floats:
    """The exact null distribution of a signed-rank sum.

    Every rank joins the sum with probability 1/2. Ranks may be halves, hence the doubled sum.

    Args:
        ranks: (n,) midranks.

    Returns:
        Probabilities; entry s belongs to the sum s/2.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.paired_tests import signed_rank_null
        >>> signed_rank_null(np.array([1.0, 2.0])).tolist()  # sums 0, 1, 2 and 3, each with 1/4
        [0.25, 0.0, 0.25, 0.0, 0.25, 0.0, 0.25]
    """
    doubled = np.rint(2 * ranks).astype(np.int64)
    probability = np.zeros(int(doubled.sum()) + 1)
    probability[0], reach = 1.0, 0
    for step in doubled:
        joined = np.zeros(reach + int(step) + 1)
        joined[: reach + 1] = probability[: reach + 1]
        joined[int(step) :] += probability[: reach + 1]
        reach += int(step)
        probability[: reach + 1] = joined / 2
    return probability


def wilcoxon(differences: ArrayLike) -> PairedTest:
    """Wilcoxon signed-rank test; `statistic` is W+, the rank sum of the positive differences.

    Differences are rounded to 6 decimals before ranking, zeros dropped. The null holds every sign
    pattern of the midranks at hand, so p is exact with ties and zeros too, up to 200 nonzero pairs.

    Example:
        >>> from clbench.statistics.paired_tests import wilcoxon
        >>> test = wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5, -0.6])
        >>> test.statistic, test.p, test.method  # W+ = 1 + 2 + 3 + 4 + 5
        (15.0, 0.4375, 'exact')

    Source: Wilcoxon 1945; exact null by convolution.
    Differs: scipy's `auto` turns normal for n > 13 as soon as a tie or a zero exists, and its
        `exact` ignores ties; scipy's two-sided statistic is the smaller rank sum.
    """
    values = np.round(existing(differences), DECIMALS)
    nonzero = values[values != 0]
    smallest = smallest_sign_p(nonzero.size)
    if nonzero.size == 0:
        return _nothing("wilcoxon", values.size)
    ranks = midranks(np.abs(nonzero))
    w_plus = float(ranks[nonzero > 0].sum())
    if nonzero.size <= _EXACT_UP_TO:
        null = signed_rank_null(ranks)
        at = round(2 * w_plus)
        p_less, p_greater = float(null[: at + 1].sum()), float(null[at:].sum())
        tied = nonzero.size < values.size or np.unique(np.abs(nonzero)).size < nonzero.size
        method: Method = "permutation" if tied else "exact"
    else:
        z = (w_plus - ranks.sum() / 2) / math.sqrt(float((ranks**2).sum()) / 4)
        p_less, p_greater = math.erfc(-z / math.sqrt(2)) / 2, math.erfc(z / math.sqrt(2)) / 2
        method, smallest = "normal", 0.0
    return PairedTest(
        test="wilcoxon",
        statistic=w_plus,
        p=min(1.0, 2 * min(p_less, p_greater)),
        p_greater=min(1.0, p_greater),
        p_less=min(1.0, p_less),
        n=values.size,
        n_nonzero=nonzero.size,
        method=method,
        smallest_p=smallest,
    )


def sign_test(differences: ArrayLike) -> PairedTest:
    """Exact sign test; `statistic` is the number of positive differences, zeros dropped.

    Example:
        >>> from clbench.statistics.paired_tests import sign_test
        >>> test = sign_test([0.1, 0.2, 0.3, 0.4, -0.1, 0.0])
        >>> test.statistic, test.p, test.n_nonzero  # 2 · (5 + 1) / 2^5
        (4.0, 0.375, 5)

    Source: Dixon & Mood 1946; equals `scipy.stats.binomtest` with probability 1/2.
    """
    values = np.round(existing(differences), DECIMALS)
    plus, minus = int((values > 0).sum()), int((values < 0).sum())
    if plus + minus == 0:
        return _nothing("sign test", values.size)
    from scipy import special

    p_greater, p_less = (float(special.bdtrc(k - 1, plus + minus, 0.5)) for k in (plus, minus))
    return PairedTest(
        test="sign test",
        statistic=float(plus),
        p=min(1.0, 2 * min(p_greater, p_less)),
        p_greater=p_greater,
        p_less=p_less,
        n=values.size,
        n_nonzero=plus + minus,
        method="exact",
        smallest_p=smallest_sign_p(plus + minus),
    )


def paired_t(differences: ArrayLike) -> PairedTest:
    """Paired t-test; `statistic` is t with n - 1 degrees of freedom.

    Example:
        >>> from clbench.statistics.paired_tests import paired_t
        >>> test = paired_t([1.0, 2.0, 3.0])  # t = 2 sqrt(3) with 2 degrees of freedom
        >>> round(test.statistic, 4), round(test.p, 4)
        (3.4641, 0.0742)

    Source: scipy.special.stdtr (Student's t distribution).
    """
    values = existing(differences)
    if values.size < 2 or not np.any(values):
        return _nothing("paired t", values.size, untestable=values.size < 2)
    sd = float(values.std(ddof=1))
    nonzero = int(np.count_nonzero(values))
    if sd <= 1e-12:
        # t would be infinite: a constant shift says nothing about the spread between patients.
        return _nothing("paired t", values.size, nonzero, untestable=True)
    t = float(values.mean()) / (sd / math.sqrt(values.size))
    from scipy import special

    p_greater, p_less = (float(special.stdtr(values.size - 1, tail)) for tail in (-t, t))
    return PairedTest(
        test="paired t",
        statistic=t,
        p=2 * min(p_greater, p_less),
        p_greater=p_greater,
        p_less=p_less,
        n=values.size,
        n_nonzero=nonzero,
        method="t",
        smallest_p=0.0,
    )


def _nothing(name: str, n: int, n_nonzero: int = 0, *, untestable: bool = False) -> PairedTest:
    """The result where there is nothing to rank: p = 1 for equal scores, nan without a test."""
    p = math.nan if n == 0 or untestable else 1.0
    return PairedTest(
        test=name,
        statistic=0.0 if p == 1.0 else math.nan,
        p=p,
        p_greater=p,
        p_less=p,
        n=n,
        n_nonzero=n_nonzero,
        method="none",
        smallest_p=1.0,
    )
