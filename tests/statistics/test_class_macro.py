"""The primary endpoint: golden numbers, scipy with one class, and the permutation test's promises."""

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
from clbench.statistics.class_macro import (
    by_patient,
    equivalence_flip,
    macro_mean,
    per_patient_weights,
    sign_flip,
    strata,
)
from clbench.statistics.paired_tests import ALL_ZERO, NO_PAIRS, TOO_SMALL

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
MACRO = GOLDEN["stratified_signflip_class_macro"]
TABLE = {
    "a": np.array(MACRO["input"]["dataset_A_diffs_patients_x_classes"], dtype=float),
    "b": np.array(MACRO["input"]["dataset_B_diffs_patients_x_classes"], dtype=float),
}
D12 = np.array(GOLDEN["wilcoxon_no_ties"]["input"]["d"])


def random_table(seed: int, n: int = 6, classes: int = 3, shift: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    values = rng.normal(shift, 0.05, (n, classes))
    values[rng.random((n, classes)) < 0.2] = np.nan
    return {"a": values, "b": rng.normal(shift, 0.05, (4, 1))}


def test_stratified_sign_flip_equals_the_golden_numbers() -> None:
    expected = MACRO["expected"]
    found = sign_flip(TABLE)
    assert found.statistic == pytest.approx(expected["statistic_macro_over_4_classes"], abs=1e-12)
    assert macro_mean(TABLE) == pytest.approx(found.statistic, abs=1e-15)
    assert found.p == expected["p_two_sided_exact"]
    assert found.p_greater == expected["p_greater_exact"]
    assert per_patient_weights(strata(TABLE)) == pytest.approx(
        expected["patient_weights"], abs=1e-9
    )
    assert (found.n, found.n_nonzero, found.method, found.draws) == (9, 9, "exact", None)
    assert found.smallest_p == 2 / expected["n_sign_patterns"]
    only_a = macro_mean({"a": TABLE["a"]})
    assert only_a == pytest.approx(expected["class_first_mean_A"], abs=1e-12)
    assert only_a != pytest.approx(expected["wrong_case_first_nanmean_A"], abs=1e-6)


def test_one_class_equals_scipy() -> None:
    found = sign_flip({"a": D12[:, None]})
    expected = GOLDEN["paired_permutation_mean"]["expected"]["brute_force"]
    assert found.p == expected["p_two_sided"]
    assert found.p_greater == expected["p_greater"]
    assert found.statistic == pytest.approx(expected["mean"], abs=1e-12)
    theirs = scipy_stats.permutation_test(
        (D12, np.zeros(12)),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert found.p == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_equals_flipping_whole_patients_by_hand(seed: int) -> None:
    table = random_table(seed)
    observed = macro_mean(table)
    hits = total = 0
    for signs in itertools.product((-1, 1), repeat=10):
        s = np.array(signs)[:, None]
        flipped = macro_mean({"a": table["a"] * s[:6], "b": table["b"] * s[6:]})
        hits += abs(flipped) >= abs(observed) - 1e-12
        total += 1
    assert sign_flip(table).p == hits / total


def test_sampled_p_is_near_the_exact_one_and_never_zero() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.02, 0.05, (21, 1))
    sampled = sign_flip({"a": d}, seed=1, draws=40_000)
    # the exact p of 21 patients, by the same statistic
    sums = np.zeros(1)
    for x in d[:, 0]:
        sums = np.concatenate([sums + x, sums - x])
    exact = (np.abs(sums) >= abs(d.sum()) - 1e-9).mean()
    assert sampled.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))
    assert (sampled.method, sampled.draws) == ("monte carlo", 40_000)
    assert sampled == sign_flip({"a": d}, seed=1, draws=40_000)
    assert sampled.p != sign_flip({"a": d}, seed=2, draws=40_000).p
    strong = sign_flip({"a": np.full((40, 1), 0.1)}, draws=999)
    assert strong.p == strong.smallest_p == 1 / 1000


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_symmetry_scale_and_order(seed: int) -> None:
    table = random_table(seed)
    found = sign_flip(table)
    minus = sign_flip({k: -v for k, v in table.items()})
    assert (minus.p, minus.p_greater, minus.p_less) == (found.p, found.p_less, found.p_greater)
    order = np.random.default_rng(seed).permutation(6)
    assert sign_flip({"b": table["b"] * 3, "a": table["a"][order] * 3}).p == found.p
    assert found.smallest_p <= found.p <= 1


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_larger_shift_never_raises_the_one_sided_p(seed: int) -> None:
    table = random_table(seed)
    p = [
        sign_flip({k: v + shift for k, v in table.items()}).p_greater
        for shift in (-0.02, 0.0, 0.02, 0.05)
    ]
    assert p == sorted(p, reverse=True)


def test_null_studies_are_called_at_the_nominal_rate() -> None:
    """Patients with a common effect on all classes, absent cells, no difference on the whole."""
    rng = np.random.default_rng(11)
    called, studies = 0, 1500
    for _ in range(studies):
        patient = rng.normal(0, 0.05, (12, 1))
        d = patient + rng.normal(0, 0.02, (12, 4))
        d[rng.random((12, 4)) < 0.15] = np.nan
        called += sign_flip({"a": d[:6], "b": d[6:]}).p <= 0.05
    assert 0.035 <= called / studies <= 0.067  # 0.05 and three standard errors


def test_seeds_are_averaged_before_the_test() -> None:
    rng = np.random.default_rng(2)
    cells = rng.normal(0.01, 0.05, (3, 8, 2))
    cells[:, 2, 1] = np.nan
    assert sign_flip({"a": cells}).p == sign_flip({"a": cells.mean(axis=0)}).p
    assert sign_flip({"a": cells}).n == 8


def test_scans_of_one_patient_are_one_unit() -> None:
    scans = np.array([[0.1, np.nan], [0.3, 0.2], [0.5, np.nan]])
    found = by_patient(scans, ["x", "x", "y"])
    assert found == pytest.approx(np.array([[0.2, 0.2], [0.5, np.nan]]), nan_ok=True)
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(2, 5, 3))
    assert by_patient(seeds, list("abcde")) == pytest.approx(seeds)
    twice = np.repeat(seeds[0], 2, axis=0)
    pooled = by_patient(twice, [i // 2 for i in range(10)])
    assert sign_flip({"a": pooled}).p == sign_flip({"a": seeds[0]}).p
    # counted twice, the same five patients would look like ten
    steady = np.abs(seeds[0])
    assert sign_flip({"a": steady}).p == 2**-4
    assert sign_flip({"a": np.repeat(steady, 2, axis=0)}).p == 2**-9
    with pytest.raises(DataError, match="patient"):
        by_patient(scans, ["x"])


def test_edges() -> None:
    zero = sign_flip({"a": np.zeros((5, 2))})
    assert (zero.p, zero.flags) == (1.0, (ALL_ZERO,))
    empty = sign_flip({"a": np.full((5, 2), np.nan)})
    assert math.isnan(empty.p)
    assert empty.flags == (NO_PAIRS,)
    assert math.isnan(macro_mean({"a": np.full((5, 2), np.nan)}))
    assert math.isnan(sign_flip({}).p)
    few = sign_flip({"a": np.full((5, 1), 0.1)})
    assert (few.p, few.flags) == (0.0625, (TOO_SMALL,))
    part = np.array([[0.1, np.nan], [np.nan, np.nan], [0.2, np.nan]])
    assert sign_flip({"a": part}).n == 2
    assert macro_mean({"a": part}) == pytest.approx(0.15)


def test_tables_that_contradict_themselves_are_refused() -> None:
    cells = np.ones((2, 4, 3))
    cells[1, 0, 0] = np.nan
    with pytest.raises(DataError, match="missing under one seed"):
        sign_flip({"a": cells})
    with pytest.raises(DataError, match="number of seeds"):
        sign_flip({"a": np.ones((2, 4, 3)), "b": np.ones((3, 4, 3))})
    with pytest.raises(DataError, match="wrong form"):
        sign_flip({"a": np.ones(4)})
    with pytest.raises(DataError, match="wrong form"):
        sign_flip({"a": np.array([[np.inf]])})


def test_equivalence_by_sign_flips() -> None:
    near = {"a": np.random.default_rng(0).normal(0.0, 0.01, (12, 3))}
    found = equivalence_flip(near, low=-0.02, high=0.02)
    assert found.p == max(found.p_above_low, found.p_below_high) <= 0.001
    moved = {"a": near["a"] + 0.02}
    assert equivalence_flip(moved, low=-0.02, high=0.02).p > 0.2
    assert equivalence_flip(moved, low=-0.02, high=0.02).p_above_low < 0.001
    same = equivalence_flip({"a": np.zeros((12, 3))}, low=-0.02, high=0.02)
    assert same.p == 2**-12
    with pytest.raises(SettingError):
        equivalence_flip(near, low=0.1, high=0.0)
