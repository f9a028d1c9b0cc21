"""Runs worked off by processes: shared steps, failures, stops, and what goes on afterwards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from clbench import reproducibility, signals
from clbench.cli.grid import _work_off_here
from clbench.errors import SettingError
from clbench.grid import forks, local
from clbench.grid.jobs import Job, State, estimate, states
from clbench.grid.local import Slot, free_bytes, next_job, peak_bytes, slots, work_off
from clbench.store import files

MakeJob = Callable[..., Job]
CPU = Slot(device="cpu", threads=3, environment={})


def trace(job: Job) -> list[str]:
    """What the runs of a study wrote while teaching first steps."""
    path = job.folder.parent.parent / "trace.txt"
    return path.read_text(encoding="utf-8").splitlines()


def test_all_runs_end_and_a_shared_step_is_taught_once(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job(name, seed) for name in ("lwf", "mib", "own") for seed in (0, 1)]
    more = ["--cache", str(finished_record)]
    assert work_off(jobs, [CPU] * 3, more=more) == []
    assert set(states(jobs)) == {State.FINISHED}
    assert len(trace(jobs[0])) == 3  # seed 0, seed 1, and the own one of both `own` runs
    untaught = jobs[0].folder.parent.parent / "untaught.txt"
    assert len(untaught.read_text(encoding="utf-8").splitlines()) == 3  # the others waited
    assert jobs[0].log.read_text(encoding="utf-8") == "lwf 0 3\n"
    assert not list(jobs[0].log.parent.glob("*.json"))
    before = jobs[0].log.stat().st_mtime_ns
    assert work_off(jobs, [CPU], more=more) == []
    assert jobs[0].log.stat().st_mtime_ns == before  # nothing was started again


def test_a_failed_run_is_named_with_its_last_lines_and_stops_no_other(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("bad", 0), make_job("killed", 0), make_job("lwf", 0)]
    more = ["--cache", str(finished_record)]
    failed = work_off(jobs, [CPU] * 2, more=more)
    assert {job.cell.strategy for job in failed} == {"bad", "killed"}
    assert states(jobs) == [State.FAILED, State.FAILED, State.FINISHED]
    bad, killed = jobs[0].failed(), jobs[1].failed()
    assert bad is not None
    assert killed is not None
    assert (bad["status"], bad["last_lines"][-1]) == (1, "boom")
    assert bad["command"].startswith("clbench run --bench tumor_ext --strategy bad --seed 0")
    assert (killed["status"], killed["signal"]) == (-9, "SIGKILL")
    log = jobs[2].log.read_text(encoding="utf-8")
    assert work_off(jobs, [CPU], more=more) == [jobs[1]]  # `bad` finds its first step taught now
    assert states(jobs) == [State.FINISHED, State.FAILED, State.FINISHED]
    assert jobs[2].log.read_text(encoding="utf-8") == log  # it was not made again


def test_a_run_of_another_process_is_left_to_it(make_job: MakeJob, finished_record: Path) -> None:
    jobs = [make_job("lwf", 0), make_job("mib", 1)]
    seen: list[tuple[str, str]] = []

    def watch(event: Mapping[str, Any]) -> None:
        seen.append((event["event"], event["job"].cell.strategy))

    jobs[0].folder.mkdir(parents=True)
    with files.locked(jobs[0].folder / ".lock"):
        assert states(jobs) == [State.RUNNING, State.TO_DO]
        work_off(jobs, [CPU], more=["--cache", str(finished_record)], watch=watch)
    assert seen == [("elsewhere", "lwf"), ("started", "mib"), ("ended", "mib")]
    assert states(jobs) == [State.TO_DO, State.FINISHED]


def test_a_run_that_another_grid_has_just_begun_is_left_to_it_too(
    make_job: MakeJob, finished_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is taken after this grid has looked, and before its own process begins."""
    job, looks, seen = make_job("lwf", 0), list[bool](), list[str]()
    real = Job.is_running

    def is_running(one: Job) -> bool:
        looks.append(real(one))
        return looks[-1] and len(looks) > 1

    monkeypatch.setattr(Job, "is_running", is_running)
    job.folder.mkdir(parents=True)
    with files.locked(job.folder / ".lock"):
        more = ["--cache", str(finished_record)]
        assert work_off([job], [CPU], more=more, watch=lambda e: seen.append(e["event"])) == []
    assert looks[0] is True
    assert seen == ["started", "elsewhere"]
    assert job.failed() is None


def test_a_run_that_was_stopped_by_itself_goes_on(
    make_job: MakeJob, finished_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--cache", str(finished_record)]
    assert work_off([job := make_job("stopped", 0)], [CPU], more=more) == []
    assert states([job]) == [State.FINISHED]
    monkeypatch.setattr(local, "MOST_STOPS", 1)
    assert work_off([other := make_job("stopped", 1)], [CPU], more=more) == [other]
    assert (other.failed() or {})["status"] == signals.STATUS


def test_a_record_that_cannot_be_read_is_the_matter_of_its_own_run(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("lwf", 0), make_job("mib", 1)]
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "run.json").write_text("", encoding="utf-8")
    assert states(jobs) == [State.TO_DO, State.TO_DO]
    assert math.isnan(estimate(jobs, states(jobs)).seconds)
    work_off(jobs, [CPU], more=["--cache", str(finished_record)])
    assert states(jobs)[1] is State.FINISHED


def test_a_first_step_taught_by_another_process_is_waited_for(make_job: MakeJob) -> None:
    job, other = make_job("lwf", 0), make_job("mib", 1)
    first = job.step_folders[0]
    first.mkdir(parents=True)
    with files.locked(first / ".lock"):
        assert states([job, other]) == [State.WAITING, State.TO_DO]
        assert next_job([job, other], []) is other
        assert next_job([job], []) is None
        (first / "step1.pt").touch()
        assert next_job([job], []) is job


def test_a_run_waits_for_every_step_that_another_one_is_to_teach(make_job: MakeJob) -> None:
    job = make_job("lwf", 0)
    longer = replace(job, folder=job.folder / "longer", step_folders=(
        *job.step_folders, job.folder / "step3",
    ))  # fmt: skip
    for number, folder in enumerate(job.step_folders, 1):
        assert next_job([longer], [job]) is None
        folder.mkdir(parents=True)
        (folder / f"step{number}.pt").touch()
    assert next_job([longer], [job]) is longer


def test_asked_to_stop_all_runs_are_asked_and_nothing_is_orphaned(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("endless", 0), make_job("endless", 1), make_job("lwf", 2)]
    home = jobs[0].folder.parent.parent
    started: list[Job] = []

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            started.append(event["job"])
            waiting = threading.Event()
            while not (home / f"endless{event['job'].cell.seed}.txt").exists():
                waiting.wait(0.01)
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(signals.Stopped, match="SIGTERM"):
        work_off(jobs, [CPU] * 2, more=["--cache", str(finished_record)], watch=watch)
    assert started == jobs[:2]
    assert states(jobs) == [State.TO_DO] * 3
    assert [job.failed() for job in jobs] == [None] * 3


@pytest.mark.parametrize("everyone", [True, False])
def test_a_run_that_was_still_importing_failed_only_where_it_alone_was_told(
    make_job: MakeJob, finished_record: Path, everyone: bool
) -> None:
    job = make_job("importing", 0)
    ready = job.folder.parent.parent / "importing0.txt"

    def tell() -> None:
        waiting = threading.Event()
        while not ready.exists():
            waiting.wait(0.01)
        pid = os.getpid() if everyone else started[0].pid
        os.kill(pid, signal.SIGTERM)

    started: list[local.Process] = []
    start = local._start

    def begin(*words: Any) -> Any:
        one = start(*words)
        started.append(one.process)
        return one

    more = ["--cache", str(finished_record)]
    teller = threading.Thread(target=tell)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_start", begin)
        teller.start()
        if everyone:
            with pytest.raises(signals.Stopped, match="SIGTERM"):
                work_off([job], [CPU], more=more)
        else:
            assert work_off([job], [CPU], more=more) == [job]
    teller.join()
    assert states([job]) == [State.TO_DO if everyone else State.FAILED]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells processes of their parent's end")
def test_runs_end_when_the_grid_is_killed(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("endless", 0)
    script = (
        "from clbench.grid import local\n"
        "import pickle, sys\n"
        "local.COMMAND = tuple(sys.argv[1:])\n"
        f"job = pickle.loads({__import__('pickle').dumps(job)!r})\n"
        "slot = local.Slot(device='cpu', threads=1, environment={})\n"
        "local.work_off([job], [slot], more=['--cache', '.'])\n"
    )
    grid = subprocess.Popen([sys.executable, "-c", script, *local.COMMAND])
    waiting = threading.Event()
    while not (job.folder.parent.parent / "endless0.txt").exists():
        waiting.wait(0.05)
    assert job.is_running()
    grid.kill()
    grid.wait()
    while job.is_running():
        waiting.wait(0.05)
    assert not job.is_finished()


def test_places_are_gpus_or_shares_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [s.device for s in slots(None, 2, gpus=0, cpus=5)] == ["cpu", "cpu"]
    assert len(slots(None, 8, gpus=0, cpus=2)) == 1
    (one, *others) = slots(3, 1, gpus=0, cpus=2)
    assert len(others) == 2
    assert one.environment == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in slots(None, 1, gpus=2, cpus=2)] == [
        "4",
        "7",
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in slots(1, 1, gpus=2, cpus=2)] == ["0"]
    # the CPU decodes and scores for a GPU; on the CPU one thread each gives equal bits everywhere
    assert [s.threads for s in slots(None, None, gpus=2, cpus=9)] == [4, 4]
    assert [s.threads for s in slots(1, None, gpus=2, cpus=9)] == [9]
    assert [s.threads for s in slots(None, None, gpus=4, cpus=2)] == [1] * 4
    assert [s.threads for s in slots(None, None, gpus=0, cpus=3)] == [1] * 3
    with pytest.raises(SettingError, match="more runs at a time than GPUs"):
        slots(3, 1, gpus=2, cpus=2)


def test_what_a_run_takes_of_memory_is_the_most_that_any_has_measured(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("lwf", seed) for seed in (0, 1, 2)]
    content = json.loads((finished_record / "run.json").read_text(encoding="utf-8"))
    taught, examined = {"peak_rss_bytes": 5 << 30}, {"examine_peak_rss_bytes": 3 << 30}
    costs: list[dict[str, Any]] = [{}, {"1": {"train": taught}, "2": examined}]
    for job, cost, most in zip(jobs, costs, (1, 5), strict=False):
        job.folder.mkdir(parents=True)
        record = json.dumps(content | {"cost": cost, "status": "unfinished"})
        (job.folder / "run.json").write_text(record, encoding="utf-8")
        assert peak_bytes(jobs) == most << 30
    assert 0 < free_bytes() <= psutil.virtual_memory().total


def test_fewer_runs_at_a_time_where_memory_is_short(
    make_job: MakeJob,
    finished_record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Five cores, and memory for two runs and a half."""
    monkeypatch.setattr(reproducibility, "cores", lambda: 5)
    monkeypatch.setattr(local, "peak_bytes", lambda jobs: 4 << 30)
    monkeypatch.setattr(local, "free_bytes", lambda: 10 << 30)
    monkeypatch.setattr(forks, "are_ready", lambda environment: False)  # a script stands in
    more = ["--cache", str(finished_record)]
    jobs = [make_job("lwf", seed) for seed in range(4)]
    assert _work_off_here(jobs, None, None, gpus=0, more=more) == []
    said = capsys.readouterr().out
    assert "2 at a time, as 10.74 GB of memory are free and a run may take 4.29 GB" in said
    assert "(--jobs 4)" in said
    assert "4 runs to make, 2 at a time, 1 thread(s) each" in said
    monkeypatch.setattr(local, "free_bytes", lambda: 0)
    jobs = [make_job("mib", seed) for seed in range(4)]
    assert _work_off_here(jobs, None, None, gpus=0, more=more) == []
    assert "4 runs to make, 1 at a time" in capsys.readouterr().out
    jobs = [make_job("plop", seed) for seed in range(2)]
    assert _work_off_here(jobs, 2, None, gpus=0, more=more) == []  # asked for
    assert "2 runs to make, 2 at a time" in capsys.readouterr().out


def test_a_run_has_the_device_and_the_environment_of_its_place(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs of a machine on which more are visible: one each, and a session of its own."""
    code = (
        "import os, sys; own = os.getsid(0) == os.getpid(); "
        "print(os.environ['CUDA_VISIBLE_DEVICES'], own, *sys.argv[-4:]); sys.exit(3)"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", code))
    jobs = [make_job("lwf", 0), make_job("mib", 1)]
    work_off(jobs, slots(None, 2, gpus=2, cpus=2))
    assert sorted(job.log.read_text(encoding="utf-8") for job in jobs) == [
        f"{gpu} True --device cuda --threads 2\n" for gpu in (4, 7)
    ]


def test_a_run_that_is_started_again_adds_to_its_log_and_forgets_its_ticket(
    make_job: MakeJob, finished_record: Path
) -> None:
    job = make_job("lwf", 0)
    job.log.parent.mkdir(parents=True)
    job.log.write_text("before\n", encoding="utf-8")
    job.ticket.write_text("{}", encoding="utf-8")
    work_off([job], [CPU], more=["--cache", str(finished_record)])
    assert job.log.read_text(encoding="utf-8") == "before\nlwf 0 3\n"
    assert not job.ticket.exists()


def test_no_place_has_two_runs_at_a_time(
    make_job: MakeJob, finished_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: list[Slot] = []
    start, took_end = local._start, local._took_end

    def started(job: Job, slot: Slot, *rest: Any) -> Any:
        assert slot not in busy
        busy.append(slot)
        return start(job, slot, *rest)

    def ended(one: Any, *rest: Any) -> str:
        busy.remove(one.slot)
        return took_end(one, *rest)

    monkeypatch.setattr(local, "_start", started)
    monkeypatch.setattr(local, "_took_end", ended)
    places = [Slot(device="cpu", threads=k, environment={}) for k in (1, 2)]
    jobs = [make_job("lwf", seed) for seed in range(6)]
    assert work_off(jobs, places, more=["--cache", str(finished_record)]) == []


def test_a_run_that_another_grid_has_just_finished_did_not_fail(
    make_job: MakeJob, finished_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is finished between this grid's look and the start of its own process, which is refused."""
    job, seen = make_job("lwf", 0), list[str]()
    code = (
        "import shutil, sys; from pathlib import Path; word = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "home = Path(word['--out']) / 'tumor_ext' / 'lwf' / '0'; home.mkdir(parents=True)\n"
        "shutil.copy(Path(word['--cache']) / 'run.json', home); sys.exit('busy')"
    )
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", code))
    more = ["--cache", str(finished_record)]
    assert work_off([job], [CPU], more=more, watch=lambda e: seen.append(e["event"])) == []
    assert seen == ["started", "elsewhere"]
    assert job.failed() is None
