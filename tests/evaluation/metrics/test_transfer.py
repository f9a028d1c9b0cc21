"""Forgetting and its kin: by hand, and where two definitions part."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.evaluation.metrics import continual
from clbench.store.run_folder import Score

AT = {"a": 1, "b": 1, "c": 2, "d": 3}
R = {
    (1, "a"): 0.8, (1, "b"): 0.6,
    (2, "a"): 0.9, (2, "b"): 0.5, (2, "c"): 0.7,
    (3, "a"): 0.4, (3, "b"): 0.6, (3, "c"): 0.5, (3, "d"): 0.3,
}  # fmt: skip


def test_by_hand() -> None:
    assert continual.backward_transfer(R, AT, 3) == pytest.approx({"a": -0.4, "b": 0.0, "c": -0.2})
    assert continual.forgetting(R, AT, 3) == pytest.approx({"a": 0.5, "b": 0.0, "c": 0.2})
    assert continual.backward_transfer_all_pairs(R, AT, 3) == pytest.approx(
        ((0.1) + (-0.1) + (-0.4) + 0.0 + (-0.2)) / 5
    )
    assert continual.learning_accuracy(R, AT) == pytest.approx(0.5)
    assert continual.learning_accuracy(R, AT, first=1) == pytest.approx((0.8 + 0.6 + 0.7 + 0.3) / 4)
    assert continual.accuracy(R, AT, 3, lambda s: s < 3) == pytest.approx(0.5)
    assert continual.average_incremental(R, AT, 3) == pytest.approx((0.7 + 0.7 + 0.45) / 3)
    joint = {(2, "c"): 0.9, (3, "d"): 0.2}
    assert continual.intransigence(R, joint, AT) == pytest.approx({"c": 0.2, "d": -0.1})
    assert continual.harmonic(0.5, 0.3) == pytest.approx(0.375)
    assert continual.harmonic(0.0, 0.0) == 0.0


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_with_two_steps_forgetting_is_minus_backward_transfer(v: list[float]) -> None:
    at = {"a": 1, "b": 1, "c": 2}
    r = {(1, "a"): v[0], (1, "b"): v[1], (2, "a"): v[2], (2, "b"): v[3], (2, "c"): 0.5}
    gone, bwt = continual.forgetting(r, at, 2), continual.backward_transfer(r, at, 2)
    assert all(gone[c] == pytest.approx(-bwt[c]) for c in gone)
    assert continual.backward_transfer_all_pairs(r, at, 2) == pytest.approx(
        continual.mean(bwt.values())
    )


def test_a_hole_is_never_a_partial_mean() -> None:
    holed = {k: v for k, v in R.items() if k != (3, "b")}
    assert math.isnan(continual.accuracy(holed, AT, 3, lambda s: True))
    assert math.isnan(continual.forgetting(holed, AT, 3)["b"])
    assert math.isnan(continual.mean([]))
    assert math.isnan(continual.spread([0.5]))


def test_with_one_step_nothing_can_be_forgotten() -> None:
    assert continual.forgetting({(1, "a"): 0.5}, {"a": 1}, 1) == {}
    assert math.isnan(continual.learning_accuracy({(1, "a"): 0.5}, {"a": 1}))


def test_scans_of_one_patient_count_once() -> None:
    """Patient p: scans 0.2 and 0.4; q: 0.9; r: two scans without the structure. R = (0.3 + 0.9)/2."""
    values = {"p_a": 0.2, "p_v": 0.4, "q": 0.9, "r_a": math.nan, "r_v": math.nan}
    rows = [
        Score(
            bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="x", case=case,
            structure="liver", learned_at=1, scoring="strict", metric="dice", value=value, gt_vox=5,
            pred_vox=5, status="both_empty" if math.isnan(value) else "ok",
        )
        for case, value in values.items()
    ]  # fmt: skip
    patient_of = {f"x/{c}": c[0] for c in values if "_" in c}
    (value,) = continual.matrix(rows, ["x"], scoring="strict", patient_of=patient_of).values()
    assert value == pytest.approx(0.6)
