"""Made-up batches, answers and weights for the rules about losses: every voxel under control.

Room: row 5 (torch).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from clbench.strategy import UNKNOWN, Batch, Lesson, Output
from clbench.taxonomy import ancestors

PATCH = 16
"""Edge of a patch in voxels."""


def made_batch(lesson: Lesson, *, pseudo: bool = False, seed: int = 0) -> Batch:
    """Two crops in which every structure is annotated everywhere: a box each, children in parents.

    Args:
        lesson: its structures.
        pseudo: with pseudo labels, of which there are none anywhere (255).
        seed: of image noise.
    """
    rng = torch.Generator().manual_seed(seed)
    label = torch.zeros(2, len(lesson.structures), PATCH, PATCH, PATCH, dtype=torch.uint8)
    top = [n for n in lesson.structures if not set(ancestors(n)) & set(lesson.structures)]
    half, rest = PATCH // 2, PATCH // 2 - 1
    for k, name in enumerate(lesson.structures):
        up = [n for n in ancestors(name) if n in lesson.structures]
        octant = top.index(up[-1] if up else name) % 8
        depth = len(up)  # one voxel further in per generation
        x, y, z = (
            slice(half * (octant >> axis & 1) + 1 + depth, half * (octant >> axis & 1) + rest)
            for axis in range(3)
        )
        label[:, k, x, y, z] = 1
    image = 0.3 + 0.1 * torch.randn(2, 1, PATCH, PATCH, PATCH, generator=rng)
    image += 0.3 * label.float().mean(1, keepdim=True)
    return Batch(
        image=image,
        label=label,
        pseudo=torch.full_like(label, 255) if pseudo else None,
        structures=lesson.structures,
        new=lesson.new_flags,
        cases=(f"{lesson.number}/a", f"{lesson.number}/b"),
    )


def relabel(batch: Batch, label: Tensor) -> Batch:
    """The batch with another label."""
    return replace(batch, label=label)


def loud(output: Output, seed: int) -> Output:
    """An answer of the same shape that is sure of itself, with leaves that take gradients."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=rng)

    return Output(
        logits=drawn(output.logits, 3.0).requires_grad_(True),
        features={k: drawn(v, 1.0).requires_grad_(True) for k, v in output.features.items()},
    )


def perturb(model: nn.Module, seed: int = 0, size: float = 0.2) -> None:
    """Move every weight by a fixed perturbation, in units of its tensor's spread."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                spread = float(p.std()) if p.numel() > 1 else 0.0
                p.add_(torch.randn(p.shape, generator=rng), alpha=size * max(spread, 0.05))


def padded(batch: Batch) -> Batch:
    """Nothing known in the last slabs."""
    label = batch.label.clone()
    label[:, :, -4:] = UNKNOWN
    return relabel(batch, label)
