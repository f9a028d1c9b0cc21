"""How often the confirmatory tests and intervals are wrong, and how much they find, as a table.

`python tests/perf/calibration.py [SCALE] [FILE.csv]`; SCALE 1 takes about 15 minutes on one core,
SCALE 0.1 a tenth of the studies.

Simulated studies whose truth is known. Patients of one or two eval sets: `8` (5 structures, of
which 2 patients lack 2), `12` (5, 4 lack 2), and `8 + 8` and `12 + 20` with a second set of one
structure. A difference between two strategies is patient (sd 0.05, the same under every seed) +
residual (sd 0.02 per seed, patient and structure) + training run (sd 0, 0.01 or 0.02, the same for
all patients of a seed), all in Dice. The comparisons of a family share their reference.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clbench.statistics.macro_estimate import macro_interval
from clbench.statistics.max_t import Correction, FamilyComparison, compare_family
from clbench.statistics.paired_tests import signed_rank_null, wilcoxon
from clbench.statistics.ranking import tie_groups

Floats = NDArray[np.float64]
Table = dict[str, Floats]
PATIENT, RESIDUAL = 0.05, 0.02
ALPHA, MARGIN = 0.05, 0.02
DRAWS = 1000
"""Sign patterns above 20 patients: the add-one keeps the level with any number of them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured rate."""

    question: str
    """What was counted."""
    patients: str
    """Per eval set."""
    comparisons: int
    """In the family; 0 where nothing is corrected."""
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


SETS = {
    "8": {"a": holes(8, 5, 2, 2)},
    "12": {"a": holes(12, 5, 4, 2)},
    "8 + 8": {"a": holes(8, 5, 2, 2), "b": holes(8, 1, 1, 1)},
    "12 + 20": {"a": holes(12, 5, 4, 2), "b": holes(20, 1, 2, 1)},
}


def families(
    count: int,
    *,
    patients: str,
    seeds: int,
    seed_sd: float = 0.0,
    effects: Sequence[float] = (0.0,),
    start: int = 0,
) -> Iterator[list[Table]]:
    """Per study one table per comparison: reference minus other, whose true mean is its effect."""
    rng = np.random.default_rng([20240607, start])
    share = 1 / math.sqrt(2)  # two strategies' errors make one difference

    def errors() -> Table:
        run = rng.normal(0, seed_sd * share, (seeds, 1, 1))
        made = {}
        for name, absent in SETS[patients].items():
            n, c = absent.shape
            made[name] = (
                run
                + rng.normal(0, PATIENT * share, (1, n, 1))
                + rng.normal(0, RESIDUAL * share, (seeds, n, c))
            )
            made[name][:, absent] = np.nan
        return made

    for _ in range(count):
        reference = errors()
        yield [
            {name: reference[name] - other[name] + effect for name in reference}
            for effect, other in ((e, errors()) for e in effects)
        ]


def compared(tables: Sequence[Table], correction: Correction = "max-t") -> list[FamilyComparison]:
    """The family's comparisons."""
    found = compare_family(tables, alpha=ALPHA, margin=MARGIN, correction=correction, draws=DRAWS)
    return list(found.comparisons)


def differs(c: FamilyComparison) -> bool:
    return c.verdict.word in ("better", "worse")


def counted(question: str, hits: Sequence[float], patients: str, **more: float) -> Row:
    rate, n = float(np.mean(hits)), len(hits)
    return Row(
        question=question, patients=patients, comparisons=int(more.get("m", 0)),
        seeds=int(more["seeds"]), seed_sd=more.get("seed_sd", 0.0), effect=more.get("effect", 0.0),
        studies=n, rate=rate, standard_error=float(np.std(hits)) / math.sqrt(n),
        expected=more.get("expected", math.nan),
    )  # fmt: skip


def coverage(count: int, patients: str, seeds: int, seed_sd: float) -> list[Row]:
    """How often the interval of a single mean difference holds the truth."""
    hits = []
    for (table,) in families(count, patients=patients, seeds=seeds, seed_sd=seed_sd, start=seeds):
        interval = macro_interval(table, level=1 - ALPHA)
        hits.append(interval.low <= 0 <= interval.high)
    return [
        counted(
            "interval of a difference holds it", hits, patients, seeds=seeds, seed_sd=seed_sd,
            expected=1 - ALPHA,
        )
    ]  # fmt: skip


def claims(count: int, patients: str, seeds: int, seed_sd: float) -> list[Row]:
    """One comparison without a true difference: how often is one claimed?"""
    these, beyond = [], []
    for family in families(count, patients=patients, seeds=seeds, seed_sd=seed_sd, start=10):
        (c,) = compared(family)
        these.append(differs(c))
        beyond.append(differs(c) and not c.verdict.scope)
    more = {"seeds": seeds, "seed_sd": seed_sd, "m": 1}
    rows = [
        counted(
            "better or worse, any scope", these, patients,
            expected=math.nan if seed_sd else ALPHA, **more,
        )
    ]  # fmt: skip
    if seeds > 1:
        rows.append(counted("better or worse beyond these training runs", beyond, patients, **more))
    return rows


def false_claims(count: int, patients: str, m: int, correction: Correction) -> list[Row]:
    """A family without a true difference: how often is any claimed, how often do all ends hold?"""
    wrong, inside = [], []
    for family in families(count, patients=patients, seeds=3, effects=[0.0] * m, start=100 + m):
        found = compared(family, correction)
        wrong.append(any(differs(c) for c in found))
        inside.append(all(math.isnan(c.low) or c.low <= 0 <= c.high for c in found))
    more = {"seeds": 3, "m": m}
    rows = [counted(f"any false difference, {correction}", wrong, patients, expected=ALPHA, **more)]
    if correction == "max-t":
        rows.append(
            counted("all simultaneous intervals hold", inside, patients, expected=1 - ALPHA, **more)
        )
    return rows


def beside_true_ones(count: int, patients: str, m: int) -> list[Row]:
    """Half of the family loses 0.8 Dice: how often is a difference claimed among the others?"""
    lost = m // 2
    effects = [0.8] * lost + [0.0] * (m - lost)
    hits = [
        any(differs(c) for c in compared(family)[lost:])
        for family in families(count, patients=patients, seeds=3, effects=effects, start=200)
    ]
    return [
        counted(
            "any false difference beside true ones, max-t", hits, patients, seeds=3, m=m,
            effect=0.8, expected=ALPHA,
        )
    ]  # fmt: skip


def false_equivalence(count: int, patients: str, m: int) -> list[Row]:
    """Every true difference is the margin: how often is any called equivalent?"""
    hits = [
        any(c.verdict.word == "equivalent" for c in compared(family))
        for family in families(count, patients=patients, seeds=3, effects=[MARGIN] * m, start=300)
    ]
    return [
        counted(
            "any false equivalence at the margin, max-t", hits, patients, seeds=3, m=m,
            effect=MARGIN, expected=ALPHA / 2,
        )
    ]  # fmt: skip


def power(count: int, patients: str, m: int, effect: float) -> list[Row]:
    """One of the family differs, or all do: how often is it found, by correction?"""
    rows = []
    corrections: tuple[Correction, ...] = ("max-t", "holm")
    for what, effects in (("one", [effect] + [0.0] * (m - 1)), ("all", [effect] * m)):
        found: dict[Correction, list[float]] = {c: [] for c in corrections}
        for family in families(count, patients=patients, seeds=3, effects=effects, start=400 + m):
            for correction in corrections:
                hits = [c.verdict.word == "better" for c in compared(family, correction)]
                found[correction].append(float(np.mean(hits[:1] if what == "one" else hits)))
        rows += [
            counted(
                f"power, {what} of the family, {c}", hits, patients, seeds=3, m=m, effect=effect
            )
            for c, hits in found.items()
        ]
    return rows


def strict_winner(count: int, patients: str, methods: int) -> list[Row]:
    """How often a league of equal methods names a single best one."""
    rng, hits = np.random.default_rng([20240607, 7]), []
    share = 1 / math.sqrt(2)
    for _ in range(count):
        tables: list[Table] = [{} for _ in range(methods)]
        for name, absent in SETS[patients].items():
            n, c = absent.shape
            anatomy = rng.normal(0.8, PATIENT, (1, n, c))  # the same for everybody
            for each in tables:
                own = rng.normal(0, PATIENT * share, (1, n, 1))
                each[name] = anatomy + own + rng.normal(0, RESIDUAL * share, (1, n, c))
                each[name][:, absent] = np.nan
        hits.append(tie_groups(tables, alpha=ALPHA, draws=DRAWS).ranks[0] == (1, 1))
    return [
        counted("a single best among equal methods", hits, patients, m=math.comb(methods, 2),
                seeds=1)
    ]  # fmt: skip


def one_structure(count: int) -> list[Row]:
    """Wilcoxon on one structure of 12 patients; its largest attainable level is below alpha."""
    hits = [
        wilcoxon(table["a"][:, :, 0].mean(axis=0)).p <= ALPHA
        for (table,) in families(count, patients="12", seeds=3, start=500)
    ]
    reachable = 2 * np.cumsum(signed_rank_null(np.arange(1.0, 13.0)))[::2]
    return [
        counted(
            "better or worse, Wilcoxon on one structure", hits, "12", seeds=3, m=1,
            expected=float(reachable[reachable <= ALPHA].max()),
        )
    ]  # fmt: skip


def measure(scale: float = 1.0, *, say: Callable[[str], object] = print) -> list[Row]:
    """Every row of the table."""

    def n(studies: int) -> int:
        return max(20, round(scale * studies))

    jobs: list[Callable[[], list[Row]]] = [
        lambda p=p, s=s, sd=sd: coverage(n(4000), p, s, sd)  # type: ignore[misc]
        for p in ("8 + 8", "12 + 20")
        for sd in (0.0, 0.01, 0.02)
        for s in (1, 3, 5)
    ]
    jobs += [
        lambda s=s, sd=sd: claims(n(2000), "12 + 20", s, sd)  # type: ignore[misc]
        for sd in (0.0, 0.01, 0.02)
        for s in (1, 3, 5)
    ]
    jobs += [
        lambda p=p, m=m, c=c, k=k: false_claims(n(k), p, m, c)  # type: ignore[misc]
        for p, m, k in (
            ("8", 3, 2000),
            ("8", 13, 1000),
            ("8 + 8", 3, 4000),
            ("8 + 8", 13, 2000),
            ("12 + 20", 3, 4000),
            ("12 + 20", 13, 2000),
        )
        for c in ("max-t", "holm")
        if c == "max-t" or p == "8"
    ]
    jobs += [
        lambda: beside_true_ones(n(1000), "8", 13),
        lambda: false_equivalence(n(1000), "8", 13),
    ]
    jobs += [
        lambda p=p, m=m, e=e: power(n(500), p, m, e)  # type: ignore[misc]
        for p, e in (("8", 0.075), ("12", 0.055), ("12 + 20", 0.045))
        for m in (3, 13)
    ]
    jobs += [
        lambda p=p: strict_winner(n(2000), p, 10)  # type: ignore[misc]
        for p in ("8", "8 + 8", "12 + 20")
    ]
    jobs.append(lambda: one_structure(n(2000)))
    rows: list[Row] = []
    begin = time.perf_counter()
    for job in jobs:
        new = job()
        rows += new
        for r in new:
            say(
                f"{r.rate:7.2%} ± {r.standard_error:.2%}  {r.question}; {r.patients} patients, "
                f"{r.comparisons} comparisons, {r.seeds} seed(s), sd {r.seed_sd}"
            )
        say(f"{time.perf_counter() - begin:.0f} s")
    return rows


def write(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([f.name for f in fields(Row)])
        out.writerows([repr(v) if isinstance(v, float) else v for v in astuple(r)] for r in rows)


if __name__ == "__main__":
    found = measure(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
    if len(sys.argv) > 2:
        write(found, Path(sys.argv[2]))
