"""The first Universal Model (ICCV 2023): one controller for all structures, told apart by text.

Text vectors are projected to 256 numbers and joined to the image vector; a single linear layer
turns both into a structure's head. A new structure brings a text vector and no parameter. The past
is treated as `universal` does.

Source: Liu et al., ICCV 2023; the paper, section 4.1.2, describes this head, section 3.2.2 that of
`universal`. Differs: where a profile sets `train.prior`, it is set for the structures of step 1
alone, because later ones share their bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from clbench.nets.heads import Segmenter, SharedHead
from clbench.strategies.universal import Universal
from clbench.strategy import Kit, Lesson, Strategy


@dataclass(frozen=True, kw_only=True)
class UniversalV1(Universal):
    """The first Universal Model: one shared controller, conditioned on projected text."""

    def first_step(self) -> Strategy:
        """In step 1 there is nothing old, so nothing that tells the variants apart."""
        return UniversalV1(legacy_slice_dice=self.legacy_slice_dice)

    def head(self, backbone: nn.Module) -> nn.Module:
        """One controller for all structures."""
        return SharedHead(backbone.final_channels, backbone.bottleneck_channels)

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more text vector per new structure; no parameter is added or changed."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built above; tells the type checker
        model.add(step.learns, self.vectors(kit, step))
