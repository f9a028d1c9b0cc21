"""A CT series in DICOM: slices in a folder or a zip file become one scan, or are refused by name.

pydicom reads the files and unpacks compressed ones (`pip install "clbench[dicom]"`). Slices are put
in order by their positions alone; a slice that is missing, at another angle or of another size ends
in an error, for a volume with a gap looks like a body that is shorter.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.find_files import passed_over
from clbench.data.nifti import MAX_SHEAR, Grid, usable_affine
from clbench.deployment.scan import Scan
from clbench.errors import DataError, SettingError, first_line
from clbench.store.arrays import MAX_VOXELS

if TYPE_CHECKING:
    from pydicom import Dataset

INSTALL = 'pip install "clbench[dicom]"'
"""What installs the libraries that read DICOM."""
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
"""SOP class of a CT slice."""
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""SOP classes of CTs with many slices in a file."""
MAX_SPACING_CHANGE = 0.1
"""Largest difference of a distance between slices from the usual one, as a share of it."""
SAME_PLACE_MM = 1e-3
"""Slices nearer to each other are at one place."""
SAME_ANGLE = 1e-3
"""Largest difference between the direction cosines of two slices of one series."""
MAX_COSINE_ERROR = 2e-3
"""Largest difference of direction cosines from length 1 and from a right angle: rounding to three
decimals stays below it, and 500 mm become at most 1 mm longer."""
MAX_ASIDE_PX = 0.5
"""Largest distance of a slice from the line through the first and last one, in its plane."""
_LARGEST_FILE = 1 << 28
"""Bytes of a file in a zip archive that are unpacked; a slice has a thousandth of it."""
_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality",
    "ImageType", "Rows", "Columns", "PixelSpacing", "ImageOrientationPatient",
    "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "SamplesPerPixel",
    "PhotometricInterpretation", "LossyImageCompression", "BitsAllocated",
)  # fmt: skip


def optional_library(name: str, doing: str, where: str) -> Any:
    """A library of the extra `dicom`.

    Args:
        name: of the module.
        doing: what needs it: `reading`, `writing`.
        where: the option or input that asks for it, named in the error.

    Raises:
        SettingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SettingError(
            f"{doing} DICOM needs libraries that are not installed",
            where=where,
            expected=name,
            next_step=INSTALL,
        ) from None


def pydicom() -> Any:
    """The library that reads; see `optional_library`."""
    return optional_library("pydicom", "reading", "DICOM")


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomFile:
    """A file of a series: on disk, or inside a zip archive."""

    path: Path
    """The file, or the archive."""
    member: str | None = None
    """Name inside the archive."""

    @property
    def label(self) -> str:
        """Names it in errors."""
        return str(self.path) if self.member is None else f"{self.path}, {self.member}"

    @property
    def name(self) -> str:
        """File name."""
        return self.path.name if self.member is None else self.member.rpartition("/")[2]

    def open(self) -> IO[bytes]:
        """The file, opened for reading.

        Raises:
            DataError: it cannot be read, is damaged, encrypted or absurdly large.
        """
        try:
            if self.member is None:
                return self.path.open("rb")
            archive = _archive(self.path, self.path.stat().st_mtime_ns)
            if archive.getinfo(self.member).file_size > _LARGEST_FILE:
                raise DataError(
                    "a file in the archive is too large for a slice",
                    where=self.label,
                    expected=f"at most {_LARGEST_FILE} bytes",
                    next_step="unpack the archive and name the folder of the series",
                )
            return io.BytesIO(archive.read(self.member))
        except DataError:
            raise
        except Exception as err:  # a damaged archive may raise anything
            raise _unreadable(self, err) from err


@lru_cache(maxsize=2)
def _archive(path: Path, _changed_ns: int) -> zipfile.ZipFile:
    """An opened archive: its list of files is read once, not once per slice."""
    return zipfile.ZipFile(path)


def _unreadable(file: DicomFile, err: BaseException) -> DataError:
    return DataError(
        "a DICOM file cannot be read",
        where=file.label,
        expected="a whole DICOM file, not encrypted",
        got=first_line(err),
        next_step="export the series again; without the slice the volume would have a gap",
    )


def is_dicom(file: DicomFile) -> bool:
    """Whether a file is DICOM: by its preamble, or its ending .dcm; a DICOMDIR lists others.

    A file that ends in .dcm and holds something else is taken for a damaged slice, and refused when
    it is read: a volume without it would have a gap, or end early.
    """
    if file.name.lower().endswith(".dcm"):
        return True
    if file.name.upper() == "DICOMDIR":
        return False
    with file.open() as stream:
        return stream.read(132)[128:] == b"DICM"


def zip_members(path: Path) -> list[DicomFile]:
    """The files of an archive, without hidden ones, sorted by name.

    Raises:
        DataError: it is damaged, or names places outside of itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(i.filename for i in archive.infolist() if not i.is_dir())
    except Exception as err:  # a damaged one may raise anything
        raise DataError(
            "the archive cannot be read",
            where=path,
            expected="a whole zip file",
            got=err,
            next_step="download or export it again",
        ) from err
    if leading := [n for n in names if _leads_out(n)]:
        raise DataError(
            "the archive names a place outside of itself",
            where=path,
            expected="names that begin with a folder or a file in it",
            got=leading[0],
            next_step="unpack it with a program you trust, and name the folder",
        )
    visible = [n for n in names if not any(passed_over(part) for part in n.split("/"))]
    return [DicomFile(path=path, member=name) for name in visible]


def _leads_out(name: str) -> bool:
    """Whether a name in an archive is no path below it, on any system."""
    parts = name.replace("\\", "/").split("/")
    return parts[0].endswith(":") or any(part in ("", ".", "..") for part in parts)


# --------------------------------------------------------------------------------- the one series


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A slice of a series: where it lies, without its pixels."""

    file: DicomFile
    """Where it is stored."""
    header: Dataset
    """What it says of itself, as far as it is needed here."""
    position_mm: NDArray[np.float64]
    """(3,) center of the first pixel, LPS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The slices of one CT in order, foot to head for axial ones."""

    where: Path
    """Folder or archive."""
    slices: tuple[Slice, ...]
    """In order of their positions, each place once."""
    grid: Grid
    """Columns, rows, slices."""
    notes: tuple[str, ...]
    """What was left out."""

    def checksum(self) -> str:
        """SHA-256 over the files' content; names do not enter."""
        whole = hashlib.sha256()
        for item in self.slices:
            with item.file.open() as stream:
                whole.update(hashlib.sha256(stream.read()).digest())
        return whole.hexdigest()


def read_series(where: Path, files: Sequence[DicomFile], *, uid: str | None = None) -> Series:
    """The CT series among files of a folder, checked and in order; no pixels are read.

    Objects that are no CT slices (reports, contours, segmentations, localizers) are left out, and
    so are other series where one is named; what is odd in them does not matter.

    Args:
        where: folder or archive, for errors.
        files: DICOM files.
        uid: SeriesInstanceUID of the series wanted; None: there must be one.

    Raises:
        DataError: no series or several, or slices that make no upright volume without gaps.
    """
    by_series, others = _grouped(files, uid)
    wanted = by_series if uid is None else {k: v for k, v in by_series.items() if k == uid}
    if not wanted:
        raise DataError(
            "no CT series was found" if uid is None else "the series asked for is not here",
            where=where,
            expected="slices of a CT (CT Image Storage)" if uid is None else uid,
            got=", ".join([*by_series, *(f"{n} of {kind}" for kind, n in sorted(others.items()))])
            or "none",
            next_step="name the folder of the CT series",
        )
    if len(wanted) > 1:
        raise DataError(
            "more than one CT series lies in the folder",
            where=where,
            expected="one series, or its SeriesInstanceUID with --series",
            got="; ".join(
                f"{series} ({len(found)} slices, "
                f"{found[0][1].get('SeriesDescription', 'no description')})"
                for series, found in sorted(wanted.items())
            ),
            next_step="name one with --series, or give each series a folder of its own",
        )
    (found,) = wanted.values()
    items = [_slice(file, header) for file, header in found]
    notes = [f"left out: {n} of {kind}" for kind, n in sorted(others.items())]
    _alike(items)
    items = _each_place_once(_in_order(items), notes)
    if any(str(i.header.get("LossyImageCompression", "")) == "01" for i in items):
        notes.append("the images were compressed with loss")
    return Series(where=where, slices=tuple(items), grid=_grid(where, items), notes=tuple(notes))


def _grouped(
    files: Sequence[DicomFile], uid: str | None
) -> tuple[dict[str, list[tuple[DicomFile, Dataset]]], dict[str, int]]:
    """The CT files of each series with their headers, and how many of what else there are.

    Only the kind of a file is judged, for a series that is not wanted may hold anything.

    Args:
        files: DICOM files.
        uid: of the series wanted; files of another one are counted, and their list stays empty.

    Raises:
        DataError: a file cannot be read, or is of no known kind.
    """
    by_series: dict[str, list[tuple[DicomFile, Dataset]]] = {}
    others: dict[str, int] = {}
    for file in files:
        header = _header(file)
        series = str(header.get("SeriesInstanceUID", ""))
        if uid is not None and series not in ("", uid):
            by_series.setdefault(series, [])
            kind: str | None = "other series"
        else:
            kind = _no_slice(file, header)
        if kind is None:
            by_series.setdefault(series, []).append((file, header))
        else:
            others[kind] = others.get(kind, 0) + 1
    return by_series, others


def _no_slice(file: DicomFile, header: Dataset) -> str | None:
    """What a file is that is no part of a CT; None: a part of one.

    Raises:
        DataError: its class is in no table: a slice that was damaged, perhaps.
    """
    if (told := _no_image(header)) is not None:
        return told
    kind = str(header.get("SOPClassUID", ""))
    if kind not in pydicom().uid.UID_dictionary:
        raise _unreadable(file, ValueError(f"its SOP class is {kind or 'not said'}"))
    if kind not in (CT_IMAGE, *MULTI_FRAME_CT):
        return str(header.get("Modality", "no modality"))
    is_scout = "LOCALIZER" in [str(word).upper() for word in header.get("ImageType", ())]
    return "localizer" if is_scout and kind == CT_IMAGE else None


@contextmanager
def _read(file: DicomFile, **options: Any) -> Iterator[Dataset]:
    """A file's data set; what goes wrong in it, and in the block, is said of the file."""
    library = pydicom()
    try:
        with file.open() as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are no part of the volume
            yield library.dcmread(stream, **options)
    except DataError:
        raise
    except Exception as err:  # a parser may raise anything on a hostile file
        raise _unreadable(file, err) from err


def _header(file: DicomFile) -> Dataset:
    with _read(file, stop_before_pixels=True, specific_tags=list(_TAGS)) as header:
        header.walk(lambda _, element: element.value)  # parsed now, where errors are caught
        getattr(header.file_meta, "MediaStorageSOPClassUID", None)
        return header


def _no_image(header: Dataset) -> str | None:
    """What a file is that a vendor added, by its class; None: a slice, or damaged.

    It is believed where its preamble and its data set agree: a slice of which one was damaged would
    leave a gap.
    """
    told = str(getattr(header.file_meta, "MediaStorageSOPClassUID", ""))
    said = str(header.get("SOPClassUID", ""))
    uid = pydicom().uid.UID(said)
    return (
        f"private object {said}"
        if said and told == said and uid.is_valid and uid.is_private
        else None
    )


def _numbers(file: DicomFile, header: Dataset, name: str, count: int) -> NDArray[np.float64]:
    value = header.get(name)
    try:
        numbers = np.atleast_1d(np.array(value, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if value is None or numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise _refused(
            f"a slice does not say its {name}",
            file,
            f"{count} numbers",
            "nothing" if value is None else value,
            "export the original series from the archive (PACS)",
        )
    return numbers


def _slice(file: DicomFile, header: Dataset) -> Slice:
    if str(header.SOPClassUID) in MULTI_FRAME_CT:
        raise _refused(
            "a CT with many slices in one file is not read",
            file,
            "a file per slice (CT Image Storage)",
            "enhanced multi-frame CT",
            "convert it to NIfTI with dcm2niix",
        )
    cosines = _numbers(file, header, "ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(cosines, axis=1)
    if max(*np.abs(lengths - 1), abs(cosines[0] @ cosines[1])) > MAX_COSINE_ERROR:
        raise _refused(
            "ImageOrientationPatient holds no two directions at right angles",
            file,
            f"two directions of length 1 at right angles, to {MAX_COSINE_ERROR:g}",
            cosines.tolist(),
            "export the original series from the archive (PACS)",
        )
    _numbers(file, header, "RescaleSlope", 1)
    _numbers(file, header, "RescaleIntercept", 1)
    if (_numbers(file, header, "PixelSpacing", 2) <= 0).any():
        raise _refused(
            "a slice has no usable PixelSpacing",
            file,
            "two sizes above 0",
            header.PixelSpacing,
            "export the original series from the archive (PACS)",
        )
    return Slice(
        file=file,
        header=header,
        position_mm=_numbers(file, header, "ImagePositionPatient", 3),
    )


def _refused(
    what: str, file: DicomFile, expected: object, got: object, next_step: str
) -> DataError:
    return DataError(what, where=file.label, expected=expected, got=got, next_step=next_step)


def _cosines(header: Dataset) -> NDArray[np.float64]:
    """(2, 3) directions in which columns and rows grow, LPS."""
    return np.array(header.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)


def _normal(header: Dataset) -> NDArray[np.float64]:
    along, down = _cosines(header)
    normal: NDArray[np.float64] = np.cross(along, down)
    return normal


def _alike(items: Sequence[Slice]) -> None:
    """Raise unless all slices have one size, pixel spacing and angle."""
    first = items[0]
    for item in items[1:]:
        for name, slack in (
            ("Rows", 0.0),
            ("Columns", 0.0),
            ("PixelSpacing", 1e-4),
            ("ImageOrientationPatient", SAME_ANGLE),
        ):
            expected = np.atleast_1d(np.array(first.header.get(name), dtype=np.float64))
            got = np.atleast_1d(np.array(item.header.get(name), dtype=np.float64))
            if expected.shape != got.shape or np.abs(expected - got).max() > slack:
                raise _refused(
                    f"slices of the series differ in {name}",
                    item.file,
                    f"{expected.tolist()}, as {first.file.name}",
                    got.tolist(),
                    "the series mixes several scans: put the slices of one into a folder",
                )


def _in_order(items: Sequence[Slice]) -> list[Slice]:
    normal = _normal(items[0].header)
    return sorted(items, key=lambda item: (float(item.position_mm @ normal), item.file.label))


def _each_place_once(items: Sequence[Slice], notes: list[str]) -> list[Slice]:
    """Leave out slices that are there twice.

    Raises:
        DataError: two slices at one place that show different things.
    """
    normal = _normal(items[0].header)
    single = [items[0]]
    doubled = 0
    for item in items[1:]:
        apart_mm = float((item.position_mm - single[-1].position_mm) @ normal)
        if apart_mm > SAME_PLACE_MM:
            single.append(item)
            continue
        if not np.array_equal(_hu(item), _hu(single[-1])):
            raise _refused(
                "two slices at one place show different things",
                item.file,
                f"the same as {single[-1].file.name}, or another place",
                "other pixels: the series holds several phases, or two reconstructions",
                "put the slices of one phase into a folder",
            )
        doubled += 1
    if doubled:
        notes.append(f"left out: {doubled} slices that are there twice")
    return single


def _grid(where: Path, items: Sequence[Slice]) -> Grid:
    """Where the voxels lie: axes are columns, rows, slices.

    Raises:
        DataError: one slice, a slice that is missing or lies aside, or a tilted gantry.
    """
    wrong = partial(DataError, where=where)
    if len(items) < 2:
        raise wrong(
            "the series has one slice",
            expected="a volume",
            got=items[0].file.name,
            next_step="name the folder that holds the whole series",
        )
    header = items[0].header
    along, down = _cosines(header)
    normal = _normal(header)
    steps_mm = np.diff([float(item.position_mm @ normal) for item in items])
    usual_mm = float(np.median(steps_mm))
    off = np.flatnonzero(np.abs(steps_mm - usual_mm) > MAX_SPACING_CHANGE * usual_mm)
    if off.size:
        at = int(off[0])
        raise wrong(
            "slices are missing, or their distance changes",
            expected=f"{usual_mm:g} mm between neighbors, as most are",
            got=f"{steps_mm[at]:g} mm between {items[at].file.name} and "
            f"{items[at + 1].file.name}" + (f", and {off.size - 1} more" if off.size > 1 else ""),
            next_step="export the series again; where the distance changes on purpose, resample "
            "it to one (dcm2niix does)",
        )
    _in_a_line(where, items)
    step = (items[-1].position_mm - items[0].position_mm) / (len(items) - 1)
    tilt = math.acos(min(1.0, float(step @ normal) / float(np.linalg.norm(step))))
    if math.sin(tilt) > MAX_SHEAR:
        raise wrong(
            "the gantry was tilted",
            expected=f"slices stacked at right angles, to {math.degrees(MAX_SHEAR):.1f} degrees",
            got=f"{math.degrees(tilt):.1f} degrees away",
            next_step="correct the tilt with dcm2niix, and predict the file it calls *_Tilt*",
        )
    rows_mm, columns_mm = (float(v) for v in header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = along * columns_mm
    affine[:3, 1] = down * rows_mm
    affine[:3, 2] = step
    affine[:3, 3] = items[0].position_mm
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS → RAS
    shape = (int(header.Columns), int(header.Rows), len(items))
    if min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise wrong(
            "the series claims an absurd size",
            expected=f"at most {MAX_VOXELS} voxels",
            got=f"{shape[0]} x {shape[1]} pixels, {shape[2]} slices",
            next_step="export the series again",
        )
    usable_affine(affine, shape, where)
    return Grid(shape=shape, affine=affine)


def _in_a_line(where: Path, items: Sequence[Slice]) -> None:
    """Raise where a slice lies beside the line on which the grid puts its first pixel."""
    header = items[0].header
    places_mm = np.array([item.position_mm for item in items])
    up_mm = (places_mm - places_mm[0]) @ _normal(header)
    # by how far up a slice lies, not by its number: distances between slices differ a little
    line_mm = places_mm[0] + np.outer(up_mm / up_mm[-1], places_mm[-1] - places_mm[0])
    aside_mm = np.linalg.norm((places_mm - line_mm) @ _cosines(header).T, axis=1)
    most_mm = MAX_ASIDE_PX * min(float(v) for v in header.PixelSpacing)
    if aside_mm.max() <= most_mm:
        return
    # by the largest step: where the first or last slice lies aside, so does the line
    steps_mm = np.diff(places_mm @ _cosines(header).T, axis=0)
    away_mm = np.linalg.norm(steps_mm - np.median(steps_mm, axis=0), axis=1)
    at = int(away_mm.argmax())
    raise DataError(
        "a slice lies beside the line of the others",
        where=where,
        expected=f"at most {most_mm:g} mm aside, {MAX_ASIDE_PX:g} of a pixel",
        got=f"{aside_mm.max():.3g} mm; the largest step, {away_mm[at]:.3g} mm sideways, is from "
        f"{items[at].file.name} to {items[at + 1].file.name}",
        next_step="export the original series from the archive (PACS)",
    )


# ------------------------------------------------------------------------------------------ pixels


def _hu(item: Slice) -> NDArray[Any]:
    """(rows, columns) HU of a slice: int16 where slope and intercept are whole, else float32.

    Raises:
        DataError: damaged, no gray image, or packed in a way no installed library unpacks.
    """
    file = item.file
    with _read(file) as whole:
        syntax = whole.file_meta.TransferSyntaxUID
        if int(whole.get("SamplesPerPixel", 1)) != 1:
            raise ValueError("a color image")
        if whole.get("PhotometricInterpretation") != "MONOCHROME2":
            raise ValueError(f"{whole.get('PhotometricInterpretation')}, not MONOCHROME2")
        try:
            pixels: NDArray[Any] = whole.pixel_array
        except RuntimeError as err:
            raise _refused(
                "the pixels are compressed in a way that no installed library unpacks",
                file,
                "uncompressed pixels, or a library for them",
                getattr(syntax, "name", syntax),
                f"{INSTALL}, or convert the series with dcm2niix",
            ) from err
        shape = (int(item.header.Rows), int(item.header.Columns))
        if pixels.shape != shape:
            raise ValueError(f"pixels of shape {pixels.shape}, not {shape}")
    slope, intercept = float(item.header.RescaleSlope), float(item.header.RescaleIntercept)
    if slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 1 << 15:
        values = pixels.astype(np.int64) * int(slope) + int(intercept)
        if values.min() >= -32768 and values.max() <= 32767:
            return values.astype(np.int16)
        return values.astype(np.float32)
    return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)


def load_scan(series: Series) -> Scan:
    """The pixels of a series as one scan in HU.

    Slope and intercept are applied slice by slice, for they may differ from slice to slice.

    Raises:
        DataError: see `_hu`.
    """
    stored: NDArray[Any] = np.zeros(series.grid.shape, dtype=np.int16, order="F")
    for k, item in enumerate(series.slices):
        hu = _hu(item)
        if hu.dtype != stored.dtype and stored.dtype == np.int16:
            stored = stored.astype(np.float32, order="F")
        stored[:, :, k] = hu.T
    return Scan(
        path=series.where,
        stored=stored,
        slope=1.0,
        intercept=0.0,
        grid=series.grid,
        notes=series.notes,
    )


def headers(series: Series) -> Iterator[Dataset]:
    """Every slice's whole header without pixels, in order, for objects that refer to them.

    Raises:
        DataError: a slice cannot be read.
    """
    for item in series.slices:
        with _read(item.file, stop_before_pixels=True) as header:
            yield header
