"""Growing decoders: one encoder, and per step a decoder with its own output layer.

Decoders share nothing but the encoder's maps, so what one answers does not depend on
those that came later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clbench.nets.backbones import Backbone
from clbench.nets.heads import ConvHead
from clbench.nets.output import Output
from clbench.spec.taxonomy import ancestors


class GrowingDecoders(nn.Module):
    """The encoder of a backbone with several decoders.

    Args:
        backbone: its encoder is kept; its decoder becomes the first.
        names: structures of the first decoder.
        prior: probability with which their voxels start; None: as torch initializes.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], prior: float | None) -> None:
        super().__init__()
        decoder, backbone.decoder = backbone.decoder, nn.Identity()
        self.backbone = backbone
        self.decoders = nn.ModuleList()
        self.heads = nn.ModuleList()
        self.owned: list[tuple[str, ...]] = []
        self.structures: tuple[str, ...] = ()
        self._take(decoder, names, prior)

    def _take(self, decoder: nn.Module, names: Sequence[str], prior: float | None) -> None:
        head = ConvHead(self.backbone.final_channels, background=False)
        at = next(self.parameters()).device
        for name in names:
            head.add(name)
            if prior is not None:
                head.start(name, prior)
        self.decoders.append(decoder.to(at))
        self.heads.append(head.to(at))
        self.owned.append(tuple(names))
        self.structures = (*self.structures, *names)

    def add(
        self, names: Sequence[str], prior: float | None, fresh: nn.Module | None = None
    ) -> None:
        """One more decoder and output layer.

        Args:
            names: the structures it answers for.
            prior: see the class.
            fresh: the decoder; None: a copy of the last one.
        """
        self._take(copy.deepcopy(self.decoders[-1]) if fresh is None else fresh, names, prior)

    def newest(self) -> list[nn.Module]:
        """The last decoder and its output layer."""
        return [self.decoders[-1], self.heads[-1]]

    def forward(self, image: torch.Tensor) -> Output:
        """(B, 1, D, H, W) → logits (B, K, D, H, W), and the maps of encoder and last decoder."""
        encoded = self.backbone.encode(image)
        logits, decoded = [], {}
        for decoder, head, names in zip(self.decoders, self.heads, self.owned, strict=True):
            decoded = decoder(encoded)
            answer: Any = head(decoded, names)
            logits.append(answer)
        return Output(logits=torch.cat(logits, dim=1), features={**encoded, **decoded})


def one_winner(p: torch.Tensor, structures: Sequence[str]) -> torch.Tensor:
    """Probabilities of which at most one of any two exclusive structures is above 0.5.

    Args:
        p: (B, K, …) in [0, 1].
        structures: the K names; a structure and one inside it exclude nothing.

    Returns:
        (B, K, …): p, capped at 0.5 where an exclusive structure is more probable (of equal ones
        the earlier stays).
    """
    capped = p.clone()
    for k, name in enumerate(structures):
        for j, other in enumerate(structures):
            if j == k or name in ancestors(other) or other in ancestors(name):
                continue
            beaten = p[:, j] > p[:, k] if j > k else p[:, j] >= p[:, k]
            capped[:, k] = torch.where(beaten, capped[:, k].clamp(max=0.5), capped[:, k])
    return capped
