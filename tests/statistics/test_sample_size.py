"""How many patients would decide: golden numbers and the noncentral t distribution."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from locations import GOLDEN_FILES
from scipy import stats as scipy_stats

from clbench.errors import SettingError
from clbench.statistics.intervals import detectable_effect
from clbench.statistics.sample_size import detectable_difference, patients_needed

CASES: list[dict[str, Any]] = [
    c
    for c in json.loads((GOLDEN_FILES / "max_t.json").read_text(encoding="utf-8"))["cases"]
    if c["kind"] == "size"
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_numbers(case: dict[str, Any]) -> None:
    given, e = case["input"], case["expected"]
    found = patients_needed(
        n=given["n"], estimate=given["estimate"], standard_error=given["se"], df=given["df"],
        level=given["level"], margin=given["margin"], power=given["power"],
    )  # fmt: skip
    assert found.difference == pytest.approx(float(e["difference"]), abs=1)
    assert found.equivalence == pytest.approx(float(e["equivalence"]), abs=1)
    assert found.not_worse == pytest.approx(float(e["not worse"]), abs=1)


def test_what_cannot_be_shown_has_no_number() -> None:
    found = patients_needed(
        n=8, estimate=-0.03, standard_error=0.01, df=7.0, level=0.05, margin=0.02
    )
    assert math.isnan(found.equivalence)
    assert math.isnan(found.not_worse)
    assert found.difference > 8


def test_detectable_difference_is_near_the_noncentral_t() -> None:
    n, sd = 16, 0.05
    found = detectable_difference(standard_error=sd / math.sqrt(n), df=n - 1, level=0.05)
    assert found == pytest.approx(detectable_effect(n) * sd, rel=0.01)


def test_no_such_power() -> None:
    with pytest.raises(SettingError, match="power"):
        patients_needed(
            n=8, estimate=0.0, standard_error=0.1, df=7.0, level=0.05, margin=0.02, power=1.0
        )


@pytest.mark.parametrize("n", [6, 8, 12])
def test_the_degrees_of_freedom_grow_as_those_of_one_set_do(n: int) -> None:
    sd, checked = 0.05, 0
    for estimate in (0.02, 0.025, 0.03, 0.035, 0.04, 0.045):
        found = patients_needed(
            n=n, estimate=estimate, standard_error=sd / math.sqrt(n), df=n - 1, level=0.05,
            margin=0.001,
        ).difference  # fmt: skip
        expected = next(
            later
            for later in range(n + 1, 1000)
            if scipy_stats.t.sf(
                scipy_stats.t.ppf(0.975, later - 1) - estimate / (sd / math.sqrt(later)), later - 1
            )
            >= 0.8
        )
        assert found == expected
        checked += 1
    assert checked == 6
