"""How many patients would decide, and which difference the present number finds.

Planning numbers: the spread and the difference stay as seen, and all data sets grow alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from clbench.errors import SettingError

MOST = 1000
"""Numbers of patients above this are given as infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatientsNeeded:
    """Patients (all data sets together) at which a claim would be shown with the wanted power."""

    difference: float
    """That the two differ; infinite above 1,000."""
    equivalence: float
    """That they differ by less than the margin; nan where the difference seen is not inside it."""
    not_worse: float
    """That the first is not worse by the margin or more; nan where it is seen to be."""


def patients_needed(
    *,
    n: int,
    estimate: float,
    standard_error: float,
    df: float,
    level: float,
    margin: float,
    power: float = 0.8,
) -> PatientsNeeded:
    """Smallest numbers of patients, above the present one, that reach the power.

    Args:
        n: patients now.
        estimate: difference seen.
        standard_error: of it, now.
        df: degrees of freedom of the standard error, now.
        level: two-sided level of the one comparison.
        margin: half-width of "equivalent".
        power: chance wanted.

    Example:
        >>> from clbench.statistics.sample_size import patients_needed
        >>> needed = patients_needed(
        ...     n=8, estimate=0.012, standard_error=0.006, df=7.0, level=0.05, margin=0.02
        ... )
        >>> needed.difference, needed.equivalence, needed.not_worse
        (18.0, 38.0, 9.0)

    Source: shifted t distribution; within 0.01 of the noncentral t.
    """
    if not (0 < level < 1 and 0 < power < 1):
        raise SettingError("no such power", expected="0 < level, power < 1", got=(level, power))
    from scipy import special

    def missed(later: int, distance: float) -> float:
        """Chance that a claim about a mark this far away is not made with `later` patients."""
        df_later = later / n * (df + 1) - 1
        limit = special.stdtrit(df_later, 1 - level / 2)
        return float(
            special.stdtr(df_later, limit - distance / (standard_error * math.sqrt(n / later)))
        )

    def smallest(*distances: float) -> float:
        """Smallest number with which the claim, about all these marks at once, is made."""
        candidates = range(n + 1, MOST + 1)  # the power grows with each patient
        place = bisect_left(
            candidates, power, key=lambda later: 1 - sum(missed(later, d) for d in distances)
        )
        return float(candidates[place]) if place < len(candidates) else math.inf

    inside = abs(estimate) < margin
    return PatientsNeeded(
        difference=smallest(abs(estimate)),
        equivalence=smallest(margin + estimate, margin - estimate) if inside else math.nan,
        not_worse=smallest(margin + estimate) if estimate > -margin else math.nan,
    )


def detectable_difference(
    *, standard_error: float, df: float, level: float, power: float = 0.8
) -> float:
    """Smallest difference that the present patients show with this power.

    Args:
        standard_error: of the difference.
        df: its degrees of freedom.
        level: two-sided level of the one comparison.
        power: chance wanted.

    Example:
        >>> from clbench.statistics.sample_size import detectable_difference
        >>> round(detectable_difference(standard_error=0.01, df=15.0, level=0.05), 4)
        0.03
    """
    from scipy import special

    limit, more = special.stdtrit(df, [1 - level / 2, power])
    return float((limit + more) * standard_error)
