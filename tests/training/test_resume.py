"""Stopped anywhere, a run goes on and ends as if it had not been: every strategy, to the bit."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torture
from locations import TESTS
from torture import PRUNED, made

from clbench import signals
from clbench.errors import StoreError, TrainingError
from clbench.run import examine, teach
from clbench.run.course import run_plan
from clbench.store import checkpoint, files, run_folder
from clbench.strategy.contract import Group, Phase
from clbench.testing.fixtures import first_difference, same
from clbench.testing.harness import StrategyHarness
from clbench.training import resume

Watch = Callable[[dict[str, Any]], None]
MORE_UPDATES = {"agem": ("train.iterations=6",)}
"""Where a strategy differs from fine-tuning only after the usual two updates of a step."""


class Crash(Exception):
    """Stands for SIGKILL: nothing is saved on the way out."""


@dataclasses.dataclass
class Course:
    """Runs of the tiny course; strategies that start alike share step 1."""

    folder: Path
    cache: Path
    done: dict[str, tuple[Path, list[dict[str, Any]]]] = dataclasses.field(default_factory=dict)

    def whole(self, name: str) -> tuple[Path, list[dict[str, Any]]]:
        """The run that nobody stops."""
        if name not in self.done:
            self.done[name] = self.run(name, "whole")
        return self.done[name]

    def run(
        self, name: str, out: str, watch: Watch = lambda e: None, **more: Any
    ) -> tuple[Path, list[dict[str, Any]]]:
        """The run folder, and the last place of every step that was taught."""
        plan = StrategyHarness(
            made(name),
            name=name,
            folder=self.folder,
            cache=self.cache,
            overrides=MORE_UPDATES.get(name, ()),
        ).plan_run(out)
        plan.settings = dataclasses.replace(plan.settings, checkpoint_s=0, **more)
        last: list[dict[str, Any]] = []
        close = resume.StepCheckpointer.close

        def closing(self: resume.StepCheckpointer) -> None:
            last.append(checkpoint.load(self.path) if self.path.exists() else {})
            close(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume.StepCheckpointer, "close", closing)
            return run_plan(plan, watch), last

    def broken(self, name: str, out: str, watch: Watch, how: type[Exception], **more: Any) -> None:
        with pytest.raises(how):
            self.run(name, out, watch, **more)


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Course:
    return Course(tmp_path_factory.mktemp("resume"), cache_root)


def at(where: Mapping[str, Any], act: Callable[[], None]) -> Watch:
    """Act at the first event that holds all of `where`."""

    def watch(event: dict[str, Any]) -> None:
        if all(event.get(k) == v for k, v in where.items()):
            act()

    return watch


def crash() -> None:
    raise Crash


def update(step: int, iteration: int, phase: str = "train") -> dict[str, Any]:
    return {"event": "update", "step": step, "phase": phase, "iteration": iteration}


def assert_equal(a: Path, b: Path, last_a: list[Any], last_b: list[Any]) -> None:
    """Weights, memory, optimizer, scores and the log, to the bit."""
    for step in ("step2.pt", "step3.pt"):
        one, other = checkpoint.load(a / step), checkpoint.load(b / step)
        assert same(one, other), f"{step}: {first_difference(one, other)}"
    if made(a.parent.name).declaration.resumes == "update":
        optimizers = [last[-1]["optimizer"] for last in (last_a, last_b)]
        assert optimizers[0]["state"]
        assert same(*optimizers)
    else:
        assert not any(last_a + last_b)  # nothing is kept within a step
    for name in ("scores.csv", "events.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    kinds = [json.loads((f / "run.json").read_text())["ledger"] for f in (a, b)]
    assert kinds[0] == kinds[1]
    shared = b.parents[2] / "_shared"
    for folder in (b, *shared.iterdir()):
        assert not [p.name for p in folder.iterdir() if p.name in ("resume", "pseudo", "exam")]


STATES = {
    "universal": "pseudo labels as maps",
    "agem": "stored cases; steps alone can be resumed",
    "derpp": "stored cases with their logits",
    PRUNED: "growth in phases, judged by validation",
}
"""One strategy for each kind of what is held between two updates. That every strategy goes on from
the middle of a step to the same numbers is a rule of `clbench check strategy`, which
tests/testing/test_strategy_check.py holds against each."""


@pytest.mark.parametrize("name", STATES)
def test_every_kind_of_state_goes_on_to_the_bit(name: str, course: Course) -> None:
    whole, last = course.whole(name)
    # a signal in step 2; it goes on with two loader workers, and is killed in step 3; and again
    # without workers
    course.broken(
        name, "parts", at(update(2, 0), lambda: signals.ask("SIGTERM")), signals.Stopped
    )  # fmt: skip
    phase = "prune 1.0" if name == PRUNED else "train"
    course.broken(name, "parts", at(update(3, 1, phase), crash), Crash, workers=2)
    events: list[dict[str, Any]] = []
    parts, last_parts = course.run(name, "parts", events.append)
    midway = [1] if made(name).declaration.resumes == "update" else []
    assert [e["updates"] for e in events if e["event"] == "going on"] == midway
    assert_equal(whole, parts, last, last_parts)


def test_a_plugin_counts_alike_after_a_stop_behind_the_last_update(course: Course) -> None:
    def killed(model: torch.nn.Module) -> tuple[int, int]:
        raise Crash

    whole, last = course.whole("ewc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach, "count_parameters", killed)  # all updates are saved, the step is not
        course.broken("ewc", "late", lambda event: None, Crash)
    parts, last_parts = course.run("ewc", "late")
    assert_equal(whole, parts, last, last_parts)
    first = [checkpoint.load(f / "step1.pt") for f in (whole, parts)]
    assert same(*first), first_difference(*first)


def test_stopped_in_step_1_pseudo_labels_and_examination(course: Course) -> None:
    name = "universal"
    whole, last = course.whole(name)
    out = "stations"
    course.broken(name, out, at(update(1, 1), crash), Crash)
    course.broken(name, out, at({"event": "exam"}, crash), Crash)
    (kept,) = course.folder.glob(f"{out}/kit/{name}/*/exam/step1/*.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"predict_s": 1000.0}))
    course.broken(
        name, out, at({"event": "pseudo"}, lambda: signals.ask("SIGINT")), signals.Stopped
    )
    (kept,) = course.folder.glob(f"{out}/_shared/*/pseudo/step2/*/map.npy")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1  # an altered map is made again
    kept.write_bytes(content)
    asked: list[str] = []
    course.broken(name, out, at({"event": "exam"}, lambda: signals.ask("SIGUSR1")), signals.Stopped)
    parts, last_parts = course.run(name, out, lambda e: asked.append(e["event"]))
    assert_equal(whole, parts, last, last_parts)
    record = run_folder.read_record(parts)
    assert record["starts"] == 5
    assert record["resumed_elsewhere"] == []
    assert all(s["examine_s"] > 0 and s["train"]["train_s"] > 0 for s in record["cost"].values())
    assert record["cost"]["1"]["predict_s"] > 1000  # cases finished before the stop count, too


def test_cases_examined_on_another_processor_are_not_asked_for_equal_bits(course: Course) -> None:
    name, out, elsewhere = "finetune", "moved", {"cpu": "another"}
    course.broken(name, out, at({"event": "exam", "done": 1}, crash), Crash)
    (kept,) = course.folder.glob(f"{out}/kit/{name}/*/exam/step1/*.json")
    content = json.loads(kept.read_text())
    for row in content["rows"]:  # as another kernel might score a voxel at the threshold
        row["value"] *= 1 - 1e-3
    content |= {"sha256": examine._sealed(content["rows"])}
    kept.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="does not score as the taught one"):
        course.run(name, out)  # from here: equal bits are asked for
    kept.write_text(json.dumps(content | {"host": content["host"] | elsewhere}))
    parts, _ = course.run(name, out)
    assert run_folder.read_record(parts)["reexamined"]["1"]["largest_difference"] == 0.0


def test_preprocessing_stops_between_two_cases(course: Course) -> None:
    asked = at({"event": "step"}, lambda: signals.ask("SIGTERM"))
    with pytest.raises(signals.Stopped, match="step 1, opening case"):
        course.run("finetune", "early", asked)


def test_damaged_places_fall_back_and_the_log_is_cut(course: Course) -> None:
    name, out = "finetune", "damaged"
    whole, last = course.whole(name)
    course.broken(name, out, at(update(3, 1), crash), Crash)
    (folder,) = course.folder.glob(f"{out}/_shared/*/resume")
    newest, previous = folder / "step3.pt", folder / "step3.previous.pt"
    assert newest.exists()
    content = bytearray(newest.read_bytes())
    previous.write_bytes(content)
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    events: list[dict[str, Any]] = []
    parts, last_parts = course.run(name, out, events.append)
    (warning,) = (e["what"] for e in events if e["event"] == "passed over")
    assert "step3.pt" in warning
    midway = [1] if made(name).declaration.resumes == "update" else []
    assert [e["updates"] for e in events if e["event"] == "going on"] == midway
    assert_equal(whole, parts, last, last_parts)


def test_a_full_disk_in_the_middle_of_a_step(course: Course) -> None:
    name, out = "finetune", "full"
    whole, last = course.whole(name)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        fill = at(update(3, 1), lambda: patch.setattr(os, "fsync", full))
        course.broken(name, out, fill, StoreError)
    parts, last_parts = course.run(name, out)
    assert_equal(whole, parts, last, last_parts)


def test_another_thread_count_is_marked_and_the_recorded_one_restored(course: Course) -> None:
    name, out = "finetune", "threads"
    before = torch.get_num_threads()
    course.broken(name, out, at(update(2, 0), lambda: signals.ask("SIGTERM")), signals.Stopped)
    torch.set_num_threads(before + 1)
    seen: list[int] = []
    watch = at({"event": "update"}, lambda: seen.append(torch.get_num_threads()))

    def restored() -> None:
        seen.append(torch.get_num_threads())
        signals.ask("x")

    try:
        course.broken(name, out, at(update(2, 1), restored), signals.Stopped)
        assert seen == [before]
        parts, _ = course.run(name, out, watch, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert seen[-1] == before + 1
    marks = run_folder.read_record(parts)["resumed_elsewhere"]
    assert {"step": 2, "differs": {"threads": [before, before + 1]}} in marks


def test_signals_ask_and_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in signals.SIGNALS:
        with signals.listening():
            signals.check()
            os.kill(os.getpid(), number)
            assert signals.asked() == signal.Signals(number).name
            with pytest.raises(signals.Stopped, match="is saved"):
                signals.check("step 2")
    assert signals.asked() is None
    with signals.listening(), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_run_has_an_exit_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clbench import cli

    def stopped() -> None:
        signals.ask("SIGTERM")
        signals.check("step 2, after update 7")

    monkeypatch.setattr(cli, "app", stopped)
    with signals.listening(), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == signals.STATUS == 75
    assert "after update 7" in capsys.readouterr().err


def test_the_place_before_is_kept_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, previous = tmp_path / "a.pt", tmp_path / "b.pt"
    checkpoint.save(path, {"n": 1}, previous=previous)
    checkpoint.save(path, {"n": 2}, previous=previous)
    assert [checkpoint.load(p)["n"] for p in (path, previous)] == [2, 1]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="could not be written"):
        checkpoint.save(path, {"n": 3}, previous=previous)
    assert [checkpoint.load(p)["n"] for p in (path, previous)] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"w": torch.arange(100.0), "n": [1, 0.5, "x", None]})
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(100.0).numpy().tobytes()[:64])
    content[place + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError) as err:
        checkpoint.load(path)
    assert "altered" in err.value.what  # the path has the word, too


def test_parts_of_killed_processes_are_swept(tmp_path: Path) -> None:
    (tmp_path / "pseudo" / ".1.99.part").mkdir(parents=True)
    (tmp_path / ".step2.pt.99.part").write_bytes(b"half")
    (tmp_path / "step1.pt").write_bytes(b"whole")
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["pseudo", "step1.pt"]


def test_finished_cases_of_another_model_or_damaged_are_examined_anew(tmp_path: Path) -> None:
    exams = examine.Exams(tmp_path / "exam", "model a", {"cpu": "a", "threads": 2})
    exams.put("btcv", "1", examine.Exam([], 2.0, 1.5))
    assert exams.get("btcv", "1") == examine.Exam([], 2.0, 1.5)
    assert examine.Exams(tmp_path / "exam", "model b", exams.host).get("btcv", "1") is None
    moved = examine.Exams(tmp_path / "exam", "model a", {"cpu": "b", "threads": 2}).get("btcv", "1")
    assert moved == examine.Exam([], 2.0, 1.5, here=False)  # taken, but not for equal bits
    assert exams.get("btcv", "2") is None
    path = tmp_path / "exam" / "btcv_1.json"
    path.write_text(path.read_text().replace('"rows": []', '"rows": [{}]'))
    assert exams.get("btcv", "1") is None
    path.write_text('{"model": "model a", "rows": [')
    assert exams.get("btcv", "1") is None


def test_what_is_trained_must_be_in_the_model(tmp_path: Path) -> None:
    place = resume.TrainingPosition(
        phase=Phase(), history=(), updates=1, measured=(), optimizer={}, scaler={},
        groups=[Group(parameters=[torch.nn.Parameter(torch.zeros(1))])],
    )  # fmt: skip
    state = resume.TrainingState(model=torch.nn.Linear(1, 1), memory={}, position=place)
    with pytest.raises(TrainingError, match="not in its model"):
        resume.StepCheckpointer(tmp_path / "step1.pt", every_s=0).offer(state)


KEYS_OF_FORMAT_1 = {
    "format", "facts", "model", "memory", "phase", "history", "updates", "measured", "groups",
    "optimizer", "scaler",
}  # fmt: skip
"""What clbench 0.1.0 wrote between two updates; while the number stays, so does the content."""


def test_a_place_saved_by_0_1_0_is_gone_on_from_and_a_later_format_is_named(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    position = resume.TrainingPosition(
        phase=Phase(name="train"), history=(), updates=3, measured=(0.5,), scaler={},
        optimizer={"state": {}}, groups=[Group(parameters=list(model.parameters()), lr=0.5)],
    )  # fmt: skip
    state = resume.TrainingState(model=model, memory={"seen": [1]}, position=position)
    path = tmp_path / "step1.pt"
    resume.StepCheckpointer(path, every_s=0, facts=lambda: {"events": 7}).offer(state)
    saved = checkpoint.load(tmp_path / "resume" / "step1.pt")
    assert (saved["format"], {*saved} - {"schema"}) == (1, KEYS_OF_FORMAT_1)

    other = resume.TrainingState(model=torch.nn.Linear(2, 1), memory={"old": 1})
    again = resume.StepCheckpointer(path, every_s=0)
    assert again.found == {"events": 7}
    again.restore(other)
    assert same(model.state_dict(), other.model.state_dict())
    assert other.memory == {"seen": [1]}
    there = other.position
    assert there is not None
    assert (there.phase, there.updates, there.measured) == (position.phase, 3, (0.5,))
    assert [id(p) for g in there.groups for p in g.parameters] == [
        id(p) for p in other.model.parameters()
    ]

    saved["format"] = 2
    checkpoint.save(tmp_path / "resume" / "step1.pt", saved)
    events: list[dict[str, Any]] = []
    assert resume.StepCheckpointer(path, every_s=0, watch=events.append).found is None
    assert "format 2, this one reads format 1" in events[0]["what"]


def test_the_kill_benchmark_sees_every_kind_of_half_written_file(
    smoke_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    np.save(folder / "map.npy", np.zeros(999))
    assert torture.whole(folder) == []
    cut = []
    for pattern in ("step2.pt", "run.json", "scores.csv", "cost.csv", "*.npz", "map.npy"):
        path = next(folder.rglob(pattern))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 - 1])
        cut.append(str(path.relative_to(folder)))
    log = folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:-1], lines[-1][:5]]))  # what a crash may leave
    assert {found.split(":")[0] for found in torture.whole(folder)} == set(cut)
    log.write_text("".join([lines[0][:5], "\n", *lines[1:]]))
    assert len(torture.whole(folder)) == len(cut) + 1


def test_killed_at_a_random_moment_nothing_is_lost(tmp_path: Path, cache_root: Path) -> None:
    out = tmp_path / "found.csv"
    done = subprocess.run(
        [
            sys.executable, TESTS / "torture.py", "--minutes=60", "--kills=1",
            "--each=0", f"--strategies={PRUNED}", f"--cache={cache_root}", f"--out={out}",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open(newline="") as file:
        found = {(r["of"], r["name"]): r["value"] for r in csv.DictReader(file)}
    assert int(found["all", "killed"]) >= 1
    assert found["all", "different"] == found["all", "half_written"] == "0"


def test_the_report_says_which_runs_went_on_elsewhere() -> None:
    from clbench.report.page.provenance import _elsewhere

    mark = {"step": 2, "differs": {"threads": [2, 3]}}
    records: list[Any] = [
        SimpleNamespace(run_id="a", resumed_elsewhere=None),
        SimpleNamespace(run_id="b", resumed_elsewhere=[mark]),
    ]
    assert _elsewhere(records) == "b, step 2: threads 2 → 3"
    assert _elsewhere(records[:1]) == "none"
