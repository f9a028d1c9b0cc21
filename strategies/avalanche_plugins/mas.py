"""Memory aware synapses: weights to which the output was sensitive are held where they were.

Avalanche's own plugin on top of fine-tuning. After each step it averages, over one crop of every
training case, the size of the gradient of the squared length of the logits; annotation plays no
part in it. New structures bring new weights, which nothing holds.

Source: Aljundi et al., ECCV 2018, eq. 3 and 4, in Avalanche 0.6. Differs: gradients of the mean of
a batch and of its voxels, not of single points; importances of steps are mixed by `alpha`, not
summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from clbench.avalanche.supported import PluginStrategy
from clbench.spec.settings import NotNegative, Share
from clbench.strategies.finetune import Finetune
from clbench.strategy import Declaration, Range, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Mas(PluginStrategy, Finetune):
    """Fine-tuning with Avalanche's MAS plugin: weights the output depends on are held."""

    plugin: ClassVar[str] = "avalanche.training.plugins:MASPlugin"
    search_space: ClassVar[SearchSpace] = {"lambda_reg": Range(low=0.01, high=100.0, log=True)}
    lambda_reg: NotNegative = 1.0
    """Weight of the penalty; not tuned."""
    alpha: Share = 0.5
    """Share of the earlier steps in the importance."""

    def declares(self) -> Declaration:
        """The penalty; nothing of the plugin changes within a step, so any update will do."""
        return replace(super().declares(), penalties=("penalty",), resumes="update")

    def arguments(self) -> dict[str, Any]:
        """The plugin's."""
        return {"lambda_reg": self.lambda_reg, "alpha": self.alpha}
