"""Learning without Forgetting: the old model's softmax as a soft target for the new one.

The teacher runs on every batch; where the new data does not annotate an old structure its voxels
count as background, and distillation alone speaks for it. `lwf_ct` is what the paper's tables call
LwF.

Source: Li and Hoiem, ECCV 2016; as ported to segmentation by Cermelli et al., CVPR 2020. Differs:
3-D; weight 100 on a mean over channels (the port's; the original: weight 1 on a sum, temperature
2); no warm-up of the new channels alone; Dice is added as in step 1 (`dice=false` takes it out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from clbench.spec.settings import NotNegative, Positive
from clbench.strategy import Batch, Declaration, Lesson, Memory, Output, Range, SearchSpace, Terms
from clbench.strategy.distillation import kd_softmax

from .softmax_finetune import SoftmaxFinetune


@dataclass(frozen=True, kw_only=True)
class Lwf(SoftmaxFinetune):
    """Learning without Forgetting: distillation of the old model's softmax."""

    search_space: ClassVar[SearchSpace] = {
        "weight": Range(low=1.0, high=1000.0, log=True),
        "temperature": Range(low=1.0, high=4.0, log=True),
    }
    weight: NotNegative = 100.0
    """Weight of the distillation, a mean over channels and voxels."""
    temperature: Positive = 1.0
    """Softens both softmaxes; the term is multiplied by its square, which keeps the gradient's
    size (Hinton et al., 2015)."""
    alpha: Positive = 1.0
    """Sharpens the old model's logits alone."""

    def declares(self) -> Declaration:
        """The distillation."""
        return replace(super().declares(), penalties=("distill",))

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy and Dice on the new labels; distillation over the old channels.

        Source: Li and Hoiem, ECCV 2016, section 3, losses of the new task and of the old tasks'
        recorded responses. Differs: the mean over voxels and channels, weighed by 100, as in the
        public code of Cermelli et al. (theirs: a sum, weighed by 1, at temperature 2); background
        is one of the old channels; Dice beside the cross-entropy.
        """
        terms = super().losses(batch, new, old, memory)
        if old is not None:
            kd = kd_softmax(new.logits, old.logits, temperature=self.temperature, alpha=self.alpha)
            terms["distill"] = self.weight * self.temperature**2 * kd.mean()
        return terms
