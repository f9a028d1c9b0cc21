"""Crossed bootstrap: against every resample counted out, closed form, coverage, and stability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from clbench.errors import DataError, SettingError
from clbench.statistics.bootstrap import (
    FEW_SEEDS,
    LOST,
    ONE_RUN,
    SMALL_N,
    crossed_interval,
    draw_resamples,
    ranking_stability,
    resampled,
    seed_means,
)
from clbench.statistics.class_macro import macro_mean, strata


def test_every_resample_counted_out() -> None:
    """2 seeds x (3 + 2) patients with holes: all 2^2 x 3^3 x 2^2 resamples, by plain means."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.02, 0.05, (2, 3, 2)), rng.normal(0.0, 0.03, (2, 2, 1))
    a[:, 1, 1] = np.nan
    means = []
    for s in itertools.product(range(2), repeat=2):
        for i in itertools.product(range(3), repeat=3):
            for j in itertools.product(range(2), repeat=2):
                cells_a, cells_b = a[np.ix_(s, i, (0, 1))], b[np.ix_(s, j, (0,))]
                classes = [cells_a[..., 0], cells_a[..., 1], cells_b[..., 0]]
                means.append(np.mean([np.nanmean(c) for c in classes if not np.isnan(c).all()]))
    found = crossed_interval({"a": a, "b": b}, seed=3, draws=60_000)
    assert found.standard_error == pytest.approx(np.std(means), rel=0.015)
    low, high = np.quantile(means, [0.025, 0.975])
    spread = np.std(means)
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.06 * spread)
    assert any(flag.startswith(LOST) for flag in found.flags)
    # the share of resamples without the two patients that have the second class: (1/3)^3
    assert any("(3.7%)" in f or "(3.6%)" in f or "(3.8%)" in f for f in found.flags)


def test_standard_error_equals_the_closed_form_of_a_mean() -> None:
    d = np.random.default_rng(4).normal(0.03, 0.06, 15)
    found = crossed_interval({"a": d[:, None]}, seed=0, draws=40_000)
    assert found.standard_error == pytest.approx(d.std() / math.sqrt(15), rel=0.015)
    assert found.estimate == pytest.approx(d.mean())
    assert found.low < found.estimate < found.high
    assert {ONE_RUN, SMALL_N} <= set(found.flags)


def test_seeds_count_crossed_not_pooled() -> None:
    """A patient effect shared by all seeds: crossing keeps it, pooling cases would hide it."""
    rng = np.random.default_rng(0)
    seeds, patients = rng.normal(0, 0.01, (3, 1, 1)), rng.normal(0.02, 0.05, (1, 12, 1))
    cells = seeds + patients + rng.normal(0, 0.005, (3, 12, 1))
    crossed = crossed_interval({"a": cells}, draws=4000)
    pooled = crossed_interval({"a": cells.reshape(36, 1)}, draws=4000)
    fixed = crossed_interval({"a": cells.mean(axis=0)}, draws=4000)
    assert pooled.standard_error is not None
    assert fixed.standard_error is not None
    assert crossed.standard_error is not None
    assert pooled.standard_error < fixed.standard_error < crossed.standard_error
    assert (crossed.n, crossed.n_seeds) == (12, 3)
    assert FEW_SEEDS in crossed.flags


def test_resamples_are_stratified_and_repeat_with_their_seed() -> None:
    parts = strata({"a": np.ones((2, 5, 1)), "b": np.ones((2, 3, 1))})
    one, two = (draw_resamples(parts, seed=s, draws=200) for s in (7, 7))
    assert [w.sum(axis=1).tolist() for w in one.patients] == [[5.0] * 200, [3.0] * 200]
    assert np.allclose(one.seeds.sum(axis=1), 1)
    assert np.array_equal(one.patients[0], two.patients[0])
    assert not np.array_equal(one.patients[0], draw_resamples(parts, seed=8, draws=200).patients[0])
    means, lost = resampled(parts, one)
    assert np.allclose(means, 1)
    assert not lost.any()


def test_a_shift_moves_the_interval_and_a_sign_mirrors_it() -> None:
    table = {"a": np.random.default_rng(0).normal(0, 0.05, (60, 2))}
    here = crossed_interval(table, draws=2000)
    moved = crossed_interval({"a": table["a"] + 0.1}, draws=2000)
    mirror = crossed_interval({"a": -table["a"]}, draws=2000)
    assert [moved.low, moved.high] == pytest.approx([here.low + 0.1, here.high + 0.1])
    assert [mirror.low, mirror.high] == pytest.approx([-here.high, -here.low])
    assert SMALL_N not in here.flags
    assert crossed_interval(table, draws=2000, level=0.8).high < here.high


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(9)
    inside, studies = 0, 400
    for _ in range(studies):
        truth = 0.02
        d = truth + rng.normal(0, 0.05, (30, 1)) + rng.normal(0, 0.02, (30, 3))
        found = crossed_interval({"a": d[:18], "b": d[18:]}, draws=500)
        inside += found.low <= truth <= found.high
    assert 0.89 <= inside / studies <= 0.98


def test_an_interval_holds_its_estimate_or_there_is_none() -> None:
    rare = np.full((8, 9), np.nan)  # each of eight classes in one patient alone, all of them 1
    rare[:, 0], rare[range(8), range(1, 9)] = 0.0, 1.0
    found = crossed_interval({"a": rare}, draws=2000)
    assert found.estimate == pytest.approx(8 / 9)  # a resample lacks classes: 7/8 at the most
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert any("leave out the estimate" in flag for flag in found.flags)
    same = crossed_interval({"a": np.full((8, 3), 0.1)}, draws=200)
    assert same.low == pytest.approx(0.1)


def test_too_little_for_an_interval() -> None:
    one = crossed_interval({"a": [[0.1, 0.2]]}, draws=10)
    assert math.isnan(one.low)
    assert one.estimate == pytest.approx(0.15)
    assert math.isnan(crossed_interval({"a": [[math.nan]]}, draws=10).estimate)
    assert math.isnan(crossed_interval({}, draws=10).estimate)
    with pytest.raises(SettingError):
        crossed_interval({"a": [[0.1], [0.2]]}, level=95)


def test_seed_means() -> None:
    cells = np.random.default_rng(3).normal(size=(4, 6, 2))
    cells[:, 0, 0] = np.nan
    found = seed_means({"a": cells, "b": cells[:, :, :1]})
    by_hand = [macro_mean({"a": c, "b": c[:, :1]}) for c in cells]
    assert found == pytest.approx(by_hand)
    assert found.mean() == pytest.approx(macro_mean({"a": cells, "b": cells[:, :, :1]}))
    assert seed_means({"a": [[math.nan]]}).size == 0


def scores(gaps: Mapping[str, float], noise: float = 0.05, n: int = 20) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    patient = rng.normal(0.7, 0.1, (1, n, 1))
    return {
        name: {"a": gap + patient + rng.normal(0, noise, (2, n, 3))} for name, gap in gaps.items()
    }


def test_a_clear_ranking_is_stable_and_a_tie_is_shared() -> None:
    clear = ranking_stability(scores({"low": 0.0, "high": 0.4, "mid": 0.2}), draws=200)
    assert clear.full_ranks.tolist() == [3, 1, 2]
    assert clear.p_first.tolist() == [0, 1, 0]
    assert clear.kendall_tau == 1
    assert (clear.n, clear.n_seeds, clear.draws) == (20, 2, 200)
    table = scores({"x": 0.0})["x"]
    tied = ranking_stability({"x": table, "y": table}, draws=50)
    assert tied.rank_share.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert math.isnan(tied.kendall_tau)
    three = ranking_stability({"x": table, "y": table, "z": table}, draws=50)
    assert three.rank_share == pytest.approx(np.full((3, 3), 1 / 3))


def test_rank_shares_are_a_doubly_stochastic_table_and_follow_the_names() -> None:
    table = scores({"x": 0.0, "y": 0.004, "z": 0.008})
    found = ranking_stability(table, seed=2, draws=300)
    assert found.rank_share.sum(axis=0) == pytest.approx(np.ones(3))
    assert found.rank_share.sum(axis=1) == pytest.approx(np.ones(3))
    assert 0 < found.kendall_tau < 1
    turned = ranking_stability({k: table[k] for k in ("z", "x", "y")}, seed=2, draws=300)
    assert turned.rank_share == pytest.approx(found.rank_share[[2, 0, 1]])


def test_strategies_on_different_cases_are_refused() -> None:
    table = scores({"x": 0.0, "y": 0.1})
    table["y"]["a"] = table["y"]["a"].copy()
    table["y"]["a"][:, 3, 0] = np.nan
    with pytest.raises(DataError, match="same cases") as err:
        ranking_stability(table, draws=10)
    assert err.value.where == "y"
    with pytest.raises(DataError, match="two strategies"):
        ranking_stability({"x": table["x"]}, draws=10)
    nothing = {"a": [[math.nan]]}
    with pytest.raises(DataError, match="nothing to rank"):
        ranking_stability({"x": nothing, "y": nothing}, draws=10)
