"""Sign patterns of patients, and the studentized class-macro mean under each of them.

Flipping a patient turns the sign of all its differences in all comparisons at once. Everything a
flipped statistic needs is linear in the signs except one product, so a block of patterns costs one
addition per column: the products of the low bits are made once, those of the high bits per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clbench.statistics.macro_estimate import NO_SPREAD, Cells, weights
from clbench.types import Floats

ENUMERATE_UP_TO = 20
"""Patients up to which all sign patterns are taken; above, a sample."""
_BLOCK_BITS = 12
_TIE = 1e-10  # the same value, summed in another order


@dataclass(frozen=True)
class SignPatterns:
    """Sign patterns of n patients, the observed one (all signs kept) first.

    Up to 20 patients all patterns in which the first patient keeps its sign: turning all signs
    changes no statistic here, so the other half says the same. Above, a sample of all of them.
    """

    n: int
    """Patients."""
    draws: int = 100_000
    """Patterns where they are sampled, the observed one included."""
    seed: int = 0
    """Of the sample."""

    @property
    def exact(self) -> bool:
        """Whether all patterns are taken."""
        return self.n <= ENUMERATE_UP_TO

    @property
    def count(self) -> int:
        """Patterns that `products` goes through."""
        return 2 ** max(0, self.n - 1) if self.exact else self.draws

    @property
    def represented(self) -> int:
        """Patterns that these stand for."""
        return 2**self.n if self.exact else self.draws

    @cached_property
    def _sampled(self) -> NDArray[np.int8]:
        rng = np.random.default_rng(self.seed)
        signs = 2 * rng.integers(0, 2, size=(self.draws, self.n), dtype=np.int8) - 1
        signs[0] = 1
        return signs

    def products(self, columns: Floats) -> Iterator[Floats]:
        """The sums over patients of sign times value, block by block.

        Args:
            columns: (patients, columns).

        Yields:
            (columns, patterns of the block).
        """
        if not self.exact:
            for start in range(0, self.draws, 2**_BLOCK_BITS):
                block = self._sampled[start : start + 2**_BLOCK_BITS]
                yield columns.T @ block.T.astype(np.float64)
            return
        free = max(0, self.n - 1)
        low = min(free, _BLOCK_BITS)
        within = columns[self.n - low :].T @ _all_signs(low).T
        for signs in _all_signs(free - low):
            yield within + (columns[0] + signs @ columns[1 : self.n - low])[:, None]


def _all_signs(bits: int) -> Floats:
    """(2^bits, bits) of 1 and -1, all 1 first."""
    numbers = np.arange(2**bits)[:, None] >> np.arange(bits)
    return np.where(numbers & 1, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class FlippedMeans:
    """Several comparisons' class-macro means, ready to be flipped.

    With signs s, m_c = sum_i s_i y_ic / n_c, theta = sum_c m_c / C, e_i = s_i u_i - sum_c a_ic m_c
    (u_i = sum_c a_ic y_ic, a the weights of the spread) and V = sum e². Classes of the same
    patients have the same a and are summed first. V = sum u² + sum_c m_c z_c, z_c linear in s.
    """

    columns: Floats
    """(patients, comparisons · 2 · groups): m, then z, of each comparison."""
    uncentred: Floats
    """(comparisons,) sum of u²."""
    scale: Floats
    """(comparisons,) sum of (sum_c a_ic |y_ic|)²: what rounding is measured by. u itself may be
    nothing but rounding, where the effects of classes cancel."""
    classes: Floats
    """(comparisons,) C."""

    @classmethod
    def of(cls, values: Sequence[Floats], valid: Sequence[Floats]) -> FlippedMeans:
        """Prepare comparisons of the same patients.

        Args:
            values: per comparison (patients, classes) differences, 0 where there is no cell.
            valid: per comparison (patients, classes); 1 where the cell exists, else 0.
        """
        parts = []
        for y, v in zip(values, valid, strict=True):
            same: dict[bytes, list[int]] = {}
            for c in range(v.shape[1]):
                same.setdefault(v[:, c].tobytes(), []).append(c)
            kinds = v[:, [columns[0] for columns in same.values()]]
            summed = np.stack([y[:, columns].sum(axis=1) for columns in same.values()], axis=1)
            n = kinds.sum(axis=0)
            a = kinds * np.where(n > 1, np.sqrt(n / np.maximum(n - 1, 1)), 0.0) / (n * v.shape[1])
            u = (a * summed).sum(axis=1)
            sizes = [np.abs(y[:, columns]).sum(axis=1) for columns in same.values()]
            size = (a * np.stack(sizes, axis=1)).sum(axis=1)
            m = summed / n
            z = m @ (a.T @ a) - 2 * u[:, None] * a
            parts.append((m, z, float((u**2).sum()), float((size**2).sum())))
        groups = max(m.shape[1] for m, *_ in parts)
        whole = np.zeros((len(values[0]), len(parts), 2, groups))
        for k, (m, z, *_) in enumerate(parts):
            whole[:, k, 0, : m.shape[1]] = m
            whole[:, k, 1, : m.shape[1]] = z
        return cls(
            columns=whole.reshape(len(values[0]), -1),
            uncentred=np.array([square for _, _, square, _ in parts]),
            scale=np.array([scale for *_, scale in parts]),
            classes=np.array([float(v.shape[1]) for v in valid]),
        )

    def flipped(self, patterns: SignPatterns) -> Iterator[tuple[Floats, Floats]]:
        """Squared means and variances, block by block of patterns.

        Args:
            patterns: of the patients.

        Yields:
            Two (comparisons, patterns of the block) arrays.
        """
        k = self.uncentred.size
        for block in patterns.products(self.columns):
            parts = block.reshape(k, 2, -1, block.shape[1])
            theta = parts[:, 0].sum(axis=1) / self.classes[:, None]
            variance = np.einsum("kgp,kgp->kp", parts[:, 0], parts[:, 1])
            variance += self.uncentred[:, None]
            variance[variance <= NO_SPREAD * self.scale[:, None]] = 0.0
            squared = theta**2
            # what rounding leaves of a mean of 0 would, beside a spread of 0, count as a difference
            squared[squared <= NO_SPREAD**2 * self.scale[:, None]] = 0.0
            yield squared, variance


def ratio(squared_mean: Floats, variance: Floats) -> Floats:
    """r² = theta² / (theta² + V): a monotone form of t² in [0, 1]; 0 where both are 0.

    Args:
        squared_mean: theta².
        variance: V, of the same shape.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.sign_patterns import ratio
        >>> ratio(np.array([3.0, 0.0]), np.array([1.0, 0.0])).tolist()
        [0.75, 0.0]
    """
    whole = squared_mean + variance
    return np.divide(squared_mean, whole, out=np.zeros_like(whole), where=whole > 0)


def shifted(cells: Sequence[Cells], mark: float) -> list[Floats]:
    """The differences seen from `mark`: 0 where they equal it.

    Args:
        cells: comparisons.
        mark: 0, or a margin.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of
        >>> from clbench.statistics.sign_patterns import shifted
        >>> shifted([cells_of({"btcv": [[0.1], [0.5]]})], 0.1)[0].ravel().tolist()
        [0.0, 0.4]
    """
    return [np.round(c.values - mark, 12) * c.valid for c in cells]


def family_p_values(
    cells: Sequence[Cells], mark: float, patterns: SignPatterns
) -> tuple[Floats, Floats, Floats]:
    """Two-sided p of "the difference is `mark`", alone and step-down over the family.

    Args:
        cells: comparisons of the same patients.
        mark: the difference that is tested.
        patterns: of the patients that any comparison has.

    Returns:
        (comparisons,) sign of the mean seen from `mark`; p of each comparison alone; adjusted p:
        the largest share of patterns, over the comparisons at least as clear, in which the largest
        statistic among those not clearer reaches it.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of
        >>> from clbench.statistics.sign_patterns import SignPatterns, family_p_values
        >>> cells = [cells_of({"btcv": [[0.1], [0.2], [0.3], [0.4]]})]
        >>> sign, alone, adjusted = family_p_values(cells, 0.0, SignPatterns(n=4))
        >>> sign.tolist(), alone.tolist(), adjusted.tolist()  # 2 of 16 patterns
        ([1.0], [0.125], [0.125])

    Source: Westfall & Young 1993; Romano & Wolf 2005.
    """
    values = shifted(cells, mark)
    means = FlippedMeans.of(values, [c.valid for c in cells])
    observed: Floats | None = None
    alone = stepped = np.zeros(0)
    order = threshold = np.zeros(0, dtype=np.intp)
    for squared_mean, variance in means.flipped(patterns):
        r2 = ratio(squared_mean, variance)
        if observed is None:
            observed = np.sqrt(r2[:, 0])
            order = np.argsort(-observed, kind="stable")
            threshold = (np.maximum(observed - _TIE, 0.0) ** 2)[order, None]
            alone = stepped = np.zeros(observed.size)
        sorted_r2 = r2[order]
        alone = alone + (sorted_r2 >= threshold).sum(axis=1)
        largest = np.maximum.accumulate(sorted_r2[::-1], axis=0)[::-1]
        stepped = stepped + (largest >= threshold).sum(axis=1)
    back = np.argsort(order)
    sign = np.array(
        [np.sign((weights(c.valid)[0] * y).sum()) for c, y in zip(cells, values, strict=True)]
    )
    return (
        sign,
        (alone / patterns.count)[back],
        np.maximum.accumulate(stepped / patterns.count)[back],
    )


def critical_value(
    cells: Sequence[Cells], variances: Sequence[float], patterns: SignPatterns, alpha: float
) -> float:
    """The quantile 1 - alpha of the largest |t| over the family, every class centred at its mean.

    Args:
        cells: comparisons of the same patients, all with spread.
        variances: of each comparison's mean.
        patterns: of the patients that any comparison of the whole family has.
        alpha: level.

    Returns:
        Infinity where the patterns are too few for the level.

    Example:
        >>> from clbench.statistics.macro_estimate import cells_of
        >>> from clbench.statistics.sign_patterns import SignPatterns, critical_value
        >>> cells = [cells_of({"btcv": [[0.1], [0.2], [0.3], [0.4]]})]
        >>> patterns = SignPatterns(n=4)
        >>> [round(critical_value(cells, [0.0042], patterns, alpha), 4) for alpha in (0.05, 0.5)]
        [inf, 0.866]
    """
    if not cells:
        return float("inf")
    centred = [(c.values - c.values.sum(axis=0) / c.valid.sum(axis=0)) * c.valid for c in cells]
    means = FlippedMeans.of(centred, [c.valid for c in cells])
    spread = np.asarray(variances)[:, None]
    largest = []
    for squared_mean, variance in means.flipped(patterns):
        none = variance <= NO_SPREAD * spread
        t2 = np.divide(squared_mean, variance, out=np.zeros_like(variance), where=~none)
        t2[none & (squared_mean > 1e-18 * spread)] = np.inf
        largest.append(t2.max(axis=0))
    joined = np.concatenate(largest)
    joined[0] = np.inf  # the observed pattern counts as the largest
    place = int(np.ceil((1 - alpha) * joined.size - 1e-9)) - 1
    return float(np.sqrt(np.partition(joined, place)[place]))
