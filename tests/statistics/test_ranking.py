"""Friedman and the bars of all pairs: Demšar's example, the printed Table 10, and scipy."""

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
from clbench.statistics.max_t import compare_family
from clbench.statistics.ranking import (
    block_ranks,
    cliques,
    friedman,
    max_t_pairs,
    rank_reversals,
    tie_groups,
    wilcoxon_holm,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "stats.json").read_text(encoding="utf-8"))
DEMSAR = GOLDEN["friedman_nemenyi_demsar"]
RANKS = np.array(DEMSAR["input"]["ranks"])
TABLE10 = GOLDEN["paper_table10_class_as_unit"]


def test_demsar_friedman() -> None:
    expected = DEMSAR["expected"]
    found = friedman(-RANKS)
    assert block_ranks(-RANKS).mean(axis=0) == pytest.approx(expected["avg_ranks"], abs=1e-9)
    assert found.chi2 == pytest.approx(expected["scipy_chi2_tie_corrected"], abs=1e-9)
    assert found.p == pytest.approx(expected["scipy_p"], abs=1e-9)
    assert found.kendall_w == pytest.approx(expected["pingouin_Kendall_W"], abs=1e-9)


@pytest.mark.parametrize("group", ["all_14", "organs_13"])
def test_printed_table_10(group: str) -> None:
    names = ("LwF", "ILT", "PLOP", "Ours")
    classes = [c for c in TABLE10["input"]["LwF"] if group == "all_14" or c != "Liver tumor"]
    scores = {name: [TABLE10["input"][name][c] for c in classes] for name in names}
    expected = TABLE10["expected"][group]
    omnibus = friedman(np.column_stack([scores[name] for name in names]))
    assert omnibus.chi2 == pytest.approx(expected["friedman_chi2"], abs=1e-9)
    assert omnibus.p == pytest.approx(expected["friedman_p"], abs=1e-9)
    found = wilcoxon_holm(scores)
    assert found.m == 6
    for pair, row in expected["pairs"].items():
        i, j = (found.names.index(name) for name in pair.split("-"))
        assert found.p_adjusted[i, j] == pytest.approx(row["holm_p_6"], abs=1e-12)
    for name, rank in expected["avg_rank"].items():
        assert found.average_ranks[found.names.index(name)] == pytest.approx(rank)
    assert found.cliques == (found.names,)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_friedman_equals_scipy_and_ignores_monotone_changes_per_block(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random((8, 4)), 1)
    if (scores == scores[:, :1]).all():
        return
    found = friedman(scores)
    expected = scipy_stats.friedmanchisquare(*scores.T)
    assert found.chi2 == pytest.approx(expected.statistic, abs=1e-9)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-9)
    changed = friedman(scores**3 * rng.uniform(1, 9, (8, 1)) + 2)
    assert changed.chi2 == pytest.approx(found.chi2)
    assert 0 <= found.kendall_w <= 1 + 1e-12


def test_friedman_edges() -> None:
    level = friedman(np.ones((5, 3)))
    assert (level.p, level.kendall_w) == (1.0, 0.0)
    agreed = friedman(np.tile([0.3, 0.2, 0.1], (6, 1)))
    assert agreed.kendall_w == pytest.approx(1)
    holes = np.vstack([-RANKS, [np.nan, 1, 2, 3]])
    assert friedman(holes).chi2 == friedman(-RANKS).chi2
    for wrong in (np.ones((5, 2)), np.ones((1, 3)), np.full((5, 3), np.nan)):
        with pytest.raises(DataError, match="Friedman"):
            friedman(wrong)
    with pytest.raises(DataError, match="table"):
        block_ranks([1, 2])


def test_wilcoxon_holm_separates_what_differs() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.7, 0.1, 12)
    scores = {
        "far": base - 0.3 + rng.normal(0, 0.01, 12),
        "twin": base + rng.normal(0, 0.01, 12),
        "first": base + rng.normal(0, 0.01, 12),
    }
    found = wilcoxon_holm(scores)
    assert found.names[-1] == "far"
    assert found.cliques == (found.names[:2],)
    assert np.array_equal(found.p_adjusted, found.p_adjusted.T)
    scores["far"] = scores["far"].copy()
    scores["far"][0] = np.nan
    whole = {name: values[1:] for name, values in scores.items()}
    assert np.array_equal(wilcoxon_holm(scores).p_adjusted, wilcoxon_holm(whole).p_adjusted)
    with pytest.raises(DataError):
        wilcoxon_holm({"a": [1, 2], "b": [1, 2, 3]})
    nothing = wilcoxon_holm({"a": [math.nan], "b": [1]})
    assert nothing.m == 0
    assert np.isnan(nothing.average_ranks).all()


def test_many_strategies_are_told_apart_by_few_blocks() -> None:
    """All of 12 blocks say the same, which Holm over 378 pairs cannot hear: 378 · 2 / 2^12 > 0.05."""
    rng = np.random.default_rng(0)
    base = rng.normal(0.7, 0.1, 12)
    scores = {f"m{k}": base + rng.normal(0, 0.01, 12) for k in range(27)}
    scores["far"] = base - 0.6
    scores["m3"] = np.append(scores["m3"][:-1], np.nan)
    whole = {name: values[:-1] for name, values in scores.items()}
    assert wilcoxon_holm(scores).cliques[0] == wilcoxon_holm(scores).names
    found = max_t_pairs(scores)
    assert (found.names[-1], found.m) == ("far", 378)
    assert all("far" not in bar for bar in found.cliques)
    # the same family as that of the tie groups, in the order of the average ranks
    ties = tie_groups([{"": values[None, :, None]} for values in whole.values()])
    p = {(tuple(whole)[i], tuple(whole)[j]): ties.p[a, b]
         for a, i in enumerate(ties.order) for b, j in enumerate(ties.order)}  # fmt: skip
    assert all(
        found.p_adjusted[i, j] == p[a, b]
        for i, a in enumerate(found.names)
        for j, b in enumerate(found.names)
    )
    assert found.average_ranks.tolist() == wilcoxon_holm(scores).average_ranks.tolist()


def test_blocks_that_nobody_shares_rank_nobody() -> None:
    nothing = max_t_pairs({"a": [math.nan, 1.0], "b": [1.0, math.nan]})
    assert (nothing.m, nothing.p_adjusted.tolist()[0][0]) == (0, 1.0)
    assert np.isnan(nothing.average_ranks).all()
    few = max_t_pairs({"a": [0.9] * 5, "b": [0.1, 0.2, 0.1, 0.2, 0.1]})
    assert (few.m, few.cliques) == (0, (("a", "b"),))  # five blocks cannot reach 0.05


@given(st.integers(2, 7), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_cliques_are_all_the_longest_runs_without_a_difference(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.triu(rng.choice([0.01, 0.5], (k, k), p=[0.3, 0.7]), 1)
    p = p + p.T + np.eye(k)
    free = {
        (i, j)
        for i, j in itertools.combinations(range(k), 2)
        if not (p[i : j + 1, i : j + 1] <= 0.05).any()
    }
    longest = {
        (i, j) for i, j in free if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in free)
    }
    assert set(cliques(p)) == longest


def test_strategies_with_holes_of_their_own_are_compared_on_what_they_share() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(0.8, 0.05, (9, 2))
    strategies = [base + shift + rng.normal(0, 0.01, (9, 2)) for shift in (0.1, 0.04, 0.0)]
    strategies[0][:3, 0] = np.nan
    strategies[1][0] = np.nan
    ties = tie_groups([{"btcv": s} for s in strategies])
    assert (ties.order, ties.patients, ties.m) == ((0, 1, 2), 9, 3)
    pairs = [(0, 1), (0, 2), (1, 2)]
    family = compare_family([{"btcv": strategies[i] - strategies[j]} for i, j in pairs])
    assert [ties.p[i, j] for i, j in pairs] == [c.p for c in family.comparisons]
    assert ties.ranks == ((1, 1), (2, 2), (3, 3))


def test_a_strategy_with_few_cells_takes_no_power_from_the_others() -> None:
    rng = np.random.default_rng(7)
    base = rng.normal(0.8, 0.05, (10, 1))
    better, worse = base + 0.05 + rng.normal(0, 0.01, (10, 1)), base
    few = base.copy()
    few[3:] = np.nan
    alone = tie_groups([{"btcv": better}, {"btcv": worse}])
    beside = tie_groups([{"btcv": better}, {"btcv": worse}, {"btcv": few}])
    assert beside.m == 1
    places = [beside.order.index(k) for k in (0, 1)]
    assert beside.p[places[0], places[1]] == alone.p[0, 1]
    apart = base.copy()
    apart[:, 0] = np.nan
    assert tie_groups([{"btcv": better}, {"btcv": apart}]).m == 0


def test_a_reversal_needs_both_claims() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.02, (2, 9, 1))
    inside, outside = [{"in": a}, {"in": b - 0.1}], [{"out": a}, {"out": b + 0.1}]
    both = rank_reversals(inside, outside)
    assert (both.m, both.patients, both.kendall_tau) == (2, 18, -1.0)
    assert both.pairs[0].p <= 0.05
    # one claim alone is none: externally the order turns by chance
    chance = rank_reversals(inside, [{"out": a}, {"out": a + 0.001 * rng.normal(1, 5, (9, 1))}])
    pair = chance.pairs[0]
    assert pair.p_internal <= 0.05 < pair.p_external
    assert pair.p == (pair.p_external if pair.turns else 1.0)
    few = rank_reversals(inside, [{"out": a[:4]}, {"out": b[:4] + 0.1}])
    assert (few.m, few.patients) == (1, 9)
    assert math.isnan(few.pairs[0].p)
    with pytest.raises(DataError):
        rank_reversals(inside, inside)


def test_one_pair_on_one_set_is_the_plain_sign_flip_test() -> None:
    rng = np.random.default_rng(1)
    difference = rng.normal(0.03, 0.03, 8)
    zero, apart = np.zeros((8, 1)), difference[:, None]
    got = rank_reversals([{"in": apart}, {"in": zero}], [{"out": apart[:4]}, {"out": zero[:4]}])
    signs = np.array(list(itertools.product([1, -1], repeat=8)))
    flipped = signs * difference
    t = np.abs(flipped.mean(1)) / flipped.std(1, ddof=1)
    p = np.mean(t >= t[0] - 1e-12)
    assert got.pairs[0].p_internal == pytest.approx(p, abs=1e-12)


def three(seed: int, n: int = 9) -> list[Any]:
    rng = np.random.default_rng(seed)
    base = rng.normal(0.8, 0.05, (n, 2))
    return [base + shift + rng.normal(0, 0.01, (n, 2)) for shift in (0.012, 0.004, 0.0)]


def test_reversals_are_adjusted_over_all_pairs_on_both_sets() -> None:
    inside, outside = three(0), three(1)
    found = rank_reversals([{"in": t} for t in inside], [{"out": t} for t in outside])
    pairs = list(itertools.combinations(range(3), 2))
    family = compare_family(
        [{name: side[i] - side[j]} for name, side in (("in", inside), ("out", outside))
         for i, j in pairs]
    )  # fmt: skip
    p = [c.p for c in family.comparisons]
    assert [pair.p_internal for pair in found.pairs] == p[:3]
    assert [pair.p_external for pair in found.pairs] == p[3:]
    assert p != [c.p_unadjusted for c in family.comparisons]


def test_reversals_are_tested_where_the_level_can_be_reached() -> None:
    inside, outside = three(0), three(1)
    tables = [{"in": t} for t in inside], [{"out": t} for t in outside]
    assert (rank_reversals(*tables).m, rank_reversals(*tables, alpha=0.001).m) == (6, 0)


def test_tie_groups_by_holm() -> None:
    strategies = three(2)
    ties = tie_groups([{"a": s} for s in strategies], correction="holm")
    order = ties.order
    pairs = list(itertools.combinations(range(3), 2))
    family = compare_family(
        [{"a": strategies[order[i]] - strategies[order[j]]} for i, j in pairs], correction="holm"
    )
    assert [ties.p[i, j] for i, j in pairs] == [c.p for c in family.comparisons]
    assert ties.p.tolist() != tie_groups([{"a": s} for s in strategies]).p.tolist()


def test_tie_groups_are_of_their_level() -> None:
    tables = [{"a": s} for s in (three(2)[0] + 0.2, three(2)[2])]
    assert tie_groups(tables).m == 1
    assert tie_groups(tables).groups == ((0,), (1,))
    assert tie_groups(tables, alpha=0.004).groups == ((0,), (1,))  # p is 2 / 2^9 = 0.0039
    assert tie_groups(tables, alpha=0.003).groups == ((0, 1),)
    assert tie_groups(tables, alpha=0.003).m == 0


def test_tie_groups_of_many_patients_are_of_their_level_and_seed() -> None:
    tables = [{"a": s} for s in three(3, n=25)]
    first, again, other = (tie_groups(tables, draws=500, seed=s) for s in (0, 0, 1))
    assert first.p.tolist() == again.p.tolist() != other.p.tolist()
    assert len(first.groups) > 1
    assert len(tie_groups(tables, draws=500, alpha=0.001).groups) == 1  # no p is below 1 / 500


def test_bars_are_of_their_level() -> None:
    base = np.random.default_rng(0).normal(0.7, 0.1, 12)
    scores = {"a": base, "b": base - 0.3 + np.random.default_rng(1).normal(0, 0.01, 12)}
    for test in (wilcoxon_holm, max_t_pairs):
        assert test(scores).cliques == ()
        assert test(scores, alpha=0.0004).cliques == (("a", "b"),)


def test_who_is_better_is_said_by_the_patients_that_both_have() -> None:
    """The later one in the order, whose mean the hard patients lower, is better on those of both."""
    easy = np.array([[0.9]] * 6 + [[0.2]] * 6)
    better = easy + 0.05 + np.random.default_rng(0).normal(0, 0.002, (12, 1))
    without_hard = np.where(np.arange(12)[:, None] < 8, easy, np.nan)
    ties = tie_groups([{"x": better}, {"x": without_hard}])
    assert ties.order == (1, 0)  # by their own means
    assert ties.p[0, 1] <= 0.05
    assert ties.ranks == ((2, 2), (1, 1))
