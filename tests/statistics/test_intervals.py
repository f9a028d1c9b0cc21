"""Intervals: golden numbers, scipy, and coverage counted out."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from scipy import stats as scipy_stats

from clbench.errors import DataError, SettingError
from clbench.statistics.intervals import (
    hodges_lehmann,
    probability_of_improvement,
    t_interval,
    wilson,
)
from clbench.statistics.paired_tests import wilcoxon

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
A = np.array(GOLDEN["paired_t"]["input"]["a"])
B = np.array(GOLDEN["paired_t"]["input"]["b"])
D12 = np.array(GOLDEN["hodges_lehmann"]["input"]["d"])
differences = st.lists(st.integers(-50, 50).map(lambda i: i / 100), min_size=6, max_size=14)


def test_hodges_lehmann() -> None:
    expected = GOLDEN["hodges_lehmann"]["expected"]
    found = hodges_lehmann(D12)
    assert found.estimate == pytest.approx(expected["pseudomedian"], abs=1e-12)
    assert [found.low, found.high] == pytest.approx(expected["ci95"], abs=1e-12)
    assert found.coverage == pytest.approx(expected["achieved_coverage"], abs=1e-12)


@pytest.mark.parametrize("n", range(3, 8))
def test_hodges_lehmann_says_when_no_interval_exists(n: int) -> None:
    golden = GOLDEN["hodges_lehmann"]["small_n"][str(n)]
    found = hodges_lehmann([0.01 * (i + 1) for i in range(n)])
    assert math.isnan(found.low) != golden["ci95_exists"]
    widest = hodges_lehmann([0.01 * (i + 1) for i in range(n)], level=golden["max_coverage"] - 1e-9)
    assert widest.coverage == pytest.approx(golden["max_coverage"], abs=1e-12)
    assert [widest.low, widest.high] == [0.01, 0.01 * n]
    assert bool(found.flags) != golden["ci95_exists"]
    assert not math.isnan(found.estimate)


def test_hodges_lehmann_of_nothing_and_of_many() -> None:
    assert math.isnan(hodges_lehmann([]).estimate)
    d = np.random.default_rng(0).normal(0, 1, 201)
    many, exact = hodges_lehmann(d), hodges_lehmann(d[:200])
    assert many.coverage == 0.95
    assert many.high - many.low == pytest.approx(exact.high - exact.low, rel=0.05)
    with pytest.raises(SettingError):
        hodges_lehmann(d, level=95)


@given(differences)
@settings(max_examples=40, deadline=None)
def test_hodges_lehmann_is_the_inverted_wilcoxon_test(d: list[float]) -> None:
    """A shift outside the interval is rejected wherever no ties stand in the way."""
    values = np.array(d) + np.arange(len(d)) * 1.37e-3  # no ties among the Walsh averages' sides
    found = hodges_lehmann(values)
    step = 2e-5
    assert wilcoxon(values - (found.low - step)).p <= 0.05 + 1e-12
    assert wilcoxon(values - (found.high + step)).p <= 0.05 + 1e-12
    moved = hodges_lehmann(values + 0.25)
    assert moved.estimate == pytest.approx(found.estimate + 0.25, abs=2e-6)
    mirrored = hodges_lehmann(-values)
    assert [-mirrored.high, -mirrored.low] == pytest.approx([found.low, found.high], abs=2e-6)


def test_t_interval() -> None:
    expected = GOLDEN["paired_t"]["expected"]
    found = t_interval(A - B)
    assert [found.low, found.high] == pytest.approx(expected["ci95"], abs=1e-9)
    assert found.estimate == pytest.approx(expected["mean_diff"], abs=1e-9)
    assert math.isnan(t_interval([0.1]).low)
    assert t_interval([0.1]).flags


def test_detection_intervals() -> None:
    for row in GOLDEN["detection_ci"]["expected"]:
        w = wilson(row["k"], row["n"])
        assert [w.low, w.high] == pytest.approx(row["wilson95"], abs=1e-9)
        assert 100 * w.estimate == pytest.approx(row["pct"])


@given(st.integers(1, 60), st.data(), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_wilson_equals_scipy_and_mirrors(n: int, data: Any, level: float) -> None:
    k = data.draw(st.integers(0, n))
    found = wilson(k, n, level=level)
    expected = scipy_stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1e-9)
    mirror = wilson(n - k, n, level=level)
    assert [1 - mirror.high, 1 - mirror.low] == pytest.approx([found.low, found.high], abs=1e-9)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_proportions_of_nothing_and_of_nonsense() -> None:
    assert math.isnan(wilson(0, 0).estimate)
    assert wilson(0, 0).flags
    with pytest.raises(DataError):
        wilson(5, 4)


def test_probability_of_improvement_never_claims_certainty() -> None:
    found = probability_of_improvement([0.8, 0.81, 0.82, 0.83, 0.84], [0.7] * 5)
    assert found.estimate == 1
    assert 0.5 < found.low < 0.6
    assert found.n == 5
    tied = probability_of_improvement([0.8, 0.8], [0.8, 0.7])
    assert tied.estimate == 0.75
    with pytest.raises(DataError):
        probability_of_improvement([1, 2], [1])


def test_hodges_lehmann_coverage_counted_over_all_signs() -> None:
    """Symmetric data: over all sign patterns the interval holds 0 as often as `coverage` says."""
    size = np.array([0.011, 0.023, 0.047, 0.089, 0.171, 0.353, 0.701, 1.409])
    holds = []
    for signs in itertools.product((-1, 1), repeat=size.size):
        found = hodges_lehmann(size * signs)
        holds.append(found.low <= 0 <= found.high)
    assert np.mean(holds) == pytest.approx(hodges_lehmann(size).coverage, abs=1e-12)
