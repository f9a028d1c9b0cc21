"""Labels on the grid of their image: turned where that is exact, and advice that leads right."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from nifti_files import CODES, LITS

from clbench.data.external_masks import read_prediction_files, same_meaning, source_map
from clbench.data.labels import label_values, read_bits, read_case, read_mask
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import grid
from clbench.errors import DataError


def place(turn: float = 0.0) -> np.ndarray:
    affine = np.diag([2.0, 2.5, 4.0, 1.0])
    c, s = np.cos(turn), np.sin(turn)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = [-31.0, 17.0, 250.0]
    return affine


def scan(turn: float = 0.0) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A CT and a label without any symmetry."""
    hu = np.full((16, 14, 12), -1000, dtype=np.int16)
    hu[2:13, 3:12, 1:10] = np.random.default_rng(2).integers(-100, 200, (11, 9, 9))
    label = np.zeros(hu.shape, dtype=np.uint8)
    label[4:9, 5:11, 2:8] = 1
    label[5:7, 6:8, 3:5] = 2
    return nib.Nifti1Image(hu, place(turn)), nib.Nifti1Image(label, place(turn))


def turned(file: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    return file.as_reoriented(ornt_transform(io_orientation(file.affine), axcodes2ornt(codes)))


def put(folder: Path, image: nib.Nifti1Image, label: nib.Nifti1Image) -> CaseFiles:
    nib.save(image, folder / "i.nii")
    nib.save(label, folder / "l.nii")
    return CaseFiles(case="0", image=folder / "i.nii", label=folder / "l.nii")


@settings(max_examples=40, deadline=None)
@given(
    of_image=st.sampled_from(CODES), of_label=st.sampled_from(CODES),
    turn=st.sampled_from([0.0, 0.3, np.pi / 4, -np.pi / 4, 0.9]),
)  # fmt: skip
def test_a_label_in_any_axis_order_at_the_same_place_is_read_exactly(
    of_image: str, of_label: str, turn: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("axes")
    image, label = scan(turn)
    image = turned(image, of_image)
    expected = read_case(put(folder, image, turned(label, of_image)), LITS)
    files = put(folder, image, turned(label, of_label))
    got = read_case(files, LITS)
    np.testing.assert_array_equal(got.bits, expected.bits)
    as_prediction = read_prediction_files(
        folder / "l.nii", files.image, LITS.structures, source_map(LITS)
    )
    np.testing.assert_array_equal(as_prediction, expected.bits)


def _coarser(label: nib.Nifti1Image) -> nib.Nifti1Image:
    """Every voxel twice along each axis: its nearest neighbors are the label itself."""
    fine = label.affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] -= label.affine[:3, :3] @ [0.25, 0.25, 0.25]
    return nib.Nifti1Image(np.kron(label.dataobj, np.ones((2, 2, 2), np.uint8)), fine)


def _cropped(label: nib.Nifti1Image) -> nib.Nifti1Image:
    return label.slicer[2:12, 1:, :11]


def _same_size_elsewhere(label: nib.Nifti1Image) -> nib.Nifti1Image:
    """Two slices less below, two more above; the shape is that of the image."""
    moved = label.affine.copy()
    moved[:3, 3] += 2 * moved[:3, 2]
    padded = np.pad(np.asarray(label.dataobj)[:, :, 2:], ((0, 0), (0, 0), (0, 2)))
    return nib.Nifti1Image(padded, moved)


def _elsewhere_and_flipped(label: nib.Nifti1Image) -> nib.Nifti1Image:
    return turned(_same_size_elsewhere(label), "LPS")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize(
    "change", [_coarser, _cropped, _same_size_elsewhere, _elsewhere_and_flipped]
)
def test_the_advice_about_another_grid_leads_to_the_right_label(
    change: object, codes: str, tmp_path: Path
) -> None:
    image, label = scan()
    image = turned(image, codes)
    expected = read_case(put(tmp_path, image, label), LITS)
    other = change(label)  # type: ignore[operator]
    files = put(tmp_path, image, other)
    with pytest.raises(DataError, match="different") as err:
        read_case(files, LITS)
    with pytest.raises(DataError, match="prediction and image") as of_prediction:
        read_prediction_files(tmp_path / "l.nii", files.image, LITS.structures, source_map(LITS))
    for error in (err.value, of_prediction.value):
        assert "resample_from_to" in str(error.next_step)
        assert "copy" not in str(error)
    followed = put(tmp_path, image, resample_from_to(other, image, order=0))
    np.testing.assert_array_equal(read_case(followed, LITS).bits, expected.bits)


def test_a_label_that_lost_its_header_is_not_to_be_copied_onto_its_image(tmp_path: Path) -> None:
    image, label = scan()
    for lost in (np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])):
        files = put(tmp_path, image, nib.Nifti1Image(np.asarray(label.dataobj), lost))
        with pytest.raises(DataError, match="different places") as err:
            read_case(files, LITS)
        assert "the label's header has lost its place" in str(err.value.next_step)
        assert "export it again" in str(err.value.next_step)
    files = put(tmp_path, nib.Nifti1Image(np.asarray(image.dataobj), np.eye(4)), label)
    with pytest.raises(DataError, match="the image's header has lost its place"):
        read_case(files, LITS)


# ------------------------------------------------------------------------------------- values


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32]),
    highest=st.integers(1, 117), seed=st.integers(0, 999),
)  # fmt: skip
def test_labels_that_a_writer_scaled_into_whole_numbers_are_read_exactly(
    kind: type, highest: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Real numbers under an integer header: nibabel spreads them over the range of the type."""
    label = np.random.default_rng(seed).integers(0, highest + 1, (9, 8, 7))
    label[0, 0, 0], label[1, 1, 1] = 0, highest
    header = nib.Nifti1Header()
    header.set_data_dtype(kind)
    path = tmp_path_factory.mktemp("scaled") / "l.nii"
    nib.save(nib.Nifti1Image(label.astype(np.float64), place(), header), path)
    np.testing.assert_array_equal(label_values(path), label)


def test_values_off_by_rounding_are_whole_and_fractions_are_not(tmp_path: Path) -> None:
    label = np.asarray(scan()[1].dataobj).astype(np.float32)
    path = tmp_path / "l.nii"
    nib.save(nib.Nifti1Image(label * np.float32(1.0000001), place()), path)
    np.testing.assert_array_equal(label_values(path), label)
    for wrong, says in ((label * 0.7, "nearest neighbor"), (label + 0.01, "nearest neighbor")):
        nib.save(nib.Nifti1Image(wrong.astype(np.float32), place()), path)
        with pytest.raises(DataError, match=says):
            label_values(path)


@pytest.mark.parametrize("slope", [0.5, 0.8, 0.99, 1.2])
def test_a_scale_that_makes_fractions_of_stored_labels_is_refused_by_its_name(
    slope: float, tmp_path: Path
) -> None:
    file = scan()[1]
    file.header.set_slope_inter(slope, 0)
    raw = bytearray(file.to_bytes())
    raw[112:120] = np.array([slope, 0], "<f4").tobytes()
    path = tmp_path / "l.nii"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="not whole numbers") as err:
        label_values(path)
    assert f"scl_slope of {slope:g}" in str(err.value.got)
    assert "without a scale" in str(err.value.next_step)


def test_a_mask_holds_one_value(tmp_path: Path) -> None:
    image, label = scan()
    mask = np.asarray(label.dataobj) != 0
    for value in (1, 255):
        put(tmp_path, image, nib.Nifti1Image((mask * value).astype(np.uint8), place()))
        np.testing.assert_array_equal(read_mask(tmp_path / "l.nii", grid(tmp_path / "i.nii")), mask)
    put(tmp_path, image, label)
    with pytest.raises(DataError, match="several values"):
        read_mask(tmp_path / "l.nii", grid(tmp_path / "i.nii"))


def test_a_signed_byte_that_overflowed_is_said(tmp_path: Path) -> None:
    array = np.full((4, 4, 4), 130).astype(np.uint8).view(np.int8)
    nib.save(nib.Nifti1Image(array, place()), tmp_path / "l.nii")
    with pytest.raises(DataError, match="negative") as err:
        label_values(tmp_path / "l.nii")
    assert "signed bytes" in str(err.value.next_step)


def test_a_list_beside_the_data_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    same_meaning(tmp_path, LITS)  # no list
    for labels, fits in (
        ({"background": 0, "liver": 1, "liver_tumor": 2}, True),
        ({"0": "background", "1": "liver", "2": "cancer"}, True),  # a name that no structure has
        ({"background": 0, "spleen": 1, "liver": 2}, False),
        ({"0": "background", "1": "liver_tumor", "2": "liver"}, False),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        if fits:
            same_meaning(tmp_path, LITS)
            continue
        with pytest.raises(DataError, match="mean something else"):
            same_meaning((tmp_path / "dataset.json").rename(tmp_path / "fold0.json"), LITS)
        (tmp_path / "fold0.json").rename(tmp_path / "dataset.json")
        with pytest.raises(DataError, match="mean something else") as err:
            same_meaning(tmp_path, LITS)
        assert "2 liver_tumor" in str(err.value.expected)
        assert "2 liver" in str(err.value.got)


@pytest.mark.parametrize("at_a_time", [7, 1 << 18])
def test_every_voxel_is_counted(
    at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.data.labels._COUNTED", at_a_time)
    label = np.random.default_rng(0).integers(0, 3, (5, 6, 7), dtype=np.uint8)
    for name, array in (("image", np.full(label.shape, 40, np.int16)), ("label", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
    files = CaseFiles(case="0", image=tmp_path / "image.nii", label=tmp_path / "label.nii")
    _, counts = read_bits(files, LITS, grid(files.image))
    assert counts == {value: int((label == value).sum()) for value in range(3)}
