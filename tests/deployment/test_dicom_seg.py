"""Segmentation objects lie on the slices they were made from, as another library reads them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

highdicom = pytest.importorskip("highdicom", reason='pip install "clbench[dicom]"')
pydicom = pytest.importorskip("pydicom", reason='pip install "clbench[dicom]"')
from dicom_series import changed, series, write  # noqa: E402
from nifti_files import body, packed, put  # noqa: E402

from clbench.deployment import predict as predict_module  # noqa: E402
from clbench.deployment.dicom_seg import segment_description, snomed  # noqa: E402
from clbench.deployment.inputs import find_inputs  # noqa: E402
from clbench.deployment.predict import Batch, output_form, predict_cases  # noqa: E402
from clbench.errors import SettingError  # noqa: E402
from clbench.spec import registry  # noqa: E402
from clbench.spec.benchmark import Preprocessing  # noqa: E402
from clbench.spec.taxonomy import STRUCTURES  # noqa: E402

ORGANS = ("liver", "liver_tumor", "spleen", "left_kidney")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that draws overlapping blocks wherever it looks, and never a spleen."""

    def drawn(trained: Any, volume: Any, probabilities: Any = None) -> Any:
        bits = np.random.default_rng(2).integers(0, 4, volume.image.shape).astype(np.uint8)
        bits[:2] |= 8  # a kidney over the other two
        return bits

    monkeypatch.setattr(predict_module, "predict_volume", drawn)
    identity = SimpleNamespace(bench="tumor_ext")
    record = SimpleNamespace(
        run_id="0", identity=identity, strategy="universal", seed=0, threads=1, with_defaults={}
    )
    return SimpleNamespace(
        record=record,
        structures=ORGANS,
        step=2,
        digest="0",
        postprocess=False,
        preprocessing=Preprocessing(),
        source=registry.benchmark("tumor_ext").source("lits"),
    )


def predicted(trained: Any, folder: Path, out: Path, **more: bool) -> Batch:
    form = output_form("masks", ORGANS, dicom_seg=True, **more)
    return predict_cases(trained, find_inputs(folder, out=out), out=out, form=form)


def test_objects_hold_the_voxels_of_the_nifti_masks_at_their_places(
    trained: Any, tmp_path: Path
) -> None:
    folder, out = write(tmp_path / "ct", series()), tmp_path / "out"
    assert predicted(trained, folder, out).predicted == ["ct"]
    paths = sorted((out / "ct_dicom_seg").iterdir())
    assert [p.stem for p in paths] == ["left_kidney", "liver", "liver_tumor"]  # no spleen
    slices = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.iterdir())}
    order = sorted(slices, key=lambda uid: slices[uid].ImagePositionPatient[2])
    for path in paths:
        made = highdicom.seg.segread(path)
        nifti = nib.load(out / "ct" / f"{path.stem}.nii.gz")
        mask = np.asarray(nifti.dataobj) == 1
        assert mask.any()
        assert made.number_of_segments == 1
        # by the slices that frames refer to: (slices, rows, columns) are the file's axes turned
        pixels = made.get_pixels_by_source_instance(order, assert_missing_frames_are_empty=True)
        np.testing.assert_array_equal(pixels[..., 0].transpose(2, 1, 0), mask)
        # by the positions that frames state themselves, without the slices: mm, LPS
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine
        expected = np.argwhere(mask) @ lps[:3, :3].T + lps[:3, 3]
        shared = made.SharedFunctionalGroupsSequence[0]
        measures = shared.PixelMeasuresSequence[0]
        along, down = np.array(
            shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float
        ).reshape(2, 3)
        rows_mm, columns_mm = map(float, measures.PixelSpacing)
        found = []
        plain = pydicom.dcmread(path)
        frames = plain.pixel_array.reshape(-1, plain.Rows, plain.Columns)
        for frame, groups in zip(frames, plain.PerFrameFunctionalGroupsSequence, strict=True):
            corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            rows, columns = np.nonzero(frame)
            found.append(
                corner + columns[:, None] * columns_mm * along + rows[:, None] * rows_mm * down
            )
        got = np.concatenate(found)
        assert len(got) == len(expected)
        np.testing.assert_allclose(
            sorted(map(tuple, got.round(4))), sorted(map(tuple, expected.round(4))), atol=1e-3
        )


def test_objects_belong_to_the_patient_and_name_the_slices(trained: Any, tmp_path: Path) -> None:
    source = series()
    out = tmp_path / "out"
    predicted(trained, write(tmp_path / "ct", source), out)
    made = [pydicom.dcmread(p) for p in sorted((out / "ct_dicom_seg").iterdir())]
    for item in made:
        assert item.Modality == "SEG"
        assert (item.PatientID, item.StudyInstanceUID) == ("p1", source[0].StudyInstanceUID)
        assert item.FrameOfReferenceUID == source[0].FrameOfReferenceUID
        (referenced,) = item.ReferencedSeriesSequence
        assert referenced.SeriesInstanceUID == source[0].SeriesInstanceUID
        uids = {i.ReferencedSOPInstanceUID for i in referenced.ReferencedInstanceSequence}
        assert uids == {d.SOPInstanceUID for d in source}
    assert len({item.SeriesInstanceUID for item in made}) == 1
    assert len({item.SOPInstanceUID for item in made}) == len(made)
    assert made[0].SeriesInstanceUID != source[0].SeriesInstanceUID


def test_a_batch_with_objects_goes_on_where_it_was(trained: Any, tmp_path: Path) -> None:
    folder, out = write(tmp_path / "in" / "ct", series()).parent, tmp_path / "out"
    put(folder, "plain", bytes(packed(body()[0])), ".nii.gz")
    first = predicted(trained, folder, out)
    assert first.predicted == ["ct", "plain"]
    assert first.notes == ["case plain: no DICOM series, hence no segmentation object"]
    assert predicted(trained, folder, out).predicted == []
    record = json.loads((out / "predictions.json").read_text())
    assert "ct_dicom_seg/liver.dcm" in record["cases"]["ct"]["files"]
    (out / "ct_dicom_seg" / "liver.dcm").rename(out / "ct_dicom_seg" / "spleen.dcm")
    assert predicted(trained, folder, out).predicted == ["ct"]
    objects = sorted(p.name for p in (out / "ct_dicom_seg").iterdir())
    assert objects == ["left_kidney.dcm", "liver.dcm", "liver_tumor.dcm"]
    assert not (out / "plain_dicom_seg").exists()


def test_slices_without_a_study_are_refused_and_absent_names_are_left_empty(
    trained: Any, tmp_path: Path
) -> None:
    def anonymous(data: Any) -> None:
        for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "PatientName"):
            delattr(data, name)

    folder = write(tmp_path / "a", changed(series(), None, anonymous))
    assert predicted(trained, folder, tmp_path / "out").predicted == ["a"]
    made = pydicom.dcmread(tmp_path / "out" / "a_dicom_seg" / "liver.dcm")
    assert str(made.PatientName) == ""

    def astray(data: Any) -> None:
        del data.FrameOfReferenceUID

    folder = write(tmp_path / "b", changed(series(), 2, astray))
    batch = predicted(trained, folder, tmp_path / "out2")
    assert batch.predicted == []
    assert "FrameOfReferenceUID" in str(batch.refused["b"])
    assert {p.name for p in (tmp_path / "out2").iterdir()} <= {"predictions.json", ".lock"}


def test_values_that_dicom_does_not_allow_are_left_empty_and_said(
    trained: Any, tmp_path: Path
) -> None:
    """Not refused after the prediction, as the library that writes would."""

    def odd(data: Any) -> None:
        data.PatientSex, data.PatientBirthDate = "U", "19500000"
        data.StudyDate, data.StudyTime = "20240229", "250000"
        data.AccessionNumber = "7"

    with pytest.warns(UserWarning, match="Invalid value"):
        slices = changed(series(), None, odd)
    folder = write(tmp_path / "a", slices)
    batch = predicted(trained, folder, tmp_path / "out")
    assert batch.predicted == ["a"]
    (note,) = batch.notes
    assert "PatientBirthDate, PatientSex, StudyTime" in note
    assert "1950" not in note  # it would tell who the patient is
    made = pydicom.dcmread(tmp_path / "out" / "a_dicom_seg" / "liver.dcm")
    assert [made.PatientSex, made.PatientBirthDate, made.StudyTime] == ["", "", ""]
    assert (made.StudyDate, made.AccessionNumber) == ("20240229", "7")

    def usual(data: Any) -> None:
        data.PatientSex, data.PatientBirthDate = "F", "19500101"

    folder = write(tmp_path / "b", changed(series(), None, usual))
    assert predicted(trained, folder, tmp_path / "out2").notes == []
    made = pydicom.dcmread(tmp_path / "out2" / "b_dicom_seg" / "liver.dcm")
    assert (made.PatientSex, made.PatientBirthDate) == ("F", "19500101")


def test_without_the_library_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(SettingError, match="not installed") as err:
        output_form("masks", ORGANS, dicom_seg=True)
    assert "clbench[dicom]" in str(err.value)


def test_structures_have_codes() -> None:
    liver = segment_description("liver")
    assert liver.segmented_property_category.meaning == "Anatomical Structure"
    assert (
        liver.segmented_property_type.value,
        liver.segmented_property_type.scheme_designator,
    ) == (
        "10200004",
        "SCT",
    )
    kidney = segment_description("left_kidney").SegmentedPropertyTypeCodeSequence[0]
    assert kidney.CodeMeaning == "Kidney"
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    tumor = segment_description("liver_tumor")
    assert tumor.segmented_property_type.meaning == "Neoplasm"
    assert tumor.AnatomicRegionSequence[0].CodeValue == "10200004"
    for name, code in (
        ("kidney_tumor", "64033007"),
        ("kidney_cyst", "64033007"),
        ("lung_tumor", "39607008"),
    ):
        assert segment_description(name).AnatomicRegionSequence[0].CodeValue == code, name
    private = segment_description("portal_and_splenic_vein").SegmentedPropertyTypeCodeSequence[0]
    assert private.CodingSchemeDesignator == "99CLBENCH"
    assert private.LongCodeValue == "portal_and_splenic_vein"
    for name in STRUCTURES:
        assert segment_description(name).segment_label == STRUCTURES[name].prompt
    assert sum(snomed(name)[0] is not None for name in STRUCTURES) > len(STRUCTURES) / 2
