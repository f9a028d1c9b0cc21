"""The class-macro mean with its spread between patients, and intervals that hold what they say.

A table is that of `clbench.statistics.class_macro`: data set → (patients, classes) or (seeds,
patients, classes), nan where a patient does not annotate a class. Every class is centred at its own
mean before the spread is taken, so that neither patients with fewer classes nor classes (or data
sets) with different means look like spread between patients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clbench.errors import SettingError
from clbench.statistics.class_macro import Table, checked
from clbench.statistics.intervals import Interval
from clbench.types import Floats

DECIMALS = 12  # a difference of two scores that should be 0 is 0
NO_SPREAD = 1e-13  # a variance below this share of the sum of squared sizes is rounding
ONE_RUN = "one training run: conditional on it"
TWO_RUNS = "two training runs: how far runs differ is hardly known"
ONE_PATIENT = "a class has a single patient: its spread is not known"
ONE_DECIDES = "one patient decides the spread"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """A table as one matrix: all data sets' patients by all data sets' classes."""

    values: Floats
    """(patients, classes) seed averages, rounded to 12 decimals; 0 where there is no cell."""
    valid: Floats
    """(patients, classes); 1 where the cell exists, else 0. Every class has at least one."""
    sets: NDArray[np.intp]
    """(patients,) index of the data set."""
    per_seed: Floats
    """(seeds,) the class-macro mean of each training run."""

    @property
    def n(self) -> int:
        """Patients with at least one cell."""
        return int(self.valid.any(axis=1).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class MacroEstimate:
    """A class-macro mean and how sure it is."""

    estimate: float
    """Mean over classes of the mean over patients; nan without cells."""
    variance: float
    """Of the estimate, between patients; the training runs are taken as they are."""
    df: float
    """Degrees of freedom of `variance`; nan where it is 0."""
    run_variance: float
    """Of the estimate, between training runs; nan with one."""
    n: int
    """Patients with at least one cell."""
    n_seeds: int
    """Training runs."""
    single: bool
    """Some class has a single patient: its share of the variance is not known."""
    largest_share: float
    """Largest share of the variance that one patient holds; nan where it is 0."""

    @property
    def standard_error(self) -> float:
        """Square root of the variance between patients."""
        return math.sqrt(self.variance)


def cells_of(table: Table, patients: Mapping[str, int] | None = None) -> Cells:
    """One matrix of all data sets.

    Args:
        table: data set → (patients, classes) or (seeds, patients, classes).
        patients: data set → patients, where the matrix has to hold data sets that this table lacks
            (tables that are tested together hold the same patients); None: those of the table.

    Raises:
        DataError: see `clbench.statistics.class_macro.checked`.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of
        >>> cells = cells_of({"lits": [[0.5], [1.0]], "kits": [[0.25]]})
        >>> cells.values.tolist(), cells.sets.tolist()
        ([[0.5, 0.0], [1.0, 0.0], [0.0, 0.25]], [0, 0, 1])
    """
    arrays = checked(table)
    sizes = {name: a.shape[1] for name, a in arrays.items()} if patients is None else patients
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    seeds = next(iter(arrays.values())).shape[0] if arrays else 1
    whole = np.full((seeds, sum(sizes.values()), sum(a.shape[2] for a in arrays.values())), np.nan)
    column = 0
    for name, array in arrays.items():
        start = int(starts[name])
        whole[:, start : start + array.shape[1], column : column + array.shape[2]] = array
        column += array.shape[2]
    valid = ~np.isnan(whole[0])
    scored = valid.any(axis=0)
    whole, valid = np.nan_to_num(whole[:, :, scored]), valid[:, scored].astype(np.float64)
    with np.errstate(invalid="ignore"):
        per_seed = (whole.sum(axis=1) / valid.sum(axis=0)).sum(axis=1) / scored.sum()
    return Cells(
        values=np.round(whole.mean(axis=0), DECIMALS),
        valid=valid,
        sets=np.repeat(np.arange(len(sizes)), list(sizes.values())),
        per_seed=per_seed,
    )


def weights(valid: Floats) -> tuple[Floats, Floats]:
    """How much each cell counts in the mean, and in the spread.

    Args:
        valid: (patients, classes); 1 where the cell exists, else 0; every class has at least one.

    Returns:
        (patients, classes) weights of the mean: 1 / (patients of the class · classes); the same
        times sqrt(n / (n - 1)), which makes the variance of one class unbiased (CR2), 0 for a class
        of one patient.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.macro_estimate import weights
        >>> [w.ravel().round(4).tolist() for w in weights(np.ones((2, 1)))]
        [[0.5, 0.5], [0.7071, 0.7071]]
    """
    n = valid.sum(axis=0)
    mean = valid / (n * max(1, valid.shape[1]))
    return mean, mean * np.where(n > 1, np.sqrt(n / np.maximum(n - 1, 1)), 0.0)


def estimate_of(cells: Cells) -> MacroEstimate:
    """The class-macro mean, its variances and degrees of freedom.

    Args:
        cells: from `cells_of`.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of, estimate_of
        >>> mean = estimate_of(cells_of({"btcv": [[0.1], [0.2], [0.3]]}))
        >>> round(mean.estimate, 4), round(mean.variance, 6), round(mean.df, 4)  # 0.1² / 3
        (0.2, 0.003333, 2.0)

    Source: variance CR2, degrees of freedom of Bell & McCaffrey 2002 per data set under a pure
        patient effect, joined as of Satterthwaite 1946. One complete data set: Student's t; two:
        Welch's standard error.
    """
    seeds = cells.per_seed.size
    if cells.valid.shape[1] == 0:
        return MacroEstimate(
            estimate=math.nan, variance=math.nan, df=math.nan, run_variance=math.nan, n=0,
            n_seeds=seeds, single=False, largest_share=math.nan,
        )  # fmt: skip
    mean_weights, spread_weights = weights(cells.valid)
    n = cells.valid.sum(axis=0)
    class_means = cells.values.sum(axis=0) / n
    residual = (spread_weights * (cells.values - class_means)).sum(axis=1)
    scale = float(((spread_weights * np.abs(cells.values)).sum(axis=1) ** 2).sum())
    squares = residual**2
    variance = float(squares.sum())
    variance = 0.0 if variance <= NO_SPREAD * scale else variance
    lost = 0.0  # sum of variance² / df over the data sets
    if variance:
        for index in np.unique(cells.sets):
            own = cells.sets == index
            part = float(squares[own].sum())
            if part > 0:
                lost += part**2 / _df(spread_weights[own], cells.valid[own] / n)
    return MacroEstimate(
        estimate=float((mean_weights * cells.values).sum()),
        variance=variance,
        df=variance**2 / lost if lost else math.nan,
        run_variance=float(cells.per_seed.var(ddof=1)) / seeds if seeds > 1 else math.nan,
        n=cells.n,
        n_seeds=seeds,
        single=bool((n == 1).any()),
        largest_share=float(squares.max()) / variance if variance else math.nan,
    )


def _df(spread_weights: Floats, shares: Floats) -> float:
    """Degrees of freedom of one data set's variance if patients differ by one effect each."""
    centring = np.diag(spread_weights.sum(axis=1)) - spread_weights @ shares.T
    q = centring.T @ centring
    return float(np.trace(q) ** 2 / (q**2).sum())  # q is symmetric: tr(q²) = sum of squares


def macro_interval(
    table: Table, *, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> Interval:
    """Interval of a class-macro mean that stands beside no verdict.

    One training run: over patients, conditional on the run. Three and more: over patients and
    training runs. Two: the same with each variance at its own quantile (Cochran and Cox), since one
    degree of freedom says little about how far runs differ.

    Args:
        table: scores or differences per data set.
        level: confidence asked for.
        bounds: smallest and largest possible value, at which the ends are clipped: (0, 1) for a
            mean Dice; None for differences.

    Raises:
        SettingError: the level is not between 0 and 1.
        DataError: see `clbench.statistics.class_macro.checked`.

    Example:
        >>> from clbench.statistics.macro_estimate import macro_interval
        >>> interval = macro_interval({"btcv": [[0.1], [0.2], [0.3]]})  # 0.2 ± 4.3027 · 0.1/sqrt(3)
        >>> round(interval.estimate, 4), round(interval.low, 4), round(interval.high, 4)
        (0.2, -0.0484, 0.4484)

    Source: Bell & McCaffrey 2002, Satterthwaite 1946, Cochran & Cox 1957.
    """
    if not 0 < level < 1:
        raise SettingError("no such confidence", expected="0 < level < 1", got=level)
    mean = estimate_of(cells_of(table))
    flags: tuple[str, ...] = {1: (ONE_RUN,), 2: (TWO_RUNS,)}.get(mean.n_seeds, ())
    reach = math.nan
    if mean.single or mean.n < 2:
        flags = (*flags, ONE_PATIENT if mean.single else "fewer than two patients: no interval")
    else:
        reach = half_width(mean, 1 - level)
    low, high = mean.estimate - reach, mean.estimate + reach
    if bounds is not None and not math.isnan(reach):
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(estimate=mean.estimate, low=low, high=high, n=mean.n, flags=flags)


def half_width(estimate: MacroEstimate, alpha: float) -> float:
    """Half-width of the interval of `macro_interval`; 0 without spread.

    Args:
        estimate: the mean and its variances.
        alpha: two-sided level.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of, estimate_of, half_width
        >>> mean = estimate_of(cells_of({"btcv": [[0.1], [0.2], [0.3]]}))
        >>> round(half_width(mean, 0.05), 4)  # 4.3027 · 0.1 / sqrt(3)
        0.2484
    """
    if estimate.n_seeds == 1:
        return _t(estimate.df, alpha) * estimate.standard_error if estimate.variance else 0.0
    both = estimate.variance + estimate.run_variance
    if both == 0 or estimate.n_seeds == 2:
        return half_width_over_runs(estimate, alpha)
    lost = estimate.run_variance**2 / (estimate.n_seeds - 1)
    lost += estimate.variance**2 / estimate.df if estimate.variance else 0.0
    return _t(both**2 / lost, alpha) * math.sqrt(both)


def half_width_over_runs(estimate: MacroEstimate, alpha: float) -> float:
    """Half-width of a cautious interval over patients and new training runs; nan with one run.

    Each variance at its own quantile: never narrower than either alone would demand.

    Args:
        estimate: the mean and its variances.
        alpha: two-sided level.

    Example:
        >>> from clbench.statistics.macro_estimate import MacroEstimate, half_width_over_runs
        >>> mean = MacroEstimate(
        ...     estimate=0.2, variance=0.003, df=2.0, run_variance=0.001, n=3, n_seeds=3,
        ...     single=False, largest_share=1.0,
        ... )
        >>> round(half_width_over_runs(mean, 0.05), 4)  # both t have 2 degrees of freedom here
        0.2721

    Source: Cochran & Cox 1957.
    """
    if estimate.n_seeds < 2 or math.isnan(estimate.variance):
        return math.nan
    both = estimate.variance + estimate.run_variance
    if both == 0:
        return 0.0
    of_patients = _t(estimate.df, alpha) * estimate.variance if estimate.variance else 0.0
    return (of_patients + _t(estimate.n_seeds - 1, alpha) * estimate.run_variance) / math.sqrt(both)


def _t(df: float, alpha: float) -> float:
    from scipy import special

    return float(special.stdtrit(df, 1 - alpha / 2))
