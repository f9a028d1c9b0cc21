"""Fuzz: how many hostile and odd files the readers were tried on, and what became of them.

Room: row 5 (no torch). The numbers lie in `results/calibration/fuzz.csv` and are made by
`tests/perf/fuzz_readers.py`; here they are read and printed.
"""

from __future__ import annotations

import csv
from importlib import resources

from clbench.report.tables import Table


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
