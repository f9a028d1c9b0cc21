"""Publishing runs: record and tables of finished runs without weights, to lie beside a paper.

An excerpt says that it is one, and is sealed anew over what it keeps, so
tables, figures and reports read it like the run itself. Where a lab keeps
its folders is cut from the record.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.store import files, run_folder
from clbench.store.checksums import check_files, check_record
from clbench.store.record import RunRecord

KEPT = ".csv"
"""Files that come along, beside the copy of a course file: scores, cost, traces."""
WORDS = "record and tables of a run, sealed anew over what is kept here; of paths the last part"


def excerpt(results: Path, to: Path) -> list[Path]:
    """Copy every finished run of a results folder, as record and tables, into another folder.

    Args:
        results: `<out>` of the runs.
        to: gets `<bench>/<strategy>/<run id>/`; what it holds already stays.

    Returns:
        The folders written; runs that are there already, with the same content, are not.

    Raises:
        StoreError: no finished run, one that was changed after it was finished, or another one of
            the same name in `to`. Nothing is copied then.
    """
    finished = {f: run_folder.read_record(f) for f in run_folder.find_runs(results)}
    finished = {f: record for f, record in finished.items() if record["status"] == "finished"}
    if not finished:
        raise StoreError(
            "there are no finished runs",
            where=results,
            next_step="name the --out of `clbench run`, as seen from this folder",
        )
    fresh = []
    for folder, record in finished.items():
        if check_record(folder, record):
            for error in check_files(folder, record):
                raise error
        there = to / folder.relative_to(results)
        if not (there / "run.json").exists():  # written last: without it, nothing counts
            fresh.append(folder)
        elif files.sha256(there / "scores.csv") != files.sha256(folder / "scores.csv"):
            raise StoreError(
                "another run of this name is there already",
                where=there,
                expected=f"the scores of {folder}",
                next_step="name an empty folder, or remove that run",
            )
    for folder in fresh:
        there = to / folder.relative_to(results)
        files.make_folder(there)
        published = [
            *folder.glob(f"*{KEPT}"),
            *(p for p in folder.glob("course/**/*.toml") if p.is_file()),
        ]
        for path in sorted(published):
            name = path.relative_to(folder)
            files.make_folder((there / name).parent)
            files.write_bytes(there / name, path.read_bytes())
        whole = RunRecord.from_json(finished[folder], folder / "run.json")
        copy = dataclasses.replace(without_folders(whole), excerpt=WORDS)
        copy.seal(there)
        copy.write(there)
    return [to / f.relative_to(results) for f in fresh]


def without_folders(record: RunRecord) -> RunRecord:
    """A record that does not say where folders lay on the machine of the run.

    Of a path the last part stays, of one below a folder of data what lies in that. Not cut is the
    identity, for the run id is made from it.
    """
    folders = _folders(record.settings)

    def cut(text: str) -> str:
        for folder in folders:  # a name with spaces, say, whose end no pattern would find
            text = text.replace(folder, "")
        return _without_absolute(text)

    settings = {
        name: _each(value, cut if name == "overrides" else _last_parts)
        for name, value in record.settings.items()
    }
    if "cache" in settings:
        settings["cache"] = None  # a relative one would be made anew wherever the copy is read
    before = ["", *record.command]
    return dataclasses.replace(
        record,
        settings=settings,
        command=[
            (cut if option == "--set" else _last_parts)(word)
            for option, word in zip(before, record.command, strict=False)
        ],
        extends=_each(record.extends, _last_parts),
        predictions=_each(record.predictions, _last_parts),
        with_defaults=_each(record.with_defaults, cut),
        tuned=_each(record.tuned, cut),
        warnings=_each(record.warnings, cut),
    )


def _folders(settings: Mapping[str, Any]) -> list[str]:
    """Folders that hold what the settings name, each with the slash behind it; longest first."""
    words = [settings.get(name) for name in ("out", "cache", "bench", "data")]
    parts = [part for word in words if isinstance(word, str) for part in word.split(",")]
    paths = [part.partition("=")[2] or part for part in parts]
    above = {folder for path in paths for folder in Path(path).parents if Path(path).is_absolute()}
    return sorted((f"{folder}/" for folder in above if folder != folder.parent), key=len)[::-1]


def _each(content: Any, cut: Callable[[str], str]) -> Any:
    """JSON content with every text in it cut; keys stay."""
    if isinstance(content, Mapping):
        return {name: _each(value, cut) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_each(value, cut) for value in content]
    return cut(content) if isinstance(content, str) else content


def _last_parts(word: str) -> str:
    """`a=/data/BTCV,b=/data/LiTS` → `a=BTCV,b=LiTS`; words that name no folder stay.

    >>> _last_parts("btcv=/data/x/BTCV,lits=~/LiTS"), _last_parts("--out"), _last_parts("a:B")
    ('btcv=BTCV,lits=LiTS', '--out', 'a:B')
    """
    return re.sub(r"[^,=]*[/\\](?=[^,=])", "", word)


_SEGMENT = r"[^\s/\\,;:`'\")\]]+"
_ABSOLUTE = re.compile(
    rf"(?<![^\s=,:(\[`'\"])(?:~[\w.-]*|[A-Za-z]:)?(?:[/\\]{_SEGMENT})*[/\\](?=[\w.])"
    rf"|(?<![^\s=,(\[`'\"])(?:file:)?[/\\]{{2,3}}(?:{_SEGMENT}[/\\])+(?=[\w.])"
)
"""An absolute path, or one of a share or an address of a file, up to its last part; no URL."""


def _without_absolute(text: str) -> str:
    """A sentence in which the last part of every absolute path stays; `a/b` may be a name.

    >>> _without_absolute("no image in /data/x/BTCV, of org/model")
    'no image in BTCV, of org/model'
    """
    return _ABSOLUTE.sub("", text)
