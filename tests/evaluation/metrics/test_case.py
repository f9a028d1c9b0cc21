"""Surface, volume and detection: four implementations' golden numbers, MONAI, brute force, by hand."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray
from scipy import ndimage

from clbench.errors import SettingError
from clbench.evaluation.metrics import (
    case,
    detection,
    overlap,
)
from clbench.evaluation.metrics import (
    surface as surface,
)
from clbench.evaluation.metrics.case import (
    measure,
    metrics_of,
    parse_metrics,
    row_names,
    word_of,
)
from clbench.spec.taxonomy import STRUCTURES, structure

GOLDEN = json.loads((GOLDEN_FILES / "segmentation.json").read_text())
CASES = GOLDEN["segmentation_metrics"]["cases"]
SHAPE = tuple(GOLDEN["segmentation_metrics"]["shape"])
SPACING = GOLDEN["segmentation_metrics"]["spacing_mm"]
FILLED = [name for name, case in CASES.items() if case["input"]["gt"] and case["input"]["pred"]]
WORDS = parse_metrics("dice,nsd_1mm,nsd_2mm,hd95_mm,volume_error_ml,lesion,patient,patient_50vox")


def boxes(ranges: list[list[int]]) -> NDArray[np.uint8]:
    mask = np.zeros(SHAPE, np.uint8)
    for x0, x1, y0, y1, z0, z1 in ranges:
        mask[x0:x1, y0:y1, z0:z1] = 1
    return mask


def one(
    pred: NDArray[Any], truth: NDArray[Any], spacing: Any = SPACING, words: Any = WORDS
) -> case.CaseScores:
    return measure(
        lambda a, b: pred[a:b], truth, spacing, {"liver_tumor": (0, 0)}, words
    )["liver_tumor"]  # fmt: skip


def golden(name: str) -> case.CaseScores:
    case = CASES[name]["input"]
    return one(boxes(case["pred"]), boxes(case["gt"]))


@pytest.mark.parametrize("name", FILLED)
def test_equal_to_scipy_monai_and_metrics_reloaded_on_the_golden_masks(name: str) -> None:
    values, case = golden(name).values, CASES[name]
    for tool, keys in {
        "scipy_reference": ("dice", "hd95_max_of_directed", "nsd_1mm", "nsd_2mm"),
        "monai": ("dice_ignore_empty_True", "hd95", "nsd_1mm_voxel", "nsd_2mm_voxel"),
        "metrics_reloaded": ("dsc", "hd95", "nsd_1mm", "nsd_2mm"),
    }.items():
        wanted = [case[tool][key] for key in keys]
        found = [values[k] for k in ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm")]
        assert found == pytest.approx(wanted, abs=1e-5), tool


def test_where_the_four_implementations_differ_ours_is_the_stated_one() -> None:
    thick = golden("shift_z1").values["nsd_1mm"]
    assert thick == pytest.approx(0.642857142857)
    assert abs(thick - CASES["shift_z1"]["deepmind_surface_distance"]["nsd_1mm"]) > 0.15
    blob = golden("far_fp_blob").values["hd95_mm"]
    assert blob == pytest.approx(8.002499609)  # pooled percentiles say 0, weighted ones 7.63
    assert CASES["far_fp_blob"]["scipy_reference"]["hd95_pooled"] == 0.0


def test_the_three_empty_cases() -> None:
    scores = ("dice", "nsd_1mm", "nsd_2mm", "hd95_mm", "volume_error_ml", "lesion_sensitivity",
              "lesion_f1")  # fmt: skip
    both = golden("both_empty")
    assert both.counts.status == "both_empty"
    assert all(math.isnan(both.values[k]) for k in scores)
    assert [both.values[k] for k in ("lesion_pred", "patient_positive")] == [0, 0]

    alarm = golden("gt_empty_pred_not")
    assert alarm.counts.status == "fp_only"
    assert all(math.isnan(alarm.values[k]) for k in scores)
    found = ("lesion_truth", "lesion_pred", "lesion_false", "patient_positive")
    assert [alarm.values[k] for k in found] == [0, 1, 1, 1]

    missed = golden("pred_empty_gt_not")
    assert missed.counts.status == "fn_only"
    diagonal = math.sqrt((16 * 0.8) ** 2 + (16 * 0.8) ** 2 + (10 * 2.5) ** 2)
    assert missed.values["hd95_mm"] == pytest.approx(diagonal)  # MONAI: nan, dropped from means
    assert [missed.values[k] for k in scores[:3] + scores[5:]] == [0, 0, 0, 0, 0]
    assert missed.values["volume_error_ml"] == pytest.approx(-8 * 0.8 * 0.8 * 2.5 / 1000)
    assert [missed.values[k] for k in ("lesion_truth", "patient_positive")] == [1, 0]


def test_lesions_by_hand() -> None:
    values = golden("two_lesions_one_found").values
    wanted = {"truth": 2, "found": 1, "pred": 2, "false": 1, "sensitivity": 0.5, "f1": 0.5}
    assert {k: values[f"lesion_{k}"] for k in wanted} == wanted
    assert values["patient_positive"] == 1
    assert values["patient_positive_50vox"] == 0  # its largest lesion has 18 voxels
    truth, pred = np.zeros((1, 5, 9), bool), np.zeros((1, 5, 9), bool)
    truth[0, 0, 0] = truth[0, 1, 1] = True  # touch at a corner: one lesion
    truth[0, 0, 4] = truth[0, 0, 8] = True
    pred[0, 0, 4:9] = True  # one prediction across two lesions finds both
    pred[0, 4, 0] = True
    found = detection.lesions(pred, truth)
    assert (found.truth, found.found, found.pred, found.false) == (3, 2, 2, 1)
    assert found.ppv == 0.5
    assert found.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert found.largest_pred_vox == 5


def test_volume_error_keeps_its_sign() -> None:
    counts = overlap.Counts(both_vox=10, pred_vox=30, gt_vox=10)
    assert overlap.volume_error_ml(counts, 50.0) == pytest.approx(1.0)
    counts = overlap.Counts(both_vox=5, pred_vox=5, gt_vox=10)
    assert overlap.volume_error_ml(counts, 50.0) == pytest.approx(-0.25)


def blobs(seed: int, shape: tuple[int, int, int], count: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    out = np.zeros(shape, np.uint16)
    for k in range(count):
        smooth = ndimage.gaussian_filter(rng.random(shape), rng.uniform(0.3, 2.0))
        out |= (smooth > np.quantile(smooth, rng.uniform(0.5, 1.0))).astype(np.uint16) << np.uint16(
            k
        )
    return out


def brute_distances(p: NDArray[Any], t: NDArray[Any], spacing: Any) -> Any:
    """What scipy's erosion and distance map say."""
    edges = []
    for mask in (p, t):
        padded = np.pad(mask, 1)
        edges.append((padded ^ ndimage.binary_erosion(padded))[1:-1, 1:-1, 1:-1])
    maps = [ndimage.distance_transform_edt(~e, sampling=spacing) for e in edges]
    return np.sort(maps[1][edges[0]]), np.sort(maps[0][edges[1]])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    spacing=st.tuples(*[st.sampled_from([0.5, 0.7, 0.8, 1.0, 2.5])] * 3),
    slab=st.sampled_from([1, 40, 1 << 24]),
)
def test_all_at_once_equals_scipy_mask_by_mask(
    seed: int, shape: tuple[int, int, int], spacing: Any, slab: int
) -> None:
    pred, truth = blobs(seed, shape, 3), blobs(seed + 1, shape, 3)
    before = surface._SLAB_VOX
    surface._SLAB_VOX = slab
    try:
        a, b = (surface.surfaces(lambda i, j, v=v: v[i:j], shape) for v in (pred, truth))
    finally:
        surface._SLAB_VOX = before
    for k, m in itertools.product(range(3), range(3)):
        p, t = (pred >> k & 1).astype(bool), (truth >> m & 1).astype(bool)
        if not (p.any() and t.any()):
            continue
        found = surface.distances(a.of(k), b.of(m), shape, spacing)
        to_truth, to_pred = brute_distances(p, t, spacing)
        np.testing.assert_allclose(np.sort(found.pred_mm), to_truth, rtol=1e-12)
        np.testing.assert_allclose(np.sort(found.truth_mm), to_pred, rtol=1e-12)


def test_equal_to_monai_on_irregular_masks() -> None:
    spacing, count = (0.8, 0.8, 2.5), 6
    pred, truth = blobs(5, (18, 17, 12), count), blobs(6, (18, 17, 12), count)
    p, t = (
        torch.from_numpy(np.stack([(v >> k & 1) for k in range(count)])[None].astype(np.float32))
        for v in (pred, truth)
    )
    nsd = compute_surface_dice(p, t, [2.0] * count, include_background=True, spacing=spacing)[0]
    far = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing)[
        0
    ]
    names = list(STRUCTURES)[:count]
    found = measure(
        lambda a, b: pred[a:b], truth, spacing, {n: (k, k) for k, n in enumerate(names)},
        ("nsd_2mm", "hd95_mm"),
    )  # fmt: skip
    ours = [(found[n].values["nsd_2mm"], found[n].values["hd95_mm"]) for n in names]
    np.testing.assert_allclose(ours, np.stack([nsd, far], axis=1), atol=1e-5)


def test_a_tolerance_of_whole_voxels_survives_rounded_spacings() -> None:
    truth, pred = np.zeros((12, 3, 3), np.uint8), np.zeros((12, 3, 3), np.uint8)
    truth[1, 1, 1] = pred[6, 1, 1] = 1  # 5 voxels of 0.4 mm: exactly 2 mm
    for spacing in ((0.4, 1, 1), (float(np.float32(0.4)), 1, 1)):
        assert one(pred, truth, spacing).values["nsd_2mm"] == 1.0
    assert one(pred, truth, (0.41, 1, 1)).values["nsd_2mm"] == 0.0


def test_the_prediction_is_read_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, truth = blobs(1, (11, 6, 7), 1), blobs(2, (11, 6, 7), 1)
    whole = one(pred, truth)
    for module in (surface, overlap):
        monkeypatch.setattr(module, "_SLAB_VOX", 50)
    assert one(pred, truth) == whole


def test_words_and_the_rows_they_make() -> None:
    assert parse_metrics("nsd, hd95_mm,nsd") == ("nsd", "hd95_mm")
    assert parse_metrics("nsd_sweep") == ("nsd_1mm", "nsd_2mm", "nsd_3mm")
    assert parse_metrics("nsd_2.0mm,patient_20vox") == ("nsd_2mm", "patient_20vox")
    assert row_names("nsd", "spleen") == ("nsd_2mm",)
    assert row_names("nsd", "aorta") == row_names("nsd", "left_adrenal_gland") == ("nsd_1mm",)
    assert row_names("lesion", "spleen") == row_names("patient_20vox", "spleen") == ()
    assert row_names("patient_20vox", "liver_tumor") == ("patient_positive_20vox",)
    assert {s.name for s in STRUCTURES.values() if s.tolerance_mm == 1.0} >= {
        "postcava", "celiac_trunk", "right_adrenal_gland", "pancreatic_duct"}  # fmt: skip
    assert structure("liver_tumor").tolerance_mm == 2.0
    with pytest.raises(SettingError, match="no metric called 'hd59_mm'") as err:
        parse_metrics("hd59_mm")
    assert "did you mean 'hd95_mm'" in str(err.value)
    for text in ("", "nsd_0mm"):
        with pytest.raises(SettingError):
            parse_metrics(text)
    with pytest.raises(ValueError, match="empty surface"):
        surface.distances(np.zeros(0, np.int64), np.zeros(1, np.int64), (2, 2, 2), (1, 1, 1))
    assert case.implementations(("nsd_2mm", "patient", "dice"))["nsd"]["version"] == 1


def test_the_declared_direction_and_unit_are_those_of_the_values() -> None:
    """No prediction scores better than the truth itself, by the direction each metric declares."""
    rng = np.random.default_rng(7)
    words = ("dice", "nsd_1mm", "hd95_mm", "volume_error_ml", "lesion", "patient")
    metrics = {m.name: m for word in words for m in case.metrics_of(word, "liver_tumor")}
    assert {m.higher_is_better for m in metrics.values()} == {True, False, None}
    for _ in range(20):
        truth, pred = ((rng.random((6, 7, 8)) < 0.1).astype(np.uint8) for _ in range(2))
        best, value = one(truth, truth, words=words).values, one(pred, truth, words=words).values
        for name, metric in metrics.items():
            if metric.higher_is_better is not None:
                sign = 1 if metric.higher_is_better else -1
                assert sign * value[name] <= sign * best[name], name
            if metric.unit == "share":
                assert 0 <= value[name] <= 1, name
            if metric.unit == "yes or no":
                assert value[name] in (0, 1)
            if metric.unit == "lesions":
                assert value[name] == int(value[name])
    for name, metric in case.METRICS.items():
        assert (metric.unit in ("mm", "ml")) == name.endswith(f"_{metric.unit}"), name


def test_an_unknown_metric_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(SettingError, match="no metric called 'hd96_mm'") as err:
        one(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 2), np.uint8), words=("hd96_mm",))
    assert "did you mean 'hd95_mm'?" in str(err.value)


def test_every_recorded_metric_leads_back_to_the_word_that_makes_it() -> None:
    words = ("nsd_2mm", "hd95_mm", "volume_error_ml", "lesion", "patient", "patient_50vox")
    for word in words:
        for metric in metrics_of(word, "liver_tumor"):
            assert word_of(metric.name) == word
    with pytest.raises(SettingError):
        word_of("nsd_mm")
