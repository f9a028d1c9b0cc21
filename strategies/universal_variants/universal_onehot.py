"""The Universal Model without language: what is its text worth?

By default everything is as in `universal` but the vectors: one coordinate per structure instead of
text, same length, same norm, same network. `as_built=true` is what the authors ran as "1-hot": each
structure has its own smaller network, fed with the image vector alone; so the table's two rows
differ in size by nine times as well as in language.

Source: paper, section 5.3 and Table 11, "Ours (1-hot)"; the authors' code for `as_built`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.nets.heads import UniversalHead
from clbench.nets.text_encodings import onehot
from clbench.strategies.universal import Universal
from clbench.strategy import Kit, Lesson, Strategy


@dataclass(frozen=True, kw_only=True)
class UniversalOnehot(Universal):
    """The Universal Model's heads conditioned on one-hot vectors instead of text."""

    as_built: bool = False
    """No vector at all and a controller of 256-128-153 per structure, as the authors built it."""

    def first_step(self) -> Strategy:
        """In step 1 there is nothing old, so nothing that tells the variants apart."""
        return UniversalOnehot(as_built=self.as_built, legacy_slice_dice=self.legacy_slice_dice)

    def head(self, backbone: nn.Module) -> nn.Module:
        """The Universal Model's head, or the authors' smaller one."""
        if not self.as_built:
            return super().head(backbone)
        return UniversalHead(
            backbone.final_channels,
            backbone.bottleneck_channels,
            text_dim=0,
            hidden=min(128, backbone.controller_width),
        )

    def vectors(self, kit: Kit, step: Lesson) -> Tensor:
        """(structures of this step, 512 or 0): one-hot, or nothing."""
        if self.as_built:
            return torch.zeros(len(step.learns), 0)
        vectors = onehot(step.structures, prompt="v3", path=None).array
        return torch.from_numpy(vectors[len(step.old) :])
