"""The runs of a study as jobs: where each one's folder is, what it shares, how far it is."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from clbench.errors import SettingError, StoreError
from clbench.grid.study_file import Cell
from clbench.store import files
from clbench.store.record import RunRecord

if TYPE_CHECKING:
    from clbench.run.plan import Plan

LOGS = "_logs"
"""Folder of results that holds the output of the runs of a grid, and why some failed."""
TAIL_LINES = 12
"""Last lines of a failed run that are shown."""


class State(StrEnum):
    """How far a run is."""

    FINISHED = "finished"
    RUNNING = "running"
    QUEUED = "queued"
    """On a cluster."""
    WAITING = "waiting"
    """For another run to teach the next step, which both share."""
    FAILED = "failed"
    TO_DO = "to do"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run, planned: nothing of it needs to be there yet."""

    cell: Cell
    """What was asked for."""
    bench: str
    """Name of the course."""
    folder: Path
    """Of the run."""
    step_folders: tuple[Path, ...]
    """Where each step is taught; runs that agree in a step share its folder."""
    profile: str
    """Name of its profile."""

    @property
    def log(self) -> Path:
        """Where its output goes."""
        name = f"{self.bench}_{self.folder.parent.name}_{self.folder.name}.log"
        return self.cell.out / LOGS / name

    @property
    def failure(self) -> Path:
        """Says why the last attempt failed; absent where it did not."""
        return self.log.with_suffix(".json")

    @property
    def ticket(self) -> Path:
        """Names its job on a cluster; absent where it never had one."""
        return self.log.with_suffix(".slurm.json")

    def taught(self, number: int) -> bool:
        """Whether a 1-based step is taught, for this run or for one that shares it."""
        name = f"step{number}.pt"
        return any((at / name).exists() for at in (self.folder, self.step_folders[number - 1]))

    def untaught(self) -> tuple[Path, ...]:
        """Folders of the steps that are still to be taught, in order."""
        return tuple(
            at for number, at in enumerate(self.step_folders, 1) if not self.taught(number)
        )

    def teaching(self) -> Teaching | None:
        """How far the step at hand is; None: all are taught."""
        number = next((n for n in range(1, len(self.step_folders) + 1) if not self.taught(n)), None)
        return None if number is None else Teaching.read(number, self.step_folders[number - 1])

    def arguments(self) -> tuple[str, ...]:
        """Words of `clbench run` that make this run, and no other that a changed file asks for."""
        return (*self.cell.arguments(), "--run-id", self.folder.name)

    def command(self) -> str:
        """The command that makes the run, to be pasted."""
        return shlex.join(["clbench", "run", *self.cell.arguments()])

    def record(self) -> RunRecord | None:
        """`run.json`; None: not there, or not to be read, of which the run says more."""
        if not (self.folder / "run.json").exists():
            return None
        try:
            return RunRecord.read(self.folder)
        except StoreError:
            return None

    def is_finished(self) -> bool:
        """Whether all steps are taught and examined, and the record says how it was tuned."""
        record = self.record()
        if record is None or record.status != "finished":
            return False
        return self.cell.tuned is None or record.tuned is not None

    def is_elsewhere(self) -> bool:
        """Whether another process finished it or works on it: one that found that out ends so."""
        return self.is_finished() or self.is_running()

    def is_running(self) -> bool:
        """Whether a process works on it, here or on another machine that shares its files."""
        return files.is_locked(self.folder / ".lock")

    def next_is_busy(self) -> bool:
        """Whether a process teaches the next step that it needs."""
        untaught = self.untaught()
        return bool(untaught) and files.is_locked(untaught[0] / ".lock")

    def failed(self) -> Mapping[str, Any] | None:
        """Exit status and last lines of the attempt that failed; None: none did."""
        if not self.failure.exists():
            return None
        try:
            return files.read_json(self.failure)
        except StoreError:  # it failed, whatever the note said; the next attempt replaces it
            return {"status": "unknown", "signal": None, "last_lines": last_lines(self.log)}

    def note_failure(self, log: Path, *, status: int | str, signal: str | None = None) -> None:
        """Write down that it failed.

        Args:
            log: its output; the last lines are kept.
            status: exit status, or a word where it is not known.
            signal: the signal that ended it, if one did.
        """
        failure = {"status": status, "signal": signal, "last_lines": last_lines(log)}
        files.write_json(self.failure, {**failure, "command": self.command()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """How far a step is that is being taught."""

    number: int
    """Of the step, from 1."""
    done: int = 0
    """Updates made, of the phase at hand."""
    of: int = 0
    """Updates of that phase; 0: none was made yet."""

    @classmethod
    def read(cls, number: int, folder: Path) -> Teaching:
        """Read what the step's log says.

        Args:
            number: of the step, from 1.
            folder: where it is taught.
        """
        try:
            lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return cls(number=number)
        whole = [line for line in lines if b'"event": "update"' in line and line.endswith(b"\n")]
        if not whole:
            return cls(number=number)
        last = json.loads(whole[-1])
        phase = f'"phase": {json.dumps(last["phase"])}'.encode()
        return cls(number=number, done=sum(phase in line for line in whole), of=last["of"])

    @property
    def share(self) -> float:
        """Done of the phase at hand, which stands for the step: 0 to 1."""
        return min(1.0, self.done / self.of) if self.of else 0.0


def last_lines(log: Path) -> list[str]:
    """The end of a log; none where it is not there."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text.splitlines()[-TAIL_LINES:]


def plan_jobs(cells: Iterable[Cell], plan: Callable[[Cell], Plan]) -> list[Job]:
    """A job per cell; two cells that are one run are refused.

    Args:
        cells: what was asked for.
        plan: opens the data of a cell, and fixes its identity.

    Raises:
        ClbenchError: a cell that cannot be planned, named; nothing has been started.
    """
    jobs: list[Job] = []
    seen: dict[Path, Cell] = {}
    for cell in cells:
        planned = plan(cell)
        if (other := seen.setdefault(planned.folder, cell)) is not cell:
            raise SettingError(
                "two entries of the study are one run",
                where=f"{other.name}; {cell.name}",
                expected="settings that differ in something that a run depends on",
                got=planned.folder,
                next_step="remove one of the two",
            )
        jobs.append(
            Job(
                cell=cell,
                bench=planned.benchmark.name,
                folder=planned.folder,
                step_folders=tuple(
                    planned.step_folder(i + 1) for i in range(len(planned.benchmark.steps))
                ),
                profile=planned.profile.name,
            )
        )
    return jobs


def states(jobs: Sequence[Job]) -> list[State]:
    """How far each job is, read from the folders of results."""
    busy = functools.cache(lambda at: files.is_locked(at / ".lock"))

    def state(job: Job) -> State:
        if job.is_finished():
            return State.FINISHED
        if job.is_running():
            return State.RUNNING
        if job.failed() is not None:
            return State.FAILED
        untaught = job.untaught()
        return State.WAITING if untaught and busy(untaught[0]) else State.TO_DO

    return [state(job) for job in jobs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long what is left will take, from runs that were measured."""

    seconds: float
    """Of work, one run after the other; nan where nothing comparable was measured."""
    unmeasured: int
    """Runs with a step that their strategy and settings have no measure of; others stand for it."""
    at_work: int = 0
    """Runs that are being made."""


def estimate(jobs: Sequence[Job], states: Sequence[State]) -> Estimate:
    """Work that is left, by the mean of measured steps of runs alike in all but the seed.

    A step is taught once for all that share it, and examined by each. A run that has begun counts
    with the steps it lacks, and of the one being taught with the updates it lacks. Where no run of
    a strategy, or none with its settings, has measured a step, those of other strategies with
    these settings are taken, and else any of the course.

    Args:
        jobs: of the study.
        states: of each.
    """
    own: dict[_Alike, list[tuple[float, float]]] = {}
    for job in jobs:
        for step, seconds in _step_seconds(job.record()).items():
            own.setdefault(_Alike.of(job, step), []).append(seconds)
    running = [job for job, state in zip(jobs, states, strict=True) if state is State.RUNNING]
    share = {
        job.step_folders[now.number - 1]: now.share
        for job in running
        if (now := job.teaching()) is not None
    }
    left, unmeasured = 0.0, 0
    counted: set[Path] = set()
    for job, state in zip(jobs, states, strict=True):
        if state is State.FINISHED:
            continue
        record = job.record()
        done = record.steps_done if record else 0
        known = True
        for step in range(done + 1, len(job.step_folders) + 1):
            at = job.step_folders[step - 1]
            lacks = 0.0 if at in counted or job.taught(step) else 1 - share.get(at, 0.0)
            counted.add(at)
            key = _Alike.of(job, step)
            near = {other: nearness for other in own if (nearness := key.nearness(other))}
            nearest = max(near.values(), default=0)
            values = [v for other in near if near[other] == nearest for v in own[other]]
            known &= key in own
            left += fmean(lacks * t + e for t, e in values) if values else float("nan")
        unmeasured += not known
    return Estimate(seconds=left, unmeasured=unmeasured, at_work=len(running))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Alike:
    """What decides how long a step takes."""

    bench: str
    profile: str
    strategy: str
    overrides: tuple[str, ...]
    step: int

    @classmethod
    def of(cls, job: Job, step: int) -> _Alike:
        cell = job.cell
        return cls(
            bench=job.bench,
            profile=job.profile,
            strategy=cell.strategy,
            overrides=cell.overrides,
            step=step,
        )

    def nearness(self, other: _Alike) -> int:
        """3: alike; 2: but for the strategy; 1: but for strategy and settings; 0: incomparable."""
        if (self.bench, self.profile, self.step) != (other.bench, other.profile, other.step):
            return 0
        return 1 if self.overrides != other.overrides else 2 + (self.strategy == other.strategy)


def _step_seconds(record: RunRecord | None) -> dict[int, tuple[float, float]]:
    """Step that is taught and examined → seconds of either that a run measured."""
    if record is None:
        return {}
    return {
        int(step): (
            float(cost["train"].get("prepare_s", 0)) + float(cost["train"]["train_s"]),
            float(cost.get("examine_s", 0)),
        )
        for step, cost in record.cost.items()
        if "train" in cost and int(step) <= record.steps_done
    }
