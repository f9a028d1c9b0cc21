"""What the runs cost, step by step: parameters, operations, time, memory, bytes kept.

Room: row 5 (no torch). Reads what was recorded; counts nothing itself.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.metrics import transfer
from clbench.report.render import EMPTY, Table
from clbench.report.runs import PHANTOM, Group, collect, hole_notes

Cost = Mapping[str, float]
"""Name of a quantity → value; the names are those of `cost.csv` and `run.json`."""
MACS = "forward, 10⁹ MACs"
COLUMNS = (
    ("parameters", "parameters, 10⁶", 1e6, 2),
    ("trainable_parameters", "trained, 10⁶", 1e6, 2),
    ("nonzero_parameters", "not zero, 10⁶", 1e6, 2),
    ("forward_macs", MACS, 1e9, 2),
    ("train_s", "training, min", 60.0, 1),
    ("prepare_s", "preparing, min", 60.0, 1),
    ("predict_case_s", "inference, s per case", 1.0, 1),
    ("examine_s", "examination, min", 60.0, 1),
    ("peak_rss_bytes", "training, peak RSS, GB", 1e9, 2),
    ("peak_cuda_bytes", "training, peak GPU, GB", 1e9, 2),
    ("examine_peak_rss_bytes", "examination, peak RSS, GB", 1e9, 2),
    ("examine_peak_cuda_bytes", "examination, peak GPU, GB", 1e9, 2),
    ("teacher_bytes", "old model, MB", 1e6, 1),
    ("pseudo_bytes", "pseudo labels, MB", 1e6, 1),
    ("checkpoint_bytes", "checkpoint, MB", 1e6, 1),
)
"""Quantity, header, unit, digits."""


def read_costs(folder: Path, record: Mapping[str, Any]) -> dict[int, Cost]:
    """Step → cost: `run.json`, with what `cost.csv` of the run says on top.

    Raises:
        StoreError: `cost.csv` has no column `step`, or a value of a known quantity is no number.
    """
    found: dict[int, dict[str, float]] = {}
    for step, recorded in record["cost"].items():
        flat = {**recorded, **recorded.get("train", {})}
        found[int(step)] = {
            k: float(v) for k, v in flat.items() if isinstance(v, int | float)
        }  # fmt: skip
    path = folder / "cost.csv"
    if not path.exists():
        return dict(found)
    known = {name for name, *_ in COLUMNS}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {k: float(v) for k, v in row.items() if k in known and v}
                found.setdefault(int(row["step"]), {}).update(values)
    except (KeyError, ValueError, TypeError, OSError) as err:
        raise StoreError(
            "the costs of a run cannot be read",
            where=path,
            expected="a column step, one row per step, numbers in "
            + ", ".join(name for name, *_ in COLUMNS),
            got=err,
            next_step="write it anew: clbench cost RUN",
        ) from err
    return dict(found)


def cost_table(*, results: Path, bench: str) -> Table:
    """One row per strategy and step; means over seeds.

    Raises:
        StoreError: the runs do not belong in one table, or a cost cannot be read.
    """
    groups = collect(results, bench=bench, scoring="strict")
    rows = [row for g in groups for row in _rows(g)]
    phantom = any(not g.patients for g in groups)
    devices = sorted({str(r.record.get("device", "unknown")) for g in groups for r in g.runs})
    notes = [
        "means over seeds; a step that strategies share was trained once and is entered in each",
        "MACs: multiply-adds of one forward patch, counted once each; not zero: what pruning left",
        "inference: sliding window and clean-up, median of test cases; examination: all of it",
        "peak RSS: resident memory of the process; peak GPU: memory torch allocated",
        "old model, pseudo labels: what training keeps of the past; checkpoint: weights and memory",
        f"on: {', '.join(devices)}" if devices else "no finished run",
    ]
    if len(devices) > 1:
        notes.append("times from different devices are not comparable")
    notes += dict.fromkeys(
        f"operations not counted, {g.label}: {r.record['uncounted'].splitlines()[0]}"
        for g in groups
        for r in g.runs
        if r.record.get("uncounted")
    )
    heads = [header for _, header, *_ in COLUMNS]
    if rows and all(row[3 + heads.index(MACS)] == EMPTY for row in rows):
        notes.append("operations are not recorded: clbench cost RUN counts them without training")
    # a device without a GPU has no column for it
    shown = [
        i for i, h in enumerate(heads) if "GPU" not in h or any(r[3 + i] != EMPTY for r in rows)
    ]
    return Table(
        title=f"{bench}: cost per step" + (f" on the {PHANTOM}" if phantom else ""),
        columns=("strategy", "step", "seeds", *(heads[i] for i in shown)),
        rows=tuple((*row[:3], *(row[3 + i] for i in shown)) for row in rows),
        keys=3,
        narrow=6,
        block=9,
        notes=(*notes, *hole_notes(groups)),
    )


def _rows(group: Group) -> list[tuple[str, ...]]:
    each = [read_costs(run.folder, run.record) for run in group.runs]
    rows = []
    for step in range(1, group.runs[0].last + 1):
        texts = []
        for name, _, unit, digits in COLUMNS:
            value = transfer.mean(c.get(step, {}).get(name, math.nan) for c in each)
            texts.append(EMPTY if math.isnan(value) else f"{value / unit:.{digits}f}")
        rows.append((group.label, str(step), str(len(group.runs)), *texts))
    return rows
