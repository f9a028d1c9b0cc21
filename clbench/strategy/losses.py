"""Losses on known labels: what a voxel's target is, and Dice and cross-entropy where it is known.

"Known" is kept per case, structure and voxel, because a voxel that no
annotator looked at is neither background nor organ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clbench.data.labels import PSEUDO_SCALE
from clbench.errors import TrainingError
from clbench.strategy.contract import UNKNOWN, Batch
from clbench.strategy.sharding import denominator


def targets(
    batch: Batch,
    *,
    annotated_old: Literal["annotation", "pseudo"] = "annotation",
    unlabelled: Literal["ignore", "background"] = "ignore",
) -> tuple[Tensor, Tensor]:
    """What each voxel should be, and where that is known.

    Annotation comes first, then pseudo labels, then `unlabelled`. Padding (255 in every structure)
    stays unknown, and so does a structure that this very step teaches, new or again, where a case
    has neither of it.

    Args:
        batch: the crops.
        annotated_old: what teaches an old structure that is both annotated and predicted; one that
            the step teaches again is taught by its annotation.
        unlabelled: old structures with neither, of those that the step does not teach again: left
            out of the loss, or background.

    Returns:
        target: (B, K, D, H, W) float32 in [0, 1]; 0 where unknown.
        known: (B, K, D, H, W) bool.

    Example:
        >>> import torch
        >>> from clbench.strategy.contract import Batch
        >>> from clbench.strategy.losses import targets
        >>> batch = Batch(
        ...     image=torch.zeros(1, 1, 1, 1, 3),
        ...     label=torch.tensor([0, 1, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3),
        ...     pseudo=torch.tensor([0, 0, 254], dtype=torch.uint8).view(1, 1, 1, 1, 3),
        ...     structures=("liver",),
        ...     new=(False,),
        ...     cases=("case1",),
        ... )
        >>> target, known = targets(batch)
        >>> target.flatten().tolist(), known.flatten().tolist()  # the pseudo label fills the third
        ([0.0, 1.0, 1.0], [True, True, True])
    """
    known = batch.label != UNKNOWN
    inside = known.any(dim=1, keepdim=True)
    target = torch.where(known, batch.label, torch.zeros_like(batch.label)).float()
    if batch.pseudo is not None:
        predicted = (batch.pseudo != UNKNOWN) & _channels(batch, batch.old_index)
        inside = inside | predicted.any(dim=1, keepdim=True)
        if annotated_old == "annotation":
            predicted &= ~known
        else:
            again = [k for k in batch.taught_index if k not in batch.new_index]
            predicted[:, again] &= ~known[:, again]
        target = torch.where(predicted, batch.pseudo.float() / PSEUDO_SCALE, target)
        known = known | predicted
    if unlabelled == "background":
        known = known | (_channels(batch, batch.untaught_index) & inside)
    return target, known


def _channels(batch: Batch, index: Sequence[int]) -> Tensor:
    """(1, K, 1, 1, 1) bool: true in these channels."""
    chosen = torch.zeros(len(batch.structures), dtype=torch.bool, device=batch.label.device)
    chosen[list(index)] = True
    return chosen.view(1, -1, 1, 1, 1)


def dice(
    logits: Tensor,
    target: Tensor,
    known: Tensor | None = None,
    *,
    slicewise: bool = False,
) -> Tensor:
    """Binary 1 - Dice, averaged over the (case, structure) pairs known at all.

    Args:
        logits: (B, K, D, H, W).
        target: (B, K, D, H, W) in [0, 1].
        known: (B, K, D, H, W) bool; None: everywhere.
        slicewise: Dice per slice along D and averaged over slices, as the authors' code computes it
            (their Dice takes a case's first axis for the batch axis); a slice with nothing known is
            left out, a slice without target counts exactly 1.

    Returns:
        Scalar; 0 with gradient 0 where nothing is known. Dice is 2 Σ p t / (Σ p + Σ t + 1): the 1
        stands in the denominator alone, as in the authors' code.

    Raises:
        TrainingError: logits, target and known differ in shape.

    Example:
        >>> import torch
        >>> from clbench.strategy.losses import dice
        >>> logits = torch.zeros(1, 1, 1, 1, 4)  # p = 0.5 in four voxels
        >>> target = torch.tensor([1.0, 1.0, 1.0, 1.0]).view(1, 1, 1, 1, 4)
        >>> round(float(dice(logits, target)), 4)  # 1 - 2 · 2 / (2 + 4 + 1)
        0.4286

    Source: Liu et al., Medical Image Analysis 2024, eq. 3 and 4 (which writes a sum over classes;
    the code, and this, take the mean).
    """
    mask = _mask(logits, target, known, "clbench.strategy.losses.dice")
    return _dice(logits, target, mask, slicewise=slicewise)[0]


def bce(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Binary cross-entropy: mean over known voxels, then over the pairs known at all.

    Args:
        logits: (B, K, D, H, W).
        target: (B, K, D, H, W) in [0, 1].
        known: (B, K, D, H, W) bool; None: everywhere.

    Returns:
        Scalar; 0 with gradient 0 where nothing is known.

    Raises:
        TrainingError: logits, target and known differ in shape.

    Example:
        >>> import torch
        >>> from clbench.strategy.losses import bce
        >>> logits, target = torch.zeros(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1, 4)
        >>> round(float(bce(logits, target)), 4)  # ln 2
        0.6931

    Source: as `dice`.
    """
    mask = _mask(logits, target, known, "clbench.strategy.losses.bce")
    return _bce(logits, target, mask, _voxels(target, mask, _SPACE))


def dice_bce(
    logits: Tensor,
    target: Tensor,
    known: Tensor | None = None,
    *,
    slicewise: bool = False,
) -> dict[str, Tensor]:
    """`{"dice": …, "bce": …}`: both losses of the same logits, as scalars.

    Args:
        logits: (B, K, D, H, W).
        target: (B, K, D, H, W) in [0, 1].
        known: (B, K, D, H, W) bool; None: everywhere.
        slicewise: Dice per slice, see `dice`; the cross-entropy stays as it is.

    Example:
        >>> import torch
        >>> from clbench.strategy.losses import dice_bce
        >>> terms = dice_bce(torch.zeros(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1, 4))
        >>> {name: round(float(loss), 4) for name, loss in terms.items()}
        {'dice': 0.4286, 'bce': 0.6931}
    """
    mask = _mask(logits, target, known, "clbench.strategy.losses.dice_bce")
    overlap, voxels = _dice(logits, target, mask, slicewise=slicewise)
    return {"dice": overlap, "bce": _bce(logits, target, mask, voxels)}


def squared_dice(logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
    """Binary 1 - Dice with squared terms, averaged over the (case, structure) pairs known at all.

    1 - (2 Σ p t + 1e-4) / (Σ p² + Σ t² + 0.01), of one case and structure.

    Args:
        logits: (B, K, D, H, W).
        target: (B, K, D, H, W) in [0, 1].
        known: (B, K, D, H, W) bool; None: everywhere.

    Returns:
        Scalar; 0 with gradient 0 where nothing is known.

    Raises:
        TrainingError: logits, target and known differ in shape.

    Example:
        >>> import torch
        >>> from clbench.strategy.losses import squared_dice
        >>> logits, target = torch.zeros(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1, 4)
        >>> round(float(squared_dice(logits, target)), 4)  # 1 - 4.0001 / (1 + 4 + 0.01)
        0.2016

    Source: MONAI's DiceCELoss, with the settings of VISTA3D's continual-training recipe.
    """
    mask = _mask(logits, target, known, "clbench.strategy.losses.squared_dice")
    pairs = _voxels(target, mask, _SPACE) > 0
    p, t = _where(mask, torch.sigmoid(logits.float())), _where(mask, target)
    ratio = (2 * (p * target).sum(_SPACE) + 1e-4) / (
        p.square().sum(_SPACE) + t.square().sum(_SPACE) + 0.01
    )
    return ((1 - ratio) * pairs).sum() / denominator(pairs.sum())


_SPACE = (2, 3, 4)


def _dice(
    logits: Tensor, target: Tensor, mask: Tensor | None, *, slicewise: bool
) -> tuple[Tensor, Tensor]:
    """`dice`, and the (B, K) known voxels of each pair.

    Of the maps as large as the logits, the backward pass keeps the sigmoid, the target and the bool
    mask: `where` needs no mask of floats, and no masked target stays.
    """
    axes = (3, 4) if slicewise else _SPACE
    voxels, size = _voxels(target, mask, axes), _where(mask, target).sum(axes)
    p = _where(mask, torch.sigmoid(logits.float()))
    loss = 1 - 2 * (p * target).sum(axes) / (p.sum(axes) + size + 1)
    if slicewise:
        slices = (voxels > 0).to(loss.dtype)
        voxels = voxels.sum(2)
        loss = (loss * slices).sum(2) / slices.sum(2).clamp(min=1)
    pairs = voxels > 0
    return (loss * pairs).sum() / denominator(pairs.sum()), voxels


def _bce(logits: Tensor, target: Tensor, mask: Tensor | None, voxels: Tensor) -> Tensor:
    """`bce`, with the (B, K) known voxels of each pair."""
    loss = functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    loss = _where(mask, loss).sum(_SPACE) / voxels.clamp(min=1)
    return loss.sum() / denominator((voxels > 0).sum())


def _voxels(target: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> Tensor:
    """How many voxels of each pair, or of each of its slices, are known: float32."""
    if mask is not None:
        return mask.to(torch.float32).sum(axes)
    count = math.prod(target.shape[axis] for axis in axes)
    return torch.full(target.shape[: axes[0]], float(count), device=target.device)


def _where(mask: Tensor | None, values: Tensor) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)


def _mask(logits: Tensor, target: Tensor, known: Tensor | None, where: str) -> Tensor | None:
    """Where the target counts, None: everywhere; refuses other shapes.

    Most crops are known everywhere, and to find that out takes one pass through the mask where the
    losses take a dozen. On a GPU the host would have to wait for the answer.
    """
    for name, of in (("logits", logits), ("known voxels", known)):
        if of is not None and of.shape != target.shape:
            raise TrainingError(
                f"a loss was given {name} and targets of different shapes",
                where=where,
                expected=tuple(target.shape),
                got=tuple(of.shape),
                next_step="give one channel per structure of the batch",
            )
    if known is not None and known.device.type == "cpu" and bool(known.all()):
        return None
    return known
