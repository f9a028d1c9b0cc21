"""Search spaces: which settings of a method are worth tuning, and within which bounds.

A class names its own settings in `search_space`, beside its fields; those of the classes it
inherits from are added, so a composition joins the spaces of its parts.

>>> from typing import ClassVar
>>> from clbench.strategy import Range, SearchSpace, Strategy
>>> from clbench.strategy.search_space import space_of
>>> @dataclass(frozen=True, kw_only=True)
... class Method(Strategy):
...     weight: float = 1.0
...     search_space: ClassVar[SearchSpace] = {"weight": Range(low=0.1, high=10.0, log=True)}
>>> for name, span in space_of(Method).items():
...     print(name, span)
train.lr 1e-05 to 0.01, logarithmic
strategy.weight 0.1 to 10.0, logarithmic
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from clbench.errors import SettingError, closest
from clbench.spec import settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float | None = None
    """Smallest value; a range without it is refused."""
    high: float | None = None
    """Largest value; a range without it is refused."""
    log: bool = False
    """Whether equal factors, and not equal differences, are equally likely."""
    integer: bool = False
    """Whether only whole numbers are taken."""

    def value_at(self, share: float) -> float | int:
        """The value at a share of the range, with four digits.

        Args:
            share: in [0, 1].
        """
        low, high = self.bounds("search space")
        if self.integer:
            value = _between(low - 0.5, high + 0.5, share, log=self.log and low > 0.5)
            return min(max(math.floor(value + 0.5), int(low)), int(high))
        return float(f"{_between(low, high, share, log=self.log):.4g}")

    def bounds(self, where: str) -> tuple[float, float]:
        """Both ends.

        Args:
            where: the setting; named in an error.

        Raises:
            SettingError: a bound is missing, not finite, not below the other, or not above 0 in a
                logarithmic range.
        """
        low, high = self.low, self.high
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            raise SettingError(
                "a search space has no bound",
                where=where,
                expected="a finite low and a finite high",
                got=f"low {low}, high {high}",
                next_step="give both: Range(low=0.1, high=10.0), or --space NAME=0.1..10",
            )
        if not low < high or (self.log and low <= 0):
            raise SettingError(
                "the bounds of a search space contradict each other",
                where=where,
                expected="low below high" + (", low above 0, for it is logarithmic" * self.log),
                got=f"low {low:g}, high {high:g}",
                next_step="swap the two"
                if high < low
                else "give a range with something between its bounds"
                + (", or take :log (log=True) away" * self.log),
            )
        return low, high

    def __str__(self) -> str:
        kind = ", logarithmic" * self.log + ", whole numbers" * self.integer
        return f"{self.low} to {self.high}{kind}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values without an order."""

    options: tuple[Any, ...]
    """At least two."""

    def value_at(self, share: float) -> Any:
        """The option at a share of the list.

        Args:
            share: in [0, 1].
        """
        return self.options[min(int(share * len(self.options)), len(self.options) - 1)]

    def bounds(self, where: str) -> tuple[Any, ...]:
        """The options.

        Args:
            where: the setting; named in an error.

        Raises:
            SettingError: fewer than two.
        """
        if len(set(self.options)) < 2:
            raise SettingError(
                "there is nothing to choose from",
                where=where,
                expected="at least two different values",
                got=self.options,
            )
        return self.options

    def __str__(self) -> str:
        return " or ".join(map(str, self.options))


SearchSpace: TypeAlias = Mapping[str, Range | Choice | None]
"""Setting → its range: a field of the class, or `group.name` of the profile. None: a setting of a
parent class that is not tuned here."""


def space_of(strategy: Any) -> dict[str, Range | Choice]:
    """The search space of a strategy: its own settings, and those of all classes it is made of.

    Args:
        strategy: with its options, of which some may be idle beside the others
            (`Strategy.idle_options`); or its class, of a composition the one that joins its parts.

    Returns:
        `group.name`, as `--set` takes it → range; the learning rate first, for all strategies that
        have it in their space.

    Raises:
        SettingError: a setting that does not exist, or a range without a bound.
    """
    kind = strategy if isinstance(strategy, type) else type(strategy)
    idle = () if isinstance(strategy, type) else strategy.idle_options()
    joined: dict[str, Range | Choice | None] = {}
    for owner in reversed(kind.__mro__):
        for name, span in vars(owner).get("search_space", {}).items():
            joined[name if "." in name else f"strategy.{name}"] = span
    where = f"search space of {kind.__name__}"
    known = known_settings(kind)
    for name, span in joined.items():
        if name not in known:
            raise unknown_setting(name, known, where)
        if span is not None and not isinstance(span, Range | Choice):
            raise SettingError(
                "a search space is made of Range and Choice",
                where=f"{where}, {name}",
                expected="Range(low=0.1, high=10.0, log=True), or Choice((1, 2))",
                got=repr(span),
            )
        if span is not None:
            span.bounds(f"{where}, {name}")
    joined |= {f"strategy.{name}": None for name in idle}
    return {name: span for name, span in joined.items() if span is not None}


def known_settings(kind: type[Any]) -> list[str]:
    """`group.name` of everything that `--set` takes for a strategy."""
    own = [f"strategy.{f.name}" for f in fields(kind)]
    groups = [f"{g}.{f.name}" for g, of in settings.GROUPS.items() for f in fields(of)]
    return [*own, *groups]


def unknown_setting(name: str, known: list[str], where: str) -> SettingError:
    """The error for a setting that no strategy and no profile has.

    Args:
        name: as it was given.
        known: what there is.
        where: search space or option.
    """
    guess = closest(name, known)
    return SettingError(
        f"there is no setting called {name!r}",
        where=where,
        expected="a field of the strategy, or group.name of the profile, such as train.lr",
        next_step=f"did you mean {guess}?" if guess else None,
    )


def _between(low: float, high: float, share: float, *, log: bool) -> float:
    if log:
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return low + share * (high - low)
