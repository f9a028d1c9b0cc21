"""Post-processing: the goldens of the authors, scipy as reference, and every rule on its own."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from scipy import ndimage

from clbench.data.postprocess import (
    DEFAULT_RULES,
    LESIONS,
    RULES,
    apply_rules,
    clean,
    clean_bits,
    host_region,
    largest_components,
)
from clbench.errors import UnknownName
from clbench.spec.taxonomy import STRUCTURES

GOLDEN = json.loads((GOLDEN_FILES / "postprocess.json").read_text())
CUBE = np.ones((5, 5, 5), bool)
TOUCH = np.ones((3, 3, 3), int)


def mask_of(indices: list[list[int]], shape: tuple[int, int, int] = (6, 6, 6)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for index in indices:
        mask[tuple(index)] = True
    return mask


def box(shape: tuple[int, int, int], *sides: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in sides)] = True
    return mask


def blobs(seed: int, shape: tuple[int, int, int] = (14, 12, 10)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.5, 1.5)) > rng.uniform(
        0.05, 0.4
    )


# ------------------------------------------------------------------------------------- pieces


def test_golden_of_the_largest_components() -> None:
    golden = GOLDEN["topk_components"]
    mask = mask_of(golden["mask_true_indices"])
    for key, k, above in (("k1", 1, 0), ("k2", 2, 0), ("k3_area_least_1", 3, 1)):
        found = largest_components(mask, k, above_vox=above)
        np.testing.assert_array_equal(found, mask_of(golden[key]), err_msg=key)


def test_a_piece_must_exceed_the_least_size() -> None:
    mask = box((9, 9, 9), (0, 2), (0, 2), (0, 2))  # 8 voxels
    assert largest_components(mask, 1, above_vox=7).sum() == 8
    assert largest_components(mask, 1, above_vox=8).sum() == 0
    assert largest_components(np.zeros((3, 3, 3), bool), 1).sum() == 0


def test_of_equal_pieces_the_first_is_kept() -> None:
    mask = mask_of([[5, 0, 0], [0, 5, 5], [3, 3, 3]])
    assert np.argwhere(largest_components(mask, 1)).tolist() == [[0, 5, 5]]
    assert np.argwhere(largest_components(mask, 2)).tolist() == [[0, 5, 5], [3, 3, 3]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), above=st.integers(0, 12))
def test_components_equal_scipy(seed: int, k: int, above: int) -> None:
    mask = blobs(seed)
    labels, count = ndimage.label(mask, TOUCH)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = sorted(range(count), key=lambda i: (-sizes[i], i))  # scipy numbers in C order
    keep = [i + 1 for i in order[:k] if sizes[i] > above]
    np.testing.assert_array_equal(
        largest_components(mask, k, above_vox=above), np.isin(labels, keep)
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 2))
def test_host_region_equals_scipy_on_the_whole_volume(seed: int, count: int) -> None:
    hosts = [blobs(seed + i, (20, 17, 15)) for i in range(count)]
    kept = largest_components(np.logical_or.reduce(hosts), count)
    closed = ndimage.binary_closing(kept, CUBE)
    np.testing.assert_array_equal(host_region(hosts), ndimage.binary_dilation(closed, CUBE))


# -------------------------------------------------------------------------------------- rules

SHAPE = (40, 24, 24)
LIVER = box(SHAPE, (20, 36), (4, 20), (4, 20))


def only(rule: str, **masks: np.ndarray) -> dict[str, np.ndarray]:
    given_masks = {k: v.copy() for k, v in masks.items()}
    apply_rules(given_masks, [rule])
    for name in masks:
        assert given_masks[name].shape == SHAPE
    return given_masks


def test_every_voxel_count_is_the_authors() -> None:
    assert LESIONS == {
        "kidney_tumor": (5, 80),
        "liver_tumor": (20, 20),
        "pancreas_tumor": (1, 100),
        "hepatic_vessel_tumor": (10, 80),
        "lung_tumor": (10, 30),
        "colon_tumor": (3, 100),
        "kidney_cyst": (20, 20),
    }


def test_lesions_keep_to_their_organs() -> None:
    inside = box(SHAPE, (24, 27), (8, 11), (8, 11))
    rim = box(SHAPE, (18, 20), (8, 11), (8, 11))  # within the margin of 2 voxels
    outside = box(SHAPE, (14, 18), (8, 11), (8, 11))
    crumb = box(SHAPE, (2, 4), (2, 4), (2, 4))  # a second piece of liver opens no region
    found = only(
        "lesions_in_hosts", liver=LIVER | crumb, liver_tumor=inside | rim | outside | crumb
    )
    np.testing.assert_array_equal(found["liver_tumor"], inside | rim)
    np.testing.assert_array_equal(found["liver"], LIVER | crumb)


def test_a_kidney_tumor_may_lie_in_either_kidney() -> None:
    right, left = (
        box(SHAPE, (28, 38), (4, 14), (4, 14)),
        box(SHAPE, (2, 12), (4, 14), (4, 14)),
    )
    far = box(SHAPE, (18, 21), (6, 9), (6, 9))
    found = only("lesions_in_hosts", right_kidney=right, left_kidney=left,
                 kidney_tumor=right | left | far)  # fmt: skip
    assert not (found["kidney_tumor"] & far).any()
    assert (found["kidney_tumor"] & right).sum() == right.sum()
    assert (found["kidney_tumor"] & left).sum() == left.sum()
    alone = only("lesions_in_hosts", right_kidney=right, kidney_tumor=right | left)
    np.testing.assert_array_equal(alone["kidney_tumor"], right | left)  # a host is not predicted


def test_an_empty_organ_holds_no_lesion() -> None:
    found = only("lesions_in_hosts", liver=np.zeros(SHAPE, bool), liver_tumor=LIVER)
    assert not found["liver_tumor"].any()


@pytest.mark.parametrize("lesion", LESIONS)
def test_lesions_lose_small_and_surplus_pieces(lesion: str) -> None:
    k, least = LESIONS[lesion]
    shape = (2 * (k + 2), 1, least + 3)
    mask = np.zeros(shape, bool)
    for i in range(k + 1):
        mask[2 * i, 0, : least + (2 if i else 1)] = True  # the first is the smallest
    mask[2 * (k + 1), 0, :least] = True  # not above the least size
    masks = {lesion: mask}
    apply_rules(masks, ["largest_lesions"])
    assert masks[lesion].sum() == k * (least + 2)
    assert not masks[lesion][0].any()


def test_organs_in_one_piece_lose_crumbs_and_others_do_not() -> None:
    crumb = box(SHAPE, (0, 2), (0, 2), (0, 2))
    masks = dict.fromkeys(STRUCTURES, LIVER | crumb)
    apply_rules(masks, ["largest_component"])
    for name, mask in masks.items():
        kept = LIVER if STRUCTURES[name].single_component else LIVER | crumb
        np.testing.assert_array_equal(mask, kept, err_msg=name)
    assert STRUCTURES["pancreas"].single_component
    assert not STRUCTURES["portal_and_splenic_vein"].single_component
    assert not STRUCTURES["left_lung"].single_component


def test_veins_end_at_the_lowest_slice_of_the_pancreas() -> None:
    pancreas = box(SHAPE, (4, 12), (4, 12), (9, 14))
    vein = box(SHAPE, (5, 7), (5, 7), (2, 20))
    found = only("veins_above_pancreas", pancreas=pancreas, portal_and_splenic_vein=vein)
    np.testing.assert_array_equal(
        found["portal_and_splenic_vein"], box(SHAPE, (5, 7), (5, 7), (9, 20))
    )
    empty = only(
        "veins_above_pancreas", pancreas=np.zeros(SHAPE, bool), portal_and_splenic_vein=vein
    )
    np.testing.assert_array_equal(empty["portal_and_splenic_vein"], vein)


def test_veins_see_the_clean_pancreas() -> None:
    pancreas = box(SHAPE, (4, 12), (4, 12), (9, 14)) | box(SHAPE, (0, 1), (0, 1), (0, 1))
    masks = {
        "portal_and_splenic_vein": box(SHAPE, (5, 7), (5, 7), (2, 20)),
        "pancreas": pancreas,
    }
    apply_rules(masks)
    assert np.nonzero(masks["portal_and_splenic_vein"])[2].min() == 9


def test_the_sides_of_a_prediction_follow_the_midline_and_lose_nothing() -> None:
    assert "left_right" not in DEFAULT_RULES
    low, high = box(SHAPE, (2, 8), (2, 8), (2, 8)), box(SHAPE, (30, 36), (2, 8), (2, 8))
    crumb, nothing = box(SHAPE, (12, 13), (3, 4), (3, 4)), np.zeros(SHAPE, bool)

    def sides(left: np.ndarray, right: np.ndarray, plane: float | None) -> list[np.ndarray]:
        masks = {"left_kidney": left, "right_kidney": right}
        apply_rules(masks, ["left_right"], plane=plane)
        return [masks["left_kidney"], masks["right_kidney"]]

    for got, expected in (
        (sides(high | crumb, low, 19.5), (low | crumb, high)),  # all on the wrong side
        (sides(nothing, low, 19.5), (low, nothing)),  # one kidney, called by the wrong name
        (sides(low, nothing, 19.5), (low, nothing)),
        (sides(nothing, nothing, 19.5), (nothing, nothing)),
        (sides(high, low, None), (high, low)),  # the image does not show the midline
    ):
        np.testing.assert_array_equal(got, expected)


def test_the_image_of_a_case_says_where_its_midline_lies() -> None:
    image = np.full((40, 30, 20), -1000, np.int16)
    image[8:36, 4:26] = 30  # the body's middle is index 21.5
    low = box((40, 30, 20), (10, 19), (8, 14), (4, 9))
    high = box((40, 30, 20), (24, 30), (8, 14), (4, 9))
    volume: Any = SimpleNamespace(image=image, affine=np.diag([3.0, 3.0, 3.0, 1.0]))
    masks = torch.from_numpy(np.stack([high | low, np.zeros_like(low)]))
    names = ("left_kidney", "right_kidney")
    np.testing.assert_array_equal(clean(masks, names, ["left_right"], volume), [low, high])
    np.testing.assert_array_equal(clean(masks, names, ["left_right"]), masks)


def test_rules_by_name() -> None:
    assert set(DEFAULT_RULES) < set(RULES)
    with pytest.raises(UnknownName, match="largest_componet") as err:
        apply_rules({}, ["largest_componet"])
    assert err.value.next_step == "did you mean 'largest_component'?"
    mask = LIVER | box(SHAPE, (0, 2), (0, 2), (0, 2))
    masks = {"liver": mask}
    apply_rules(masks, [])
    np.testing.assert_array_equal(masks["liver"], mask)


def test_bits_and_masks_are_cleaned_alike_and_the_input_stays() -> None:
    names = ("spleen", "liver", "left_lung", "pancreas", "portal_and_splenic_vein", "aorta",
             "stomach", "right_kidney", "left_kidney", "liver_tumor", "kidney_tumor")  # fmt: skip
    masks = np.stack([blobs(i, (18, 16, 14)) for i in range(len(names))])
    bits = np.zeros(masks.shape[1:], np.uint16)
    for k, mask in enumerate(masks):
        bits |= mask.astype(np.uint16) << np.uint16(k)
    bits.flags.writeable = False
    before = torch.from_numpy(masks.copy())
    found = clean(before, names)
    np.testing.assert_array_equal(before.numpy(), masks)
    cleaned = clean_bits(bits, names)
    assert cleaned.dtype == bits.dtype
    assert (cleaned != bits).any()
    for k in range(len(names)):
        np.testing.assert_array_equal((cleaned >> np.uint16(k)) & np.uint16(1), found[k].numpy())
    expected = dict(zip(names, masks.copy(), strict=True))
    apply_rules(expected)
    for k, name in enumerate(names):
        np.testing.assert_array_equal(found[k].numpy(), expected[name])
