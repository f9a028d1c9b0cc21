"""Splits drawn by rule: by patient, in blocks that never meet, and only from cases that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.errors import SpecError
from clbench.spec.benchmark import Source
from clbench.spec.splits import Draw, Split

SOURCE = Source(
    name="a", title="A", layout="nnunet", labels={1: "spleen", 2: "liver"},
    patient=r"(P\d+)_.*",
)  # fmt: skip
CASES = [f"P{p}_{scan}" for p in range(30) for scan in ("art", "ven")]
RULE = Draw(seed=3, train=4, validation=2, test=3)


def drawn(rule: Draw, cases: list[str] = CASES, **more: Any) -> Split:
    return Split(name="s", draw=rule).resolve(cases, patient=SOURCE.patient_of, **more)


def patients(cases: tuple[str, ...]) -> set[str]:
    return {SOURCE.patient_of(c) for c in cases}


def test_patients_are_counted_and_never_divided() -> None:
    got = drawn(RULE)
    parts = [patients(p) for p in (got.train, got.validation, got.test)]
    assert [len(p) for p in parts] == [4, 2, 3]
    assert [len(p) for p in (got.train, got.validation, got.test)] == [8, 4, 6]  # both scans
    assert len(set.union(*parts)) == 9
    assert got.draw is None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.tuples(*[st.integers(1, 4)] * 3))
def test_blocks_never_share_a_patient(seed: int, sizes: tuple[int, int, int]) -> None:
    train, validation, test = sizes
    rule = Draw(seed=seed, train=train, validation=validation, test=test)
    blocks = [patients(drawn(replace(rule, part=p)).cases) for p in (1, 2)]
    assert not blocks[0] & blocks[1]
    assert [len(b) for b in blocks] == [sum(sizes)] * 2


def test_the_order_of_the_folder_and_further_parts_change_nothing() -> None:
    assert drawn(RULE, CASES[::-1]) == drawn(RULE)
    assert drawn(replace(RULE, seed=4)) != drawn(RULE)
    # the draw is this one on every machine: a hash of seed and patient, no generator
    assert drawn(Draw(seed=1, train=1, test=1), ["P1_x", "P2_x", "P3_x"]).train == ("P3_x",)


def test_only_cases_that_fit_are_drawn_and_no_more_are_looked_at() -> None:
    asked: list[str] = []

    def fits(case: str) -> bool:
        asked.append(case)
        return case.endswith("ven") and case != "P7_ven"

    rule = Draw(seed=3, train=2, test=1, needs=("liver",))
    got = drawn(rule, fits=fits)
    assert len(got.cases) == 3
    assert all(c.endswith("ven") for c in got.cases)
    assert len(asked) < len(CASES)


def test_cases_left_out_are_never_drawn() -> None:
    rule = replace(RULE, train=12, validation=0, test=12)
    plain = drawn(rule)
    got = drawn(replace(rule, without=tuple(c for c in CASES if c.endswith("art"))))
    assert all(c.endswith("ven") for c in got.cases)
    assert patients(got.cases) == patients(plain.cases)
    whole = drawn(replace(rule, without=(plain.train[0], plain.train[1])))
    assert not patients(plain.train[:1]) & patients(whole.cases)


def test_only_the_cases_named_are_drawn() -> None:
    among = tuple(c for c in CASES if c.endswith("art"))
    got = drawn(replace(RULE, among=among))
    assert set(got.cases) <= set(among)
    assert drawn(replace(RULE, among=tuple(CASES))) == drawn(RULE)
    with pytest.raises(SpecError, match="too few patients"):
        drawn(replace(RULE, among=among[:3]))


def test_too_few_patients_are_counted() -> None:
    with pytest.raises(SpecError) as err:
        drawn(replace(RULE, part=4, needs=("liver",)))
    for words in ("at least 36 (part 4 of 9 each) that hold liver", "30", "--split"):
        assert words in str(err.value)


def test_a_case_without_a_patient_is_named() -> None:
    with pytest.raises(SpecError, match="does not match the source's `patient`") as err:
        drawn(RULE, [*CASES, "stray"])
    assert "stray" in str(err.value)


@pytest.mark.parametrize(
    "bad", [{"train": -1}, {"test": 0}, {"validation": -1}, {"part": 0}], ids=str
)
def test_ranges(bad: dict[str, int]) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(bad))} must be a whole number at least"):
        replace(RULE, **bad)


def test_a_split_lists_or_draws() -> None:
    with pytest.raises(SpecError, match="not both"):
        Split(name="s", train=("1",), test=("2",), draw=RULE)
    listed = Split(name="s", train=("1",), test=("2",))
    assert listed.resolve(["5"], patient=str) is listed


@pytest.mark.parametrize(("pattern", "says"), [("P(", "no regular"), ("P.*", "one group")])
def test_a_patient_pattern_is_checked(pattern: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        replace(SOURCE, patient=pattern)
