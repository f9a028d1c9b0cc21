"""Elastic weight consolidation: weights that mattered to earlier steps are held where they were.

Avalanche's own plugin on top of fine-tuning. After each step it sums, over one crop of every
training case, the squared gradient of this strategy's loss; from then on each weight is pulled back
to its old value by that much. New structures bring new weights, which nothing holds.

Source: Kirkpatrick et al., PNAS 2017, eq. 3, in Avalanche 0.6. Differs: squared gradients of the
mean loss of a batch, not of single predictions; `ewc_lambda` multiplies the sum itself, not half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from clbench.avalanche.supported import PluginStrategy
from clbench.errors import SettingError
from clbench.spec.settings import NotNegative
from clbench.strategies.finetune import Finetune
from clbench.strategy import Declaration, Range, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Ewc(PluginStrategy, Finetune):
    """Fine-tuning with Avalanche's EWC plugin: important old weights are held."""

    version: ClassVar[int] = 2  # in version 1 the weight was 1, at which it did nothing
    serves_from: ClassVar[int | None] = 1
    earlier_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {"ewc_lambda": 1.0}}
    plugin: ClassVar[str] = "avalanche.training.plugins:EWCPlugin"
    search_space: ClassVar[SearchSpace] = {"ewc_lambda": Range(low=1e2, high=1e8, log=True)}
    ewc_lambda: NotNegative = 1e5
    """Weight of the penalty. By rule, not tuned: the power of ten at which going as far as plain
    fine-tuning goes would cost about as much as the loss at the start of the step. On the phantom
    (`tumor_ext`, seed 100) that path cost 3e-5 to 9e-5 at weight 1 after 40 to 80 updates of each
    step; longer training leaves smaller gradients, and asks for more."""
    mode: Literal["separate", "online"] = "separate"
    """One penalty per earlier step, or one for all that decays."""
    decay_factor: NotNegative | None = None
    """Of `online`, which needs it: factor on the importance of the steps before."""

    def __post_init__(self) -> None:
        online = self.mode == "online"
        if online != (self.decay_factor is not None):
            raise SettingError(
                "importance decays in the mode online alone, and there it needs a factor",
                where="strategy.decay_factor",
                expected="a factor of at least 0" if online else "none in the mode separate",
                got=self.decay_factor if self.decay_factor is not None else "none",
                next_step="--set strategy.decay_factor=0.9"
                if online
                else "--set strategy.mode=online, or leave strategy.decay_factor out",
            )

    def declares(self) -> Declaration:
        """The penalty; nothing of the plugin changes within a step, so any update will do."""
        return replace(super().declares(), penalties=("penalty",), resumes="update")

    def arguments(self) -> dict[str, Any]:
        """The plugin's."""
        return {n: getattr(self, n) for n in ("ewc_lambda", "mode", "decay_factor")}
