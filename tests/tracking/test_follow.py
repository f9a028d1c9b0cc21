"""Trackers get a run's own numbers, live and afterwards, for real and offline; they stop no run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import ClbenchError, StoreError, UnknownName
from clbench.signals import Stopped
from clbench.store import run_folder
from clbench.tracking import follow
from clbench.tracking.follow import Follower, numbers, scores, send, tracked
from clbench.tracking.trackers import PATIENCE, End, MLflow, WandB


class Recorded:
    """A tracker that holds what it gets."""

    def __init__(self, folder: Path = Path()) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, str] = {}
        self.ended = 0
        self.how: list[str] = []

    def begin(self, name: str, config: Mapping[str, str]) -> None:
        self.name, self.config = name, dict(config)

    def log(self, values: Mapping[str, float], at: int) -> None:
        self.values.append((at, dict(values)))

    def end(self, how: End = "finished") -> None:
        self.ended += 1
        self.how.append(how)


class Broken(Recorded):
    def log(self, values: Mapping[str, float], at: int) -> None:
        raise OSError("no space left")


def updates(run: Path) -> list[dict[str, Any]]:
    events = run_folder.read_events(run / "events.jsonl")
    return [e for e in events if e["event"] == "update"]


def test_a_run_on_disk_is_sent_whole(smoke_run: Path) -> None:
    tracker = Recorded()
    Follower(tracker, print).replay(smoke_run)
    losses = [(at, v["step 2/loss"]) for at, v in tracker.values if "step 2/loss" in v]
    events = updates(smoke_run)
    first = [e for e in events if e["step"] == 1]
    assert losses == [(len(first) + k, e["loss"]) for k, e in enumerate(events[len(first) :], 1)]
    assert tracker.config["profile.name"] == "smoke"
    assert tracker.ended == 1
    ends = {k: v for _, values in tracker.values for k, v in values.items() if "dice after" in k}
    assert ends["dice after step 2/liver"] == scores(smoke_run)[2]["liver"]


def test_live_events_give_the_same_numbers(smoke_run: Path) -> None:
    later, live = Recorded(), Recorded()
    Follower(later, print).replay(smoke_run)
    follower = Follower(live, print)
    for event in run_folder.read_events(smoke_run / "events.jsonl"):
        follower.watch(event)
    follower.watch({"event": "finished", "folder": smoke_run})
    assert live.values == later.values
    assert live.ended == 1


def test_updates_made_once_more_are_sent_to_their_places(smoke_run: Path) -> None:
    events = updates(smoke_run)
    tracker = Recorded()
    follower = Follower(tracker, print)
    for event in events[:3]:
        follower.watch(event)
    follower.watch({"event": "going on", "phase": events[0]["phase"], "updates": 2})
    follower.watch(events[2])
    assert [at for at, _ in tracker.values] == [1, 2, 3, 3]


def test_a_step_that_starts_anew_is_sent_to_its_old_places(smoke_run: Path) -> None:
    """Killed before its first saved place, or by a strategy that cannot go on within a step."""
    events = updates(smoke_run)
    first = [e for e in events if e["step"] == 1]
    second = [e for e in events if e["step"] == 2]
    tracker = Recorded()
    follower = Follower(tracker, print)
    for event in [*first, *second[:2], *second]:
        follower.watch(event)
    n = len(first)
    sent = [at for at, _ in tracker.values]
    assert sent == [*range(1, n + 3), *range(n + 1, n + 1 + len(second))]


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(smoke_run: Path) -> None:
    said: list[str] = []
    broken = Broken()
    follower = Follower(broken, said.append)
    for event in updates(smoke_run):
        follower.watch(event)
    assert said == ["the tracker Broken failed and is left: no space left"]
    assert broken.how == ["failed"]


def test_a_tracker_that_failed_is_ended_even_where_it_cannot_be(smoke_run: Path) -> None:
    class Dead(Broken):
        def end(self, how: End = "finished") -> None:
            super().end(how)
            raise OSError("no server")

    dead, said = Dead(), list[str]()
    follower = Follower(dead, said.append)
    follower.open = True
    for event in updates(smoke_run):
        follower.watch(event)
    follower.close("failed")
    assert (len(said), dead.how) == (1, ["failed"])


@pytest.mark.parametrize("method", ["begin", "log", "end"])
def test_a_run_on_disk_that_a_tracker_does_not_take_is_an_error_that_helps(
    method: str, smoke_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, ended = Recorded(), list[str]()

    def fail(*_: Any) -> None:
        raise OSError("no server")

    monkeypatch.setattr(tracker, "end", lambda how="finished": ended.append(how))
    monkeypatch.setattr(tracker, method, fail)
    with pytest.raises(ClbenchError, match=r"Recorded failed[\s\S]*no server"):
        Follower(tracker, print).replay(smoke_run)
    assert ended == ([] if method == "end" else ["failed"])


def test_an_excerpt_has_no_log_and_sends_its_scores(smoke_run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(smoke_run, part)
    (part / "events.jsonl").unlink()
    with pytest.raises(StoreError, match="the log of a run is missing"):
        Follower(Recorded(), print).replay(part)
    record = run_folder.read_record(part)
    (part / "run.json").write_text(json.dumps(record | {"excerpt": "a part"}), encoding="utf-8")
    tracker = Recorded()
    Follower(tracker, print).replay(part)
    assert tracker.how == ["finished"]
    assert {k for _, values in tracker.values for k in values} >= {"dice after step 2/liver"}


@pytest.mark.parametrize(
    ("raised", "how"),
    [
        (ClbenchError("loss is nan"), "failed"),
        (MemoryError(), "failed"),
        (Stopped("on SIGTERM"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_a_tracker_is_told_how_a_run_ended(
    raised: BaseException, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, said = Recorded(), list[str]()
    monkeypatch.setattr(follow, "_trackers", lambda names, out: [one])
    monkeypatch.setattr(Follower, "_begin", lambda self, plan: setattr(self, "open", True))

    def run() -> None:
        with tracked(["recorded"], tmp_path, said.append) as watch:
            watch({"event": "plan", "plan": None})
            raise raised

    with pytest.raises(type(raised)):
        run()
    assert (one.how, said) == ([how], [])


def test_a_run_on_disk_that_is_not_finished_is_not_sent_as_finished(
    smoke_run: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(smoke_run, part)
    record = run_folder.read_record(part)
    (part / "run.json").write_text(json.dumps(record | {"status": "unfinished"}), encoding="utf-8")
    for folder, how in ((smoke_run, "finished"), (part, "stopped")):
        tracker = Recorded()
        Follower(tracker, print).replay(folder)
        assert tracker.how == [how]


def test_what_is_no_number_is_not_sent() -> None:
    assert numbers({"event": "warning", "step": 1}) == {}
    event = {"event": "update", "step": 1, "loss": float("nan"), "terms": {}, "grad_norm": None}
    assert numbers(event) == {}


def test_unknown_trackers_and_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UnknownName, match="there is no tracker called 'tensorbord'"),
        tracked(["tensorbord"], tmp_path, print),
    ):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClbenchError, match="needs a package that is not installed"):
        send(tmp_path, ["mlflow"], tmp_path)


# -------------------------------------------------------------------------------- the real things


def test_tensorboard_reads_what_was_sent(smoke_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["track", str(smoke_run), "--to", "tensorboard", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (folder,) = (tmp_path / "_trackers" / "tensorboard").glob("*/*/*")
    read = EventAccumulator(str(folder)).Reload()
    sent = [(e.step, e.value) for e in read.Scalars("step 1/loss")]
    first = [e for e in updates(smoke_run) if e["step"] == 1]
    assert [at for at, _ in sent] == list(range(1, len(first) + 1))
    assert [v for _, v in sent] == pytest.approx([e["loss"] for e in first])


def test_tensorboard_shows_a_run_that_went_on_once(smoke_run: Path, tmp_path: Path) -> None:
    """Each attempt sends all of it to a file of its own."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(3):
        send(smoke_run, ["tensorboard"], tmp_path)
    (folder,) = (tmp_path / "_trackers" / "tensorboard").glob("*/*/*")
    assert len(list(folder.iterdir())) == 3
    sent = [e.step for e in EventAccumulator(str(folder)).Reload().Scalars("step 1/loss")]
    first = [e for e in updates(smoke_run) if e["step"] == 1]
    assert sent == list(range(1, len(first) + 1))


@pytest.mark.parametrize(
    ("how", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")]
)
def test_mlflow_and_wandb_show_how_a_run_ended(
    how: End, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = MLflow(tmp_path)
    tracker.begin("course/strategy/id", {})
    tracker.end(how)
    (run,) = mlflow.search_runs(experiment_names=["clbench"], output_format="list")
    assert run.info.status == status
    told: list[int] = []
    other = WandB(tmp_path)
    other.run = SimpleNamespace(finish=lambda exit_code: told.append(exit_code))
    other.end(how)
    assert told == [0 if how == "finished" else 1]


def test_the_run_after_one_whose_tracker_failed_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("answered 503 once")

    for seed in (0, 1):
        follower = Follower(MLflow(tmp_path), said.append)
        with monkeypatch.context() as patch:
            if seed == 0:
                patch.setattr(mlflow, "log_params", fail)
            follower.watch({"event": "plan", "plan": _plan(seed)})
        follower.watch({"event": "update", "step": 1, "phase": "all", "epoch": 0, "iteration": 0,
                        "loss": 0.5, "terms": {}})  # fmt: skip
        follower.close("stopped")
    assert len(said) == 1
    assert mlflow.active_run() is None
    runs = mlflow.search_runs(experiment_names=["clbench"], output_format="list")
    assert {r.data.tags["clbench.run"]: (r.info.status, r.data.metrics) for r in runs} == {
        "c/s/id0": ("FAILED", {}), "c/s/id1": ("KILLED", {"step 1/loss": 0.5}),
    }  # fmt: skip


def _plan(seed: int) -> Any:
    return SimpleNamespace(
        benchmark=SimpleNamespace(name="c", steps=[1]), strategy_name="s",
        identity=SimpleNamespace(run_id=f"id{seed}", strategy={}, profile={"name": "smoke"}),
        settings=SimpleNamespace(seed=seed, fresh=True),
    )  # fmt: skip


def test_a_server_of_mlflow_that_is_down_is_given_up_after_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    seen: dict[str, str | None] = {}
    for name in PATIENCE:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")

    def look(*_: Any) -> None:
        seen.update({name: os.environ.get(name) for name in PATIENCE})
        raise OSError("no server")

    monkeypatch.setattr(mlflow, "set_experiment", look)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="no server"):
        MLflow(tmp_path).begin("c/s/id", {})
    assert seen == {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}


def test_wandb_gives_no_run_out_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking that broke leaves its run open; `wandb.init` would return that one again."""
    wandb = pytest.importorskip("wandb")
    told: list[Any] = []
    monkeypatch.setattr(wandb, "run", SimpleNamespace(id="left"))
    monkeypatch.setattr(wandb, "finish", lambda exit_code: told.append(exit_code))
    monkeypatch.setattr(wandb, "init", lambda **options: told.append(options["id"]))
    WandB(tmp_path).begin("c/s/id1", {})
    assert told == [1, "c-s-id1"]


def test_mlflow_reads_what_was_sent_and_goes_on_with_one_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for _ in range(2):
        send(smoke_run, ["mlflow"], tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["clbench"], output_format="list")
    record = run_folder.read_record(smoke_run)
    assert run.data.tags["clbench.run"].endswith(record["run_id"])
    assert run.data.params["profile.name"] == "smoke"
    last = updates(smoke_run)[-1]
    assert run.data.metrics["step 2/loss"] == pytest.approx(last["loss"])


def test_wandb_keeps_what_was_sent_offline(smoke_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = subprocess.run(  # a process of its own: wandb writes the rest when that ends
        [sys.executable, "-m", "clbench", "track", str(smoke_run), "--to", "wandb",
         "--out", str(tmp_path)],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "_trackers" / "wandb").glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()
    assert b"step 2/loss" in content
    assert json.dumps("smoke").encode() in content
