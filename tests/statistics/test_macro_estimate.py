"""Class-macro intervals: golden numbers, scipy, and their coverage in small."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from locations import GOLDEN_FILES
from scipy import stats as scipy_stats

from clbench.errors import SettingError
from clbench.statistics.class_macro import macro_mean
from clbench.statistics.macro_estimate import (
    ONE_PATIENT,
    ONE_RUN,
    TWO_RUNS,
    cells_of,
    estimate_of,
    half_width_over_runs,
    macro_interval,
)

CASES: list[dict[str, Any]] = [
    c
    for c in json.loads((GOLDEN_FILES / "max_t.json").read_text(encoding="utf-8"))["cases"]
    if c["kind"] == "pointwise"
]
NAN = math.nan


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden_numbers(case: dict[str, Any]) -> None:
    table = {k: np.array(v, dtype=float) for k, v in case["table"].items()}
    e, found = case["expected"], estimate_of(cells_of(table))
    interval = macro_interval(table, level=case["level"])
    assert found.estimate == pytest.approx(e["estimate"], abs=1e-9)
    assert found.standard_error == pytest.approx(e["se"], abs=1e-9)
    assert found.df == pytest.approx(e["df"], rel=1e-7)
    both = "_both" if "low_both" in e else ""
    assert interval.low == pytest.approx(e[f"low{both}"], abs=1e-9)
    assert interval.high == pytest.approx(e[f"high{both}"], abs=1e-9)
    if both:
        assert found.run_variance**0.5 == pytest.approx(e["se_runs"], abs=1e-9)
        assert half_width_over_runs(found, 0.004) == pytest.approx(
            e["scope_half_width_at_level_0_004"], abs=1e-9
        )


def test_one_complete_set_is_students_t() -> None:
    d = np.random.default_rng(0).normal(0.02, 0.03, 9)
    low, high = scipy_stats.ttest_1samp(d, 0).confidence_interval()
    interval = macro_interval({"a": d[:, None]})
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.flags == (ONE_RUN,)


def test_two_complete_sets_are_welchs_t() -> None:
    """The mean of two sets' means has half of Welch's standard error, and his degrees of freedom."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.02, 0.01, 8), rng.normal(0.0, 0.05, 12)
    found = estimate_of(cells_of({"a": a[:, None], "b": b[:, None]}))
    theirs = scipy_stats.ttest_ind(a, -b, equal_var=False)
    assert found.df == pytest.approx(theirs.df)
    assert found.estimate / found.standard_error == pytest.approx(theirs.statistic)


def test_a_shift_of_all_cells_adds_no_spread() -> None:
    rng = np.random.default_rng(2)
    d = rng.normal(0, 0.02, (8, 5))
    d[5:, :3] = np.nan
    one, other = (estimate_of(cells_of({"a": d + x})) for x in (0.0, 0.4))
    assert other.variance == pytest.approx(one.variance, rel=1e-9)
    assert other.estimate == pytest.approx(one.estimate + 0.4)
    assert estimate_of(cells_of({"a": np.where(np.isnan(d), d, 0.3)})).variance == 0.0


def test_estimate_is_the_macro_mean() -> None:
    rng = np.random.default_rng(3)
    table = {"a": rng.normal(0, 1, (3, 6, 2)), "b": rng.normal(0, 1, (3, 4, 1))}
    table["a"][:, 2, 1] = NAN
    assert estimate_of(cells_of(table)).estimate == pytest.approx(macro_mean(table), abs=1e-11)


def test_two_seeds_are_wider_than_either_part_alone() -> None:
    rng = np.random.default_rng(4)
    d = rng.normal(0, 0.03, (1, 8, 2)) + np.array([0.0, 0.02])[:, None, None]
    interval, found = macro_interval({"a": d}), estimate_of(cells_of({"a": d}))
    alone = float(scipy_stats.t.ppf(0.975, found.df)) * found.standard_error
    assert interval.high - interval.estimate > alone
    assert interval.flags == (TWO_RUNS,)


def test_a_mean_dice_stays_between_0_and_1() -> None:
    scores = {"a": np.array([[0.99], [0.4], [1.0], [0.9]])}
    clipped, plain = macro_interval(scores, bounds=(0.0, 1.0)), macro_interval(scores)
    assert plain.high > 1.0
    assert (clipped.low, clipped.high) == (plain.low, 1.0)


def test_what_has_no_interval_says_so() -> None:
    assert macro_interval({"a": [[0.3, 0.5], [0.2, NAN]]}).flags == (ONE_RUN, ONE_PATIENT)
    assert math.isnan(macro_interval({"a": [[0.3]]}).low)
    nothing = macro_interval({"a": [[NAN], [NAN]]})
    assert math.isnan(nothing.estimate)
    assert nothing.n == 0


def test_no_such_level() -> None:
    with pytest.raises(SettingError, match="confidence"):
        macro_interval({"a": [[0.3], [0.2]]}, level=1.0)


@pytest.mark.parametrize("run_sd", [0.0, 0.02])
def test_covers_the_truth_as_often_as_it_says(run_sd: float) -> None:
    """400 studies of 8 + 8 patients and 3 seeds: 95 % within 3 standard errors."""
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(400):
        run = rng.normal(0, run_sd, (3, 1, 1))
        table = {
            name: run + rng.normal(0, 0.05, (1, 8, 1)) + rng.normal(0, 0.02, (3, 8, c))
            for name, c in (("a", 5), ("b", 1))
        }
        interval = macro_interval(table)
        hits.append(interval.low <= 0 <= interval.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.033)
