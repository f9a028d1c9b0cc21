"""Image and label files of a case: read, checked against each other, turned to RAS.

Labels become a bit pattern per voxel (bit i = structure i of the source), in which a
structure holds the structures inside it: a tumor voxel is liver and tumor at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from clbench.data.anatomy.midline import midline, split_left_right, unclear_sides
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import (
    Grid,
    corner_gap_vox,
    raw_voxels,
    scale_error,
    scaled,
    spacing_of,
    voxels,
)
from clbench.data.nifti import grid as read_grid
from clbench.errors import DataError
from clbench.spec.benchmark import Rescale, Source
from clbench.spec.taxonomy import ancestors
from clbench.types import bits_dtype

UNKNOWN = 255
"""Label value of a voxel whose structure is not annotated, and pseudo label of no prediction."""
PSEUDO_SCALE = 254
"""A pseudo label of probability p is stored as round(254 p); a hard one is 0 or 254."""
MAX_AFFINE_GAP_VOX = 0.1
"""How far image and label may lie apart at any corner."""
ROUNDING = 1e-4
"""How far a whole number may lie off itself after 32-bit arithmetic."""
MAX_HU = 1e6
"""Largest value of an image; metal and padding stay far below."""
MAX_VALUE = (1 << 31) - 1
"""Largest value of a label voxel."""
_COUNTED = 1 << 18
"""Voxels counted at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawCase:
    """A case as its files say, turned to RAS without resampling."""

    files: CaseFiles
    """Where it was read from."""
    image: NDArray[Any]
    """(D, H, W) HU."""
    bits: NDArray[Any]
    """(D, H, W) bit pattern over the source's structures."""
    affine: NDArray[np.float64]
    """(4, 4) voxel → RAS mm."""
    file_axes: str
    """Axis codes of the file, e.g. LPS."""
    counts: Mapping[int, int]
    """Raw label value → voxels (of one label map; empty for binary masks)."""


def pattern_of(name: str, names: Sequence[str]) -> int:
    """The bits of a voxel of `name`: its own, and those of the structures that contain it."""
    inside = {name, *ancestors(name)}
    return sum(1 << i for i, n in enumerate(names) if n in inside)


def read_case(files: CaseFiles, source: Source) -> RawCase:
    """Read image and label, check them against each other, turn both to RAS.

    Raises:
        DataError: anything that makes the pair unusable; names the file.
    """
    grid = read_grid(files.image)
    image = read_image(files.image, grid, source.rescale)
    bits, counts = read_bits(files, source, grid, image)
    return RawCase(
        files=files,
        image=image,
        bits=bits,
        affine=grid.ras_affine,
        file_axes=grid.axes,
        counts=counts,
    )


def read_unnamed(files: CaseFiles) -> tuple[RawCase, dict[str, int]]:
    """A case of which nobody has said what its labels mean: no bits, but what occurs.

    Returns:
        The case, and label value or mask name → voxels.

    Raises:
        DataError: see `read_case`.
    """
    grid = read_grid(files.image)
    image = read_image(files.image, grid)
    vox: dict[str, int] = {}
    if isinstance(files.label, Path):
        vox = {str(v): n for v, n in counted(read_label(files.label, grid)).items() if v}
    else:
        for name, path in files.label:
            vox[name] = int(np.count_nonzero(read_mask(path, grid)))
    case = RawCase(
        files=files,
        image=image,
        bits=np.zeros((0, 0, 0), dtype=np.uint8),
        affine=grid.ras_affine,
        file_axes=grid.axes,
        counts={},
    )
    return case, vox


def read_image(path: Path, grid: Grid, rescale: Rescale | None = None) -> NDArray[Any]:
    """(D, H, W) HU in RAS.

    Args:
        path: the image file.
        grid: its grid.
        rescale: how its values become HU; None: they are HU.

    Raises:
        DataError: the file is damaged, or holds what is no HU.
    """
    image = _hu(path)
    if rescale is not None:
        image = in_hu(image, rescale)
    return grid.to_ras(image.reshape(grid.shape))


def in_hu(values: NDArray[Any], rescale: Rescale) -> NDArray[np.float32]:
    """float32 HU from what a source stores, as its course file says; any shape."""
    hu: NDArray[np.float32] = values.astype(np.float32) * rescale.slope + rescale.intercept
    return hu


def _hu(path: Path) -> NDArray[Any]:
    image = voxels(path)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise DataError(
            "the image holds NaN or infinite voxels",
            where=path,
            expected="HU",
            got=f"{int((~np.isfinite(image)).sum())} such voxels",
            next_step="convert the DICOM series again, or leave the case out of the split",
        )
    refuse_no_hu(path, float(image.min()), float(image.max()))
    return image


def refuse_no_hu(path: Path, low: float, high: float) -> None:
    """Raise where values cannot be Hounsfield units.

    Args:
        path: the image.
        low: its smallest value.
        high: its largest value.

    Raises:
        DataError: beyond `MAX_HU`.
    """
    if max(-low, high) > MAX_HU:
        raise DataError(
            "the image holds values that are no HU",
            where=path,
            expected=f"-{MAX_HU:g} to {MAX_HU:g}",
            got=f"{low:g} to {high:g}",
            next_step="check the rescale slope and intercept of the conversion",
        )


def read_label(path: Path, image: Grid, kind: str = "label") -> NDArray[Any]:
    """A label file as whole numbers, in the axes of its image's file.

    A file that stores the same voxels in another axis order is turned, which is exact.

    Args:
        path: a label map or mask.
        image: the grid of the image file.
        kind: what the file is, for messages.

    Raises:
        DataError: damaged, values that are no labels, or another grid than the image's.
    """
    own = read_grid(path)
    turn = io_orientation(np.linalg.inv(image.affine) @ own.affine)
    shape = tuple(own.shape[i] for i in np.argsort(turn[:, 0]))
    if shape != image.shape:
        raise DataError(
            f"{kind} and image have different shapes",
            where=path,
            expected=image.shape,
            got=own.shape,
            next_step=_other_place(own, image, kind),
        )
    turned = own.affine @ inv_ornt_aff(turn, own.shape)
    gap = corner_gap_vox(image.affine, turned, shape)
    if gap > MAX_AFFINE_GAP_VOX:
        raise DataError(
            f"{kind} and image lie in different places",
            where=path,
            expected=f"affines that agree to {MAX_AFFINE_GAP_VOX} voxel",
            got=f"{gap:.2f} voxels apart at a corner",
            next_step=_other_place(own, image, kind),
        )
    raw: NDArray[Any] = apply_orientation(label_values(path).reshape(own.shape), turn)
    return raw


def _other_place(label: Grid, image: Grid, kind: str) -> str:
    """What to do about another grid; never to copy an affine, which may mirror the masks."""
    for name, one, other in ((kind, label, image), ("image", image, label)):
        if one.is_identity and not other.is_identity:
            return (
                f"the {name}'s header has lost its place (its affine is the identity), and which "
                "way its voxels run cannot be told from it: export it again with its header"
            )
    return (
        f"where both headers are right, resample the {kind} to the image, nearest neighbor "
        f"(nibabel.processing.resample_from_to({kind}, image, order=0)); where one is wrong, "
        "export it again, or leave the case out"
    )


def read_bits(
    files: CaseFiles, source: Source, grid: Grid, image: NDArray[Any] | None = None
) -> tuple[NDArray[Any], dict[int, int]]:
    """Label files → bit pattern in RAS, and the voxels per raw value.

    Args:
        files: image and annotation of the case.
        source: the data set: structures in bit order, and their label values.
        grid: of the image file.
        image: (D, H, W) HU in RAS; None: read where left and right are to be told apart.

    Raises:
        DataError: see `read_label`; a value the source does not define, or a pair under one value
            whose sides cannot be told apart.
    """
    names = source.structures
    kind = bits_dtype(len(names))
    if not isinstance(files.label, Path):
        bits = np.zeros(grid.shape, dtype=kind)
        for name, path in files.label:
            bits[read_mask(path, grid)] |= kind.type(pattern_of(name, names))
        return grid.to_ras(bits), {}
    raw = read_label(files.label, grid)
    counts = _counts(raw, files.label, source)
    table = np.zeros(max(counts, default=0) + 1, dtype=kind)
    for value in counts:
        if value in source.labels:
            table[value] = pattern_of(source.labels[value], names)
    bits = grid.to_ras(table[raw])
    own = set(files.annotated(source))  # an unpaired organ is no matter where none is annotated
    pairs: dict[tuple[str, str], list[int]] = {}  # a kidney and its tumor are one piece
    for value in counts:
        if own & set(pair := source.sides.get(value, ())):
            pairs.setdefault(pair, []).append(value)  # type: ignore[arg-type]  # two: not empty
    if pairs:
        hu = read_image(files.image, grid, source.rescale) if image is None else image
        spacing_mm = spacing_of(grid.ras_affine)
        plane = midline(hu, spacing_mm)
    for pair, values in pairs.items():
        both = grid.to_ras(np.isin(raw, values))
        if (problem := unclear_sides(both, plane, spacing_mm[0])) is not None or plane is None:
            raise DataError(
                "left and right under one label value cannot be told apart",
                where=f"{files.label}, value {' and '.join(map(str, values))} "
                f"({' and '.join(pair)})",
                expected="a body whose midline shows, and pieces that lie left or right of it",
                got=problem,
                next_step="give each side a value of its own in the label, leave the case out of "
                f"the split, or name it in a [[source.partial]] of {source.name!r} that annotates "
                "neither",
            )
        for name, mask in zip(pair, split_left_right(both, plane), strict=True):
            bits[mask] |= kind.type(pattern_of(name, names))
    return bits, counts


def image_digest(path: Path, rescale: Rescale | None = None) -> str:
    """SHA-256 over the HU in RAS, whatever packing, number type, offset and orientation a file has.

    Args:
        path: the image file.
        rescale: how its values become HU; None: they are HU.

    Raises:
        DataError: the file is damaged or not one 3-D volume.
    """
    return digest_of(read_image(path, read_grid(path), rescale))


def digest_of(image: NDArray[Any]) -> str:
    """SHA-256 over the voxels of a (D, H, W) image in RAS."""
    whole = hashlib.sha256(str(image.shape).encode())
    for plane in image:  # a plane at a time: a whole volume in float32 may take half a gigabyte
        whole.update(np.ascontiguousarray(plane, dtype=np.float32).tobytes())
    return whole.hexdigest()


def values_of(path: Path) -> tuple[int, ...]:
    """The values a label file or mask holds, in order."""
    read_grid(path)
    return tuple(counted(label_values(path)))


def label_values(path: Path) -> NDArray[Any]:
    """The voxels of a label file as integers; a file of whole real numbers is read.

    What lies off a whole number by no more than the rounding of the header's scale, or of 32-bit
    arithmetic, is that number.

    Raises:
        DataError: fractions, NaN, negative values, or values no label has.
    """
    stored, slope, inter = raw_voxels(path)
    raw, error = scaled(stored, slope, inter), scale_error(stored, slope, inter)
    if raw.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            rounded = np.round(raw)
            off = np.abs(raw - rounded)
        limit = ROUNDING + (error if error < 0.5 else 0.0)
        wrong = ~(off <= limit)  # NaN is no smaller than anything
        if wrong.any():
            has_scale = (slope, inter) != (1.0, 0.0)
            raise DataError(
                "the label holds values that are not whole numbers",
                where=path,
                expected="one whole number per structure",
                got=f"{int(wrong.sum())} voxels such as {raw[wrong].flat[0]}"
                + (f", by the header's scl_slope of {slope:g}" if has_scale else ""),
                next_step="convert it again as whole numbers, without a scale (scl_slope 1)"
                if has_scale
                else "resample labels with nearest neighbor only",
            )
        raw = rounded
    low, high = (raw.min(), raw.max()) if raw.size else (0, 0)
    if low < 0:
        raise DataError(
            "the label holds negative values",
            where=path,
            expected="0 and up",
            got=low,
            next_step="values above 127 in signed bytes turn negative: save them as uint8; where "
            "a negative value means that nothing was annotated, see [[source.partial]]",
        )
    if high > MAX_VALUE:
        raise DataError(
            "the label holds values no label has",
            where=path,
            expected=f"0 to {MAX_VALUE}",
            got=high,
            next_step="check the rescale slope and intercept of the label",
        )
    return raw.astype(np.int64) if raw.dtype.kind == "f" or raw.dtype == np.uint64 else raw


def read_mask(path: Path, image: Grid, kind: str = "label") -> NDArray[np.bool_]:
    """The mask of one structure, in the axes of its image's file.

    Args:
        path: a file of 0 and one other value.
        image: the grid of the image file.
        kind: what the file is, for messages.

    Raises:
        DataError: see `read_label`; or several values, which no mask of one structure has.
    """
    raw = read_label(path, image, kind)
    mask: NDArray[np.bool_] = raw != 0
    if mask.any() and not np.array_equal(mask, raw == raw.max()):
        values = np.unique(raw.ravel("K"))
        raise DataError(
            "a mask of one structure holds several values",
            where=path,
            expected="0 and one other value",
            got=", ".join(map(str, values[:20])),
            next_step="if it is a map of several structures, give its values to `labels` of a "
            "source of another layout, or to --labels; else set every voxel of the mask to 1",
        )
    return mask


def counted(values: NDArray[Any]) -> dict[int, int]:
    """Each value and how often it occurs, in order: `np.unique` of whole numbers from 0 on, faster.

    Args:
        values: any shape; small ones are counted, larger ones sorted.
    """
    flat = values.ravel("K")  # as it lies in memory: their order is no matter
    if (highest := int(flat.max(initial=0))) < 1 << 16:
        number = np.zeros(highest + 1, dtype=np.int64)
        for start in range(0, flat.size, _COUNTED):  # bincount makes 8 bytes of every voxel
            some = flat[start : start + _COUNTED].astype(np.intp, copy=False)
            number += np.bincount(some, minlength=highest + 1)
        return {int(v): int(number[v]) for v in np.flatnonzero(number)}
    return {int(v): int(n) for v, n in zip(*np.unique(flat, return_counts=True), strict=True)}


def _counts(raw: NDArray[Any], path: Path, source: Source) -> dict[int, int]:
    """Raw value → voxels.

    Raises:
        DataError: a value the source does not define.
    """
    counts = counted(raw)
    known = {*source.labels, *source.sides, *source.ignored}
    unknown = {v: n for v, n in counts.items() if v and v not in known}
    if unknown:
        raise DataError(
            "the label holds values the source does not define",
            where=path,
            expected=", ".join(
                [f"{v} {name}" for v, name in sorted(source.labels.items())]
                + [f"{v} {' and '.join(pair)}" for v, pair in sorted(source.sides.items())]
                + [f"{v} (ignored)" for v in sorted(source.ignored)]
            ),
            got=", ".join(f"{v} ({n} voxels)" for v, n in sorted(unknown.items())[:20]),
            next_step="add the value to the source's labels or to `ignored`, or clear it",
        )
    return counts
