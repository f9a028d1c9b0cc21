"""Analysis: all tests of one report in one place, each made once.

`clbench.report.significance.tables` prints it, `clbench.report.page.page` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from clbench.report.significance.confirmatory import Comparison, confirm
from clbench.report.significance.exploratory import ClassTest, SetTest, by_class, by_set
from clbench.report.significance.forgetting import Own, own_forgetting
from clbench.report.significance.ranking import SetRanking, Stable, Tied, rankings, stable, tied
from clbench.report.study import Study


@dataclass(frozen=True, kw_only=True)
class Analysis(Study):
    """A study with its tests, each computed when first asked for.

    Every one raises what `clbench.report.study.Study.dice` raises.
    """

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Confirmatory: endpoints by other strategies."""
        return confirm(self.dice, self.protocol)

    @cached_property
    def own(self) -> list[Own]:
        """Forgetting of each strategy."""
        return own_forgetting(self.dice, self.protocol)

    @cached_property
    def classes(self) -> list[ClassTest]:
        """Exploratory: structure by step by pair."""
        return by_class(self.dice, self.protocol)

    @cached_property
    def sets(self) -> list[SetTest]:
        """Exploratory: eval set by pair."""
        return by_set(self.dice, self.protocol)

    @cached_property
    def rankings(self) -> list[SetRanking]:
        """Exploratory: all strategies, per eval set."""
        return rankings(self.dice, self.protocol)

    @cached_property
    def stable(self) -> Stable:
        """Ranking stability."""
        return stable(self.dice, self.protocol)

    @cached_property
    def tied(self) -> Tied:
        """Which strategies a test of all pairs cannot tell apart, after the last step."""
        return tied(self.dice, self.protocol)
