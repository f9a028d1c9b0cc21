"""One channel per voxel from partial labels, and back: the targets and decoding of softmax heads.

A softmax gives each voxel to one channel (channel 0 is background), while
structures lie inside one another and some are not annotated. So a voxel's target is the *set* of
channels its labels allow: one channel where they decide, several where they leave it open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from clbench.spec.taxonomy import ancestors, depth, with_descendants
from clbench.strategy.contract import UNKNOWN, Batch
from clbench.strategy.losses import dice, targets
from clbench.strategy.sharding import denominator


def allowed_channels(
    batch: Batch, *, unlabelled: Literal["ignore", "background"] = "ignore"
) -> Tensor:
    """Which channels each voxel may belong to, by its labels.

    The deepest structure that is present wins (the tumor over the liver around it), together with
    what lies inside it and is unknown. Where nothing is present: background and every unknown
    structure. Annotation beats prediction: a predicted structure stands only where no annotated one
    does, or inside it, and never inside one annotated as absent. Of two equally deep structures the
    later channel wins.

    Args:
        batch: the crops.
        unlabelled: see `clbench.strategy.losses.targets`.

    Returns:
        (B, 1 + K, D, H, W) bool, channel 0 = background; all true where nothing is known.

    Example:
        >>> import torch
        >>> from clbench.strategy.contract import Batch
        >>> from clbench.strategy.partial_labels import allowed_channels
        >>> batch = Batch(
        ...     image=torch.zeros(1, 1, 1, 1, 2),
        ...     label=torch.tensor([[0, 1], [255, 255]], dtype=torch.uint8).view(1, 2, 1, 1, 2),
        ...     pseudo=None,
        ...     structures=("liver", "spleen"),
        ...     new=(True, True),
        ...     cases=("case1",),
        ... )
        >>> allowed_channels(batch)[0, :, 0, 0].tolist()  # background, liver, spleen
        [[True, False], [False, True], [True, False]]
    """
    target, known = targets(batch, unlabelled=unlabelled)
    present = known & (target > 0.5)
    absent = known & ~present
    firm = batch.label != UNKNOWN
    names = batch.structures
    above = [[names.index(a) for a in ancestors(s) if a in names] for s in names]
    order = sorted(range(len(names)), key=lambda k: (depth(names[k]), k))
    shape = (len(target), *target.shape[2:])
    winner = torch.zeros(shape, dtype=torch.long, device=target.device)
    for k in order:  # predictions first, so that annotations are painted over them
        stands = present[:, k] & ~firm[:, k]
        for a in above[k]:
            stands &= ~(firm[:, a] & absent[:, a])
        winner[stands] = k + 1
    for k in order:
        winner[present[:, k] & firm[:, k]] = k + 1
    for k in order:
        for a in above[k]:
            winner[present[:, k] & ~firm[:, k] & (winner == a + 1)] = k + 1

    nothing = winner == 0
    allowed = [nothing]
    for k in range(len(names)):
        room, open_ = nothing, ~known[:, k]
        for a in above[k]:
            room = room | (winner == a + 1)
            open_ = open_ & ~absent[:, a]
        allowed.append((winner == k + 1) | (room & open_))
    return torch.stack(allowed, dim=1)


def marginal_ce(logits: Tensor, allowed: Tensor) -> Tensor:
    """Per-voxel cross-entropy of a set of channels: -log of the sum of their probabilities.

    Args:
        logits: (B, C, …).
        allowed: (B, C, …) bool, at least one per voxel; one: plain cross-entropy; all: 0.

    Returns:
        (B, …) float32.

    Example:
        >>> import torch
        >>> from clbench.strategy.partial_labels import marginal_ce
        >>> allowed = torch.tensor([[[True], [True], [False], [False]]])
        >>> round(float(marginal_ce(torch.zeros(1, 4, 1), allowed)), 4)  # -ln (1/4 + 1/4)
        0.6931

    Source: with background and the old structures allowed together this is the cross-entropy of
    Cermelli et al., CVPR 2020, section 3.2. Differs: the set follows from the labels of each voxel.
    """
    logits = logits.float()
    closed = logits.masked_fill(~allowed, float("-inf"))
    return logits.logsumexp(1) - closed.logsumexp(1)


def mean_ce(logits: Tensor, allowed: Tensor) -> Tensor:
    """`marginal_ce` averaged over the voxels whose labels say anything; 0 where none does.

    Example:
        >>> import torch
        >>> from clbench.strategy.partial_labels import mean_ce
        >>> allowed = torch.tensor([[[True, True], [False, True]]])  # the second voxel is unknown
        >>> round(float(mean_ce(torch.zeros(1, 2, 2), allowed)), 4)  # ln 2, over one voxel
        0.6931
    """
    says = ~allowed.all(dim=1)
    loss = torch.where(says, marginal_ce(logits, allowed), 0.0)
    return loss.sum() / denominator(says.sum())


def sigmoid_dice(
    logits: Tensor,
    allowed: Tensor,
    batch: Batch,
    among: Sequence[int],
    *,
    slicewise: bool = False,
) -> Tensor:
    """Binary Dice of single structure channels, averaged over what a case annotates or predicts.

    Args:
        logits: (B, 1 + K, D, H, W).
        allowed: (B, 1 + K, D, H, W) bool, see `allowed_channels`.
        batch: the crops.
        among: structures to average over, as indices of `batch.structures`.
        slicewise: see `clbench.strategy.losses.dice`.

    Example:
        >>> import torch
        >>> from clbench.strategy.contract import Batch
        >>> from clbench.strategy.partial_labels import allowed_channels, sigmoid_dice
        >>> batch = Batch(
        ...     image=torch.zeros(1, 1, 1, 1, 4),
        ...     label=torch.ones(1, 1, 1, 1, 4, dtype=torch.uint8),
        ...     pseudo=None,
        ...     structures=("liver",),
        ...     new=(True,),
        ...     cases=("case1",),
        ... )
        >>> logits = torch.zeros(1, 2, 1, 1, 4)
        >>> loss = sigmoid_dice(logits, allowed_channels(batch), batch, [0])
        >>> round(float(loss), 4)  # 1 - 2 · 2 / (2 + 4 + 1)
        0.4286

    Source: the authors' CT code, which takes the sigmoid of single logits although its
    cross-entropy takes the softmax over them. A channel's target leaves out what lies deeper.
    """
    single = allowed.sum(dim=1, keepdim=True) == 1
    channels = allowed[:, 1:]
    _, labelled = targets(batch)
    taught = labelled.flatten(2).any(dim=2)[:, :, None, None, None]
    known = (single | ~channels) & taught
    pick = list(among)
    return dice(
        logits[:, 1:][:, pick], channels[:, pick].float(), known[:, pick], slicewise=slicewise
    )


def decode_channels(logits: Tensor, structures: Sequence[str], *, exclusive: bool) -> Tensor:
    """(B, 1 + K, …) logits → (B, K, …) probabilities, above 0.5 exactly where the argmax says so.

    A structure is its own channel or any below it in the taxonomy (liver = liver or liver tumor).
    Its probability is the sum of theirs, raised just above 0.5 where one of them is the largest of
    all channels and capped at 0.5 where none is; of equal channels the first counts as largest.

    Args:
        logits: channel 0 is background.
        structures: the K names.
        exclusive: take each channel alone, as the authors did: a tumor is then no liver.

    Example:
        >>> import torch
        >>> from clbench.strategy.partial_labels import decode_channels
        >>> logits = torch.tensor([[0.2, 0.3, 0.5]]).log()  # background, liver, liver tumor
        >>> names = ("liver", "liver_tumor")
        >>> inside = decode_channels(logits, names, exclusive=False)  # a liver tumor is liver too
        >>> [round(p, 4) for p in inside[0].tolist()]
        [0.8, 0.5]
        >>> alone = decode_channels(logits, names, exclusive=True)
        >>> [round(p, 4) for p in alone[0].tolist()]
        [0.3, 0.5]

    Source: the authors' CT code decodes by argmax over all channels.
    """
    p = logits.float().softmax(dim=1)
    winner = logits.argmax(dim=1)
    half = torch.tensor(0.5, device=p.device)
    above = torch.nextafter(half, torch.ones_like(half))
    probabilities = torch.empty_like(p[:, 1:])
    for k, name in enumerate(structures):
        below = (name,) if exclusive else with_descendants(name, structures)
        channels = [1 + list(structures).index(s) for s in below]
        chosen = torch.zeros_like(winner, dtype=torch.bool)
        for c in channels:
            chosen |= winner == c
        total = p[:, channels].sum(dim=1)
        probabilities[:, k] = torch.where(chosen, total.clamp(min=above), total.clamp(max=half))
    return probabilities
