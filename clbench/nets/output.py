"""Network output: logits and feature maps; and how parameters are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are not zero."""
    every = list(module.parameters())
    return sum(p.numel() for p in every), sum(int(p.count_nonzero()) for p in every)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What a model answers."""

    logits: Tensor
    """(B, C, D, H, W); what the C channels mean is the strategy's business."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Named maps from the encoder's finest to the last: enc0…, bottleneck, dec…, final."""
