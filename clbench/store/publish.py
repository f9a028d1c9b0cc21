"""Publishing runs: record and tables of finished runs without weights, to lie beside a paper.

An excerpt says that it is one, and is sealed anew over what it keeps, so
tables, figures and reports read it like the run itself.
"""

from __future__ import annotations

from pathlib import Path

from clbench.errors import StoreError
from clbench.store import files, run_folder
from clbench.store.checksums import check_files, check_record, seal

KEPT = ".csv"
"""Files that come along, beside the copy of a course file: scores, cost, traces."""
WORDS = "record and tables of a run, sealed anew over what is kept here"


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
        record = {**finished[folder], "excerpt": WORDS}
        seal(there, record)
        run_folder.write_record(there, record)
    return [to / f.relative_to(results) for f in fresh]
