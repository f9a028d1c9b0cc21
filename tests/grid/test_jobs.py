"""Jobs of a study: one per run, their states, and how long the rest takes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clbench.cli.grid import _at_work, _failure, _table
from clbench.errors import SettingError
from clbench.grid.jobs import Job, State, estimate, plan_jobs, states
from clbench.grid.study_file import StudyFile, cells
from clbench.store import files

MakeJob = Callable[..., Job]


def plan(folder: str) -> Any:
    return SimpleNamespace(
        benchmark=SimpleNamespace(name="tumor_ext", steps=[1, 2]),
        profile=SimpleNamespace(name="quick"),
        folder=Path(folder),
        step_folder=lambda number: Path("_shared", str(number)),
    )


def test_two_cells_that_are_one_run_are_refused() -> None:
    study = StudyFile(
        courses=("tumor_ext",),
        strategies=("lwf",),
        settings={"default": (), "same": ("train.lr=0.001",)},
    )
    assert len(plan_jobs(cells(study), lambda cell: plan(cell.settings))) == 2
    with pytest.raises(SettingError, match="one run") as err:
        plan_jobs(cells(study), lambda cell: plan("x"))
    assert "default, lwf, seed 0; tumor_ext, same, lwf, seed 0" in str(err.value.where)


def finish(job: Job, record: Path, *, seconds: tuple[float, float], steps_done: int = 2) -> None:
    """Give a job the record of a run that took so long per step."""
    job.folder.mkdir(parents=True)
    content = json.loads((record / "run.json").read_text(encoding="utf-8"))
    content["cost"] = {
        str(i): {"train": {"train_s": s - 1}, "examine_s": 1} for i, s in enumerate(seconds, 1)
    }
    content["steps_done"] = steps_done
    content["status"] = "finished" if steps_done == 2 else "running"
    (job.folder / "run.json").write_text(json.dumps(content), encoding="utf-8")


def test_what_is_left_is_estimated_from_what_was_measured(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job(n, s) for n in ("lwf", "mib") for s in (0, 1, 2)]
    assert math.isnan(estimate(jobs, states(jobs)).seconds)
    finish(jobs[0], finished_record, seconds=(100, 30))
    first = jobs[0].step_folders[0]
    first.mkdir(parents=True)
    (first / "step1.pt").touch()
    now = states(jobs)
    assert now == [State.FINISHED] + [State.TO_DO] * 5
    rest = estimate(jobs, now)
    # two first steps, each taught once and examined twice, and one to be examined; five second ones
    assert rest.seconds == pytest.approx(2 * (99 + 2) + 1 + 5 * 30)
    assert rest.unmeasured == 3
    finish(jobs[3], finished_record, seconds=(100, 70))
    finish(jobs[1], finished_record, seconds=(100, 30), steps_done=1)
    shutil.copytree(first, jobs[1].step_folders[0])
    rest = estimate(jobs, states(jobs))
    # left: lwf 1 (step 2), lwf 2 (both), mib 1 and mib 2 (step 2, and step 1 to be examined)
    assert rest.seconds == pytest.approx(30 + 100 + 30 + 71 + 71)
    assert rest.unmeasured == 0


def test_runs_of_other_settings_are_no_measure(make_job: MakeJob, finished_record: Path) -> None:
    """Epochs among them: a thousand take longer than one."""

    def job(strategy: str, seed: int, *words: str) -> Job:
        one = make_job(f"{strategy}{''.join(words)}", seed)
        return replace(one, cell=replace(one.cell, strategy=strategy, overrides=words))

    short, long = ("train.epochs=1",), ("train.epochs=1000",)
    jobs = [job("lwf", 0, *short), job("lwf", 1, *short), job("lwf", 2, *long)]
    finish(jobs[0], finished_record, seconds=(10, 10))
    rest = estimate(jobs, states(jobs))
    assert (rest.seconds, rest.unmeasured) == (pytest.approx(40), 1)
    # another strategy with the same settings is nearer than the same one with others
    jobs = [*jobs, job("mib", 3, *long)]
    finish(jobs[-1], finished_record, seconds=(1000, 3000))
    rest = estimate(jobs, states(jobs))
    assert (rest.seconds, rest.unmeasured) == (pytest.approx(20 + 4000), 1)


def test_a_job_says_its_command(make_job: MakeJob) -> None:
    job = make_job("lwf", 3)
    assert job.command().startswith("clbench run --bench tumor_ext --strategy lwf --seed 3 --out ")


def test_a_finished_run_that_does_not_know_of_its_tuning_is_not_left(
    make_job: MakeJob, finished_record: Path
) -> None:
    job = make_job("lwf", 0)
    finish(job, finished_record, seconds=(1.0, 1.0))
    tuned = replace(job, cell=replace(job.cell, tuned="tuned.toml"))
    assert job.is_finished()
    assert not tuned.is_finished()
    path = job.folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tuned": {"rule": "transfer"}}))
    assert tuned.is_finished()


def test_what_a_step_prepares_is_work_too(make_job: MakeJob, finished_record: Path) -> None:
    jobs = [make_job("lwf", 0), make_job("lwf", 1)]
    finish(jobs[0], finished_record, seconds=(10, 10))
    path = jobs[0].folder / "run.json"
    content = json.loads(path.read_text())
    content["cost"]["2"]["train"]["prepare_s"] = 500.0
    path.write_text(json.dumps(content))
    assert estimate(jobs, states(jobs)).seconds == pytest.approx(10 + 10 + 500)


def test_runs_of_another_profile_are_no_measure(make_job: MakeJob, finished_record: Path) -> None:
    jobs = [make_job("lwf", 0), replace(make_job("lwf", 1), profile="paper")]
    finish(jobs[0], finished_record, seconds=(10, 10))
    assert math.isnan(estimate(jobs, states(jobs)).seconds)


def test_a_failed_run_that_is_made_again_is_running(make_job: MakeJob) -> None:
    job = make_job("lwf", 0)
    job.folder.mkdir(parents=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.note_failure(job.log, status=1)
    assert states([job]) == [State.FAILED]
    with files.locked(job.folder / ".lock"):
        assert states([job]) == [State.RUNNING]


def test_a_run_waits_for_its_next_step_alone(make_job: MakeJob) -> None:
    job = make_job("lwf", 0)
    job.step_folders[1].mkdir(parents=True)
    with files.locked(job.step_folders[1] / ".lock"):
        assert states([job]) == [State.TO_DO]


def test_a_failure_keeps_the_last_lines_in_order(make_job: MakeJob, tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {k}\n" for k in range(30)), encoding="utf-8")
    job = make_job("lwf", 0)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.note_failure(log, status=1)
    assert (job.failed() or {})["last_lines"] == [f"line {k}" for k in range(18, 30)]


def test_a_note_of_a_failure_that_is_torn_stops_no_study(make_job: MakeJob) -> None:
    jobs = [make_job("lwf", 0), make_job("mib", 0)]
    jobs[0].log.parent.mkdir(parents=True, exist_ok=True)
    jobs[0].log.write_text("boom\n", encoding="utf-8")
    jobs[0].failure.write_text("{", encoding="utf-8")
    assert states(jobs) == [State.FAILED, State.TO_DO]
    assert "status unknown" in _failure(jobs[0])
    assert "boom" in _failure(jobs[0])


def test_status_counts_the_steps_of_finished_runs_and_names_what_is_unmeasured(
    make_job: MakeJob, finished_record: Path
) -> None:
    """An excerpt keeps no checkpoint."""
    jobs = [make_job("lwf", 0), make_job("mib", 1)]
    finish(jobs[0], finished_record, seconds=(10, 10))
    notes = _table(jobs).notes
    assert notes[0].startswith("steps: 2 of 4 taught; these runs have 4 in all")
    assert "1 runs with steps that none of their strategy and settings has" in "\n".join(notes)
    assert "none of their strategy" not in "\n".join(_table(jobs[:1]).notes)


def log_updates(folder: Path, count: int, *, of: int) -> None:
    """Write the log of a step that is being taught: so many updates, and the start of a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"event": "update", "step": 1, "phase": "train", "epoch": k // 4, "iteration": k % 4}
        for k in range(count)
    ]
    text = "".join(json.dumps(line | {"of": of}) + "\n" for line in lines)
    (folder / "events.jsonl").write_text(text + '{"event": "update", "st', encoding="utf-8")


def test_a_run_that_goes_on_measures_its_steps_and_counts_with_what_it_lacks(
    make_job: MakeJob, finished_record: Path
) -> None:
    jobs = [make_job("lwf", seed) for seed in (0, 1, 2)]
    finish(jobs[0], finished_record, seconds=(101, 41), steps_done=1)  # of step 2 a part
    for at, step in ((jobs[0].step_folders[0], 1), (jobs[1].step_folders[0], 1)):
        at.mkdir(parents=True)
        (at / f"step{step}.pt").touch()
    assert math.isnan(estimate(jobs, states(jobs)).seconds)  # nobody has finished a second step
    finish(jobs[1], finished_record, seconds=(101, 41))
    log_updates(jobs[0].step_folders[1], 30, of=40)
    log_updates(jobs[2].step_folders[0], 10, of=40)
    jobs[2].folder.mkdir(parents=True)
    # 0: three quarters of its second step are taught; 2: a quarter of its first
    with files.locked(jobs[0].folder / ".lock"), files.locked(jobs[2].folder / ".lock"):
        rest = estimate(jobs, states(jobs))
        assert rest.seconds == pytest.approx((10 + 1) + (75 + 1 + 41))
        assert (rest.unmeasured, rest.at_work) == (0, 2)
        notes = "\n".join(_table(jobs).notes)
    assert "about 0:02:08; by the 2 runs at work now: about 0:01:04" in notes
    assert f"{jobs[0].cell.name}: step 2 of 2, update 30 of 40" in notes
    assert f"{jobs[2].cell.name}: step 1 of 2, update 10 of 40" in notes
    stopped = estimate(jobs, states(jobs))
    assert stopped.seconds == pytest.approx((40 + 1) + (100 + 1 + 41))
    assert stopped.at_work == 0


def test_a_run_at_work_says_where_it_is(make_job: MakeJob) -> None:
    job = make_job("lwf", 0)
    assert _at_work(job) == "step 1 of 2, no update yet"
    log_updates(job.step_folders[0], 0, of=40)
    assert _at_work(job) == "step 1 of 2, no update yet"
    for number, at in enumerate(job.step_folders, 1):
        at.mkdir(parents=True, exist_ok=True)
        (at / f"step{number}.pt").touch()
    assert _at_work(job) == "all steps are taught, examining"
