"""A frozen backbone with new heads: after step 1 nothing that answers for an old structure learns.

From step 2 on backbone and old heads are fixed, and only the heads of the new structures are
trained, each step's computed apart (`clbench.nets.stepwise_heads`): old logits stay equal to the
bit for images of equal shapes, and forgetting is 0 by construction. What it costs is plasticity:
read the Dice of the new structures beside it.

Source: Zhang et al., arXiv 2508.04267 (2025), whose DFT* freezes backbone and old classifiers; they
find that this equals most published methods. Differs: the Universal Model's heads, one sigmoid per
structure, so there is no background to compete with and nothing to allocate in advance
(`frozen_softmax` has both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from clbench.nets.heads import Segmenter
from clbench.nets.stepwise_heads import StepwiseUniversalHead, compute_by_step
from clbench.spec.settings import NotNegative
from clbench.strategies.parameter_isolation.new_structures import NewStructures
from clbench.strategy import Group, Kit, Lesson, Memory, Range, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Frozen(NewStructures):
    """Backbone and old heads are fixed after step 1; only the heads of new structures learn."""

    search_space: ClassVar[SearchSpace] = {"head_lr": Range(low=0.1, high=100.0, log=True)}
    head_lr: NotNegative = 1.0
    """Factor on the learning rate of new heads from step 2 on."""

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more controller per new structure, computed apart from the old ones."""
        compute_by_step(model, StepwiseUniversalHead, len(step.old))
        super().grow(model, kit, step)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """All in step 1, then the new structures' controllers."""
        if step.number == 1:
            return super().groups(model, step, memory)
        if not step.learns:
            return []
        assert isinstance(model, Segmenter)  # noqa: S101  # built by `Finetune.build`
        assert isinstance(model.head, StepwiseUniversalHead)  # noqa: S101  # grown above
        new = [p for name in step.learns for p in model.head.controllers[name].parameters()]
        return [Group(parameters=new, lr=self.head_lr)]
