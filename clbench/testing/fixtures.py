"""Test fixtures: synthetic batches, outputs and weights, the tiny course and the tiny network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.nets.backbones import Backbone
from clbench.nets.output import Output
from clbench.reproducibility import seeded, threads
from clbench.spec.benchmark import Benchmark
from clbench.spec.taxonomy import ancestors
from clbench.spec.toml import load_benchmark
from clbench.strategy.contract import UNKNOWN, Batch, Lesson

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
        pseudo=torch.full_like(label, UNKNOWN) if pseudo else None,
        structures=lesson.structures,
        new=lesson.new_flags,
        again=lesson.again,
        cases=(f"{lesson.number}/a", f"{lesson.number}/b"),
    )


def relabel(batch: Batch, label: Tensor) -> Batch:
    """The batch with another label."""
    return replace(batch, label=label)


def confident_output(output: Output, seed: int, *, constant: bool = False) -> Output:
    """An answer of the same shape that is sure of itself.

    Args:
        output: gives the shapes.
        seed: of the values.
        constant: as of a teacher; else its tensors are leaves that take gradients.
    """
    rng = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor, scale: float) -> Tensor:
        return (scale * torch.randn(like.shape, generator=rng)).requires_grad_(not constant)

    return Output(
        logits=drawn(output.logits, 3.0),
        features={k: drawn(v, 1.0) for k, v in output.features.items()},
    )


def perturb(model: nn.Module, seed: int = 0, size: float = 0.2) -> None:
    """Move every weight by a fixed perturbation, in units of its tensor's spread.

    Args:
        model: changed in place.
        seed: of the perturbation.
        size: its standard deviation, as a share of a tensor's own.
    """
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


# --------------------------------------------------------------------------------------------------
# Equal to the bit, and the conditions under which two results ought to be.


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread (tensors are small) and seeded random states; both are as before afterwards."""
    with threads(1), seeded(0):
        yield


def same(a: Any, b: Any) -> bool:
    """Equal to the bit: tensors, arrays, numbers, and lists, tuples, sets and dicts of them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a.dtype == b.dtype and a.shape == b.shape and _bits_equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return type(a) is type(b) and bool(a == b)


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    equal = (a == b) | ((a != a) & (b != b))
    return bool(equal.all())


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In words: the first entry in which two mappings differ."""
    if set(a) != set(b):
        return f"entries {', '.join(sorted(set(a) ^ set(b)))} in one only"
    return next((f"{name}" for name in a if not same(a[name], b[name])), "their order")


# --------------------------------------------------------------------------------------------------
# The tiny course and the tiny network that the kit teaches.


OVERRIDES = (
    "text.encoding=random",
    f"data.patch_vox={PATCH},{PATCH},{PATCH}", "data.spacing_mm=22,22,22", "examine.overlap=0",
    "phantom.version=2",  # whose adrenal glands are still there at voxels of 22 mm
    "phantom.spacing_mm=16", "phantom.train=2", "phantom.validation=1", "phantom.test=1",
    "train.epochs=1", "train.iterations=2", "train.batch=1", "train.warmup=1", "train.lr=1e-3",
)  # fmt: skip
"""What the tiny course changes in the profile `smoke`."""


def tiny_course() -> Benchmark:
    """Three steps of three, one and two structures; sources with gaps, of which one comes twice."""
    with resources.as_file(resources.files("clbench.testing") / "kit.toml") as path:
        return load_benchmark(path)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, 8, 3, padding=1)
        self.middle = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.coarse = nn.Conv3d(8, 16, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        enc0 = functional.leaky_relu(self.fine(image))
        enc1 = functional.leaky_relu(self.middle(enc0))
        return {"enc0": enc0, "enc1": enc1, "bottleneck": functional.leaky_relu(self.coarse(enc1))}


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv3d(16, 8, 1)
        self.fine = nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        up = functional.interpolate(self.middle(maps["bottleneck"]), scale_factor=2.0)
        dec0 = functional.leaky_relu(up + maps["enc1"])
        up = functional.interpolate(dec0, scale_factor=2.0)
        return {"dec0": dec0, "final": functional.leaky_relu(self.fine(up + maps["enc0"]))}


def tiny_backbone() -> Backbone:
    """Five convolutions, with the maps every backbone has: a forward pass takes milliseconds.

    The controllers of a universal head are narrow as well: at their published width they hold 99 %
    of all weights, and most of the time of a check would go into initialising and copying them.
    """
    return Backbone(
        _Encoder(),
        _Decoder(),
        final_channels=8,
        bottleneck_channels=16,
        stride=4,
        smallest=8,
        controller_width=32,
    )
