"""The primary endpoint: golden numbers, scans and patients, and tables that are refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from locations import GOLDEN_FILES

from clbench.errors import DataError
from clbench.statistics.class_macro import (
    by_patient,
    macro_mean,
    per_patient_weights,
    strata,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
MACRO = GOLDEN["stratified_signflip_class_macro"]
TABLE = {
    "a": np.array(MACRO["input"]["dataset_A_diffs_patients_x_classes"], dtype=float),
    "b": np.array(MACRO["input"]["dataset_B_diffs_patients_x_classes"], dtype=float),
}


def test_the_macro_mean_equals_the_golden_numbers() -> None:
    expected = MACRO["expected"]
    assert macro_mean(TABLE) == pytest.approx(expected["statistic_macro_over_4_classes"], abs=1e-12)
    assert per_patient_weights(strata(TABLE)) == pytest.approx(
        expected["patient_weights"], abs=1e-9
    )
    only_a = macro_mean({"a": TABLE["a"]})
    assert only_a == pytest.approx(expected["class_first_mean_A"], abs=1e-12)
    assert only_a != pytest.approx(expected["wrong_case_first_nanmean_A"], abs=1e-6)


def test_scans_of_one_patient_are_one_unit() -> None:
    scans = np.array([[0.1, np.nan], [0.3, 0.2], [0.5, np.nan]])
    found = by_patient(scans, ["x", "x", "y"])
    assert found == pytest.approx(np.array([[0.2, 0.2], [0.5, np.nan]]), nan_ok=True)
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(2, 5, 3))
    assert by_patient(seeds, list("abcde")) == pytest.approx(seeds)
    twice = np.repeat(seeds[0], 2, axis=0)
    pooled = by_patient(twice, [i // 2 for i in range(10)])
    assert pooled == pytest.approx(seeds[0])
    with pytest.raises(DataError, match="patient"):
        by_patient(scans, ["x"])


def test_edges() -> None:
    assert math.isnan(macro_mean({"a": np.full((5, 2), np.nan)}))
    assert math.isnan(macro_mean({}))
    part = np.array([[0.1, np.nan], [np.nan, np.nan], [0.2, np.nan]])
    assert [s.n for s in strata({"a": part})] == [2]
    assert macro_mean({"a": part}) == pytest.approx(0.15)


def test_tables_that_contradict_themselves_are_refused() -> None:
    cells = np.ones((2, 4, 3))
    cells[1, 0, 0] = np.nan
    with pytest.raises(DataError, match="missing under one seed"):
        strata({"a": cells})
    with pytest.raises(DataError, match="number of seeds"):
        strata({"a": np.ones((2, 4, 3)), "b": np.ones((3, 4, 3))})
    with pytest.raises(DataError, match="wrong form"):
        strata({"a": np.ones(4)})
    with pytest.raises(DataError, match="wrong form"):
        strata({"a": np.array([[np.inf]])})
