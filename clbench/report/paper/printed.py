"""The numbers printed in the paper's tables, cell by cell, and what is odd about them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

from clbench.report.tables.render import Table

NONE = "N/A"
"""As the paper prints what does not exist: a structure before the step that teaches it."""
BENCH = {10: "tumor_ext", 11: "body_ext"}
"""Table → the benchmark whose runs may stand beside the printed numbers."""
WHAT = {10: "tumor extension", 11: "body extension"}
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
class PrintedCell:
    """One printed cell of Table 10 or 11."""

    methods: tuple[str, ...]
    """Methods it holds for, top to bottom."""
    name: str
    """Structure as in the paper's Table 2, or a mean."""
    header: str
    """Printed header."""
    step: int
    """1-based step."""
    text: str
    """Printed text."""


def published(which: int) -> list[dict[str, str]]:
    """The file of Table 6, 10 or 11, row by row."""
    file = resources.files("clbench.published").joinpath(f"table{which}.csv")
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def published_table(which: int) -> Table:
    """The same as a table, for CSV."""
    rows = published(which)
    return Table(title="", columns=tuple(rows[0]), rows=tuple(tuple(r.values()) for r in rows))


def printed_cells(which: int) -> list[PrintedCell]:
    """The cells of Table 10 or 11 in the order of the file."""
    if which == 11:
        return [
            PrintedCell(methods=(r["method"],), name=r["group"], header=r["group"],
                        step=int(r["step"]), text=r["dsc"])
            for r in published(11)
        ]  # fmt: skip
    return [
        PrintedCell(methods=tuple(r["rowspan_methods"].split("|")), name=r["class"],
                    header=r["printed_header"], step=int(r["step"]), text=r["printed_value"])
        for r in published(10)
    ]  # fmt: skip
