"""Replay: a few cases of earlier steps are kept, and trained on along with the new ones.

Avalanche's own plugin on top of fine-tuning. What it keeps are cases, by id: the run opens their
images through the ledger, and cuts a new crop every time. Every batch holds `batch_size_mem` crops
of kept cases beside those of the new step, so an update sees more crops than fine-tuning's.

The loss on a kept case is fine-tuning's own, to which every structure of an earlier step is old. So
a structure that the kept case does not annotate is background in it, also one that was learned
after the case was kept; those of the present step alone are left open. `derpp` and `joint` leave
all of them open.

Source: Avalanche 0.6, `ReplayPlugin` with `ExperienceBalancedBuffer`: equally many cases of every
step, drawn at random, `mem_size` in all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from clbench.avalanche.supported import PluginStrategy
from clbench.spec.settings import Count
from clbench.strategies.finetune import Finetune
from clbench.strategy import Declaration


@dataclass(frozen=True, kw_only=True)
class Replay(PluginStrategy, Finetune):
    """Fine-tuning with Avalanche's replay plugin: some old cases are kept and trained on."""

    plugin: ClassVar[str] = "avalanche.training.plugins:ReplayPlugin"
    mem_size: Count = 4
    """Cases kept in all; not tuned."""
    batch_size_mem: Count | None = None
    """Crops of kept cases in a batch; None: as many as of new ones."""

    def declares(self) -> Declaration:
        """The cases that the plugin stores."""
        return replace(super().declares(), past="cases")

    def arguments(self) -> dict[str, Any]:
        """The plugin's."""
        return {"mem_size": self.mem_size, "batch_size_mem": self.batch_size_mem}
