"""Words: each row of the table of verdicts, and the rows that must not be reached."""

from __future__ import annotations

import math

import pytest

from clbench.statistics.verdicts import (
    Verdict,
    holds_beyond_runs,
    smallest_sample,
    verdict_of,
)

UNDECIDED = dict(  # noqa: C408  # names of arguments
    estimate=0.01, p=0.4, p_low=0.3, p_high=0.6, low=-0.03, high=0.05
)


def changed(**numbers: float) -> dict[str, float]:
    return UNDECIDED | numbers


ROWS = [
    (UNDECIDED, "undecided", "undecided"),
    (changed(p=math.nan), "not testable", "not testable"),
    (changed(p_low=0.01), "undecided, not worse by the margin", "keeps"),
    (changed(p_high=0.01), "undecided, not better by the margin", "undecided"),
    (changed(p_low=0.05, p_high=0.05), "equivalent", "keeps"),
    (changed(p=0.05, p_low=0.05, low=0.0), "better", "gains"),
    (
        changed(p=0.01, p_low=0.01, p_high=0.04, low=0.0, high=0.02),
        "better, by less than the margin",
        "gains",
    ),
    (
        changed(estimate=0.5, p=0.01, p_low=0.01, p_high=1.0, low=0.4, high=0.6),
        "better, by more than the margin",
        "gains",
    ),
    (
        changed(estimate=0.5, p=0.01, p_low=0.01, p_high=1.0, low=0.02, high=0.6),
        "better",
        "gains",
    ),
    (
        changed(estimate=-0.5, p=0.01, p_high=0.01, p_low=1.0, low=-0.6, high=-0.4),
        "worse, by more than the margin",
        "forgets, by more than the margin",
    ),
    (
        changed(estimate=-0.01, p=0.01, p_high=0.01, p_low=0.01, low=-0.02, high=0.0),
        "worse, by less than the margin",
        "forgets, less than the margin",
    ),
    (
        changed(estimate=-0.03, p=0.01, p_high=0.01, p_low=1.0, low=-0.05, high=0.0),
        "worse",
        "forgets",
    ),
]


@pytest.mark.parametrize(("numbers", "difference", "change"), ROWS)
def test_every_word(numbers: dict[str, float], difference: str, change: str) -> None:
    assert str(verdict_of(**numbers, alpha=0.05, margin=0.02)) == difference
    assert str(verdict_of(**numbers, alpha=0.05, margin=0.02, kind="change")) == change


@pytest.mark.parametrize(
    ("alpha", "n"), [(0.05, 6), (0.01, 8), (0.0625, 5), (0.25, 3), (0.001, 11)]
)
def test_smallest_sample(alpha: float, n: int) -> None:
    assert smallest_sample(alpha) == n
    assert 2.0 ** (1 - n) <= alpha < 2.0 ** (2 - n)


@pytest.mark.parametrize(
    ("word", "yes", "no"),
    [
        ("better", (0.001, 0.3), (-0.001, 0.3)),
        ("gains", (0.001, 0.3), (0.0, 0.3)),
        ("worse", (-0.3, -0.001), (-0.3, 0.001)),
        ("forgets", (-0.3, -0.001), (math.nan, math.nan)),
        ("equivalent", (-0.019, 0.019), (-0.019, 0.02)),
        ("keeps", (-0.019, 0.3), (-0.02, 0.3)),
    ],
)
def test_scope(word: str, yes: tuple[float, float], no: tuple[float, float]) -> None:
    verdict = Verdict(word=word)  # type: ignore[arg-type]
    assert holds_beyond_runs(verdict, low=yes[0], high=yes[1], margin=0.02)
    assert not holds_beyond_runs(verdict, low=no[0], high=no[1], margin=0.02)
    assert not holds_beyond_runs(Verdict(word="undecided"), low=0.1, high=0.2, margin=0.02)
