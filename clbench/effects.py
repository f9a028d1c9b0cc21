"""How large a difference is: effect sizes, and the smallest effect a sample can find.

Room: row 0 (numpy; scipy only inside functions).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from clbench.errors import SettingError
from clbench.stats import DECIMALS, existing, midranks


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), in [-1, 1]; 0 if all equal.

    Zeros are dropped, as in the Wilcoxon test. nan without pairs.

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

    Source: Cohen 1988, paired form.
    Differs: pingouin's paired `cohen_d` divides by the spread of the scores instead.
    """
    values = existing(differences)
    if values.size < 2:
        return math.nan
    sd = float(values.std(ddof=1))
    return float(values.mean()) / sd if sd > 1e-12 else math.nan


def cliffs_delta(a: ArrayLike, b: ArrayLike) -> float:
    """Share of cross pairs with A above B minus the share below: for different patients only.

    It ignores pairing; for the same patients use `rank_biserial`. nan if one side is empty.

    Source: Cliff 1993.
    """
    first, second = (np.round(existing(x), DECIMALS) for x in (a, b))
    if first.size == 0 or second.size == 0:
        return math.nan
    return float(np.sign(np.round(first[:, None] - second[None, :], DECIMALS)).mean())


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half; nan without values.

    It trims away hard classes when taken over classes, so it is never a primary endpoint here.

    Source: rliable (Agarwal et al. 2021): scipy's `trim_mean` with 0.25.
    """
    found = np.sort(existing(np.asarray(values, dtype=np.float64).ravel()))
    cut = found.size // 4
    return float(found[cut : found.size - cut].mean()) if found.size else math.nan


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

    Source: noncentral t, as G*Power and statsmodels' `TTestPower`.
    """
    if not (0 < alpha < power < 1):
        raise SettingError("no such power", expected="0 < alpha < power < 1", got=(alpha, power))
    if n < 2:
        return math.nan
    from scipy import optimize
    from scipy import stats as scipy_stats

    limit = float(scipy_stats.t.ppf(1 - alpha / 2, n - 1))

    def shortfall(dz: float) -> float:
        at = dz * math.sqrt(n)
        found = float(scipy_stats.nct.sf(limit, n - 1, at))
        wrong_side = float(scipy_stats.nct.cdf(-limit, n - 1, at))
        # scipy gives nan where the tail beyond the wrong limit is too small to compute.
        return found + (0.0 if math.isnan(wrong_side) else wrong_side) - power

    high = 0.125
    while shortfall(high) < 0:
        high *= 2
    return float(optimize.brentq(shortfall, 0.0, high))
