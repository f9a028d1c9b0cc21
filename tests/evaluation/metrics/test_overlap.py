"""Overlap: hand-worked cases, MONAI as reference, exactness for any overlap of structures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from monai.metrics import DiceMetric

from clbench.errors import SettingError
from clbench.evaluation.metrics import overlap as overlap_module
from clbench.evaluation.metrics.overlap import (
    Counts,
    counts_of,
    dice,
    dice_paper,
    pattern_pairs,
)
from clbench.types import bits_dtype

GOLDEN = json.loads((GOLDEN_FILES / "postprocess.json").read_text())
EDGES = {  # prediction, truth → status, exact Dice, the paper's Dice
    "both_empty": ([0, 0, 0, 0], [0, 0, 0, 0], "both_empty", math.nan, math.nan),
    "fp_only": ([1, 1, 0, 0], [0, 0, 0, 0], "fp_only", math.nan, math.nan),
    "fn_only": ([0, 0, 0, 0], [1, 1, 0, 0], "fn_only", 0.0, 0.0),
    "disjoint": ([1, 1, 0, 0], [0, 0, 1, 1], "ok", 0.0, 0.0),
    "half": ([1, 0, 1, 0], [1, 1, 0, 0], "ok", 0.5, 0.4),
    "perfect_2": ([1, 1, 0, 0], [1, 1, 0, 0], "ok", 1.0, 0.8),
    "perfect_1": ([1, 0, 0, 0], [1, 0, 0, 0], "ok", 1.0, 2 / 3),
}


def counts(pred: object, truth: object) -> Counts:
    pairs = pattern_pairs(np.asarray(pred, np.uint8), np.asarray(truth, np.uint8))
    return counts_of(pairs, {"liver": (0, 0)})["liver"]


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == b


@pytest.mark.parametrize("name", EDGES)
def test_cases_worked_by_hand(name: str) -> None:
    pred, truth, status, exact, paper = EDGES[name]
    found = counts(pred, truth)
    assert found.status == status
    assert same(dice(found), exact)
    assert same(dice_paper(found), paper)


def test_golden_of_the_authors_metric() -> None:
    golden = GOLDEN["metric_dice_score"]
    found = counts(np.array(golden["pred"]) > 0.5, np.array(golden["gt"]) > 0.5)
    assert dice_paper(found) == pytest.approx(golden["dice"], rel=1e-12)
    assert found.both_vox / found.gt_vox == golden["recall"]
    assert found.both_vox / found.pred_vox == golden["precision"]
    perfect = Counts(both_vox=2, pred_vox=2, gt_vox=2)
    assert dice_paper(perfect) == pytest.approx(golden["perfect_2_voxels"])


def test_exact_dice_equals_monai() -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        pred = rng.random((6, 7, 8)) < density
        truth = rng.random((6, 7, 8)) < 0.1
        metric = DiceMetric(include_background=True, reduction="none", ignore_empty=True)
        metric(
            torch.from_numpy(pred)[None, None].float(), torch.from_numpy(truth)[None, None].float()
        )
        assert dice(counts(pred, truth)) == pytest.approx(float(metric.aggregate()), abs=1e-7)
    for pred_value in (0.0, 1.0):  # an empty truth is missing in both, whatever the prediction
        metric = DiceMetric(include_background=True, reduction="none", ignore_empty=True)
        pred, truth = torch.full((1, 1, 2, 2, 2), pred_value), torch.zeros((1, 1, 2, 2, 2))
        metric(pred, truth)
        assert math.isnan(float(metric.aggregate()))
        assert math.isnan(dice(counts(pred.numpy() > 0, truth.numpy() > 0)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    p_count=st.sampled_from([1, 3, 8, 9, 16, 17, 33, 64]),
    t_count=st.sampled_from([1, 8, 12, 40, 64]),
    slab=st.sampled_from([1, 30, 1 << 24]),
    smooth=st.booleans(),
)
def test_one_pass_equals_mask_by_mask(
    seed: int, p_count: int, t_count: int, slab: int, smooth: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (4, 5, 6)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        masks = rng.random((count, *shape)) < rng.random()
        if smooth:
            masks[..., 1::2] = masks[..., ::2]
        bits = np.zeros(shape, bits_dtype(count))
        for k, mask in enumerate(masks):
            bits |= mask.astype(bits.dtype) << bits.dtype.type(k)
        return masks, bits

    p_masks, p_bits = draw(p_count)
    t_masks, t_bits = draw(t_count)
    wanted = {f"{i} {j}": (i, j) for i in range(p_count) for j in range(t_count)}
    before = overlap_module._SLAB_VOX
    overlap_module._SLAB_VOX = slab
    try:
        pairs = pattern_pairs(p_bits, t_bits)
    finally:
        overlap_module._SLAB_VOX = before
    assert int(pairs[2].sum()) == p_bits.size
    counted = counts_of(pairs, wanted)
    assert list(counted) == list(wanted)
    for name, (i, j) in wanted.items():
        assert counted[name].both_vox == np.count_nonzero(p_masks[i] & t_masks[j])
        assert counted[name].pred_vox == np.count_nonzero(p_masks[i])
        assert counted[name].gt_vox == np.count_nonzero(t_masks[j])


def test_every_pair_stands_once_and_views_work() -> None:
    rng = np.random.default_rng(1)
    p = rng.integers(0, 4, (9, 9, 9), dtype=np.uint8)[::-1, :, ::2]  # not contiguous
    t = rng.integers(0, 4, (9, 9, 9), dtype=np.uint16)[:, ::-1, ::2]
    a, b, n = pattern_pairs(p, t)
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(a)
    for i, j, count in zip(a, b, n, strict=True):
        assert count == np.count_nonzero((p == i) & (t == j))


def test_shapes_and_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        pattern_pairs(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    assert [bits_dtype(n).itemsize for n in (1, 8, 9, 16, 17, 32, 33, 64)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
        8,
    ]
    with pytest.raises(SettingError, match="at most 64"):
        bits_dtype(65)
