"""Where along the body a structure may lie: learned from annotation, applied to a whole volume.

A slice's place is its share of the height of the body in the image; so the
prior holds for images that show the same part of the body, and moves with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.spec.taxonomy import structure
from clbench.strategy import Memory

if TYPE_CHECKING:
    from clbench.data.volume import Volume

KEY = "axial_range/"
"""Memory: `axial_range/<structure>` → [low, high]."""
BODY_HU = -500
"""Above it is body."""
PERCENTILES = (0.5, 99.5)
"""Of all annotated slices of a structure; tumors and cysts: the extremes."""
WIDENED = 0.25
"""By this share of the structure's range on both sides; tumors and cysts: by the sd of slices."""


def body(image_hu: NDArray[np.int16]) -> tuple[int, int]:
    """(start, stop) of the body on axis 2 of a (D, H, W) image; all of it where there is none."""
    inside = np.flatnonzero((image_hu > BODY_HU).any(axis=(0, 1)))
    return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, image_hu.shape[2])


def levels(volume: Volume, structures: Sequence[str]) -> Mapping[str, Tensor]:
    """Structure → (n,) float32 places of the slices that show it; only annotated structures."""
    start, stop = body(volume.image)
    every = slice(None)
    label = volume.labels(structures, (every, every, every))
    found = {}
    for k, name in enumerate(structures):
        slices = np.flatnonzero((label[k] == 1).any(axis=(0, 1)))
        if slices.size:
            places = (slices + 0.5 - start) / (stop - start)
            found[name] = torch.from_numpy(places.astype(np.float32))
    return found


def remember(cases: Iterable[Mapping[str, Tensor]], memory: Memory) -> None:
    """Write the range of every structure that the cases show into memory.

    Source: the released code of Ji et al. (ICCV 2023), inference range of a decoder. Differs: the
    range is widened by a share of itself, theirs by a share of the mean body-part score.
    """
    seen: dict[str, list[Tensor]] = {}
    for case in cases:
        for name, places in case.items():
            seen.setdefault(name, []).append(places)
    for name, parts in seen.items():
        every = torch.cat(parts).double().numpy()
        if structure(name).kind in ("tumor", "cyst"):
            low, high = float(every.min()), float(every.max())
            room = float(every.std())
        else:
            low, high = (float(x) for x in np.percentile(every, PERCENTILES))
            room = WIDENED * (high - low)
        memory[KEY + name] = [low - room, high + room]


def ranges(
    image_hu: NDArray[np.int16], structures: Sequence[str], memory: Memory
) -> dict[str, tuple[int, int]]:
    """Structure → (start, stop) slices on axis 2, for structures with a range in memory."""
    start, stop = body(image_hu)
    size, found = image_hu.shape[2], {}
    for name in structures:
        if (kept := memory.get(KEY + name)) is None:
            continue
        limits: Any = kept
        low, high = (start + share * (stop - start) for share in limits)
        first, last = int(np.floor(low)), int(np.ceil(high))
        found[name] = (min(max(first, 0), size), min(max(last, 0), size))
    return found
