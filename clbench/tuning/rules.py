"""Rules by name: which steps a trial is taught, and so which validation cases choose its settings.

A method that is tuned on the end of a course knows what no learner knows while the course goes on.
`first_step` looks at the first two steps alone; `transfer` tunes on a whole course and is used on
another one (Cha and Cho, arXiv 2403.09066: a strategy should be judged on a course it was not tuned
on); `oracle` tunes on the end of the very course, and is labelled unrealistic wherever it is shown.
No rule sees a test case (`Catalog.tuning_steps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clbench.errors import SettingError
from clbench.spec.benchmark import Benchmark


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What trials are taught and judged by."""

    name: str
    """For `--rule`."""
    steps: int | None
    """Steps taught, from the first; None: all."""
    same_course: bool
    """Whether the chosen settings are for the course they were tuned on; False: for others."""
    realistic: bool
    """Whether somebody who learns step by step could tune so."""
    summary: str
    """One line."""

    @property
    def label(self) -> str:
        """The name, and that it is unrealistic where it is."""
        return self.name if self.realistic else f"{self.name}, UNREALISTIC"

    def last_step(self, benchmark: Benchmark) -> int:
        """The last step that a trial is taught.

        Raises:
            SettingError: the course has fewer steps than the rule looks at.
        """
        count = len(benchmark.steps)
        if count < 2:
            raise SettingError(
                "a course of one step has nothing to tune continual learning by",
                where=f"--rule {self.name}, {benchmark.name}",
                expected="at least two steps",
                got=count,
            )
        return min(count, self.steps or count)


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            name="first_step",
            steps=2,
            same_course=True,
            realistic=True,
            summary="validation cases of the first two steps, after the second",
        ),
        Rule(
            name="transfer",
            steps=None,
            same_course=False,
            realistic=True,
            summary="validation cases of all steps, at the end; for other courses alone",
        ),
        Rule(
            name="oracle",
            steps=None,
            same_course=True,
            realistic=False,
            summary="UNREALISTIC: validation cases of all steps, at the end of this very course",
        ),
    )
}
