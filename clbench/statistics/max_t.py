"""Families of paired comparisons: which differ, which are equivalent, and by how much.

One family holds the comparisons of one question. Patients are flipped jointly in all of them, and
the largest studentized statistic is compared with its own distribution (step-down max-T), at 0 and
at both margins; so near-copies and comparisons with a large difference cost the others almost
nothing. One simultaneous interval per comparison is matched to these tests: p, interval and word
never contradict each other. Holm's correction is there as a choice.

All of it is conditional on the trained models; `FamilyComparison.over_runs` says how far a
difference carries over to new training runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clbench.errors import DataError
from clbench.statistics.class_macro import Table, checked
from clbench.statistics.corrections import holm
from clbench.statistics.macro_estimate import (
    Cells,
    MacroEstimate,
    cells_of,
    estimate_of,
    half_width,
    half_width_over_runs,
)
from clbench.statistics.sample_size import PatientsNeeded, detectable_difference, patients_needed
from clbench.statistics.sign_patterns import SignPatterns, critical_value, family_p_values
from clbench.statistics.verdicts import (
    NOT_TESTABLE,
    THESE_RUNS,
    Kind,
    Verdict,
    detail_holds_beyond_runs,
    holds_beyond_runs,
    smallest_sample,
    verdict_of,
)
from clbench.types import Floats

Correction = Literal["max-t", "holm"]
SEEDS_TO_GENERALIZE = 3  # with fewer, the variance between training runs is hardly known


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyComparison:
    """One comparison of a family."""

    mean: MacroEstimate
    """Difference (A minus B, or last minus own step) with its variances."""
    ahead: tuple[int, int, float, float]
    """Patients whose own mean difference has the sign of the estimate, patients, and the smallest
    and largest of these differences in size."""
    p_unadjusted: float = math.nan
    """Two-sided p of "no difference", of this comparison alone."""
    p: float = math.nan
    """The same, adjusted over the family; nan = fewer patients than any test needs."""
    p_low: float = math.nan
    """Adjusted p of "the difference is -margin or less": small = not worse by the margin."""
    p_high: float = math.nan
    """Adjusted p of "the difference is +margin or more"."""
    low: float = math.nan
    """Lower end of the simultaneous interval, for these training runs; nan = none."""
    high: float = math.nan
    """Upper end."""
    low_open: bool = False
    """The lower end is 0 or a margin, and that value itself is excluded."""
    high_open: bool = False
    """The same for the upper end."""
    level: float = math.nan
    """Two-sided level of a single comparison that the family's critical value stands for."""
    over_runs: float = math.nan
    """Half-width, at `level`, of the interval over patients and new training runs that a verdict
    must agree with to lose its scope; nan with one run."""
    new_runs: tuple[float, float] = (math.nan, math.nan)
    """Interval of this comparison alone over patients and new training runs; nan with one run."""
    needed: PatientsNeeded | None = None
    """Patients that would decide; None for what is decided or has no interval."""
    level_left: float = math.nan
    """The same as `level`, among the undecided comparisons alone."""
    detectable: float = math.nan
    """Smallest difference that this many patients show with power 0.8."""
    verdict: Verdict = NOT_TESTABLE
    """The word."""

    @property
    def p_equivalent(self) -> float:
        """Adjusted p of "the two differ by the margin or more"."""
        return float(np.max([self.p_low, self.p_high]))  # nan stays nan

    @property
    def beyond_detectable(self) -> bool:
        """Undecided at a difference that `detectable` holds to be shown: no approximation here.

        It looks at the spread, and the sign patterns of few patients are coarser.
        """
        undecided = self.verdict.word in ("undecided", "not testable")
        return undecided and abs(self.mean.estimate) >= self.detectable


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Comparisons corrected together."""

    comparisons: tuple[FamilyComparison, ...]
    """In the order given."""
    m: int
    """Comparisons in the family: those with enough patients."""
    patients: int
    """Patients that are flipped."""
    exact: bool
    """All sign patterns, not a sample."""
    patterns: int
    """Sign patterns the p-values rest on."""
    critical: float
    """Critical value of the simultaneous intervals; infinite or nan = no interval."""


def compare_family(
    tables: Sequence[Table],
    *,
    alpha: float = 0.05,
    margin: float = 0.02,
    kind: Kind = "difference",
    correction: Correction = "max-t",
    draws: int = 100_000,
    seed: int = 0,
) -> Family:
    """Test all comparisons of one question, at 0 and at both margins.

    A comparison with fewer patients than the level needs leaves the family before any score is
    looked at; the family's size says so. Comparisons may differ in seeds, and may lack patients,
    classes or a whole data set (nan).

    Args:
        tables: per comparison a table of differences, see `clbench.statistics.class_macro`. A data
            set has the same patients, in the same order, in all of them.
        alpha: level of the family of "differs" claims, and of the family of margin claims.
        margin: half-width of "equivalent"; declared before looking.
        kind: `difference` between two strategies, or a strategy's own `change`.
        correction: `max-t` or `holm`.
        draws: sign patterns above 20 patients, the observed one included.
        seed: of these patterns.

    Raises:
        DataError: data sets with different patients, or see
            `clbench.statistics.class_macro.checked`.

    Example:
        >>> from clbench.statistics.max_t import compare_family
        >>> ahead = [[0.31], [0.29], [0.30], [0.32], [0.28], [0.30], [0.33]]
        >>> equal = [[0.001], [-0.002], [0.0], [0.001], [0.002], [-0.001], [0.0]]
        >>> family = compare_family([{"lits": ahead}, {"lits": equal}])
        >>> [str(c.verdict) for c in family.comparisons], [c.p for c in family.comparisons]
        (['better, by more than the margin', 'equivalent'], [0.015625, 1.0])

    Source: Westfall & Young 1993 and Romano & Wolf 2005 (step-down max-T); Phipson & Smyth 2010
        (the observed pattern counts); Strassburger & Bretz 2008 and Guilbaud 2008 (intervals that
        match step-down tests).
    Differs: equivalence at one-sided alpha / 2, so that one interval of level 1 - alpha decides
        both questions (ICH E9, 5.5).
    """
    cells = [cells_of(t, patients_of(tables)) for t in tables]
    means = [estimate_of(c) for c in cells]
    comparisons = [
        FamilyComparison(mean=mean, ahead=_ahead(c, mean.estimate))
        for c, mean in zip(cells, means, strict=True)
    ]
    members = [k for k, c in enumerate(cells) if c.n >= smallest_sample(alpha)]
    rows = (
        np.any([cells[k].valid.any(axis=1) for k in members], axis=0)
        if members
        else np.zeros(0, dtype=bool)
    )
    patterns = SignPatterns(int(rows.sum()), draws=draws, seed=seed)
    family = _Tests(
        cells=[
            replace(cells[k], values=cells[k].values[rows], valid=cells[k].valid[rows])
            for k in members
        ],
        comparisons=[comparisons[k] for k in members],
        patterns=patterns,
        alpha=alpha,
        margin=margin,
        kind=kind,
        correction=correction,
    )
    critical = family.judge() if members else math.nan
    for k, result in zip(members, family.comparisons, strict=True):
        comparisons[k] = result
    return Family(
        comparisons=tuple(comparisons),
        m=len(members),
        patients=patterns.n,
        exact=patterns.exact,
        patterns=patterns.represented,
        critical=critical,
    )


@dataclass(kw_only=True, slots=True)
class _Tests:
    """The comparisons of a family that have enough patients, while they are tested."""

    cells: list[Cells]
    comparisons: list[FamilyComparison]
    patterns: SignPatterns
    alpha: float
    margin: float
    kind: Kind
    correction: Correction

    def judge(self) -> float:
        """P-values, intervals, words; the critical value is returned."""
        self._p_values()
        limits = self._limits()
        for k, (plain, limit) in enumerate(zip(self.comparisons, limits, strict=True)):
            t = _matched(plain, limit, self.alpha, self.margin)
            verdict = verdict_of(
                estimate=t.mean.estimate, p=t.p, p_low=t.p_low, p_high=t.p_high, low=t.low,
                high=t.high, alpha=self.alpha, margin=self.margin, kind=self.kind,
            )  # fmt: skip
            if self.correction == "holm" and self._best_holm(k) > self.alpha:
                verdict = NOT_TESTABLE
            self.comparisons[k] = self._scoped(replace(t, verdict=verdict), limit)
        self._planned()
        return max((c for c in limits if not math.isnan(c)), default=math.nan)

    def _p_values(self) -> None:
        """Adjusted p at 0 and at both margins."""
        _, alone, p_zero = self._at(0.0)
        sign_low, _, p_low = self._at(-self.margin)
        sign_high, _, p_high = self._at(self.margin)
        for k, t in enumerate(self.comparisons):
            p = float(p_zero[k])
            low = float(p_low[k]) if sign_low[k] > 0 else 1.0
            high = float(p_high[k]) if sign_high[k] < 0 else 1.0
            self.comparisons[k] = replace(
                t,
                p_unadjusted=float(alone[k]),
                p=p,
                # A difference shown to be above 0 is shown to be above -margin too.
                p_low=min(low, p) if t.mean.estimate > 0 else low,
                p_high=min(high, p) if t.mean.estimate < 0 else high,
            )

    def _at(self, mark: float) -> tuple[Floats, Floats, Floats]:
        """Sign of each mean seen from a mark, its p alone, and its adjusted p."""
        sign, alone, stepped = family_p_values(self.cells, mark, self.patterns)
        return sign, alone, holm(alone) if self.correction == "holm" else stepped

    def _limits(self) -> list[float]:
        """Critical value of each comparison; nan where it has no interval, 0 without spread."""
        spread = [
            k for k, t in enumerate(self.comparisons) if t.mean.variance and not t.mean.single
        ]
        limits = [math.nan if t.mean.single else 0.0 for t in self.comparisons]
        if self.correction == "max-t":
            together = self._critical(spread, self.alpha)
            for k in spread:
                limits[k] = together
        else:
            for k in spread:
                limits[k] = self._critical([k], self.alpha / len(self.comparisons))
        return limits

    def _critical(self, which: Sequence[int], alpha: float) -> float:
        return critical_value(
            [self.cells[k] for k in which],
            [self.comparisons[k].mean.variance for k in which],
            self.patterns,
            alpha,
        )

    def _best_holm(self, k: int) -> float:
        """The smallest Holm-adjusted p that any data could give this comparison.

        Those of at least as many patients may be rejected before it; its p is no smaller than
        theirs, each at its own smallest.
        """
        n = [c.n for c in self.cells]
        return max(
            max(2.0 ** (1 - v), 1 / self.patterns.represented) * sum(other <= v for other in n)
            for v in set(n)
            if v >= n[k]
        )

    def _level(self, df: float, limit: float, m: int) -> float:
        """Two-sided level of one comparison that a critical value stands for."""
        least = self.alpha / m
        if not 0 < limit < math.inf or math.isnan(df):
            return least
        from scipy import special

        return float(np.clip(2 * special.stdtr(df, -limit), least, self.alpha))

    def _scoped(self, t: FamilyComparison, limit: float) -> FamilyComparison:
        """Say whether the verdict holds for new training runs too."""
        level = self._level(t.mean.df, limit, len(self.comparisons))
        reach = math.nan if t.mean.single else half_width_over_runs(t.mean, level)
        new = {"low": t.mean.estimate - reach, "high": t.mean.estimate + reach}
        settled = t.mean.n_seeds >= SEEDS_TO_GENERALIZE and holds_beyond_runs(
            t.verdict, **new, margin=self.margin
        )
        scope = "" if settled or t.verdict.word == "not testable" else THESE_RUNS
        limited = (
            settled
            and bool(t.verdict.detail)
            and not detail_holds_beyond_runs(t.verdict, **new, margin=self.margin)
        )
        verdict = replace(t.verdict, scope=scope, detail_scope=THESE_RUNS if limited else "")
        scoped = replace(t, level=level, over_runs=reach, verdict=verdict)
        if t.mean.n_seeds > 1 and not t.mean.single:
            alone = half_width(t.mean, self.alpha)
            ends = (t.mean.estimate - alone, t.mean.estimate + alone)
            scoped = replace(scoped, new_runs=ends)
        if t.mean.variance and not t.mean.single:
            scoped = replace(
                scoped,
                detectable=detectable_difference(
                    standard_error=t.mean.standard_error, df=t.mean.df, level=level
                ),
            )
        return scoped

    def _planned(self) -> None:
        """For what is undecided: how many patients would decide."""
        left = [
            k
            for k, t in enumerate(self.comparisons)
            if t.verdict.word in ("undecided", "not testable") and t.mean.variance
            and not t.mean.single and not math.isnan(t.low)
        ]  # fmt: skip
        together = self._critical(left, self.alpha) if self.correction == "max-t" else math.nan
        for k in left:
            t = self.comparisons[k]
            level = self._level(t.mean.df, together, len(left))
            self.comparisons[k] = replace(
                t,
                level_left=level,
                needed=patients_needed(
                    n=t.mean.n, estimate=t.mean.estimate, standard_error=t.mean.standard_error,
                    df=t.mean.df, level=level, margin=self.margin,
                ),
            )  # fmt: skip


def _matched(t: FamilyComparison, limit: float, alpha: float, margin: float) -> FamilyComparison:
    """Give a comparison its interval, the ends moved to 0 or a margin where a test says otherwise.

    A limit that is nan or infinite means no interval.
    """
    if not math.isfinite(limit):
        return t
    estimate, reach = t.mean.estimate, limit * t.mean.standard_error
    low, low_open = _end(
        estimate - reach,
        estimate,
        {-margin: t.p_low <= alpha, 0.0: estimate > 0 and t.p <= alpha},
    )
    mirrored, high_open = _end(
        -estimate - reach,
        -estimate,
        {-margin: t.p_high <= alpha, 0.0: estimate < 0 and t.p <= alpha},
    )
    return replace(t, low=low, high=0.0 - mirrored, low_open=low_open, high_open=high_open)


def _end(plain: float, estimate: float, shown: Mapping[float, bool]) -> tuple[float, bool]:
    """A lower end that excludes the marks a test refutes, and no others."""
    star = max((mark for mark, yes in shown.items() if yes), default=-math.inf)
    ring = min(
        (mark for mark, yes in shown.items() if not yes and star < mark < estimate),
        default=math.inf,
    )
    end = min(max(plain, star), ring)
    return end + 0.0, end == star and plain < star


def patients_of(tables: Sequence[Table]) -> dict[str, int]:
    """Data set → patients, the same in every table that has the set.

    Raises:
        DataError: data sets with different patients.

    Example:
        >>> import numpy as np
        >>> from clbench.statistics.max_t import patients_of
        >>> first = {"btcv": np.zeros((3, 2))}
        >>> patients_of([first, {**first, "lits": np.zeros((5, 1))}])
        {'btcv': 3, 'lits': 5}
    """
    sizes: dict[str, int] = {}
    for table in tables:
        for name, array in checked(table).items():
            if sizes.setdefault(name, array.shape[1]) != array.shape[1]:
                raise DataError(
                    "comparisons of one family are over different patients",
                    where=name,
                    expected=f"{sizes[name]} patients",
                    got=array.shape[1],
                    next_step="write nan where a comparison lacks a patient",
                )
    return sizes


def _ahead(cells: Cells, estimate: float) -> tuple[int, int, float, float]:
    """How many patients go the way of the estimate, and by how little and much."""
    have = cells.valid.any(axis=1)
    if not have.any():
        return 0, 0, math.nan, math.nan
    own = cells.values[have].sum(axis=1) / cells.valid[have].sum(axis=1)
    own = -own if estimate < 0 else own
    same = own[own > 0]
    if same.size == 0:
        return 0, own.size, math.nan, math.nan
    return same.size, own.size, float(same.min()), float(same.max())
