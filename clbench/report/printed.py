"""The numbers printed in the paper's Tables 10 and 11, from the data package, and their quirks.

Room: row 5 (no torch, no scipy). The files are the paper's, cell by cell; nothing is computed here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

NONE = "N/A"
"""As the paper prints what does not exist: a structure before the step that teaches it."""
AGGREGATES = ("Organ Mean", "Mean")
"""Columns of Table 10 that are means over structures."""
BESIDE = {
    10: {"LwF": "lwf_ct", "ILT": "ilt_ct", "PLOP": "plop_ct", "Ours": "universal"},
    11: {
        "LwF": "lwf_ct", "ILT": "ilt_ct", "PLOP": "plop_ct",
        "Ours (1-hot)": "universal_onehot", "Ours (CLIP)": "universal",
    },
}  # fmt: skip
"""Table → printed method → the strategy that runs it as the authors did."""
QUIRKS = {
    10: (
        "LwF, ILT and PLOP share the model of step 1: its cell is printed once",
        "Organ Mean: of 13 structures; Mean: of 14; every structure has the same weight",
        "PLOP's Mean after step 2 is printed as 0.768; its cells give 0.767",
        "the printed Liver is taken to be that of BTCV; the paper does not say",
    ),
    11: (
        "0.891 is printed in all three rows of LwF, ILT and PLOP: one shared model of step 1",
        "printed cells are means of 7, 3 and 4 structures; none can be checked from its parts",
        "the paper's text calls the third row Ours (CLIP); in the table it is the fifth",
        "the paper prints no mean over all groups",
    ),
}
"""Table → what a reader of the printed numbers must know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """One printed cell of Table 10."""

    row_owner: str
    """Method in whose row it stands."""
    rowspan_methods: str
    """Methods it holds for, joined by |."""
    step: int
    """1 or 2."""
    cls: str
    """Name in the paper's Table 2, or an aggregate."""
    header: str
    """Printed header."""
    value: str
    """Printed text."""


def _read(name: str) -> list[dict[str, str]]:
    text = resources.files("clbench.published").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def printed10() -> list[Printed]:
    """The cells of Table 10 in the order of the file."""
    return [
        Printed(
            row_owner=r["row_owner"], rowspan_methods=r["rowspan_methods"], step=int(r["step"]),
            cls=r["class"], header=r["printed_header"], value=r["printed_value"],
        )
        for r in _read("table10.csv")
    ]  # fmt: skip


def printed11() -> list[Mapping[str, str]]:
    """The cells of Table 11 in the order of the file: method, group, step, dsc."""
    return list(_read("table11.csv"))
