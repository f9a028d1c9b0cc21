"""One case from file to model grid: read, check, orient, resample, crop; and the way back.

Room: row 2. Labels become a bit pattern per voxel (bit i = structure i of the source), in which a
structure holds the structures inside it: a tumor voxel is liver and tumor at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from clbench.data.layouts import CaseFiles
from clbench.errors import DataError
from clbench.postprocess import split_left_right
from clbench.spec import Preprocessing, Source
from clbench.taxonomy import ancestors

Index = tuple[slice, slice, slice]
UNKNOWN = 255
"""Label value of a voxel whose structure is not annotated."""
MAX_AFFINE_GAP_VOX = 0.1
"""How far image and label may lie apart at any corner."""
CENTERS_KEPT = 50_000
"""Voxels remembered per bit pattern for crop centers."""


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
        one = bits.dtype.type(1)
        for k, name in enumerate(structures):
            if name in self.annotated and name in self.names:
                out[k] = (bits >> bits.dtype.type(self.names.index(name))) & one
        return out

    def showing(self, structures: Iterable[str]) -> Volume:
        """This case as a step shows it: what it does not teach is not annotated.

        Hidden structures leave the crop centers too, so that not even sampling knows them.
        """
        shown = self.annotated & frozenset(structures)
        if shown == self.annotated:
            return self
        mask = sum(1 << i for i, name in enumerate(self.names) if name in shown)
        bits = self.bits & self.bits.dtype.type(mask)
        where, counts = centers(bits, self.image > self.window_hu[0])
        return replace(self, annotated=shown, where=where, counts=counts)

    def native_axes(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Per native axis the nearest model index of each voxel, -1 outside the cropped grid."""
        native = spacing_of(self.native_affine)
        model = spacing_of(self.affine)
        found = []
        for axis in range(3):
            full = resampled_length(self.native_shape[axis], native[axis], model[axis])
            at = np.arange(self.native_shape[axis]) * (native[axis] / model[axis])
            # the last native voxel may lie up to half a model voxel beyond the last model voxel
            index = np.minimum(_nearest(at), full - 1) - self.start[axis]
            index[(index < 0) | (index >= self.image.shape[axis])] = -1
            found.append(index)
        return found[0], found[1], found[2]

    def native_bits(self) -> NDArray[Any]:
        """The truth on the file's grid turned to RAS, read again; same bits as `bits`."""
        shape, affine, turn, _ = _open_image(self.files.image)
        bits, _ = _read_bits(self.files, self.table, shape, affine, turn)
        return bits


def bits_type(structures: int) -> np.dtype[Any]:
    """The smallest unsigned type with a bit per structure."""
    for kind, room in ((np.uint8, 8), (np.uint16, 16), (np.uint32, 32), (np.uint64, 64)):
        if structures <= room:
            return np.dtype(kind)
    raise DataError(
        "a source has more structures than a bit pattern can hold", expected="≤ 64", got=structures
    )


def pattern_of(name: str, names: Sequence[str]) -> int:
    """The bits of a voxel of `name`: its own, and those of the structures that contain it."""
    inside = {name, *ancestors(name)}
    return sum(1 << i for i, n in enumerate(names) if n in inside)


def spacing_of(affine: NDArray[Any]) -> NDArray[np.float64]:
    """(3,) voxel size in mm."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0), dtype=np.float64)


def resampled_length(length: int, native_mm: float, model_mm: float) -> int:
    """Voxels along an axis after resampling: first centers coincide, extent rounded (as MONAI)."""
    return int(np.round((length - 1) * native_mm / model_mm)) + 1


def _nearest(at: NDArray[Any]) -> NDArray[np.int64]:
    # a quotient such as 0.3/0.1 must not fall on the other side of a tie by one rounding error
    return np.floor(np.round(at, 6) + 0.5).astype(np.int64)


# ----------------------------------------------------------------------------------------- reading


def read_case(files: CaseFiles, source: Source) -> RawCase:
    """Read image and label, check them against each other, turn both to RAS.

    Raises:
        DataError: anything that makes the pair unusable; names the file.
    """
    shape, affine, turn, axes = _open_image(files.image)
    image = _hu(files.image)
    bits, counts = _read_bits(files, source, shape, affine, turn)
    return RawCase(
        files=files,
        image=np.ascontiguousarray(apply_orientation(image.reshape(shape), turn)),
        bits=bits,
        affine=affine @ inv_ornt_aff(turn, shape),
        file_axes=axes,
        counts=counts,
    )


def read_unnamed(files: CaseFiles) -> tuple[RawCase, dict[str, int]]:
    """A case of which nobody has said what its labels mean: no bits, but what occurs.

    Returns:
        The case, and label value or mask name → voxels.

    Raises:
        DataError: see `read_case`.
    """
    shape, affine, turn, axes = _open_image(files.image)
    image = _hu(files.image)
    found: dict[str, int] = {}
    one = isinstance(files.label, Path)
    for name, path in [("", files.label)] if isinstance(files.label, Path) else files.label:
        _same_place(path, shape, affine)
        raw = whole_numbers(_voxels(path).reshape(shape), path)
        if one:
            values, counts = np.unique(raw, return_counts=True)
            found = {str(v): int(n) for v, n in zip(values, counts, strict=True) if v}
        else:
            found[name] = int(np.count_nonzero(raw))
    case = RawCase(
        files=files,
        image=np.ascontiguousarray(apply_orientation(image.reshape(shape), turn)),
        bits=np.zeros((0, 0, 0), dtype=np.uint8),
        affine=affine @ inv_ornt_aff(turn, shape),
        file_axes=axes,
        counts={},
    )
    return case, found


def _hu(path: Path) -> NDArray[Any]:
    image = _voxels(path)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise DataError(
            "the image holds NaN or infinite voxels",
            where=path,
            expected="HU",
            got=f"{int((~np.isfinite(image)).sum())} such voxels",
            next_step="convert the DICOM series again, or leave the case out of the split",
        )
    return image


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DataError(
            "the file does not exist", where=path, next_step="check the folder given with --data"
        )
    try:
        return nib.load(path)
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as err:
        raise _damaged(path, err) from err


def _damaged(path: Path, err: Exception) -> DataError:
    return DataError(
        "the file is damaged or is not NIfTI",
        where=path,
        expected="a whole .nii or .nii.gz file",
        got=str(err).splitlines()[0] if str(err) else type(err).__name__,
        next_step="download or convert it again, or leave the case out of the split",
    )


def _voxels(path: Path) -> NDArray[Any]:
    try:
        return np.asanyarray(_load(path).dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as err:
        raise _damaged(path, err) from err


def _grid(path: Path) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape and affine of a 3-D file."""
    file = _load(path)
    shape = tuple(int(n) for n in file.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]  # a 4-D header around one volume
    if len(shape) != 3 or min(shape) < 2:
        raise DataError(
            "the file is not one 3-D volume",
            where=path,
            expected="three axes of at least 2 voxels",
            got=f"shape {tuple(file.shape)}",
            next_step="extract one volume, or leave the case out of the split",
        )
    affine = np.asarray(file.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(
            "the file has no usable position in space",
            where=path,
            expected="an affine that can be inverted",
            got=affine[:3].tolist(),
            next_step="convert the DICOM series again",
        )
    return (shape[0], shape[1], shape[2]), affine


def _open_image(
    path: Path,
) -> tuple[tuple[int, int, int], NDArray[np.float64], NDArray[Any], str]:
    """Shape, affine, the turn to RAS, and the file's own axis codes."""
    shape, affine = _grid(path)
    return shape, affine, io_orientation(affine), "".join(map(str, nib.aff2axcodes(affine)))


def _same_place(
    path: Path,
    image_shape: tuple[int, int, int],
    image_affine: NDArray[np.float64],
) -> None:
    """Raise unless the label file lies on the image's grid."""
    shape, affine = _grid(path)
    if shape != image_shape:
        raise DataError(
            "label and image have different shapes",
            where=path,
            expected=image_shape,
            got=shape,
            next_step="resample the label to the image, or leave the case out of the split",
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    gap = float(np.abs(np.linalg.inv(image_affine) @ affine @ corners - corners).max())
    if gap > MAX_AFFINE_GAP_VOX:
        raise DataError(
            "label and image lie in different places",
            where=path,
            expected=f"affines that agree to {MAX_AFFINE_GAP_VOX} voxel",
            got=f"{gap:.2f} voxels apart at a corner",
            next_step="one of the two headers is wrong; copy the affine of the right one",
        )


def _read_bits(
    files: CaseFiles,
    source: Source,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    turn: NDArray[Any],
) -> tuple[NDArray[Any], dict[int, int]]:
    """Label files → bit pattern in RAS, and the voxels per raw value."""
    names = source.structures
    kind = bits_type(len(names))
    counts: dict[int, int] = {}
    pairs: dict[int, tuple[str, str]] = {}
    if isinstance(files.label, Path):
        _same_place(files.label, shape, affine)
        raw = whole_numbers(_voxels(files.label).reshape(shape), files.label)
        counts = _counts(raw, files.label, source)
        table = np.zeros(max(counts, default=0) + 1, dtype=kind)
        for value in counts:
            if value in source.labels:
                table[value] = pattern_of(source.labels[value], names)
        bits = table[raw]
        own = set(files.annotated(source))  # an unpaired organ is no matter where none is annotated
        pairs = {v: source.sides[v] for v in counts if own & set(source.sides.get(v, ()))}
    else:
        bits = np.zeros(shape, dtype=kind)
        for name, path in files.label:
            _same_place(path, shape, affine)
            mask = whole_numbers(_voxels(path).reshape(shape), path) != 0
            bits[mask] |= kind.type(pattern_of(name, names))
    bits = np.ascontiguousarray(apply_orientation(bits, turn))
    for value, pair in pairs.items():
        both = np.ascontiguousarray(apply_orientation(raw == value, turn))
        where = f"{files.label}, value {value} ({' and '.join(pair)})"
        help_ = (
            "repair the label, leave the case out of the split, or name the case in a "
            f"[[source.partial]] of {source.name!r} that annotates neither"
        )
        for name, mask in zip(pair, split_left_right(both, where, help_), strict=True):
            bits[mask] |= kind.type(pattern_of(name, names))
    return bits, counts


def values_of(path: Path) -> tuple[int, ...]:
    """The values a label file or mask holds, in order."""
    shape, _ = _grid(path)
    return tuple(int(v) for v in np.unique(whole_numbers(_voxels(path).reshape(shape), path)))


def whole_numbers(raw: NDArray[Any], path: Path) -> NDArray[Any]:
    """A label array as integers; a float file of whole numbers is read.

    Raises:
        DataError: fractions, NaN or negative values.
    """
    if raw.dtype.kind == "f":
        rounded = np.round(raw)
        wrong = ~(raw == rounded)  # NaN is unequal to itself
        if wrong.any():
            raise DataError(
                "the label holds values that are not whole numbers",
                where=path,
                expected="one whole number per structure",
                got=f"{int(wrong.sum())} voxels such as {raw[wrong].flat[0]}",
                next_step="resample labels with nearest neighbor only",
            )
        raw = rounded.astype(np.int64)
    if raw.size and int(raw.min()) < 0:
        raise DataError(
            "the label holds negative values", where=path, expected="0 and up", got=int(raw.min())
        )
    return raw


def _counts(raw: NDArray[Any], path: Path, source: Source) -> dict[int, int]:
    """Raw value → voxels.

    Raises:
        DataError: a value the source does not define.
    """
    if int(raw.max(initial=0)) < 1 << 16:
        number = np.bincount(raw.ravel())
        counts = {int(v): int(number[v]) for v in np.flatnonzero(number)}
    else:
        counts = {int(v): int(n) for v, n in zip(*np.unique(raw, return_counts=True), strict=True)}
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


# ---------------------------------------------------------------------------------- model grid


def resample_linear(
    image: NDArray[Any], native_mm: Sequence[float], model_mm: Sequence[float]
) -> NDArray[np.float32]:
    """Trilinear resampling, one axis after the other; first voxel centers coincide.

    Equal to MONAI's `Spacing(mode="bilinear")` (a test holds it), without its grid of coordinates,
    which takes 24 bytes per output voxel.
    """
    out = np.asarray(image, dtype=np.float32)
    for axis in range(3):
        length = out.shape[axis]
        count = resampled_length(length, native_mm[axis], model_mm[axis])
        at = np.minimum(np.arange(count) * (model_mm[axis] / native_mm[axis]), length - 1)
        low = np.minimum(np.floor(at).astype(np.int64), length - 1)
        high = np.minimum(low + 1, length - 1)
        shape = [1, 1, 1]
        shape[axis] = count
        part = (at - low).astype(np.float32).reshape(shape)
        if not part.any():
            out = np.take(out, low, axis=axis)
            continue
        first = np.take(out, low, axis=axis)
        out = first + (np.take(out, high, axis=axis) - first) * part
    return out


def resample_nearest(
    bits: NDArray[Any], native_mm: Sequence[float], model_mm: Sequence[float]
) -> NDArray[Any]:
    """Nearest-neighbor resampling on the grid of `resample_linear`."""
    for axis in range(3):
        length = bits.shape[axis]
        count = resampled_length(length, native_mm[axis], model_mm[axis])
        at = np.arange(count) * (model_mm[axis] / native_mm[axis])
        bits = np.take(bits, np.minimum(_nearest(at), length - 1), axis=axis)
    return bits


def preprocess(raw: RawCase, source: Source, pre: Preprocessing) -> Volume:
    """Resample, crop to the foreground, and remember where each bit pattern lies.

    Args:
        raw: the case in RAS.
        source: its source.
        pre: spacing and window. The image stays in HU; the window is applied by `windowed`.

    Raises:
        DataError: no voxel above the window's lower end.

    Source: Liu et al., Medical Image Analysis 2024, section 5.1.3 and its code: RAS, 1.5 mm (image
    linear, label nearest), clip to [-175, 250] HU, crop to the box of voxels above the lower end.
    """
    native_mm = spacing_of(raw.affine).tolist()
    hu: NDArray[Any] = np.round(resample_linear(raw.image, native_mm, pre.spacing_mm))
    image = np.clip(hu, -32768, 32767).astype(np.int16)
    bits = resample_nearest(raw.bits, native_mm, pre.spacing_mm)
    tissue = image > pre.window_hu[0]
    box = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(tissue.any(axis=others))
        if hit.size == 0:
            raise DataError(
                f"the image has no voxel above {pre.window_hu[0]:g} HU",
                where=raw.files.image,
                expected="a CT in Hounsfield units",
                got=f"values from {raw.image.min()} to {raw.image.max()}",
                next_step="check the rescale slope and intercept of the conversion",
            )
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    index = (box[0], box[1], box[2])
    image, bits = np.ascontiguousarray(image[index]), np.ascontiguousarray(bits[index])
    tissue = tissue[index]
    affine = raw.affine.copy()
    affine[:3, :3] *= np.asarray(pre.spacing_mm) / np.asarray(native_mm)
    start = (box[0].start, box[1].start, box[2].start)
    affine[:3, 3] += affine[:3, :3] @ np.array(start)
    where, counts = centers(bits, tissue)
    return Volume(
        source=source.name,
        case=raw.files.case,
        image=image,
        bits=bits,
        names=source.structures,
        annotated=frozenset(raw.files.annotated(source)),
        affine=affine,
        native_affine=raw.affine,
        native_shape=(raw.image.shape[0], raw.image.shape[1], raw.image.shape[2]),
        start=start,
        window_hu=pre.window_hu,
        files=raw.files,
        table=source,
        where=where,
        counts=counts,
    )


def centers(
    bits: NDArray[Any], tissue: NDArray[np.bool_]
) -> tuple[dict[int, NDArray[Any]], dict[int, int]]:
    """Where each bit pattern lies (a subsample) and how often (exactly); 0 = unlabelled tissue."""
    where: dict[int, NDArray[Any]] = {}
    counts: dict[int, int] = {}
    flat = bits.ravel()
    kind = np.int32 if flat.size < 2**31 else np.int64
    for pattern in np.unique(flat):
        hit = (flat == pattern) if pattern else (flat == 0) & tissue.ravel()
        index = np.flatnonzero(hit)
        if index.size == 0:
            continue
        counts[int(pattern)] = int(index.size)
        if index.size > CENTERS_KEPT:
            rng = np.random.Generator(np.random.PCG64(int(pattern)))
            index = np.sort(rng.choice(index, CENTERS_KEPT, replace=False))
        where[int(pattern)] = index.astype(kind)
    return where, counts
