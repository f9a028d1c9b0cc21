"""Strategies named by module: `--strategy my_module:MyPlugin`, without registering anything.

`MyPlugin` is a strategy of clbench, or any `SupervisedPlugin` of Avalanche. The latter runs on top
of fine-tuning, like `ewc` and `replay`; its constructor's arguments are its hyperparameters
(`--set strategy.NAME=VALUE`), as far as they are numbers, text or switches.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

from clbench.avalanche.lazy_import import make_torchvision_importable
from clbench.avalanche.supported import PluginStrategy, find_plugin
from clbench.errors import AvalancheError, SettingError, UnknownName, did_you_mean
from clbench.spec.settings import change
from clbench.strategies.finetune import Finetune
from clbench.strategy import Declaration, Strategy

PLAIN = (bool, int, float, str)


def by_module(spec: str, overrides: Mapping[str, Any]) -> Strategy:
    """The strategy that `module:Class` names, for `--strategy`.

    Args:
        spec: module and class; the module is searched in the current folder, too.
        overrides: hyperparameters, as text.

    Raises:
        UnknownName: there is no such module or class.
        AvalancheError: it is neither strategy nor plugin, or a plugin that is refused.
    """
    module, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: nothing installed is hidden by a file that lies around
    make_torchvision_importable()  # the module may import Avalanche in its first line
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError, TypeError, ValueError) as err:
        raise UnknownName(
            f"there is no strategy {spec!r}: {err}",
            where="--strategy",
            expected="module:Class, the module installed or in the current folder",
            next_step="see `clbench list` for the strategies that have a name",
        ) from err
    if isinstance(kind, type) and issubclass(kind, Strategy):
        return change(kind(), overrides, "strategy")
    return plugged(spec, find_plugin(spec), overrides)


def plugged(spec: str, kind: type[Any], overrides: Mapping[str, Any]) -> Strategy:
    """A strategy made of a plugin's class: a frozen dataclass with a field per argument.

    Raises:
        AvalancheError: a required argument is not given.
        SettingError: an override that is no argument, or a `past` that there is not.
    """
    given = dict(overrides)
    required: dict[str, Any] = {}
    options: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        default = parameter.default
        if type(default) in PLAIN:
            options.append((name, type(default), field(default=default)))
        elif default is inspect.Parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            if name not in given:
                raise AvalancheError(
                    f"the plugin needs the argument {name!r}",
                    where=spec,
                    next_step=f"--set strategy.{name}=VALUE",
                )
            required[name] = _literal(given.pop(name))
            options.append((name, type(required[name]), field()))
        elif default is None:
            options.append((name, int | float | str | None, field(default=None)))
            if name in given:
                required[name] = _literal(given.pop(name))
    names = tuple(name for name, _, _ in options)

    def arguments(self: PluginStrategy) -> dict[str, Any]:
        return {n: getattr(self, n) for n in names}

    past = given.pop("past", "weights")
    if past not in tuple(PASTS):
        raise SettingError(
            "a plugin works on the old weights, or stores cases",
            where="strategy.past",
            expected=f"one of {', '.join(PASTS)}",
            got=past,
            next_step=did_you_mean(str(past), PASTS),
        )
    bases = (PASTS[past], Finetune)
    known = {f.name for base in bases for f in fields(base)}
    if clash := known & set(names):
        raise AvalancheError(
            "an argument of the plugin has the name of one of clbench's settings",
            where=spec,
            got=", ".join(sorted(clash)),
            next_step="derive a class whose constructor calls it otherwise",
        )
    # named as it was asked for, so that no other class of the same name shares its runs
    strategy = make_dataclass(
        spec, options, bases=bases, frozen=True, kw_only=True,
        namespace={"plugin": spec, "arguments": arguments, "__module__": __name__},
    )  # fmt: skip
    return change(strategy(**required), given, "strategy")  # type: ignore[no-any-return]


class Stored(PluginStrategy):
    """A plugin that stores cases: `--set strategy.past=cases` declares it."""

    def declares(self) -> Declaration:
        """The cases that the plugin stores."""
        return replace(super().declares(), past="cases")


PASTS: Mapping[str, type[Any]] = {"weights": PluginStrategy, "cases": Stored}
"""What a plugin may declare as `past`, and what makes a strategy of it."""


def _literal(text: Any) -> Any:
    try:
        return ast.literal_eval(str(text))
    except (ValueError, SyntaxError):
        return str(text)
