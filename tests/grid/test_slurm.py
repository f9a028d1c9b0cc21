"""The same study on a real SLURM: arrays, shared steps, signals ahead of the end, cancelled jobs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from slurm_cluster import cluster, need_slurm, wait_until

from clbench import signals
from clbench.cli.grid import _failure, _left_by_slurm
from clbench.errors import SettingError
from clbench.grid import slurm, slurm_job
from clbench.grid.jobs import Job, State, states
from clbench.grid.slurm import (
    Cluster,
    job_id,
    leaders,
    left_queue,
    queue,
    queued,
    submit,
    with_queue,
)
from clbench.grid.slurm_job import RunInJob
from clbench.grid.stops import stopped
from clbench.store.files import write_json

MakeJob = Callable[..., Job]
SMALL = Cluster(minutes=10, memory_gb=1)


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    need_slurm()
    pytest.importorskip("submitit", reason="pip install 'clbench[slurm]'")
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as home, cluster(Path(home)):
        yield


@pytest.fixture(autouse=True)
def command(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench.grid import local

    monkeypatch.setattr(slurm, "COMMAND", local.COMMAND)  # the script that stands in for a run


def now(jobs: list[Job]) -> list[State]:
    return with_queue(jobs, states(jobs))


def begins_again(number: int, ready: Path) -> bool:
    """Whether a job that was queued again runs; not after the two minutes SLURM lets it wait.

    SLURM sets them once the job's last process is gone, which may come after the job is pending:
    so they are taken away when they are there. Some seconds are left: a job that began in the
    second of its end would be refused ("job credential revoked"), which is what the wait is for.

    Args:
        number: of the job.
        ready: file that the job makes.
    """
    words = ["scontrol", "--oneliner", "show", "job", str(number)]
    told = subprocess.run(words, check=False, capture_output=True, text=True).stdout
    found = re.search(r"EligibleTime=(\S+)", told)
    soon = datetime.now() + timedelta(seconds=10)  # local time, as SLURM's
    if found and found[1] > soon.isoformat(timespec="seconds"):
        words = ["scontrol", "update", f"JobId={number}", "StartTime=now+3"]
        subprocess.run(words, check=False, capture_output=True)  # a job that runs refuses it
    return ready.exists()


@pytest.mark.usefixtures("here")
def test_a_study_ends_and_a_shared_step_is_taught_once(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job(name, seed) for name in ("lwf", "mib") for seed in (0, 1)]
    more = ["--cache", str(finished_record)]
    assert submit(jobs, SMALL, more=more) == jobs
    assert len({job_id(job) for job in jobs}) == 4
    assert submit(jobs, SMALL, more=more) == [] or all(job.is_finished() for job in jobs)
    wait_until(lambda: all(job.is_finished() for job in jobs))
    trace = (jobs[0].folder.parent.parent / "trace.txt").read_text(encoding="utf-8")
    assert len(trace.splitlines()) == 2
    assert submit(jobs, SMALL, more=more) == []


@pytest.mark.usefixtures("here")
def test_a_run_begins_when_the_step_it_waits_for_is_taught(
    make_job: MakeJob, finished_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the run that teaches it has ended: that one may teach others for days."""
    monkeypatch.setattr(slurm, "LOOK_S", 0.5)
    jobs = [make_job("endless", 0), make_job("lwf", 0), make_job("mib", 0)]
    submit(jobs, SMALL, more=["--cache", str(finished_record)])
    assert {queue()[str(job_id(job))] for job in jobs[1:]} == {"PENDING"}
    wait_until(lambda: all(job.is_finished() for job in jobs[1:]))
    assert jobs[0].is_running()
    subprocess.run(["scancel", str(job_id(jobs[0]))], check=True)
    wait_until(lambda: not queue())


@pytest.mark.usefixtures("here")
def test_told_of_its_end_a_run_saves_and_its_job_is_queued_again(
    make_job: MakeJob, finished_record: Path
) -> None:
    job = make_job("endless", 0)
    submit([job], SMALL, more=["--cache", str(finished_record)])
    ready = job.folder.parent.parent / "endless0.txt"
    wait_until(ready.exists)
    number = job_id(job)
    assert now([job]) == [State.RUNNING]
    ready.unlink()
    subprocess.run(["scancel", "--signal=USR2", str(number)], check=True)
    wait_until(lambda: not job.is_running())
    wait_until(lambda: queue().get(str(number)) in ("PENDING", "CONFIGURING"))
    assert now([job]) == [State.QUEUED]
    assert job.failed() is None
    wait_until(lambda: begins_again(number, ready))
    assert job_id(job) == number
    subprocess.run(["scancel", str(number)], check=True)
    wait_until(lambda: str(number) not in queue())
    assert now([job]) == [State.FAILED]
    assert job.failed() is None  # who looks writes nothing
    assert left_queue(job)["status"] == "unknown"


@pytest.mark.usefixtures("here")
def test_a_run_told_by_the_cluster_itself_is_queued_again_but_not_when_it_is_cancelled(
    make_job: MakeJob, finished_record: Path
) -> None:
    """A job that is preempted with some seconds of grace gets SIGTERM, which submitit passes over."""
    job = make_job("endless", 0)
    submit([job], SMALL, more=["--cache", str(finished_record)])
    ready, number = job.folder.parent.parent / "endless0.txt", str(job_id(job))
    wait_until(ready.exists)
    ready.unlink()
    (script,) = (job.log.parent / "slurm").glob("*submission.sh")
    asked = script.read_text(encoding="utf-8")
    assert "#SBATCH --requeue" in asked.splitlines()  # a cluster may do so on demand alone
    (start,) = [line for line in asked.splitlines() if line.startswith("srun ")]
    assert " -c 1 " in start
    subprocess.run(["scancel", "--signal=TERM", number], check=True)
    wait_until(lambda: queue().get(number) in ("PENDING", "CONFIGURING"))
    assert job.failed() is None
    wait_until(lambda: begins_again(int(number), ready))
    subprocess.run(["scancel", number], check=True)
    wait_until(lambda: number not in queue())
    assert now([job]) == [State.FAILED]


@pytest.mark.usefixtures("here")
def test_a_killed_job_is_named_and_submitted_again(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("killed", 0), make_job("lwf", 0)]
    more = ["--cache", str(finished_record)]
    submit(jobs, SMALL, more=more)
    wait_until(lambda: not queue() and jobs[1].is_finished())
    assert now(jobs) == [State.FAILED, State.FINISHED]
    failure = left_queue(jobs[0])
    assert any("status -9" in line for line in failure["last_lines"])
    first = job_id(jobs[0])
    assert submit(jobs, SMALL, more=more) == [jobs[0]]
    assert job_id(jobs[0]) != first
    assert jobs[0].failed() is None


@pytest.mark.usefixtures("here")
def test_what_the_cluster_cannot_give_is_an_error(make_job: MakeJob) -> None:
    job = make_job("lwf", 7)
    with pytest.raises(SettingError, match="could not be submitted") as err:
        submit([job], Cluster(partition="gpu_long", memory_gb=1))
    assert "partition" in str(err.value.got)
    with pytest.raises(SettingError, match="could not be submitted"):  # it has no GPU at all
        submit([job], Cluster(gpus=1, memory_gb=1))
    assert job_id(job) is None


def test_a_run_begins_after_the_one_that_teaches_most_of_what_it_lacks(make_job: MakeJob) -> None:
    def job(name: str, *steps: str) -> Job:
        made = make_job(name, 0)
        return replace(made, step_folders=tuple(made.cell.out / "_shared" / s for s in steps))

    one, two = job("one", "a", "b1"), job("two", "a", "b", "c1")
    three, four = job("three", "a", "b", "c2"), job("four", "d")
    after = leaders([one, two, three, four], queued=[])
    assert [after[j.folder] for j in (one, two, three, four)] == [None, one, two, None]
    assert leaders([three], queued=[one])[three.folder] is one
    for number, step in enumerate("ab", 1):
        folder = one.cell.out / "_shared" / step
        folder.mkdir(parents=True)
        (folder / f"step{number}.pt").touch()
    after = leaders([one, two, three, four], queued=[])
    assert [after[j.folder] for j in (one, two, three, four)] == [None, None, None, None]


def test_a_run_waits_for_the_last_of_the_steps_it_shares_in_a_row(make_job: MakeJob) -> None:
    def job(name: str, *steps: str) -> Job:
        made = make_job(name, 0)
        return replace(made, step_folders=tuple(made.cell.out / "_shared" / s for s in steps))

    leader = job("one", "a", "b", "c", "d")
    shared = leader.cell.out / "_shared"
    assert slurm._until(job("two", "a", "b", "x", "d"), leader) == shared / "b" / "step2.pt"
    assert slurm._until(job("three", "x", "a"), leader) is None
    assert slurm._until(leader, None) is None
    (shared / "a").mkdir(parents=True)
    (shared / "a" / "step1.pt").touch()
    assert slurm._until(job("four", "a", "b", "y"), leader) == shared / "b" / "step2.pt"
    assert slurm._until(job("five", "a", "y"), leader) is None


def test_a_job_lets_go_only_those_that_wait_for_what_it_has_taught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "said.txt"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$*" >> {said}\n[ "$2" != JobId=8_2 ]\n', encoding="utf-8"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    taught, untaught = tmp_path / "step1.pt", tmp_path / "step2.pt"
    taught.touch()
    for number, more in {
        "7": {},
        "8_0": {"after": "7", "until": str(taught)},
        "8_1": {"after": "7", "until": str(untaught)},
        "8_2": {"after": "7", "until": str(taught)},  # the cluster does not answer
        "8_3": {"after": "6", "until": str(taught)},
    }.items():
        write_json(tmp_path / f"{number}.slurm.json", {"job": number, "log": "x", **more})
    (tmp_path / "torn.slurm.json").write_text('{"job": ', encoding="utf-8")
    said.touch()
    enough = f"[ $(wc -l < {said}) -ge {1 + slurm_job.TRIES} ] && exit"
    ends = f"for i in $(seq 600); do {enough}; sleep 0.05; done; exit 1"
    RunInJob(["sh", "-c", ends], 1, tmp_path, 0.05)()
    words = Counter(said.read_text(encoding="utf-8").splitlines())
    assert words == {
        "update JobId=8_0 Dependency=": 1,
        "update JobId=8_2 Dependency=": slurm_job.TRIES,
    }
    monkeypatch.delenv("SLURM_JOB_ID")
    RunInJob(["true"], 1, tmp_path, 0.0)()
    assert Counter(said.read_text(encoding="utf-8").splitlines()) == words


def test_no_slurm_and_too_many_gpus(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="one GPU"):
        Cluster(gpus=2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="SLURM does not answer") as err:
        submit([make_job("lwf", 0)], SMALL)
    assert "--on local" in str(err.value.next_step)
    job = make_job("mib", 0)
    write_json(job.ticket, {"job": "7_0", "log": "x"})
    assert now([job]) == [State.TO_DO]  # nothing is said of a queue that cannot be seen
    assert job.failed() is None


def test_a_run_in_a_job_hands_on_its_failure(tmp_path: Path) -> None:
    RunInJob(["true"], 1, tmp_path, 30)()
    with pytest.raises(RuntimeError, match="status 3"):
        RunInJob(["sh", "-c", f"exit $(( $OMP_NUM_THREADS + {os.EX_OK} ))"], 3, tmp_path, 30)()


@pytest.mark.parametrize("status", [signals.STATUS, *(-number for number in signals.SIGNALS)])
def test_a_run_that_was_told_to_stop_is_known_by_its_end(status: int) -> None:
    """By the signal itself where it was still importing."""
    assert stopped(status)
    assert not any(map(stopped, (0, 1, -signal.SIGKILL, -signal.SIGSEGV)))


@pytest.mark.parametrize("status", [signals.STATUS, -signal.SIGTERM])
@pytest.mark.parametrize(
    ("state", "again"), [("RUNNING", True), ("COMPLETING", False), ("", False)]
)
def test_a_saved_run_goes_on_where_nobody_cancelled_its_job(
    state: str, again: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$2" = 7_3 ] && echo "{state}"\n', encoding="utf-8")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    asked: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    try:
        how = f"exit {status}" if status > 0 else f"kill {status} $$"
        with pytest.raises(RuntimeError, match=f"status {status}"):
            RunInJob(["sh", "-c", how], 1, tmp_path, 30)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert asked == [signal.SIGUSR2] * again


def test_runs_queued_on_the_cluster_are_left_to_it(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job(name, 0) for name in ("lwf", "mib", "plop")]
    assert queued(jobs) == []
    ticket(jobs[0], "7_0")
    ticket(jobs[1], "7_1")
    monkeypatch.setattr(slurm, "queue", lambda others=(): {"7_1": "PENDING"})
    assert queued(jobs) == [jobs[1]]
    assert _left_by_slurm(jobs) == [jobs[0], jobs[2]]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert queued(jobs) == []


def ticket(job: Job, number: str, **more: str) -> None:
    job.ticket.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.ticket, {"job": number, "log": str(job.log), **more})


def test_jobs_of_another_user_are_asked_for_by_name(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, asked = make_job("lwf", 0), list[list[str]]()

    def squeue(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        lines = "4711_0 PENDING\n" if "anna,me" in command else ""
        return subprocess.CompletedProcess(command, 0, stdout=lines)

    monkeypatch.setattr(subprocess, "run", squeue)
    monkeypatch.setattr(slurm, "_user", lambda: "me")
    ticket(job, "4711_0", user="me")
    assert now([job]) == [State.FAILED]
    assert "--me" in asked[0]
    ticket(job, "4711_0", user="anna")
    assert now([job]) == [State.QUEUED]
    job.note_failure(job.log, status=1)  # of an attempt before this job
    assert now([job]) == [State.QUEUED]


def test_a_run_that_left_the_queue_is_told_by_the_log_of_its_job(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, log = make_job("lwf", 0), tmp_path / "55_0_log.out"
    monkeypatch.setattr(slurm, "queue", lambda others=(): {})
    write_json(job.ticket, {"job": "55_0", "log": str(log)})
    assert now([job]) == [State.FAILED]
    assert _failure(job).endswith(f"nothing is left in {log}")
    log.write_text("out of memory\n", encoding="utf-8")
    assert now([job]) == [State.FAILED]
    assert _failure(job).endswith(f"{log} ends with:\n    out of memory")
    # it was finished, and somebody removed its folder
    log.write_text("submitit INFO - Job completed successfully\n", encoding="utf-8")
    assert now([job]) == [State.TO_DO]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("chdir=/scratch", "clbench sets chdir"),
        ("ntasks=2", "clbench sets ntasks"),
        ("nodes=2", "clbench sets nodes"),
        ("gpus-per-node=1", "--gpus sets gpus-per-node"),
    ],
)
def test_options_that_would_break_runs_are_refused(option: str, said: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(SettingError, match=said):
        Cluster(more={name: value})


def test_a_limit_of_runs_at_a_time_holds_over_all_arrays(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays wait for those before them: each would otherwise have the limit for itself."""
    jobs = [make_job(name, seed) for name in ("lwf", "mib", "plop") for seed in (0, 1)]
    sent: list[tuple[int, list[str]]] = []
    steps: list[Path | None] = []

    def take(
        array: list[Job], _: Cluster, more: object, before: list[str], until: list[Path | None]
    ) -> None:
        sent.append((len(array), before))
        steps.extend(until)
        for k, job in enumerate(array):
            ticket(job, f"{100 + len(sent)}_{k}")

    monkeypatch.setattr(slurm, "queue", lambda others=(): {})
    monkeypatch.setattr(slurm, "_submit", take)
    submit(jobs, SMALL)
    at_will = list(sent)
    assert [count for count, _ in at_will] == [2, 2, 2]
    assert at_will[1:] == [(2, ["101_0"]), (2, ["101_1"])]
    assert steps == [None, None] + [
        jobs[seed].step_folders[0] / "step1.pt" for seed in (0, 0, 1, 1)
    ]
    sent.clear()
    steps.clear()
    for job in jobs:
        job.ticket.unlink()
    submit(jobs, replace(SMALL, at_once=1))
    assert [of for _, of in sent] == [[], ["101_0", "101"], ["101_1", "101", "102"]]
    assert not any(steps)  # to let one begin early would break the limit
