"""Training on the new structures alone, for methods whose old parameters never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clbench.strategies.finetune import Finetune
from clbench.strategy import Batch, Kit, Lesson, Memory, Output, Terms
from clbench.strategy.course_checks import refuse_steps_without_new_structures
from clbench.strategy.losses import dice_bce, targets


@dataclass(frozen=True, kw_only=True)
class NewStructures(Finetune):
    """Fine-tuning whose loss looks at the new structures alone."""

    unlabelled: Literal["ignore"] = "ignore"  # it looks at no old label

    def refuse_course(self, steps: Sequence[Lesson], kit: Kit) -> None:
        """A step without new structures has nothing to train."""
        refuse_steps_without_new_structures(self, steps)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice and binary cross-entropy of the new structures where they are annotated.

        Source: Liu et al., Medical Image Analysis 2024, eq. 3 and 4, over the new structures alone.
        """
        target, known = targets(batch, unlabelled=self.unlabelled)
        k = batch.new_index
        slices = self.legacy_slice_dice
        return dice_bce(new.logits[:, k], target[:, k], known[:, k], slicewise=slices)
