"""Stability of a ranking by resampling: patients within their data set, crossed with seeds.

The tables are those of `clbench.statistics.class_macro`. Strategies stay paired inside a
resample: all see the same patients and the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.errors import DataError
from clbench.statistics.class_macro import Stratum, Table, has_cells, strata
from clbench.statistics.ranking import block_ranks
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Resamples:
    """Bootstrap weights: which seeds and which patients each resample holds, and how often."""

    seeds: Floats
    """(draws, seeds); each row sums to 1. Shared by all data sets: seeds are crossed."""
    patients: tuple[Floats, ...]
    """Per data set (draws, patients); each row sums to the number of patients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """How the ranking changes when patients (and seeds) are resampled."""

    names: tuple[str, ...]
    """The strategies, in the order given."""
    full_ranks: Floats
    """(strategies,) ranks from all patients."""
    rank_share: Floats
    """(strategies, strategies); entry [i, r] is the share of resamples in which i has rank r + 1.
    Tied ranks are split evenly over the places they cover."""
    p_first: Floats
    """(strategies,) share of resamples with the best rank, ties split evenly."""
    kendall_tau: float
    """Mean Kendall tau-b between a resampled ranking and the full one; nan without an order."""
    draws: int
    """Resamples."""
    n: int
    """Patients."""
    n_seeds: int
    """Training runs."""


def draw_resamples(parts: Sequence[Stratum], *, seed: int, draws: int) -> Resamples:
    """Resample seeds and patients independently, patients within their data set.

    Args:
        parts: checked cells per data set; all with the same seeds.
        seed: of the random numbers.
        draws: resamples.

    Example:
        >>> from clbench.statistics.bootstrap import draw_resamples
        >>> from clbench.statistics.class_macro import strata
        >>> parts = strata({"btcv": [[0.1], [0.2], [0.3]]})  # one seed, three patients, one class
        >>> weights = draw_resamples(parts, seed=0, draws=4)
        >>> weights.seeds.tolist()  # a single seed is always drawn
        [[1.0], [1.0], [1.0], [1.0]]
        >>> weights.patients[0].sum(axis=1).tolist()  # three patients in every resample
        [3.0, 3.0, 3.0, 3.0]

    Source: pigeonhole bootstrap (Owen 2007) for crossed factors.
    """
    rng = np.random.default_rng(seed)
    runs = parts[0].values.shape[0]
    return Resamples(
        seeds=rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs,
        patients=tuple(
            rng.multinomial(part.n, np.full(part.n, 1 / part.n), size=draws).astype(np.float64)
            if part.n
            else np.empty((draws, 0))
            for part in parts
        ),
    )


def resampled(parts: Sequence[Stratum], resamples: Resamples) -> tuple[Floats, Floats]:
    """The macro mean of every resample, and how many classes each resample lost.

    Returns:
        (draws,) means, nan where no class is left; (draws,) classes without a resampled patient.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.bootstrap import Resamples, resampled
        >>> from clbench.statistics.class_macro import strata
        >>> parts = strata({"btcv": [[0.1], [0.2], [0.3]]})
        >>> drawn = np.array([[2.0, 0.0, 1.0]])  # the first patient twice, the second not at all
        >>> twice = Resamples(seeds=np.ones((1, 1)), patients=(drawn,))
        >>> means, lost = resampled(parts, twice)
        >>> round(float(means[0]), 4), lost.tolist()  # (2 · 0.1 + 0.3) / 3
        (0.1667, [0.0])
    """
    total = np.zeros(resamples.seeds.shape[0])
    present, classes = np.zeros_like(total), 0
    for part, patients in zip(parts, resamples.patients, strict=True):
        sums = np.zeros((total.size, part.valid.shape[1]))
        for weight, values in zip(resamples.seeds.T, part.values, strict=True):
            sums += weight[:, None] * (patients @ values)
        count = patients @ part.valid
        total += np.divide(sums, count, out=np.zeros_like(sums), where=count > 0).sum(axis=1)
        present += (count > 0).sum(axis=1)
        classes += int((part.valid.sum(axis=0) > 0).sum())
    mean = np.divide(total, present, out=np.full_like(total, np.nan), where=present > 0)
    return mean, classes - present


def seed_means(table: Table) -> Floats:
    """(seeds,) the class-macro mean of each seed, for an interval over paired seeds.

    Example:
        >>> from clbench.statistics.bootstrap import seed_means
        >>> table = {"btcv": [[[0.5], [0.25]], [[1.0], [0.5]]]}  # (2 seeds, 2 patients, 1 class)
        >>> seed_means(table).tolist()
        [0.375, 0.75]
    """
    parts = strata(table)
    if not has_cells(parts):
        return np.empty(0)
    return resampled(parts, _everyone(parts))[0]


def ranking_stability(
    scores: Mapping[str, Table], *, seed: int = 0, draws: int = 1000
) -> Stability:
    """Bootstrap patients and seeds, rank the strategies by class-macro mean in each resample.

    Args:
        scores: strategy → table (data set → (patients, classes) or (seeds, patients, classes)).
        seed: of the resamples; every strategy sees the same ones.
        draws: resamples.

    Raises:
        DataError: fewer than two strategies, no cells, or strategies that differ in their cells.

    Example:
        >>> from clbench.statistics.bootstrap import ranking_stability
        >>> scores = {"a": {"btcv": [[0.75], [0.5]]}, "b": {"btcv": [[0.5], [0.25]]}}
        >>> stability = ranking_stability(scores, draws=100)
        >>> stability.full_ranks.tolist(), stability.p_first.tolist()  # a is above b everywhere
        ([1.0, 2.0], [1.0, 0.0])

    Source: the content of challengeR (Wiesenfarth et al. 2021).
    """
    names = tuple(scores)
    parts = {name: strata(table) for name, table in scores.items()}
    if len(names) < 2:
        raise DataError("a ranking needs two strategies", expected=">= 2", got=len(names))
    first = parts[names[0]]
    for name in names[1:]:
        same = [p.name for p in parts[name]] == [p.name for p in first] and all(
            p.values.shape == q.values.shape and np.array_equal(p.valid, q.valid)
            for p, q in zip(parts[name], first, strict=True)
        )
        if not same:
            raise DataError(
                "two strategies were not scored on the same cases",
                where=name,
                expected=f"the cells of {names[0]!r}",
                got="other data sets, patients, classes, seeds or holes",
                next_step="finish the incomplete run",
            )
    if not any(p.valid.any() for p in first):
        raise DataError("there is nothing to rank", expected="scores", got="no cell")
    weights = draw_resamples(first, seed=seed, draws=draws)
    means = np.column_stack([resampled(parts[name], weights)[0] for name in names])
    means = means[~np.isnan(means).any(axis=1)]
    full = np.array([resampled(parts[n], _everyone(parts[n]))[0].mean() for n in names])
    full_ranks = block_ranks(full[None])[0]
    share = np.zeros((len(names), len(names)))
    ranks = block_ranks(means)
    for row in ranks:
        for i, rank in enumerate(row):
            width = int((row == rank).sum())
            top = round(rank - (width + 1) / 2)
            share[i, top : top + width] += 1 / width
    share /= len(ranks)
    return Stability(
        names=names,
        full_ranks=full_ranks,
        rank_share=share,
        p_first=share[:, 0].copy(),
        kendall_tau=_mean_tau(ranks, full_ranks),
        draws=len(ranks),
        n=sum(p.n for p in first),
        n_seeds=first[0].values.shape[0],
    )


def _everyone(parts: Sequence[Stratum]) -> Resamples:
    """Each seed alone with every patient once."""
    runs = parts[0].values.shape[0]
    return Resamples(seeds=np.eye(runs), patients=tuple(np.ones((runs, part.n)) for part in parts))


def _mean_tau(ranks: Floats, full: Floats) -> float:
    """Mean Kendall tau-b of each row of `ranks` with `full`; rows without an order left out."""
    i, j = np.triu_indices(full.size, 1)
    ours, theirs = np.sign(ranks[:, i] - ranks[:, j]), np.sign(full[i] - full[j])
    scale = np.sqrt(np.abs(ours).sum(axis=1) * np.abs(theirs).sum())
    ordered = scale > 0
    if not ordered.any():
        return math.nan
    return float(((ours @ theirs)[ordered] / scale[ordered]).mean())
