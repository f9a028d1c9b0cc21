"""The midline of a body, and which side a piece of a paired organ lies on."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.data.anatomy.midline import midline, split_left_right, unclear_sides

MM = (4.0, 4.0, 5.0)
WIDTH, DEPTH = 80, 56
MIDDLE = 39.5
"""Of the body within its whole field of view."""


def body(seed: int = 0, *, table: bool = True) -> np.ndarray:
    """(80, 56, 16) HU: an elliptic body of 280 x 180 mm with lungs, spine and organs, on a table."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.indices((WIDTH, DEPTH, 16))
    x = x - MIDDLE
    hu = np.full(x.shape, -1000.0)
    hu[(x / 35) ** 2 + ((y - 30) / 22) ** 2 < 1] = 40
    hu[((abs(x) - 17) / 11) ** 2 + ((y - 32) / 13) ** 2 < 1] = -800  # lungs
    hu[(x / 6) ** 2 + ((y - 17) / 6) ** 2 < 1] = 300  # spine
    hu[((x - 15) / 9) ** 2 + ((y - 38) / 7) ** 2 < 1] = 110  # an organ on one side only
    if table:
        hu[5:60, 4:6] = -100  # touches no skin, and is not centered
    return hu + rng.normal(0, 15, hu.shape)


def organ(center: tuple[int, int, int], radius: int = 4) -> np.ndarray:
    place = np.indices((WIDTH, DEPTH, 16)) - np.reshape(center, (3, 1, 1, 1))
    return np.asarray((place**2).sum(axis=0) <= radius**2)


LEFT, RIGHT = organ((22, 24, 8)), organ((57, 24, 8), 5)


@settings(max_examples=20, deadline=None)
@given(
    start=st.integers(0, 16), stop=st.integers(64, WIDTH), front=st.integers(0, 10),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_field_of_view_that_leaves_a_good_part_of_both_sides_shows_the_same_midline(
    start: int, stop: int, front: int, seed: int
) -> None:
    plane = midline(body(seed)[start:stop, front:], MM)
    assert plane is not None
    assert plane + start == pytest.approx(MIDDLE, abs=1.5)


@settings(max_examples=20, deadline=None)
@given(left=st.integers(0, 60), right=st.integers(0, 60), seed=st.integers(0, 99))
def test_air_around_an_off_center_body_moves_nothing(left: int, right: int, seed: int) -> None:
    wide = np.pad(body(seed), ((left, right), (0, 0), (0, 0)), constant_values=-1024)
    plane = midline(wide, MM)
    assert plane is not None
    assert plane - left == pytest.approx(MIDDLE, abs=1.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), fine=st.integers(1, 3))
def test_a_mirrored_body_has_the_mirrored_midline_at_any_spacing(seed: int, fine: int) -> None:
    hu = body(seed).repeat(fine, axis=0)
    mm = (MM[0] / fine, *MM[1:])
    one, other = midline(hu, mm), midline(hu[::-1], mm)
    assert one is not None
    assert other is not None
    assert one + other == pytest.approx(len(hu) - 1, abs=2 * fine)


def test_an_image_that_shows_no_midline_gives_none() -> None:
    rng = np.random.default_rng(0)
    for hu in (
        rng.normal(40, 20, (40, 30, 10)),  # inside an organ
        np.zeros((40, 30, 10)),
        np.full((40, 30, 10), -1000),
        body()[45:],  # the right side alone
        body()[:30],
    ):
        plane = midline(hu, MM)
        assert plane is None
        assert "does not show" in str(unclear_sides(LEFT, plane, 3.0))


def test_the_midline_of_a_real_ct_is_found_in_most_crops_and_never_far_off(real_ct: Path) -> None:
    ct = nib.as_closest_canonical(nib.load(real_ct / "case_A" / "ct.nii.gz"))
    hu, mm = np.asanyarray(ct.dataobj), ct.header.get_zooms()
    whole = midline(hu, mm)
    assert whole is not None
    assert whole == pytest.approx(58.5, abs=2)  # the spine's middle
    seen = 0
    for start in (0, 15, 30):
        for stop in (90, 105, 122):
            for slices in (slice(None), slice(60, None), slice(40)):
                plane = midline(hu[start:stop, :, slices], mm)
                seen += plane is not None
                assert plane is None or abs(plane + start - whole) <= 4  # 12 mm
    assert seen >= 18  # two thirds; none is given where it is not plain


# ------------------------------------------------------------------------------------ sides


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), crumbs=st.integers(0, 6), cut=st.integers(-1, 3),
    resected=st.sampled_from([None, "left", "right"]), flip=st.booleans(),
)  # fmt: skip
def test_each_piece_goes_to_its_own_side_and_no_voxel_is_lost(
    seed: int, crumbs: int, cut: int, resected: str | None, flip: bool
) -> None:
    """Stray voxels, kidneys in two pieces, kidneys that were taken out, and all of it mirrored."""
    rng = np.random.default_rng(seed)
    mask = LEFT * (resected != "left") | RIGHT * (resected != "right")
    if cut >= 0:
        mask[:, :, 6 + cut] = False
    for _ in range(crumbs):
        mask[rng.integers(0, WIDTH), rng.integers(40, DEPTH), rng.integers(0, 16)] = True
    plane = MIDDLE
    if flip:
        mask = mask[::-1]
    left, right = split_left_right(mask, plane)
    np.testing.assert_array_equal(left | right, mask)
    index = np.arange(WIDTH)[:, None, None]
    np.testing.assert_array_equal(left, mask & (index < plane))
    np.testing.assert_array_equal(right, mask & (index > plane))


def test_what_the_midline_cannot_decide_is_said() -> None:
    both = LEFT | RIGHT
    assert unclear_sides(both, MIDDLE, 3.0) is None
    assert unclear_sides(LEFT, MIDDLE, 3.0) is None  # the other was taken out
    assert unclear_sides(np.zeros_like(LEFT), MIDDLE, 3.0) is None
    crumb = np.zeros_like(LEFT)
    crumb[39:41, 50, 3] = True
    assert unclear_sides(both | crumb, MIDDLE, 3.0) is None  # too small to matter
    horseshoe = both.copy()
    horseshoe[22:58, 22:27, 6:10] = True
    assert "across the midline" in str(unclear_sides(horseshoe, MIDDLE, 3.0))
    assert "all on the patient's left" in str(unclear_sides(both, 70.0, 3.0))
    isthmus = both.copy()
    isthmus[22:44, 24:26, 7:10] = True  # less than a tenth of it on the other side
    assert "further than 10 mm" in str(unclear_sides(isthmus, MIDDLE, 5.0))
    crumbs = organ((15, 20, 4), 3) | organ((15, 20, 12), 3)
    crumbs[60:63, 40:42, 3] = True
    assert "all on the patient's left" in str(unclear_sides(crumbs, MIDDLE, 3.0))
    broken = RIGHT.copy()
    broken[:, :, 8] = False
    assert "all on the patient's right" in str(unclear_sides(broken, MIDDLE, 3.0))
    assert unclear_sides(broken | LEFT, MIDDLE, 3.0) is None
