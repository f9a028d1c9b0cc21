"""The table of measured ratios: what the scripts in this folder add a line to with `--record`.

Each line says when, on what, by which script and how busy the machine was. `tests/README.md` shows
the newest of every ratio, made by `tests/pages.py ratios`.
"""

from __future__ import annotations

import csv
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from clbench import reproducibility

FILE = Path(__file__).parents[2] / "results" / "calibration" / "ratios.csv"
COLUMNS = ("date", "cpu", "torch", "threads", "load", "script", "what", "ratio", "goal")


class Ratio(NamedTuple):
    """One ratio of one run of a script."""

    script: str
    """As it was called, from the root of the repository."""
    what: str
    """What is divided by what."""
    ratio: float
    goal: str = ""
    """Such as `<= 1.03`; empty: there is none."""


def record(ratios: list[Ratio], *, threads: int) -> None:
    """Append a line for each; all were measured with so many threads a process."""
    host = reproducibility.host(torch.device("cpu"))
    facts = (
        datetime.now(UTC).date().isoformat(),
        f"{host['cpu']}, {host['vectors']}",
        host["torch"],
        threads,
        f"{os.getloadavg()[0]:.1f}",
    )
    new = not FILE.exists()
    with FILE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for one in ratios:
            writer.writerow((*facts, one.script, one.what, f"{one.ratio:.4g}", one.goal))
