"""Analysis: all tests of one report in one place.

`clbench.report.significance.tables` prints it, `clbench.report.page.page` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clbench.report.evidence import Evidence, gather
from clbench.report.significance.confirmatory import Comparison, Protocol, confirm
from clbench.report.significance.exploratory import ClassTest, SetTest, by_class, by_set
from clbench.report.significance.forgetting import Own, own_forgetting
from clbench.report.significance.ranking import SetRanking, Stable, rankings, stable


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What a report rests on."""

    evidence: Evidence
    """The runs."""
    protocol: Protocol
    """What was decided before looking."""
    comparisons: list[Comparison]
    """Confirmatory: endpoints by other strategies."""
    own: list[Own]
    """Forgetting of each strategy."""
    classes: list[ClassTest]
    """Exploratory: structure by step by pair."""
    sets: list[SetTest]
    """Exploratory: eval set by pair."""
    rankings: list[SetRanking]
    """Exploratory: all strategies, per eval set."""
    stable: Stable
    """Ranking stability."""


def analyse(results: Path, *, bench: str, ref: str, scoring: str, protocol: Protocol) -> Analysis:
    """Read the runs and make every test.

    Args:
        results: folder of runs.
        bench: benchmark.
        ref: the strategy that all others are compared with.
        scoring: `strict` or `paper`.
        protocol: alpha, margin and numbers of resamples.

    Raises:
        StoreError: see `clbench.report.evidence.gather`.
        UnknownName: no finished run of the reference.
    """
    evidence = gather(results, bench=bench, ref=ref, scoring=scoring)
    return Analysis(
        evidence=evidence,
        protocol=protocol,
        comparisons=confirm(evidence, protocol),
        own=own_forgetting(evidence, protocol),
        classes=by_class(evidence, protocol),
        sets=by_set(evidence, protocol),
        rankings=rankings(evidence, protocol),
        stable=stable(evidence, protocol),
    )
