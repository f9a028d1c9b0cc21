"""Selective pseudo labels and distillation, and class vectors kept apart: the terms of MBS.

Softmax forms first (channel 0 is background, the old model's channels come first), then the form
for one sigmoid per structure. Teachers are constants.

Source: Park et al., ECCV 2024 (MBS), and their code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clbench.spec.taxonomy import ancestors
from clbench.strategy.contract import UNKNOWN, Batch
from clbench.strategy.losses import targets
from clbench.strategy.sharding import denominator


def selective_channels(
    allowed: Tensor, old: Tensor, inside: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor]:
    """Which channels each voxel may belong to, once a sure old model has been asked.

    Asked are voxels that may be background or an old structure by their labels. Where the old
    model's most probable channel is an old structure, with at least `threshold`, it becomes the
    label; else, where the old structures together are more probable than background, the voxel is
    left out; else it is no old structure. Labels that decide are never touched.

    Args:
        allowed: (B, C, …) bool, see `clbench.strategy.partial_labels.allowed_channels`.
        old: (B, C_old, …) logits of the old model; its channels are the first of C.
        inside: (B, 1, …) bool, voxels of the volume; padding is not asked about.
        threshold: least probability of a pseudo label.

    Returns:
        channels: (B, C, …) bool; all true where a voxel is left out.
        left_out: (B, 1, …) bool.

    Source: Park et al., ECCV 2024, selective pseudo-labelling. Differs: structures that a label
    excludes are no candidates, and a new structure that a case does not annotate stays open.
    """
    count = old.shape[1]
    among = allowed[:, :count]
    open_ = among[:, :1] & among[:, 1:].any(dim=1, keepdim=True) & inside
    q = old.detach().float().softmax(dim=1).masked_fill(~among, 0.0)
    best, winner = q.max(dim=1, keepdim=True)
    sure = open_ & (winner > 0) & (best >= threshold)
    left_out = open_ & ~sure & (q[:, 1:].sum(dim=1, keepdim=True) > q[:, :1])
    rest = open_ & ~sure & ~left_out
    chosen = torch.zeros_like(allowed).scatter_(1, winner, True)
    no_old = allowed.clone()
    no_old[:, 1:count] = False
    channels = torch.where(sure, chosen, torch.where(rest, no_old, allowed))
    return channels | left_out, left_out


def selective_weights(
    channels: Tensor, left_out: Tensor, old: Tensor, new_present: Tensor, inside: Tensor
) -> Tensor:
    """(B, 1, …) weight of each voxel in the distillation of features.

    0 where a new structure is present, the voxel is left out or lies outside of the volume; 1 where
    it is an old structure; elsewhere the old model's probability of background.

    Args:
        channels: (B, C, …) bool, of `selective_channels`.
        left_out: (B, 1, …) bool, of the same.
        old: (B, C_old, …) logits of the old model.
        new_present: (B, 1, …) bool, a new structure is annotated here.
        inside: (B, 1, …) bool.

    Source: Park et al., ECCV 2024, adaptive feature distillation; golden `mbs_patch_weights`.
    """
    count = old.shape[1]
    background = old.detach().float().softmax(dim=1)[:, :1]
    old_structure = channels[:, 1:count].any(dim=1, keepdim=True) & ~channels[:, :1]
    weight = torch.where(old_structure, torch.ones_like(background), background)
    return weight.masked_fill(new_present | left_out | ~inside, 0.0)


def weighted_feature_mse(new: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    """Σ w (x - x°)² / the number of elements with w > 0; 0 where there is none.

    Args:
        new: (B, F, …) features.
        old: (B, F, …) the old model's.
        weight: (B, 1, …) in [0, 1].

    Source: Park et al., ECCV 2024, adaptive feature distillation. Differs: theirs is 0 / 0 on a
    crop full of new structures. The number, not the sum of the weights, divides, as in their code.
    """
    squares = (new.float() - old.detach().float()).square() * weight
    count = (weight > 0).sum() * new.shape[1]
    return squares.sum() / denominator(count)


def guided_distillation(
    new: Tensor, old: Tensor, new_channel: Tensor, known: Tensor | None = None
) -> Tensor:
    """Cross-entropy to the old softmax whose background moves to the new structure of the label.

    Args:
        new: (B, C, …) logits.
        old: (B, C_old, …) logits of the old model.
        new_channel: (B, 1, …) int64: channel of the new structure annotated here; 0 where none is.
        known: (B, 1, …) bool, voxels to count; None: all.

    Returns:
        Scalar mean over all C channels and the voxels counted.

    Source: Park et al., ECCV 2024, label-guided output distillation. Differs: guided by new
    structures alone, where theirs lets an old id overwrite its own target.
    """
    q = old.detach().float().softmax(dim=1)
    target = functional.pad(q, (0, 0) * (q.ndim - 2) + (0, new.shape[1] - q.shape[1]))
    guided = new_channel > 0
    moved = torch.where(guided, target[:, :1], 0.0)
    target = target.scatter_add(1, new_channel, moved)
    target[:, :1] = torch.where(guided, target[:, :1] * 0.0, target[:, :1])
    loss = -(target * new.float().log_softmax(dim=1)).mean(dim=1, keepdim=True)
    if known is None:
        return loss.mean()
    return (loss * known).sum() / denominator(known.sum())


def class_orthogonality(vectors: Tensor, first_new: int) -> Tensor:
    """Mean |cosine| between every new class vector and every other one.

    The other vector is a constant, so that only new classes move. Two equal vectors have no
    gradient: |cosine| = 1 is stationary.

    Args:
        vectors: (B, C, F) class vectors, old ones first.
        first_new: index of the first new one.

    Source: Park et al., ECCV 2024, orthogonal objective.
    """
    unit = functional.normalize(vectors.float(), dim=2)
    cosine = (unit[:, first_new:] @ unit.detach().transpose(1, 2)).abs()
    rows = torch.arange(cosine.shape[1], device=cosine.device)
    others = torch.ones_like(cosine, dtype=torch.bool)
    others[:, rows, rows + first_new] = False
    return (cosine * others).sum() / others.sum().clamp(min=1)


# ------------------------------------------------------------------------ one sigmoid per structure


def excluded_by(structures: Sequence[str], new: Sequence[int]) -> list[list[int]]:
    """For every structure, the new ones that cannot be in the same voxel: neither lies inside."""
    names = list(structures)
    return [
        [n for n in new if n != k and name not in ancestors(names[n])
         and names[n] not in ancestors(name)]
        for k, name in enumerate(names)
    ]  # fmt: skip


def selective_targets(
    batch: Batch, old: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of a sigmoid per structure, filled in by the old model where it is sure.

    An old structure that is not annotated is 1 where its old probability reaches `threshold`, 0
    where it is at most 0.5 or a new structure that excludes it is present, unknown in between.

    Args:
        batch: the crops.
        old: (B, K_old, …) logits of the old model; its structures are the first.
        threshold: least probability of a pseudo label.

    Returns:
        target: (B, K, …) float32; 0 where unknown.
        known: (B, K, …) bool.
        weight: (B, 1, …) of each voxel in the distillation of features: 0 where an old structure
            stays unknown, a new one is present or nothing is annotated, 1 where an old structure
            is, else 1 minus the largest old probability.

    Source: Park et al., ECCV 2024. Differs: the exact binary form of their rule; there is no
    background channel, so its probability is that of no old structure.
    """
    target, known = targets(batch)
    inside = (batch.label != UNKNOWN).any(dim=1, keepdim=True)
    count, p = old.shape[1], old.detach().float().sigmoid()
    present = (batch.label == 1)[:, batch.new_index]
    rivals = excluded_by(batch.structures, batch.new_index)
    for k in range(count):
        rival = torch.zeros_like(known[:, k])
        for n in rivals[k]:
            rival |= batch.label[:, n] == 1
        asked = ~known[:, k] & inside[:, 0]
        yes = asked & (p[:, k] >= threshold) & ~rival
        no = asked & ((p[:, k] <= 0.5) | rival)
        target[:, k] = torch.where(yes, 1.0, target[:, k])
        known[:, k] |= yes | no
    weight = 1 - p.amax(dim=1, keepdim=True)
    weight = weight.masked_fill((known & (target == 1))[:, :count].any(dim=1, keepdim=True), 1.0)
    hidden = ~known[:, :count].all(dim=1, keepdim=True) | present.any(dim=1, keepdim=True)
    return target, known, weight.masked_fill(hidden | ~inside, 0.0)


def guided_distillation_sigmoid(new: Tensor, old: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy to the old sigmoids; a new structure takes what no old one claims.

    Args:
        new: (B, K, …) logits.
        old: (B, K_old, …) logits of the old model; its structures are the first.
        batch: the crops; a new structure that is not annotated, and padding, are left out.

    Returns:
        Scalar mean over channels and voxels.

    Source: Park et al., ECCV 2024, label-guided output distillation. Differs: one sigmoid per
    structure, no background.
    """
    p = old.detach().float().sigmoid()
    label = batch.label[:, batch.new_index]
    inside = (batch.label != UNKNOWN).any(dim=1, keepdim=True)
    target = torch.cat([p, (1 - p.amax(dim=1, keepdim=True)) * (label == 1)], dim=1)
    known = torch.cat([inside.expand_as(p), label != UNKNOWN], dim=1)
    loss = functional.binary_cross_entropy_with_logits(new.float(), target, reduction="none")
    return (loss * known).sum() / denominator(known.sum())
