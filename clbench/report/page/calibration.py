"""Calibration: how often the report's tests claim something in simulated studies without a truth.

The numbers lie in `results/calibration/` and are made by
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
OUTSIDE = "0 outside the crossed bootstrap interval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """One measured rate."""

    question: str
    """What was counted."""
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
    """One row per question and effect of the training run; one column per number of seeds."""
    seeds = sorted({r.seeds for r in rates() if r.question == CLAIM})
    found: dict[tuple[str, float, float], dict[int, Rate]] = {}
    for r in rates():
        found.setdefault((r.question, r.seed_sd, r.effect), {})[r.seeds] = r
    rows = []
    for (question, seed_sd, effect), by_seeds in found.items():
        expected = next(iter(by_seeds.values())).expected
        rows.append(
            (
                question + (f", true difference {effect:.3f}" if effect else ""),
                f"{seed_sd:g}",
                *(EMPTY if s not in by_seeds else f"{by_seeds[s].rate:.1%}" for s in seeds),
                EMPTY if math.isnan(expected) else f"{expected:.1%}",
            )
        )
    studies = min(r.studies for r in rates())
    error = max(r.standard_error for r in rates())
    return Table(
        title=f"How often a claim is made in simulated studies (alpha {100 * SIMULATED_ALPHA:g} %)",
        columns=(
            "what is counted", "sd of a training run", *(f"{s} seed{'s'[: s > 1]}" for s in seeds),
            "nominal",
        ),
        rows=tuple(rows),
        notes=(
            (
                f"{studies} studies per cell, standard error at most {error:.1%}. Two eval sets of "
                "12 and 20 patients with missing cells; a difference is patient (sd 0.05) + "
                "residual (0.02) + training run, Dice."
            ),
            (
                "The test is conditional on the trained models: what a whole run moves by is no "
                "patient's doing, and few seeds cannot average it out. Hence the words `for these "
                "training runs`."
            ),
        ),
    )  # fmt: skip
