"""Second opinions: our tests against statsmodels, scikit-posthocs and baycomp (`clbench[stats]`)."""

from __future__ import annotations

import numpy as np
import pytest

from clbench.statistics.corrections import benjamini_hochberg, holm
from clbench.statistics.equivalence import bayes_signed_rank, tost
from clbench.statistics.intervals import detectable_effect, wilson
from clbench.statistics.ranking import wilcoxon_holm

WHY = "is not installed (pip install clbench[stats])"
SEEDS = range(5)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.01, 0.03, shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_corrections_equal_statsmodels(seed: int) -> None:
    oracle = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels " + WHY)
    p = np.random.default_rng(seed).beta(0.5, 2, 3 + 4 * seed)
    assert holm(p) == pytest.approx(oracle.multipletests(p, method="holm")[1], abs=1e-12)
    fdr = oracle.multipletests(p, method="fdr_bh")[1]
    assert benjamini_hochberg(p) == pytest.approx(fdr, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_equivalence_equals_statsmodels(seed: int) -> None:
    oracle = pytest.importorskip("statsmodels.stats.weightstats", reason="statsmodels " + WHY)
    a, b = drawn(seed, 2, 12)
    p, low, high = oracle.ttost_paired(a, b, -0.02, 0.02)
    found = tost(a - b, low=-0.02, high=0.02)
    assert found.p == pytest.approx(p, abs=1e-12)
    assert (found.p_above_low, found.p_below_high) == pytest.approx((low[1], high[1]), abs=1e-12)


@pytest.mark.parametrize(("n", "power"), [(5, 0.8), (12, 0.8), (12, 0.95), (40, 0.5)])
def test_detectable_effect_equals_statsmodels(n: int, power: float) -> None:
    oracle = pytest.importorskip("statsmodels.stats.power", reason="statsmodels " + WHY)
    effect = detectable_effect(n, power=power)
    assert oracle.TTestPower().power(effect, n, 0.05) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (31, 40)])
def test_proportions_equal_statsmodels(k: int, n: int) -> None:
    oracle = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels " + WHY)
    found, expected = wilson(k, n), oracle.proportion_confint(k, n, method="wilson")
    # statsmodels gives a rounded bound where none of the n, or all, are right
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_pairwise_wilcoxon_equals_scikit_posthocs(seed: int) -> None:
    oracle = pytest.importorskip("scikit_posthocs", reason="scikit-posthocs " + WHY)
    scores = drawn(seed, 15, 4) + np.array([0, 0.01, 0.02, 0.05])
    bars = wilcoxon_holm({f"m{k}": scores[:, k] for k in range(4)})
    order = [int(name[1:]) for name in bars.names]
    pairs = oracle.posthoc_wilcoxon(list(scores.T), p_adjust="holm").to_numpy()
    off = ~np.eye(4, dtype=bool)
    assert bars.p_adjusted[off] == pytest.approx(pairs[np.ix_(order, order)][off], abs=1e-9)


@pytest.mark.parametrize("rope", [0.01, 0.03])
def test_posterior_equals_baycomp_live(rope: float) -> None:
    oracle = pytest.importorskip("baycomp", reason="baycomp " + WHY)
    d = drawn(3, 12)
    found = bayes_signed_rank(d, rope=rope, seed=0)
    expected = oracle.SignedRankTest.probs(np.zeros(12), d, rope=rope, random_state=1)
    b, a = expected[0], expected[-1]  # its first number is of its first argument ahead
    assert (found.p_a, found.p_b) == pytest.approx((a, b), abs=0.01)
