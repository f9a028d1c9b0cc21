"""Analysis: all tests of one report in one place, each made once.

`clbench.report.significance.tables` prints it, `clbench.report.page.page` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from clbench.report.significance.confirmatory import Comparison, confirm
from clbench.report.significance.endpoints import FINAL
from clbench.report.significance.exploratory import ClassTest, SetTest, by_class, by_set
from clbench.report.significance.external import ExternalRanking, external_ranking
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
    def external(self) -> Mapping[str, Analysis]:
        """External test set → the same analysis, measured on it."""
        return {name: self.measured_on(name) for name in self.dice.external if not self.on}

    @cached_property
    def elsewhere(self) -> Mapping[str, Analysis]:
        """External test set, or domain that a later step teaches → the analysis, measured on it."""
        domains = {name: self.measured_on(name) for name in self.dice.domains if not self.on}
        return {**domains, **self.external}

    @cached_property
    def external_rankings(self) -> list[ExternalRanking]:
        """The order of strategies on each external test set against the internal one."""
        return [
            external_ranking(self.dice, other.dice, self.protocol)
            for other in self.external.values()
        ]

    @cached_property
    def at_the_end(self) -> list[Comparison]:
        """Confirmatory: the endpoint after the last step alone."""
        return confirm(self.dice, self.protocol, (FINAL,))

    @cached_property
    def stable(self) -> Stable:
        """Ranking stability."""
        return stable(self.dice, self.protocol)

    @cached_property
    def tied(self) -> Tied:
        """Which strategies a test of all pairs cannot tell apart, after the last step."""
        return tied(self.dice, self.protocol)
