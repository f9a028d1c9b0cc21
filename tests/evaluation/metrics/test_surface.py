"""Average surface distances: golden numbers, MONAI's on irregular masks, and empty masks by rule."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from locations import GOLDEN_FILES
from monai.metrics import SurfaceDistanceMetric
from numpy.typing import NDArray

from clbench.errors import SettingError
from clbench.evaluation.metrics.case import DEFAULT, measure, parse_metrics, row_names
from clbench.evaluation.metrics.surface import (
    Distances,
    asd_bsp,
    assd,
    distances,
    surfaces,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
FILLED = ("asd_shifted_cubes", "asd_unequal_cubes", "asd_at_border", "asd_identical")


def masks(case: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    both = []
    for which in ("pred", "truth"):
        mask = np.zeros(case["shape"], np.uint8)
        mask[tuple(np.array(case[f"{which}_true_indices"]).T)] = 1
        both.append(mask)
    return both[0], both[1]


def between(case: dict[str, Any]) -> Distances:
    shape: Any = tuple(case["shape"])
    edges = [surfaces(lambda a, b, m=m: m[a:b], shape).of(0) for m in masks(case)]  # type: ignore[misc]
    assert [len(e) for e in edges] == [case["surface_voxels_pred"], case["surface_voxels_truth"]]
    return distances(edges[0], edges[1], shape, case["spacing_mm"])


@pytest.mark.parametrize("name", FILLED)
def test_assd_is_the_pooled_mean_of_the_golden_masks(name: str) -> None:
    case = GOLDEN[name]
    apart = between(case)
    assert apart.pred_mm.mean() == pytest.approx(case["asd_pred_to_truth_mm"], rel=1e-6)
    assert apart.truth_mm.mean() == pytest.approx(case["asd_truth_to_pred_mm"], rel=1e-6)
    assert assd(apart) == pytest.approx(case["assd_pooled_mm"], rel=1e-6)


def test_the_mean_of_both_directions_is_another_number() -> None:
    case = GOLDEN["asd_unequal_cubes"]
    assert abs(case["assd_mean_of_directed_mm"] - assd(between(case))) > 1


@pytest.mark.parametrize("name", FILLED)
def test_asd_bsp_is_theirs_in_voxels(name: str) -> None:
    case = GOLDEN[name]
    pred, truth = masks(case)
    found = asd_bsp(pred.astype(bool), truth.astype(bool))
    assert found == pytest.approx(case["bsp_asd_voxel_units"], rel=1e-6)


def test_assd_equals_monai_on_irregular_masks() -> None:
    rng = np.random.default_rng(3)
    pred, truth = (rng.random((12, 11, 9)) < share for share in (0.1, 0.3))
    spacing = (0.8, 0.8, 2.5)
    theirs = SurfaceDistanceMetric(include_background=True, symmetric=True)(
        *(torch.from_numpy(m[None, None].astype(np.float32)) for m in (pred, truth)),
        spacing=spacing,
    )
    found = measure(
        lambda a, b: pred[a:b].astype(np.uint8), truth.astype(np.uint8), spacing,
        {"liver": (0, 0)}, ("assd_mm",),
    )  # fmt: skip
    assert found["liver"].values["assd_mm"] == pytest.approx(float(theirs[0, 0]), rel=1e-5)


@pytest.mark.parametrize(("pred", "truth"), [(0, 1), (1, 0), (0, 0)])
def test_an_empty_mask_has_no_average_distance(pred: int, truth: int) -> None:
    """Neither infinity, which a mean takes over, nor the diagonal: missed cases are counted."""
    full = np.zeros((4, 4, 4), np.uint8)
    full[1:3, 1:3, 1:3] = 1
    found = measure(
        lambda a, b: (full * pred)[a:b], full * truth, (1, 1, 1), {"liver": (0, 0)}, ("assd_mm",)
    )
    assert math.isnan(found["liver"].values["assd_mm"])
    assert math.isnan(asd_bsp((full * pred).astype(bool), (full * truth).astype(bool)))


def test_asd_bsp_is_of_the_model_grid_alone() -> None:
    rng = np.random.default_rng(3)
    pred, truth = ((rng.random((12, 11, 9)) < share).astype(np.uint8) for share in (0.1, 0.3))
    file = np.zeros((4, 4, 4), np.uint8)
    file[1:3, 1:3, 1:3] = 1

    def found(**grid: Any) -> float:
        scores = measure(
            lambda a, b: file[a:b], file, (1, 1, 3), {"liver": (0, 0)}, ("asd_bsp",), **grid
        )
        return scores["liver"].values["asd_bsp"]

    assert found(model_grid=(pred, truth)) == asd_bsp(pred == 1, truth == 1)
    assert found(model_grid=(pred, truth)) > 0
    assert math.isnan(found(model_grid=(0 * pred, truth)))
    with pytest.raises(SettingError, match="assd_mm"):
        found()
    assert parse_metrics("asd_bsp") == ("asd_bsp",)
    assert "asd_bsp" not in DEFAULT


def test_assd_is_computed_where_it_is_asked_for() -> None:
    assert parse_metrics("dice,assd_mm") == ("dice", "assd_mm")
    assert row_names("assd_mm", "liver") == ("assd_mm",)
    assert "assd_mm" not in DEFAULT
