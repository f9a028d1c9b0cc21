"""Working off jobs on this machine: one process per GPU, or processes of few threads on a CPU.

Each run is a process of its own, so one that dies takes nothing with it, and leaves its lock: a
program `clbench run`, or on a CPU a fork that does the same (`clbench.grid.forks`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from clbench import signals
from clbench.errors import SettingError
from clbench.evaluation.cost.allocator import left_in_group
from clbench.grid.jobs import Job
from clbench.grid.stops import stopped
from clbench.store import files

COMMAND = (sys.executable, "-m", "clbench", "run")
"""What makes one run."""
MOST_STOPS = 10
"""A run that is stopped by somebody else more often than that has failed."""
UNMEASURED_BYTES = 2**30
"""Memory of a run where none has recorded any."""
POLL_S = 0.5
"""Seconds between two looks at the processes."""
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when the one that started it has died."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place where one run at a time computes."""

    device: str
    """Of `--device`."""
    threads: int
    """Of `--threads`."""
    environment: Mapping[str, str]
    """What its process gets beside this one's."""


class Process(Protocol):
    """A process that makes one run, as `subprocess.Popen` has them."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> int | None:
        """Exit status; -n: ended by signal n; None: not known to have ended."""

    def poll(self) -> int | None:
        """The exit status; None: it runs."""

    def wait(self) -> int | None:
        """Its exit status, once it has ended."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal, where it still runs."""


Begin = Callable[[Sequence[str], Path, Mapping[str, str]], Process]
"""Starts a run: words of `clbench run`, file for its output, environment beside this one's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    job: Job
    slot: Slot
    process: Process


def slots(count: int | None, threads: int | None, *, gpus: int, cpus: int) -> list[Slot]:
    """Where runs compute: a GPU each, or the CPU's cores shared out.

    Args:
        count: runs at a time; None: one per GPU, or as many as there are cores for.
        threads: CPU threads of each; None: of a run on a GPU its share of the cores, which decode
            and score, and of a run on the CPU one, for equal bits on every machine.
        gpus: there are.
        cpus: there are.

    Raises:
        SettingError: more than one run per GPU, or no run at all.
    """
    if gpus:
        if count is not None and count > gpus:
            raise SettingError(
                "more runs at a time than GPUs",
                where="--jobs",
                expected=f"at most {gpus}",
                got=count,
                next_step=f"--jobs {gpus}, or --device cpu",
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        names = names[: gpus if count is None else count]
        share = threads or max(1, cpus // len(names))
        return [
            Slot(device="cuda", threads=share, environment={"CUDA_VISIBLE_DEVICES": name})
            for name in names
        ]
    threads = threads or 1
    number = max(1, cpus // threads) if count is None else count
    environment = {"OMP_NUM_THREADS": str(threads)}
    return [Slot(device="cpu", threads=threads, environment=environment)] * number


def peak_bytes(jobs: Iterable[Job]) -> int:
    """Largest memory that a step of these runs took, taught or examined, in bytes.

    Args:
        jobs: of the study; `UNMEASURED_BYTES` where none has recorded any.
    """
    costs = [cost for job in jobs if (record := job.record()) for cost in record.cost.values()]
    parts = [part for cost in costs for part in (cost, cost.get("train", {}))]
    names = ("peak_rss_bytes", "examine_peak_rss_bytes")
    most = max((int(part.get(name, 0)) for part in parts for name in names), default=0)
    return most or UNMEASURED_BYTES


def free_bytes() -> int:
    """Memory that processes could still get, of this machine and of this container or job."""
    return min(int(psutil.virtual_memory().available), left_in_group())


def as_program(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Start a run as a program of its own.

    Args:
        words: of `clbench run`.
        log: its output goes to the end of this file.
        environment: beside this process's own.
    """
    with log.open("ab") as out:
        return subprocess.Popen(  # noqa: S603  # words are no shell's
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            preexec_fn=end_with_parent if sys.platform == "linux" else None,  # one thread
        )


def work_off(
    jobs: Sequence[Job],
    places: Sequence[Slot],
    *,
    more: Sequence[str] = (),
    watch: Callable[[Mapping[str, Any]], None] = lambda event: None,
    begin: Begin = as_program,
) -> list[Job]:
    """Make every run that is not finished; return those that failed.

    A run waits while another one is to teach the next step that both share. A run that another
    process makes is left to it. One that was stopped by itself, as by a machine short of memory,
    goes on. Asked to stop, all runs are, at their next saved place.

    Args:
        jobs: of the study.
        places: where they compute.
        more: further words of `clbench run` for each, such as `--cache DIR`.
        watch: is told of `started`, `ended` and `elsewhere`, each with the job.
        begin: starts a run.

    Raises:
        Stopped: by a signal; the same command goes on.
    """
    todo = [job for job in jobs if not job.is_finished()]
    started: list[_Started] = []
    free = list(places)
    failed: list[Job] = []
    stops: Counter[str] = Counter()
    with signals.listening():
        try:
            while todo or started:
                while free and not signals.asked():
                    job = next_job(todo, [one.job for one in started])
                    if job is None:
                        break
                    todo.remove(job)
                    if job.is_running():
                        watch({"event": "elsewhere", "job": job})
                        continue
                    started.append(_start(job, free.pop(), more, begin))
                    watch({"event": "started", "job": job})
                for one in [s for s in started if s.process.poll() is not None]:
                    started.remove(one)
                    free.append(one.slot)
                    watch({"event": _took_end(one, todo, failed, stops), "job": one.job})
                if signals.asked():
                    break
                time.sleep(POLL_S)
        finally:
            for one in started:
                one.process.send_signal(signal.SIGTERM)
            for one in started:
                one.process.wait()
                _ended(one, told=True)
        signals.check(f"{len(todo) + len(started)} runs left")
    return failed


def next_job(todo: Sequence[Job], started: Sequence[Job]) -> Job | None:
    """The first job that need not wait for a step; None: all of them must.

    Args:
        todo: not started.
        started: at work; each teaches all the steps that it lacks, one after the other.
    """
    coming = {folder for job in started for folder in job.untaught()}
    for job in todo:
        untaught = job.untaught()
        if not untaught or (untaught[0] not in coming and not job.next_is_busy()):
            return job
    return None


def _start(job: Job, slot: Slot, more: Sequence[str], begin: Begin) -> _Started:
    files.make_folder(job.log.parent)
    for told_before in (job.failure, job.ticket):
        told_before.unlink(missing_ok=True)
    job.log.touch()
    of_slot = ("--device", slot.device, "--threads", str(slot.threads))
    words = [*job.arguments(), *of_slot, *more]
    return _Started(job=job, slot=slot, process=begin(words, job.log, slot.environment))


def end_with_parent() -> None:
    """Have this process asked to stop when the one that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _took_end(one: _Started, todo: list[Job], failed: list[Job], stops: Counter[str]) -> str:
    """Note what became of a process; returns the event.

    Args:
        one: it has ended.
        todo: grows by a run that is to go on.
        failed: grows by one that failed.
        stops: how often each run was stopped; grows.
    """
    job, name = one.job, one.job.cell.name
    if one.process.returncode == signals.STATUS and not signals.asked():
        stops[name] += 1
        if stops[name] <= MOST_STOPS:
            todo.append(job)
            return "ended"
    too_often = stops[name] > MOST_STOPS
    if _ended(one, told=signals.asked() is not None, too_often=too_often):
        if job.is_elsewhere():  # another grid was faster by less than a start takes
            job.failure.unlink(missing_ok=True)
            return "elsewhere"
        failed.append(job)
    return "ended"


def _ended(one: _Started, *, told: bool, too_often: bool = False) -> bool:
    """Note what became of a process; returns whether its run failed.

    Args:
        one: it has ended.
        told: all runs are told to stop; a signal to this one alone is somebody else's.
        too_often: to have been stopped counts as failed.
    """
    status = one.process.returncode
    assert status is not None  # noqa: S101  # it has ended
    if status == 0 or (told and stopped(status)):
        return False
    if status == signals.STATUS and not too_often:
        return False
    name = signal.Signals(-status).name if status < 0 else None
    one.job.note_failure(one.job.log, status=status, signal=name)
    return True
