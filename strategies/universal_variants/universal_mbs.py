"""MBS for one sigmoid per structure: the Universal Model's heads with the terms of `mbs`.

There is no background vector here, so nothing is copied at the start and background is not among
the vectors that new ones keep away from. Everything else reduces channel by channel; class vectors
are the 153 generated parameters of each structure, per image.

Source: Park et al., ECCV 2024 (MBS), on the heads of Liu et al., Medical Image Analysis 2024; a
port of this project: no code of others combines the two. Differs: see `mbs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.nets.heads import ConvHead
from clbench.strategies.finetune import Finetune
from clbench.strategies.mbs import SelectiveDistillation
from clbench.strategy import Batch, Memory, Output, Terms
from clbench.strategy.losses import dice_bce
from clbench.strategy.selective_distillation import (
    guided_distillation_sigmoid,
    selective_targets,
    weighted_feature_mse,
)


@dataclass(frozen=True, kw_only=True)
class SelectiveSigmoids(SelectiveDistillation):
    """MBS' selective labels, distillation and class vectors, before a method with sigmoids."""

    unlabelled: Literal["ignore"] = "ignore"
    legacy_slice_dice: bool = False
    """Dice per slice along axis 0, as the authors' code computes it."""

    def class_vectors(self, model: nn.Module, output: Output, names: tuple[str, ...]) -> Tensor:
        """(B, K, 153): what the universal head generates for these images; (1, K, F): rows."""
        head: Any = model.head
        if isinstance(head, ConvHead):
            return torch.stack([head.weight[name].flatten() for name in names])[None]
        generated: Tensor = head.generate(output.features["bottleneck"], names)
        return generated

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice and binary cross-entropy on selective targets; distillation of features and output.

        Source: Park et al., ECCV 2024, and their code. Differs: see the head of this file.
        """
        if old is None:
            return super().losses(batch, new, old, memory)
        target, known, weight = selective_targets(batch, old.logits, threshold=self.threshold)
        terms = dice_bce(new.logits, target, known, slicewise=self.legacy_slice_dice)
        if self.weight_feat:
            terms["features"] = self.weight_feat * weighted_feature_mse(
                new.features["final"], old.features["final"], weight
            )
        if self.weight_out:
            terms["distill"] = self.weight_out * guided_distillation_sigmoid(
                new.logits, old.logits, batch
            )
        return terms


@dataclass(frozen=True, kw_only=True)
class UniversalMbs(SelectiveSigmoids, Finetune):
    """The Universal Model's heads with MBS' terms: `universal+mbs` by a name of its own."""

    unlabelled: Literal["ignore"] = "ignore"
