"""Training crops and augmentation: a pure function of volume, settings and seed.

Without state and without global randomness, so that the number of loader workers changes nothing,
and a stopped run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.labels import UNKNOWN
from clbench.data.pseudo_labels import PseudoMap
from clbench.data.volume import Volume
from clbench.spec.settings import DataSettings
from clbench.spec.taxonomy import structure
from clbench.types import triple


def crop(
    volume: Volume,
    structures: Sequence[str],
    *,
    patch_vox: tuple[int, int, int],
    data: DataSettings,
    seed: int,
    pseudo: PseudoMap | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Cut a patch around a drawn center, pad it, and augment it.

    Args:
        volume: the case.
        structures: K names, in channel order.
        patch_vox: size of the patch.
        data: sampling and augmentation.
        seed: decides everything random here.
        pseudo: pseudo labels of the case.

    Returns:
        image: (1, *patch) float32; the window is [0, 1], a shift may lead out of it.
        label: (K, *patch) uint8: 0, 1, 255.
        pseudo: (K, *patch) uint8, or None where none was given.
        Padding is air in the image and 255 (unknown) in label and pseudo.

    Source: Liu et al., Medical Image Analysis 2024, section 5.1.3: positive to negative centers
    2:1, rotation by 90° and intensity shift, no mirroring (left and right are different organs).
    Differs: where the patch is not square in the axial plane, only the half turn keeps its shape.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    center = draw_center(volume, data, rng)
    inside: list[slice] = []
    pad: list[tuple[int, int]] = []
    for c, size, length in zip(center, patch_vox, volume.image.shape, strict=True):
        if length <= size:  # the whole axis, padded on both sides
            before = (size - length) // 2
            inside.append(slice(0, length))
            pad.append((before, size - length - before))
        else:
            start = min(max(c - size // 2, 0), length - size)
            inside.append(slice(start, start + size))
            pad.append((0, 0))
    index = triple(inside)
    image = _pad(volume.windowed(index)[None], pad, 0.0)
    label = _pad(volume.labels(structures, index), pad, UNKNOWN)
    soft = None if pseudo is None else _pad(pseudo.read(structures, index), pad, UNKNOWN)

    turns = 0
    if rng.random() < data.rotate90:
        turns = int(rng.integers(1, 4)) if patch_vox[0] == patch_vox[1] else 2
    shift = 0.0
    if rng.random() < data.shift_intensity:
        shift = float(rng.uniform(-data.shift_range, data.shift_range))
    if shift:
        image = image + np.float32(shift)
    if turns:
        image, label = (_turn(a, turns) for a in (image, label))
        soft = None if soft is None else _turn(soft, turns)
    return image, label, soft


def _pad(array: NDArray[Any], pad: Sequence[tuple[int, int]], value: float) -> NDArray[Any]:
    if not any(a or b for a, b in pad):
        return array
    return np.pad(array, [(0, 0), *pad], constant_values=value)


def _turn(array: NDArray[Any], turns: int) -> NDArray[Any]:
    return np.ascontiguousarray(np.rot90(array, turns, axes=(1, 2)))


def draw_center(
    volume: Volume, data: DataSettings, rng: np.random.Generator
) -> tuple[int, int, int]:
    """A voxel of the volume: first its class (see `DataSettings.sampling`), then which.

    A class the case does not hold gives its weight to the others; within a class every voxel is
    equally likely.

    Args:
        volume: the case, with its voxels by bit pattern.
        data: how classes are weighted.
        rng: random numbers; advanced.
    """
    classes = (
        _posneg(volume.counts, data.posneg)
        if data.sampling == "posneg"
        else _ratio(volume, data.class_ratio)
    )
    held = [(weight, patterns) for weight, patterns in classes if patterns and weight > 0]
    if not held:
        return triple(n // 2 for n in volume.image.shape)
    weights = np.array([weight for weight, _ in held])
    patterns = held[int(rng.choice(len(held), p=weights / weights.sum()))][1]
    size = np.array([volume.counts[p] for p in patterns], dtype=np.float64)
    pattern = patterns[int(rng.choice(len(patterns), p=size / size.sum()))]
    where = volume.where[pattern]
    flat = int(where[int(rng.integers(len(where)))])
    return triple(int(i) for i in np.unravel_index(flat, volume.image.shape))


def _posneg(
    counts: Mapping[int, int], weights: tuple[float, float]
) -> list[tuple[float, list[int]]]:
    positive = sorted(p for p in counts if p)
    return [(weights[0], positive), (weights[1], [0] if 0 in counts else [])]


def _ratio(volume: Volume, weights: tuple[float, float, float]) -> list[tuple[float, list[int]]]:
    lesion = 0
    for i, name in enumerate(volume.names):
        if structure(name).kind in ("tumor", "cyst"):
            lesion |= 1 << i
    patterns = sorted(volume.counts)
    return [
        (weights[0], [p for p in patterns if p == 0]),
        (weights[1], [p for p in patterns if p and not p & lesion]),
        (weights[2], [p for p in patterns if p & lesion]),
    ]
