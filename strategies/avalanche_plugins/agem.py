"""A-GEM: an update may not raise the loss on kept cases of earlier steps.

Avalanche's own plugin on top of fine-tuning. Before every update it computes the gradient of this
strategy's loss on crops of kept cases; where the new gradient points against it, that part is taken
out, after the backward pass. The run opens the kept cases through the ledger, by id.

The loss on a kept case is fine-tuning's own, to which every structure of an earlier step is old. So
a structure that the kept case does not annotate is background in it, also one that was learned
after the case was kept; those of the present step alone are left open. `derpp` and `joint` leave
all of them open.

Source: Chaudhry et al., ICLR 2019, eq. 11, in Avalanche 0.6. Differs: cases are kept whole, and
`sample_size` crops are cut anew for every update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from clbench.avalanche.supported import PluginStrategy
from clbench.spec.settings import Count
from clbench.strategies.finetune import Finetune
from clbench.strategy import Declaration


@dataclass(frozen=True, kw_only=True)
class Agem(PluginStrategy, Finetune):
    """Fine-tuning with Avalanche's A-GEM plugin: no update against kept old cases."""

    plugin: ClassVar[str] = "avalanche.training.plugins:AGEMPlugin"
    loose: ClassVar[tuple[str, ...]] = ("buffer_dataloader", "buffer_dliter", "reference_gradients")
    patterns_per_experience: Count = 2
    """Cases kept of every step; not tuned."""
    sample_size: Count = 4
    """Crops of kept cases per update, divided among the earlier steps: at least one of each."""

    def declares(self) -> Declaration:
        """The cases that the plugin stores."""
        return replace(super().declares(), past="cases")

    def arguments(self) -> dict[str, Any]:
        """The plugin's."""
        return {n: getattr(self, n) for n in ("patterns_per_experience", "sample_size")}

    def mend(self, plugin: Any) -> None:
        """Let the plugin make its loader anew, as it does when it stores the last step's cases.

        It divides `sample_size` by the number of earlier steps, and draws first when a step begins:
        of fewer crops than steps it would draw none.
        """
        plugin.sample_size = max(self.sample_size, len(plugin.buffers))
        plugin.update_memory(plugin.buffers.pop())
