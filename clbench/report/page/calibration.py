"""Calibration: how often the report's tests and intervals are wrong, and how much they find.

Simulated studies with a known truth. The numbers lie in `results/calibration/` and are made by
`tests/perf/calibration.py`; here they are read and printed.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

from clbench.report.tables.render import EMPTY, Table

CLAIM = "better or worse, any scope"
SETTLED = "better or worse beyond these training runs"
SIMULATED_ALPHA = 0.05
"""Level of the tests in the simulated studies, see `tests/perf/calibration.py`."""
COVERED = "interval of a difference holds it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One measured rate."""

    question: str
    """What was counted."""
    patients: str
    """Per eval set, such as `8 + 8`."""
    comparisons: int
    """In the family; 0 where nothing is corrected."""
    seeds: int
    """Training runs per study."""
    seed_sd: float
    """Dice that a whole training run moves by (standard deviation)."""
    effect: float
    """True difference, Dice."""
    studies: int
    """Simulated."""
    rate: float
    """Share of the studies."""
    standard_error: float
    """Of the rate."""
    expected: float
    """What theory says; nan where it says nothing."""


@cache
def rates() -> tuple[Rate, ...]:
    """The measured rates, in order of the file."""
    text = resources.files("clbench.calibration").joinpath("calibration.csv").read_text("utf-8")
    return tuple(
        Rate(
            question=r["question"],
            patients=r["patients"],
            comparisons=int(r["comparisons"]),
            seeds=int(r["seeds"]),
            seed_sd=float(r["seed_sd"]),
            effect=float(r["effect"]),
            studies=int(r["studies"]),
            rate=float(r["rate"]),
            standard_error=float(r["standard_error"]),
            expected=float(r["expected"]),
        )
        for r in csv.DictReader(text.splitlines())
    )


def rate(question: str, *, seeds: int, seed_sd: float) -> Rate | None:
    """One rate, or None if it was not measured.

    Args:
        question: what was counted in the simulations, as `calibration.csv` names it.
        seeds: training runs of each strategy in the simulation.
        seed_sd: standard deviation between training runs in the simulation, in Dice.
    """
    found = [r for r in rates() if (r.question, r.seeds, r.seed_sd) == (question, seeds, seed_sd)]
    return found[0] if found else None


def calibration_table() -> Table:
    """One row per question, patients and effects; one column per number of seeds."""
    seeds = sorted({r.seeds for r in rates()})
    by_row: dict[tuple[str, str, int, float, float], dict[int, Rate]] = {}
    for r in rates():
        key = (r.question, r.patients, r.comparisons, r.effect, r.seed_sd)
        by_row.setdefault(key, {})[r.seeds] = r
    rows = []
    for (question, patients, comparisons, effect, seed_sd), by_seeds in by_row.items():
        first = next(iter(by_seeds.values()))
        rows.append(
            (
                question, patients, str(comparisons) if comparisons else EMPTY,
                f"{effect:g}" if effect else EMPTY, f"{seed_sd:g}",
                *(EMPTY if s not in by_seeds else f"{by_seeds[s].rate:.1%}" for s in seeds),
                EMPTY if math.isnan(first.expected) else f"{first.expected:.1%}",
                f"{min(r.studies for r in by_seeds.values()):,}",
            )
        )  # fmt: skip
    error = max(r.standard_error for r in rates())
    return Table(
        title=f"How often tests and intervals are right in simulated studies (alpha "
        f"{100 * SIMULATED_ALPHA:g} %)",
        columns=(
            "what is counted", "patients", "comparisons", "true difference", "sd of a training run",
            *(f"{s} seed{'s'[: s > 1]}" for s in seeds), "nominal", "studies",
        ),
        rows=tuple(rows),
        keys=2,
        notes=(
            (
                f"Standard error at most {error:.1%}. The simulated studies have one or two eval "
                "sets with missing cells; a difference is patient (sd 0.05) + residual (0.02) + "
                "training run, Dice; the comparisons of a family share their reference."
            ),
            (
                "The test is conditional on the trained models: what a whole run moves by is no "
                "patient's doing, and few seeds cannot average it out. Hence the words `for these "
                "training runs`, and no interval of one run can know how far runs differ."
            ),
        ),
    )  # fmt: skip
