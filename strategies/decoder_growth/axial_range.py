"""Axial range of a structure: where along the body it lies, learned from annotated slices.

A slice's height is its share of the length of the body in the image, 0 at the feet's end and 1 at
the head's; so ranges hold for images that show the same part of the body, and move with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.spec.taxonomy import structure
from clbench.strategy import Memory

if TYPE_CHECKING:
    from clbench.data.volume import Volume

KEY = "axial_range/"
"""Memory: `axial_range/<structure>` → [low, high], heights."""
BODY_HU = -500
"""Voxels above it belong to the body."""
PERCENTILES = (0.5, 99.5)
"""Of the heights of all annotated slices of a structure; tumors and cysts: the extremes."""
MARGIN = 0.25
"""Share of the structure's range added on both sides; tumors and cysts: the standard deviation of
the heights."""


def body_extent(image_hu: NDArray[np.int16]) -> tuple[int, int]:
    """(start, stop) of the body on axis 2 of a (D, H, W) image; all of it where there is none."""
    inside = np.flatnonzero((image_hu > BODY_HU).any(axis=(0, 1)))
    return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, image_hu.shape[2])


def slice_heights(volume: Volume, structures: Sequence[str]) -> dict[str, Tensor]:
    """Structure → (n,) float32 heights of the slices that show it; only annotated structures."""
    start, stop = body_extent(volume.image)
    every = slice(None)
    label = volume.labels(structures, (every, every, every))
    heights = {}
    for k, name in enumerate(structures):
        slices = np.flatnonzero((label[k] == 1).any(axis=(0, 1)))
        if slices.size:
            shares = (slices + 0.5 - start) / (stop - start)
            heights[name] = torch.from_numpy(shares.astype(np.float32))
    return heights


def store_ranges(cases: Iterable[Mapping[str, Tensor]], memory: Memory) -> None:
    """Write the range of every structure that the cases show into memory.

    Args:
        cases: per case what `slice_heights` returned.
        memory: gets one `axial_range/<structure>` each.

    Source: the released code of Ji et al. (ICCV 2023), inference range of a decoder. Differs: the
    range is widened by a share of itself, theirs by a share of the mean body-part score.
    """
    heights: dict[str, list[Tensor]] = {}
    for case in cases:
        for name, of_case in case.items():
            heights.setdefault(name, []).append(of_case)
    for name, parts in heights.items():
        every = torch.cat(parts).double().numpy()
        if structure(name).kind in ("tumor", "cyst"):
            low, high = float(every.min()), float(every.max())
            margin = float(every.std())
        else:
            low, high = (float(x) for x in np.percentile(every, PERCENTILES))
            margin = MARGIN * (high - low)
        memory[KEY + name] = [low - margin, high + margin]


def slice_ranges(
    image_hu: NDArray[np.int16], structures: Sequence[str], memory: Memory
) -> dict[str, tuple[int, int]]:
    """Structure → (start, stop) slices on axis 2, for structures with a range in memory.

    Args:
        image_hu: (D, H, W) whole volume.
        structures: the names asked for.
        memory: with the ranges that `store_ranges` wrote.
    """
    start, stop = body_extent(image_hu)
    size = image_hu.shape[2]
    slices: dict[str, tuple[int, int]] = {}
    for name in structures:
        if KEY + name not in memory:
            continue
        heights = cast("list[float]", memory[KEY + name])
        low, high = (start + height * (stop - start) for height in heights)
        first, last = int(np.floor(low)), int(np.ceil(high))
        slices[name] = (min(max(first, 0), size), min(max(last, 0), size))
    return slices
