"""Study: the runs of one benchmark, read once, and the one protocol they are tested by.

A command makes one study; every table, figure and sentence is a function of it. So each `run.json`
and each `scores.csv` is read once, and a level or a margin holds everywhere.
`clbench.report.significance.analysis.Analysis` adds the tests.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clbench.errors import SettingError, StoreError
from clbench.report.evidence import Evidence, evidence_of
from clbench.report.results import Group, StoredRun, group_runs
from clbench.spec import registry
from clbench.store import run_folder

ALPHA = 0.05
"""Default level."""
MARGIN = 0.02
"""Default equivalence margin, Dice; declared before looking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """What was decided before looking."""

    alpha: float = ALPHA
    """Level of every family of tests."""
    margin: float = MARGIN
    """Half-width of "equivalent", Dice."""
    draws: int = 100_000
    """Sign patterns sampled above 20 patients."""
    resamples: int = 10_000
    """Bootstrap resamples of a confirmatory interval."""
    descriptive_resamples: int = 2000
    """Bootstrap resamples of an interval that no test rests on: `learning`, figures."""
    rank_resamples: int = 1000
    """Resamples of the ranking's stability."""
    seed: int = 0
    """Of all of them."""

    def __post_init__(self) -> None:
        """Refuse a level or a margin that is none."""
        if not 0 < self.alpha < 0.5:
            raise SettingError(
                "no such level", where="--alpha", expected="0 < alpha < 0.5", got=self.alpha
            )
        if not 0 < self.margin < 1:
            raise SettingError(
                "no such margin",
                where="--margin",
                expected="0 < margin < 1 (Dice)",
                got=self.margin,
            )

    @property
    def level(self) -> float:
        """Confidence of every interval."""
        return 1 - self.alpha

    @property
    def percent(self) -> str:
        """The confidence in words: `95 %`."""
        return f"{100 * self.level:.6g} %"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The finished runs of a benchmark; each file is read when first asked for, and once."""

    results: Path
    """Folder of runs."""
    bench: str
    """Benchmark."""
    reference: str = "universal"
    """Label or registered name of the strategy that the others are compared with."""
    scoring: str = "strict"
    """`strict` or `paper`."""
    protocol: Protocol = Protocol()
    """What was decided before looking."""

    @cached_property
    def stored(self) -> tuple[StoredRun, ...]:
        """All run folders of the benchmark, finished or not, in order of path.

        Raises:
            StoreError: a `run.json` is damaged.
        """
        folders = run_folder.find_runs(self.results, bench=self.bench)
        return tuple(StoredRun.read(folder) for folder in folders)

    def groups(
        self,
        *,
        metric: str = "dice",
        scoring: str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Group]:
        """Finished runs, grouped by everything but the seed.

        Args:
            metric: which score.
            scoring: `strict` or `paper`; None: the study's.
            seeds: the seeds every strategy must have; None takes those there are. A group that
                lacks one is a hole as a whole.

        Raises:
            StoreError: they do not belong in one table, or a file is damaged.
        """
        key = (metric, scoring or self.scoring, None if seeds is None else tuple(seeds))
        if key not in self._groups:
            self._groups[key] = group_runs(
                self.stored, metric=metric, scoring=scoring or self.scoring, seeds=seeds
            )
        return self._groups[key]

    @cached_property
    def _groups(self) -> dict[Any, list[Group]]:
        return {}

    def finished(self, *, metric: str = "dice") -> list[Group]:
        """The same as `groups`, and at least one.

        Raises:
            StoreError: there is no finished run.
        """
        groups = self.groups(metric=metric)
        self.need(
            groups,
            "there are no finished runs of this benchmark",
            f"`clbench run --bench {shlex.quote(registry.as_typed(self.bench))} "
            f"--strategy {shlex.quote(self.reference)}`",
        )
        return groups

    @cached_property
    def evidence(self) -> Evidence:
        """The Dice scores as arrays over seeds and patients.

        Raises:
            StoreError: no runs, runs that do not belong together, or damaged files.
            UnknownName: no finished run of the reference.
        """
        return evidence_of(
            self.finished(),
            where=self.results / self.bench,
            reference=self.reference,
            scoring=self.scoring,
        )

    def need(self, condition: object, what: str, next_step: str) -> None:
        """Refuse a table or a figure that cannot be made from these runs.

        Args:
            condition: what must hold.
            what: the error's first line.
            next_step: what helps.

        Raises:
            StoreError: the condition does not hold.
        """
        if not condition:
            raise StoreError(what, where=self.results / self.bench, next_step=next_step)
