"""Rankings of strategies: Friedman, all pairs, and the bars of a critical-difference diagram.

Scores are higher-is-better; rank 1 is best. With
classes or benchmarks as blocks these numbers describe, they do not test: classes share patients.

`tie_groups` tests all pairs of class-macro means as one family: patients are flipped jointly in all
of them, as in `clbench.statistics.max_t`. A group is a largest set in which no two differ; a
strategy may stand in several, as in a compact letter display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clbench.errors import DataError
from clbench.statistics.class_macro import Table
from clbench.statistics.corrections import holm
from clbench.statistics.macro_estimate import Cells, cells_of, estimate_of
from clbench.statistics.max_t import Correction, patients_of
from clbench.statistics.paired_tests import DECIMALS, midranks, wilcoxon
from clbench.statistics.sign_patterns import SignPatterns, family_p_values
from clbench.statistics.verdicts import smallest_sample
from clbench.types import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Friedman:
    """Omnibus test of at least three strategies over the same blocks."""

    chi2: float
    """Friedman's statistic, corrected for ties."""
    p: float
    """Its chi-square p-value; 1 if all scores are equal."""
    kendall_w: float
    """Agreement of the blocks, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All pairs of strategies, for critical-difference bars."""

    names: tuple[str, ...]
    """The strategies, best average rank first."""
    average_ranks: Floats
    """(strategies,) in the order of `names`."""
    p_adjusted: Floats
    """(strategies, strategies) symmetric, 1 on the diagonal. Where there are too few blocks for any
    test, `max_t_pairs` has 1; nan = `wilcoxon_holm` has no p."""
    cliques: tuple[tuple[str, ...], ...]
    """Bars: longest runs of neighbors in which no pair differs at alpha."""
    m: int
    """Comparisons in the family."""


def block_ranks(scores: ArrayLike) -> Floats:
    """Rank the strategies within every complete block.

    Args:
        scores: (blocks, strategies), higher is better; nan = no score. Rounded to 6 decimals.

    Returns:
        (complete blocks, strategies) midranks, 1 = best.

    Example:
        >>> from clbench.statistics.ranking import block_ranks
        >>> nan = float("nan")
        >>> block_ranks([[0.9, 0.8, 0.8], [0.1, nan, 0.2]]).tolist()
        [[1.0, 2.5, 2.5]]
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2:
        raise DataError("a ranking needs a table", expected="(blocks, strategies)", got=array.shape)
    whole = array[~np.isnan(array).any(axis=1)]
    ranks = np.array([midranks(-np.round(row, DECIMALS)) for row in whole])
    return ranks.reshape(len(whole), array.shape[1])


def friedman(scores: ArrayLike) -> Friedman:
    """Friedman test over blocks, with Kendall's W.

    Args:
        scores: (blocks, strategies), higher is better.

    Raises:
        DataError: fewer than 3 strategies or 2 complete blocks.

    Example:
        >>> from clbench.statistics.ranking import friedman
        >>> test = friedman([[0.9, 0.8, 0.7], [0.8, 0.7, 0.6], [0.9, 0.5, 0.4]])  # all blocks agree
        >>> round(test.chi2, 4), round(test.p, 4), round(test.kendall_w, 4)
        (6.0, 0.0498, 1.0)

    Source: Friedman 1937, tie-corrected as in `scipy.stats.friedmanchisquare`; not called because
    importing `scipy.stats` takes a tenth of a report's time.
    """
    ranks = block_ranks(scores)
    n, k = ranks.shape
    if k < 3 or n < 2:
        raise DataError(
            "too little for a Friedman test",
            expected="3 strategies or more, 2 complete blocks or more",
            got=f"{k} strategies, {n} complete blocks",
            next_step="compare two strategies with the Wilcoxon test",
        )
    from scipy import special

    w = kendall_w(ranks)
    chi2 = n * (k - 1) * w
    return Friedman(chi2=chi2, p=float(special.chdtrc(k - 1, chi2)), kendall_w=w)


def kendall_w(ranks: Floats) -> float:
    """How far blocks rank alike: Kendall's W, corrected for ties; 0 where nobody is ranked.

    Args:
        ranks: (blocks, strategies) midranks; two strategies or more.

    Example:
        >>> from clbench.statistics.ranking import block_ranks, kendall_w
        >>> kendall_w(block_ranks([[0.8, 0.8, 0.5], [0.7, 0.7, 0.4]]))
        1.0

    Source: Kendall & Babington Smith 1939; Siegel & Castellan 1988, 9.3 (ties).
    """
    n, k = ranks.shape
    if bool((ranks == ranks[:, :1]).all()):
        return 0.0
    average = ranks.mean(axis=0)
    plain = 12 / (k * (k**2 - 1)) * float(((average - (k + 1) / 2) ** 2).sum())
    ties = sum(
        float((t**3 - t).sum()) for t in (np.unique(r, return_counts=True)[1] for r in ranks)
    )
    return float(plain / (1 - ties / (n * k * (k**2 - 1))))


def wilcoxon_holm(scores: Mapping[str, ArrayLike], *, alpha: float = 0.05) -> Comparison:
    """Wilcoxon signed-rank test of all pairs with Holm's correction: the usual bars.

    Args:
        scores: strategy → (blocks,), the same blocks for all.
        alpha: level of the bars.

    Example:
        >>> from clbench.statistics.ranking import wilcoxon_holm
        >>> a, b = [0.75, 0.5, 0.5, 0.75, 0.5, 0.75], [0.5, 0.25, 0.25, 0.5, 0.25, 0.5]
        >>> test = wilcoxon_holm({"b": b, "a": a})
        >>> test.names, test.p_adjusted.tolist(), test.cliques
        (('a', 'b'), [[1.0, 0.03125], [0.03125, 1.0]], ())

    Source: Benavoli et al. 2016 (pairwise tests must not depend on the pool).
    """
    names, table = _columns(scores)
    whole = table[~np.isnan(table).any(axis=1)]
    k = len(names)
    pairs = list(zip(*np.triu_indices(k, 1), strict=True))
    adjusted = holm([wilcoxon(whole[:, i] - whole[:, j]).p for i, j in pairs])
    p = np.ones((k, k))
    for (i, j), value in zip(pairs, adjusted, strict=True):
        p[i, j] = p[j, i] = value
    return _bars(names, table, p, alpha=alpha, m=int(np.isfinite(adjusted).sum()))


def max_t_pairs(
    scores: Mapping[str, ArrayLike], *, alpha: float = 0.05, draws: int = 100_000, seed: int = 0
) -> Comparison:
    """All pairs as one family of sign flips: the bars of the report.

    Holm's correction asks each pair for the level over all pairs, which few blocks cannot reach
    however far apart they lie: 12 blocks and 28 strategies have a smallest adjusted p of 0.18.

    Args:
        scores: strategy → (blocks,), the same blocks for all; nan = no score.
        alpha: level of the bars.
        draws: sign patterns above 20 blocks, the observed one included.
        seed: of these patterns.

    Example:
        >>> from clbench.statistics.ranking import max_t_pairs
        >>> a, b = [0.75, 0.5, 0.5, 0.75, 0.5, 0.75], [0.5, 0.25, 0.25, 0.5, 0.25, 0.5]
        >>> test = max_t_pairs({"b": b, "a": a})
        >>> test.names, test.p_adjusted.tolist(), test.cliques
        (('a', 'b'), [[1.0, 0.03125], [0.03125, 1.0]], ())

    Source: `tie_groups`, with a block's one score in the place of its structures.
    """
    names, table = _columns(scores)
    whole = table[~np.isnan(table).any(axis=1)]
    if not len(whole):
        return _bars(names, table, np.full((len(names),) * 2, np.nan), alpha=alpha, m=0)
    ties = tie_groups(
        [{"": column[None, :, None]} for column in whole.T], alpha=alpha, draws=draws, seed=seed
    )
    place = np.argsort(ties.order)
    return _bars(names, table, ties.p[np.ix_(place, place)], alpha=alpha, m=ties.m)


def _bars(
    names: Sequence[str], table: Floats, p_adjusted: Floats, *, alpha: float, m: int
) -> Comparison:
    """The strategies by average rank, and the bars of their adjusted p-values."""
    ranks = block_ranks(table)
    average = ranks.mean(axis=0) if len(ranks) else np.full(len(names), np.nan)
    order = np.argsort(average, kind="stable")
    p = p_adjusted[np.ix_(order, order)]
    np.fill_diagonal(p, 1.0)
    ordered = tuple(names[i] for i in order)
    return Comparison(
        names=ordered,
        average_ranks=average[order],
        p_adjusted=p,
        cliques=tuple(ordered[a : b + 1] for a, b in cliques(p, alpha=alpha)),
        m=m,
    )


def cliques(p_adjusted: Floats, *, alpha: float = 0.05) -> list[tuple[int, int]]:
    """Longest runs (first, last) of neighbors in which no pair has p at or below alpha.

    Runs inside longer runs and runs of one are left out. nan counts as "no difference shown".

    Args:
        p_adjusted: (k, k) symmetric, in the order of the average ranks.
        alpha: level.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.ranking import cliques
        >>> p = np.array([[1.0, 0.5, 0.01], [0.5, 1.0, 0.3], [0.01, 0.3, 1.0]])
        >>> cliques(p)
        [(0, 1), (1, 2)]
    """
    k = len(p_adjusted)
    runs: list[tuple[int, int]] = []
    for first in range(k):
        last = first
        while last + 1 < k and not np.any(p_adjusted[first : last + 1, last + 1] <= alpha):
            last += 1
        if last > first and not (runs and runs[-1][1] >= last):
            runs.append((first, last))
    return runs


def _columns(scores: Mapping[str, ArrayLike]) -> tuple[tuple[str, ...], Floats]:
    columns = [np.asarray(column, dtype=np.float64) for column in scores.values()]
    if len(columns) < 2 or len({c.shape for c in columns}) != 1 or columns[0].ndim != 1:
        raise DataError(
            "strategies cannot be compared pair by pair",
            expected="two or more lists over the same blocks",
            got={name: c.shape for name, c in zip(scores, columns, strict=True)},
        )
    return tuple(scores), np.column_stack(columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ties:
    """All pairs of some strategies, the largest mean first."""

    order: tuple[int, ...]
    """Index of each strategy among those given, by falling mean."""
    means: tuple[float, ...]
    """Class-macro mean of each, in this order."""
    p: Floats
    """(k, k) adjusted p of "no difference", in this order; 1 on the diagonal."""
    groups: tuple[tuple[int, ...], ...]
    """Places in this order of the members of each group, the group of the best first."""
    ranks: tuple[tuple[int, int], ...]
    """Best and worst rank of each, in this order, that the tests leave open."""
    patients: int
    """Patients that are flipped."""
    m: int
    """Pairs in the family: those with enough patients; 0 = nobody is told apart."""

    def letters(self, place: int) -> str:
        """The groups of the strategy at a place: `a`, `bc`; `a1` after `z`."""
        return "".join(_letter(k) for k, group in enumerate(self.groups) if place in group)

    def together(self, one: int, other: int) -> bool:
        """Whether the strategies at two places share a group: they are not told apart."""
        return any(one in group and other in group for group in self.groups)


def tie_groups(
    tables: Sequence[Table],
    *,
    alpha: float = 0.05,
    correction: Correction = "max-t",
    draws: int = 100_000,
    seed: int = 0,
) -> Ties:
    """Test all pairs, and collect those that are not told apart.

    Args:
        tables: per strategy data set → (seeds, patients, classes), see
            `clbench.statistics.class_macro`; larger is better. A pair is compared on the cells
            that both have, if these are of enough patients for any test.
        alpha: level of the family of all pairs.
        correction: `max-t` or `holm`.
        draws: sign patterns above 20 patients, the observed one included.
        seed: of these patterns.

    Raises:
        DataError: strategies with different patients.

    Example:
        >>> from clbench.statistics.ranking import tie_groups
        >>> low = [[0.50], [0.52], [0.49], [0.51], [0.48], [0.53], [0.50]]
        >>> near = [[0.51], [0.51], [0.50], [0.50], [0.49], [0.52], [0.50]]
        >>> high = [[0.71], [0.69], [0.72], [0.70], [0.73], [0.70], [0.68]]
        >>> ties = tie_groups([{"btcv": low}, {"btcv": near}, {"btcv": high}])
        >>> ties.order, [ties.letters(k) for k in range(3)], ties.ranks
        ((2, 1, 0), ['a', 'b', 'b'], ((1, 1), (2, 3), (2, 3)))

    Source: step-down max-T of all pairs (Westfall & Young 1993; Romano & Wolf 2005); letters by
        insert and absorb (Piepho, J Comput Graph Stat 13:456, 2004).
    """
    sizes = patients_of(tables)
    means = [estimate_of(cells_of(t, sizes)).estimate for t in tables]
    order = sorted(range(len(tables)), key=lambda k: (-means[k], k))
    pairs = list(combinations(range(len(order)), 2))
    cells = [
        cells_of(d, sizes) for d in _differences(tables, [(order[i], order[j]) for i, j in pairs])
    ]
    p: Floats = np.ones((len(order), len(order)))
    adjusted, n = _adjusted(cells, alpha, correction, draws=draws, seed=seed)
    for (i, j), value in zip(pairs, adjusted, strict=True):
        p[i, j] = p[j, i] = 1.0 if math.isnan(value) else value
    told_apart = p <= alpha
    better = np.zeros_like(told_apart)
    for (i, j), of_pair in zip(pairs, cells, strict=True):
        # on the cells that both have the later one may be the better one
        first, second = (i, j) if estimate_of(of_pair).estimate >= 0 else (j, i)
        better[first, second] = told_apart[i, j]
    ranks = [
        (1 + int(better[:, k].sum()), len(order) - int(better[k].sum())) for k in range(len(order))
    ]
    return Ties(
        order=tuple(order),
        means=tuple(means[k] for k in order),
        p=p,
        groups=tuple(groups_of(told_apart)),
        ranks=tuple(ranks),
        patients=n,
        m=int((~np.isnan(adjusted)).sum()),
    )


def _adjusted(
    cells: Sequence[Cells], alpha: float, correction: Correction, *, draws: int, seed: int
) -> tuple[Floats, int]:
    """Adjusted p of "no difference" of comparisons tested together, and the patients flipped.

    Args:
        cells: differences of each, over the same patients.
        alpha: level; what has too few patients for it leaves the family, and has nan.
        correction: `max-t` or `holm`.
        draws: sign patterns above 20 patients, the observed one included.
        seed: of these patterns.
    """
    p: Floats = np.full(len(cells), np.nan)
    tested = [k for k, c in enumerate(cells) if c.n >= smallest_sample(alpha)]
    if not tested:
        return p, 0
    scored = np.any([cells[k].valid.any(axis=1) for k in tested], axis=0)
    cut = [
        replace(cells[k], values=cells[k].values[scored], valid=cells[k].valid[scored])
        for k in tested
    ]
    patterns = SignPatterns(int(scored.sum()), draws=draws, seed=seed)
    _, alone, stepped = family_p_values(cut, 0.0, patterns)
    p[tested] = holm(alone) if correction == "holm" else stepped
    return p, patterns.n


def _differences(
    tables: Sequence[Table], pairs: Sequence[tuple[int, int]]
) -> list[dict[str, Floats]]:
    """Per pair of strategies the first one's table minus the other's."""
    return [
        {name: np.subtract(tables[i][name], tables[j][name]) for name in tables[i]}
        for i, j in pairs
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOfSets:
    """Two strategies on two test sets."""

    first: int
    """A strategy, by position."""
    second: int
    """The other."""
    internal: float
    """First minus second on the internal test set."""
    external: float
    """The same on the external one."""
    p_internal: float
    """Adjusted p of "no difference" on the internal test set; nan = too few patients."""
    p_external: float
    """The same on the external one."""

    @property
    def turns(self) -> bool:
        """Whether the two means are in another order on the external test set."""
        return self.internal * self.external < 0

    @property
    def p(self) -> float:
        """P of "they are in no other order": the larger of the two, 1 where the order stays."""
        worst = float(np.max([self.p_internal, self.p_external]))  # nan stays nan
        return worst if self.turns or math.isnan(worst) else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReversals:
    """The order of strategies on an internal and on an external test set."""

    pairs: tuple[PairOfSets, ...]
    """All pairs."""
    m: int
    """Comparisons tested together: pairs by test sets with enough patients."""
    patients: int
    """Patients of both test sets."""

    @property
    def kendall_tau(self) -> float:
        """Pairs in the same order minus pairs in another one, as a share of all; nan = no pair."""
        signs = [np.sign(pair.internal * pair.external) for pair in self.pairs]
        return float(np.mean(signs)) if signs else math.nan


def rank_reversals(
    internal: Sequence[Table],
    external: Sequence[Table],
    *,
    alpha: float = 0.05,
    draws: int = 100_000,
    seed: int = 0,
) -> RankReversals:
    """Test for every pair of strategies whether an external test set reverses their order.

    A reversal is two claims: one strategy is better on the internal test set, and worse on the
    external one. It is shown where both are, so its p is the larger of the two. All pairs on both
    test sets are one family, so any number of reversals is claimed at `alpha` together.

    Args:
        internal: per strategy data set → (seeds, patients, classes), see
            `clbench.statistics.class_macro`; the same cells in all of them, larger is better.
        external: the same strategies in the same order on other data sets.
        alpha: level; a test set with fewer patients than it needs is not tested.
        draws: sign patterns above 20 patients, the observed one included.
        seed: of these patterns.

    Raises:
        DataError: not as many external as internal tables, strategies with different patients, or
            a data set that is in both.

    Example:
        >>> from clbench.statistics.ranking import rank_reversals
        >>> low = [[0.50], [0.52], [0.49], [0.51], [0.48], [0.53], [0.50], [0.47]]
        >>> high = [[0.71], [0.69], [0.72], [0.70], [0.73], [0.70], [0.68], [0.74]]
        >>> swapped = rank_reversals(
        ...     [{"btcv": low}, {"btcv": high}], [{"amos": high}, {"amos": low}]
        ... )
        >>> swapped.kendall_tau, swapped.pairs[0].p <= 0.05
        (-1.0, True)
        >>> same = rank_reversals([{"btcv": low}, {"btcv": high}], [{"amos": low}, {"amos": high}])
        >>> same.kendall_tau, same.pairs[0].p
        (1.0, 1.0)

    Source: intersection-union test (Berger, Technometrics 24:295, 1982), the two-group case of
        the test for qualitative interaction (Gail & Simon, Biometrics 41:361, 1985); p-values by
        step-down max-T over patients flipped jointly, as in `clbench.statistics.max_t`.
    Differs: both claims two-sided, so that they agree with `better` and `worse` elsewhere.
    """
    if len(internal) != len(external) or any(set(a) & set(b) for a in internal for b in external):
        raise DataError(
            "a rank reversal needs the same strategies on two different test sets",
            expected=f"{len(internal)} tables of other data sets",
            got=f"{len(external)} tables of {', '.join(sorted({n for t in external for n in t}))}",
        )
    sizes = patients_of([*internal, *external])
    pairs = list(combinations(range(len(internal)), 2))
    cells = [
        cells_of(d, sizes) for tables in (internal, external) for d in _differences(tables, pairs)
    ]
    means = [estimate_of(c).estimate for c in cells]
    p, patients = _adjusted(cells, alpha, "max-t", draws=draws, seed=seed)
    m = len(pairs)
    return RankReversals(
        pairs=tuple(
            PairOfSets(
                first=i,
                second=j,
                internal=means[k],
                external=means[m + k],
                p_internal=float(p[k]),
                p_external=float(p[m + k]),
            )
            for k, (i, j) in enumerate(pairs)
        ),
        m=int((~np.isnan(p)).sum()),
        patients=patients,
    )


def groups_of(told_apart: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """The largest sets in which no two are told apart, the one with the first member first.

    Args:
        told_apart: (k, k) symmetric.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.ranking import groups_of
        >>> groups_of(np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=bool))
        [(0, 1), (1, 2)]
    """
    groups = [frozenset(range(len(told_apart)))] if len(told_apart) else []
    for i, j in zip(*np.nonzero(np.triu(told_apart, 1)), strict=True):
        apart: list[frozenset[int]] = []
        for group in groups:
            apart += [group - {i}, group - {j}] if {i, j} <= group else [group]
        groups = [g for g in dict.fromkeys(apart) if not any(g < other for other in apart)]
    return sorted(tuple(sorted(g)) for g in groups)


def _letter(k: int) -> str:
    """`a` to `z`, then `a1` and so on."""
    turn, place = divmod(k, 26)
    return chr(ord("a") + place) + (str(turn) if turn else "")
