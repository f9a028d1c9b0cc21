"""Effect sizes: golden numbers, the Wilcoxon statistic, and power counted out."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from scipy import stats as scipy_stats

from clbench.errors import SettingError
from clbench.statistics.intervals import (
    cohen_dz,
    detectable_effect,
    rank_biserial,
)
from clbench.statistics.paired_tests import wilcoxon

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
A = np.array(GOLDEN["paired_t"]["input"]["a"])
B = np.array(GOLDEN["paired_t"]["input"]["b"])
D12 = np.array(GOLDEN["hodges_lehmann"]["input"]["d"])
differences = st.lists(st.integers(-50, 50).map(lambda i: i / 100), min_size=6, max_size=14)


def test_effect_sizes() -> None:
    expected = GOLDEN["effect_sizes"]["expected"]
    assert rank_biserial(D12) == pytest.approx(expected["matched_rank_biserial"], abs=1e-12)
    assert rank_biserial(-D12) == -rank_biserial(D12)
    assert rank_biserial([0, 0]) == 0
    assert math.isnan(rank_biserial([]))


@given(differences)
@settings(max_examples=40, deadline=None)
def test_rank_biserial_follows_from_the_wilcoxon_statistic(d: list[float]) -> None:
    found = wilcoxon(d)
    total = found.n_nonzero * (found.n_nonzero + 1) / 2
    expected = 2 * found.statistic / total - 1 if total else 0
    assert rank_biserial(d) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "alpha", "dz"),
    [(12, 0.05, 0.89), (20, 0.05, 0.66), (12, 0.05 / 42, 1.55), (20, 0.05 / 42, 1.06)],
)
def test_detectable_effect(n: int, alpha: float, dz: float) -> None:
    assert detectable_effect(n, alpha=alpha) == pytest.approx(dz, abs=0.005)


def test_detectable_effect_is_found_as_often_as_promised() -> None:
    dz = detectable_effect(12)
    d = np.random.default_rng(5).normal(dz, 1, (20_000, 12))
    found = scipy_stats.ttest_1samp(d, 0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors
    assert [detectable_effect(n) for n in (3, 5, 50)] == sorted(
        (detectable_effect(n) for n in (3, 5, 50)), reverse=True
    )
    assert math.isnan(detectable_effect(1))
    with pytest.raises(SettingError):
        detectable_effect(12, power=1.2)


def test_dz_is_of_the_differences() -> None:
    expected = GOLDEN["paired_t"]["expected"]
    assert cohen_dz(A - B) == pytest.approx(expected["cohen_dz"], abs=1e-9)
    assert cohen_dz(A - B) != pytest.approx(expected["pingouin"]["cohen_d"], abs=0.1)
    assert math.isnan(cohen_dz([0.1, 0.1]))
    assert math.isnan(cohen_dz([0.1]))
