"""Predictions on the scan's grid: written slab by slab, read back by nibabel and by clbench score."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import CODES, LITS, body, packed, put

from clbench.data import external_masks
from clbench.deployment import masks
from clbench.deployment.masks import (
    Tally,
    dataset_json,
    label_map,
    nested,
    on_scan_grid,
    paint_order,
    write_nifti,
)
from clbench.deployment.scan import prepare, read_nifti
from clbench.evaluation.scoring import to_native
from clbench.spec.benchmark import Preprocessing

ORGANS = ("liver_tumor", "spleen", "liver")


@pytest.mark.parametrize("codes", CODES)
def test_masks_lie_on_the_scan(codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SLAB_VOX", 100)  # several slabs per file
    image, _ = body()
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) @ nib.orientations.inv_ornt_aff(turn, image.shape)
    path = put(
        tmp_path, "ct", bytes(packed(nib.orientations.apply_orientation(image, turn), affine))
    )
    scan = read_nifti(path)
    volume = prepare(scan, case="ct", source=LITS, pre=Preprocessing())
    bits = np.random.default_rng(3).integers(0, 8, volume.image.shape).astype(np.uint8)
    target = tmp_path / "out.nii.gz"
    write_nifti(target, on_scan_grid(volume, scan.grid).slabs(bits), scan.grid)
    again = nib.load(target)
    assert again.shape == scan.grid.shape
    np.testing.assert_allclose(again.affine, affine)
    ras = to_native(bits, volume.native_axes())
    np.testing.assert_array_equal(nib.as_closest_canonical(again).get_fdata(), ras, err_msg=codes)
    first = target.read_bytes()
    write_nifti(target, on_scan_grid(volume, scan.grid).slabs(bits), scan.grid)
    assert target.read_bytes() == first


def test_a_scale_is_what_a_stored_one_stands_for(tmp_path: Path) -> None:
    path = put(tmp_path, "ct", bytes(packed(body()[0])))
    grid = read_nifti(path).grid
    slab = np.full(grid.shape, 127, dtype=np.uint8)
    write_nifti(tmp_path / "p.nii.gz", iter([slab]), grid, scale=1 / 254)
    np.testing.assert_allclose(nib.load(tmp_path / "p.nii.gz").get_fdata(), 0.5, atol=1e-7)


def test_a_label_map_shows_the_inner_structure_and_counts_what_it_cannot_show() -> None:
    assert nested(ORGANS)
    assert not nested(("liver", "spleen"))
    assert paint_order(ORGANS) == ["spleen", "liver", "liver_tumor"]
    #       nothing, tumor in liver, tumor alone, spleen, liver, spleen and liver
    bits = np.array([0, 0b101, 0b001, 0b010, 0b100, 0b110], dtype=np.uint8).reshape(1, 2, 3)
    labels, relabelled_vox = label_map(bits, ORGANS)
    assert labels.ravel().tolist() == [0, 1, 1, 2, 3, 3]
    assert relabelled_vox == 2  # the tumor outside the liver, the spleen inside it
    tally = Tally(ORGANS)
    tally.label(bits)
    tally.label(bits)
    assert tally.voxels == {"liver_tumor": 4, "spleen": 4, "liver": 6}
    assert tally.relabelled_vox == 4


def test_dataset_json_says_what_a_value_means(tmp_path: Path) -> None:
    content = dataset_json(ORGANS, 3)
    assert list(content["labels"].items()) == [
        ("background", 0), ("spleen", 2), ("liver", [1, 3]), ("liver_tumor", 1),
    ]  # fmt: skip
    assert content["regions_class_order"] == [2, 3, 1]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(content))
    meaning = external_masks.label_map(file)
    assert {v: set(n) for v, n in meaning.structures.items()} == {
        0: set(), 1: {"liver_tumor", "liver"}, 2: {"spleen"}, 3: {"liver"},
    }  # fmt: skip
