"""Families by max-T: golden numbers, brute force, and promises about p, interval and word."""

from __future__ import annotations

import itertools
import json
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from locations import GOLDEN_FILES
from scipy import stats as scipy_stats

from clbench.errors import DataError
from clbench.statistics import max_t
from clbench.statistics.corrections import holm
from clbench.statistics.max_t import Family, FamilyComparison, compare_family
from clbench.statistics.sample_size import detectable_difference
from clbench.statistics.sign_patterns import SignPatterns
from clbench.statistics.verdicts import LESS, MORE, NOT_BETTER, NOT_WORSE, THESE_RUNS

CASES: list[dict[str, Any]] = json.loads((GOLDEN_FILES / "max_t.json").read_text(encoding="utf-8"))[
    "cases"
]
FAMILIES = [c for c in CASES if c["kind"] in ("family", "own")]
Table = dict[str, np.ndarray]


def table_of(lists: dict[str, Any]) -> Table:
    return {name: np.array(values, dtype=float) for name, values in lists.items()}


def number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def near(value: float | str | None, *, absolute: float = 0.0, relative: float = 0.0) -> Any:
    return pytest.approx(number(value), abs=absolute, rel=relative, nan_ok=True)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda c: c["name"])
def test_golden_numbers(case: dict[str, Any]) -> None:
    expected, exact = case["expected"], case["expected"]["exact"]
    family = compare_family(
        [table_of(c["table"]) for c in case["family"]],
        alpha=case["alpha"],
        margin=case["margin"],
        kind="change" if case["kind"] == "own" else "difference",
    )
    assert family.m == expected["m"]
    if family.m:
        assert (family.exact, family.patterns) == (exact, expected["patterns"])
        critical = number(expected["critical"])
        if math.isfinite(critical):
            assert family.critical == near(critical, relative=1e-7 if exact else 0.03)
    for found, e in zip(family.comparisons, expected["comparisons"], strict=True):
        assert found.mean.n == e["n"]
        assert found.mean.estimate == near(e["estimate"], absolute=1e-9)
        assert found.mean.standard_error == near(e["se"], absolute=1e-9)
        assert found.mean.df == near(e["df"], relative=1e-7)
        for value, key in (
            (found.p, "p"),
            (found.p_unadjusted, "p_unadjusted"),
            (found.p_low, "p_not_above_minus_margin"),
            (found.p_high, "p_not_below_margin"),
        ):
            p = number(e[key])
            sampling = 0.0 if math.isnan(p) else 0.0015 + 4 * math.sqrt(p * (1 - p) / 100_000)
            assert value == near(p, absolute=1e-12 if exact else sampling), key
        width = number(e["high"]) - number(e["low"])
        ends = 1e-8 if exact or math.isnan(width) else 0.03 * width
        assert found.low == near(e["low"], absolute=ends)
        assert found.high == near(e["high"], absolute=ends)
        if exact:
            assert (found.low_open, found.high_open) == (e["low_open"], e["high_open"])
        assert str(found.verdict) == e["verdict"]
        if "level" in e:
            assert found.level == near(e["level"], relative=1e-6)
            assert found.over_runs == near(e["half_width_new_runs"], absolute=1e-7)
            assert (not found.verdict.scope) == e["beyond_these_runs"]
        if "level_left" in e:
            assert found.needed is not None
            assert found.level_left == near(e["level_left"], relative=1e-6 if exact else 0.1)
            for value, key in (
                (found.needed.difference, "patients_for_difference"),
                (found.needed.equivalence, "patients_for_equivalence"),
            ):
                assert value == near(e[key], absolute=1.0, relative=0.0 if exact else 0.06)
        elif case["kind"] == "family":
            assert found.needed is None


def statistic(y: np.ndarray, signs: np.ndarray) -> float:
    """|theta| / sqrt(theta² + V), class by class and patient by patient, from the definition."""
    v = ~np.isnan(y)
    classes = [c for c in range(y.shape[1]) if v[:, c].any()]
    mean, residual = 0.0, np.zeros(len(y))
    for c in classes:
        n = int(v[:, c].sum())
        flipped = y[:, c] * signs
        m = float(np.nansum(flipped)) / n
        mean += m / len(classes)
        for i in np.flatnonzero(v[:, c]):
            g = math.sqrt(n / (n - 1)) if n > 1 else 0.0
            residual[i] += g * (flipped[i] - m) / (n * len(classes))
    variance = float((residual**2).sum())
    whole = mean**2 + variance
    return abs(mean) / math.sqrt(whole) if whole > 1e-30 else 0.0


def step_down(tables: list[np.ndarray], mark: float) -> np.ndarray:
    """Adjusted p by plain loops over all sign patterns."""
    n = len(tables[0])
    y = [np.round(t - mark, 12) for t in tables]
    observed = np.array([statistic(t, np.ones(n)) for t in y])
    order = np.argsort(-observed, kind="stable")
    hits = np.zeros(len(y))
    for pattern in itertools.product((1.0, -1.0), repeat=n):
        flipped = np.array([statistic(t, np.array(pattern)) for t in y])
        for j, k in enumerate(order):
            hits[k] += flipped[order[j:]].max() >= observed[k] - 1e-10
    p = hits / 2**n
    p[order] = np.maximum.accumulate(p[order])
    return p


@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_loops_over_all_patterns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m = 6 + seed % 2, 3
    tables = [rng.normal(0.02 * k, 0.03, (n, 3)).round(2) for k in range(m)]
    for t in tables:
        t[rng.random(t.shape) < 0.15] = np.nan
        t[np.isnan(t).all(axis=1), 0] = 0.01
    tables[-1] = np.zeros_like(tables[-1]) if seed == 3 else tables[-1]
    family = compare_family([{"a": t} for t in tables])
    assert [c.p for c in family.comparisons] == pytest.approx(step_down(tables, 0.0), abs=1e-12)
    for c, above in zip(family.comparisons, step_down(tables, -0.02), strict=True):
        if c.mean.estimate > -0.02:
            assert c.p_low == pytest.approx(
                min(above, c.p if c.mean.estimate > 0 else 1.0), abs=1e-12
            )


def test_one_complete_set_is_the_permutation_test_of_scipy() -> None:
    d = np.random.default_rng(3).normal(0.02, 0.03, 9)
    (found,) = compare_family([{"a": d[:, None]}]).comparisons
    theirs = scipy_stats.permutation_test(
        (d,),
        lambda x: abs(scipy_stats.ttest_1samp(x, 0).statistic),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
    )
    assert found.p == pytest.approx(theirs.pvalue, abs=1e-12)
    t = found.mean.estimate / found.mean.standard_error
    assert t == pytest.approx(scipy_stats.ttest_1samp(d, 0).statistic)


def random_family(seed: int, *, seeds: int = 1) -> list[Table]:
    """Two data sets with holes; equal, constant, shifted and copied comparisons among others."""
    rng = np.random.default_rng(seed)
    sizes = {"a": int(rng.integers(4, 7)), "b": int(rng.integers(2, 5))}
    absent = {name: rng.random((n, 2)) < 0.15 for name, n in sizes.items()}
    tables: list[Table] = []
    for _ in range(int(rng.integers(1, 6))):
        shift = rng.choice([0.0, 0.01, 0.02, -0.02, 0.05, 0.3])
        spread = rng.choice([0.0, 0.003, 0.01, 0.04])
        table = {}
        for name, n in sizes.items():
            values = (shift + rng.normal(0, 1, (seeds, n, 2)) * spread).round(4)
            values[:, absent[name]] = np.nan
            table[name] = values
        tables.append(table)
    return [*tables, tables[0]] if seed % 3 == 0 else tables


def assert_consistent(c: FamilyComparison, *, alpha: float, margin: float) -> None:
    """p, interval and word say the same."""
    word, detail = c.verdict.word, c.verdict.detail
    assert c.p >= c.p_unadjusted - 1e-12
    differs, inside = c.p <= alpha, c.p_low <= alpha and c.p_high <= alpha
    assert (word in ("better", "worse")) == (differs and c.mean.estimate != 0)
    assert (word == "equivalent") == (inside and not differs)
    assert (detail == NOT_WORSE) == (word == "undecided" and c.p_low <= alpha)
    assert (detail == NOT_BETTER) == (word == "undecided" and c.p_high <= alpha)
    if math.isnan(c.low):
        return
    assert c.low <= c.mean.estimate + 1e-12
    assert c.mean.estimate <= c.high + 1e-12

    def covers(mark: float) -> bool:
        below = c.low < mark or (c.low == mark and not c.low_open)
        return below and (mark < c.high or (mark == c.high and not c.high_open))

    assert covers(0.0) != differs
    assert ((not covers(-margin)) and c.mean.estimate > -margin) == (c.p_low <= alpha)
    assert ((not covers(margin)) and c.mean.estimate < margin) == (c.p_high <= alpha)
    if detail == MORE:
        assert min(abs(c.low), abs(c.high)) > margin
    if detail == LESS:
        assert max(abs(c.low), abs(c.high)) <= margin


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0.05, 0.01, 0.1]),
    margin=st.sampled_from([0.02, 0.005]),
    seeds=st.sampled_from([1, 3]),
)
def test_p_interval_and_word_never_contradict_each_other(
    seed: int, alpha: float, margin: float, seeds: int
) -> None:
    family = compare_family(random_family(seed, seeds=seeds), alpha=alpha, margin=margin)
    for c in family.comparisons:
        if c.verdict.word == "not testable":
            assert 2.0 ** (1 - c.mean.n) > alpha
            assert math.isnan(c.p)
        else:
            assert_consistent(c, alpha=alpha, margin=margin)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_holm_is_as_consistent(seed: int) -> None:
    for c in compare_family(random_family(seed), correction="holm").comparisons:
        if c.verdict.word != "not testable":
            assert_consistent(c, alpha=0.05, margin=0.02)


def mirrored(c: FamilyComparison) -> tuple[Any, ...]:
    return (-c.mean.estimate, c.p, c.p_high, c.p_low, -c.high, -c.low, c.high_open, c.low_open)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_exchanging_the_strategies_mirrors_the_result(seed: int) -> None:
    tables = random_family(seed)
    there = compare_family(tables).comparisons
    back = compare_family([{k: -v for k, v in t.items()} for t in tables]).comparisons
    for c, d in zip(there, back, strict=True):
        assert mirrored(c) == pytest.approx(
            (d.mean.estimate, d.p, d.p_low, d.p_high, d.low, d.high, d.low_open, d.high_open),
            abs=1e-9, nan_ok=True,
        )  # fmt: skip
        swapped = {"better": "worse", "worse": "better"}.get(c.verdict.word, c.verdict.word)
        assert d.verdict.word == swapped


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_patients_sets_and_comparisons_does_not_matter(seed: int) -> None:
    tables = random_family(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tables))
    place = {name: rng.permutation(v.shape[-2]) for name, v in tables[0].items()}
    shuffled = [
        {name: tables[k][name][..., place[name], ::-1] for name in ("b", "a")} for k in order
    ]
    one, other = compare_family(tables), compare_family(shuffled)
    assert one.m == other.m
    for position, k in enumerate(order):
        c, d = one.comparisons[k], other.comparisons[position]
        assert (c.p, c.p_low, c.p_high, c.low, c.high) == pytest.approx(
            (d.p, d.p_low, d.p_high, d.low, d.high), abs=1e-9, nan_ok=True
        )
        assert c.verdict == d.verdict


def eight(shift: float, seed: int = 0, spread: float = 0.004) -> Table:
    rng = np.random.default_rng(seed)
    return {"a": (shift + rng.normal(0, spread, (8, 2))).round(4)}


def words(family: Family) -> list[str]:
    return [c.verdict.word for c in family.comparisons]


def test_holm_cannot_claim_what_max_t_shows() -> None:
    tables = [eight(0.8, k) for k in range(6)] + [eight(0.0, 9 + k) for k in range(7)]
    assert words(compare_family(tables)) == ["better"] * 6 + ["equivalent"] * 7
    assert words(compare_family(tables, correction="holm")) == ["not testable"] * 13
    assert words(compare_family(tables[:6], correction="holm")) == ["better"] * 6


def test_holm_is_only_untestable_where_no_data_reach_the_level() -> None:
    """Two comparisons of more patients may be rejected first; then the third needs its own p only."""
    ten = {"a": np.vstack([eight(0.8)["a"], eight(0.8, 1)["a"][:2]])}
    six = {"a": np.where(np.arange(10)[:, None] < 6, ten["a"], np.nan)}
    family = compare_family([ten, ten, six], correction="holm")
    assert words(family) == ["better", "better", "better"]
    assert family.comparisons[2].p == pytest.approx(2.0**-5)
    assert words(compare_family([six, six], correction="holm")) == ["not testable"] * 2


def test_what_holm_could_reach_is_what_the_best_data_reach() -> None:
    """Beside every choice of comparisons that are as small as they can be."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = rng.integers(6, 11, rng.integers(2, 6))
        least = 2.0 ** (1 - n)
        tests = SimpleNamespace(
            cells=[SimpleNamespace(n=int(v)) for v in n], patterns=SignPatterns(int(n.max()))
        )
        for k in range(len(n)):
            reached = []
            for small in itertools.product([False, True], repeat=len(n)):
                p = np.where(small, least, 1.0)
                p[k] = least[k]
                reached.append(holm(p)[k])
            found = max_t._Tests._best_holm(tests, k)  # type: ignore[arg-type]
            assert min(1.0, found) == pytest.approx(min(reached))


@pytest.mark.parametrize("order", [*itertools.permutations((0.1, 0.2, -0.3))])
def test_effects_that_cancel_are_no_difference_in_any_order(order: tuple[float, ...]) -> None:
    (found,) = compare_family([{"a": np.tile(order, (8, 1))}]).comparisons
    assert (found.p, found.verdict.word) == (1.0, "equivalent")


def test_few_nonzero_patients_are_no_reason_for_not_testable() -> None:
    d = np.zeros((8, 1))
    d[:3] = 0.01
    (found,) = compare_family([{"a": d}]).comparisons
    assert found.verdict.word == "equivalent"
    assert found.p > 0.05


def test_too_few_patients_leave_the_family() -> None:
    five = {"a": np.where(np.arange(8)[:, None] < 5, eight(0.8)["a"], np.nan)}
    alone = compare_family([eight(0.8), eight(0.0, 1)])
    beside = compare_family([eight(0.8), eight(0.0, 1), five])
    assert (beside.m, words(beside)[2]) == (2, "not testable")
    assert [c.p for c in beside.comparisons[:2]] == [c.p for c in alone.comparisons]
    assert beside.comparisons[2].ahead[:2] == (5, 5)
    assert math.isnan(beside.comparisons[2].p)


def test_scope_falls_only_where_three_runs_carry_the_word() -> None:
    base = eight(0.3)["a"]
    agree = {"a": np.stack([base + x for x in (0.0, 0.001, -0.001)])}
    differ = {"a": np.stack([base + x for x in (0.0, 0.3, -0.29)])}
    two = {"a": agree["a"][:2]}
    scopes = [compare_family([t]).comparisons[0].verdict.scope for t in (agree, differ, two)]
    assert scopes == ["", THESE_RUNS, THESE_RUNS]


@pytest.mark.parametrize(
    ("runs", "scopes"),
    [
        ((0.0, 0.001, -0.001), ("", "")),
        ((0.0, 0.05, -0.05), ("", THESE_RUNS)),  # above 0 over new runs, not above the margin
        ((0.0, 0.3, -0.29), (THESE_RUNS, "")),
    ],
)
def test_how_much_better_has_a_scope_of_its_own(
    runs: tuple[float, ...], scopes: tuple[str, str]
) -> None:
    table = {"a": np.stack([eight(0.3)["a"] + x for x in runs])}
    (found,) = compare_family([table], margin=0.2).comparisons
    assert str(found.verdict) == "better, by more than the margin"
    assert (found.verdict.scope, found.verdict.detail_scope) == scopes
    (mirrored,) = compare_family([{"a": -table["a"]}], margin=0.2, kind="change").comparisons
    assert mirrored.verdict.word == "forgets"
    assert (mirrored.verdict.scope, mirrored.verdict.detail_scope) == scopes


def test_how_much_less_has_a_scope_of_its_own() -> None:
    base = eight(0.3)["a"]
    found = [
        compare_family([{"a": np.stack([base + x for x in runs])}], margin=0.4).comparisons[0]
        for runs in ((0.0, 0.001, -0.001), (0.0, 0.05, -0.05))
    ]
    assert [str(c.verdict) for c in found] == ["better, by less than the margin"] * 2
    assert [(c.verdict.scope, c.verdict.detail_scope) for c in found] == [
        ("", ""),
        ("", THESE_RUNS),
    ]


def test_plans_of_holm_s_correction_share_out_the_level() -> None:
    tables = [eight(0.012, seed, spread=0.03) for seed in range(5)]
    family = compare_family(tables, correction="holm")
    left = [c for c in family.comparisons if not math.isnan(c.level_left)]
    assert len(left) > 1
    assert [c.level_left for c in left] == [0.05 / len(left)] * len(left)


def test_rounding_of_a_mean_of_zero_is_no_difference() -> None:
    # two sets of one value each: flipped against each other their means cancel up to rounding
    for n in range(5, 9):
        whole = {"a": np.full((n, 1), 0.9), "b": np.full((1, 1), 0.9)}
        (found,) = compare_family([whole]).comparisons
        assert found.p == 2.0**-n


def test_an_undecided_comparison_says_how_many_patients_would_decide() -> None:
    (found,) = compare_family([eight(0.012, spread=0.03)]).comparisons
    assert found.verdict.word == "undecided"
    assert found.needed is not None
    assert found.mean.n < min(found.needed.difference, found.needed.equivalence)


def test_a_lost_structure_without_any_patient_is_left_out() -> None:
    d = eight(0.05)["a"]
    with_absent = np.column_stack([d, np.full(8, np.nan)])
    one, other = compare_family([{"a": d}]), compare_family([{"a": with_absent}])
    assert one.comparisons == other.comparisons


def test_many_patients_are_sampled_and_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    table = {"a": rng.normal(0.01, 0.03, (25, 2))}
    one, again = (compare_family([table], draws=2000, seed=1) for _ in range(2))
    assert not one.exact
    assert one.patterns == 2000
    assert one.comparisons == again.comparisons
    (sure,) = compare_family([{"a": np.full((25, 1), 0.3)}], draws=2000).comparisons
    assert sure.p == pytest.approx(1 / 2000)


def test_thirteen_comparisons_of_sixteen_patients_take_well_under_a_second() -> None:
    tables = [eight(0.01 * k, k) | {"b": eight(0.0, 50 + k)["a"]} for k in range(13)]
    begin = time.process_time()
    family = compare_family(tables)
    assert family.patterns == 65_536
    assert time.process_time() - begin < 2  # 0.4 s on one core of 2020


def test_families_over_different_patients_are_refused() -> None:
    with pytest.raises(DataError, match="different patients"):
        compare_family([eight(0.0), {"a": eight(0.0)["a"][:7]}])


def test_an_empty_family() -> None:
    family = compare_family([])
    assert (family.m, family.comparisons) == (0, ())


def test_detectable_stands_for_the_level_of_its_family() -> None:
    for c in compare_family([eight(0.01, k, spread=0.03) for k in range(4)]).comparisons:
        assert c.level < 0.05
        assert c.detectable == pytest.approx(detectable_difference(
            standard_error=c.mean.standard_error, df=c.mean.df, level=c.level
        ))  # fmt: skip


def test_an_undecided_difference_above_detectable_says_so() -> None:
    (found,) = compare_family([eight(0.012, spread=0.03)]).comparisons
    assert found.verdict.word == "undecided"
    size = abs(found.mean.estimate)
    for detectable, beyond in ((size / 2, True), (2 * size, False)):
        from dataclasses import replace

        assert replace(found, detectable=detectable).beyond_detectable is beyond


def test_patients_ahead_go_the_way_of_the_mean() -> None:
    values = -np.array([[0.1, np.nan], [0.2, 0.4], [-0.05, -0.05], [0.5, 0.5], [0.25, 0.25]])
    (found,) = compare_family([{"a": values}]).comparisons
    assert found.ahead == (4, 5, pytest.approx(0.1), pytest.approx(0.5))
    (back,) = compare_family([{"a": -values}]).comparisons
    assert back.ahead == found.ahead


def test_intervals_of_holm_s_correction_share_out_the_level() -> None:
    tables = [eight(0.3, 0), eight(0.31, 1)]
    for table, c in zip(tables, compare_family(tables, correction="holm").comparisons, strict=True):
        (alone,) = compare_family([table], alpha=0.025).comparisons
        assert (c.low, c.high) == pytest.approx((alone.low, alone.high))


def test_holm_with_few_sampled_patterns_is_not_testable() -> None:
    rng = np.random.default_rng(0)
    tables = [{"a": rng.normal(0.0, 0.03, (25, 2))} for _ in range(6)]
    assert words(compare_family(tables, correction="holm", draws=100)) == ["not testable"] * 6


def test_the_seed_draws_the_patterns() -> None:
    table = {"a": np.random.default_rng(0).normal(0.003, 0.03, (25, 2))}
    p = [compare_family([table], draws=2000, seed=seed).comparisons[0].p for seed in (0, 1)]
    assert p[0] != p[1]
