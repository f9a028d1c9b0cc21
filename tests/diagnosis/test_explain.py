"""Explaining a run: sums that are its scores, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.catalog import exam_cases
from clbench.diagnosis.explain import explain_run
from clbench.errors import StoreError
from clbench.evaluation.explained import FILE, read_lost_dice, summarize
from clbench.evaluation.metrics import continual
from clbench.evaluation.predictions import write_prediction
from clbench.evaluation.scoring import context_of, score_case
from clbench.run.record import catalog_of
from clbench.run.verify import verify_run
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.types import Bits, bits_dtype

LOST = "spleen"
"""Missed whole after step 2."""
CALLED = ("stomach", "liver")
"""The first is called the second after step 2."""


def predict(folder: Path, change: Callable[[int, Bits, tuple[str, ...]], None]) -> None:
    """Give a run other predictions: the truth, as `change` leaves it; and their scores.

    Args:
        folder: a copy of a finished run.
        change: step, bit patterns and their names → damage done in place.
    """
    record = RunRecord.read(folder)
    catalog = catalog_of(record)
    rows = []
    for number, source, case in exam_cases(catalog):
        volume = catalog.open(number, case, "test")
        for step in (1, 2):
            names = catalog.benchmark.structures(step)
            bits = np.zeros(volume.bits.shape, dtype=bits_dtype(len(names)))
            for k, name in enumerate(names):
                if name in volume.names:
                    bit = volume.bits.dtype.type(volume.names.index(name))
                    mask = (volume.bits >> bit) & volume.bits.dtype.type(1)
                    bits |= mask.astype(bits.dtype) << bits.dtype.type(k)
            change(step, bits, names)
            path = folder / "predictions" / f"step{step}" / f"{source}_{case}.npz"
            write_prediction(path, bits, names, volume.affine, source=source, case=case)
            context = context_of(record, catalog.benchmark, step)
            rows += score_case(bits, names, volume, scorings=("strict", "paper"), context=context)
    run_folder.write_scores(folder / "scores.csv", rows)
    record.reseal(folder)
    record.write(folder)


def forget(step: int, bits: Bits, names: tuple[str, ...]) -> None:
    """`LOST` is gone and one structure is called another, after step 2."""
    if step == 2:
        lost, called, instead = (bits.dtype.type(1 << names.index(n)) for n in (LOST, *CALLED))
        bits[(bits & called) != 0] |= instead
        bits &= ~(lost | called)


@pytest.fixture(scope="module")
def forgetful(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose predictions are perfect, but for what `forget` does."""
    folder = tmp_path_factory.mktemp("forgetful") / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, folder)
    predict(folder, forget)
    return folder


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
    assert by_name[LOST].main_cause == "missed whole"
    assert by_name[CALLED[0]].main_cause == "confused"
    assert list(by_name[CALLED[0]].to) == [CALLED[1]]
    # the other one grew into it
    assert by_name[CALLED[1]].parts["claimed"] > 0
    assert {n for n, one in by_name.items() if one.lost} == {LOST, *CALLED}
    assert found.notes == []


def test_the_sums_are_the_forgetting_of_every_table(copy: Path) -> None:
    found = explain_run(copy, models=False)
    record = found.record
    sources = [s.source for s in record.course.steps]
    cells = continual.cells(run_folder.read_scores(copy / "scores.csv"), sources, scoring="strict")
    summary = summarize(found.rows, record.course.patient_of)
    assert len(summary) == len(record.course.steps[0].learns)
    for one in summary:
        lost = cells[1, one.structure].value - cells[2, one.structure].value
        assert one.lost == pytest.approx(lost, abs=1e-12)
        assert sum(one.parts.values()) == pytest.approx(lost, abs=1e-9)
        assert one.cases == cells[1, one.structure].cases


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
        shared = RunRecord.read(smoke_run).shared_step1
        shutil.copytree(
            smoke_run.parents[1] / "_shared" / str(shared),
            folder.parents[1] / "_shared" / str(shared),
        )
    shutil.rmtree(bare / "predictions")
    change_record(bare, lambda r: r.update(files=None))
    stored, anew = (explain_run(f, models=False) for f in (whole, bare))
    assert stored.notes == []
    assert "after step 1 were predicted anew" in anew.notes[0]
    assert list(map(repr, anew.rows)) == list(map(repr, stored.rows))


def test_neither_predictions_nor_checkpoints(copy: Path) -> None:
    shutil.rmtree(copy / "predictions")
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


def test_the_command(copy: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(copy), "--voxels-only"])
    assert result.exit_code == 0, result.output
    assert "where the lost Dice went" in result.output
    (line,) = [x for x in result.output.splitlines() if x.startswith(CALLED[0])][:1]
    assert line.split()[-1] == "confused"
    assert f"{CALLED[1]} 100%" in result.output
