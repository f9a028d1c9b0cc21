"""Exploratory: every structure by itself, every eval set by itself.

Nothing here is a finding: these tables say where to look. The whole set of
structure by step by pair tests is one family per benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clbench.report.scores import Cells, Key, Scores, StrategyScores, mean_over_have
from clbench.report.significance.confirmatory import common_seeds
from clbench.report.significance.endpoints import FINAL, Endpoint, hole, shared_first, table
from clbench.report.study import Protocol
from clbench.statistics.corrections import benjamini_hochberg, holm
from clbench.statistics.equivalence import Equivalence, Posterior, bayes_signed_rank, tost
from clbench.statistics.intervals import (
    Interval,
    cohen_dz,
    detectable_effect,
    hodges_lehmann,
    rank_biserial,
    t_interval,
)
from clbench.statistics.paired_tests import PairedTest, paired_t, sign_test, wilcoxon
from clbench.statistics.verdicts import NOT_TESTABLE, THESE_RUNS, Verdict, smallest_sample
from clbench.types import Floats

ROPE = 0.01
"""Half-width of "practically equal" in the Bayesian test, Dice."""


NOT_TESTED, NO_INTERVAL = wilcoxon([]), Interval()
"""What stands where there is nothing to test."""


@dataclass(frozen=True, kw_only=True)
class PairTest:
    """Reference minus other on one eval set, tested without a claim."""

    eval_set: str
    """Whose patients."""
    a: str
    """Reference."""
    b: str
    """The other."""
    hole: str = ""
    """Why there is no number."""
    n: int = 0
    """Patients."""
    n_seeds: int = 0
    """Paired training runs."""
    pseudomedian: Interval = NO_INTERVAL
    """Hodges-Lehmann with its exact interval."""
    rank_biserial: float = math.nan
    """Matched-pairs rank-biserial correlation."""


@dataclass(frozen=True, kw_only=True)
class ClassTest(PairTest):
    """One structure after one step on one eval set, reference minus other."""

    step: int
    """1-based."""
    structure: str
    """Canonical name."""
    shared: bool = False
    """One checkpoint: nothing to test."""
    mean_a: float = math.nan
    """Of the reference."""
    mean_b: float = math.nan
    """Of the other."""
    missed: tuple[int, int] = (0, 0)
    """Cells in which each missed the structure completely."""
    test: PairedTest = NOT_TESTED
    """Wilcoxon."""
    p_bh: float = math.nan
    """Benjamini-Hochberg over the benchmark."""
    p_holm: float = math.nan
    """Holm over the benchmark."""
    m: int = 0
    """Tests in the family."""
    verdict: Verdict | None = None
    """By `p_bh`; exploratory."""


@dataclass(frozen=True, kw_only=True)
class SetTest(PairTest):
    """Macro score per patient of one eval set, after the last step, reference minus other."""

    mean: Interval = NO_INTERVAL
    """Mean difference, t interval."""
    tests: tuple[PairedTest, ...] = (NOT_TESTED,) * 3
    """Signed-rank test, paired t-test, sign test."""
    dz: float = math.nan
    """Mean over the standard deviation of the differences."""
    tost: Equivalence | None = None
    """Two one-sided t-tests at the declared margin."""
    posterior: Posterior | None = None
    """Bayesian signed-rank test."""
    detectable: float = math.nan
    """Smallest difference found with power 0.8 at alpha, Dice."""
    disagreement: str = ""
    """Which of the three tests says otherwise at alpha; empty = none."""


def by_class(scores: Scores, protocol: Protocol) -> list[ClassTest]:
    """Every structure, step and pair; one family of Wilcoxon tests for the benchmark."""
    ref, names = scores.reference, list(scores.learned_at)

    def order(key: Key) -> tuple[int, int, bool, str]:
        step, eval_set, structure = key
        return step, names.index(structure), eval_set != scores.home(structure), eval_set

    rows = [
        row
        for other in scores.others
        for key in sorted({*ref.cells, *other.cells}, key=order)
        if (row := _class_test(scores, other, key, protocol)) is not None
    ]
    p = [row.test.p for row in rows]
    bh, fw = benjamini_hochberg(p).tolist(), holm(p).tolist()
    m = sum(not math.isnan(x) for x in p)
    return [
        replace(row, p_bh=q, p_holm=h, m=m, verdict=_class_verdict(row, q, protocol))
        for row, q, h in zip(rows, bh, fw, strict=True)
    ]


def _class_test(
    scores: Scores,
    other: StrategyScores,
    key: Key,
    protocol: Protocol,
) -> ClassTest | None:
    ref = scores.reference
    seeds = common_seeds([ref, other])
    step, eval_set, structure = key
    row = ClassTest(
        step=step, eval_set=eval_set, structure=structure, a=ref.label, b=other.label,
        n_seeds=len(seeds),
    )  # fmt: skip
    home = eval_set == scores.home(structure)
    for method in (ref, other):
        if key not in method.cells:
            return replace(row, hole=f"{method.label}: no such scores") if home else None
        if method.cells[key].hole:
            return replace(row, hole=f"{method.label}: {method.cells[key].hole}")
    if not seeds:
        return replace(row, hole=f"{ref.label} and {other.label} have no seed in common")
    shared = [(m.cells[key], [m.seeds.index(s) for s in seeds]) for m in (ref, other)]
    a, b = (cells.values[rows].mean(axis=0) for cells, rows in shared)
    d = a - b
    if np.isnan(d).all():
        return replace(row, hole="no case contains it") if home else None
    row = replace(
        row,
        n=int((~np.isnan(d)).sum()),
        mean_a=float(np.nanmean(a)),
        mean_b=float(np.nanmean(b)),
        missed=(_missed(*shared[0]), _missed(*shared[1])),
    )
    if step == 1 and shared_first(ref, other, seeds):
        return replace(row, shared=True)
    return replace(
        row,
        pseudomedian=hodges_lehmann(d, level=protocol.level),
        test=wilcoxon(d),
        rank_biserial=rank_biserial(d),
    )


def _missed(cells: Cells, rows: Sequence[int]) -> int:
    """Cases times seeds in which a structure was missed completely, in some seeds."""
    return int(cells.missed[rows].sum())


def _class_verdict(row: ClassTest, p: float, protocol: Protocol) -> Verdict | None:
    """The word of one structure; `not testable` only where its patients are too few for any p."""
    if row.hole:
        return None
    if row.shared:
        return Verdict(word="shared")
    if row.n < smallest_sample(protocol.alpha):
        return NOT_TESTABLE
    if p <= protocol.alpha and row.rank_biserial != 0:
        return Verdict(word="better" if row.rank_biserial > 0 else "worse", scope=THESE_RUNS)
    return Verdict(word="undecided", scope=THESE_RUNS)


def patient_macro(
    scores: Scores, method: StrategyScores, endpoint: Endpoint, seeds: tuple[int, ...]
) -> dict[str, Floats]:
    """Eval set → (patients,): mean over the structures a patient has, seeds averaged.

    Args:
        scores: the runs of a benchmark.
        method: one strategy of it.
        endpoint: the question.
        seeds: seeds to average over.
    """
    return {
        name: mean_over_have(values.mean(axis=0), axis=1)
        for name, values in table(scores, method, endpoint, seeds).items()
    }


def by_set(scores: Scores, protocol: Protocol) -> list[SetTest]:
    """Per eval set and other strategy: three tests of one difference, side by side."""
    rows: dict[tuple[str, str], SetTest] = {}
    differences: dict[tuple[str, str], Floats] = {}
    for other in scores.others:
        pair = (scores.reference, other)
        seeds = common_seeds(pair)
        why = [w for w in (hole(scores, m, FINAL) for m in pair) if w]
        if not seeds:
            why.append(f"{pair[0].label} and {other.label} have no seed in common")
        macro = [{} if why else patient_macro(scores, m, FINAL, seeds) for m in pair]
        for name in scores.homes:
            row = SetTest(eval_set=name, a=pair[0].label, b=other.label, n_seeds=len(seeds))
            rows[other.label, name] = replace(row, hole=why[0]) if why else row
            if not why:
                differences[other.label, name] = macro[0][name] - macro[1][name]
    for name in scores.homes:  # set by set: tests of one set share the draws of their posteriors
        for other in scores.others:
            if (at := (other.label, name)) in differences:
                rows[at] = _set_test(rows[at], differences[at], protocol)
    return list(rows.values())


def _set_test(row: SetTest, d: Floats, protocol: Protocol) -> SetTest:
    """Three tests, intervals and effect sizes of one difference per patient."""
    n = int((~np.isnan(d)).sum())
    if n == 0:
        return replace(row, hole="no patient has a score")
    tests = (wilcoxon(d), paired_t(d), sign_test(d))
    sd = float(np.nanstd(d, ddof=1)) if n > 1 else math.nan
    return replace(
        row,
        n=n,
        mean=t_interval(d, level=protocol.level),
        pseudomedian=hodges_lehmann(d, level=protocol.level),
        tests=tests,
        dz=cohen_dz(d),
        rank_biserial=rank_biserial(d),
        tost=tost(d, low=-protocol.margin, high=protocol.margin),
        posterior=bayes_signed_rank(d, rope=ROPE, seed=protocol.seed),
        detectable=detectable_effect(n, alpha=protocol.alpha) * sd,
        disagreement=_disagreement(tests, protocol.alpha),
    )


def _disagreement(tests: Sequence[PairedTest], alpha: float) -> str:
    tested = [t for t in tests if not math.isnan(t.p)]
    yes, no = ([t.test for t in tested if (t.p <= alpha) is rejects] for rejects in (True, False))
    if not (yes and no):
        return ""
    return f"{' and '.join(yes)} reject{'s' if len(yes) == 1 else ''}, {' and '.join(no)} not"
