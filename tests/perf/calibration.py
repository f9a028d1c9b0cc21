"""How often the confirmatory test is wrong: simulated studies whose truth is known, as a table.

`python tests/perf/calibration.py [studies] [FILE.csv]`; 2,000 studies take a few minutes on one core.

A study has two eval sets as in a course of two steps: 12 patients with 5 structures, of which 4
patients lack 2, and 20 patients with 1 structure, of which 2 lack it. A difference between two
strategies is patient (sd 0.05, the same under every seed) + residual (sd 0.02 per seed, patient and
structure) + training run (sd 0, 0.01 or 0.02, the same for all patients of a seed), all in Dice.
Under the null all three have mean 0.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clbench.statistics.bootstrap import crossed_interval, seed_means
from clbench.statistics.class_macro import per_patient_weights, strata
from clbench.statistics.corrections import holm, verdict
from clbench.statistics.intervals import detectable_effect, t_interval
from clbench.statistics.paired_tests import signed_rank_null, wilcoxon

Floats = NDArray[np.float64]
Study = dict[str, Floats]
PATIENT, RESIDUAL = 0.05, 0.02
ALPHA, MARGIN = 0.05, 0.02


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured rate."""

    question: str
    """What was counted."""
    seeds: int
    """Training runs per study."""
    seed_sd: float
    """Dice that a whole training run moves by."""
    effect: float
    """True difference, Dice."""
    studies: int
    """Simulated."""
    rate: float
    """Share of the studies."""
    standard_error: float
    """Of the rate."""
    expected: float
    """What theory says, or nan."""


def holes(patients: int, structures: int, lacking: int, missing: int) -> NDArray[np.bool_]:
    """(patients, structures): the last `missing` structures of the last `lacking` patients."""
    absent = np.zeros((patients, structures), dtype=bool)
    absent[patients - lacking :, structures - missing :] = True
    return absent


SETS = {"a": holes(12, 5, 4, 2), "b": holes(20, 1, 2, 1)}
ONE = {"a": holes(12, 5, 0, 0)}


def studies(
    count: int,
    *,
    seeds: int,
    seed_sd: float,
    effect: float = 0.0,
    sets: dict[str, NDArray[np.bool_]],
    start: int = 0,
) -> Iterator[Study]:
    """Differences A minus B: eval set → (seeds, patients, structures)."""
    rng = np.random.default_rng([20240607, start])
    for _ in range(count):
        run = rng.normal(0, seed_sd, (seeds, 1, 1)) if seed_sd else np.zeros((seeds, 1, 1))
        study = {}
        for name, absent in sets.items():
            n, c = absent.shape
            d = (
                effect
                + run
                + rng.normal(0, PATIENT, (1, n, 1))
                + rng.normal(0, RESIDUAL, (seeds, n, c))
            )
            d[:, absent] = np.nan
            study[name] = d
        yield study


def above(weights: Floats, level: float) -> float:
    """Exact share of the 2^n sign patterns whose sum is at least `level`.

    The patterns of the first half are met with the sorted ones of the second: 2^(n/2) steps.
    """
    halves = []
    for part in (weights[: weights.size // 2], weights[weights.size // 2 :]):
        sums = np.zeros(1)
        for w in part:
            sums = np.concatenate([sums + w, sums - w])
        halves.append(np.sort(sums))
    slack = 1e-9 * float(np.abs(weights).sum())
    reached = np.searchsorted(halves[1], level - slack - halves[0], side="left")
    return float((halves[1].size - reached).sum() / 2.0**weights.size)


def p_two_sided(study: Study, shift: float = 0.0) -> tuple[float, float, float]:
    """Macro difference minus `shift`, its exact two-sided p, and its one-sided p of "above"."""
    weights = per_patient_weights(strata({k: v - shift for k, v in study.items()}))
    weights = weights[np.abs(weights) > 1e-12]
    total = float(weights.sum())
    return total, min(1.0, 2 * above(weights, abs(total))), above(weights, total)


def counted(question: str, hits: list[bool], *, expected: float = math.nan, **more: float) -> Row:
    rate, n = float(np.mean(hits)), len(hits)
    return Row(
        question=question, seeds=int(more["seeds"]), seed_sd=more["seed_sd"],
        effect=more.get("effect", 0.0), studies=n, rate=rate,
        standard_error=math.sqrt(rate * (1 - rate) / n), expected=expected,
    )  # fmt: skip


def null(count: int, seeds: int, seed_sd: float, draws: int) -> list[Row]:
    """No systematic difference: how often is one claimed?"""
    claims, outside, settled = [], [], []
    for i, study in enumerate(studies(count, seeds=seeds, seed_sd=seed_sd, sets=SETS, start=seeds)):
        estimate, p, _ = p_two_sided(study)
        interval = crossed_interval(study, seed=i, draws=draws)
        over_seeds = t_interval(seed_means(study))
        word = verdict(
            estimate=estimate, p_adjusted=p, smallest_p=0.0, m=1, n_seeds=seeds,
            seed_interval=(over_seeds.low, over_seeds.high) if seeds > 1 else None,
        )  # fmt: skip
        claims.append(p <= ALPHA)
        outside.append(not interval.low <= 0 <= interval.high)
        settled.append(word.word in ("better", "worse") and not word.scope)
    found = {
        "better or worse, any scope": (claims, ALPHA if seed_sd == 0 else math.nan),
        "0 outside the crossed bootstrap interval": (outside, ALPHA),
        "better or worse beyond these training runs": (settled, math.nan),
    }
    return [
        counted(q, hits, expected=e, seeds=seeds, seed_sd=seed_sd)
        for q, (hits, e) in found.items()
        if seeds >= 5 or q != "better or worse beyond these training runs"
    ]


def family(count: int, seeds: int, m: int = 3) -> Row:
    """Holm over m comparisons with one reference: how often is anything claimed?"""
    hits = []
    for reference, *others in zip(
        *(studies(count, seeds=seeds, seed_sd=0.0, sets=SETS, start=100 + k) for k in range(m + 1)),
        strict=True,
    ):
        pairs = [{k: (reference[k] - o[k]) / math.sqrt(2) for k in o} for o in others]
        hits.append(bool(np.any(holm([p_two_sided(d)[1] for d in pairs]).adjusted <= ALPHA)))
    return counted(
        f"any claim in a Holm family of {m}", hits, expected=ALPHA, seeds=seeds, seed_sd=0.0
    )


def equivalence(count: int, seeds: int) -> Row:
    """True difference right at the margin: how often is "equivalent" claimed?"""
    hits = []
    for study in studies(count, seeds=seeds, seed_sd=0.0, effect=MARGIN, sets=SETS, start=200):
        above_low = p_two_sided(study, -MARGIN)[2]
        below_high = p_two_sided({k: -v for k, v in study.items()}, -MARGIN)[2]
        hits.append(max(above_low, below_high) <= ALPHA)
    return counted(
        "equivalent, at a true difference of the margin", hits, expected=ALPHA, seeds=seeds, seed_sd=0.0,
        effect=MARGIN,
    )  # fmt: skip


def one_structure(count: int, seeds: int) -> Row:
    """Wilcoxon on one structure of 12 patients; its largest attainable level is below alpha."""
    hits = [
        wilcoxon(s["a"][:, :, 0].mean(axis=0)).p <= ALPHA
        for s in studies(count, seeds=seeds, seed_sd=0.0, sets=ONE, start=300)
    ]
    reachable = 2 * np.cumsum(signed_rank_null(np.arange(1.0, 13.0)))[::2]
    return counted(
        "better or worse, Wilcoxon on one structure of 12 patients", hits,
        expected=float(reachable[reachable <= ALPHA].max()), seeds=seeds, seed_sd=0.0,
    )  # fmt: skip


def power(count: int, seeds: int, wanted: float) -> Row:
    """A true difference that a t-test of 12 patients finds with power `wanted`."""
    sd = math.sqrt(PATIENT**2 + RESIDUAL**2 / (seeds * 5))
    effect = detectable_effect(12, alpha=ALPHA, power=wanted) * sd
    hits = [
        p_two_sided(s)[1] <= ALPHA
        for s in studies(count, seeds=seeds, seed_sd=0.0, effect=effect, sets=ONE, start=400)
    ]
    return counted(
        "power, 12 patients", hits, expected=wanted, seeds=seeds, seed_sd=0.0, effect=effect
    )


def measure(count: int, *, draws: int = 1000, say: Callable[[str], object] = print) -> list[Row]:
    """Every row of the table."""
    rows: list[Row] = []
    begin = time.perf_counter()
    jobs: list[Callable[[], list[Row]]] = [
        lambda seeds=seeds, sd=sd: null(count, seeds, sd, draws)  # type: ignore[misc]
        for sd in (0.0, 0.01, 0.02)
        for seeds in (1, 3, 5)
    ]
    jobs += [
        lambda: [family(count, 3)],
        lambda: [equivalence(count, 3)],
        lambda: [one_structure(count, 3)],
    ]
    jobs += [lambda w=w: [power(count, 3, w)] for w in (0.5, 0.8, 0.95)]  # type: ignore[misc]
    for job in jobs:
        new = job()
        rows += new
        for r in new:
            say(
                f"{r.rate:7.2%} ± {r.standard_error:.2%}  {r.question}, {r.seeds} seed(s), sd {r.seed_sd}"
            )
        say(f"{time.perf_counter() - begin:.0f} s")
    return rows


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([f.name for f in fields(Row)])
        out.writerows([repr(v) if isinstance(v, float) else v for v in astuple(r)] for r in rows)


if __name__ == "__main__":
    found = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
    if len(sys.argv) > 2:
        write(found, Path(sys.argv[2]))
