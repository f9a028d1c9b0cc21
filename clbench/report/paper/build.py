"""All tables and figures of the paper in one go, as a TOML file lists them.

What cannot be made is a hole with its reason; what was made before from
other runs does not stay behind under its name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.errors import ClbenchError, SettingError, closest
from clbench.spec.names import need_inner, need_name
from clbench.store import files

if TYPE_CHECKING:
    from clbench.report.significance.analysis import Analysis

FORMATS = {"tex": "tex", "md": "md", "csv": "csv", "html": "html"}
"""Format → file ending, for every table."""
_KEYS = {
    "study": {"results", "seeds", "ref", "scoring"},
    "table": {"file", "number", "bench", "source"},
    "figure": {"file", "name", "bench"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """One table or figure."""

    file: str
    """Name without ending."""
    paths: tuple[Path, ...] = ()
    """What was written."""
    hole: str = ""
    """Why it could not be made."""


def read_plan(path: Path) -> dict[str, Any]:
    """The TOML file, checked.

    Raises:
        SettingError: it cannot be read, or has unknown or missing fields.
    """
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SettingError("the list of tables cannot be read", where=path, got=err) from err
    parts = [("study", plan.get("study", {}))]
    parts += [(kind, item) for kind in ("table", "figure") for item in plan.get(kind, [])]
    for kind in plan:
        if kind not in _KEYS:
            raise SettingError("an unknown part", where=path, expected=", ".join(_KEYS), got=kind)
    for kind, item in parts:
        for field in item:
            if field not in _KEYS[kind]:
                guess = closest(field, _KEYS[kind])
                raise SettingError(
                    f"a {kind} has an unknown field",
                    where=path,
                    expected=", ".join(sorted(_KEYS[kind])),
                    got=field,
                    next_step=f"did you mean {guess!r}?" if guess else None,
                )
        if missing := _KEYS[kind] - set(item):
            raise SettingError(
                f"a {kind} lacks a field",
                where=path,
                expected=", ".join(sorted(_KEYS[kind])),
                got=f"no {', '.join(sorted(missing))}",
            )
    return plan


def build(plan: Path, out: Path, results: Path | None = None) -> Iterator[Made]:
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
    settings = listed["study"]
    for item in (*listed.get("table", []), *listed.get("figure", [])):
        need_name(item["file"], f"{plan}, file")
    if results is None:
        need_inner(settings["results"], f"{plan}, results")
    folder = results or Path(settings["results"])
    files.make_folder(out)

    @cache
    def study(bench: str) -> Analysis:
        return Analysis(
            results=folder,
            bench=bench,
            reference=settings["ref"],
            scoring=settings["scoring"],
        )

    seeds = settings["seeds"]
    for item in listed.get("table", []):
        yield _one(item, out, lambda item=item: _table(item, study(item["bench"]), seeds))
    for item in listed.get("figure", []):
        yield _one(item, out, lambda item=item: _figure(item, study(item["bench"])))


def _one(item: Mapping[str, Any], out: Path, make: Any) -> Made:
    for old in out.glob(f"{item['file']}.*"):
        old.unlink()
    try:
        content: dict[str, bytes] = make()
    except ClbenchError as err:
        return Made(file=item["file"], hole=str(err))
    paths = []
    for ending, data in content.items():
        paths.append(out / f"{item['file']}.{ending}")
        files.write_bytes(paths[-1], data)
    return Made(file=item["file"], paths=tuple(paths))


def _table(item: Mapping[str, Any], study: Analysis, seeds: list[int]) -> dict[str, bytes]:
    from clbench.report.paper.table import paper_table
    from clbench.report.tables.render import render

    table = paper_table(item["number"], study, source=item["source"], seeds=seeds)
    return {end: (render(table, f) + "\n").encode() for f, end in FORMATS.items()}


def _figure(item: Mapping[str, Any], study: Analysis) -> dict[str, bytes]:
    from clbench.report.figures import draw

    return {kind: draw(item["name"], study, kind) for kind in ("pdf", "png")}
