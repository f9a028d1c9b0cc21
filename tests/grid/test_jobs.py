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

from clbench.errors import SettingError
from clbench.grid.jobs import Job, State, estimate, plan_jobs, states
from clbench.grid.study_file import StudyFile, cells

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
