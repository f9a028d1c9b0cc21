"""Paired tests: against the golden numbers, scipy, every sign pattern, and their own symmetries."""

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

from clbench.errors import DataError
from clbench.statistics.paired_tests import (
    paired_t,
    sign_test,
    smallest_sign_p,
    wilcoxon,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
D12 = GOLDEN["wilcoxon_no_ties"]["input"]["d"]
lists = st.lists(st.integers(-6, 6).map(lambda i: i / 100), min_size=1, max_size=12)


def agrees(found: Any, brute: dict[str, float]) -> None:
    assert found.n_nonzero == brute["n_nonzero"]
    assert found.statistic == brute["w_plus"]
    assert found.p == pytest.approx(brute["p_two_sided"], abs=1e-12)
    assert found.p_greater == pytest.approx(brute["p_greater"], abs=1e-12)
    assert found.p_less == pytest.approx(brute["p_less"], abs=1e-12)


def test_wilcoxon_without_ties() -> None:
    found = wilcoxon(D12)
    agrees(found, GOLDEN["wilcoxon_no_ties"]["expected"]["brute_force"])
    assert found.method == "exact"


def test_wilcoxon_with_ties_is_the_permutation_p_not_the_tie_free_one() -> None:
    golden = GOLDEN["wilcoxon_ties"]
    found = wilcoxon(golden["input"]["d"])
    agrees(found, golden["expected"]["brute_force_midrank_permutation"])
    assert found.method == "permutation"
    assert found.p != golden["expected"]["scipy_method_exact_ignores_ties"]["pvalue"]


def test_wilcoxon_drops_zeros() -> None:
    golden = GOLDEN["wilcoxon_zeros"]
    found = wilcoxon(golden["input"]["d"])
    agrees(found, golden["expected"]["brute_force_drop_zeros"])
    assert found.n_nonzero == 8


def test_wilcoxon_stays_exact_where_scipy_turns_normal() -> None:
    golden = GOLDEN["wilcoxon_n14_ties_zeros"]
    found = wilcoxon(golden["input"]["d"])
    agrees(found, golden["expected"]["brute_force_drop_zeros"])
    assert (found.n, found.method) == (14, "permutation")
    assert found.p != pytest.approx(golden["expected"]["scipy_auto"]["pvalue"], abs=1e-3)


def test_float_ties_are_ties() -> None:
    d = [0.9 - 0.8, 0.7 - 0.8, 0.3 - 0.1, 0.5]
    assert 0.9 - 0.8 != -(0.7 - 0.8)
    assert wilcoxon(d).p == wilcoxon([0.1, -0.1, 0.2, 0.5]).p
    assert wilcoxon(d).method == "permutation"


@pytest.mark.parametrize("n", range(3, 9))
def test_the_smallest_p_of_small_samples(n: int) -> None:
    golden = GOLDEN["wilcoxon_small_n_all_positive"]["expected"][str(n)]
    found = wilcoxon([0.01 * (i + 1) for i in range(n)])
    assert found.p == found.smallest_p == golden["p_two_sided"] == smallest_sign_p(n)
    assert (found.smallest_p <= 0.05) == golden["can_reach_0.05"]


def test_all_zero_and_nothing() -> None:
    for test in (wilcoxon, sign_test, paired_t):
        found = test([0.0] * 6)
        assert (found.p, found.method, found.n_nonzero) == (1.0, "none", 0)
        assert found.statistic == GOLDEN["wilcoxon_all_zero"]["expected"]["scipy"]["statistic"]
        nothing = test([math.nan, math.nan])
        assert math.isnan(nothing.p)
    assert math.isnan(paired_t([0.1]).p)
    assert math.isnan(paired_t([0.1] * 5).p)  # all equal


def test_missing_pairs_are_left_out_and_infinite_ones_refused() -> None:
    assert wilcoxon([*D12, math.nan]) == wilcoxon(D12)
    with pytest.raises(DataError, match="infinite"):
        wilcoxon([0.1, math.inf])
    with pytest.raises(DataError, match="one list"):
        wilcoxon([[0.1, 0.2]])


@given(lists)
@settings(max_examples=40, deadline=None)
def test_wilcoxon_equals_every_sign_pattern(d: list[float]) -> None:
    nonzero = np.array([x for x in d if x != 0])
    found = wilcoxon(d)
    if nonzero.size == 0:
        assert found.p == 1.0
        return
    ranks = scipy_stats.rankdata(np.round(np.abs(nonzero), 6))
    sums = np.array(
        [ranks[np.array(s, dtype=bool)].sum() for s in itertools.product((0, 1), repeat=len(ranks))]
    )
    w = ranks[nonzero > 0].sum()
    assert found.p_greater == pytest.approx((sums >= w).mean(), abs=1e-12)
    assert found.p_less == pytest.approx((sums <= w).mean(), abs=1e-12)


@pytest.mark.parametrize("n", [25, 60])
def test_wilcoxon_equals_scipy_exact_without_ties(n: int) -> None:
    d = np.random.default_rng(n).normal(0.1, 1, n)
    for side, name in (("two-sided", "p"), ("greater", "p_greater"), ("less", "p_less")):
        expected = scipy_stats.wilcoxon(np.round(d, 6), alternative=side, method="exact").pvalue
        assert getattr(wilcoxon(d), name) == pytest.approx(expected, rel=1e-9)


def test_wilcoxon_turns_normal_above_200_and_equals_scipy_there() -> None:
    d = np.round(np.random.default_rng(3).normal(0.01, 0.1, 300), 2)
    nonzero = d[d != 0]
    found = wilcoxon(d)
    expected = scipy_stats.wilcoxon(nonzero, method="asymptotic", correction=False)
    assert (found.method, found.smallest_p) == ("normal", 0.0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    # continuity at the switch: the exact p of 200 pairs is close to the normal one
    few = nonzero[:200]
    normal = scipy_stats.wilcoxon(few, method="asymptotic", correction=False).pvalue
    assert wilcoxon(few).p == pytest.approx(normal, abs=2e-3)


@given(lists)
@settings(max_examples=60, deadline=None)
def test_swapping_the_strategies_mirrors_every_test(d: list[float]) -> None:
    for test in (wilcoxon, sign_test, paired_t):
        here, there = test(d), test([-x for x in d])
        assert here.p == pytest.approx(there.p, abs=1e-12, nan_ok=True)
        assert here.p_greater == pytest.approx(there.p_less, abs=1e-12, nan_ok=True)


@given(lists, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_and_scale_do_not_matter_and_p_is_never_below_its_bound(
    d: list[float], random: Any
) -> None:
    mixed = [x * 3 for x in d]
    random.shuffle(mixed)
    for test in (wilcoxon, sign_test):
        found = test(d)
        assert test(mixed).p == pytest.approx(found.p, abs=1e-12)
        assert found.smallest_p - 1e-15 <= found.p <= 1


def test_paired_t() -> None:
    expected = GOLDEN["paired_t"]["expected"]
    found = paired_t(D12)
    assert found.statistic == pytest.approx(expected["t"], rel=1e-9)
    assert found.p == pytest.approx(expected["p"], rel=1e-9)
    greater = scipy_stats.ttest_1samp(D12, 0, alternative="greater").pvalue
    assert found.p_greater == pytest.approx(greater, rel=1e-9)


def test_sign_test_equals_the_binomial() -> None:
    expected = GOLDEN["sign_test"]["expected"]
    found = sign_test(D12)
    assert (found.statistic, found.n) == (expected["n_pos"], expected["n"])
    assert found.p == pytest.approx(expected["p_two_sided"], abs=1e-12)
    at_least_10 = sum(math.comb(12, i) for i in (10, 11, 12)) / 2**12
    assert found.p_greater == pytest.approx(at_least_10, abs=1e-12)
    at_most_10 = 1 - sum(math.comb(12, i) for i in (11, 12)) / 2**12
    assert found.p_less == pytest.approx(at_most_10, abs=1e-12)


def test_forgetting_per_patient_agrees_with_the_golden_numbers() -> None:
    """Per patient, how much less A forgot than B; then what A forgot itself."""
    golden = GOLDEN["case_level_bwt"]
    scores = {name: np.array(values) for name, values in golden["input"].items()}
    own_a = scores["A_final"] - scores["A_own_step"]
    own_b = scores["B_final"] - scores["B_own_step"]
    agrees(wilcoxon(own_a - own_b), golden["expected"]["brute_DiD"])
    assert own_a.mean() == pytest.approx(golden["expected"]["BWT_A"], abs=1e-9)
    assert wilcoxon(own_a).p == pytest.approx(golden["expected"]["BWT_A_vs_0_p"], abs=1e-12)
