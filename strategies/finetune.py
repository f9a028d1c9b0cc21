"""Fine-tuning: teach the new structures, do nothing for the old ones. The field's lower bound.

Where the new data does not annotate an old structure, its voxels count as background, as they do
for anyone who trains on a new data set without thinking of the old one; `unlabelled=ignore` leaves
them out of the loss instead. The network is the Universal Model's, so that the bounds and
`universal` differ in their treatment of the past alone.

Source: the lower bound of class-incremental segmentation (Cermelli et al., CVPR 2020, "FT").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from clbench.nets.heads import Segmenter, UniversalHead
from clbench.strategy import Batch, Kit, Lesson, Memory, Output, Strategy, Terms
from clbench.strategy.losses import dice_bce, targets


@dataclass(frozen=True, kw_only=True)
class Finetune(Strategy):
    """Train on the new data only; old structures without annotation become background."""

    unlabelled: Literal["ignore", "background"] = "background"
    legacy_slice_dice: bool = False
    """Dice per slice along axis 0, as the authors' code computes it."""

    def first_step(self) -> Strategy:
        """Every method with this network starts alike: in step 1 there is nothing old."""
        return Finetune(legacy_slice_dice=self.legacy_slice_dice)

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """Backbone and universal head, one controller per structure of step 1."""
        with kit.fresh(step.number, "model"):
            backbone = kit.backbone()
            model = Segmenter(backbone, self.head(backbone))
            model.add(step.learns, self.vectors(kit, step), kit.prior)
        return model

    def head(self, backbone: nn.Module) -> nn.Module:
        """The output layer."""
        return UniversalHead(
            backbone.final_channels,
            backbone.bottleneck_channels,
            hidden=backbone.controller_width,
        )

    def vectors(self, kit: Kit, step: Lesson) -> Tensor:
        """(structures of this step, length) fixed vectors that condition the head."""
        return kit.encoding(step.learns)

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more controller per new structure; nothing else changes."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built above; tells the type checker
        with kit.fresh(step.number, "grow"):
            model.add(step.learns, self.vectors(kit, step), kit.prior)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice and binary cross-entropy over every known (case, structure).

        Source: paper, eq. 3 and 4. Differs: Dice over the whole patch, not per slice (see
        `legacy_slice_dice`); a mean over pairs where eq. 4 writes a sum.
        """
        target, known = targets(batch, unlabelled=self.unlabelled)
        return dice_bce(new.logits, target, known, slicewise=self.legacy_slice_dice)
