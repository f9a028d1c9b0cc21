"""Parts of the lost Dice: hand-worked cases, exact sums, and injected failures found again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from clbench.evaluation.explained import main_of, rows_of, summarize
from clbench.evaluation.metrics.lost_dice import (
    CAUSES,
    FALSE,
    MISSED,
    Attribution,
    ErrorCounts,
    attribute,
    border_mm,
    dice_per_voxel,
)
from clbench.evaluation.metrics.overlap import counts_of, dice, pattern_pairs

NAMES = ("spleen", "liver", "stomach", "liver_tumor")
SPLEEN, LIVER, STOMACH, TUMOR = (1 << k for k in range(4))
MM = (1.0, 1.0, 1.0)
Bits = NDArray[np.uint8]


def empty(shape: Sequence[int] = (10, 10, 10)) -> Bits:
    return np.zeros(tuple(shape), dtype=np.uint8)


def cube(label: int = SPLEEN) -> Bits:
    """Six voxels along every side, two from every face of the image."""
    bits = empty()
    bits[2:8, 2:8, 2:8] = label
    return bits


def parts(
    before: Bits, after: Bits, truth: Bits, name: str = "spleen", border: float = 1.0
) -> Attribution:
    return attribute(
        name, (before, NAMES), (after, NAMES), (truth, NAMES), spacing_mm=MM, border=border
    )


# ------------------------------------------------------------------------------ hand-worked cases


def test_nothing_changed_has_no_part() -> None:
    assert parts(cube(), cube(), cube()).voxels == {}


def test_missed_whole() -> None:
    found = parts(cube(), empty(), cube())
    assert found.voxels == {("missed_whole", "background"): 216}
    assert found.dice == (1.0, 0.0)
    assert found.lost_dice() == {("missed_whole", "background"): pytest.approx(1.0)}


def test_called_another_structure_whole() -> None:
    assert parts(cube(), cube(LIVER), cube()).voxels == {("confused", "liver"): 216}


def test_eroded_by_a_voxel() -> None:
    after = empty()
    after[3:7, 3:7, 3:7] = SPLEEN
    # a face is 1 mm from what is left, an edge √2 and a corner √3: all of the layer at √3
    assert parts(cube(), after, cube(), border=1.8).voxels == {("eroded", "background"): 152}
    edges_and_corners = 152 - 6 * 16
    assert parts(cube(), after, cube(), border=1.0).voxels == {
        ("eroded", "background"): 96,
        ("absorbed", "background"): edges_and_corners,
    }


def test_a_border_that_went_to_a_neighbor_names_it() -> None:
    after = cube()
    after[2] = np.where(after[2] == SPLEEN, LIVER, 0)
    assert parts(cube(), after, cube()).voxels == {("eroded", "liver"): 36}


def test_half_a_thin_vessel_is_absorbed_and_not_eroded() -> None:
    truth = empty((20, 5, 5))
    truth[:, 2, 2] = SPLEEN  # one voxel thick: everything is at the border
    after = truth.copy()
    after[8:] = 0
    assert parts(truth, after, truth).voxels == {
        ("eroded", "background"): 1,
        ("absorbed", "background"): 11,
    }


def test_false_voxels_at_the_border_on_a_structure_and_in_background() -> None:
    truth = cube()
    truth[9, 9, 9] = LIVER
    after = cube()
    after[8, 2:8, 2:8] = SPLEEN  # a layer more
    after[9, 9, 9] = after[0, 0, 0] = SPLEEN
    assert parts(cube(), after, truth).voxels == {
        ("grown", "background"): 36,
        ("claimed", "liver"): 1,
        ("false_alarm", "background"): 1,
    }


def test_mended_errors_count_below_zero() -> None:
    before = cube()
    before[2] = 0
    before[9, 9, 9] = SPLEEN
    assert parts(before, cube(), cube()).voxels == {("regained", ""): -36, ("removed", ""): -1}


def test_what_contains_a_structure_is_its_background() -> None:
    truth = cube(LIVER)
    truth[4:6, 4:6, 4:6] |= TUMOR
    lost = cube(LIVER)  # liver is rightly predicted where the tumor was
    assert parts(truth, lost, truth, "liver_tumor").voxels == {("missed_whole", "background"): 8}
    grown = cube(LIVER)
    grown[2:8, 2:8, 2:8] |= TUMOR  # the whole liver is called tumor, and still liver
    assert parts(truth, grown, truth, "liver_tumor").voxels == {
        ("grown", "background"): 24,
        ("false_alarm", "background"): 216 - 8 - 24,
    }


def test_a_structure_called_what_lies_inside_it_is_confused_with_it() -> None:
    truth = cube(LIVER)
    truth[4:6, 4:6, 4:6] |= TUMOR
    after = cube(LIVER)
    after[4:6, 4:6, 4:6] = TUMOR  # and no liver: also where the tumor is true
    assert parts(cube(LIVER), after, truth, "liver", border=0.5).voxels == {
        ("confused", "liver_tumor"): 8
    }


def test_what_is_rightly_there_as_well_took_nothing() -> None:
    truth = cube(SPLEEN | STOMACH)
    after = cube(STOMACH)
    assert parts(truth, after, truth).voxels == {("missed_whole", "background"): 216}


def test_of_several_the_innermost_then_the_last_learned_took_it() -> None:
    assert parts(cube(), cube(LIVER | STOMACH), cube()).voxels == {("confused", "stomach"): 216}
    assert parts(cube(), cube(LIVER | STOMACH | TUMOR), cube()).voxels == {
        ("confused", "liver_tumor"): 216
    }


def test_the_edge_of_the_scan_is_no_border() -> None:
    truth = np.full((4, 4, 4), SPLEEN, dtype=np.uint8)
    after = truth.copy()
    after[0] = 0
    assert parts(truth, after, truth).voxels == {("absorbed", "background"): 16}


def test_distances_are_in_mm() -> None:
    after = cube()
    after[2:4] = 0  # two layers
    # layer 3 touches what is left, but only its rim of 20 is 1 mm from the outside, too
    for across_mm, eroded in ((0.5, 72), (1.0, 20), (2.0, 0)):
        found = attribute(
            "spleen",
            (cube(), NAMES),
            (after, NAMES),
            (cube(), NAMES),
            spacing_mm=(across_mm, 1.0, 1.0),
            border=1.0,
        )
        assert found.voxels.get(("eroded", "background"), 0) == eroded, across_mm


# -------------------------------------------------------------------------------------- exactness


def test_dice_per_voxel_divides_every_difference() -> None:
    numbers = (0, 1, 3, 8)
    for m_a, m_b, f_a, f_b in itertools.product(numbers, repeat=4):
        a = ErrorCounts(missed_vox=m_a, false_vox=f_a)
        b = ErrorCounts(missed_vox=m_b, false_vox=f_b)
        missed, false = dice_per_voxel(8, a, b)
        d_a, d_b = Attribution(truth_vox=8, before=a, after=b, voxels={}).dice
        assert math.isclose(missed * (m_b - m_a) + false * (f_b - f_a), d_a - d_b, abs_tol=1e-12)
        assert missed > 0 or m_a == m_b == 8
        assert false >= 0


@pytest.mark.parametrize("seed", range(8))
def test_parts_add_up_to_the_change_in_wrong_voxels_and_in_dice(seed: int) -> None:
    """On noise, where every part occurs: exact in voxels, and Dice is that of the scores."""
    rng = np.random.default_rng(seed)
    truth, before, after = (
        rng.integers(0, 16, (9, 8, 7), dtype=np.uint8) for _ in range(3)
    )  # any overlap of four structures
    for k, name in enumerate(NAMES):
        found = parts(before, after, truth, name, border=1.5)
        wrong = [np.count_nonzero(((p ^ truth) >> k) & 1) for p in (before, after)]
        assert sum(found.voxels.values()) == wrong[1] - wrong[0]
        for side, kind in ((1, MISSED), (0, FALSE)):
            own = sum(n for (part, _), n in found.voxels.items() if part in kind)
            inside = ((truth >> k) & 1) == side
            change = [np.count_nonzero((((p ^ truth) >> k) & 1)[inside]) for p in (before, after)]
            assert own == change[1] - change[0]
        for predicted, value in zip((before, after), found.dice, strict=True):
            counts = counts_of(pattern_pairs(predicted, truth), {name: (k, k)})[name]
            assert value == dice(counts)
        assert math.isclose(
            math.fsum(found.lost_dice().values()), found.dice[0] - found.dice[1], abs_tol=1e-12
        )


def test_causes_hold_every_part_once() -> None:
    assert sorted(p for own in CAUSES.values() for p in own) == sorted((*MISSED, *FALSE))


def test_the_border_is_never_thinner_than_a_voxel_of_the_model() -> None:
    assert border_mm("aorta", (0.5, 0.5, 0.5)) == pytest.approx(1.0, abs=1e-3)
    assert border_mm("spleen", (0.5, 0.5, 0.5)) == pytest.approx(2.0, abs=1e-3)
    assert border_mm("spleen", (3.0, 4.0, 12.0)) == pytest.approx(13.0, abs=1e-3)


# ------------------------------------------------------------------------------ injected failures

SHAPE = (40, 36, 28)
SPACING = (1.5, 1.5, 2.0)
CENTERS = ((9, 9, 9), (29, 10, 10), (11, 26, 17))
FAILURES = ("missed whole", "background", "border", "confused", "false alarm")


def organs(rng: np.random.Generator) -> Bits:
    """Three ellipsoids, some of which touch."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    bits = empty(SHAPE)
    for k, center in enumerate(CENTERS):
        radius = rng.uniform(5, 8, 3)
        inside = (((grid - center - rng.uniform(-1, 1, 3)) / radius) ** 2).sum(axis=-1) <= 1
        bits[inside & (bits == 0)] = 1 << k
    return bits


def noisy(bits: Bits, rng: np.random.Generator, share: float) -> Bits:
    """Some voxels beside a border take the label of a neighbor."""
    shifted = np.roll(bits, rng.choice((-1, 1)), axis=int(rng.integers(3)))
    return np.where(rng.random(bits.shape) < share, shifted, bits)


def inject(failure: str, bits: Bits, rng: np.random.Generator) -> Bits:
    """A failure of the structure at bit 0."""
    out, own = bits.copy(), bits == SPLEEN
    if failure == "missed whole":
        out[own] = 0
    elif failure == "background":  # a large piece, cut off by a plane
        where = np.argwhere(own)
        direction = rng.normal(size=3)
        along = where @ direction
        lost = where[along > np.quantile(along, rng.uniform(0.3, 0.6))]
        out[tuple(lost.T)] = 0
    elif failure == "border" and rng.random() < 0.5:
        out[own & ~ndimage.binary_erosion(own)] = 0
    elif failure == "border":
        out[ndimage.binary_dilation(own) & (out == 0)] = SPLEEN
    elif failure == "confused":
        other = int(rng.choice((LIVER, STOMACH)))
        out[own] = other
        if rng.random() < 0.5:  # swapped: the other way round as well
            out[bits == other] = SPLEEN
    else:  # as much again, elsewhere in background
        far = ndimage.distance_transform_edt(~own) > 6
        free = np.argwhere(far & (out == 0))
        middle = free[rng.integers(len(free))]
        near = free[((free - middle) ** 2).sum(axis=1) < 64]
        out[tuple(near.T)] = SPLEEN
    return out


def test_injected_failures_are_attributed_to_their_cause() -> None:
    """At least nine of ten, on masks that are imperfect before and after."""
    rng = np.random.default_rng(0)
    right: dict[str, list[bool]] = {failure: [] for failure in FAILURES}
    border = border_mm("spleen", SPACING)
    for _ in range(20):
        truth = organs(rng)
        for failure in FAILURES:
            before = noisy(truth, rng, 0.1)
            after = inject(failure, noisy(before, rng, 0.05), rng)
            found = attribute(
                "spleen",
                (before, NAMES),
                (after, NAMES),
                (truth, NAMES),
                spacing_mm=SPACING,
                border=border,
            )
            rows = rows_of(found, step=2, eval_set="btcv", case="1", name="spleen", learned_at=1)
            (one,) = summarize(rows)
            right[failure].append(main_of(one.causes()) == failure)
    shares = {failure: np.mean(hits) for failure, hits in right.items()}
    assert min(shares.values()) >= 0.9, shares


def test_names_the_case_does_not_annotate_say_nothing() -> None:
    """A false voxel on an organ without annotation is in background, as far as anyone knows."""
    truth, after = cube(), cube()
    truth[9, 9, 9] = LIVER
    after[9, 9, 9] = SPLEEN
    hidden = ("spleen", "", "stomach", "liver_tumor")
    found = attribute(
        "spleen", (cube(), NAMES), (after, NAMES), (truth, hidden), spacing_mm=MM, border=1.0
    )
    assert found.voxels == {("false_alarm", "background"): 1}


def test_arrays_are_not_changed() -> None:
    arrays: list[Any] = [cube(), cube(LIVER), cube()]
    copies = [a.copy() for a in arrays]
    parts(arrays[0], arrays[1], arrays[2])
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
