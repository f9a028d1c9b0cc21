"""Working off jobs on a SLURM cluster (submitit): arrays, limits, queued again where they were.

A run that shares its next step with another one is submitted to begin after that one's job, which
lets it go as soon as the step is taught. A job whose time ends, or that is preempted, gets a signal
ahead; its run saves, and the job is queued again.
Whether a run is finished is read from its folder, and whether its job is still queued from
`squeue`: a cluster need not keep accounts.
"""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from clbench.errors import SettingError
from clbench.grid.jobs import Job, State, last_lines
from clbench.grid.local import COMMAND
from clbench.grid.slurm_job import RunInJob
from clbench.store import files

LOOK_S = 30.0
"""Seconds after which a job looks again whether others need to wait for it no longer."""
MOST_TIMEOUTS = 10_000
"""A run may be longer than any number of time limits; submitit's own default is 3."""

OWN_OPTIONS = {
    "time": "--minutes",
    "cpus-per-task": "--threads",
    "mem": "--memory-gb",
    "mem-per-cpu": "--memory-gb",
    "gpus": "--gpus",
    "gpus-per-node": "--gpus",
    "gpus-per-task": "--gpus",
    "gpus-per-socket": "--gpus",
    "partition": "--partition",
    "account": "--account",
}
"""Option of sbatch → the option of `clbench grid` that sets it."""
OWN_WORDS = (
    "array", "dependency", "signal", "job-name", "output", "error", "open-mode", "requeue", "chdir",
    "nodes", "ntasks", "ntasks-per-node",
)  # fmt: skip
"""Options of sbatch that are set so that runs wait for one another, are saved and go on, each by
one process, in the folder that relative paths are meant from."""
_ENDED_WELL = "completed successfully"
"""What submitit says at the end of a job whose command did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What a job asks the cluster for."""

    minutes: int = 24 * 60
    """Time limit of a job; a run may take several."""
    threads: int = 1
    """CPU cores, and threads of the run."""
    memory_gb: int = 16
    """Main memory."""
    gpus: int = 0
    """0: the run computes on the CPU; more than 1 is refused."""
    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    """None: the user's default."""
    warning_s: int = 120
    """So long before its end a job is told to save; half of its time where that is less. The update
    or the case at hand must end within it."""
    at_once: int | None = None
    """Jobs that may run at a time, and runs that share a step then wait for the end of the one that
    teaches it; None: as many as the cluster lets."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch: `qos`, `constraint`, …"""

    def __post_init__(self) -> None:
        if self.gpus > 1:
            raise SettingError(
                "a run computes on one GPU",
                where="--gpus",
                expected="0 or 1",
                got=self.gpus,
            )
        for name, value in self.more.items():
            self._refuse_replaced(name, value)

    def _refuse_replaced(self, name: str, value: str) -> None:
        """Refuse an option of sbatch that would take the place of what is set already.

        Raises:
            SettingError: it would.
        """
        wrong = partial(SettingError, where=f"--sbatch {name}={value}")
        if name in OWN_WORDS:
            raise wrong(
                f"clbench sets {name} of a job itself",
                expected="another option of sbatch, as qos=long",
                next_step="leave it out; a job is one process where the command was typed, is "
                "queued again and waits for others without",
            )
        if (own := OWN_OPTIONS.get(name)) is not None:
            raise wrong(
                f"{own} sets {name} of a job",
                expected=own,
                next_step=f"use {own} in its place",
            )
        if name == "gres" and ("gpu" in value) != bool(self.gpus):
            raise wrong(
                "gres and --gpus say two things",
                expected=f"gres=gpu:1,{value}" if self.gpus else "--gpus 1 beside it",
                got=f"--gpus {self.gpus}",
                next_step="name the GPU in gres as well: it takes the place of what --gpus asks for"
                if self.gpus
                else "add --gpus 1: without it runs compute on the CPU",
            )


def submit(jobs: Sequence[Job], cluster: Cluster, *, more: Sequence[str] = ()) -> list[Job]:
    """Submit every run that is neither finished nor queued; return those submitted.

    Args:
        jobs: of the study.
        cluster: what each asks for.
        more: further words of `clbench run` for each, such as `--cache DIR`.

    Raises:
        SettingError: submitit or SLURM is not there, or the cluster refuses the request.
    """
    waiting = queue(owners(jobs))
    todo = [
        job
        for job in jobs
        if not job.is_finished() and not job.is_running() and job_id(job) not in waiting
    ]
    after = leaders(todo, [job for job in jobs if job_id(job) in waiting])
    submitted: list[Job] = []
    arrays = [number for job in jobs if (number := job_id(job)) is not None and number in waiting]
    while len(submitted) < len(todo):
        ready: dict[str | None, list[Job]] = {}
        for job in todo:
            leader = after[job.folder]
            if job not in submitted and (leader not in todo or leader in submitted):
                number = None if leader is None else job_id(leader)
                ready.setdefault(number, []).append(job)
        for first, array in ready.items():
            # after its end, however it ends: if it failed, one of these teaches the step
            before = [] if first is None else [first]
            until = [_until(job, after[job.folder]) for job in array]
            if cluster.at_once is not None:  # the limit of an array is its own
                before += sorted({number.partition("_")[0] for number in arrays})
                until = [None for _ in array]
            _submit(array, cluster, more, before, until)
            submitted += array
            arrays += filter(None, map(job_id, array))
    return todo


def leaders(todo: Sequence[Job], queued: Sequence[Job]) -> dict[Path, Job | None]:
    """Folder of a run → the run after which it begins; None: it begins at once.

    That is, of those ahead of it that are to teach the next step it lacks, the one with which it
    shares most of what is to be taught.

    Args:
        todo: in order.
        queued: whose jobs wait or run already.
    """
    ahead = [(job, frozenset(job.untaught())) for job in queued]
    after: dict[Path, Job | None] = {}
    for job in todo:
        own = job.untaught()
        sharing = [one for one in ahead if own and own[0] in one[1]]
        best = max(sharing, key=lambda one: len(one[1].intersection(own)), default=None)
        after[job.folder] = best and best[0]
        ahead.append((job, frozenset(own)))
    return after


def _until(job: Job, leader: Job | None) -> Path | None:
    """Checkpoint of the last of the next steps that another run teaches for a run, too."""
    taught = frozenset(leader.untaught()) if leader is not None else frozenset()
    shared = list(takewhile(lambda at: at in taught, job.untaught()))
    if not shared:
        return None
    return shared[-1] / f"step{job.step_folders.index(shared[-1]) + 1}.pt"


def _submit(
    jobs: Sequence[Job],
    cluster: Cluster,
    more: Sequence[str],
    before: Sequence[str],
    until: Sequence[Path | None],
) -> None:
    """Submit runs as one array.

    Args:
        jobs: the runs.
        cluster: what each asks for.
        more: further words of `clbench run`.
        before: numbers of the jobs that are to end before.
        until: checkpoint per run, from which on it need not wait for the first of them; None: it
            must.
    """
    if not jobs:
        return
    try:
        import submitit
    except ImportError as err:
        raise SettingError(
            "--on slurm needs submitit",
            next_step='pip install "clbench[slurm]"',
        ) from err
    logs = jobs[0].log.parent
    files.make_folder(logs)
    try:
        executor = submitit.SlurmExecutor(folder=logs / "slurm", max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(
            job_name="clbench",
            time=cluster.minutes,
            cpus_per_task=cluster.threads,
            mem=f"{cluster.memory_gb}GB",
            signal_delay_s=min(cluster.warning_s, 30 * cluster.minutes),
            stderr_to_stdout=True,
            array_parallelism=cluster.at_once or len(jobs),
            partition=cluster.partition,
            account=cluster.account,
            dependency=f"afterany:{':'.join(before)}" if before else None,
            gres=f"gpu:{cluster.gpus}" if cluster.gpus else None,
            # a cluster may queue jobs again on demand alone, and `srun` may not know of the cores
            additional_parameters={"requeue": True, **cluster.more},
            srun_args=["-c", str(cluster.threads)],
        )
        device = "cuda" if cluster.gpus else "cpu"
        calls = [
            RunInJob(
                (
                    *(*COMMAND, *job.arguments(), *more),
                    *("--device", device, "--threads", str(cluster.threads)),
                ),
                cluster.threads,
                logs,
                LOOK_S,
            )
            for job in jobs
        ]
        with executor.batch():
            queued = [executor.submit(call) for call in calls]
    except (RuntimeError, OSError, subprocess.SubprocessError) as err:
        raise SettingError(
            "the jobs could not be submitted",
            where="SLURM",
            expected="a machine on which `sbatch` works, and a request the cluster can meet",
            got=str(err),
            next_step="try `sinfo`, and look at --partition, --account and the limits; "
            "what was submitted before stays, and the same command goes on",
        ) from err
    for job, submitted, taught in zip(jobs, queued, until, strict=True):
        job.failure.unlink(missing_ok=True)
        log = Path(submitted.paths.stdout)
        ticket: dict[str, Any] = {"job": str(submitted.job_id), "log": str(log), "user": _user()}
        if taught is not None:
            ticket |= {"after": before[0], "until": str(taught)}
        files.write_json(job.ticket, ticket)


def queued(jobs: Sequence[Job]) -> list[Job]:
    """Runs whose job still waits or runs on the cluster; none where SLURM does not answer.

    Args:
        jobs: of the study.
    """
    asked = [job for job in jobs if job.ticket.exists() and not job.is_finished()]
    try:
        waiting = queue(owners(asked)) if asked else {}
    except SettingError:  # from a machine that is no part of the cluster nobody can tell
        return []
    return [job for job in asked if job_id(job) in waiting]


def _ticket(job: Job) -> dict[str, Any]:
    """What was kept of its last job.

    Raises:
        StoreError: it is damaged.
    """
    told = "cancel the job if `squeue` shows it, delete the file and repeat the command"
    return files.read_json(job.ticket, next_step=told)


def job_id(job: Job) -> str | None:
    """The cluster's number of its last job; None: it never had one."""
    return str(_ticket(job)["job"]) if job.ticket.exists() else None


def owners(jobs: Sequence[Job]) -> frozenset[str]:
    """Who else than this user submitted jobs of a study."""
    tickets = [_ticket(job) for job in jobs if job.ticket.exists()]
    return frozenset(filter(None, (ticket.get("user") for ticket in tickets))) - {_user()}


def _user() -> str | None:
    """This user's name; None: the machine does not know it."""
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):
        return None


def queue(others: Iterable[str] = ()) -> dict[str, str]:
    """Number of each job of this user that waits or runs → its state in SLURM's words.

    Args:
        others: users whose jobs are asked for, too.

    Raises:
        SettingError: SLURM is not here, or does not answer.
    """
    everyone = ",".join(sorted(filter(None, {*others, _user()})))
    whose = ["-u", everyone] if others else ["--me"]
    command = ["squeue", *whose, "-h", "-r", "-o", "%i %T"]
    try:
        answer = subprocess.run(  # noqa: S603  # words are no shell's
            command, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as err:
        said = getattr(err, "stderr", None) or err
        raise SettingError(
            "SLURM does not answer",
            where="squeue",
            expected="a machine on which `squeue --me` works",
            got=str(said).strip(),
            next_step="log in on the cluster, or use --on local",
        ) from err
    lines = filter(str.strip, answer.stdout.splitlines())
    return dict(line.split(maxsplit=1) for line in lines)


def with_queue(jobs: Sequence[Job], states: Sequence[State]) -> list[State]:
    """States of jobs with what the cluster's queue says; nothing is written.

    Args:
        jobs: of the study.
        states: of each, as `clbench.grid.jobs.states` reads them from the folders.

    Returns:
        `QUEUED` for runs whose job waits, or has just begun; `FAILED` for those whose job has left
        the queue before they were finished (`left_queue` has its last words), but for runs that
        were finished and removed since. Where SLURM does not answer, the states as they were.
    """
    told = list(states)
    waiting: Mapping[str, str] | None = None
    for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
        asked = (State.TO_DO, State.WAITING, State.FAILED)
        if state not in asked or not job.ticket.exists():
            continue
        if waiting is None:
            try:
                waiting = queue(owners(jobs))
            except SettingError:  # looked at from a machine that is no part of the cluster
                return told
        if job_id(job) in waiting:
            told[i] = State.QUEUED
        elif not job.is_finished() and not _was_removed(job):  # it may have ended since
            told[i] = State.FAILED
    return told


def _was_removed(job: Job) -> bool:
    """Whether a run's job ended well, and there is nothing of the run any more."""
    if (job.folder / "run.json").exists():
        return False
    return any(_ENDED_WELL in line for line in left_queue(job).get("last_lines", ()))


def left_queue(job: Job) -> dict[str, Any]:
    """Last words of a run whose job has left the queue; empty: it never had a job."""
    if not job.ticket.exists():
        return {}
    log = Path(_ticket(job)["log"])
    return {"status": "unknown", "signal": None, "log": str(log), "last_lines": last_lines(log)}
