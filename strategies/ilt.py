"""ILT: distillation of the old model's softmax and of its encoder's features.

Source: Michieli and Zanuttigh, ICCV Workshops 2019 (distillation on the output layer, on the
intermediate features, frozen encoder). Differs: 3-D; both weights 100 and distillation on every
voxel, as in the port of Cermelli et al., CVPR 2020 (`where=old_and_background` is the original's
mask); the features are the bottleneck's; Dice is added as in step 1 (`dice=false` takes it out).
`ilt_ct` is what the paper's tables call ILT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from clbench.nets.heads import Segmenter
from clbench.spec.settings import NotNegative
from clbench.strategy import (
    Batch,
    Declaration,
    Group,
    Lesson,
    Memory,
    Output,
    Range,
    SearchSpace,
    Terms,
)
from clbench.strategy.distillation import feature_mse, kd_softmax
from clbench.strategy.sharding import denominator

from .softmax_finetune import SoftmaxFinetune


@dataclass(frozen=True, kw_only=True)
class Ilt(SoftmaxFinetune):
    """ILT: distillation of outputs and of encoder features."""

    search_space: ClassVar[SearchSpace] = {
        "weight": Range(low=1.0, high=1000.0, log=True),
        "feature_weight": Range(low=1.0, high=1000.0, log=True),
    }
    weight: NotNegative = 100.0
    """Weight of the output distillation, a mean over channels and voxels."""
    feature_weight: NotNegative = 100.0
    """Weight of the mean squared difference at the bottleneck."""
    where: Literal["everywhere", "old_and_background"] = "everywhere"
    """Voxels of the output distillation; the second leaves out those of new structures."""
    freeze_encoder: bool = False
    """Train the decoder alone after step 1 (the original's variant)."""

    def declares(self) -> Declaration:
        """Both distillations; a frozen encoder's features cannot move away."""
        penalties = ("distill",) if self.freeze_encoder else ("distill", "features")
        return replace(super().declares(), penalties=penalties)

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """All parameters, or all but the encoder's."""
        groups = super().groups(model, step, memory)
        if not self.freeze_encoder or step.number == 1:
            return groups
        assert isinstance(model, Segmenter)  # noqa: S101  # built by it; tells the type checker
        backbone: Any = model.backbone
        return [Group(parameters=list(backbone.decoder.parameters())), *groups[1:]]

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy and Dice on the new labels; distillation of outputs and of features.

        Source: Michieli and Zanuttigh, ICCV Workshops 2019, the sum of cross-entropy and the
        distillations on the output layer (L'_D) and on the intermediate feature space (L''_D).
        Differs: both at once by default, weighed by 100 as in the public code of Cermelli et al.;
        L'_D as a mean over channels, on every voxel (`where`); L''_D at the bottleneck; Dice beside
        the cross-entropy.
        """
        terms = super().losses(batch, new, old, memory)
        if old is None:
            return terms
        kd = kd_softmax(new.logits, old.logits)
        if self.where == "everywhere":
            term = kd.mean()
        else:
            distilled = ~(batch.label[:, batch.new_index] == 1).any(dim=1)
            term = torch.where(distilled, kd, 0.0).sum() / denominator(distilled.sum())
        terms["distill"] = self.weight * term
        if not self.freeze_encoder:
            terms["features"] = self.feature_weight * feature_mse(
                new.features["bottleneck"], old.features["bottleneck"]
            )
        return terms
