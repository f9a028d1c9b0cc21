"""NIfTI reading: what a header claims is checked before memory is taken for it.

A file must hold what its header says, neither less nor more, and carry numbers;
whatever a parser makes of a hostile file ends as a `DataError` that names it.
"""

from __future__ import annotations

import gzip
import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.orientations import aff2axcodes, apply_orientation, inv_ornt_aff, io_orientation
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from clbench.errors import DataError, first_line
from clbench.store.arrays import DEFLATE, MAX_VOXELS, memory_bytes

_EXTENSIONS = 1 << 24
"""Bytes a header's extensions may take."""
_TAIL = 4096
"""Bytes that may follow the voxels: some writers fill a block."""
_CHUNK = 1 << 22

_unpacked: ContextVar[dict[Path, tuple[bytearray, int]] | None] = ContextVar(
    "unpacked", default=None
)


@contextmanager
def read_once() -> Iterator[None]:
    """In this block a file is read and unpacked once, however often its content is asked for.

    All that was read stays in memory until the block ends; its arrays may not be written to.
    """
    token = _unpacked.set({})
    try:
        yield
    finally:
        _unpacked.reset(token)


def damaged(path: Path, err: BaseException) -> DataError:
    """The error for a file that no reader can make sense of."""
    return DataError(
        "the file is damaged or is not NIfTI",
        where=path,
        expected="a whole .nii or .nii.gz file",
        got=first_line(err),
        next_step="download or convert it again, or leave the case out of the split "
        "(`without` of a drawn one)",
    )


def load(path: Path) -> Any:
    """The nibabel image of a file whose header claims no more than the file can hold; no voxels.

    Raises:
        DataError: absent, damaged, no numbers, or claiming an absurd size.
    """
    if not path.is_file():
        raise DataError(
            "the file does not exist", where=path, next_step="check the folder given with --data"
        )
    try:
        header(path)
        file = nib.load(path)
        if not isinstance(file, nib.Nifti1Image):  # nibabel reads a dozen formats
            raise TypeError(f"it is {type(file).__name__}")
        claimed = _claimed(file, path)
        size = path.stat().st_size
    except DataError:
        raise
    except Exception as err:  # a parser may raise anything on a hostile file
        raise damaged(path, err) from err
    packed = path.suffix.lower() == ".gz"
    holds = size * DEFLATE if packed else size
    if claimed > holds:
        raise DataError(
            "the header claims more voxels than the file can hold",
            where=path,
            expected=f"at most {holds} bytes of voxels in a file of {size} bytes",
            got=f"shape {tuple(file.shape)}, {claimed} bytes",
            next_step="the file is cut short (damaged) or its header is wrong; download it again",
        )
    if not packed and size > claimed + _TAIL:
        raise _longer(path, file, claimed)
    return file


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _longer(path: Path, file: Any, claimed: int) -> DataError:
    return DataError(
        "the file holds more than its header says",
        where=path,
        expected=f"{claimed} bytes for the shape {tuple(file.shape)} of {file.get_data_dtype()}",
        got="more",
        next_step="its header is wrong, or something was appended; convert it again",
    )


def header(path: Path) -> Any:
    """The header as it stands in the file; nibabel mends what it reads, zero voxel sizes say.

    Raises:
        DataError: extensions larger than any, which are read with the header; a slope no number.
    """
    with _opened(path) as file:
        head = file.read(540)
    sizes = {struct.unpack_from(f"{order}i", head)[0] for order in "<>"}
    if not sizes & {348, 540}:
        raise ValueError("it does not start with a NIfTI header")
    second = 540 in sizes  # NIfTI-2
    nifti_header: Any = (nib.Nifti2Header if second else nib.Nifti1Header)(
        head if second else head[:348], check=False
    )
    offset = float(nifti_header["vox_offset"])
    if not 0 <= offset <= _EXTENSIONS:
        raise DataError(
            "the header claims an absurd size",
            where=path,
            expected=f"voxels that start within the first {_EXTENSIONS} bytes",
            got=f"byte {offset:g}",
            next_step="download or convert the file again",
        )
    if np.isinf(slope := float(nifti_header["scl_slope"])):  # nibabel would read it as none
        raise DataError(
            "the header's scl_slope is no number",
            where=path,
            expected="a finite number",
            got=slope,
            next_step="convert the file again",
        )
    return nifti_header


def _claimed(file: Any, path: Path) -> int:
    """Bytes the header claims, from the file's start to the last voxel."""
    wrong = partial(DataError, where=path)
    shape = [int(n) for n in file.shape]
    count = math.prod(shape)
    if min(shape, default=0) < 1 or count > MAX_VOXELS:
        raise wrong(
            "the header claims an absurd size",
            expected=f"at least one voxel and at most {MAX_VOXELS}",
            got=f"shape {tuple(shape)}",
            next_step="download or convert the file again, or crop the volume",
        )
    kind = np.dtype(file.get_data_dtype())
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise wrong(
            "the voxels are not plain numbers",
            expected="whole or real numbers of at most 64 bits",
            got=str(kind),
            next_step="convert the file to int16 or float32",
        )
    need = count * int(kind.itemsize)
    if need > (memory := memory_bytes()):
        raise wrong(
            "the volume does not fit this machine's memory",
            expected=f"at most {memory} bytes",
            got=f"{need} bytes, shape {tuple(shape)} of {kind}",
            next_step="crop the volume, or use a larger machine",
        )
    return int(file.dataobj.offset) + need


def content(path: Path) -> Iterator[bytes | memoryview]:
    """The file's bytes, unpacked, chunk by chunk; stops where it holds more than its header says.

    Raises:
        DataError: see `load`; or damaged, shorter than its header says, or longer (a bomb).
    """
    if _unpacked.get() is None:
        yield from _stream(path)
        return
    raw, seen = _whole(path)
    with memoryview(raw) as whole:
        for start in range(0, seen, _CHUNK):
            yield whole[start : min(start + _CHUNK, seen)]


def _stream(path: Path) -> Iterator[bytes]:
    """See `content`."""
    file = load(path)
    claimed, seen = _claimed(file, path), 0
    try:
        with _opened(path) as stream:
            while chunk := stream.read(_CHUNK):
                seen += len(chunk)
                if seen > claimed + _TAIL:
                    raise _longer(path, file, claimed)
                yield chunk
    except (OSError, EOFError, zlib.error) as err:
        raise damaged(path, err) from err
    if seen < claimed:
        raise damaged(path, EOFError(f"{seen} of {claimed} bytes"))


def _whole(path: Path) -> tuple[bytearray, int]:
    """All of `content`, and how many bytes that is; the array may be some longer.

    Raises:
        DataError: see `content`.
    """
    kept = _unpacked.get()
    if kept is not None and path in kept:
        return kept[path]
    raw, seen = bytearray(_claimed(load(path), path) + _TAIL), 0
    for chunk in _stream(path):
        raw[seen : seen + len(chunk)] = chunk
        seen += len(chunk)
    if kept is not None:
        kept[path] = raw, seen
    return raw, seen


def raw_voxels(path: Path) -> tuple[NDArray[Any], float, float]:
    """All voxels as they are stored, and slope and intercept; the whole file is read and checked.

    A slope of 0 or NaN means none, as the standard has it: then 1 and 0 are returned.

    Raises:
        DataError: see `load`; shorter or longer than its header says, a checksum that does not fit,
            a slope or intercept that is no number, or one that leaves nothing of the voxels.
    """
    file = load(path)
    proxy = file.dataobj
    kind = np.dtype(proxy.dtype)
    raw, _ = _whole(path)
    array: NDArray[Any] = np.frombuffer(raw, kind, math.prod(file.shape), int(proxy.offset))
    array.flags.writeable = _unpacked.get() is None  # others may read the same memory
    array = array.reshape(file.shape, order="F").astype(kind.newbyteorder("="), copy=False)
    slope, inter = float(proxy.slope), float(proxy.inter)
    if (slope, inter) != (1.0, 0.0):
        with np.errstate(all="ignore"):  # an overflow shows as infinity, and is refused as that
            ends = apply_read_scaling(np.array([array.min(), array.max()]), slope, inter)
            left = abs(float(ends[1]) - float(ends[0]))
        if left < 0.999 and array.min() != array.max():  # 1, but for rounding, is a mask
            raise DataError(
                "the header's scl_slope leaves nothing of the voxels",
                where=path,
                expected="HU or label values at least 1 apart",
                got=f"slope {slope:g}, values {left:g} apart",
                next_step="convert the file again",
            )
    return array, slope, inter


def scaled(array: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    """Voxels with slope and intercept applied; equal bits for a part of a file and for the whole.

    Args:
        array: voxels as they are stored.
        slope: of the header; 1 for none.
        inter: intercept of the header; 0 for none.
    """
    if (slope, inter) == (1.0, 0.0):
        return array
    with np.errstate(all="ignore"):  # an overflow shows as infinity, and is refused as that
        values: NDArray[Any] = apply_read_scaling(array, slope, inter)
    return values


def scale_error(array: NDArray[Any], slope: float, inter: float) -> float:
    """How far voxels with slope and intercept applied may lie from what was written.

    A writer that squeezes real numbers into whole ones spreads them over the whole range of the
    type, and rounds to the nearest.

    Args:
        array: voxels as they are stored.
        slope: of the header; 1 for none.
        inter: intercept of the header; 0 for none.
    """
    if (slope, inter) == (1.0, 0.0):
        return 0.0
    lowest, highest = array.min(), array.max()
    error = float(np.finfo(np.float32).eps) * (abs(inter) + abs(slope) * abs(float(highest)))
    if array.dtype.kind in "iu":
        ends = np.iinfo(array.dtype)
        error += abs(slope) / 2 * (highest == ends.max and lowest in (0, ends.min))
    return error


def voxels(path: Path) -> NDArray[Any]:
    """All voxels, the header's slope and intercept applied; the whole file is read and checked.

    Raises:
        DataError: see `raw_voxels`.
    """
    return scaled(*raw_voxels(path))


# --------------------------------------------------------------------------------------------------
# Where the voxels of a file lie in space: refused where that cannot be, or is not said plainly.


MAX_EXTENT_MM = 4000.0
"""Longest axis of a volume; no scanner's table is longer."""
MIN_SPACING_MM = 0.05
"""Smallest voxel; a CT's are twice as large at least, and one counted in meters is far below."""
MAX_SPACING_MM = 50.0
"""Largest voxel; a CT's are five times smaller."""
MAX_FORM_GAP_VOX = 0.5
"""How far sform and qform may lie apart at any corner: to within the same voxel."""
NOTED_FORM_GAP_VOX = 0.1
"""From how far on it is noted; rounding of the qform's numbers stays below."""
MAX_SHEAR = 0.02
"""Largest cosine between two axes of a grid, one degree: resampling takes axes as upright, and
rounding in headers gives a thousandth of it."""
MIN_COSINE = 0.5
"""Of the angle between an axis of the grid and the axis of the body it is called after."""
MAX_PLACE_MM = 1e6
"""Largest entry of an affine."""

TWO_PLACES = (
    "programs differ in which one they take: see which is right (SimpleITK and ITK-SNAP show the "
    "qform, nibabel the sform), and write it over the other, with nibabel "
    "`image.set_qform(image.get_sform())` or `image.set_sform(image.get_qform())`"
)

CUBE = 32
"""Voxels of the side of a cube that is copied at a time: 128 kB of the largest usual type."""
Shape = tuple[int, int, int]


class Grid(NamedTuple):
    """Where the voxels of a file lie."""

    shape: Shape
    """Voxels along the three axes of the file."""
    affine: NDArray[np.float64]
    """(4, 4) voxel → RAS mm."""

    @property
    def axes(self) -> str:
        """Axis codes of the file, e.g. LPS."""
        return "".join(map(str, aff2axcodes(self.affine)))

    @property
    def is_identity(self) -> bool:
        """Whether the place is what tools write that have lost the header."""
        return bool(np.array_equal(np.abs(self.affine), np.eye(4)))

    @property
    def ras_affine(self) -> NDArray[np.float64]:
        """(4, 4) voxel → RAS mm of an array that `to_ras` turned."""
        turned = self.affine @ inv_ornt_aff(io_orientation(self.affine), self.shape)
        return np.asarray(turned, dtype=np.float64)

    def to_ras(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the file's axes, turned to RAS without resampling."""
        return row_major(apply_orientation(array, io_orientation(self.affine)))


def row_major(array: NDArray[Any]) -> NDArray[Any]:
    """A 3-D array whose last axis is contiguous in memory: `np.ascontiguousarray`, by small cubes.

    NIfTI stores the first axis contiguously. Copied row by row, every voxel of a row lies in
    another line of the cache, which is gone before its next voxel is wanted: for a whole CT that
    takes three times as long.
    """
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, dtype=array.dtype)
    cubes = (range(0, length, CUBE) for length in array.shape)
    for corner in itertools.product(*cubes):
        cube = tuple(slice(start, start + CUBE) for start in corner)
        out[cube] = array[cube]
    return out


def spacing_of(affine: NDArray[Any]) -> NDArray[np.float64]:
    """(3,) voxel size in mm."""
    return np.asarray(np.linalg.norm(affine[:3, :3], axis=0), dtype=np.float64)


def grid(path: Path) -> Grid:
    """Shape and affine of a 3-D file.

    Raises:
        DataError: not one 3-D volume, or a place in space that cannot be, is not said, or is said
            twice and differently.
    """
    file = load(path)
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
    try:
        affine = np.asarray(file.affine, dtype=np.float64)
        _one_place(file, header(path), path)
    except DataError:
        raise
    except Exception as err:  # a quaternion of no rotation, a sign that is no sign
        raise damaged(path, err) from err
    usable_affine(affine, shape, path)
    return Grid((shape[0], shape[1], shape[2]), affine)


def _one_place(file: Any, raw: Any, path: Path) -> None:
    """Raise unless the header says where the voxels lie, in one way and in millimeters."""

    def wrong(what: str, expected: str, got: object, next_step: str) -> DataError:
        return DataError(what, where=path, expected=expected, got=got, next_step=next_step)

    again = "convert the DICOM series again"
    unit = int(raw["xyzt_units"]) & 7
    if unit not in (0, 2):
        raise wrong(
            "the file does not count in millimeters",
            "xyzt_units 2 (mm), or 0 (not said)",
            {1: "1 (m)", 3: "3 (µm)"}.get(unit, unit),
            again,
        )
    sform, has_sform = file.header.get_sform(coded=True)
    qform, has_qform = file.header.get_qform(coded=True)
    if not has_sform and not has_qform:
        raise wrong(
            "the file does not say which side of the patient is which",
            "an orientation (sform_code or qform_code above 0)",
            "neither",
            f"{again}; a guess could swap left and right",
        )
    said = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
    if not has_sform and not (np.isfinite(said) & (said > 0)).all():
        raise wrong("the file has no usable voxel size", "three sizes above 0", said, again)
    if not (has_sform and has_qform):
        return
    codes = ["".join(map(str, aff2axcodes(form))) for form in (sform, qform)]
    if codes[0] != codes[1]:
        raise wrong(
            "the file says in two ways which side of the patient is which",
            "sform and qform that agree",
            f"sform {codes[0]}, qform {codes[1]}",
            TWO_PLACES,
        )
    if (gap := _form_gap_vox(file)) > MAX_FORM_GAP_VOX:
        sizes = [spacing_of(form).round(4).tolist() for form in (sform, qform)]
        origins = [np.asarray(form)[:3, 3].round(2).tolist() for form in (sform, qform)]
        raise wrong(
            "the file says in two ways where its voxels lie",
            f"sform and qform that agree to {MAX_FORM_GAP_VOX} voxel",
            f"{gap:.1f} voxels apart at a corner: sform {sizes[0]} mm from {origins[0]}, "
            f"qform {sizes[1]} mm from {origins[1]}",
            TWO_PLACES,
        )


def _form_gap_vox(file: Any) -> float:
    """How far sform and qform, where both are said, put a corner apart, in voxels."""
    rigid = file.header.copy()
    # as much of the sform as a qform can say
    rigid.set_qform(file.header.get_sform(), strip_shears=True)
    shape = (*file.shape, 1, 1, 1)[:3]
    return corner_gap_vox(np.asarray(rigid.get_qform()), np.asarray(file.header.get_qform()), shape)


def corner_gap_vox(
    one: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]
) -> float:
    """How far two affines put a corner of a grid apart, in voxels of the first; the largest.

    Args:
        one: (4, 4) voxel → mm.
        other: (4, 4) voxel → mm.
        shape: voxels along the three axes.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.abs(np.linalg.inv(one) @ other @ corners - corners).max())


def header_notes(path: Path) -> list[str]:
    """What is odd about a file's place in space, but can be read.

    Raises:
        DataError: see `grid`.
    """
    place, raw = grid(path), header(path)
    notes = []
    if place.is_identity:
        notes.append(
            "the affine is the identity, which tools write that lose the header: voxels of exactly "
            "1 mm, and which side of the patient is which, are then a guess"
        )
    if raw["sform_code"] > 0 and raw["qform_code"] > 0:
        gap = _form_gap_vox(load(path))
        if gap > NOTED_FORM_GAP_VOX:
            notes.append(
                f"sform and qform put a corner {gap:.2f} voxels apart; the sform counts here, and "
                "other programs take the qform"
            )
    sizes = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
    if not np.allclose(sizes, spacing_of(place.affine), rtol=0.01):
        notes.append(
            f"the header's voxel sizes {sizes.round(4).tolist()} mm (pixdim) are not those of its "
            f"affine, {spacing_of(place.affine).round(4).tolist()} mm; the affine counts here, "
            "other programs take the sizes"
        )
    return notes


def usable_affine(affine: NDArray[np.float64], shape: tuple[int, ...], path: Path) -> None:
    """Raise unless the affine is one of a body in a scanner.

    Args:
        affine: (4, 4), voxel to mm.
        shape: voxels along each axis.
        path: the file, for the error.

    Raises:
        DataError: numbers that are none, or an extent no scanner has.
    """

    def wrong(expected: str, got: object, next_step: str) -> DataError:
        what = "the file has no usable position in space"
        return DataError(what, where=path, expected=expected, got=got, next_step=next_step)

    again = "convert the DICOM series again"
    turn = affine[:3, :3]
    if not np.isfinite(affine).all() or np.abs(affine).max() > MAX_PLACE_MM:
        raise wrong("an affine of millimeters", affine[:3].tolist(), again)
    spacing = np.linalg.norm(turn, axis=0)
    if max(n * s for n, s in zip(shape, spacing, strict=True)) > MAX_EXTENT_MM:
        raise wrong(
            f"a volume of at most {MAX_EXTENT_MM:g} mm along each axis",
            f"{shape} voxels of {spacing.round(3).tolist()} mm",
            f"the spacing is wrong by a factor; {again}",
        )
    if spacing.min() < MIN_SPACING_MM or spacing.max() > MAX_SPACING_MM:
        raise wrong(
            f"voxels of {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm along each axis",
            f"{spacing.round(7).tolist()} mm",
            f"is it in meters or micrometers, or lost? {again}",
        )
    unit = turn / spacing
    shear = float(np.abs(unit.T @ unit - np.eye(3)).max())
    if shear > MAX_SHEAR:
        raise wrong(
            "axes at right angles",
            f"axes {np.degrees(np.arccos(min(shear, 1.0))):.0f} degrees apart",
            "resample the volume to an upright grid (the gantry was tilted)",
        )
    names = io_orientation(affine)[:, 0].astype(int)
    steepest = float(np.abs(unit[names, range(3)]).min())
    if steepest < MIN_COSINE:
        raise wrong(
            f"axes within {np.degrees(np.arccos(MIN_COSINE)):.0f} degrees of the body's, so that "
            "which is which is plain",
            f"an axis {np.degrees(np.arccos(steepest)):.0f} degrees away",
            "resample the volume to an upright grid",
        )
