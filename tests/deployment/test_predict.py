"""A run's model on new CTs: the bits of the examination, batches that go on, errors that help."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_files import body, packed, put

from clbench import signals
from clbench.deployment import predict as predict_module
from clbench.deployment.inputs import find_inputs
from clbench.deployment.predict import (
    Batch,
    _odd_values,
    output_form,
    predict_cases,
    predict_volume,
)
from clbench.deployment.scan import Grid, Scan, prepare, read_nifti
from clbench.deployment.trained import TrainedModel, load_trained
from clbench.errors import DataError, SettingError, StoreError
from clbench.evaluation.predictions import read_prediction
from clbench.evaluation.scoring import to_native
from clbench.run.record import catalog_of
from clbench.spec.benchmark import Rescale
from clbench.store.record import RunRecord

CASES = (("btcv", "21", 1), ("lits", "20", 2))


@pytest.fixture(scope="module")
def trained(smoke_run: Path) -> TrainedModel:
    return load_trained(smoke_run)


@pytest.fixture(scope="module")
def scans(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test cases of the course as a user's folder, one of them in a folder of its own."""
    catalog = catalog_of(RunRecord.read(smoke_run))
    folder = tmp_path_factory.mktemp("scans")
    (folder / "s01").mkdir()
    first, second = (catalog.files[source][case].image for source, case, _ in CASES)
    shutil.copy(first, folder / "a_0000.nii.gz")
    (folder / "s01" / "ct.nii.gz").write_bytes(gzip.compress(second.read_bytes()))
    return folder


def run(trained: TrainedModel, scans: Path, out: Path, form: str = "auto", **more: bool) -> Batch:
    return predict_cases(
        trained,
        find_inputs(scans, out=out),
        out=out,
        form=output_form(form, trained.structures, **more),
    )


def test_a_test_case_gets_the_bits_its_examination_stored(smoke_run: Path) -> None:
    catalog = catalog_of(RunRecord.read(smoke_run))
    voxels = 0
    for step in (1, 2):
        model = load_trained(smoke_run, step=step)
        for source, case, number in CASES:
            image = catalog.open(number, case, "test").files.image
            volume = prepare(
                read_nifti(image), case=case, source=model.source, pre=model.preprocessing
            )
            stored = read_prediction(smoke_run / f"predictions/step{step}/{source}_{case}.npz")
            assert model.structures == stored.structures
            got = predict_volume(model, volume)
            np.testing.assert_array_equal(got, stored.bits)
            voxels += int(np.count_nonzero(got))
    assert voxels > 0


def test_files_hold_what_was_predicted(
    smoke_run: Path, trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    import nibabel as nib

    batch = run(trained, scans, tmp_path / "out", probabilities=True)
    assert batch.predicted == ["a", "s01/ct"]
    stored = read_prediction(smoke_run / "predictions/step2/btcv_21.npz")
    volume = catalog_of(RunRecord.read(smoke_run)).open(1, "21", "test")
    ras = to_native(stored.bits, volume.native_axes())
    for k, name in enumerate(trained.structures):
        mask = nib.as_closest_canonical(nib.load(tmp_path / "out" / "a" / f"{name}.nii.gz"))
        np.testing.assert_array_equal(mask.get_fdata() == 1, (ras >> k) & 1 == 1, err_msg=name)
        chance = nib.as_closest_canonical(
            nib.load(tmp_path / "out" / "a_probabilities" / f"{name}.nii.gz")
        ).get_fdata()
        assert 0 <= chance.min() <= chance.max() <= 1
        stored_as = np.round(chance * 254)  # the slope 1/254 is no float32
        assert (stored_as[mask.get_fdata() == 1] >= 127).all()
        assert (stored_as[mask.get_fdata() == 0] <= 127).all()
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    counts = record["cases"]["a"]["voxels"]
    assert counts == {n: int(((ras >> k) & 1).sum()) for k, n in enumerate(trained.structures)}


def test_a_label_map_is_scored_like_the_run(
    smoke_run: Path, scans: Path, tmp_path: Path, cache_root: Path
) -> None:
    """`clbench score --predictions` on the files gives the run's own Dice."""
    from clbench.data.external_masks import label_map, read_prediction_files

    model = load_trained(smoke_run, step=1)
    run(model, scans, tmp_path / "out")
    content = tmp_path / "out" / "dataset.json"
    assert json.loads(content.read_text())["labels"]["spleen"] == 1
    volume = catalog_of(RunRecord.read(smoke_run)).open(1, "21", "test")
    native = read_prediction_files(
        tmp_path / "out" / "a.nii.gz", volume.files.image, model.structures, label_map(content)
    )
    stored = read_prediction(smoke_run / "predictions/step1/btcv_21.npz")
    examined = to_native(stored.bits, volume.native_axes())
    one = examined & (examined - 1) == 0  # a label map holds one structure of a voxel, or none
    assert np.count_nonzero(native[one]) > 0
    np.testing.assert_array_equal(native[one], examined[one])
    np.testing.assert_array_equal(native[~one] & examined[~one], native[~one])


def test_a_stopped_batch_goes_on_and_ends_with_the_same_bytes(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    whole = run(trained, scans, tmp_path / "whole", "labels")
    assert whole.finished_before == []
    cases = find_inputs(scans, out=tmp_path / "out")
    form = output_form("labels", trained.structures)

    def stop(event: dict[str, object]) -> None:
        signals.ask("SIGTERM")

    with pytest.raises(signals.Stopped):
        predict_cases(trained, cases, out=tmp_path / "out", form=form, watch=stop)
    assert [p.name for p in (tmp_path / "out").rglob("*.nii.gz")] == ["a.nii.gz"]
    again = run(trained, scans, tmp_path / "out", "labels")
    assert (again.finished_before, again.predicted) == (["a"], ["s01/ct"])
    for name in ("a.nii.gz", "s01/ct.nii.gz", "dataset.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_changed_outputs_and_changed_inputs_are_predicted_again(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "mine" / "out"  # outputs are no inputs
    shutil.copytree(scans, mine)
    run(trained, mine, out, "labels")
    first = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").write_bytes(first[:-1])
    again = run(trained, mine, out, "labels")
    assert (again.predicted, again.finished_before) == (["a"], ["s01/ct"])
    assert (out / "a.nii.gz").read_bytes() == first
    shutil.copy(mine / "a_0000.nii.gz", mine / "s01" / "ct.nii.gz")
    assert run(trained, mine, out, "labels").predicted == ["s01/ct"]
    assert (out / "s01" / "ct.nii.gz").read_bytes() == first


def test_a_bad_file_keeps_no_other_case_from_being_predicted(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    shutil.copytree(scans, tmp_path / "mine")
    (tmp_path / "mine" / "a_0000.nii.gz").write_bytes(b"no NIfTI")
    batch = run(trained, tmp_path / "mine", tmp_path / "out")
    assert batch.predicted == ["s01/ct"]
    assert "damaged or is not NIfTI" in str(batch.refused["a"])
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(record["refused"]) == ["a"]
    shutil.copy(scans / "a_0000.nii.gz", tmp_path / "mine" / "a_0000.nii.gz")
    assert run(trained, tmp_path / "mine", tmp_path / "out").predicted == ["a"]
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["refused"] == {}


def test_a_file_that_cannot_be_opened_keeps_no_other_case_from_being_predicted(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    shutil.copytree(scans, tmp_path / "mine")
    (tmp_path / "mine" / "a_0000.nii.gz").unlink()
    (tmp_path / "mine" / "a_0000.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    batch = run(trained, tmp_path / "mine", tmp_path / "out")
    assert batch.predicted == ["s01/ct"]
    assert isinstance(batch.refused["a"], DataError)
    assert "a_0000.nii.gz" in str(batch.refused["a"])


def test_the_record_says_which_files_are_of_an_earlier_image(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    def recorded() -> dict[str, Any]:
        content: dict[str, Any] = json.loads((tmp_path / "out" / "predictions.json").read_text())
        return content

    shutil.copytree(scans, tmp_path / "mine")
    run(trained, tmp_path / "mine", tmp_path / "out", "labels")
    before = recorded()
    (tmp_path / "mine" / "a_0000.nii.gz").write_bytes(b"no NIfTI")
    batch = run(trained, tmp_path / "mine", tmp_path / "out", "labels")
    assert recorded()["cases"]["a"]["of_earlier_image"] is True
    assert list(recorded()["refused"]) == ["a"]
    assert any("a: its files were made from an earlier image" in n for n in batch.notes)
    shutil.copy(scans / "a_0000.nii.gz", tmp_path / "mine" / "a_0000.nii.gz")
    assert run(trained, tmp_path / "mine", tmp_path / "out", "labels").predicted == []
    assert recorded() == before


def test_a_full_disk_leaves_no_half_file_and_the_batch_goes_on(
    trained: TrainedModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("clbench.deployment.masks._header", full)
        with pytest.raises(StoreError, match="could not be written") as err:
            run(trained, scans, tmp_path / "out")
    assert "No space left" in str(err.value)
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {
        "predictions.json",
        ".lock",
    }
    assert run(trained, scans, tmp_path / "out").predicted == ["a", "s01/ct"]


# ----------------------------------------------------------------------------------------- refused


def test_folders_that_are_not_for_these_predictions_are_refused(
    smoke_run: Path, trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    run(trained, scans, tmp_path / "out", "labels")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    first = load_trained(smoke_run, step=1)
    with pytest.raises(StoreError, match="another model, step or form"):
        run(first, scans, tmp_path / "out", "labels")
    with pytest.raises(StoreError, match="another model, step or form"):
        run(trained, scans, tmp_path / "out", "masks")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        run(trained, scans, tmp_path / "other")
    for above in (scans, scans.parent):
        with pytest.raises(SettingError, match="among the images"):
            run(trained, scans, above)
    with pytest.raises(StoreError, match="no part of a run's folder"):
        run(trained, scans, smoke_run / "new")
    assert not (smoke_run / "new").exists()


def test_a_model_that_is_not_there_is_named(smoke_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not have this step"):
        load_trained(smoke_run, step=3)
    alone = tmp_path / "a" / "b" / "run"
    shutil.copytree(smoke_run, alone)
    shared = tmp_path / "a" / "_shared" / str(RunRecord.read(smoke_run).shared_step1)
    shared.mkdir(parents=True)
    (alone / "step1.pt").rename(shared / "step1.pt")  # where it was until 0.2
    assert load_trained(alone, step=1).step == 1
    (shared / "step1.pt").unlink()
    with pytest.raises(StoreError, match="no checkpoint of step 1") as err:
        load_trained(alone, step=1)
    assert "_shared" in str(err.value.next_step)
    (alone / "step2.pt").unlink()
    with pytest.raises(StoreError, match="no checkpoint of step 2"):
        load_trained(alone)
    raw = json.loads((alone / "run.json").read_text())
    raw["identity"]["vectors"] = "0" * 64
    (alone / "run.json").write_text(json.dumps(raw))
    shutil.copy(smoke_run / "step2.pt", alone)
    with pytest.raises(StoreError, match="text vectors"):
        load_trained(alone)


def test_inputs_are_found_by_one_rule(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    raw = bytes(packed(body()[0]))
    put(folder, "one_0000", raw, ".NII")
    put(folder / "deep", "one", raw, ".nii.gz")
    put(folder / "deep" / ".hidden", "two", raw)
    (folder / "notes.txt").write_text("no CT")
    assert [c.name for c in find_inputs(folder, out=tmp_path / "o")] == ["deep/one", "one"]
    assert [c.name for c in find_inputs(folder / "one_0000.NII", out=tmp_path)] == ["one"]
    put(folder, "ONE", raw, ".nii.gz")
    with pytest.raises(DataError, match="two inputs would be one case"):
        find_inputs(folder, out=tmp_path / "o")
    with pytest.raises(DataError, match="does not exist"):
        find_inputs(tmp_path / "no", out=tmp_path / "o")
    with pytest.raises(DataError, match="no CT was found"):
        find_inputs(folder / "notes.txt", out=tmp_path / "o")


def test_forms_are_chosen_by_what_overlaps() -> None:
    assert output_form("auto", ("liver", "liver_tumor")).masks
    assert not output_form("auto", ("liver", "spleen")).masks
    assert not output_form("labels", ("liver", "liver_tumor")).masks
    with pytest.raises(SettingError, match="no such form"):
        output_form("dicom", ("liver",))


def test_equal_bits_need_the_threads_of_the_run(
    trained: TrainedModel, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    inner = predict_module.predict_volume

    def seen(*args: object) -> object:
        counts.append(torch.get_num_threads())
        return inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(predict_module, "predict_volume", seen)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    run(trained, scans / "s01", tmp_path / "out")
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
    assert counts == [trained.record.threads]


class Reads:
    """A model whose course reads two sources, the second one stored with an offset."""

    sources = ("btcv", "lits")

    def __init__(self, **data: bool) -> None:
        self.record = SimpleNamespace(with_defaults={"profile": {"data": data}})

    def read_as(self, name: str) -> Any:
        return SimpleNamespace(rescale=Rescale(intercept=-1024) if name == "lits" else None)


def test_an_image_that_is_no_ct_is_noted_unless_the_model_learned_such_values() -> None:
    stored = np.full((20, 20, 20), -1000, np.int16)
    stored[2:18, 2:18, 2:18] = np.random.default_rng(0).integers(-100, 100, (16, 16, 16))
    grid = Grid(shape=stored.shape, affine=np.eye(4))

    def noted(
        add: int, intercept: float = 0.0, rescale: Rescale | None = None, **data: bool
    ) -> list[str]:
        trained: Any = Reads(**data)
        scan = Scan(
            path=Path("a.nii"),
            stored=stored + np.int16(add),
            slope=1.0,
            intercept=intercept,
            rescale=rescale,
            grid=grid,
        )
        return _odd_values(trained, scan)

    assert noted(0) == noted(1024, intercept=-1024.0) == noted(1024, expect_hu=False) == []
    (said,) = noted(2000)
    assert said.startswith("no CT in HU")
    with pytest.raises(DataError, match="stored as a source of the run's course is") as err:
        noted(1024)
    assert "--source lits" in str(err.value.next_step)
    assert noted(1024, rescale=Rescale(intercept=-1024)) == []


def test_the_source_named_makes_hu_of_the_images(
    trained: TrainedModel, scans: Path, tmp_path: Path
) -> None:
    plain = run(trained, scans, tmp_path / "plain")
    (tmp_path / "stored").mkdir()
    source = scans / "a_0000.nii.gz"
    image: Any = nib.load(source)
    values = np.asarray(image.dataobj).astype(np.int16) + np.int16(1024)
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "stored" / "a_0000.nii.gz")
    benchmark = trained.plan.benchmark
    lits = replace(benchmark.reads("lits"), rescale=Rescale(intercept=-1024))
    reads = tuple(lits if s.name == "lits" else s for s in benchmark.sources)
    plan = replace(trained.plan, benchmark=replace(benchmark, sources=reads))
    model = replace(trained, plan=plan)
    refused = run(model, tmp_path / "stored", tmp_path / "refused").refused
    assert "--source lits" in str(refused["a"].next_step)
    cases = find_inputs(tmp_path / "stored", out=tmp_path / "out")
    form = output_form("auto", model.structures)
    predict_cases(model, cases, out=tmp_path / "out", form=form, source="lits")
    bits = [
        json.loads((folder / "predictions.json").read_text())["cases"]["a"]["bits_sha256"]
        for folder in (plain.folder, tmp_path / "out")
    ]
    assert bits[0] == bits[1]
    with pytest.raises(SettingError, match="no such source"):
        predict_cases(model, cases, out=tmp_path / "other", form=form, source="nih")
    with pytest.raises(StoreError, match="another model, step or form"):
        predict_cases(model, cases, out=tmp_path / "out", form=form)
