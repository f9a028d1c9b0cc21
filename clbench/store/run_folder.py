"""Run folders on disk: scores, records, events; written whole or not at all, read with suspicion.

A run lies in `<results>/<bench>/<strategy>/<run id>/`; equal settings give
an equal run id, and equal runs give equal bytes of `scores.csv`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.spec.names import need_name
from clbench.spec.taxonomy import declare_recorded, structure
from clbench.store.csv_rows import read_rows, rows_bytes
from clbench.store.files import read_json, write_bytes, write_json

SCHEMA = 1
"""Version of the layout of a run folder."""
SHARED = "_shared"
"""Folder of results that holds taught steps, each under its identity, for all that share it."""
SCORINGS = ("strict", "paper")
"""The two ways to score a prediction (see `clbench.evaluation.scoring`)."""
STATUSES = ("ok", "both_empty", "fp_only", "fn_only", "not_annotated")
"""What the two masks of a row were: both filled, both empty, a false alarm, a miss; or no truth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One row of `scores.csv`: one structure of one test case, after one step."""

    bench: str
    """Benchmark."""
    bench_version: int
    """Its version."""
    strategy: str
    """Strategy."""
    seed: int
    """Seed of the run."""
    step: int
    """1-based step after which the model was examined."""
    eval_set: str
    """Source of the test case."""
    case: str
    """Case id."""
    structure: str
    """Canonical name."""
    learned_at: int
    """1-based step that taught it."""
    scoring: str
    """`strict` or `paper`."""
    metric: str
    """`dice`, `dice_ceiling`, `nsd_2mm`, `hd95_mm`, … (see `clbench.evaluation.metrics.case`)."""
    value: float
    """The score; NaN where it is not defined (see `status`)."""
    gt_vox: int | None
    """Voxels of the truth; None where it is not annotated."""
    pred_vox: int | None
    """Voxels of the prediction; None where there is no truth to compare with."""
    status: str
    """One of `STATUSES`."""

    def measures(self, metric: str) -> bool:
        """Whether this is a row of `metric`; `nsd` is surface Dice at the structure's tolerance."""
        if metric == "nsd":
            metric = f"nsd_{structure(self.structure).tolerance_mm:g}mm"
        return self.metric == metric


COLUMNS = tuple(f.name for f in dataclasses.fields(Score))


def _key(row: Score) -> tuple[Any, ...]:
    case = (0, int(row.case), "") if row.case.isdecimal() else (1, 0, row.case)
    return (
        row.bench, row.strategy, row.seed, row.step, row.scoring, row.metric, row.eval_set, case,
        row.learned_at, row.structure,
    )  # fmt: skip


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    write_json(folder / "run.json", record)


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """Write `scores.csv`: sorted, values by `repr`, no time stamps."""
    write_bytes(path, scores_bytes(rows))


def scores_bytes(rows: Iterable[Score]) -> bytes:
    """What `scores.csv` holds for these rows."""
    return rows_bytes(COLUMNS, sorted(rows, key=_key))


def read_record(folder: Path) -> dict[str, Any]:
    """Read `run.json`; structures that its course declared are known from then on.

    Raises:
        StoreError: missing, damaged, or of another schema.
    """
    if not (folder / "run.json").exists():
        raise StoreError(
            "there is no run in this folder" if folder.is_dir() else "there is no such run folder",
            where=folder,
            expected="a folder with run.json",
            next_step="name the folder that `clbench run` printed after `Results:`",
        )
    record = read_json(folder / "run.json")
    if record.get("schema") != SCHEMA:
        raise StoreError(
            "the run was written by another version of clbench",
            where=folder / "run.json",
            expected=f"schema {SCHEMA}",
            got=f"schema {record.get('schema')}",
            next_step="run again with --fresh, or read it with the version that wrote it",
        )
    course = record.get("course")
    declare_recorded(course.get("declares", ()) if isinstance(course, dict) else ())
    return record


def read_scores(path: Path) -> list[Score]:
    """Read `scores.csv`.

    Raises:
        StoreError: missing, other columns, or a value that is none; names the line.
    """
    again = "repeat the run's command; with --fresh, if it says that the run is finished"
    allowed = {"scoring": SCORINGS, "status": STATUSES}
    return read_rows(path, Score, what="the scores", next_step=again, allowed=allowed)


def outside_runs(out: Path, what: str) -> None:
    """Refuse to write into a run's folder.

    Args:
        out: where something is to be written.
        what: begins the error: what it is, and a verb.

    Raises:
        StoreError: the folder is a run's, or lies in one.
    """
    for folder in (out.absolute(), *out.absolute().parents):
        if (folder / "run.json").is_file():
            raise StoreError(
                f"{what} no part of a run's folder",
                where=out,
                expected="a folder outside of runs; `clbench verify` refuses files no run made",
                got=f"a folder of the run {folder}",
                next_step="choose another folder",
            )


def case_name(source: str, case: str) -> str:
    """What the files that a run keeps of a test case are called, without ending.

    Args:
        source: of the case.
        case: its id.
    """
    return f"{source}_{case}"


def prediction_path(folder: Path, step: int, source: str, case: str) -> Path:
    """Where a run stores the prediction of a test case.

    Args:
        folder: the run.
        step: 1-based step after which it is predicted.
        source: of the case.
        case: its id.
    """
    return folder / "predictions" / f"step{step}" / f"{case_name(source, case)}.npz"


def checkpoint_path(folder: Path, step: int, shared_step1: str | None) -> Path:
    """Where a run has the checkpoint of a step: in its own folder.

    Runs made before 0.2 have that of step 1 in the folder `_shared` beside those of the strategies.

    Args:
        folder: the run.
        step: 1-based.
        shared_step1: of its record.
    """
    own = folder / f"step{step}.pt"
    if step > 1 or not shared_step1 or own.is_file():
        return own
    need_name(shared_step1, folder / "run.json")
    shared = folder.absolute().parents[1] / SHARED / shared_step1 / own.name
    return shared if shared.is_file() else own


def find_runs(results: Path, *, bench: str | None = None) -> list[Path]:
    """Run folders below a results folder, in order of path; finished or not."""
    return sorted(
        p.parent
        for p in results.glob(f"{bench or '*'}/*/*/run.json")
        if not p.parent.parent.name.startswith("_")
    )


def run_id(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that depend on the settings alone."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class EventLog:
    """Lines of JSON, appended as they happen; a context manager.

    Args:
        path: the file.
        keep: which lines of an earlier, broken-off attempt stay.
        size: instead, how many bytes of it stay, as `flushed` said.
    """

    def __init__(
        self, path: Path, keep: Callable[[Mapping[str, Any]], bool], *, size: int | None = None
    ) -> None:
        self.path = path
        if size is not None:
            os.truncate(path, size)
            return
        events = [e for e in read_events(path) if keep(e)] if path.exists() else []
        write_bytes(path, "".join(map(_line, events)).encode())

    def __enter__(self) -> EventLog:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError as err:
            if value is None:  # what the block raised must not be hidden
                raise self._full(err) from err

    def flushed(self) -> int:
        """Bytes of the log, all of them on the disk.

        Raises:
            StoreError: the disk is full.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()
        except OSError as err:
            raise self._full(err) from err

    def _full(self, err: OSError) -> StoreError:
        return StoreError(
            "the event log could not be written",
            where=self.path,
            got=err.strerror,
            next_step="free some disk space and run the same command again",
        )

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event.

        Raises:
            StoreError: the disk is full.
        """
        try:
            self._file.write(_line(event))
            self._file.flush()
        except OSError as err:
            raise self._full(err) from err


def _line(event: Mapping[str, Any]) -> str:
    # a loss that is not a number ends the run, but must not break the reader of its log
    return json.dumps(event, default=str, allow_nan=True) + "\n"


def take_events(path: Path, log: Path, step: int, later: Collection[int] = ()) -> None:
    """Let a run's log hold its earlier steps, then the log of a step that was taught elsewhere.

    Args:
        path: the run's log; made where it is not there.
        log: of the step alone.
        step: its 1-based number.
        later: steps after it that the run has already; what is logged of them stays.

    Raises:
        StoreError: the disk is full.
    """
    there = read_events(path) if path.exists() else []
    before = "".join(_line(e) for e in there if int(e["step"]) < step)
    after = "".join(_line(e) for e in there if int(e["step"]) in later)
    write_bytes(path, before.encode() + log.read_bytes() + after.encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log; a last line cut off by a crash is left out."""
    events = []
    for line in path.read_bytes().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events
