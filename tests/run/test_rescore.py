"""Metrics of a finished run from its stored predictions: right, repeatable, and of this run."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.catalog import exam_cases
from clbench.data.nifti import spacing_of
from clbench.errors import StoreError
from clbench.evaluation.metrics import case as case_module
from clbench.evaluation.predictions import read_prediction, write_prediction
from clbench.evaluation.scoring import to_native
from clbench.report.tables.rescored import score_report
from clbench.run import cost_table, rescore
from clbench.run.cost_table import recount
from clbench.run.record import catalog_of
from clbench.run.rescore import score_run
from clbench.store import run_folder
from clbench.store.files import COPY_RUN
from clbench.store.record import RunRecord


@pytest.fixture(scope="module")
def scored(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run, scored once with everything."""
    folder = tmp_path_factory.mktemp("scored") / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, folder)
    return score_run(folder, metrics=(*case_module.DEFAULT, "nsd_3mm", "patient_50vox"))


@pytest.fixture
def copy(smoke_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, folder)
    return folder


def change_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))


def test_rows_are_added_and_nothing_else_moves(smoke_run: Path, scored: Path) -> None:
    before = run_folder.read_scores(smoke_run / "scores.csv")
    after = run_folder.read_scores(scored / "scores.csv")
    kept = [r for r in after if r.metric in ("dice", "dice_ceiling")]
    assert list(map(repr, kept)) == list(map(repr, before))
    new = [r for r in after if r.metric not in ("dice", "dice_ceiling")]
    assert {r.scoring for r in new} == {"strict"}
    assert {r.metric for r in new} == {
        "nsd_1mm", "nsd_2mm", "nsd_3mm", "hd95_mm", "volume_error_ml", *(metric.name for metric in case_module.LESION),
        "patient_positive", "patient_positive_50vox",
    }  # fmt: skip
    assert {r.structure for r in new if r.metric.startswith(("lesion", "patient"))} == {
        "liver_tumor"
    }
    assert {r.metric for r in new if r.structure == "aorta"} >= {"nsd_1mm", "nsd_3mm"}
    assert "nsd_2mm" not in {r.metric for r in new if r.structure == "aorta"}
    dice = {(r.step, r.eval_set, r.case, r.structure): r for r in before
            if r.scoring == "strict" and r.metric == "dice"}  # fmt: skip
    for r in new:  # every structure that has a Dice row has one of each metric, with its status
        twin = dice[r.step, r.eval_set, r.case, r.structure]
        assert (r.status, r.gt_vox, r.pred_vox) == (twin.status, twin.gt_vox, twin.pred_vox)
        if r.status == "not_annotated":
            assert math.isnan(r.value)
    assert sum(r.metric == "hd95_mm" for r in new) == len(dice)
    record = run_folder.read_record(scored)
    assert record["metrics"]["nsd"]["version"] == 1
    assert {"dice", "nsd", "hd95", "volume", "lesion", "patient"} == set(record["metrics"])
    assert "26-connected" in record["metrics"]["lesion"]["implementation"]


def test_twice_gives_the_same_bytes_and_a_changed_row_is_mended(scored: Path) -> None:
    path = scored / "scores.csv"
    once, record = path.read_bytes(), (scored / "run.json").read_bytes()
    rows = run_folder.read_scores(path)
    spoiled = [replace(r, value=0.123) if r.metric == "hd95_mm" else r for r in rows]
    run_folder.write_scores(path, spoiled)
    score_run(scored, metrics=("hd95_mm",))
    assert path.read_bytes() == once
    assert (scored / "run.json").read_bytes() == record


def test_values_are_those_of_scipy_on_the_files_grid(scored: Path) -> None:
    catalog = catalog_of(RunRecord.read(scored))
    rows = run_folder.read_scores(scored / "scores.csv")
    number, source, case = next(e for e in exam_cases(catalog) if e[1] == "lits")
    volume = catalog.open(number, case, "test")
    pred = read_prediction(scored / "predictions" / "step2" / f"{source}_{case}.npz")
    back, truth = to_native(pred.bits, volume.native_axes()), volume.native_bits()
    spacing = spacing_of(volume.native_affine)
    p = (back >> pred.structures.index("liver") & 1).astype(bool)
    t = (truth >> volume.names.index("liver") & 1).astype(bool)
    edges = []
    for mask in (p, t):
        padded = np.pad(mask, 1)
        edges.append((padded ^ ndimage.binary_erosion(padded))[1:-1, 1:-1, 1:-1])
    maps = [ndimage.distance_transform_edt(~e, sampling=spacing) for e in edges]
    to_truth, to_pred = maps[1][edges[0]], maps[0][edges[1]]
    mine = {
        r.metric: r.value
        for r in rows
        if (r.step, r.eval_set, r.case, r.structure) == (2, source, case, "liver")
    }
    assert mine["hd95_mm"] == pytest.approx(
        max(np.percentile(to_truth, 95), np.percentile(to_pred, 95))
    )
    near = np.count_nonzero(to_truth <= 3.0001) + np.count_nonzero(to_pred <= 3.0001)
    assert mine["nsd_3mm"] == pytest.approx(near / (to_truth.size + to_pred.size))
    assert mine["volume_error_ml"] == pytest.approx(
        (int(p.sum()) - int(t.sum())) * np.prod(spacing) / 1000
    )


def test_the_report_of_a_scored_run(scored: Path, smoke_run: Path) -> None:
    surfaces, detection = score_report(scored)
    assert "PHANTOM" in surfaces.title
    assert {"nsd_2mm", "hd95_mm", "volume_error_ml", "dice"} <= set(surfaces.columns)
    assert len(surfaces.rows) == 14
    spleen = dict(zip(surfaces.columns, next(r for r in surfaces.rows if r[0] == "spleen"),
                      strict=True))  # fmt: skip
    assert spleen["cases"] == "2"
    assert [r[:2] for r in detection.rows] == [
        ("liver_tumor", "any voxel"), ("liver_tumor", "50vox")]  # fmt: skip
    assert any("26-connected" in note for note in detection.notes)
    assert len(score_report(smoke_run)) == 1  # nothing of detection was scored


def test_the_command(copy: Path) -> None:
    done = CliRunner().invoke(app, ["score", str(copy), "--metrics", "nsd_sweep"])
    assert done.exit_code == 0, done.output
    assert "nsd_3mm" in done.output
    assert str(copy) in done.output.replace("\n", "")
    for words, says in (
        (["score"], "needs run folders"),
        (["score", str(copy), "--predictions", "x"], "needs run folders"),
        (["score", "--predictions", "x", "--bench", "tumor_ext"], "--bench, --step and --name"),
        (["score", str(copy), "--metrics", "hd59"], "no metric called 'hd59'"),
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code != 0
        assert says in str(done.exception), words


@pytest.mark.parametrize(("module", "work"), [(rescore, "catalog_of"), (cost_table, "profile_of")])
def test_what_another_process_wrote_meanwhile_stays(
    copy: Path, module: ModuleType, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read the record, take some time, then write it."""
    before = getattr(module, work)

    def meanwhile(record: RunRecord, **more: Any) -> Any:
        other = RunRecord.read(copy)
        other.metrics["other"] = {"version": 1}
        other.reseal(copy)
        other.write(copy)
        return before(record, **more)

    monkeypatch.setattr(module, work, meanwhile)
    if module is rescore:
        score_run(copy, metrics=("volume_error_ml",))
    else:
        recount(copy)
    assert "other" in RunRecord.read(copy).metrics


def test_a_missing_prediction_is_named_and_nothing_changes(copy: Path) -> None:
    (copy / "predictions" / "step2" / "lits_20.npz").unlink()
    before = (copy / "scores.csv").read_bytes()
    with pytest.raises(StoreError, match="1 of 8 predictions of the run are missing") as err:
        score_run(copy)
    assert "step2/lits_20.npz" in str(err.value)
    assert "--keep-predictions" in str(err.value)
    assert (copy / "scores.csv").read_bytes() == before


def test_predictions_of_another_case_or_run_are_found_out(copy: Path) -> None:
    folder = copy / "predictions" / "step2"
    kept = (folder / "lits_20.npz").read_bytes()
    shutil.copy(folder / "lits_21.npz", folder / "lits_20.npz")
    with pytest.raises(StoreError, match="not of this case"):
        score_run(copy)
    (folder / "lits_20.npz").write_bytes(kept)
    pred = read_prediction(folder / "lits_20.npz")
    bits = pred.bits.copy()
    bits[5:9, 5:9, 5:9] ^= bits.dtype.type(1 << pred.structures.index("liver"))
    write_prediction(folder / "lits_20.npz", bits, pred.structures, pred.affine,
                     source="lits", case="20")  # fmt: skip
    with pytest.raises(StoreError, match="does not give the recorded Dice"):
        score_run(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(status="unfinished"), "not finished"),
        (lambda r: r.update(external=True), "made elsewhere"),
        (lambda r: r.update(data_fingerprint="data-0"), "not what the run was made on"),
        (lambda r: r["identity"].update(bench_version=0), "another version of the benchmark"),
    ],
)
def test_runs_that_cannot_be_scored(copy: Path, change: Any, says: str) -> None:
    change_record(copy, change)
    with pytest.raises(StoreError, match=says):
        score_run(copy)


@pytest.mark.parametrize("add", [score_run, recount])
def test_a_run_that_may_only_be_read_is_to_be_copied(
    add: Callable[[Path], object], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *args: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = {p: p.read_bytes() for p in copy.glob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refused)
        with pytest.raises(StoreError, match="cannot be written") as err:
            add(copy)
    assert err.value.next_step == COPY_RUN
    assert {p: p.read_bytes() for p in copy.glob("*.*")} == before
    add(Path(shutil.copytree(copy, tmp_path / "elsewhere")))  # as the error says
