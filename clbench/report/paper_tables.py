"""The paper's Table 10: as printed, as measured, or both, every cell marked with its origin.

Room: row 5 (no torch). A measured mean over an incomplete set of structures is an empty cell.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from clbench.metrics import transfer
from clbench.report.tables import EMPTY, PHANTOM, Group, Table, collect, number
from clbench.taxonomy import canonical

BESIDE = {"LwF": "lwf_ct", "ILT": "ilt_ct", "PLOP": "plop_ct", "Ours": "universal"}
"""Printed method → the strategy that runs it as the authors did."""
AGGREGATES = ("Organ Mean", "Mean")
PRINTED, MEASURED = "p", "m"


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """One printed cell."""

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


def printed10() -> list[Printed]:
    """The cells of Table 10 in the order of the file."""
    text = resources.files("clbench.published").joinpath("table10.csv").read_text(encoding="utf-8")
    return [
        Printed(
            row_owner=r["row_owner"], rowspan_methods=r["rowspan_methods"], step=int(r["step"]),
            cls=r["class"], header=r["printed_header"], value=r["printed_value"],
        )
        for r in csv.DictReader(text.splitlines())
    ]  # fmt: skip


def table10(*, source: str, results: Path, scoring: str) -> Table:
    """Table 10.

    Args:
        source: `printed`, `measured` or `both`.
        results: folder of runs; read unless `printed`.
        scoring: of the measured cells.

    Returns:
        One row per method and step; the columns are the paper's.

    Raises:
        StoreError: the measured runs do not belong in one table.
    """
    cells = printed10()
    headers = list(dict.fromkeys((c.cls, c.header) for c in cells))
    groups = [] if source == "printed" else collect(results, bench="tumor_ext", scoring=scoring)
    rows: list[tuple[str, ...]] = []
    long: list[tuple[str, ...]] = []
    notes = []
    if source != "measured":
        notes += [
            "p printed in the paper, not measured; LwF, ILT and PLOP share step 1",
            "PLOP's Mean after step 2 is printed as 0.768; its cells give 0.767",
        ]
    if source != "printed":
        notes.append(f"m measured: {scoring} scoring, mean over n seeds of class means over cases")
    used: set[str] = set()
    for owner, strategy in BESIDE.items():
        if source != "measured":
            rows += _printed_rows(cells, owner, [h for _, h in headers])
        if source == "printed":
            continue
        beside = [g for g in groups if g.strategy == strategy]
        used |= {g.label for g in beside}
        for g in beside:
            rows += _measured_rows(g, headers, long)
        if not beside:
            notes.append(f"no finished run of {strategy} (beside {owner})")
    for g in groups:
        if g.label not in used:
            rows += _measured_rows(g, headers, long)
    phantom = any(not r.record["patients"] for g in groups for r in g.runs)
    where = f"measured on the {PHANTOM}" if phantom else "measured"
    what = {"printed": "printed in the paper", "measured": where}.get(
        source, f"printed (patients) and {where}"
    )
    return Table(
        title=f"Table 10, tumor extension, Dice: {what}",
        columns=("method", "step", "n", *(h for _, h in headers)),
        rows=tuple(rows),
        notes=(*notes, f"N/A, {EMPTY}: does not exist, or not for every structure of the mean"),
        keys=3,
        block=8,
        long=_long(source, cells, long, "phantom" if phantom else "patients"),
    )


def _long(
    source: str, cells: Sequence[Printed], measured: Sequence[tuple[str, ...]], data: str
) -> Table:
    """One line per cell; the printed half has the columns of its file alone."""
    if source == "printed":
        return Table(
            title="",
            columns=(
                "row_owner", "rowspan_methods", "step", "class", "printed_header", "printed_value",
            ),
            rows=tuple(
                (c.row_owner, c.rowspan_methods, str(c.step), c.cls, c.header, c.value)
                for c in cells
            ),
        )  # fmt: skip
    printed = [
        (c.rowspan_methods, str(c.step), c.cls, c.header, "printed", "patients", c.value, "", "")
        for c in cells
        if source == "both"
    ]
    return Table(
        title="",
        columns=("method", "step", "class", "header", "origin", "data", "value", "sd", "seeds"),
        rows=(*printed, *((*r[:4], "measured", data, *r[4:]) for r in measured)),
    )


def _printed_rows(
    cells: Sequence[Printed], owner: str, headers: Sequence[str]
) -> list[tuple[str, ...]]:
    found: dict[tuple[str, int], dict[str, str]] = {}
    for c in cells:
        if c.row_owner == owner:
            found.setdefault((c.rowspan_methods, c.step), {})[c.header] = c.value
    return [
        (
            names.replace("|", ", "), str(step), "",
            *(v if (v := row[h]) == "N/A" else f"{v} {PRINTED}" for h in headers),
        )
        for (names, step), row in found.items()
    ]  # fmt: skip


def _measured_rows(
    group: Group, headers: Sequence[tuple[str, str]], long: list[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Wide rows of a group; its cells at full precision are appended to `long`."""
    one = group.runs[0]
    encoding = one.record["text_encoding"].get("encoding")
    label = group.label
    if group.strategy == "universal" and encoding != "clip":
        label += f" [{encoding}]"
    groups: Mapping[str, Sequence[str]] = one.record["course"]["groups"]
    seeds = str(len(group.runs))
    rows = []
    for step in range(1, one.last + 1):
        texts = []
        for cls, header in headers:
            members = groups[cls] if cls in AGGREGATES else [canonical(cls)]
            per_seed = [
                transfer.mean(r.values.get((step, c), math.nan) for c in members)
                for r in group.runs
            ]
            value, sd = transfer.mean(per_seed), transfer.spread(per_seed)
            exact = [
                "N/A" if math.isnan(value) else repr(value),
                "" if math.isnan(sd) else repr(sd),
            ]
            long.append((label, str(step), cls, header, *exact, seeds))
            texts.append(EMPTY if math.isnan(value) else f"{number(value)} {MEASURED}")
        rows.append((label, str(step), seeds, *texts))
    return rows
