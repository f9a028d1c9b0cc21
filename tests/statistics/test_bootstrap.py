"""Resampling: strata, seeds, and the stability of a ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from clbench.errors import DataError
from clbench.statistics.bootstrap import (
    draw_resamples,
    ranking_stability,
    resampled,
    seed_means,
)
from clbench.statistics.class_macro import macro_mean, strata


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
