"""A scan prepared a few planes at a time equals the whole case prepared at once, and takes little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import CODES, LITS, body, packed, put

from clbench.data.labels import read_case
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import Grid
from clbench.data.volume import preprocess
from clbench.deployment import scan as scan_module
from clbench.deployment.scan import Scan, prepare, read_nifti
from clbench.errors import DataError
from clbench.spec.benchmark import Preprocessing


def _whole(image: Path, label: Path, pre: Preprocessing):
    files = CaseFiles(case="1", image=image, label=label)
    return preprocess(read_case(files, LITS), LITS, pre)


@given(
    codes=st.sampled_from(CODES),
    spacing_mm=st.tuples(*[st.sampled_from((0.7, 1.0, 1.5, 3.0))] * 3),
    slab_vox=st.sampled_from((1, 100, 300, 1 << 23)),
    slope=st.sampled_from((1.0, 0.5, 2.0)),
)
def test_a_scan_is_prepared_as_the_whole_case_is(
    tmp_path_factory: pytest.TempPathFactory,
    codes: str,
    spacing_mm: tuple[float, float, float],
    slab_vox: int,
    slope: float,
) -> None:
    folder = tmp_path_factory.mktemp("scan")
    image, label = body()
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) @ nib.orientations.inv_ornt_aff(turn, image.shape)
    image, label = (nib.orientations.apply_orientation(a, turn) for a in (image, label))
    raw = bytearray(packed(image, affine))
    raw[112:116] = np.float32(slope).tobytes()  # scl_slope
    paths = put(folder, "image", bytes(raw)), put(folder, "label", bytes(packed(label, affine)))
    pre = Preprocessing(spacing_mm=spacing_mm)
    expected = _whole(*paths, pre)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "SLAB_VOX", slab_vox)
        got = prepare(read_nifti(paths[0]), case="1", source=LITS, pre=pre)
    assert got.image.dtype == expected.image.dtype
    np.testing.assert_array_equal(got.image, expected.image)
    np.testing.assert_array_equal(got.affine, expected.affine)
    np.testing.assert_array_equal(got.native_affine, expected.native_affine)
    assert (got.start, got.native_shape) == (expected.start, expected.native_shape)
    assert not got.annotated


def _zeros(shape: tuple[int, int, int], stored: np.ndarray | None = None) -> Scan:
    voxels = np.zeros(shape, dtype=np.int16, order="F") if stored is None else stored
    return Scan(
        path=Path("ct.nii"), stored=voxels, slope=1.0, intercept=-24.0,
        grid=Grid(shape=shape, affine=np.diag([0.7, 0.7, 0.7, 1.0])),
    )  # fmt: skip


def test_memory_grows_by_the_model_grid_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the stored voxels: the model's grid twice (before and after the crop), and one slab."""
    slab_vox = 1 << 16
    monkeypatch.setattr(scan_module, "SLAB_VOX", slab_vox)
    extra = []
    for slices in (64, 256):
        made = _zeros((128, 128, slices))
        tracemalloc.start()
        volume = prepare(made, case="1", source=LITS, pre=Preprocessing())
        extra.append((tracemalloc.get_traced_memory()[1], volume.image.nbytes))
        tracemalloc.stop()
    (small, small_grid), (large, large_grid) = extra
    # the mask of tissue is one slab; the intercept makes float64 of a slab, then float32
    assert large - small < 2.1 * (large_grid - small_grid)
    assert small < 2 * small_grid + 40 * slab_vox


@pytest.mark.parametrize(
    ("voxels", "what"),
    [
        (np.full((4, 4, 4), np.nan, dtype=np.float32), "NaN or infinite"),
        (np.full((4, 4, 4), 3e6, dtype=np.float32), "no HU"),
        (np.full((4, 4, 4), -900, dtype=np.int16), "no voxel above -175 HU"),
    ],
)
def test_what_holds_no_body_is_refused(voxels: np.ndarray, what: str) -> None:
    with pytest.raises(DataError, match=what) as err:
        prepare(_zeros((4, 4, 4), voxels), case="1", source=LITS, pre=Preprocessing())
    assert str(err.value.where) == "ct.nii"
