"""The stability gap: what happens to old structures while a new step is being taught.

A run that examines fixed validation cases every few updates leaves
`trace.csv` in its folder: one row per step, update, case and structure learned so far. Update 0 is
the model before the first update of the step. Test cases never enter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType

from clbench.errors import StoreError
from clbench.evaluation.metrics.continual import mean
from clbench.store import files, run_folder
from clbench.store.csv_rows import read_rows, rows_bytes

FILE = "trace.csv"
"""Its name in a run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRow:
    """One structure of one validation case, during one step."""

    step: int
    """1-based step being taught."""
    update: int
    """Updates made in this step; 0 = before the first."""
    eval_set: str
    """Source of the validation case."""
    case: str
    """Case id."""
    structure: str
    """Canonical name."""
    learned_at: int
    """1-based step that teaches it."""
    value: float
    """Dice on the grid the network sees; NaN where the truth is empty."""
    status: str
    """One of `store.STATUSES`."""


COLUMNS = tuple(f.name for f in dataclasses.fields(TraceRow))


def write_trace(path: Path, rows: Iterable[TraceRow]) -> None:
    """Write `trace.csv`: sorted, values by `repr`; equal traces give equal bytes.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from clbench.evaluation.metrics.stability_gap import TraceRow, write_trace
        >>> row = TraceRow(
        ...     step=2, update=0, eval_set="btcv", case="3", structure="liver", learned_at=1,
        ...     value=0.5, status="ok",
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_trace(Path(folder) / "trace.csv", [row])
        ...     print((Path(folder) / "trace.csv").read_text(), end="")
        step,update,eval_set,case,structure,learned_at,value,status
        2,0,btcv,3,liver,1,0.5,ok
    """
    key = attrgetter("step", "update", "eval_set", "case", "learned_at", "structure")
    files.write_bytes(path, rows_bytes(COLUMNS, sorted(rows, key=key)))


def read_trace(path: Path, tests: Iterable[str]) -> list[TraceRow]:
    """Read `trace.csv`.

    Args:
        path: the file.
        tests: test cases of the run as "source/case" (`course.test` of its record).

    Raises:
        StoreError: missing, damaged (names the line), or it looks at a test case.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from clbench.evaluation.metrics.stability_gap import TraceRow, read_trace, write_trace
        >>> row = TraceRow(
        ...     step=2, update=0, eval_set="btcv", case="3", structure="liver", learned_at=1,
        ...     value=0.5, status="ok",
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_trace(Path(folder) / "trace.csv", [row])
        ...     read_trace(Path(folder) / "trace.csv", tests=["btcv/4"]) == [row]
        True
    """
    again = "run again with --fresh --set examine.trace_every=N"
    statuses = {"status": run_folder.STATUSES}
    rows = read_rows(path, TraceRow, what="the trace of a run", next_step=again, allowed=statuses)
    test_cases = set(tests)
    for number, row in enumerate(rows, 2):
        if f"{row.eval_set}/{row.case}" in test_cases:
            raise StoreError(
                "the trace looks at a test case",
                where=f"{path}, line {number}",
                expected="validation cases only",
                got=f"{row.eval_set}/{row.case}",
                next_step="choose other validation cases, and run again with --fresh",
            )
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StabilityGap:
    """What one step did to the structures of earlier steps."""

    before: float
    """Mean Dice of the old structures before the first update."""
    lowest: float
    """Lowest mean on the way."""
    end: float
    """Mean after the last traced update."""
    min_acc: float
    """Mean over old structures of each one's own lowest value after an update since it was
    learned."""
    wc_acc: float
    """Worst-case accuracy: `min_acc` and the new structures at the end, the latter with weight
    1/step."""

    @property
    def depth(self) -> float:
        """How far the old structures fell: before − lowest."""
        return self.before - self.lowest

    @property
    def transient(self) -> float:
        """What came back by itself: end − lowest."""
        return self.end - self.lowest

    @property
    def persistent(self) -> float:
        """What stayed lost: before − end."""
        return self.before - self.end


def curves(rows: Iterable[TraceRow], step: int) -> dict[str, dict[int, float]]:
    """Structure → update → mean over cases whose truth holds it, during one step.

    Raises:
        StoreError: an update lacks a case or a structure that another has; a mean over other cases
            is no curve.

    Example:
        >>> from clbench.evaluation.metrics.stability_gap import TraceRow, curves
        >>> values = {(0, "3"): 0.5, (0, "4"): 1.0, (9, "3"): 0.25, (9, "4"): 0.5}
        >>> rows = [
        ...     TraceRow(
        ...         step=2, update=update, eval_set="btcv", case=case, structure="liver",
        ...         learned_at=1, value=value, status="ok",
        ...     )
        ...     for (update, case), value in values.items()
        ... ]
        >>> curves(rows, step=2)
        {'liver': {0: 0.75, 9: 0.375}}
    """
    values: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    for row in rows:
        if row.step == step and not math.isnan(row.value):
            by_update = values.setdefault(row.structure, {})
            by_update.setdefault(row.update, {})[row.eval_set, row.case] = row.value
    updates = {u for by_update in values.values() for u in by_update}
    for name, by_update in values.items():
        if len({frozenset(cases) for cases in by_update.values()}) > 1 or len(by_update) < len(
            updates
        ):
            raise StoreError(
                "the trace of a structure does not hold the same cases at every update",
                where=f"step {step}, {name}",
                next_step="run again with --fresh",
            )
    return {
        name: {update: mean(cases.values()) for update, cases in sorted(by_update.items())}
        for name, by_update in values.items()
    }


def stability_gap(
    by_structure: Mapping[str, Mapping[int, float]],
    learned_at: Mapping[str, int],
    step: int,
    lowest_before: Mapping[str, float] = MappingProxyType({}),
) -> StabilityGap | None:
    """The gap of one step from its curves; None where no old structure was traced from update 0 on.

    Args:
        by_structure: what `curves` returns.
        learned_at: structure → 1-based step.
        step: the step being taught.
        lowest_before: structure → its lowest value in the steps between its own and this one, see
            `lowest`.

    Example:
        >>> from clbench.evaluation.metrics.stability_gap import stability_gap
        >>> liver, kidney = {0: 0.75, 1: 0.25, 2: 0.5}, {1: 0.25, 2: 0.75}
        >>> curves = {"liver": liver, "kidney": kidney}
        >>> gap = stability_gap(curves, {"liver": 1, "kidney": 2}, step=2)
        >>> gap
        StabilityGap(before=0.75, lowest=0.25, end=0.5, min_acc=0.25, wc_acc=0.5)
        >>> gap.depth, gap.transient, gap.persistent
        (0.5, 0.25, 0.25)

    Source: De Lange, van de Ven and Tuytelaars, ICLR 2023; classes weigh the same.
    Differs: Dice of validation cases instead of accuracy; `before`, `lowest` and `end` are of the
        class mean of this step, as drawn; `min_acc` is by structure and since each was learned, as
        defined there.
    """
    old = [curve for name, curve in by_structure.items() if learned_at[name] < step]
    new = [curve for name, curve in by_structure.items() if learned_at[name] == step]
    updates = sorted({u for curve in old for u in curve})
    if not old or updates[:1] != [0] or len(updates) < 2:
        return None

    def at(update: int, of: Sequence[Mapping[int, float]]) -> float:
        return mean(curve.get(update, math.nan) for curve in of)

    macro = [at(u, old) for u in updates]
    lows = lowest(by_structure, learned_at, step, lowest_before)
    min_acc = mean(lows[name] for name in by_structure if learned_at[name] < step)
    return StabilityGap(
        before=macro[0],
        lowest=min(macro),
        end=macro[-1],
        min_acc=min_acc,
        wc_acc=(1 - 1 / step) * min_acc + at(updates[-1], new) / step,
    )


def lowest(
    by_structure: Mapping[str, Mapping[int, float]],
    learned_at: Mapping[str, int],
    step: int,
    before: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Old structure → its lowest value after an update since it was learned.

    Args:
        by_structure: what `curves` returns, of one step.
        learned_at: structure → 1-based step.
        step: the step being taught.
        before: what this function returned of the step before.

    Example:
        >>> from clbench.evaluation.metrics.stability_gap import lowest
        >>> lowest({"liver": {0: 0.5, 1: 0.8, 2: 0.7}}, {"liver": 1}, step=2)
        {'liver': 0.7}
    """
    found = dict(before)
    for name, curve in by_structure.items():
        values = [value for update, value in curve.items() if update > 0]
        if learned_at[name] < step and values:
            found[name] = min([*values, found.get(name, math.inf)])
    return found
