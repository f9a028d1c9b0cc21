"""Pruning by magnitude: which weights of a module go, how many are left.

Room: row 2 (torch). Masks are plain bool tensors by parameter name, so they fit in a checkpoint;
a pruned weight is a real zero in the state dict.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]
SPARSITIES = (80, 82, 84, 86, 88, 90, 92, 94, 96, 98, 99, 99.2, 99.4, 99.6, 99.8)
"""Cumulative percentages; source: the released code of Ji et al. (ICCV 2023)."""


def steps_of(cumulative: Sequence[float]) -> list[float]:
    """Cumulative percentages → fraction of the remaining weights that each step removes.

    `1 - (1 - p_i) / (1 - p_(i-1))`. Source: the released code of Ji et al.
    """
    left = [1.0, *(1 - p / 100 for p in cumulative)]
    return [1 - b / a for a, b in itertools.pairwise(left)]


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """Name → weight of every convolution and transposed convolution; no bias, no normalization."""
    kinds: Any = (nn.Conv3d, nn.ConvTranspose3d)
    return {
        f"{name}.weight": part.weight for name, part in module.named_modules()
        if isinstance(part, kinds)
    }  # fmt: skip


def magnitude_masks(module: nn.Module, before: Mapping[str, Tensor], fraction: float) -> Masks:
    """Masks without the smallest `fraction` of the weights that `before` left, over all layers.

    Args:
        module: its prunable weights are compared by absolute value.
        before: name → bool mask; a name that is missing is whole.
        fraction: share of the remaining weights to remove, rounded to a whole number of them.
    """
    weights = prunable(module)
    kept = {
        n: before.get(n, torch.ones_like(w, dtype=torch.bool)).to(w.device)
        for n, w in weights.items()
    }
    values = torch.cat([w.detach().abs()[kept[n]] for n, w in weights.items()])
    drop = round(fraction * values.numel())
    if drop == 0:
        return {n: m.clone() for n, m in kept.items()}
    gone = torch.zeros_like(values, dtype=torch.bool)
    gone[values.argsort(stable=True)[:drop]] = True
    found, at = {}, 0
    for n, mask in kept.items():
        count = int(mask.sum())
        left = mask.clone()
        left[mask] = ~gone[at : at + count]
        found[n], at = left, at + count
    return found


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights to zero, in place."""
    with torch.no_grad():
        for name, weight in prunable(module).items():
            if name in masks:
                weight.mul_(masks[name].to(weight.device))


def left_after(weights: int, percentages: Sequence[float]) -> int:
    """How many of so many weights are left when every pruning step is taken."""
    for fraction in steps_of(percentages):
        weights -= round(fraction * weights)
    return weights


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are not zero."""
    every = list(module.parameters())
    return sum(p.numel() for p in every), sum(int(p.count_nonzero()) for p in every)
