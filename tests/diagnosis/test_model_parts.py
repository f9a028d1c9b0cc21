"""Heads, bodies and probes of a run: scores that are its own, the ledger, and what has no parts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clbench.diagnosis import probe
from clbench.diagnosis.explain import explain_run
from clbench.diagnosis.model_parts import ModelParts, _of_step
from clbench.errors import StoreError
from clbench.evaluation.explained import (
    HEAD_BODY_FILE,
    read_head_body,
    summarize_head_body,
    write_head_body,
)
from clbench.report.past_images import past_card
from clbench.report.tables.lost_dice import lost_dice_tables
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.run.verify import verify_run
from clbench.store import run_folder
from clbench.store.record import RunRecord


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run."""
    out = tmp_path_factory.mktemp("parts") / "tumor_ext"
    return Path(shutil.copytree(smoke_run, out / "universal" / smoke_run.name))


def test_parts_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "UPDATES", 5)  # how well it is fitted is another test's
    card = past_card(RunRecord.read(run))
    found = explain_run(run)
    assert found.notes == []
    assert sorted(map(repr, read_head_body(run / HEAD_BODY_FILE))) == sorted(
        map(repr, found.model_rows)
    )
    recorded = {
        (r.step, r.eval_set, r.case, r.structure): r.value
        for r in run_folder.read_scores(run / "scores.csv")
        if r.scoring == "strict" and r.metric == "dice"
    }
    assert {r.structure for r in found.model_rows} == set(found.record.course.steps[0].learns)
    for r in found.model_rows:
        assert r.old == recorded[1, r.eval_set, r.case, r.structure]
        assert r.new == recorded[2, r.eval_set, r.case, r.structure]
        assert 0 <= r.probe_old_body <= 1
        assert 0 <= r.probe_new_body <= 1
    for one in summarize_head_body(found.model_rows):
        assert one.head + one.body == pytest.approx(one.lost, abs=1e-12)
    # old and new models were put together, and nothing else is entered as training
    record = RunRecord.read(run)
    assert set(record.ledger["1"]["diagnosis"]) == set(record.course.train[0])
    assert "diagnosis" not in record.ledger["2"]
    assert past_card(record) == card
    verify_run(run)
    assert lost_dice_tables(record, found.rows, found.model_rows)[-1].title.endswith("head or body")


def test_a_step_that_only_teaches_again_has_no_structures_of_its_own() -> None:
    """They are looked at as those of the step that taught them first."""
    steps = [SimpleNamespace(learns=("liver",)), SimpleNamespace(learns=(), again=("liver",))]
    catalog: Any = SimpleNamespace(benchmark=SimpleNamespace(steps=steps))

    def never(*_: object) -> Any:
        raise AssertionError("nothing is loaded")

    parts = ModelParts()
    _of_step(parts, catalog, never, never, range(2, 4), never)
    assert parts.rows == []


def test_without_checkpoints_voxels_alone_are_explained(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "tumor_ext" / "universal" / "run"))
    (run / "step1.pt").unlink()
    found = explain_run(run)
    assert found.rows
    assert not found.model_rows
    (note,) = found.notes
    assert note.startswith("head or body: not looked at, the run has no checkpoint of step 1")
    assert not (run / HEAD_BODY_FILE).exists()


def test_a_strategy_without_one_head_on_one_body_is_named(cache_root: Path, tmp_path: Path) -> None:
    run = run_course(
        RunSettings(
            bench="tumor_ext",
            strategy="decoder_growth",
            profile="smoke",
            out=tmp_path,
            cache=cache_root,
        )
    )
    found = explain_run(run)
    assert found.rows
    exchange, probing = found.notes
    assert "head and body of decoder_growth cannot be exchanged" in exchange
    assert "the body of decoder_growth cannot be probed" in probing
    for row in found.model_rows:
        assert row.old == row.new  # its old decoders are not changed
        assert math.isnan(row.old_head_new_body)
        assert math.isnan(row.probe_new_body)


def test_a_damaged_file_names_its_line(run: Path, tmp_path: Path) -> None:
    path = tmp_path / HEAD_BODY_FILE
    write_head_body(path, [])
    assert read_head_body(path) == []
    path.write_text(path.read_text() + "2,btcv,1,spleen,one,0,0,0,0,0,0\n")
    with pytest.raises(StoreError, match="cannot be read") as caught:
        read_head_body(path)
    assert "line 2" in str(caught.value)
