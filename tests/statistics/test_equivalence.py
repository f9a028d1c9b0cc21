"""Equivalence: the t-based test and the Bayesian signed-rank test."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from locations import GOLDEN_FILES

from clbench.errors import DataError, SettingError
from clbench.statistics.equivalence import bayes_signed_rank, tost

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
D12 = np.array(GOLDEN["wilcoxon_no_ties"]["input"]["d"])


def test_tost_equals_the_golden_numbers() -> None:
    golden = GOLDEN["tost_paired"]
    found = tost(D12, low=golden["input"]["low"], high=golden["input"]["upp"])
    assert found.p == pytest.approx(golden["expected"]["p"], rel=1e-9)
    assert found.p_above_low == pytest.approx(golden["expected"]["p_lower"], rel=1e-9)
    assert found.p_below_high == pytest.approx(golden["expected"]["p_upper"], rel=1e-9)


def test_tost_grows_easier_with_the_margin_and_refuses_swapped_ones() -> None:
    p = [tost(D12, low=-m, high=m).p for m in (0.01, 0.03, 0.05, 0.1)]
    assert p == sorted(p, reverse=True)
    assert p[0] > 0.5
    assert p[-1] < 1e-4
    with pytest.raises(SettingError):
        tost(D12, low=0.02, high=-0.02)
    assert math.isnan(tost([0.0], low=-0.1, high=0.1).p)


@pytest.mark.parametrize(
    ("rope", "key"), [(0.01, "rope_0.01_[p_b_better? see note]"), (0.02, "rope_0.02")]
)
def test_posterior_equals_baycomp(rope: float, key: str) -> None:
    golden = GOLDEN["bayes_signed_rank"]
    found = bayes_signed_rank(D12, rope=rope, seed=0)
    assert found.p_a + found.p_rope + found.p_b == pytest.approx(1)
    for run in golden["expected"][key]:
        near = pytest.approx(run, abs=golden["tolerance"])
        assert [found.p_a, found.p_rope, found.p_b] == near


def test_posterior_mirrors_when_swapped_and_repeats_with_its_seed() -> None:
    here = bayes_signed_rank(D12, rope=0.01, seed=1, draws=5000)
    there = bayes_signed_rank(-D12, rope=0.01, seed=1, draws=5000)
    assert (here.p_a, here.p_rope, here.p_b) == (there.p_b, there.p_rope, there.p_a)
    assert here == bayes_signed_rank(D12, rope=0.01, seed=1, draws=5000)
    equal = bayes_signed_rank([0.0] * 8, rope=0.01, seed=1, draws=100)
    assert equal.p_rope == 1
    with pytest.raises(DataError):
        bayes_signed_rank([math.nan], rope=0.01, seed=1)
