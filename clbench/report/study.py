"""Study: the runs of one benchmark, read once, and the one protocol they are tested by.

A command makes one study; every table, figure and sentence is a function of it. So each `run.json`
and each `scores.csv` is read once, and a level or a margin holds everywhere.
`clbench.report.significance.analysis.Analysis` adds the tests.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from clbench.errors import SettingError, StoreError, unknown_name
from clbench.report.scores import Run, Scores, StrategyScores, read_frame, scores_of
from clbench.spec import registry
from clbench.statistics.intervals import percent
from clbench.statistics.max_t import Correction
from clbench.store import run_folder
from clbench.store.record import refuse_mixture

if TYPE_CHECKING:
    import pandas as pd

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
    correction: Correction = "max-t"
    """How the p-values of a family are adjusted: `max-t` or `holm`."""
    draws: int = 100_000
    """Sign patterns above 20 patients, the observed one included."""
    rank_resamples: int = 1000
    """Resamples of the ranking's stability."""
    seed: int = 0
    """Of all of them."""

    def __post_init__(self) -> None:
        """Refuse a level or a margin that is none."""
        corrections = get_args(Correction)
        for name, allowed, expected in (
            ("alpha", 0 < self.alpha < 0.5, "0 < alpha < 0.5"),
            ("margin", 0 < self.margin < 1, "0 < margin < 1 (Dice)"),
            ("correction", self.correction in corrections, " or ".join(corrections)),
        ):
            if not allowed:
                got = getattr(self, name)
                what = "level" if name == "alpha" else name
                raise SettingError(f"no such {what}", where=f"--{name}", expected=expected, got=got)

    @property
    def adjusted_by(self) -> str:
        """The correction in words."""
        return {"max-t": "max-T", "holm": "Holm"}[self.correction]

    @property
    def ranked_by(self) -> str:
        """The test of all pairs over the patients of one eval set, in words."""
        return {"max-t": "sign flips, max-T", "holm": "Wilcoxon, Holm"}[self.correction]

    @property
    def level(self) -> float:
        """Confidence of every interval."""
        return 1 - self.alpha

    @property
    def percent(self) -> str:
        """The confidence in words: `95 %`."""
        return percent(self.level)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The finished runs of a benchmark; each file is read when first asked for, and once.

    Every method raises StoreError where a file is missing or damaged.
    """

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
    on: str = ""
    """External test set or domain on which everything is measured; empty: the course's own test
    cases."""
    seeds: tuple[int, ...] | None = None
    """The seeds every strategy must have; None takes those there are."""

    def measured_on(self, name: str) -> Self:
        """The same study, measured on an external test set or a domain; no file is read again."""
        return self._with(on=name)

    def with_seeds(self, seeds: Sequence[int]) -> Self:
        """The same study of runs with these seeds alone; no file is read again."""
        return self._with(seeds=tuple(seeds))

    def _with(self, **changed: Any) -> Self:
        other = replace(self, **changed)
        for read in ("runs", "finished", "frame"):
            if read in self.__dict__:
                other.__dict__[read] = self.__dict__[read]
        return other

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All run folders of the benchmark, finished or not, in order of path.

        Raises:
            StoreError: a `run.json` is damaged.
        """
        return tuple(map(Run.read, run_folder.find_runs(self.results, bench=self.bench)))

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """Those of them that are finished."""
        return tuple(run for run in self.runs if run.record.status == "finished")

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Every row of every finished run, see `clbench.report.scores.read_frame`."""
        return read_frame(self.finished)

    def scores(
        self,
        *,
        metric: str = "dice",
        scoring: str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Scores | None:
        """One metric of the finished runs; None where there is no finished run.

        Args:
            metric: which score.
            scoring: `strict` or `paper`; None: the study's.
            seeds: the seeds every strategy must have; None: the study's. A strategy that lacks one
                is a hole as a whole.

        Raises:
            StoreError: they do not belong in one table, or a file is damaged.
        """
        seeds = self.seeds if seeds is None else seeds
        key = (metric, scoring or self.scoring, None if seeds is None else tuple(seeds))
        chosen = [r for r in self.finished if seeds is None or r.record.seed in seeds]
        if not chosen:
            return None
        refuse_mixture([run.record for run in chosen])
        if key not in self._scores:
            self._scores[key] = scores_of(
                self.frame,
                self.finished,
                scoring=key[1],
                metric=metric,
                seeds=seeds,
                unfinished=[r for r in self.runs if r.record.status != "finished"],
                on=self.on,
            )
        return self._scores[key]

    @cached_property
    def _scores(self) -> dict[Any, Scores]:
        return {}

    def need_scores(self, *, metric: str = "dice") -> Scores:
        """The same as `scores`, and never None.

        Raises:
            StoreError: there is no finished run.
        """
        scores = self.scores(metric=metric)
        if scores is None:
            raise StoreError(
                "there are no finished runs of this benchmark",
                where=self.results / self.bench,
                next_step=f"`clbench run --bench {shlex.quote(registry.as_typed(self.bench))} "
                f"--strategy {shlex.quote(self.reference)}`",
            )
        return scores

    @cached_property
    def dice(self) -> Scores:
        """Dice of all finished runs, the reference first: what is tested.

        Raises:
            StoreError: no runs, runs that do not belong together, or damaged files.
            UnknownName: no finished run of the reference.
        """
        return self.reference_first(self.need_scores())

    def reference_first(self, scores: Scores) -> Scores:
        """The same scores with the reference before the other strategies.

        Raises:
            StoreError: several variants of the reference.
            UnknownName: no finished run of the reference.
        """
        ref = self._reference(scores.strategies)
        others = (s for s in scores.strategies if s is not ref)
        return replace(scores, strategies=(ref, *others))

    def _reference(self, strategies: Sequence[StrategyScores]) -> StrategyScores:
        name, where = self.reference, self.results / self.bench
        same = [s for s in strategies if s.label == name] or [
            s for s in strategies if s.strategy == name
        ]
        if not same:
            labels = [s.label for s in strategies]
            raise unknown_name("finished run of a strategy", name, labels, where)
        if len(same) > 1:
            raise StoreError(
                "the reference has several variants",
                where=where,
                expected="one of: " + ", ".join(repr(s.label) for s in same),
                got=name,
                next_step="give --ref the variant's whole label, in quotation marks",
            )
        return same[0]

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
