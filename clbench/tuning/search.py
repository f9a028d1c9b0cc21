"""Where trials lie in a search space: Sobol points, or what Optuna proposes.

The first trial has the strategy's defaults. No trial is stopped early: small organs are learned
late, so an early look would choose the settings that are best on large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from clbench.errors import SettingError, closest
from clbench.spec import settings
from clbench.strategy.contract import Strategy
from clbench.strategy.search_space import Choice, Range, known_settings, unknown_setting

Space = Mapping[str, Range | Choice]
Values = Mapping[str, Any]
MOST_SETTINGS = 32
"""Columns of the Sobol sequence. Their number is fixed, so a column's points do not depend on how
many follow it: strategies of one family get equal learning rates, and share their first steps."""


MEASURING = ("phantom",)
"""Groups of settings that decide which cases there are."""


class Search(Protocol):
    """Proposes trials, one after the other."""

    def values(self, number: int) -> Values:
        """The settings of a 1-based trial; asked for in order, again for a trial that is made.

        Args:
            number: of the trial.
        """

    def tell(self, number: int, score: float | None) -> None:
        """Hear how a trial ended.

        Args:
            number: of the trial.
            score: None: its training diverged.
        """


class SobolSearch:
    """A scrambled Sobol sequence, which fills the space evenly at every length.

    Args:
        space: setting → range.
        seed: of the scrambling.

    Raises:
        SettingError: more settings than columns.

    Source: Owen, *Scrambling Sobol' and Niederreiter-Xing points*, J. Complexity 1998, as in scipy.
    """

    def __init__(self, space: Space, seed: int) -> None:
        if len(space) > MOST_SETTINGS:
            raise SettingError(
                "too many settings to search at once",
                where="search space",
                expected=f"at most {MOST_SETTINGS}",
                got=len(space),
            )
        from scipy.stats import qmc  # takes half a second

        self.space = space
        self._sequence = qmc.Sobol(MOST_SETTINGS, scramble=True, rng=seed)
        self._points: list[list[float]] = []

    def values(self, number: int) -> Values:
        """The defaults, then a point of the sequence per trial."""
        if number == 1:
            return {}
        while len(self._points) < number - 1:
            self._points += self._sequence.random(1).tolist()
        point = self._points[number - 2]
        used = point[: len(self.space)]
        pairs = zip(self.space.items(), used, strict=True)
        return {name: span.value_at(float(x)) for (name, span), x in pairs}

    def tell(self, number: int, score: float | None) -> None:
        """The sequence does not depend on scores."""


class OptunaSearch:
    """What Optuna's tree-structured Parzen estimator proposes, kept in a journal file.

    Args:
        space: setting → range.
        seed: of the estimator; what it proposes also follows from the trials told so far.
        journal: file that holds every proposal and score.
        defaults: of the strategy, for the first trial.

    Raises:
        SettingError: Optuna is not installed.

    Source: Bergstra et al., NeurIPS 2011; Akiba et al., KDD 2019.
    """

    def __init__(self, space: Space, seed: int, journal: Path, defaults: Values) -> None:
        if find_spec("optuna") is None:
            raise SettingError(
                "Optuna is not installed",
                where="--search optuna",
                next_step="pip install 'clbench[tune]', or --search sobol",
            )
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.seed = space, seed
        self.study = optuna.create_study(
            study_name="tune",
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            direction="maximize",
            load_if_exists=True,
        )
        if not self.study.trials:
            inside = {n: v for n, v in defaults.items() if n in space}
            self.study.enqueue_trial(inside, skip_if_exists=True)

    def values(self, number: int) -> Values:
        """The defaults, then proposals."""
        import optuna

        if number > len([t for t in self.study.trials if t.state.name != "WAITING"]):
            # a seed per trial: the same proposals whether or not the search was interrupted
            self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + number)
            trial = self.study.ask()
            for name, span in self.space.items():
                _suggest(trial, name, span)
        proposed = self.study.trials[number - 1].params
        return {} if number == 1 else {n: _short(proposed[n]) for n in self.space}

    def tell(self, number: int, score: float | None) -> None:
        """Enter the score, unless it was."""
        from optuna.trial import TrialState

        if self.study.trials[number - 1].state.is_finished():
            return
        if score is None:
            self.study.tell(number - 1, state=TrialState.FAIL)
        else:
            self.study.tell(number - 1, score)


def _suggest(trial: Any, name: str, span: Range | Choice) -> None:
    if isinstance(span, Choice):
        trial.suggest_categorical(name, list(span.options))
        return
    low, high = span.bounds(name)
    if span.integer:
        trial.suggest_int(name, int(low), int(high), log=span.log)
    else:
        trial.suggest_float(name, low, high, log=span.log)


def _short(value: Any) -> Any:
    """Four digits, which the settings file holds."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def words(values: Values) -> tuple[str, ...]:
    """`--set` words of a trial.

    Args:
        values: `group.name` → value.
    """
    return tuple(f"{name}={value}" for name, value in values.items())


def read_space(assignments: Sequence[str], kind: type[Strategy]) -> dict[str, Range | Choice]:
    """Ranges of the command line: `strategy.weight=0.1..10:log`, `strategy.pseudo=hard|soft`.

    Args:
        assignments: one per setting.
        kind: the strategy's class.

    Raises:
        SettingError: an unknown setting, or a range without a bound.
    """
    space: dict[str, Range | Choice] = {}
    for assignment in assignments:
        where = f"--space {assignment}"
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SettingError(
                "--space needs NAME=LOW..HIGH",
                where=where,
                expected="as strategy.weight=0.1..10:log, or strategy.pseudo=hard|soft",
                got=assignment,
                next_step=f"add what it may be, such as --space {assignment}=0.1..10",
            )
        if name in space:
            raise SettingError(
                "a range is given twice",
                where=where,
                expected=f"{name} once",
                got=f"{space[name]} and {text}",
                next_step="keep one of the two",
            )
        if name not in (known := known_settings(kind)):
            raise unknown_setting(name, known, where)
        space[name] = _range(text, where) if "|" not in text else Choice(tuple(text.split("|")))
        space[name].bounds(where)
    return space


def need_settable(space: Space, strategy: Strategy, profile: settings.Profile) -> None:
    """Refuse a space with a value that its setting does not take, before a trial is made.

    Args:
        space: setting → range.
        strategy: with its options.
        profile: with its changes.

    Raises:
        SettingError: such a value, or a setting that decides which cases trials are scored on.
    """
    for name, span in space.items():
        group, _, field = name.partition(".")
        if group in MEASURING:
            raise SettingError(
                "trials with other cases have scores that do not compare",
                where=f"search space, {name}",
                expected="a setting of the training or of the strategy",
                got=name,
                next_step=f"fix it for all trials: --set {name}=VALUE",
            )
        target: Any = strategy if group == "strategy" else getattr(profile, group)
        for value in span.options if isinstance(span, Choice) else _tried(span, name):
            try:
                settings.change(target, {field: str(value)}, group)
            except SettingError as err:
                raise SettingError(
                    "a search space holds a value that its setting does not take",
                    where=f"search space, {name}",
                    expected=err.what,
                    got=value,
                    next_step="narrow the range; of whole numbers it needs `:int` (integer=True)",
                ) from err


def _tried(span: Range, name: str) -> tuple[float, ...]:
    """Both ends of a range, and a number between them."""
    low, high = span.bounds(name)
    return (low, high) if span.integer else (low, high, _short(low + 0.37 * (high - low)))


def _range(text: str, where: str) -> Range:
    ends, *kinds = text.split(":")
    low, dots, high = ends.partition("..")
    if strange := [k for k in kinds if k not in ("log", "int")]:
        guess = closest(strange[0], ["log", "int"])
        raise SettingError(
            "unknown kind of range",
            where=where,
            expected="log or int",
            got=", ".join(strange),
            next_step=f"did you mean {guess}?" if guess else None,
        )

    def number(end: str) -> float | None:
        try:
            return float(end) if end.strip() else None
        except ValueError:
            raise SettingError("a bound is no number", where=where, got=end) from None

    whole = "int" in kinds
    bounds = (number(low), number(high) if dots else None)
    low_, high_ = (int(b) if whole and b is not None else b for b in bounds)
    return Range(low=low_, high=high_, log="log" in kinds, integer=whole)


def default_values(space: Space, strategy: Strategy, profile: settings.Profile) -> dict[str, Any]:
    """What every setting of a space is without tuning.

    Args:
        space: setting → range.
        strategy: with its options.
        profile: with its changes.
    """
    values = {}
    for name in space:
        group, _, field = name.partition(".")
        values[name] = getattr(strategy if group == "strategy" else getattr(profile, group), field)
    return values
