"""Labels and bodies the wrong way round are noted; right ones, real and made, are not."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from clbench.data.anatomy.position import anatomy_notes
from clbench.data.catalog import build_catalog
from clbench.data.checks.case_notes import notes_of
from clbench.data.labels import RawCase, read_case
from clbench.data.nifti import spacing_of
from clbench.spec import registry
from clbench.spec.settings import PhantomSettings, load_profile
from clbench.spec.taxonomy import STRUCTURES

Case = tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]
"""HU, bits, structures, spacing in mm."""
SIDES = {0: "left and right are exchanged", 1: "front and back", 2: "top and bottom"}


def phantoms(cache_root: Path, spacing_mm: float, test: int) -> list[RawCase]:
    bench = registry.benchmark("body_ext")
    catalog = build_catalog(
        bench,
        load_profile("smoke").preprocessing(bench.preprocessing),
        data=None,
        cache_root=cache_root,
        phantom=PhantomSettings(train=2, validation=0, test=test, spacing_mm=spacing_mm),
    )
    return [
        read_case(catalog.files[catalog.source(i).name][case], catalog.source(i))
        for i, split in enumerate(catalog.splits, 1)
        for case in split.cases
    ]


@pytest.fixture(scope="module")
def phantom(cache_root: Path) -> Case:
    raw = phantoms(cache_root, 5.0, 1)[0]
    names = registry.benchmark("body_ext").reads("jhh").structures
    return raw.image, raw.bits, names, spacing_of(raw.affine)


@pytest.fixture(scope="module")
def real(real_ct: Path) -> dict[str, Case]:
    listed = json.loads((real_ct / "label_ids.json").read_text())
    cases = {}
    for letter in "AC":
        folder = real_ct / f"case_{letter}"
        image, label = (
            nib.as_closest_canonical(nib.load(folder / f"{n}.nii.gz")) for n in ("ct", "label")
        )
        values = np.asanyarray(label.dataobj)
        names = tuple(n for v, n in listed.items() if n in STRUCTURES and (values == int(v)).any())
        bits = np.zeros(values.shape, np.uint32)
        for k, name in enumerate(names):
            value = next(int(v) for v, n in listed.items() if n == name)
            bits |= (values == value).astype(np.uint32) << np.uint32(k)
        spacing = np.array(image.header.get_zooms(), dtype=np.float64)
        cases[letter] = (np.asanyarray(image.dataobj), bits, names, spacing)
    return cases


@pytest.fixture(params=["phantom", "real"])
def body(request: pytest.FixtureRequest) -> Case:
    value = request.getfixturevalue(request.param)
    case: Case = value["A"] if request.param == "real" else value
    return case


def only(case: Case, *kept: str) -> Case:
    hu, bits, names, mm = case
    mask = sum(1 << names.index(name) for name in kept)
    return hu, bits & bits.dtype.type(mask), names, mm


def exchanged(case: Case, one: str, other: str) -> Case:
    """The labels of two structures, each on the other's organ."""
    hu, bits, names, mm = case
    order = list(names)
    a, b = names.index(one), names.index(other)
    order[a], order[b] = other, one
    return hu, bits, tuple(order), mm


@pytest.mark.parametrize("spacing_mm", [5.0, 10.0])
def test_phantoms_give_no_note(spacing_mm: float, cache_root: Path) -> None:
    source = registry.benchmark("body_ext").reads("jhh")
    cases = phantoms(cache_root, spacing_mm, 1)
    assert len(cases) == 9
    for raw in cases:
        assert [n for n in notes_of(raw, source) if n[0] == "anatomy"] == []


def test_real_cts_give_no_note_whole_or_cropped(real: dict[str, Case]) -> None:
    for hu, bits, names, mm in real.values():
        assert anatomy_notes(hu, bits, names, mm) == []
        for cut in (np.s_[20:], np.s_[:, 10:80], np.s_[:, :, 40:], np.s_[:95, 5:, 20:100]):
            assert anatomy_notes(hu[cut], bits[cut], names, mm) == []
        assert anatomy_notes(hu, np.zeros((0, 0, 0), np.uint8), (), mm) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_masks_mirrored_against_their_image_are_seen(axis: int, body: Case) -> None:
    hu, bits, names, mm = body
    notes = anatomy_notes(hu, np.flip(bits, axis), names, mm)
    assert SIDES[axis] in notes[0]
    assert "the masks are mirrored against their image" in notes[0]
    assert any("is fat, lung or air by its HU" in note for note in notes)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_body_is_seen_and_its_masks_are_not_blamed(axis: int, body: Case) -> None:
    hu, bits, names, mm = body
    notes = anatomy_notes(np.flip(hu, axis), np.flip(bits, axis), names, mm)
    assert SIDES[axis] in notes[0]
    assert "the body is mirrored" in notes[0]
    assert not any("does not lie on the organ" in note for note in notes)
    if axis == 1:  # the image alone says so
        (note,) = anatomy_notes(np.flip(hu, axis), np.zeros((0, 0, 0), np.uint8), (), mm)
        assert "front and back of the body are exchanged" in note


def test_a_body_turned_upside_down_is_seen_by_its_lungs(phantom: Case) -> None:
    hu, _, _, mm = phantom
    chest = hu.copy()
    top = chest[:, :, -8:]
    in_plane = ndimage.generate_binary_structure(2, 1)[:, :, None]
    walled = ndimage.binary_erosion(
        ndimage.binary_fill_holes(top > -300, in_plane), in_plane, iterations=5
    )
    x = np.arange(len(top))[:, None, None]
    top[walled & (np.abs(x - len(top) / 2) > 6)] = -800
    none = np.zeros((0, 0, 0), np.uint8)
    assert anatomy_notes(chest, none, (), mm) == []
    (note,) = anatomy_notes(np.flip(chest, 2), none, (), mm)
    assert "top and bottom are exchanged" in note


def test_one_mirrored_organ_is_seen(body: Case) -> None:
    for name in ("liver", "spleen"):
        hu, bits, names, mm = only(body, name)
        assert anatomy_notes(hu, bits, names, mm) == []
        notes = anatomy_notes(hu, np.flip(bits, 0), names, mm)
        assert f"on the wrong side of the body's midline: {name}" in notes[0]
    hu, bits, names, mm = only(body, "liver")
    assert "% of liver is fat, lung or air" in anatomy_notes(hu, np.flip(bits, 0), names, mm)[1]


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("left_kidney", "right_kidney", "on the wrong side of the body's midline"),
        ("liver", "spleen", "on the wrong side of the body's midline"),
        ("liver", "gall_bladder", "gall_bladder takes"),
        ("liver", "pancreas", "pancreas takes"),
    ],
)
def test_a_label_on_the_wrong_organ_is_seen(one: str, other: str, says: str, body: Case) -> None:
    hu, bits, names, mm = exchanged(body, one, other)
    assert any(says in note for note in anatomy_notes(hu, bits, names, mm))
