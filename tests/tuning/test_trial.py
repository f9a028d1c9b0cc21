"""What a trial leaves of the steps it taught or shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clbench import signals
from clbench.errors import AvalancheError, DivergedError, TrainingError
from clbench.run import teach
from clbench.run.plan import RunSettings
from clbench.store import files
from clbench.store.record import RunRecord
from clbench.store.shared_steps import run_name
from clbench.tuning import trial as trial_module
from clbench.tuning.trial import Trial, TrialPlan, plan_trial, remove_steps, run_trial


def planned(out: Path, cache: Path, name: str = "trial", **changes: Any) -> TrialPlan:
    base = RunSettings(
        **{"bench": "tumor_ext", "strategy": "finetune", "seed": 7, "profile": "smoke", "out": out,
           "cache": cache, "overrides": ("train.epochs=1", "train.iterations=2"), **changes}
    )  # fmt: skip
    return plan_trial(base, out / name, 2)


def quiet(event: dict[str, Any]) -> None:
    """Hears nothing."""


def test_a_trial_removes_the_later_steps_that_it_taught_and_no_others(tmp_path: Path) -> None:
    home = tmp_path / "finetune" / "trial_001"
    shared = {number: tmp_path / "_shared" / f"id{number}" for number in range(1, 6)}
    taught_by = {1: home, 2: home, 3: tmp_path / "finetune" / "another", 4: home}
    for number, run in taught_by.items():
        for folder in (home, shared[number]):
            files.write_bytes(folder / f"step{number}.pt", b"weights")
            note = {"origin": {"identity": f"id{number}", "run": run_name(run), "before": None}}
            files.write_json(folder / f"step{number}.json", note)
    files.write_bytes(shared[5] / "resume" / "newest.pt", b"diverged here, so it has no note")

    with files.locked(shared[4] / ".lock"):
        remove_steps(home, shared.__getitem__, 5)

    assert [number for number, folder in shared.items() if folder.exists()] == [1, 3, 4]
    assert (shared[3] / "step3.pt").read_bytes() == b"weights"
    assert sorted(p.name for p in home.iterdir()) == [f"step{n}.json" for n in taught_by]


def test_a_trial_stopped_in_its_last_step_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, cache_root: Path
) -> None:
    whole = run_trial(planned(tmp_path / "whole", cache_root), 1, {}, quiet)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "update" and event["step"] == 2:
            signals.ask("SIGTERM")

    out = tmp_path / "parts"
    with signals.listening(), pytest.raises(signals.Stopped):
        run_trial(planned(out, cache_root, checkpoint_s=0), 1, {}, stop)
    assert RunRecord.read(out / "trial").steps_done == 1
    updates: list[int] = []
    again = run_trial(
        planned(out, cache_root), 1, {},
        lambda e: updates.append(e["step"]) if e["event"] == "update" else None,
    )  # fmt: skip
    assert updates == [2]
    assert (again.score, again.dice, again.updates) == (whole.score, whole.dice, whole.updates)
    assert again.opened == whole.opened


def test_a_trial_killed_once_its_checkpoints_are_gone_teaches_nothing_again(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*paths: Any) -> None:
        remove_steps(*paths)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trial_module, "remove_steps", kill)
        with pytest.raises(Killed):
            run_trial(planned(tmp_path, cache_root), 1, {}, quiet)
    home = tmp_path / "trial"
    assert not [*home.glob("step*.pt")]
    assert RunRecord.read(home).status != "finished"
    events: list[str] = []
    trial = run_trial(planned(tmp_path, cache_root), 1, {}, lambda e: events.append(e["event"]))
    assert not {"update", "shared", "validated"} & {*events}
    assert (trial.updates, trial.score) == (
        4, pytest.approx(sum(trial.dice.values()) / len(trial.dice))
    )  # fmt: skip
    assert RunRecord.read(home).status == "finished"


@pytest.mark.parametrize("kind", [TrainingError, AvalancheError, DivergedError])
def test_an_error_of_the_strategy_is_a_trial_without_score(
    kind: type[Exception], tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = teach.teach

    def fail(step: Any) -> None:
        if step.lesson.number == 2:
            raise kind("its penalty cannot be computed")
        taught(step)

    monkeypatch.setattr(teach, "teach", fail)
    trial = run_trial(planned(tmp_path, cache_root), 3, {"train.lr": 0.1}, quiet)
    assert (trial.score, trial.updates) == (None, 2)
    assert trial.failure == "its penalty cannot be computed"
    assert trial.fault == (kind is not DivergedError)
    assert Trial.read(tmp_path / "trial") == trial
    assert not [*(tmp_path / "trial").glob("step*.pt")]


def test_an_error_before_anything_is_begun_is_no_matter_of_one_trial(
    tmp_path: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AvalancheError("Avalanche is not installed")

    monkeypatch.setattr(trial_module, "run_plan", refuse)
    with pytest.raises(AvalancheError, match="not installed"):
        run_trial(planned(tmp_path, cache_root), 1, {}, quiet)
    assert Trial.read(tmp_path / "trial") is None
