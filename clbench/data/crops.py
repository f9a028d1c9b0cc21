"""Training crops and augmentation: a pure function of volume, settings and seed.

Without state and without global randomness, so that the number of loader workers changes nothing,
and a stopped run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.labels import UNKNOWN
from clbench.data.nifti import spacing_of
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
    place = draw_place(volume, patch_vox=patch_vox, data=data, seed=seed)
    image = place.cut(volume.windowed(place.index)[None], 0.0)
    if place.shift:
        image = image + np.float32(place.shift)
    label = place.cut(volume.labels(structures, place.index), UNKNOWN)
    return image, label, _pseudo(place, structures, pseudo)


def _pseudo(
    place: CropPlace, structures: Sequence[str], pseudo: PseudoMap | None
) -> NDArray[np.uint8] | None:
    """A crop's pseudo labels, (K, *patch), padded and turned; None where there are none.

    Args:
        place: of the crop.
        structures: K names, in channel order.
        pseudo: of the case.
    """
    return None if pseudo is None else place.cut(pseudo.read(structures, place.index), UNKNOWN)


def cut_crop(
    volume: Volume,
    structures: Sequence[str],
    *,
    patch_vox: tuple[int, int, int],
    data: DataSettings,
    seed: int,
    pseudo: PseudoMap | None = None,
) -> dict[str, Any]:
    """What `crop` cuts, before it is windowed, shifted, turned and unpacked.

    Args:
        volume: the case.
        structures: K names, in channel order.
        patch_vox: size of the patch.
        data: sampling and augmentation.
        seed: decides everything random here.
        pseudo: pseudo labels of the case.

    Returns:
        `hu` (*patch) int16 and `bits` (*patch) unsigned, padded but not turned; `planes` (K,) the
        bit of each structure, -1 where this case does not annotate it; `window` lower end and width
        in HU; `pad`, `turns` and `shift` of its place; `pseudo` as `crop` returns it.
    """
    place = draw_place(volume, patch_vox=patch_vox, data=data, seed=seed)
    air = np.iinfo(np.int16).min  # below every window
    low, high = volume.window_hu
    known = [name in volume.annotated and name in volume.names for name in structures]
    planes = [volume.names.index(n) if k else -1 for n, k in zip(structures, known, strict=True)]
    return {
        "hu": np.pad(volume.image[place.index], place.pad, constant_values=air),
        "bits": np.pad(volume.bits[place.index], place.pad),
        "planes": np.array(planes, dtype=np.int64),
        "window": np.array([low, high - low], dtype=np.float32),
        "pad": place.pad,
        "turns": place.turns,
        "shift": np.float32(place.shift),
        "pseudo": _pseudo(place, structures, pseudo),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CropPlace:
    """Where a crop lies in its volume, and how it is augmented."""

    index: tuple[slice, slice, slice]
    """The voxels of the volume."""
    pad: tuple[tuple[int, int], ...]
    """Voxels of padding before and after, per axis."""
    turns: int
    """Quarter turns in the axial plane."""
    shift: float
    """Added to the windowed image."""

    def cut(self, part: NDArray[Any], fill: float) -> NDArray[Any]:
        """Pad and turn what was read at `index`.

        Args:
            part: (channels, d, h, w).
            fill: value of the padding.

        Returns:
            (channels, *patch).
        """
        if any(a or b for a, b in self.pad):
            part = np.pad(part, [(0, 0), *self.pad], constant_values=fill)
        if self.turns:
            part = np.ascontiguousarray(np.rot90(part, self.turns, axes=(1, 2)))
        return part


def draw_place(
    volume: Volume, *, patch_vox: tuple[int, int, int], data: DataSettings, seed: int
) -> CropPlace:
    """Where the crop of a seed lies; arguments as of `crop`.

    Args:
        volume: the case.
        patch_vox: size of the patch.
        data: sampling and augmentation.
        seed: decides everything random here.
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
    turns = 0
    if rng.random() < data.rotate90:
        # a quarter turn exchanges the axes: their voxels must be as long, too
        wide, deep = spacing_of(volume.affine)[:2]
        square = patch_vox[0] == patch_vox[1] and bool(np.isclose(wide, deep))
        turns = int(rng.integers(1, 4)) if square else 2
    shift = 0.0
    if rng.random() < data.shift_intensity:
        shift = float(rng.uniform(-data.shift_range, data.shift_range))
    return CropPlace(index=triple(inside), pad=tuple(pad), turns=turns, shift=shift)


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
