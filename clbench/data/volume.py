"""Preprocessing and resampling: a case on the model's grid, and back to the grid of its file.

`clbench.data.labels` reads the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.labels import UNKNOWN, RawCase, counted, read_bits
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import grid, spacing_of
from clbench.errors import DataError
from clbench.spec.benchmark import Preprocessing, Source
from clbench.store.arrays import MAX_VOXELS
from clbench.types import mask_of, triple

Index = tuple[slice, slice, slice]
CENTERS_KEPT = 50_000
"""Voxels remembered per bit pattern for crop centers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A structure that falls between the voxels of the model grid."""

    vox: int
    """Voxels in the file."""
    kept_at_mm: tuple[float, float, float]
    """A spacing of the model grid, as coarse as may be, that keeps a voxel of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """A case on the model grid; arrays may be memory-mapped and are read-only."""

    source: str
    """Name of its source."""
    case: str
    """Case id."""
    image: NDArray[np.int16]
    """(D, H, W) HU, RAS, cropped to the box of HU above the window's lower end."""
    bits: NDArray[Any]
    """(D, H, W) smallest of uint8/16/32/64: bit i set = the voxel belongs to `names[i]`."""
    names: tuple[str, ...]
    """The source's structures."""
    annotated: frozenset[str]
    """The structures this case annotates."""
    affine: NDArray[np.float64]
    """(4, 4) model voxel → RAS mm."""
    native_affine: NDArray[np.float64]
    """(4, 4) of the file's grid, turned to RAS."""
    native_shape: tuple[int, int, int]
    """Shape of that grid."""
    start: tuple[int, int, int]
    """Model voxels cut off before the first one kept."""
    window_hu: tuple[float, float]
    """HU range mapped to [0, 1]."""
    files: CaseFiles
    """Where it was read from."""
    table: Source
    """Meaning of the label values."""
    where: Mapping[int, NDArray[Any]]
    """Bit pattern → flat indices (at most `CENTERS_KEPT`, drawn once); 0 = unlabelled, not air."""
    counts: Mapping[int, int]
    """Bit pattern → exact number of voxels."""

    def windowed(self, index: Index) -> NDArray[np.float32]:
        """(d, h, w) float32 in [0, 1]."""
        low, high = self.window_hu
        hu = self.image[index].astype(np.float32)
        out: NDArray[np.float32] = np.clip((hu - np.float32(low)) / np.float32(high - low), 0, 1)
        return out

    def labels(self, structures: Sequence[str], index: Index) -> NDArray[np.uint8]:
        """(K, d, h, w) uint8: 0, 1, or 255 where this case does not annotate the structure."""
        bits = self.bits[index]
        out = np.full((len(structures), *bits.shape), UNKNOWN, dtype=np.uint8)
        for k, name in enumerate(structures):
            if name in self.annotated and name in self.names:
                out[k] = mask_of(bits, self.names.index(name))
        return out

    def showing(self, structures: Iterable[str]) -> Volume:
        """This case as a step shows it: what it does not teach is not annotated.

        Hidden structures leave the crop centers too, so that not even sampling knows them. A file
        may hold voxels of structures that its case does not annotate: they are hidden, too.
        """
        shown = self.annotated & frozenset(structures)
        mask = sum(1 << i for i, name in enumerate(self.names) if name in shown)
        if shown == self.annotated and not any(pattern & ~mask for pattern in self.counts):
            return self
        bits = self.bits & self.bits.dtype.type(mask)
        where, counts = centers(bits, self.image > self.window_hu[0])
        return replace(self, annotated=shown, where=where, counts=counts)

    def native_axes(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Per native axis the nearest model index of each voxel, -1 outside the cropped grid."""
        native = spacing_of(self.native_affine)
        model = spacing_of(self.affine)
        axes = []
        for axis in range(3):
            full = resampled_length(self.native_shape[axis], native[axis], model[axis])
            at = np.arange(self.native_shape[axis]) * (native[axis] / model[axis])
            # the last native voxel may lie up to half a model voxel beyond the last model voxel
            index = np.minimum(_nearest(at), full - 1) - self.start[axis]
            index[(index < 0) | (index >= self.image.shape[axis])] = -1
            axes.append(index)
        return triple(axes)

    def native_bits(self) -> NDArray[Any]:
        """The truth on the file's grid turned to RAS, read again; same bits as `bits`."""
        return read_bits(self.files, self.table, grid(self.files.image))[0]

    def lost_in_resampling(self, name: str) -> Loss | None:
        """What the file holds of a structure of which the model grid holds nothing; None: nothing.

        The files are read again.
        """
        bits = self.native_bits()
        mask = mask_of(bits, self.names.index(name))
        vox = int(np.count_nonzero(mask))
        native_mm, model_mm = spacing_of(self.native_affine), spacing_of(self.affine)
        if not vox or keeps_a_voxel(mask, native_mm, model_mm):  # what the crop cut off is no loss
            return None
        for part in np.arange(0.95, 0, -0.05):
            finer = np.maximum(np.floor(model_mm * part * 100) / 100, 0.01)
            if keeps_a_voxel(mask, native_mm, finer):
                return Loss(vox=vox, kept_at_mm=triple(finer.tolist()))
        return Loss(vox=vox, kept_at_mm=triple(native_mm.tolist()))


def keeps_a_voxel(
    mask: NDArray[np.bool_], native_mm: NDArray[np.float64], model_mm: NDArray[np.float64]
) -> bool:
    """Whether nearest-neighbor resampling leaves anything of a mask.

    Args:
        mask: (D, H, W) bool.
        native_mm: spacing of the three axes now.
        model_mm: spacing asked for.
    """
    taken = []
    for axis, length in enumerate(mask.shape):
        held = np.asarray(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        index = _nearest_voxels(length, native_mm[axis], model_mm[axis])
        taken.append(index[held[index]])
    return bool(mask[np.ix_(*taken)].any())


def resampled_length(length: int, native_mm: float, model_mm: float) -> int:
    """Voxels along an axis after resampling: first centers coincide, extent rounded (as MONAI).

    Args:
        length: voxels along the axis now.
        native_mm: spacing now.
        model_mm: spacing asked for.
    """
    return int(np.round((length - 1) * native_mm / model_mm)) + 1


def _nearest(at: NDArray[Any]) -> NDArray[np.int64]:
    # a quotient such as 0.3/0.1 must not fall on the other side of a tie by one rounding error
    return np.floor(np.round(at, 6) + 0.5).astype(np.int64)


def _nearest_voxels(length: int, native_mm: float, model_mm: float) -> NDArray[np.int64]:
    """For every voxel of the model's grid along one axis, the nearest one of the file's grid."""
    at = np.arange(resampled_length(length, native_mm, model_mm)) * (model_mm / native_mm)
    return np.minimum(_nearest(at), length - 1)


def neighbors(
    length: int, native_mm: float, model_mm: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Between which voxels of an axis each resampled one lies: the lower, the upper, how far.

    Args:
        length: voxels of the axis.
        native_mm: their distance.
        model_mm: distance asked for.
    """
    count = resampled_length(length, native_mm, model_mm)
    at = np.minimum(np.arange(count) * (model_mm / native_mm), length - 1)
    low = np.minimum(np.floor(at).astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def resample_linear(
    image: NDArray[Any], native_mm: Sequence[float], model_mm: Sequence[float]
) -> NDArray[np.float32]:
    """Trilinear resampling, one axis after the other; first voxel centers coincide.

    Equal to MONAI's `Spacing(mode="bilinear")` (a test holds it), without its grid of coordinates,
    which takes 24 bytes per output voxel.

    Args:
        image: (D, H, W) intensities.
        native_mm: spacing of the three axes now.
        model_mm: spacing asked for.
    """
    out = np.asarray(image, dtype=np.float32)
    for axis in range(3):
        low, high, part = neighbors(out.shape[axis], native_mm[axis], model_mm[axis])
        shape = [1, 1, 1]
        shape[axis] = len(part)
        part = part.reshape(shape)
        if not part.any():
            out = np.take(out, low, axis=axis)
            continue
        first = np.take(out, low, axis=axis)
        out = first + (np.take(out, high, axis=axis) - first) * part
    return out


def resample_nearest(
    bits: NDArray[Any], native_mm: Sequence[float], model_mm: Sequence[float]
) -> NDArray[Any]:
    """Nearest-neighbor resampling on the grid of `resample_linear`.

    Args:
        bits: (D, H, W) bit patterns.
        native_mm: spacing of the three axes now.
        model_mm: spacing asked for.
    """
    for axis in range(3):
        index = _nearest_voxels(bits.shape[axis], native_mm[axis], model_mm[axis])
        bits = np.take(bits, index, axis=axis)
    return bits


def preprocess(raw: RawCase, source: Source, pre: Preprocessing) -> Volume:
    """Resample, crop to the foreground, and remember where each bit pattern lies.

    Args:
        raw: the case in RAS.
        source: its source.
        pre: spacing and window. The image stays in HU; the window is applied by `windowed`.

    Raises:
        DataError: no voxel above the window's lower end, or a grid of absurd size.

    Source: Liu et al., Medical Image Analysis 2024, section 5.1.3 and its code: RAS, 1.5 mm (image
    linear, label nearest), clip to [-175, 250] HU, crop to the box of voxels above the lower end.
    """
    native_mm = spacing_of(raw.affine).tolist()
    advice = "check the file's spacing, or choose a coarser --set data.spacing_mm"
    model_shape(raw.image.shape, native_mm, pre, raw.files.image, advice)
    hu: NDArray[Any] = np.round(resample_linear(raw.image, native_mm, pre.spacing_mm))
    image = np.clip(hu, -32768, 32767).astype(np.int16)
    bits = resample_nearest(raw.bits, native_mm, pre.spacing_mm)
    tissue = image > pre.window_hu[0]
    if (box := bounding_box(tissue)) is None:
        raise no_tissue(raw.files.image, pre, f"{raw.image.min()} to {raw.image.max()}")
    image, bits = np.ascontiguousarray(image[box]), np.ascontiguousarray(bits[box])
    tissue = tissue[box]
    start = triple(side.start for side in box)
    where, counts = centers(bits, tissue)
    return Volume(
        source=source.name,
        case=raw.files.case,
        image=image,
        bits=bits,
        names=source.structures,
        annotated=frozenset(raw.files.annotated(source)),
        affine=model_affine(raw.affine, pre, start),
        native_affine=raw.affine,
        native_shape=triple(raw.image.shape),
        start=start,
        window_hu=pre.window_hu,
        files=raw.files,
        table=source,
        where=where,
        counts=counts,
    )


def bounding_box(mask: NDArray[np.bool_]) -> Index | None:
    """Return the smallest box that holds all of a 3-D `mask`; None where it is empty."""
    others = ((1, 2), (0, 2), (0, 1))
    hits = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    if not hits[0].size:
        return None
    return triple(slice(int(hit[0]), int(hit[-1]) + 1) for hit in hits)


def model_affine(
    native: NDArray[np.float64], pre: Preprocessing, start: Sequence[int]
) -> NDArray[np.float64]:
    """Where the voxels of the model's grid lie, from where those of the file lie in RAS.

    Args:
        native: affine of the file.
        pre: spacing of the model's grid.
        start: first voxel of the crop on it.
    """
    affine = native.copy()
    affine[:3, :3] *= np.asarray(pre.spacing_mm) / spacing_of(native)
    affine[:3, 3] += affine[:3, :3] @ np.array(start)
    return affine


def model_shape(
    shape: Sequence[int], native_mm: Sequence[float], pre: Preprocessing, path: Path, next_step: str
) -> list[int]:
    """Voxels of a whole case on the model's grid.

    Args:
        shape: voxels in the file.
        native_mm: their spacing.
        pre: spacing of the model's grid.
        path: the file, for errors.
        next_step: what to do where it is too large.

    Raises:
        DataError: absurdly many.
    """
    size = [
        resampled_length(n, a, b) for n, a, b in zip(shape, native_mm, pre.spacing_mm, strict=True)
    ]
    if math.prod(size) > MAX_VOXELS:
        raise DataError(
            "the volume is too large on the model's grid",
            where=path,
            expected=f"at most {MAX_VOXELS} voxels",
            got=f"{size} voxels of {pre.spacing_mm} mm",
            next_step=next_step,
        )
    return size


def no_tissue(path: Path, pre: Preprocessing, values: str) -> DataError:
    """The error for an image without a voxel above the window's lower end.

    Args:
        path: the image.
        pre: the window.
        values: the smallest and the largest value.
    """
    return DataError(
        f"the image has no voxel above {pre.window_hu[0]:g} HU",
        where=path,
        expected="a CT in Hounsfield units",
        got=f"values from {values}",
        next_step="check the rescale slope and intercept of the conversion",
    )


def centers(
    bits: NDArray[Any], tissue: NDArray[np.bool_]
) -> tuple[dict[int, NDArray[Any]], dict[int, int]]:
    """Where each bit pattern lies (a subsample) and how often (exactly); 0 = unlabelled tissue."""
    where: dict[int, NDArray[Any]] = {}
    counts: dict[int, int] = {}
    flat = bits.ravel()
    kind = np.int32 if flat.size < 2**31 else np.int64
    for pattern in counted(flat):
        hit = (flat == pattern) if pattern else (flat == 0) & tissue.ravel()
        index = np.flatnonzero(hit)
        if index.size == 0:
            continue
        counts[pattern] = int(index.size)
        if index.size > CENTERS_KEPT:
            rng = np.random.Generator(np.random.PCG64(pattern))
            index = np.sort(rng.choice(index, CENTERS_KEPT, replace=False))
        where[pattern] = index.astype(kind)
    return where, counts
