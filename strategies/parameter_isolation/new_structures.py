"""Loss of the new structures alone, for methods whose old parameters never change."""

from __future__ import annotations

from torch import Tensor

from clbench.strategy import Batch, Output
from clbench.strategy.losses import dice_bce, targets


def new_structures_loss(batch: Batch, new: Output, *, slicewise: bool) -> dict[str, Tensor]:
    """Dice and binary cross-entropy of the new structures where they are annotated.

    Args:
        batch: crops with their labels.
        new: logits (B, K, D, H, W) of all structures.
        slicewise: Dice per axial slice.

    Source: Liu et al., Medical Image Analysis 2024, eq. 3 and 4, over the new structures alone.
    """
    target, known = targets(batch, unlabelled="ignore")
    k = batch.new_index
    return dice_bce(new.logits[:, k], target[:, k], known[:, k], slicewise=slicewise)
