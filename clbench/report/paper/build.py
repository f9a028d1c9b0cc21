"""All tables and figures of the paper in one go, as a TOML file lists them.

What cannot be made is a hole with its reason; what was made before from
other runs does not stay behind under its name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clbench.errors import ClbenchError, SettingError
from clbench.spec import registry
from clbench.spec.names import need_inner, need_name
from clbench.spec.validation import checked, from_toml
from clbench.store import files

if TYPE_CHECKING:
    from clbench.report.significance.analysis import Analysis

FORMATS = ("tex", "md", "csv", "html")
"""Of every table; each is the ending of its file."""
PICTURES = ("pdf", "png")
"""Of every figure."""


@checked(SettingError)
class StudyItem:
    """Which runs the tables and figures are made of."""

    results: str
    """Folder of runs."""
    seeds: tuple[int, ...]
    """Seeds every strategy must have."""
    ref: str
    """Reference strategy of verdicts and figures."""
    scoring: Literal["strict", "paper"]
    """Which scores."""


@checked(SettingError)
class TableItem:
    """One table of the paper."""

    file: str
    """Name without ending."""
    number: Literal[10, 11]
    """Number in the paper."""
    bench: str
    """Benchmark."""
    source: Literal["printed", "measured", "both"]
    """Which numbers."""


@checked(SettingError)
class FigureItem:
    """One figure of the paper."""

    file: str
    """Name without ending."""
    name: str
    """Figure, as `clbench figure` calls it."""
    bench: str
    """Benchmark."""


@checked(SettingError)
class PaperPlan:
    """The file: what goes into each table and figure."""

    study: StudyItem
    """Common to all."""
    table: tuple[TableItem, ...] = ()
    """The tables, in order."""
    figure: tuple[FigureItem, ...] = ()
    """The figures, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One table or figure."""

    file: str
    """Name without ending."""
    paths: tuple[Path, ...] = ()
    """What was written."""
    hole: str = ""
    """Why it could not be made."""


def read_plan(path: Path) -> PaperPlan:
    """The TOML file, checked.

    Raises:
        SettingError: it cannot be read, or has unknown or missing fields.
    """
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SettingError("the list of tables cannot be read", where=path, got=err) from err
    return from_toml(PaperPlan, plan, raised=SettingError, where=path)


def build(plan: Path, out: Path, results: Path | None = None) -> Iterator[Output]:
    """Make everything, one after the other.

    Args:
        plan: the TOML file.
        out: where files go.
        results: folder of runs instead of the plan's.

    Raises:
        SettingError: the plan is wrong.
        StoreError: `out` cannot be written.
    """
    from clbench.report.significance.analysis import Analysis

    listed = read_plan(plan)
    shared = listed.study
    named = [*(t.file for t in listed.table), *(f.file for f in listed.figure)]
    for name in named:
        need_name(name, f"{plan}, file")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise SettingError(
            "two tables or figures have one name",
            where=f"{plan}, file",
            expected="a name each: the second would replace the first",
            got=", ".join(twice),
            next_step="rename one of the two",
        )
    if results is None:
        need_inner(shared.results, f"{plan}, results")
    folder = results or Path(shared.results)
    files.make_folder(out)

    @cache
    def study(bench: str) -> Analysis:
        if registry.is_path(bench):  # relative to the plan, wherever it is built from
            bench = registry.name_of(str(plan.parent / Path(bench).expanduser()))
        return Analysis(results=folder, bench=bench, reference=shared.ref, scoring=shared.scoring)

    for table in listed.table:
        yield _one(table.file, out, partial(_table, table, study, shared.seeds))
    for figure in listed.figure:
        yield _one(figure.file, out, partial(_figure, figure, study, shared.seeds))


def _one(file: str, out: Path, make: Callable[[], dict[str, bytes]]) -> Output:
    """Make one table or figure; only then does what stood under its name give way.

    Args:
        file: name without ending.
        out: where files go.
        make: ending → content.
    """
    hole, content = "", dict[str, bytes]()
    try:
        content = make()
    except ClbenchError as err:
        hole = str(err)
    paths = {out / f"{file}.{ending}": data for ending, data in content.items()}
    for path, data in paths.items():
        files.write_bytes(path, data)
    for ending in (*FORMATS, *PICTURES):  # names may hold dots: another one's may begin like this
        if (old := out / f"{file}.{ending}") not in paths:
            old.unlink(missing_ok=True)
    return Output(file=file, paths=tuple(paths), hole=hole)


def _table(
    item: TableItem, study: Callable[[str], Analysis], seeds: tuple[int, ...]
) -> dict[str, bytes]:
    from clbench.report.paper.table import paper_table
    from clbench.report.tables.render import render

    table = paper_table(item.number, study(item.bench), source=item.source, seeds=seeds)
    return {end: (render(table, end) + "\n").encode() for end in FORMATS}


def _figure(
    item: FigureItem, study: Callable[[str], Analysis], seeds: tuple[int, ...]
) -> dict[str, bytes]:
    from clbench.report.figures import draw_kinds

    return draw_kinds(item.name, study(item.bench).with_seeds(seeds), PICTURES)
