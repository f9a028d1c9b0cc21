"""P-values corrected over a family: Holm and Benjamini-Hochberg.

A p of nan is a comparison that could not be tested: it leaves the family, and stays nan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.errors import DataError
from clbench.types import Floats


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down correction: controls the chance of a single false claim in the family.

    Example:
        >>> from clbench.statistics.corrections import holm
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03]).tolist()]  # 3 · 0.01, 2 · 0.03
        [0.03, 0.06, 0.06]

    Source: Holm 1979; equals statsmodels' `multipletests(method="holm")`.
    """
    p, tested = _checked(p_values)
    order, m = np.argsort(p[tested], kind="stable"), int(tested.sum())
    adjusted = np.empty(m)
    adjusted[order] = np.maximum.accumulate((m - np.arange(m)) * p[tested][order])
    return _placed(tested, adjusted)


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """Benjamini-Hochberg: controls the expected share of false claims; for exploratory tables.

    Example:
        >>> from clbench.statistics.corrections import benjamini_hochberg
        >>> [round(p, 6) for p in benjamini_hochberg([0.01, 0.04, 0.03]).tolist()]
        [0.03, 0.04, 0.04]

    Source: Benjamini & Hochberg 1995; equals `scipy.stats.false_discovery_control`, which is not
    called because importing `scipy.stats` takes a tenth of a report's time.
    """
    p, tested = _checked(p_values)
    order, m = np.argsort(p[tested], kind="stable")[::-1], int(tested.sum())
    adjusted = np.empty(m)
    adjusted[order] = np.minimum.accumulate(m / np.arange(m, 0, -1) * p[tested][order])
    return _placed(tested, adjusted)


def _checked(p_values: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    p = np.asarray(p_values, dtype=np.float64)
    tested = ~np.isnan(p)
    if p.ndim != 1 or np.any((p[tested] < 0) | (p[tested] > 1)):
        raise DataError(
            "these are not p-values", expected="one list of numbers in [0, 1] or nan", got=p
        )
    return p, tested


def _placed(tested: NDArray[np.bool_], adjusted: Floats) -> Floats:
    """Put the corrected values back to where the comparisons stood; nan for the others."""
    placed = np.full(tested.size, np.nan)
    placed[tested] = np.minimum(adjusted, 1.0)
    return placed
