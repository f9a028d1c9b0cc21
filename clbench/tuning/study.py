"""Tuning strategies: trials at an equal budget each; the same command goes on with missing ones.

What lies in `<out>/_tuning/<bench>/trials/<strategy>/<study id>/`: `study.json` (what is searched,
and on what), `trial_001/` and so on, and `optuna.journal` where Optuna searches. A study is known
by what its trials depend on; its budget is not part of that, so a larger one goes on with the same
trials.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clbench import reproducibility, signals
from clbench.errors import ClbenchError, SettingError, TrainingError
from clbench.run.course import alone
from clbench.run.plan import RunSettings, pick_device, resolve, resolve_profile
from clbench.run.teach import refuse_course
from clbench.spec import registry
from clbench.spec.settings import refuse_idle, split_overrides
from clbench.store import files, run_folder
from clbench.strategy.search_space import Choice, Range, space_of
from clbench.training.ranks import Ranks
from clbench.training.update import divide
from clbench.tuning.rules import RULES, Rule
from clbench.tuning.search import (
    OptunaSearch,
    Search,
    SobolSearch,
    default_values,
    read_space,
    settable,
    word,
    words,
)
from clbench.tuning.trial import Trial, TrialPlan, least_updates, plan_trial, run_trial

FOLDER = "_tuning"
"""Folder of results that holds trials; no table reads it."""
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What the command line asks for."""

    strategies: tuple[str, ...]
    """Each tuned by itself, with the whole budget."""
    base: RunSettings
    """What all trials have in common; its `strategy` has no meaning, its seed is that of trials and
    search."""
    rule: str
    """Of `RULES`."""
    budget: float
    """For each strategy: what all its trials together may take."""
    unit: Literal["updates", "seconds"] = "updates"
    """What the budget counts."""
    search: Literal["sobol", "optuna"] = "sobol"
    """How trials are chosen."""
    space: tuple[str, ...] = ()
    """`NAME=LOW..HIGH` words that add to the strategies' own spaces, or replace a range of them."""

    def __post_init__(self) -> None:
        if not (self.budget > 0 and math.isfinite(self.budget)):
            raise SettingError(
                "a budget pays for at least one trial",
                where="--budget",
                expected=f"a number of {self.unit} above 0",
                got=f"{self.budget:g}",
                next_step="give at least what one run takes; `clbench plan` says how much that is",
            )
        for option, value, known in (
            ("--rule", self.rule, tuple(RULES)),
            ("--unit", self.unit, ("updates", "seconds")),
            ("--search", self.search, ("sobol", "optuna")),
        ):
            if value not in known:
                raise SettingError(
                    "unknown value", where=option, expected=", ".join(known), got=value
                )


@dataclass(frozen=True, kw_only=True)
class TunedStrategy:
    """One strategy's trials, and what they chose."""

    name: str
    """Of the strategy."""
    space: Mapping[str, Range | Choice]
    """Setting → range."""
    defaults: Mapping[str, Any]
    """Setting → value without tuning."""
    trials: Sequence[Trial]
    """In order."""
    folder: Path
    """Of the study."""
    facts: Mapping[str, Any] = field(repr=False)
    """What the trials were made on: course, data, profile."""
    patients: bool
    """Whether their data are patients; False: the phantom."""

    @property
    def best(self) -> Trial:
        """The trial of the highest score; of equal ones the first.

        Raises:
            SettingError: training failed in every one.
        """
        scored = [t for t in self.trials if t.score is not None]
        if not scored:
            faults = any(t.fault for t in self.trials)
            raise SettingError(
                f"training {'failed' if faults else 'diverged'} in every trial",
                where=self.name,
                got=self.trials[0].failure,
                next_step="look at the strategy's defaults, or narrow its learning rates with "
                "--space train.lr=LOW..HIGH:log",
            )
        return max(scored, key=lambda t: (t.score or 0.0, -t.number))

    def spent(self, unit: str) -> float:
        """Updates or seconds of all trials, first steps that are shared counted in each.

        Args:
            unit: `updates` or `seconds`.
        """
        return float(sum(getattr(t, unit) for t in self.trials))


def tune(settings: TuneSettings, watch: Watch = lambda event: None) -> list[TunedStrategy]:
    """Make the trials of every strategy that are missing, within its budget.

    Args:
        settings: what is asked for.
        watch: hears of every update of every trial, and of `trial` and `tried` themselves.

    Raises:
        ClbenchError: anything the user can act on; no trial is begun where a strategy has no space,
            or where the budget pays for none.
        Stopped: by a signal; the same command goes on.
    """
    studies = [_Study(settings, name) for name in dict.fromkeys(settings.strategies)]
    with signals.listening():
        return [study.go(watch) for study in studies]


def output_folder(settings: TuneSettings) -> Path:
    """Where settings file, curve and figures of a tuning go by default."""
    name = registry.benchmark(settings.base.bench).name
    return settings.base.out / FOLDER / name / settings.rule


class _Study:
    """The trials of one strategy."""

    def __init__(self, settings: TuneSettings, name: str) -> None:
        self.settings, self.name = settings, name
        self.rule: Rule = RULES[settings.rule]
        self.base = dataclasses.replace(settings.base, strategy=name, fresh=False)
        plain = resolve(self.base)
        self.strategy_name, kind = plain.strategy_name, type(plain.strategy)
        self.steps = self.rule.last_step(plain.benchmark)
        asked = read_space(settings.space, kind)
        joined = {**space_of(plain.strategy), **asked}
        fixed = split_overrides(list(self.base.overrides))
        for n in asked:
            group, _, field_name = n.partition(".")
            if field_name in fixed.get(group, {}):
                raise SettingError(
                    "a setting is fixed and searched at once",
                    where=f"--space {n}",
                    expected="one of --space and --set",
                    got=f"--set {n}={fixed[group][field_name]}",
                    next_step="leave one of the two out",
                )
        self.space = {
            n: span
            for n, span in joined.items()
            if n.partition(".")[2] not in fixed.get(n.partition(".")[0], {})
        }
        if not self.space:
            raise SettingError(
                "there is nothing to tune",
                where=f"--strategy {name}",
                expected="a search space, of the strategy or of --space",
                got="every setting of the space is fixed by --set" if joined else "none",
            )
        spans = {n: str(span) for n, span in self.space.items()}  # as they were always written
        self.space = settable(self.space, plain.strategy, plain.profile)
        self._refuse_what_no_run_takes()
        self.defaults = default_values(self.space, plain.strategy, plain.profile)
        trial = self._planned((), Path())
        self._need_validation(trial)
        refuse_course(trial)
        self.facts = self._facts(trial, spans)
        trials = self.base.out / FOLDER / plain.benchmark.name / "trials"
        self.folder = trials / self.strategy_name / run_folder.run_id(self.facts)
        self.patients = trial.catalog.patients
        self.least = least_updates(trial)
        if settings.unit == "updates" and settings.budget < self.least:
            raise SettingError(
                "the budget pays for no trial",
                where=f"--budget, {name}",
                expected=f"at least {self.least} updates: one trial of steps 1 to {self.steps}",
                got=f"{settings.budget:g}",
                next_step=f"--budget {4 * self.least} pays for four trials",
            )

    def _planned(self, more: Sequence[str], home: Path) -> TrialPlan:
        base = dataclasses.replace(self.base, overrides=(*self.base.overrides, *more))
        return plan_trial(base, home, self.steps)

    def _refuse_what_no_run_takes(self) -> None:
        """Look ahead at every option and end of a range, beside the defaults of the others.

        Raises:
            SettingError: one that a trial would be refused for.
        """
        for name, span in self.space.items():
            for value in span.bounds(f"search space, {name}"):
                try:
                    self._look_ahead(name, value)
                except ClbenchError as err:
                    raise SettingError(
                        "a search space holds a value that no run takes beside the other settings",
                        where=f"search space, {name}={word(value)}",
                        expected=err.brief,
                        got=value,
                        next_step=f"leave it out of --space {name}=…, or change with --set what it "
                        "cannot stand beside",
                    ) from err

    def _look_ahead(self, name: str, value: Any) -> None:
        """Refuse what a run refuses before its first update; a network is built where it matters.

        Raises:
            ClbenchError: a value that no run takes.
        """
        more, group = words({name: value}), name.partition(".")[0]
        changes = split_overrides([*self.base.overrides, *more])
        profile = resolve_profile(self.base.profile, changes, data=self.base.data)
        refuse_idle(changes, profile)
        reproducibility.refuse_fp16_on_cpu(profile.train.amp, pick_device(self.base.device))
        divide(profile.train, Ranks())
        ways = group == "strategy" and isinstance(self.space[name], Choice)
        if ways or group in ("backbone", "data", "text"):
            plan = self._planned(more, Path())
            _ = plan.weights
            refuse_course(plan)

    def _need_validation(self, plan: TrialPlan) -> None:
        for number in range(1, self.steps + 1):
            if not plan.catalog.splits[number - 1].validation:
                raise SettingError(
                    "a rule needs validation cases of every step it looks at",
                    where=f"--rule {self.rule.name}, step {number} of {plan.benchmark.name}",
                    expected="cases under `validation` in its split",
                    got="none",
                    next_step=f"--split {plan.catalog.source(number).name}=FILE.toml names some",
                )

    def _facts(self, plan: TrialPlan, spans: Mapping[str, str]) -> dict[str, Any]:
        """What the trials depend on."""
        return {
            "identity": plan.identity.to_json(),
            "rule": self.rule.name,
            "steps": self.steps,
            "space": dict(spans),
            "search": self.settings.search,
            # from 2 on structures taught again count: trials scored before are others
            **({"score": 2} if any(step.again for step in plan.benchmark.steps) else {}),
        }

    def go(self, watch: Watch) -> TunedStrategy:
        """Make what is missing; trials that were made count with what they took."""
        with alone(self.folder, wait=False):
            files.write_json(self.folder / "study.json", {"strategy": self.name, **self.facts})
            search, trials = self._search(), list[Trial]()
            while self._affordable(trials):
                trials.append(self._trial(search, len(trials) + 1, watch))
                search.tell(len(trials), trials[-1].score)
                self._refuse_fault_of_all(trials)
        return TunedStrategy(
            name=self.name,
            space=self.space,
            defaults=self.defaults,
            trials=trials,
            folder=self.folder,
            facts=self.facts,
            patients=self.patients,
        )

    def _search(self) -> Search:
        seed = self.base.seed
        if self.settings.search == "sobol":
            return SobolSearch(self.space, seed)
        return OptunaSearch(self.space, seed, self.folder / "optuna.journal", self.defaults)

    def _affordable(self, trials: Sequence[Trial]) -> bool:
        """Whether the rest of the budget pays for a trial as dear as the dearest so far.

        One that failed before its first update counts as a whole one: else a strategy that always
        fails there would be tried without end.
        """
        if not trials:
            return True
        taken = [getattr(t, self.settings.unit) for t in trials]
        if self.settings.unit == "updates":
            taken = [updates or self.least for updates in taken]
        return bool(sum(taken) + max(taken) <= self.settings.budget)

    def _refuse_fault_of_all(self, trials: Sequence[Trial]) -> None:
        """Raise the error in which the defaults and the second trial ended alike.

        Raises:
            TrainingError: other settings will not mend it.
        """
        if (
            len(trials) == 2
            and all(t.fault for t in trials)
            and len({t.failure for t in trials}) == 1
        ):
            raise TrainingError(
                "the first two trials failed alike, so it is no matter of their settings",
                where=f"--strategy {self.name}",
                expected="a strategy that can be taught with its defaults",
                got=trials[0].failure,
                next_step=f"mend the strategy, remove {self.folder} and repeat the command",
            )

    def _trial(self, search: Search, number: int, watch: Watch) -> Trial:
        home = self.folder / f"trial_{number:03}"
        values = search.values(number)
        if (made := Trial.read(home)) is not None:
            return made
        watch({"event": "trial", "strategy": self.name, "number": number, "settings": values})
        trial = run_trial(self._planned(words(values), home), number, values, watch)
        watch({"event": "tried", "strategy": self.name, "trial": trial})
        return trial
