"""Distillation: a new model held to the answers of the old one, and old answers used as labels.

Teachers are constants: no gradient ever reaches the old model's output. Shapes
are (B, C, …) with any number of spatial axes; in softmax losses channel 0 is background.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clbench.strategy.partial_labels import marginal_ce
from clbench.strategy.sharding import denominator

BINS = 10_000
"""Entropy bins of `entropy_histogram`: a median is right to 1e-4."""


def stored_logits_mse(
    new: Tensor, stored: Sequence[Tensor], inside: Tensor, *, centred: bool = False
) -> Tensor:
    """Mean squared difference of logits and those stored, over stored channels and voxels inside.

    Args:
        new: (B, C, …) logits; channels beyond the stored ones of a crop are free.
        stored: B tensors (C_b, …), C_b <= C: each crop may know another number of channels.
        inside: (B, 1, …) bool, voxels of the volume.
        centred: take each voxel's mean over the stored channels from both sides first, as a softmax
            ignores it.

    Returns:
        Scalar; 0 where nothing is inside.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import stored_logits_mse
        >>> new = torch.tensor([[[1.0, 2.0], [0.0, 9.0]]])  # two channels of two voxels
        >>> inside = torch.tensor([[[True, False]]])
        >>> stored_logits_mse(new, [torch.tensor([[3.0, 0.0]])], inside).item()  # (1 - 3)²
        4.0

    Source: Buzzega et al., NeurIPS 2020, eq. 6 (Dark Experience Replay), and their code: raw
    logits, mean over all of them. Differs: of the channels a crop was stored with.
    """
    total, count = new.new_zeros((), dtype=torch.float32), inside.new_zeros((), dtype=torch.long)
    for z, kept, here in zip(new, stored, inside, strict=True):
        now, before = z[: len(kept)].float(), kept.detach().to(z.device).float()
        if centred:
            now, before = now - now.mean(dim=0), before - before.mean(dim=0)
        total = total + ((now - before).square() * here).sum()
        count = count + here.sum() * len(kept)
    return total / denominator(count)


def kd_softmax(new: Tensor, old: Tensor, *, temperature: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Cross-entropy of the old model's softmax and the new one's over the same channels.

    Args:
        new: (B, C, …) logits; channels beyond the old model's are cut off before the softmax.
        old: (B, C_old, …) logits.
        temperature: divides both logits.
        alpha: sharpens the old model's logits alone.

    Returns:
        (B, …): -1/C_old Σ_c q_c ln p_c, per voxel.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import kd_softmax
        >>> same = torch.zeros(1, 2, 1)  # both models say 0.5 and 0.5
        >>> round(float(kd_softmax(same, same)), 4)  # (0.5 ln 2 + 0.5 ln 2) / 2
        0.3466

    Source: Li and Hoiem, ECCV 2016, section 3 (distillation loss). Differs: mean over channels,
    as in the public segmentation ports (Cermelli et al., CVPR 2020); their sum is C_old times as
    large.
    """
    q = (old.detach().float() * (alpha / temperature)).softmax(dim=1)
    log_p = (new[:, : old.shape[1]].float() / temperature).log_softmax(dim=1)
    return -(q * log_p).mean(dim=1)


def kd_unbiased(new: Tensor, old: Tensor, *, alpha: float = 1.0) -> Tensor:
    """The same, the new structures counted as background: what the old model would call them.

    Args:
        new: (B, C, …) logits, C >= C_old.
        old: (B, C_old, …) logits.
        alpha: sharpens the old model's logits.

    Returns:
        (B, …): -1/C_old Σ_c q_c ln p_c with p_0 = p(background) + Σ p(new structure), per voxel.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import kd_unbiased
        >>> new, old = torch.zeros(1, 3, 1), torch.zeros(1, 2, 1)  # flat over 3 and 2 channels
        >>> round(float(kd_unbiased(new, old)), 4)  # (0.5 ln 3/2 + 0.5 ln 3) / 2
        0.376

    Source: Cermelli et al., CVPR 2020, section 3.2 (revisited distillation loss); the mean over
    channels as in their code.
    """
    count = old.shape[1]
    q = (old.detach().float() * alpha).softmax(dim=1)
    log_p = fold_new(new.float().log_softmax(dim=1), count)
    return -(q * log_p).mean(dim=1)


def fold_new(log_p: Tensor, count: int) -> Tensor:
    """(B, C, …) log-probabilities → (B, count, …): channels from `count` on joined to channel 0.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import fold_new
        >>> log_p = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> fold_new(log_p, 2).exp().tolist()
        [[0.75, 0.25]]
    """
    background = torch.cat([log_p[:, :1], log_p[:, count:]], dim=1).logsumexp(1, keepdim=True)
    return torch.cat([background, log_p[:, 1:count]], dim=1)


def kd_sigmoid(new: Tensor, old: Tensor) -> Tensor:
    """Binary cross-entropy of matching channels, the old model's sigmoid as target; scalar mean.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import kd_sigmoid
        >>> round(float(kd_sigmoid(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))), 4)  # ln 2
        0.6931

    Source: the authors' CT code of ILT, sigmoid head.
    """
    return functional.binary_cross_entropy_with_logits(new.float(), old.detach().float().sigmoid())


def feature_mse(new: Tensor, old: Tensor) -> Tensor:
    """Mean squared difference of two feature maps; scalar.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import feature_mse
        >>> float(feature_mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])))
        2.0

    Source: Michieli and Zanuttigh, ICCV Workshops 2019 (distillation on the intermediate feature
    space).
    """
    return functional.mse_loss(new.float(), old.detach().float())


# ------------------------------------------------------------------------ pseudo labels by entropy


def normalized_entropy(logits: Tensor) -> Tensor:
    """(B, C, …) logits → (B, …) entropy of the softmax divided by ln C: 0 certain, 1 flat.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import normalized_entropy
        >>> logits = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]])  # (1, 2 channels, 2 voxels)
        >>> [round(abs(e), 4) for e in normalized_entropy(logits)[0].tolist()]
        [1.0, 0.0]

    Source: Douillard et al., CVPR 2021, section 3.3 (pseudo labels by entropy). Differs: their code
    divides once more, by C and by the logarithm of the number of classes.
    """
    p = logits.float().softmax(dim=1)
    return -(p * (p + 1e-8).log()).sum(dim=1) / math.log(logits.shape[1])


def entropy_histogram(
    logits: Tensor, where: Tensor, *, bins: int = BINS, scale: float = 1.0
) -> Tensor:
    """Counts of entropies per channel that wins: (C, bins) int64. Histograms of cases add up.

    Args:
        logits: (B, C, …) of the old model.
        where: (B, …) bool: voxels to count (those the new labels call background).
        bins: equal bins over [0, 1].
        scale: factor on `normalized_entropy`.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import entropy_histogram
        >>> logits = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]])  # flat, and certain
        >>> entropy_histogram(logits, torch.ones(1, 2, dtype=torch.bool), bins=4).tolist()
        [[1, 0, 0, 1], [0, 0, 0, 0]]
    """
    count = logits.shape[1]
    entropy = normalized_entropy(logits)[where] * scale
    place = (entropy * bins).long().clamp(0, bins - 1)
    flat = logits.argmax(dim=1)[where] * bins + place
    return torch.bincount(flat, minlength=count * bins).view(count, bins)


def median_thresholds(histogram: Tensor, *, floor: float) -> Tensor:
    """The median entropy of each channel, linear within its bin: (C,) float32.

    Args:
        histogram: (C, bins), see `entropy_histogram`.
        floor: smallest threshold; also that of a channel that never wins.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import median_thresholds
        >>> histogram = torch.tensor([[0, 4, 0, 0], [0, 0, 0, 0]])  # the second channel never wins
        >>> median_thresholds(histogram, floor=0.125).tolist()  # the middle of 0.25 to 0.5
        [0.375, 0.125]

    Source: Douillard et al., CVPR 2021, section 3.3 (pseudo labels by entropy).
    """
    bins = histogram.shape[1]
    half = histogram.sum(dim=1, keepdim=True).double() / 2
    total = histogram.cumsum(dim=1).double()
    place = (total < half).sum(dim=1, keepdim=True).clamp(max=bins - 1)
    inside = histogram.gather(1, place).double()
    before = total.gather(1, place) - inside
    median = (place + (half - before) / inside.clamp(min=1)) / bins
    return median[:, 0].clamp(min=floor).float()


def legacy_thresholds(histogram: Tensor, *, floor: float) -> Tensor:
    """The thresholds PLOP's code takes for medians: (C,) float32.

    Its walk through the bins adds the index of a bin where it means the count in it, so it stops at
    the first bin that holds about half of all voxels, or runs to the end.

    Args:
        histogram: (C, bins); the code has 100 bins and divides the normalized entropy by
            C · ln(classes so far).
        floor: smallest threshold; also that of a channel that never wins.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import legacy_thresholds
        >>> legacy_thresholds(torch.tensor([[4, 0, 0, 0]]), floor=0.001).tolist()  # (0 + 2 / 4) / 4
        [0.125]

    Source: the public code of Douillard et al., CVPR 2021.
    """
    bins = histogram.shape[1]
    thresholds = torch.full((len(histogram),), floor)
    for c, counts in enumerate(histogram.double()):
        half, walked = counts.sum() / 2, 0.0
        if half <= 0:
            continue
        for place in range(bins):
            if walked <= half <= walked + counts[place]:
                break
            walked += place
        value = (place + (half - walked) / counts[place]) / bins  # may be infinite: all pass
        thresholds[c] = value if not value < floor else floor
    return thresholds


def entropy_gate(old: Tensor, thresholds: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the old model says, and where it is sure enough.

    Args:
        old: (B, C, …) logits.
        thresholds: (C,) one per channel.
        scale: factor on `normalized_entropy`.

    Returns:
        (B, …) int64 winning channel, and (B, …) bool: entropy strictly below that channel's
        threshold.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import entropy_gate
        >>> logits = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]])  # flat, and certain
        >>> winner, sure = entropy_gate(logits, torch.tensor([0.5, 0.5]))
        >>> winner.tolist(), sure.tolist()
        ([[0, 0]], [[False, True]])

    Source: Douillard et al., CVPR 2021, section 3.3 (pseudo labels by entropy).
    """
    winner = old.detach().argmax(dim=1)
    sure = normalized_entropy(old.detach()) * scale < thresholds.to(old.device)[winner]
    return winner, sure


def gated_ce(
    logits: Tensor,
    allowed: Tensor,
    old: Tensor,
    thresholds: Tensor,
    *,
    scale: float = 1.0,
    adaptive: bool = True,
) -> Tensor:
    """Cross-entropy in which sure answers of the old model stand in for missing labels.

    A voxel that may be background or an old structure by its labels takes the old model's channel
    where that is sure and allowed; elsewhere it is left out. Where the old model says background,
    new structures that a case does not annotate stay allowed beside it: the old model, which never
    knew them, calls them background. Each case counts with the share ν of such voxels that were
    accepted.

    Args:
        logits: (B, C, …).
        allowed: (B, C, …) bool, see `clbench.strategy.partial_labels.allowed_channels`.
        old: (B, C_old, …) logits of the old model; its channels are the first of C.
        thresholds: (C_old,), see `entropy_gate`.
        scale: see `entropy_gate`.
        adaptive: weigh each case by ν; without open voxels it counts fully.

    Returns:
        Scalar: mean over all voxels whose labels say anything, those left out counting 0.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import gated_ce
        >>> logits, old = torch.zeros(1, 3, 1), torch.tensor([[[0.0], [50.0]]])
        >>> allowed = torch.tensor([[[True], [True], [False]]])  # background or the old structure
        >>> sure = gated_ce(logits, allowed, old, torch.tensor([0.5, 0.5]))
        >>> round(float(sure), 4)  # the old model is sure of channel 1: -ln 1/3
        1.0986
        >>> unsure = gated_ce(logits, allowed, 0 * old, torch.tensor([0.5, 0.5]))
        >>> float(unsure)  # left out
        0.0

    Source: Douillard et al., CVPR 2021, section 3.3 (pseudo labels by entropy). Differs: theirs
    annotates every new structure in every case.
    """
    count = old.shape[1]
    says = ~allowed.all(dim=1)
    open_ = says & allowed[:, 0] & allowed[:, 1:count].any(dim=1)
    winner, sure = entropy_gate(old, thresholds, scale=scale)
    accepted = open_ & sure & allowed.gather(1, winner.unsqueeze(1))[:, 0]
    chosen = functional.one_hot(winner, logits.shape[1]).movedim(-1, 1).bool()
    chosen[:, count:] = allowed[:, count:] & (winner == 0).unsqueeze(1)
    closed = torch.where(accepted.unsqueeze(1), chosen, allowed)
    taught = says & (accepted | ~open_)
    loss = torch.where(taught, marginal_ce(logits, closed), 0.0).flatten(1).sum(dim=1)
    if adaptive:
        loss = loss * _share(accepted, open_)
    return loss.sum() / denominator(says.sum())


def _share(accepted: Tensor, open_: Tensor) -> Tensor:
    """(B,) ν: accepted of all open voxels per case; 1 where none is open."""
    asked = open_.flatten(1).sum(dim=1)
    share = accepted.flatten(1).sum(dim=1) / asked.clamp(min=1)
    return torch.where(asked > 0, share, torch.ones_like(share))


# --------------------------------------------------------------------------------------------------
# Local pooled-output distillation (POD): two feature maps compared by means over strips of cells.
# Works on maps (B, C, …) with any number of spatial axes; so the 2-D original
# and the 3-D port are one function.


SCALES = (1, 2, 4)
"""Cells per axis."""


def local_pod(
    new: Tensor, old: Tensor, *, scales: Sequence[int] = SCALES, pooled_axes: int = 1
) -> Tensor:
    """Distance of two maps after squaring and local pooling: (B,), one per sample.

    At scale s each axis is cut into s cells of floor(size / s); the rest is left out, and a scale
    finer than the map says nothing. In each cell, the mean is taken over every choice of
    `pooled_axes` axes. The distance is the Euclidean norm over all these means.

    Args:
        new: (B, C, …); receives the gradient.
        old: (B, C, …); a constant.
        scales: cells per axis.
        pooled_axes: 1: the means keep a plane in 3-D (a strip in 2-D); 2: a strip in 3-D.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import local_pod
        >>> new, old = torch.full((1, 1, 2, 2, 2), 2.0), torch.zeros(1, 1, 2, 2, 2)
        >>> round(float(local_pod(new, old, scales=(1,))), 4)  # 12 means of 2²: 4 sqrt(12)
        13.8564

    Source: Douillard et al., CVPR 2021, section 3.2, Local POD (2-D, squared maps as in their
    code); `pooled_axes=1` in 3-D is the authors' CT code. Differs: each axis has its own cell size,
    where the codes take the last axis's for all; equal for cubes.
    """
    # pooling is linear, so the difference is pooled once instead of each map
    difference = new.float().square() - old.detach().float().square()
    size = difference.shape[2:]
    norms = [torch.zeros(len(new), device=new.device)]
    for scale in scales:
        cells = [n // scale for n in size]
        if not all(cells):
            continue
        cut = difference
        for axis, c in enumerate(cells):
            cut = cut.narrow(2 + axis, 0, scale * c)
        split = cut.reshape(*cut.shape[:2], *itertools.chain(*((scale, c) for c in cells)))
        inner = [3 + 2 * axis for axis in range(len(size))]  # axes within a cell
        for axes in itertools.combinations(inner, pooled_axes):
            pooled = split.mean(dim=axes).flatten(1)
            norms.append(torch.linalg.vector_norm(pooled, dim=1))
    # the norm of norms is the norm of all; its gradient at 0 is 0, which a square root's is not
    distance: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return distance


def pod(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    *,
    factors: Mapping[str, float],
    current: int,
    learned: int,
    pooled_axes: int = 1,
) -> Tensor:
    """Mean over maps of factor · sqrt(current / learned) · mean over samples of `local_pod`.

    Args:
        new: name → map of the model in training.
        old: name → map of the old model.
        factors: the maps to compare, each with its factor.
        current: classes so far.
        learned: classes learned in this step.
        pooled_axes: see `local_pod`.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import pod
        >>> new = {"decoder": torch.ones(1, 1, 1, 1, 1)}
        >>> old = {"decoder": torch.zeros(1, 1, 1, 1, 1)}
        >>> loss = pod(new, old, factors={"decoder": 0.5}, current=4, learned=1)
        >>> round(float(loss), 4)  # 0.5 · sqrt(4) · sqrt(3)
        1.7321

    Source: Douillard et al., CVPR 2021, section 3.2, Local POD; factors and growing weight from
    their code.
    """
    growth = math.sqrt(current / learned)
    terms = [
        factor * growth * local_pod(new[name], old[name], pooled_axes=pooled_axes).mean()
        for name, factor in factors.items()
    ]
    return torch.stack(terms).mean()


def logits_for_pod(new: Tensor, old: Tensor) -> Tensor:
    """(B, C, …) → (B, C_old, …): new structures' logits summed into background.

    Example:
        >>> import torch
        >>> from clbench.strategy.distillation import logits_for_pod
        >>> logits_for_pod(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 2)).tolist()
        [[4.0, 2.0]]

    Source: the public code of Douillard et al., CVPR 2021.
    """
    count = old.shape[1]
    background = new[:, :1] + new[:, count:].sum(dim=1, keepdim=True)
    return torch.cat([background, new[:, 1:count]], dim=1)
