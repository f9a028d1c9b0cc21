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
            score: None: its training failed.
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
        inside = {n: v for n, v in defaults.items() if n in space and _holds(space[n], v)}
        self._defaults_lie_inside = len(inside) == len(space)
        self.study = optuna.create_study(
            study_name="tune",
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
            direction="maximize",
            load_if_exists=True,
        )
        if not self.study.trials:
            self.study.enqueue_trial(inside, skip_if_exists=True)

    def values(self, number: int) -> Values:
        """The defaults, then proposals."""
        import optuna

        begun = [t for t in self.study.trials if t.state.name != "WAITING"]
        left = begun[number - 1] if number <= len(begun) else None  # by a process that was killed
        if left is None or not (left.state.is_finished() or len(left.params) == len(self.space)):
            # a seed per trial: the same proposals whether or not the search was interrupted
            self.study.sampler = optuna.samplers.TPESampler(seed=self.seed + number)
            trial = self.study.ask() if left is None else _taken_up(self.study, left)
            for name, span in self.space.items():
                if left is not None and number > 1 and name in left.params:
                    # drawn anew, to no avail but that what is drawn after it is the same
                    kind = left.distributions[name]
                    self.study.sampler.sample_independent(self.study, left, name, kind)
                _suggest(trial, name, span)
        proposed = self.study.trials[number - 1].params
        return {} if number == 1 else {n: _short(proposed[n]) for n in self.space}

    def tell(self, number: int, score: float | None) -> None:
        """Enter the score, unless it was.

        Where a default lies outside its range, Optuna's first trial has another value there: the
        score of the defaults is not entered for it.
        """
        from optuna.trial import TrialState

        if self.study.trials[number - 1].state.is_finished():
            return
        if score is None or (number == 1 and not self._defaults_lie_inside):
            self.study.tell(number - 1, state=TrialState.FAIL)
        else:
            self.study.tell(number - 1, score)


def _holds(span: Range | Choice, value: Any) -> bool:
    """Whether a value is an option, or lies within the bounds."""
    if isinstance(span, Choice):
        return any(type(value) is type(option) and value == option for option in span.options)
    low, high = span.bounds("search space")
    return isinstance(value, int | float) and low <= value <= high


def _taken_up(study: Any, left: Any) -> Any:
    """A trial of Optuna that has only some of its values yet, to be given the others."""
    from optuna.trial import Trial

    return Trial(study, left._trial_id)


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
    return tuple(f"{name}={word(value)}" for name, value in values.items())


def plain(value: Any) -> Any:
    """A value as a search holds it: a tuple as `--set` takes it, `3,3,3`; others as they are.

    Args:
        value: of a setting.
    """
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else value


def word(value: Any) -> str:
    """A value as `--set` takes it: `none`, `true`, `3,3,3`.

    Args:
        value: of a setting.
    """
    return str(value).lower() if value is None or isinstance(value, bool) else str(plain(value))


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


def settable(
    space: Space, strategy: Strategy, profile: settings.Profile
) -> dict[str, Range | Choice]:
    """A space whose options are of the types of their settings: 2 and not "2".

    Args:
        space: setting → range.
        strategy: with its options.
        profile: with its changes.

    Raises:
        SettingError: a value that its setting does not take, or a setting that decides which cases
            trials are scored on.
    """
    typed = dict(space)
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
        taken = list[Any]()
        for value in span.options if isinstance(span, Choice) else _tried(span, name):
            try:
                changed = settings.change(target, {field: word(value)}, group)
            except SettingError as err:
                raise SettingError(
                    "a search space holds a value that its setting does not take",
                    where=f"search space, {name}",
                    expected=err.what,
                    got=value,
                    next_step="narrow the range; of whole numbers it needs `:int` (integer=True)",
                ) from err
            own = plain(getattr(changed, field))
            is_plain = own is None or isinstance(own, bool | int | float | str)
            taken.append(own if is_plain else value)
        if isinstance(span, Choice):
            typed[name] = Choice(tuple(taken))
            typed[name].bounds(f"search space, {name}")
    return typed


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
    if whole and (odd := [b for b in bounds if b is not None and not b.is_integer()]):
        raise SettingError(
            "a bound is no whole number",
            where=where,
            expected="two whole numbers, as 1..4:int",
            got=", ".join(f"{b:g}" for b in odd),
            next_step="round it, or take :int away",
        )
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
        owner = strategy if group == "strategy" else getattr(profile, group)
        values[name] = plain(getattr(owner, field))
    return values
