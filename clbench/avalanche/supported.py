"""Avalanche plugins as strategies: arguments, stored cases, and which plugins are refused.

The plugin itself is not changed and knows
nothing of clbench: `clbench.avalanche.plugin_session` plays its strategy.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from clbench.avalanche.lazy_import import load
from clbench.avalanche.plugin_state import KEY, stored
from clbench.errors import AvalancheError
from clbench.strategy.contract import Declaration, Lesson, Memory, PhaseContext, Session, Strategy

REFUSED: Mapping[str, str] = {
    "LwFPlugin": "its softmax runs over the units of one prediction and its loss is summed over "
    "voxels: with one old structure it is zero; clbench has `lwf`",
    "EarlyStoppingPlugin": "it waits for a metric of Avalanche's evaluator, which is never written "
    "here, and takes the missing metric for an answer; the length of training is the profile's",
    "LRSchedulerPlugin": "the schedule is the profile's (--set train.lr, train.warmup): what the "
    "plugin sets would be overwritten before every update",
    "RWalkPlugin": "it ends in an error as soon as the model has a new structure",
    "LFLPlugin": "it needs a network with Avalanche's own feature method",
    "FeatureDistillationPlugin": "it needs a network with Avalanche's own feature method",
    "MIRPlugin": "it takes the values 0, 1 and 255 of a mask for class numbers, so that it replays "
    "nothing; `replay` works",
    "GEMPlugin": "it needs the solver quadprog, which is not installed with clbench; agem is its "
    "successor without one",
}
"""Plugins that run here and do something else than they say, or cannot run; and why."""
REFUSED_ON_CPU: Mapping[str, str] = {
    "SynapticIntelligencePlugin": "it keeps a view of the weights where it means a copy, so that "
    "on the CPU its penalty is exactly 0; `ewc` and `mas` work",
}


def refuse(kind: type[Any], why: Mapping[str, str] = REFUSED) -> None:
    """Stop where a class is or inherits from a plugin of Avalanche that is known to be wrong.

    Raises:
        AvalancheError: it does; says why.
    """
    for base in kind.__mro__:
        if base.__module__.startswith("avalanche.") and base.__name__ in why:
            raise AvalancheError(
                f"Avalanche's {base.__name__} is refused: {why[base.__name__]}",
                where=f"{kind.__module__}:{kind.__qualname__}",
                next_step="choose another plugin or strategy, see `clbench list`",
            )


def find_plugin(spec: str) -> type[Any]:
    """The class `module:Class`, checked to be a plugin of Avalanche that may run here.

    Raises:
        AvalancheError: there is none, it is none, or it is known to be wrong here.
    """
    module, _, name = spec.partition(":")
    base = load("avalanche.core").SupervisedPlugin
    avalanche = module.partition(".")[0] == "avalanche"
    kind = getattr(load(module) if avalanche else importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise AvalancheError(
            "this is no plugin of Avalanche",
            where=spec,
            expected="a class that inherits from avalanche.core.SupervisedPlugin",
            got=type(kind).__name__ if not isinstance(kind, type) else kind.__qualname__,
        )
    refuse(kind)
    return kind


@dataclass(frozen=True, kw_only=True)
class PluginStrategy:
    """What makes a strategy of one whose updates a plugin of Avalanche takes part in.

    Stands before the strategy that gives network and loss: `class Ewc(PluginStrategy, Finetune)`;
    it is no strategy itself, so that it brings no defaults of its own. A run that was stopped goes
    on where the plugin's state is whole: between two steps.
    """

    plugin: ClassVar[str] = ""
    """`module:Class`."""
    loose: ClassVar[tuple[str, ...]] = ()
    """Attributes of the plugin that are not saved; `mend` makes them anew."""
    zero_penalty: Literal["fault", "allowed"] = "fault"
    """What it means if a plugin with `before_backward` leaves the loss as it is from step 2 on;
    `allowed`: for plugins that only look."""

    def declares(self) -> Declaration:
        """As the strategy it stands before; a stopped run starts its step anew."""
        return replace(cast(Strategy, super()).declares(), resumes="step")

    def arguments(self) -> dict[str, Any]:
        """The plugin's constructor arguments."""
        return {}

    def mend(self, plugin: Any) -> None:
        """Make what is `loose` anew, in a plugin whose other attributes are there again."""

    def first_step(self) -> Any:
        """Step 1 leaves the plugin's state behind, so it is not plain training."""
        return self

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        """The cases the plugin has stored: opened, and drawn by the plugin alone."""
        return {key: 0.0 for key in stored(memory) if key[0] != step.number}

    def published(self, memory: Memory) -> Memory:
        """Nothing of a plugin that has stored cases: their ids are of single patients."""
        whole = cast(Strategy, super()).published(memory)
        if not stored(memory):
            return whole
        return {k: v for k, v in whole.items() if k != KEY and not k.startswith(f"{KEY}.")}

    def session(self, context: PhaseContext) -> Session:
        """The plugin takes part in every update."""
        module = importlib.import_module("clbench.avalanche.plugin_session")
        session: Session = module.PluginSession(context, self)
        return session
