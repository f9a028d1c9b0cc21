"""Calibration: how often the report's tests and intervals are wrong, and how much they find.

Simulated studies with a known truth. The numbers lie in `results/calibration/` and are made by
`tests/perf/calibration.py`; here they are read and printed.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from clbench.report.tables.render import EMPTY, Table

if TYPE_CHECKING:
    import pandas as pd

CLAIM = "better or worse, any scope"
SETTLED = "better or worse beyond these training runs"
SIMULATED_ALPHA = 0.05
"""Level of the tests in the simulated studies, see `tests/perf/calibration.py`."""
COVERED = "interval of a difference holds it"


@cache
def rates() -> pd.DataFrame:
    """The measured rates, in order of the file.

    Returns:
        `question` that was counted; `patients` per eval set, such as `8 + 8`; `comparisons` in the
        family, 0 where nothing is corrected; `seeds` per study; `seed_sd`, Dice that a whole
        training run moves by (standard deviation); `effect`, the true difference in Dice;
        `studies` simulated; `rate`, a share of them; its `standard_error`; what theory has
        `expected`, nan where it says nothing.
    """
    import pandas as pd

    with resources.files("clbench.calibration").joinpath("calibration.csv").open() as file:
        return pd.read_csv(file)


def rates_of(question: str, *, seeds: int, seed_sd: float) -> dict[str, float]:
    """One question's rates; nothing if it was not measured.

    Args:
        question: what was counted in the simulations, as `calibration.csv` names it.
        seeds: training runs of each strategy in the simulation.
        seed_sd: standard deviation between training runs in the simulation, in Dice.

    Returns:
        Patients per eval set, such as `8 + 8` → share of the studies.

    Example:
        >>> from clbench.report.page.calibration import COVERED, rates_of
        >>> list(rates_of(COVERED, seeds=1, seed_sd=0.02))
        ['8 + 8', '12 + 20']
    """
    all_of = rates()
    same = all_of[
        (all_of["question"] == question)
        & (all_of["seeds"] == seeds)
        & (all_of["seed_sd"] == seed_sd)
    ]
    return dict(zip(same["patients"].map(str), same["rate"].map(float), strict=True))


def calibration_table() -> Table:
    """One row per question, patients and effects; one column per number of seeds."""
    table = rates()
    error = table["standard_error"].max()
    seeds = sorted(table["seeds"].unique().tolist())
    of_row = ["question", "patients", "comparisons", "effect", "seed_sd"]
    rows: list[tuple[str, ...]] = []
    for (question, patients, comparisons, effect, seed_sd), own in table.groupby(
        of_row, sort=False
    ):
        by_seeds, expected = own.set_index("seeds")["rate"], own["expected"].iloc[0]
        rows.append(
            (
                str(question), str(patients), str(comparisons) if comparisons else EMPTY,
                f"{effect:g}" if effect else EMPTY, f"{seed_sd:g}",
                *(f"{by_seeds[s]:.1%}" if s in by_seeds else EMPTY for s in seeds),
                EMPTY if math.isnan(expected) else f"{expected:.1%}",
                f"{own['studies'].min():,}",
            )
        )  # fmt: skip
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
