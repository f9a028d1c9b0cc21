"""Words for a tested difference, from its p-values and its interval alone.

`better` and `worse` are claims about 0, `equivalent` and `keeps` about the margin; anything else is
`undecided`. `not testable` is left for samples in which no data could reach the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Word = Literal[
    "better", "worse", "equivalent", "forgets", "gains", "keeps", "undecided", "not testable",
    "shared",
]  # fmt: skip
Kind = Literal["difference", "change"]
"""What is tested: two strategies against each other, or one against its own earlier scores."""
THESE_RUNS = "for these training runs"
MORE, LESS = "by more than the margin", "by less than the margin"
NOT_WORSE, NOT_BETTER = "not worse by the margin", "not better by the margin"
_STRICT = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One comparison in words."""

    word: Word
    """The claim."""
    detail: str = ""
    """`by more than the margin`, `by less than the margin`, or what an undecided one rules out."""
    scope: str = ""
    """`for these training runs` where the runs do not support more; else empty."""
    detail_scope: str = ""
    """The same of the detail, where it has another scope than the word: `better` may hold for new
    training runs, and by how much for these alone."""

    def __str__(self) -> str:
        """Word and detail: `better, by less than the margin`."""
        return ", ".join(x for x in (self.word, self.detail) if x)


NOT_TESTABLE = Verdict(word="not testable")
"""Too few patients for any data to reach the level."""


def smallest_sample(alpha: float) -> int:
    """Fewest patients with which a two-sided sign-flip test can reach `alpha`: 2^(1-n) <= alpha.

    Example:
        >>> from clbench.statistics.verdicts import smallest_sample
        >>> smallest_sample(0.05), smallest_sample(0.01)
        (6, 8)
    """
    return math.ceil(1 - math.log2(alpha) - _STRICT)


def verdict_of(
    *,
    estimate: float,
    p: float,
    p_low: float,
    p_high: float,
    low: float,
    high: float,
    alpha: float,
    margin: float,
    kind: Kind = "difference",
) -> Verdict:
    """The word for a difference between two strategies, or for a strategy's own change.

    Args:
        estimate: difference (or change).
        p: adjusted p of "no difference"; nan = not tested.
        p_low: adjusted p of "the difference is -margin or less".
        p_high: adjusted p of "the difference is +margin or more".
        low: lower end of the simultaneous interval; nan = none.
        high: upper end.
        alpha: level.
        margin: half-width of "equivalent"; a smaller loss is "keeps".
        kind: `difference` or `change`.

    Returns:
        The verdict without its scope, see `clbench.statistics.max_t`.

    Example:
        >>> from clbench.statistics.verdicts import verdict_of
        >>> shown = dict(estimate=0.5, p=0.01, p_low=0.01, p_high=1.0, low=0.4, high=0.6)
        >>> str(verdict_of(**shown, alpha=0.05, margin=0.02))
        'better, by more than the margin'
    """
    if math.isnan(p):
        return NOT_TESTABLE
    differs, above, below = p <= alpha, p_low <= alpha, p_high <= alpha
    if differs and estimate < 0:
        detail = MORE if high < -margin - _STRICT else LESS if above else ""
        if kind == "change":
            return Verdict(word="forgets", detail=detail.removeprefix("by ") if above else detail)
        return Verdict(word="worse", detail=detail)
    if kind == "change":
        gains = differs and estimate > 0
        return Verdict(word="gains" if gains else "keeps" if above else "undecided")
    if differs and estimate > 0:
        detail = MORE if low > margin + _STRICT else LESS if below else ""
        return Verdict(word="better", detail=detail)
    if above and below:
        return Verdict(word="equivalent")
    return Verdict(word="undecided", detail=NOT_WORSE if above else NOT_BETTER if below else "")


def holds_beyond_runs(verdict: Verdict, *, low: float, high: float, margin: float) -> bool:
    """Whether an interval over new training runs is on the verdict's side.

    Args:
        verdict: the word.
        low: lower end over patients and new runs; nan = none.
        high: upper end.
        margin: half-width of "equivalent".

    Example:
        >>> from clbench.statistics.verdicts import Verdict, holds_beyond_runs
        >>> holds_beyond_runs(Verdict(word="better"), low=0.01, high=0.2, margin=0.02)
        True
        >>> holds_beyond_runs(Verdict(word="better"), low=-0.01, high=0.2, margin=0.02)
        False
    """
    return {
        "better": low > 0, "gains": low > 0, "worse": high < 0, "forgets": high < 0,
        "equivalent": low > -margin and high < margin, "keeps": low > -margin,
    }.get(verdict.word, False)  # fmt: skip


def detail_holds_beyond_runs(verdict: Verdict, *, low: float, high: float, margin: float) -> bool:
    """Whether an interval over new training runs is on the detail's side of the margin.

    Args:
        verdict: the word and its detail.
        low: lower end over patients and new runs; nan = none.
        high: upper end.
        margin: half-width of "equivalent".

    Example:
        >>> from clbench.statistics.verdicts import MORE, Verdict, detail_holds_beyond_runs
        >>> detail_holds_beyond_runs(
        ...     Verdict(word="better", detail=MORE), low=0.01, high=0.2, margin=0.02
        ... )
        False
    """
    ahead = verdict.word in ("better", "gains")
    near, far = (low, high) if ahead else (-high, -low)
    return near > margin if verdict.detail == MORE else far < margin
