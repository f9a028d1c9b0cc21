"""Exploratory: every structure by itself, every eval set by itself.

Nothing here is a finding: these tables say where to look. The whole set of
structure by step by pair tests is one family per benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clbench.report.scores import Key, Scores, StrategyScores
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTest:
    """One structure after one step on one eval set, reference minus other."""

    step: int
    """1-based."""
    eval_set: str
    """Whose test cases."""
    structure: str
    """Canonical name."""
    a: str
    """Reference."""
    b: str
    """The other."""
    hole: str = ""
    """Why there is no number."""
    shared: bool = False
    """One checkpoint: nothing to test."""
    n: int = 0
    """Patients."""
    n_seeds: int = 0
    """Paired training runs."""
    mean_a: float = math.nan
    """Of the reference."""
    mean_b: float = math.nan
    """Of the other."""
    missed: tuple[int, int] = (0, 0)
    """Cells in which each missed the structure completely."""
    pseudomedian: Interval | None = None
    """Hodges-Lehmann with its exact interval."""
    test: PairedTest | None = None
    """Wilcoxon."""
    rank_biserial: float = math.nan
    """Matched-pairs rank-biserial correlation."""
    p_bh: float = math.nan
    """Benjamini-Hochberg over the benchmark."""
    p_holm: float = math.nan
    """Holm over the benchmark."""
    m: int = 0
    """Tests in the family."""
    verdict: Verdict | None = None
    """By `p_bh`; exploratory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetTest:
    """Macro score per patient of one eval set, after the last step, reference minus other."""

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
    mean: Interval | None = None
    """Mean difference, t interval."""
    pseudomedian: Interval | None = None
    """Hodges-Lehmann."""
    wilcoxon: PairedTest | None = None
    """Signed-rank test."""
    t: PairedTest | None = None
    """Paired t-test."""
    sign: PairedTest | None = None
    """Sign test."""
    dz: float = math.nan
    """Mean over the standard deviation of the differences."""
    rank_biserial: float = math.nan
    """Matched-pairs rank-biserial correlation."""
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
    ref = scores.reference
    found = []
    for other in scores.others:
        seeds = common_seeds([ref, other])
        for key in sorted(set(ref.cells) | set(other.cells), key=_order(scores)):
            row = _class_test(scores, other, seeds, key, protocol)
            if row is not None:
                found.append(row)
    p = [math.nan if r.test is None else r.test.p for r in found]
    bh, fw = benjamini_hochberg(p), holm(p)
    return [
        replace(
            r,
            p_bh=float(q),
            p_holm=float(h),
            m=int(np.isfinite(bh).sum()),
            verdict=_class_verdict(r, float(q), protocol),
        )
        for r, q, h in zip(found, bh, fw, strict=True)
    ]


def _order(scores: Scores) -> Callable[[Key], tuple[int, int, bool, str]]:
    names = list(scores.learned_at)
    return lambda key: (key[0], names.index(key[2]), key[1] != scores.home(key[2]), key[1])


def _class_test(
    scores: Scores,
    other: StrategyScores,
    seeds: tuple[int, ...],
    key: tuple[int, str, str],
    protocol: Protocol,
) -> ClassTest | None:
    ref = scores.reference
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
    a, b = (
        m.cells[key].values[[m.seeds.index(s) for s in seeds]].mean(axis=0) for m in (ref, other)
    )
    d = a - b
    if np.isnan(d).all():
        return replace(row, hole="no case contains it") if home else None
    row = replace(
        row,
        n=int((~np.isnan(d)).sum()),
        mean_a=float(np.nanmean(a)),
        mean_b=float(np.nanmean(b)),
        missed=(int(ref.cells[key].missed.sum()), int(other.cells[key].missed.sum())),
    )
    if step == 1 and shared_first(ref, other, seeds):
        return replace(row, shared=True)
    return replace(
        row,
        pseudomedian=hodges_lehmann(d, level=protocol.level),
        test=wilcoxon(d),
        rank_biserial=rank_biserial(d),
    )


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
    found = {}
    for name, values in table(scores, method, endpoint, seeds).items():
        mean = values.mean(axis=0)
        have = (~np.isnan(mean)).sum(axis=1)
        found[name] = np.divide(
            np.nan_to_num(mean).sum(axis=1), have, out=np.full(len(have), np.nan), where=have > 0
        )
    return found


def by_set(scores: Scores, protocol: Protocol) -> list[SetTest]:
    """Per eval set and other strategy: three tests of one difference, side by side."""
    found = []
    for other in scores.others:
        seeds = common_seeds([scores.reference, other])
        pair = (scores.reference, other)
        why = [w for w in (hole(scores, m, FINAL) for m in pair) if w]
        if not seeds:
            why.append(f"{pair[0].label} and {other.label} have no seed in common")
        homes = dict.fromkeys(scores.sources)
        macro = [{} if why else patient_macro(scores, m, FINAL, seeds) for m in pair]
        for name in homes:
            row = SetTest(eval_set=name, a=pair[0].label, b=other.label, n_seeds=len(seeds))
            if why:
                found.append(replace(row, hole=why[0]))
                continue
            d = macro[0][name] - macro[1][name]
            n = int((~np.isnan(d)).sum())
            if n == 0:
                found.append(replace(row, hole="no patient has a score"))
                continue
            tests = (wilcoxon(d), paired_t(d), sign_test(d))
            sd = float(np.nanstd(d, ddof=1)) if n > 1 else math.nan
            found.append(
                replace(
                    row,
                    n=n,
                    mean=t_interval(d, level=protocol.level),
                    pseudomedian=hodges_lehmann(d, level=protocol.level),
                    wilcoxon=tests[0],
                    t=tests[1],
                    sign=tests[2],
                    dz=cohen_dz(d),
                    rank_biserial=rank_biserial(d),
                    tost=tost(d, low=-protocol.margin, high=protocol.margin),
                    posterior=bayes_signed_rank(d, rope=ROPE, seed=protocol.seed),
                    detectable=detectable_effect(n, alpha=protocol.alpha) * sd,
                    disagreement=_disagreement(tests, protocol.alpha),
                )
            )
    return found


def _disagreement(tests: Sequence[PairedTest], alpha: float) -> str:
    found = {t.test: t.p <= alpha for t in tests if not math.isnan(t.p)}
    if len(set(found.values())) < 2:
        return ""
    yes = [name for name, rejects in found.items() if rejects]
    no = [name for name, rejects in found.items() if not rejects]
    return f"{' and '.join(yes)} reject{'s' if len(yes) == 1 else ''}, {' and '.join(no)} not"
