"""BSP's Tables II to V, the course `public_ext`: as printed, as measured, or both.

Printed are Dice in percent and ASD, per structure and as their mean; a printed mean that does not
equal the mean of its cells is marked. The paper tests other cases of the same sources than
`public_ext` draws, so no difference of printed and measured is formed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from clbench.errors import SettingError
from clbench.evaluation.metrics import continual
from clbench.report.paper.marks import best_and_second
from clbench.report.scores import Scores, StrategyScores, on_phantom
from clbench.report.significance.analysis import Analysis
from clbench.report.tables.render import EMPTY, Mark, Table, long_table
from clbench.spec.taxonomy import structure

COURSE = "public_ext"
"""The course whose runs may stand beside the printed numbers."""
WHAT = {
    "II": "methods of regularization, internal test cases",
    "III": "Universal Model and what is added to it, internal test cases",
    "IV": "methods of regularization, external test sets",
    "V": "Universal Model and what is added to it, external test sets",
}
"""Table → what it compares."""
ON = {"internal": "", "btcv": "btcv", "amos": "amos_validation"}
"""Printed test set → external test set of the course; empty: its own test cases."""
BESIDE = {
    "Organ-specific": "independent",
    "LwF": "lwf",
    "ILT": "ilt",
    "MiB": "mib",
    "PLOP": "plop",
    "MBS": "mbs",
    "BSP": "",
    "Universal": "universal",
    "Universal+MBS": "universal_mbs",
    "Universal+BSP": "",
}
"""Printed method → the strategy that stands beside it; empty: its loss is in no public code."""
PRINTED = {"dice": ("dsc_percent", 2), "asd_bsp": ("asd_mm", 2)}
"""Metric → column of the printed file, digits."""
KEYS = ("method", "test set", "seeds")
"""Leading columns; nothing printed has seeds."""
MEAN = "mean"
UNEQUAL = "≠"
"""Behind a printed mean that is not the mean of its cells."""
ROUNDING = 0.005
"""Half a unit of the last printed digit."""


@dataclass(kw_only=True)
class _Row:
    """A method on a test set; values by structure, and `mean`."""

    method: str
    eval_set: str
    origin: str
    """`p` printed, `m` measured."""
    values: dict[str, float] = field(default_factory=dict)
    seeds: int | None = None
    """Training runs behind a measured row."""


def published_rows() -> list[dict[str, str]]:
    """The file of Tables II to V, row by row."""
    file = resources.files("clbench.published").joinpath("bsp.csv")
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def printed_means_apart(metric: str) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(table, test set, method) → printed mean and mean of its cells, where these are not equal.

    Args:
        metric: `dice` (percent) or `asd_bsp`. Where a cell is not printed, there is nothing to
            compare.
    """
    column, _ = PRINTED[metric]
    cells: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in published_rows():
        key = r["table"], r["eval_set"], r["method"]
        cells.setdefault(key, {})[r["structure"]] = float(r[column] or "nan")
    apart = {}
    for key, values in cells.items():
        mean = continual.mean(v for name, v in values.items() if name != MEAN)
        if abs(mean - values.get(MEAN, math.nan)) > ROUNDING + 1e-9:
            apart[key] = values[MEAN], mean
    return apart


def bsp_table(which: str, study: Analysis, *, source: str = "both", metric: str = "dice") -> Table:
    """Table II, III, IV or V.

    Args:
        which: its number, in Roman digits.
        study: the runs of `public_ext`, not looked at for `printed`.
        source: `printed`, `measured` or `both`.
        metric: `dice`, in percent, or `asd_bsp`, as the paper computes it.

    Raises:
        SettingError: another metric, or another benchmark's runs beside the printed numbers.
        StoreError: the measured runs do not belong in one table.
    """
    if metric not in PRINTED:
        raise SettingError(
            f"BSP's tables have no {metric}",
            where="--metric",
            expected=" or ".join(PRINTED),
            got=metric,
        )
    if source != "measured" and study.bench != COURSE:
        raise SettingError(
            "BSP's tables have no numbers of this benchmark",
            where="--bench",
            expected=COURSE,
            got=study.bench,
        )
    printed = _printed(which, metric)
    sets = list(dict.fromkeys(row.eval_set for row in printed))
    structures = [name for name in printed[0].values if name != MEAN]
    rows: list[_Row] = [] if source == "measured" else printed
    notes: list[str] = []
    scores: Scores | None = None
    uneven: list[str] = []
    if source != "printed":
        by_set = {s: _scores(study, s, metric) for s in sets}
        scores = next(iter(by_set.values()))
        uneven = [name for name, of in by_set.items() if of and not of.same_seeds]
        rows, notes = _beside(rows, by_set, structures, metric)
    apart = {} if source == "measured" else printed_means_apart(metric)
    apart = {key: value for key, value in apart.items() if key[0] == which}
    digits = PRINTED[metric][1]
    columns = (*structures, MEAN)
    keys = 2 if source == "printed" else 3
    return Table(
        title=f"BSP, Table {which}, {WHAT[which]}, "
        + ("Dice, %" if metric == "dice" else "ASD")
        + f": {_origin(source)}{on_phantom(scores)}",
        columns=(*KEYS[:keys], *(_head(name) for name in columns)),
        rows=tuple(
            (
                *(row.method, row.eval_set, str(row.seeds or ""))[:keys],
                *(_text(row, name, digits, apart, which) for name in columns),
            )
            for row in rows
        ),
        keys=keys,
        marks={
            (i, keys + j): marks
            for (i, j), marks in _marks(rows, columns, uneven, smaller=metric != "dice").items()
        },
        rules=frozenset(
            i for i, row in enumerate(rows) if i and row.eval_set != rows[i - 1].eval_set
        ),
        notes=(*_notes(which, source, metric, apart), *notes),
        long=long_table(
            "table eval_set method origin seeds structure value",
            [
                (
                    which, row.eval_set, row.method, row.origin, row.seeds, name,
                    row.values.get(name, math.nan),
                )
                for row in rows
                for name in columns
            ],
        ),
    )  # fmt: skip


def _origin(source: str) -> str:
    return {"printed": "printed in the paper", "both": "printed (patients) and measured"}.get(
        source, source
    )


def _head(name: str) -> str:
    return name if name == MEAN else structure(name).prompt


def _printed(which: str, metric: str) -> list[_Row]:
    """The printed rows of a table, in its order, test set by test set."""
    column, _ = PRINTED[metric]
    rows: dict[tuple[str, str], _Row] = {}
    for r in published_rows():
        if r["table"] == which:
            key = r["eval_set"], r["method"]
            row = rows.setdefault(key, _Row(method=r["method"], eval_set=r["eval_set"], origin="p"))
            row.values[r["structure"]] = float(r[column] or "nan")
    return sorted(rows.values(), key=lambda row: list(ON).index(row.eval_set))


def _scores(study: Analysis, eval_set: str, metric: str) -> Scores | None:
    """The runs on a printed test set; None where there is no finished run."""
    on = ON[eval_set]
    return (study.measured_on(on) if on else study).scores(metric=metric)


def _beside(
    printed: Sequence[_Row],
    by_set: Mapping[str, Scores | None],
    structures: Sequence[str],
    metric: str,
) -> tuple[list[_Row], list[str]]:
    """Printed and measured rows test set by test set, and what is missing.

    Args:
        printed: their rows; none where measured ones stand alone.
        by_set: printed test set → scores.
        structures: in the order of the columns.
        metric: see `bsp_table`.
    """
    rows: list[_Row] = []
    notes: list[str] = []
    for eval_set, scores in by_set.items():
        left = {m.label: m for m in scores.strategies} if scores else {}
        for row in (r for r in printed if r.eval_set == eval_set):
            rows.append(row)
            own = [m for m in left.values() if m.strategy == BESIDE[row.method]]
            for m in own:
                rows.append(_measured(m, eval_set, scores, structures, metric))
                del left[m.label]
        rows += [_measured(m, eval_set, scores, structures, metric) for m in left.values()]
        if scores is None:
            notes.append(f"{eval_set}: no finished run")
        else:
            notes += [f"{eval_set}: {line}" for line in scores.notes()]
    return rows, list(dict.fromkeys(notes))


def _measured(
    m: StrategyScores, eval_set: str, scores: Scores | None, structures: Sequence[str], metric: str
) -> _Row:
    """A strategy after the last step, mean over seeds."""
    assert scores is not None  # noqa: S101  # its strategies are those of the scores
    factor = 100 if metric == "dice" else 1
    values = {name: factor * m.over_seeds(scores.last, [name])[0] for name in structures}
    values[MEAN] = continual.mean(values.values())
    return _Row(method=m.label, eval_set=eval_set, origin="m", values=values, seeds=len(m.runs))


def _text(
    row: _Row,
    name: str,
    digits: int,
    apart: Mapping[tuple[str, str, str], object],
    which: str,
) -> str:
    """A cell: number, origin, and the mark of a mean that is not that of its cells."""
    value = row.values.get(name, math.nan)
    if math.isnan(value):
        return EMPTY
    unequal = row.origin == "p" and name == MEAN and (which, row.eval_set, row.method) in apart
    return f"{value:.{digits}f} {row.origin}" + f" {UNEQUAL}" * unequal


def _marks(
    rows: Sequence[_Row], columns: Sequence[str], uneven: Container[str], *, smaller: bool
) -> dict[tuple[int, int], frozenset[Mark]]:
    """(row, place of a column) → best and next, within one test set and one origin.

    Args:
        rows: of the table.
        columns: structures and the mean.
        uneven: test sets whose measured rows do not have the same seeds and are not marked.
        smaller: whether smaller is better.
    """
    marks: dict[tuple[int, int], frozenset[Mark]] = {}
    for group in dict.fromkeys((row.eval_set, row.origin) for row in rows):
        if group[1] == "m" and group[0] in uneven:
            continue
        for j, name in enumerate(columns):
            values = {
                i: (-1 if smaller else 1) * row.values.get(name, math.nan)
                for i, row in enumerate(rows)
                if (row.eval_set, row.origin) == group
            }
            marks |= {(i, j): frozenset({w}) for i, w in best_and_second(values).items()}
    return marks


def _notes(
    which: str, source: str, metric: str, apart: Mapping[tuple[str, str, str], tuple[float, float]]
) -> Iterable[str]:
    """Lines below the table."""
    if source != "measured":
        yield "p: printed in the paper, on its own cases; no seed, interval or test is printed"
        for (_, eval_set, method), (printed, mean) in apart.items():
            yield (
                f"{UNEQUAL} {method}, {eval_set}: the mean is printed as {printed:.2f}; the mean "
                f"of its cells is {mean:.3f}"
            )
        alone = [r.method for r in _printed(which, metric) if not BESIDE[r.method]]
        for method in dict.fromkeys(alone):
            yield f"{method} is printed only: its loss is in no public code, so nothing is measured"
    if source != "printed":
        pairs = ", ".join(f"{b} beside {a}" for a, b in BESIDE.items() if b)
        yield f"m: measured, mean over seeds, means over test cases ({pairs})"
    if source == "both":
        yield "no difference is formed: the paper's cases are not those that `public_ext` draws"
    yield (
        "the paper's Dice adds 1 to the denominator, on the 1.5 mm grid: `--scoring paper`"
        if metric == "dice"
        else "ASD as the paper computes it: in voxels of the 1.5 mm grid, cases with a missed "
        "structure left out (`clbench score RUN --metrics asd_bsp`); smaller is better"
    )
    yield f"bold (¹): best of a column within one test set and origin; {EMPTY}: no number"
