"""Tables of runs: each a function from the runs to rows, called by its name."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.report.significance.analysis import Analysis
    from clbench.report.tables.render import Table

_PAPER = "source scoring seeds ref percent"
_BSP = "source scoring metric"
TABLES = {
    "6": ("paper.detection", "table6", "source"),
    "10": ("paper.table", "paper_table", _PAPER),
    "11": ("paper.table", "paper_table", _PAPER),
    **{f"bsp_{n}": ("paper.bsp", "bsp_table", _BSP) for n in ("II", "III", "IV", "V")},
    "summary": ("tables.summary", "summary", "scoring ref percent external"),
    "learning": ("tables.continual", "learning_table", "scoring ref percent external"),
    "continual": ("tables.continual", "continual_table", "scoring metric ref percent external"),
    "external": ("tables.external", "external_table", "scoring ref percent"),
    "domains": ("tables.domains", "domains_table", "scoring percent"),
    "orders": ("tables.orders", "orders_table", "scoring percent"),
    "distances": ("paper.detection", "distances", ""),
    "cost": ("tables.costs", "cost_table", ""),
    "lost_dice": ("tables.lost_dice", "lost_dice_table", "ref"),
    "calibration": ("page.calibration", "calibration_table", ""),
}
"""Name → module and function that make it, options of `clbench table` it takes."""


def make_table(name: str, study: Analysis, **options: Any) -> Table:
    """A table by its name.

    Args:
        name: one of `TABLES`.
        study: the runs.
        options: `source`, `seeds`, `metric`, `scale` and `reference_first`; those the table does
            not take are passed over.
    """
    module, function, _ = TABLES[name]
    make = getattr(import_module(f"clbench.report.{module}"), function)
    which = int(name) if name.isdecimal() else name.removeprefix("bsp_")
    given = {"study": study, "which": which, **options}
    table: Table = make(**{k: given[k] for k in signature(make).parameters if k in given})
    return table
