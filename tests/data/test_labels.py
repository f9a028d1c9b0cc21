"""Labels on the grid of their image: turned where that is exact, and advice that leads right."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from nifti_files import CODES, LITS

from clbench.data.external_masks import read_prediction_files, source_map
from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
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
