"""The in-step trace: what it looks at, and that looking changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from clbench.errors import TrainingError
from clbench.evaluation.metrics.stability_gap import (
    TraceRow,
    curves,
    read_trace,
    stability_gap,
    write_trace,
)
from clbench.evaluation.trace import Tracer
from clbench.report.study import Study
from clbench.report.tables.continual import continual_table
from clbench.run.course import run_course
from clbench.run.plan import RunSettings, resolve
from clbench.store import run_folder
from clbench.strategy.contract import Lesson

EVERY = 3


def settings(out: Path, cache: Path, **more: Any) -> RunSettings:
    return RunSettings(
        bench="tumor_ext", strategy="universal", profile="smoke", out=out, cache=cache,
        overrides=(f"examine.trace_every={EVERY}",), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def traced(
    smoke_run: Path, cache_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bytes]:
    """The smoke run again, traced, stopped once in step 2; and the trace it left at the stop."""
    out = tmp_path_factory.mktemp("traced")
    first = run_folder.read_record(smoke_run)["step_origins"]["1"]["identity"]
    shutil.copytree(smoke_run.parents[2] / "_shared" / first, out / "_shared" / first)

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "update" and event["step"] == 2 and event["epoch"] == 1:
            raise Stop

    with pytest.raises(Stop):
        run_course(settings(out, cache_root), stop)
    (left,) = out.glob("_shared/*/trace.csv")
    half = left.read_bytes()
    return run_course(settings(out, cache_root)), half


def test_a_traced_run_has_the_bits_and_the_name_of_an_untraced_one(
    smoke_run: Path, traced: tuple[Path, bytes]
) -> None:
    folder, _ = traced
    assert folder.name == smoke_run.name
    record, other = run_folder.read_record(folder), run_folder.read_record(smoke_run)
    assert record["shared_step1"] == other["shared_step1"]
    assert (folder / "scores.csv").read_bytes() == (smoke_run / "scores.csv").read_bytes()
    assert (folder / "step2.pt").read_bytes() == (smoke_run / "step2.pt").read_bytes()
    ours, theirs = (
        [e for e in run_folder.read_events(f / "events.jsonl") if e["event"] == "update"]
        for f in (folder, smoke_run)
    )
    assert ours == theirs
    assert not (smoke_run / "trace.csv").exists()


def test_it_looks_at_validation_cases_of_all_steps_at_set_moments(
    traced: tuple[Path, bytes],
) -> None:
    folder, half = traced
    record = run_folder.read_record(folder)
    tests = [c for cases in record["course"]["test"] for c in cases]
    rows = read_trace(folder / "trace.csv", tests)
    assert {r.step for r in rows} == {2}
    assert {r.update for r in rows} == {0, EVERY, 4}  # the last update of the step is the fourth
    assert {r.structure for r in rows if r.eval_set == "lits"} == {"liver_tumor"}
    assert len({r.structure for r in rows if r.eval_set == "btcv"}) == 13
    opened = record["ledger"]["2"]["trace"]
    assert sorted({f"{r.eval_set}/{r.case}" for r in rows}) == opened
    assert not set(opened) & {c for part in ("train", "test") for c in record["course"][part][1]}
    assert half.startswith((folder / "trace.csv").read_bytes()[:60])


def test_looking_is_not_training_on_past_images(traced: tuple[Path, bytes]) -> None:
    from clbench.report.tables.summary import run_report

    notes = [n for table in run_report(traced[0], scoring="strict") for n in table.notes]
    assert any(n == "past images opened: none (enforced)" for n in notes)


def test_the_stability_gap_stands_in_the_table(traced: tuple[Path, bytes]) -> None:
    folder, _ = traced
    rows = read_trace(folder / "trace.csv", ())
    gap = stability_gap(curves(rows, 2), {r.structure: r.learned_at for r in rows}, 2)
    assert gap is not None
    text = str(continual_table(Study(results=folder.parents[2], bench="tumor_ext")))
    assert "stability gap, step 2" in text
    assert "no trace.csv" not in text
    assert f"{gap.depth:.3f}" in text


def test_without_a_trace_the_run_id_knows_of_none(cache_root: Path, tmp_path: Path) -> None:
    traced_plan = resolve(settings(tmp_path, cache_root))
    assert "examine" not in traced_plan.identity.profile
    assert traced_plan.profile.examine.trace_every == EVERY


def test_test_cases_and_cases_to_come_are_not_traced(cache_root: Path, tmp_path: Path) -> None:
    catalog = resolve(settings(tmp_path, cache_root)).catalog
    one, two = catalog.splits
    with pytest.raises(TrainingError, match="test case"):
        catalog.open(1, one.test[0], "trace")
    for step, case in ((2, two.validation[0]), (1, one.train[0])):
        with pytest.raises(TrainingError, match="no validation case"):
            catalog.open(step, case, "trace")
    catalog.open(1, one.validation[0], "trace")


class Walls:
    """Two cases, one per source; the model always answers `answer`."""

    def __init__(self) -> None:
        self.benchmark = SimpleNamespace(learned_at={"liver": 1, "tumor": 2}.get)
        self.splits = [SimpleNamespace(validation=("a",)), SimpleNamespace(validation=("b",))]
        self.opened: list[tuple[int, str, str]] = []

    def source(self, step: int) -> Any:
        return SimpleNamespace(name=("btcv", "lits")[step - 1])

    def open(self, step: int, case: str, purpose: str) -> Any:
        self.opened.append((step, case, purpose))
        return SimpleNamespace(
            annotated={"liver", "tumor"}, names=("liver", "tumor"),
            bits=np.array([[[1, 1, 3, 2]]], np.uint8),
        )  # fmt: skip


def tracer(folder: Path, walls: Walls, past: Iterable[Any] = (), **more: Any) -> Tracer:
    server = SimpleNamespace(
        structures=("liver", "tumor"),
        predict=lambda volume, postprocess: np.array([[[1, 1, 0, 2]]], np.uint8),
    )
    lesson = Lesson(number=2, learns=("tumor",), structures=("liver", "tumor"), source="lits")
    return Tracer(
        lesson, every=2, folder=folder, catalog=cast("Any", walls),
        served=lambda: cast("Any", server), past=past, **more,
    )  # fmt: skip


UPDATE = {"event": "update"}


def test_a_resumed_trace_goes_on_at_the_update_of_the_checkpoint(tmp_path: Path) -> None:
    walls = Walls()
    whole = tracer(tmp_path, walls)
    for _ in range(5):
        whole.see(UPDATE)
    whole.end()
    rows = read_trace(tmp_path / "trace.csv", ())
    assert [(r.update, r.structure, r.value) for r in rows if r.update in (0, 5)] == [
        (0, "liver", 0.8), (0, "tumor", 2 / 3), (5, "liver", 0.8), (5, "tumor", 2 / 3),
    ]  # fmt: skip
    assert sorted({r.update for r in rows}) == [0, 2, 4, 5]
    assert set(walls.opened) == {(1, "a", "trace"), (2, "b", "trace")}
    uninterrupted = (tmp_path / "trace.csv").read_bytes()

    again = tracer(tmp_path, Walls(), past=[UPDATE] * 3)  # killed after the fifth, saved at three
    assert sorted({r.update for r in again.rows}) == [0, 2]
    for _ in range(2):
        again.see(UPDATE)
    again.end()
    assert (tmp_path / "trace.csv").read_bytes() == uninterrupted


def test_rows_of_earlier_steps_stay_and_a_new_model_has_no_before(tmp_path: Path) -> None:
    early = TraceRow(
        step=1, update=9, eval_set="btcv", case="a", structure="liver", learned_at=1, value=0.5,
        status="ok",
    )  # fmt: skip
    write_trace(tmp_path / "trace.csv", [early])
    made = tracer(tmp_path, Walls(), scratch=True)
    assert made.rows == [early]
    made.end()
    assert early in read_trace(tmp_path / "trace.csv", ())
