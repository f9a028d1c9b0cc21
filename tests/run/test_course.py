"""A whole course: what it leaves, that it repeats to the bit, goes on, and keeps its rules."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from clbench.errors import DataError, SettingError, StoreError, TrainingError, UnknownName
from clbench.run.course import run_course, run_plan
from clbench.run.plan import RunSettings, resolve
from clbench.run.record import new_record
from clbench.spec import registry
from clbench.store import checkpoint, run_folder
from clbench.strategies.finetune import Finetune
from clbench.strategy.contract import Lesson, Memory


def settings(out: Path, cache: Path, **more: Any) -> RunSettings:
    return replace(
        RunSettings(bench="tumor_ext", strategy="universal", profile="smoke", out=out, cache=cache),
        **more,
    )


def test_a_run_leaves_the_whole_record(smoke_run: Path) -> None:
    names = {p.name for p in smoke_run.iterdir()}
    assert {"step1.pt", "run.json", "scores.csv", "step2.pt", "predictions"} <= names
    record = json.loads((smoke_run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["patients"] is False
    assert record["steps_done"] == 2
    assert record["identity"]["profile"]["train"]["epochs"] == 2
    assert record["cost"]["1"]["train"]["shared"] is True
    assert record["cost"]["2"]["train"]["parameters"] > record["cost"]["1"]["train"]["parameters"]
    assert {"torch", "python", "clbench"} <= set(record["versions"])
    assert len(list((smoke_run / "predictions" / "step2").glob("*.npz"))) == 4
    left = {p.name for p in (smoke_run.parents[2] / "_shared").glob("*/*")}
    assert "step2.pt" in left or "events.jsonl" in left
    assert not left & {"pseudo", "resume"}  # needed for training only


def test_every_learned_structure_is_scored_on_every_test_case(smoke_run: Path) -> None:
    rows = run_folder.read_scores(smoke_run / "scores.csv")
    strict = [r for r in rows if r.scoring == "strict" and r.metric == "dice"]
    first = [r for r in strict if r.step == 1]
    assert {r.structure for r in first} == set(registry.benchmark("tumor_ext").structures(1))
    assert len(first) == 13 * 4  # 2 BTCV and 2 LiTS test cases
    lits = {r.structure: r.status for r in first if r.eval_set == "lits"}
    assert lits.pop("liver") != "not_annotated"  # liver on LiTS, before LiTS was ever taught
    assert set(lits.values()) == {"not_annotated"}
    assert len([r for r in strict if r.step == 2]) == 14 * 4
    assert {r.scoring for r in rows} == {"strict", "paper"}
    assert {r.learned_at for r in rows if r.structure == "liver_tumor"} == {2}
    ceiling = [r for r in rows if r.metric == "dice_ceiling" and r.status == "ok"]
    assert ceiling
    assert all(0 < r.value <= 1 for r in ceiling)


def test_the_ledger_shows_what_was_opened(smoke_run: Path) -> None:
    ledger = json.loads((smoke_run / "run.json").read_text())["ledger"]
    assert ledger["1"]["train"] == ["btcv/1", "btcv/2", "btcv/61"]
    assert ledger["2"]["train"] == ledger["2"]["pseudo"] == ["lits/0", "lits/1", "lits/2"]
    assert set(ledger["2"]["test"]) == {"btcv/21", "btcv/66", "lits/20", "lits/21"}


def test_equal_settings_give_equal_bytes(smoke_run: Path, cache_root: Path, tmp_path: Path) -> None:
    again = run_course(settings(tmp_path, cache_root))
    assert again.name == smoke_run.name
    assert (again / "scores.csv").read_bytes() == (smoke_run / "scores.csv").read_bytes()
    a, b = (torch.load(p / "step2.pt", weights_only=True)["model"] for p in (again, smoke_run))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_seed_and_settings_lead_elsewhere(
    smoke_run: Path, cache_root: Path, tmp_path: Path
) -> None:
    names, weights = {smoke_run.name}, [checkpoint.load(smoke_run / "step2.pt")["model"]]
    for more in ({"seed": 1}, {"overrides": ("train.lr=0.002",)}):
        other = run_course(settings(tmp_path, cache_root, **more))
        names.add(other.name)
        weights.append(checkpoint.load(other / "step2.pt")["model"])
    assert len(names) == 3
    for a, b in itertools.combinations(weights, 2):
        kernels = [k for k, value in a.items() if value.ndim == 5 and len(value) > 1]
        assert len(kernels) > 5
        assert not any(torch.equal(a[k], b[k]) for k in kernels)


def test_a_finished_run_is_not_repeated_unless_fresh(
    smoke_run: Path, cache_root: Path, smoke_out: Path, tmp_path: Path
) -> None:
    events: list[str] = []
    run_course(settings(smoke_out, cache_root), lambda e: events.append(e["event"]))
    assert events == ["plan", "already finished"]
    copy = tmp_path / "results"
    shutil.copytree(smoke_out, copy)
    events.clear()
    run_course(settings(copy, cache_root, fresh=True), lambda e: events.append(e["event"]))
    assert events.count("update") == 8  # 2 steps, 2 epochs, 2 updates
    assert events[-1] == "finished"


def test_a_finished_run_takes_back_the_checkpoints_that_runs_share(
    smoke_run: Path, cache_root: Path, smoke_out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "results"
    shutil.copytree(smoke_out, copy)
    events: list[dict[str, Any]] = []

    def again() -> Path:
        events.clear()
        folder = run_course(settings(copy, cache_root), events.append)
        assert [e["event"] for e in events if e["event"] != "note"] == ["plan", "already finished"]
        return folder

    folder = again()
    whole = (folder / "step2.pt").read_bytes()
    (folder / "step2.pt").unlink()
    again()
    assert (folder / "step2.pt").read_bytes() == whole
    assert not any(e["event"] == "note" for e in events)

    (folder / "step2.pt").unlink()
    for shared in (copy / "_shared").glob("*/step2.pt"):
        shared.write_bytes(shared.read_bytes()[:-100])
    again()
    assert not (folder / "step2.pt").exists()
    (note,) = [e["what"] for e in events if e["event"] == "note"]
    assert note.startswith("step2.pt is not there any more")
    assert "--fresh" in note

    (folder / "scores.csv").unlink()
    with pytest.raises(StoreError, match="its scores are missing") as caught:
        run_course(settings(copy, cache_root))
    assert "--fresh" in str(caught.value)
    assert (run_course(settings(copy, cache_root, fresh=True)) / "scores.csv").exists()


def test_a_run_stopped_between_steps_goes_on_at_the_next(
    smoke_run: Path, cache_root: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop_in_step_2(event: Mapping[str, Any]) -> None:
        if event["event"] == "update" and event["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run_course(settings(tmp_path, cache_root), stop_in_step_2)
    events: list[dict[str, Any]] = []
    folder = run_course(settings(tmp_path, cache_root), events.append)
    assert {e["step"] for e in events if e["event"] == "update"} == {2}
    assert (folder / "scores.csv").read_bytes() == (smoke_run / "scores.csv").read_bytes()
    updates = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in updates] == [1] * 4 + [2] * 4  # the half-done step left no lines


def test_strategies_that_start_alike_share_step_1(
    smoke_run: Path, cache_root: Path, smoke_out: Path
) -> None:
    events: list[dict[str, Any]] = []
    folder = run_course(settings(smoke_out, cache_root, strategy="finetune"), events.append)
    assert "shared" in [e["event"] for e in events]
    assert {e["step"] for e in events if e["event"] == "update"} == {2}
    marks = [run_folder.read_record(f)["shared_step1"] for f in (folder, smoke_run)]
    assert marks[0] == marks[1]


def test_joint_sees_all_images_and_trains_t_times_as_long(
    smoke_run: Path, cache_root: Path, smoke_out: Path
) -> None:
    events: list[dict[str, Any]] = []
    folder = run_course(settings(smoke_out, cache_root, strategy="joint"), events.append)
    assert len([e for e in events if e["event"] == "update"]) == 8  # 2 epochs, 2 x 2 updates
    ledger = json.loads((folder / "run.json").read_text())["ledger"]
    assert ledger["2"]["train"] == [
        "btcv/1", "btcv/2", "btcv/61", "lits/0", "lits/1", "lits/2",
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Greedy(Finetune):
    """Asks for an image it did not declare."""

    past: ClassVar[Any] = "weights"
    case: str = "1"

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        return {(1, self.case): 1.0} if step.number == 2 else {}


@pytest.mark.parametrize(
    ("past", "case", "says"),
    [("weights", "1", "without declaring"), ("images", "21", "a test case was asked for")],
)
def test_the_past_and_the_no_test_case_is_read(
    past: str,
    case: str,
    says: str,
    cache_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = type("Made", (Greedy,), {"past": past, "case": case})
    load = registry.load
    monkeypatch.setattr(
        registry,
        "load",
        lambda kind, name: (lambda: made(case=case)) if name == "greedy" else load(kind, name),
    )
    with pytest.raises(TrainingError, match=says):
        run_course(settings(tmp_path, cache_root, strategy="greedy"))


def test_two_processes_do_not_share_a_run(
    smoke_run: Path, cache_root: Path, tmp_path: Path
) -> None:
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print(flush=True), input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(smoke_run / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"  # it has the lock
        with pytest.raises(StoreError, match="another process"):
            run_course(settings(smoke_run.parents[2], cache_root, fresh=True))
        other.communicate("\n")
    assert (smoke_run / "scores.csv").exists()


def test_a_new_version_of_a_strategy_is_another_run_with_another_first_step(
    cache_root: Path, tmp_path: Path
) -> None:
    class Finetune2(Finetune):
        version: ClassVar[int] = 2

        def first_step(self) -> Finetune:
            return self

    Finetune2.__name__ = "Finetune"
    there = settings(tmp_path, cache_root, strategy="finetune")
    old, new = resolve(there), resolve(there, strategy=Finetune2())
    assert old.identity.strategy == {"class": "Finetune"}  # as before there were versions
    assert new.identity.strategy == {"class": "Finetune", "version": 2}
    assert new.folder != old.folder
    assert new.shared_step1 != old.shared_step1
    assert new.step_folder(1) != old.step_folder(1)
    assert (new_record(new).with_defaults or {})["strategy"]["version"] == 2


def test_an_image_that_vanishes_while_a_run_goes_on_stops_it_by_name(
    cache_root: Path, tmp_path: Path
) -> None:
    drawn = resolve(settings(tmp_path / "drawn", cache_root)).catalog
    for name, cases in drawn.files.items():
        shutil.copytree(Path(next(iter(cases.values())).files[0]).parents[1], tmp_path / name)
    there = settings(
        tmp_path / "out", tmp_path / "cache", strategy="finetune",
        data=f"btcv={tmp_path / 'btcv'},lits={tmp_path / 'lits'}",
        splits=dict(zip(("btcv", "lits"), drawn.splits, strict=True)),
    )  # fmt: skip
    plan = resolve(there)
    case = drawn.splits[1].train[0]
    image = Path(plan.catalog.files["lits"][case].files[0])
    kept = image.read_bytes()
    with pytest.raises(DataError, match="No such file or directory") as err:
        run_plan(
            plan, lambda e: image.unlink() if e["event"] == "exam" and e["done"] == 1 else None
        )
    assert str(image) in str(err.value)
    assert run_folder.read_record(plan.folder)["steps_done"] == 1  # what was done is kept
    image.write_bytes(kept)
    assert run_folder.read_record(run_course(there))["status"] == "finished"


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        ({"bench": "tumor"}, UnknownName, "did you mean 'tumor_ext'"),
        ({"strategy": "universl"}, UnknownName, "did you mean 'universal'"),
        ({"overrides": ("strategy.pseud=soft",)}, SettingError, "did you mean strategy.pseudo"),
        ({"overrides": ("strategy.pseudo=sof",)}, SettingError, "did you mean 'soft'"),
        ({"overrides": ("backbone.name=unett",)}, UnknownName, "did you mean 'unet'"),
        ({"overrides": ("text.encoding=clop",)}, UnknownName, "did you mean 'clip'"),
        ({"overrides": ("phantom.train=99",)}, SettingError, "phantom.train"),
        ({"overrides": ("backbone.weights=absent.pt",)}, SettingError, "does not exist"),
        ({"device": "gpu"}, SettingError, "unknown device"),
        ({"profile": "quikc"}, UnknownName, "did you mean 'quick'"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_is_written(
    more: dict[str, Any], kind: type[Exception], says: str, cache_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as err:
        run_course(settings(tmp_path / "out", cache_root, **more))
    assert says in str(err.value)
    assert not (tmp_path / "out").exists()


def test_a_results_folder_that_cannot_be_written(cache_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as err:
        run_course(settings(tmp_path / "file", cache_root))
    assert "--out" in str(err.value)


def test_soft_pseudo_labels_and_background_are_different_runs(
    smoke_run: Path, cache_root: Path, smoke_out: Path
) -> None:
    soft = run_course(settings(smoke_out, cache_root, overrides=("strategy.pseudo=soft",)))
    assert soft != smoke_run
    a, b = (torch.load(p / "step2.pt", weights_only=True)["model"] for p in (soft, smoke_run))
    assert any(not torch.equal(a[k], b[k]) for k in b)
