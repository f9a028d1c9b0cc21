"""Explaining a run: sums that are its scores, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forgetful_runs import CALLED, LOST
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.diagnosis import explain
from clbench.diagnosis.explain import _old_structures, explain_run
from clbench.errors import StoreError
from clbench.evaluation.explained import FILE, main_of, read_lost_dice, summarize
from clbench.report.study import Study
from clbench.run.verify import verify_run


@pytest.fixture
def copy(forgetful: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tumor_ext" / "universal" / forgetful.name
    shutil.copytree(forgetful, folder)
    return folder


def change_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    record.pop("record_sha256", None)
    (folder / "run.json").write_text(json.dumps(record))


def test_what_was_lost_is_named(copy: Path) -> None:
    found = explain_run(copy, models=False)
    by_name = {one.structure: one for one in summarize(found.rows)}
    assert main_of(by_name[LOST].causes()) == "missed whole"
    assert main_of(by_name[CALLED[0]].causes()) == "confused"
    assert list(by_name[CALLED[0]].to) == [CALLED[1]]
    # the other one grew into it
    assert by_name[CALLED[1]].parts["claimed"] > 0
    assert {n for n, one in by_name.items() if one.lost} == {LOST, *CALLED}
    assert found.notes == []


def test_the_sums_are_the_forgetting_of_every_table(copy: Path) -> None:
    found = explain_run(copy, models=False)
    (r,) = Study(results=copy.parents[2], bench="tumor_ext").dice.reference.r
    summary = summarize(found.rows, found.record.course.patient_of)
    assert {one.structure for one in summary} == set(found.record.course.steps[0].learns)
    for one in summary:
        lost = r[1, one.structure] - r[2, one.structure]
        assert one.lost == pytest.approx(lost, abs=1e-12)
        assert sum(one.parts.values()) == pytest.approx(lost, abs=1e-9)


def test_the_file_reads_back_and_the_run_stays_whole(copy: Path) -> None:
    scores = (copy / "scores.csv").read_bytes()
    first = explain_run(copy, models=False)
    written = (copy / FILE).read_bytes()
    key = repr
    assert sorted(map(key, read_lost_dice(copy / FILE))) == sorted(map(key, first.rows))
    explain_run(copy, models=False)
    assert (copy / FILE).read_bytes() == written
    assert (copy / "scores.csv").read_bytes() == scores
    verify_run(copy)


def test_a_file_whose_parts_do_not_add_up_is_refused(copy: Path) -> None:
    explain_run(copy, models=False)
    lines = (copy / FILE).read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if ",missed_whole," in line)
    (copy / FILE).write_text("".join(lines[:at] + lines[at + 1 :]))
    with pytest.raises(StoreError, match="do not add up"):
        read_lost_dice(copy / FILE)


def test_without_stored_predictions_they_are_made_anew(smoke_run: Path, tmp_path: Path) -> None:
    whole, bare = (tmp_path / n / "tumor_ext" / "universal" / "run" for n in ("a", "b"))
    for folder in (whole, bare):
        shutil.copytree(smoke_run, folder)
    shutil.rmtree(bare / "predictions")
    change_record(bare, lambda r: r.update(files=None))
    stored, anew = (explain_run(f, models=False) for f in (whole, bare))
    assert stored.notes == []
    assert "after step 1 were predicted anew" in anew.notes[0]
    assert list(map(repr, anew.rows)) == list(map(repr, stored.rows))


def test_neither_predictions_nor_checkpoints(copy: Path) -> None:
    shutil.rmtree(copy / "predictions")
    (copy / "step1.pt").unlink()
    with pytest.raises(StoreError, match="neither a prediction") as caught:
        explain_run(copy)
    assert "step1.pt" in str(caught.value)
    assert not (copy / FILE).exists()


def test_a_prediction_that_was_exchanged_is_refused(copy: Path) -> None:
    first, second = sorted((copy / "predictions" / "step2").glob("btcv_*.npz"))[:2]
    shutil.copy(first, second)
    with pytest.raises(StoreError, match=r"not of this case|recorded Dice"):
        explain_run(copy)


def one_step(record: dict[str, Any]) -> None:
    record["course"]["steps"] = record["course"]["steps"][:1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_step, "the course has one step"),
        (lambda r: r.update(steps_done=1, status="unfinished"), "no later step of the run"),
        (lambda r: r.update(external=True), "made elsewhere"),
    ],
)
def test_runs_that_cannot_have_forgotten(
    copy: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    change_record(copy, change)
    with pytest.raises(StoreError, match=says):
        explain_run(copy)
    assert not (copy / FILE).exists()


def test_old_structures_count_on_the_source_that_taught_them() -> None:
    """Those whose model was given have no test cases of their own, and count on all."""
    steps = [SimpleNamespace(learns=(n,)) for n in ("liver", "spleen", "colon")]
    split = SimpleNamespace(test=("1",))
    catalog: Any = SimpleNamespace(
        benchmark=SimpleNamespace(steps=steps),
        source=lambda number: SimpleNamespace(name=("btcv", "lits", "lits")[number - 1]),
        splits=[split, split, split],
    )
    assert _old_structures(catalog, "btcv", 3) == {"liver": 1}
    assert _old_structures(catalog, "lits", 3) == {"spleen": 2}
    catalog.splits[0] = SimpleNamespace(test=())
    assert _old_structures(catalog, "lits", 3) == {"liver": 1, "spleen": 2}


def test_without_a_test_case_of_an_old_structure_nothing_is_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "_old_structures", lambda *_: {})
    with pytest.raises(StoreError, match="no test case of the run holds a structure"):
        explain_run(copy)
    assert not (copy / FILE).exists()


def test_the_command(copy: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(copy), "--voxels-only"])
    assert (copy / "explain" / "before_after.png").is_file()
    verify_run(copy)
    assert result.exit_code == 0, result.output
    assert "where the lost Dice went" in result.output
    (line,) = [x for x in result.output.splitlines() if x.startswith(CALLED[0])][:1]
    assert line.split()[-1] == "confused"
    assert f"{CALLED[1]} 100%" in result.output
