"""MiB: what is background today may be an old structure, and was a new one yesterday.

The cross-entropy lets an unannotated voxel be background or any structure not annotated; the
distillation counts the new structures as background, as the old model did; new channels start as
equal shares of background, so that growth changes no old structure's logit or probability (only
background's logit, which is why `keeps_old_logits` is not claimed then).

Source: Cermelli et al., CVPR 2020. Differs: 3-D; Dice is added as in step 1 (`dice=false` takes it
out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from clbench.spec.settings import NotNegative, Positive
from clbench.strategy import Batch, Declaration, Lesson, Memory, Output, Range, SearchSpace, Terms
from clbench.strategy.distillation import kd_unbiased

from .softmax_finetune import SoftmaxFinetune


@dataclass(frozen=True, kw_only=True)
class Mib(SoftmaxFinetune):
    """MiB: cross-entropy and distillation that model the background's shift."""

    search_space: ClassVar[SearchSpace] = {"weight": Range(low=0.1, high=1000.0, log=True)}
    unlabelled: Literal["ignore", "background"] = "ignore"
    splits_background: bool = True
    """Start new channels as equal shares of background; false: as torch initialises."""
    weight: NotNegative = 10.0
    """Weight of the distillation, a mean over channels and voxels."""
    alpha: Positive = 1.0
    """Sharpens the old model's logits."""

    def declares(self) -> Declaration:
        """The distillation; background's logit moves where it is shared out."""
        return replace(
            super().declares(), penalties=("distill",), keeps_old_logits=not self.splits_background
        )

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Unbiased cross-entropy and Dice on the new labels; unbiased distillation.

        Source: Cermelli et al., CVPR 2020, section 3.2, revisited cross-entropy, revisited
        distillation and initialization of the classifier. Differs: which channels a voxel may be
        follows from its own labels; Dice beside the cross-entropy; the distillation is a mean over
        channels weighed by 10, as in their public code.
        """
        terms = super().losses(batch, new, old, memory)
        if old is not None:
            kd = kd_unbiased(new.logits, old.logits, alpha=self.alpha)
            terms["distill"] = self.weight * kd.mean()
        return terms
