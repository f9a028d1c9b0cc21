"""Reference forms of networks, and the shapes of their maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clbench.nets.backbones import Backbone
from clbench.nets.heads import WIDTH, split_parameters


def dynamic_head_plain(features: Tensor, params: Tensor) -> Tensor:
    """The textbook form of `dynamic_head`: three grouped 1×1×1 convolutions.

    Args:
        features: (B, 8, D, H, W).
        params: (B, C, 153).

    Returns:
        (B, C, D, H, W) logits.
    """
    out = []
    count = params.shape[1]
    for x, p in zip(features, params, strict=True):
        w1, w2, w3, b1, b2, b3 = split_parameters(p)
        x = x[None].repeat(1, count, 1, 1, 1)
        for w, b in ((w1, b1), (w2, b2), (w3, b3)):
            x = functional.conv3d(x, w.reshape(-1, WIDTH, 1, 1, 1), b.reshape(-1), groups=count)
            if w is not w3:
                x = functional.relu(x)
        out.append(x)
    return torch.cat(out)


def map_shapes(backbone: Backbone, patch: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Map → (channels, d, h, w) for one patch."""
    with torch.no_grad():
        maps = backbone.eval()(torch.zeros(1, 1, *patch))
    return {name: tuple(m.shape[1:]) for name, m in maps.items()}
