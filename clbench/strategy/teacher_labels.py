"""Pseudo labels: predictions of the previous model as labels of old structures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clbench.data.labels import PSEUDO_SCALE
from clbench.strategy.contract import UNKNOWN, Batch, Predictor

if TYPE_CHECKING:
    from clbench.data.volume import Volume


def labelled_on_line(batch: Batch, probabilities: Tensor) -> Batch:
    """The batch with soft pseudo labels that the old model makes of these very crops.

    The same numbers as `pseudo_labels` stores, up to the rounding of the blending, where one window
    holds the whole volume and the crop is not augmented. Otherwise the two differ on purpose:
    stored labels are of the volume as it is, blended over overlapping windows, and turn with their
    crop; on line the teacher sees what its student sees, the crop turned and shifted, without what
    lies around it. Nothing is predicted for padding, nor for a case without any annotation.

    Args:
        batch: without pseudo labels.
        probabilities: (B, K_old, D, H, W), the old model's; a constant.
    """
    inside = (batch.label != UNKNOWN).any(dim=1, keepdim=True)
    soft = (probabilities.detach().float() * PSEUDO_SCALE).round().to(torch.uint8)
    pseudo = torch.full_like(batch.label, UNKNOWN)
    pseudo[:, batch.old_index] = torch.where(inside, soft, UNKNOWN)
    return replace(batch, pseudo=pseudo)


def pseudo_labels(
    old: Predictor,
    volume: Volume,
    *,
    hard: bool,
    clean: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
) -> Tensor:
    """The old model's prediction as (K, D, H, W) uint8: round(254 p), or 0 / 254 when `hard`.

    Args:
        old: the model served after the previous step.
        volume: the case.
        hard: threshold strictly above 0.5 (a logit of exactly 0 is background).
        clean: post-processing of the (K, D, H, W) bool masks, for hard labels.
    """
    slabs = []
    for _, _, p in old.probabilities(volume):
        slabs.append((p > 0.5) if hard else (p * PSEUDO_SCALE).round().to(torch.uint8))
    labels = torch.cat(slabs, dim=1)
    if hard:
        if clean is not None:
            labels = clean(labels, old.structures)
        labels = labels.to(torch.uint8) * PSEUDO_SCALE
    return labels
