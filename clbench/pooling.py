"""Local pooled-output distillation (POD): two feature maps compared by means over strips of cells.

Room: row 2 (torch). Works on maps (B, C, …) with any number of spatial axes; so the 2-D original
and the 3-D port are one function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
    found: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return found


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

    Source: the public code of Douillard et al., CVPR 2021.
    """
    count = old.shape[1]
    background = new[:, :1] + new[:, count:].sum(dim=1, keepdim=True)
    return torch.cat([background, new[:, 1:count]], dim=1)
