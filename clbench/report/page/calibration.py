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


# --------------------------------------------------------------------------------------------------
# Fuzz: how many hostile and odd files the readers were tried on, and what became of them.
# The numbers lie in `results/calibration/fuzz.csv` and are made by
# `tests/perf/fuzz_readers.py`; here they are read and printed.


def fuzz_table() -> Table:
    """One row per property: inputs tried, read and refused."""
    text = resources.files("clbench.calibration").joinpath("fuzz.csv").read_text("utf-8")
    found = {
        r["property"]: (int(r["tried"]), int(r["read"]), int(r["refused"]))
        for r in csv.DictReader(text.splitlines())
    }
    found["all"] = (
        sum(n for n, _, _ in found.values()),
        sum(n for _, n, _ in found.values()),
        sum(n for _, _, n in found.values()),
    )
    return Table(
        title="Files the readers were tried on",
        columns=("what is odd about them", "tried", "read", "refused"),
        rows=tuple((what, *(f"{n:,}" for n in counts)) for what, counts in found.items()),
        notes=(
            (
                "Read: the right volume in RAS, every label in its place; refused: an error that "
                "names the file and the next step. There was no third answer."
            ),
        ),
    )


# --------------------------------------------------------------------------------------------------
# Torture: how often runs were killed, in what, and whether they ended as undisturbed ones.
# The numbers lie in `results/calibration/torture.csv` and are made by
# `make torture`; here they are read and printed.


PHASES = {
    "train": "training",
    "prune": "pruning and recovery",
    "pseudo": "pseudo-labelling",
    "examine": "examining",
    "write": "writing a file",
    "start": "between them",
}


def torture_table() -> Table:
    """One row per phase: the kills that landed in it."""
    text = resources.files("clbench.calibration").joinpath("torture.csv").read_text("utf-8")
    found = {(r["of"], r["name"]): r["value"] for r in csv.DictReader(text.splitlines())}
    kills = {name: int(found["phase", name]) for name in PHASES}
    hit = [v for (of, _), v in found.items() if of == "strategy" and int(v)]
    rows = [(words, str(kills[name])) for name, words in PHASES.items()]
    return Table(
        title="Runs of the tiny course killed (SIGKILL) at random moments, and gone on",
        columns=("killed while", "times"),
        rows=(*rows, ("all", str(sum(kills.values())))),
        notes=(
            (
                f"{found['all', 'runs']} runs of {len(hit)} methods; ended otherwise than the "
                f"undisturbed run: {found['all', 'different']}; files found half-written: "
                f"{found['all', 'half_written']}."
            ),
            (
                f"torch {found['host', 'torch']} on {found['host', 'device']}, "
                f"{found['host', 'threads']} thread(s), seed {found['all', 'seed']}."
            ),
        ),
    )
