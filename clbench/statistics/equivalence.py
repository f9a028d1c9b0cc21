"""Are two strategies practically equal? Two one-sided tests, and a Bayesian signed-rank test.

A large p never shows equality; only
a margin declared beforehand does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from clbench.errors import DataError, SettingError
from clbench.statistics.paired_tests import DECIMALS, existing, paired_t
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """Two one-sided tests: does the difference lie between `low` and `high`?"""

    p: float
    """The larger of the two; equivalent at alpha when p is at most alpha."""
    p_above_low: float
    """One-sided p of "above `low`"; alone it is the test of non-inferiority."""
    p_below_high: float
    """One-sided p of "below `high`"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Posterior:
    """Bayesian signed-rank test: three shares that sum to 1.

    Their Monte Carlo error is at most 0.5 / sqrt(draws).
    """

    p_a: float
    """Share of posterior draws in which A is practically better."""
    p_rope: float
    """Share in which the two are practically equal."""
    p_b: float
    """Share in which B is practically better."""


def tost(differences: ArrayLike, *, low: float, high: float) -> Equivalence:
    """Two one-sided paired t-tests of low < mean difference < high; p is nan without spread.

    Args:
        differences: (n,) A minus B.
        low: lower margin, below 0; declared before looking.
        high: upper margin.

    Raises:
        SettingError: low is not below high.

    Example:
        >>> from clbench.statistics.equivalence import tost
        >>> test = tost([-0.01, 0.0, 0.01], low=-0.05, high=0.05)
        >>> round(test.p, 6), round(test.p_above_low, 6), round(test.p_below_high, 6)
        (0.006536, 0.006536, 0.006536)

    Source: Schuirmann 1987, as statsmodels' `ttost_paired`. Non-inferiority uses `p_above_low`.
    """
    if not low < high:
        raise SettingError(
            "equivalence margins are swapped", expected="low < high", got=(low, high)
        )
    values = existing(differences)
    above, below = paired_t(values - low), paired_t(values - high)
    return Equivalence(
        p=float(np.max([above.p_greater, below.p_less])),  # nan stays nan
        p_above_low=above.p_greater,
        p_below_high=below.p_less,
    )


def bayes_signed_rank(
    differences: ArrayLike, *, rope: float, seed: int, draws: int = 50_000
) -> Posterior:
    """Bayesian signed-rank test with a region of practical equivalence.

    Each draw weights the patients by a Dirichlet vector (plus a prior patient with difference 0 and
    half a weight) and asks where most weighted Walsh averages lie: below -rope, inside, or
    above rope.

    Args:
        differences: (n,) A minus B.
        rope: half-width of "practically equal", above 0.
        seed: of the draws.
        draws: posterior draws.

    Raises:
        DataError: no pair exists.

    Example:
        >>> from clbench.statistics.equivalence import bayes_signed_rank
        >>> posterior = bayes_signed_rank([0.1] * 8, rope=0.01, seed=0, draws=2000)
        >>> round(posterior.p_a, 2), round(posterior.p_rope, 2), round(posterior.p_b, 2)
        (1.0, 0.0, 0.0)

    Source: Benavoli et al. 2014 and 2017; baycomp (whose `p_left` is our `p_a`).
    """
    values = np.round(existing(differences), DECIMALS)
    if values.size == 0:
        raise DataError("a posterior needs at least one pair", expected="n >= 1", got=0)
    points = np.concatenate([[0.0], values])
    walsh = np.round((points[:, None] + points[None, :]) / 2, DECIMALS + 1)
    above, below = (walsh > rope).astype(float), (walsh < -rope).astype(float)
    weights = _patient_weights(values.size, seed, draws)
    a = ((weights @ above) * weights).sum(axis=1)
    b = ((weights @ below) * weights).sum(axis=1)
    winner = np.argmax(np.stack([a, 1 - a - b, b]), axis=0)
    p_a, p_rope, p_b = (np.bincount(winner, minlength=3) / draws).tolist()
    return Posterior(p_a=p_a, p_rope=p_rope, p_b=p_b)


@lru_cache(maxsize=1)
def _patient_weights(n: int, seed: int, draws: int) -> Floats:
    """(draws, n + 1) Dirichlet weights, read-only; tests of equally many patients share them."""
    weights = np.random.default_rng(seed).dirichlet(np.r_[0.5, np.ones(n)], size=draws)
    weights.setflags(write=False)
    return weights
