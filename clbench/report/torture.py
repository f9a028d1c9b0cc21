"""Torture: how often runs were killed, in what, and whether they ended as undisturbed ones.

Room: row 5 (no torch). The numbers lie in `results/calibration/torture.csv` and are made by
`make torture`; here they are read and printed.
"""

from __future__ import annotations

import csv
from importlib import resources

from clbench.report.tables import Table

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
