"""Corrections: golden numbers, definitions, and what leaves a family."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from locations import GOLDEN_FILES

from clbench.errors import DataError
from clbench.statistics.corrections import (
    benjamini_hochberg,
    holm,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@pytest.mark.parametrize("case", sorted(GOLDEN["multiplicity"]["cases"]))
def test_corrections_equal_the_golden_numbers(case: str) -> None:
    golden = GOLDEN["multiplicity"]["cases"][case]
    assert holm(golden["p"]) == pytest.approx(golden["expected"]["holm"], abs=1e-12)
    assert benjamini_hochberg(golden["p"]) == pytest.approx(golden["expected"]["fdr_bh"], abs=1e-12)


def test_untested_comparisons_leave_the_family() -> None:
    golden = GOLDEN["multiplicity"]["nan_policy"]
    found = holm([math.nan if p is None else p for p in golden["p"]])
    expected = [math.nan if p is None else p for p in golden["expected_holm_excluding_nan"]]
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isnan(holm([math.nan])).all()
    assert holm([]).size == 0
    with pytest.raises(DataError):
        holm([1.2])


@given(p_lists)
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    values, adjusted = np.array(p), holm(p)
    assert np.all(adjusted >= values)
    assert np.all(adjusted <= np.minimum(1, values * len(p)) + 1e-15)
    assert np.all(np.diff(adjusted[np.argsort(values, kind="stable")]) >= 0)
    assert np.all(benjamini_hochberg(p) <= adjusted + 1e-12)


@given(p_lists, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order_and_grows_with_p(p: list[float], random: Any) -> None:
    order = list(range(len(p)))
    random.shuffle(order)
    assert np.array_equal(holm([p[i] for i in order]), holm(p)[order])
    larger = [min(1.0, x * 1.1) for x in p]
    assert np.all(holm(larger) >= holm(p) - 1e-15)


@given(p_lists)
def test_benjamini_hochberg_by_its_definition(p: list[float]) -> None:
    """The smallest rate at which p_i is among the r smallest with p_(r) <= rate * r / m."""
    m = len(p)
    expected = [min(1.0, *(q * m / sum(x <= q for x in p) for q in p if q >= own)) for own in p]
    assert benjamini_hochberg(p) == pytest.approx(expected, abs=1e-12)
