"""Predictions as DICOM segmentation objects, written by highdicom: one per structure.

One object per structure, for structures may overlap, and so that one mask at a time is in memory;
all objects of a case are one DICOM series. Patient and study are copied from the slices: the files
identify the patient as the images do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import clbench
from clbench.deployment.dicom import Series, headers, optional_library
from clbench.deployment.masks import GO_ON, OnScanGrid
from clbench.errors import DataError, first_line
from clbench.spec.taxonomy import structure
from clbench.store import files
from clbench.types import Bits, mask_of

if TYPE_CHECKING:
    from pydicom import Dataset

PRIVATE_SCHEME = "99CLBENCH"
"""Coding scheme of structures without a SNOMED code in pydicom's table; the code is the name."""
SERIES_NUMBER = 900
"""Of the series of segmentation objects."""
_KEYWORDS = {
    "postcava": "InferiorVenaCava",
    "gall_bladder": "Gallbladder",
    "small_intestine": "SmallIntestine",
}
"""Structure → SNOMED keyword of pydicom, where its words in a prompt are not the keyword."""
_ABNORMAL = {"tumor": "Neoplasm", "cyst": "Cyst"}
_SIDES = ("left", "right")


def highdicom() -> Any:
    """The library that writes; see `clbench.deployment.dicom.optional_library`."""
    return optional_library("highdicom", "writing", "--dicom-seg")


def write_segmentations(
    folder: Path, bits: Bits, structures: Sequence[str], way: OnScanGrid, series: Series
) -> list[Path]:
    """Write a segmentation object per structure that has a voxel on the slices.

    Args:
        folder: where, as `STRUCTURE.dcm`.
        bits: (D, H, W) on the model's grid, bit k = structures[k].
        structures: names of the bits.
        way: back to the grid of the slices.
        series: the slices.

    Returns:
        Paths of the files written.

    Raises:
        DataError: the slices do not say of patient or study what the objects must repeat.
        StoreError: the disk is full, or the folder cannot be written.
    """
    slices = source_headers(series)
    series_uid = highdicom().UID()
    written = []
    columns, rows, planes = series.grid.shape
    for k, name in enumerate(structures):
        pixels = np.zeros((planes, rows, columns), dtype=np.uint8)
        first = 0
        for slab in way.slabs(mask_of(bits, k)):
            stop = first + slab.shape[2]
            pixels[first:stop] = slab.transpose(2, 1, 0)
            first = stop
        if not pixels.any():  # an object without a frame is not allowed
            continue
        written.append(folder / f"{name}.dcm")
        try:
            segmentation = _segmentation(name, pixels, slices, series_uid, number=k + 1)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise _not_enough(series, err) from err
        _write(written[-1], segmentation)
    for path in (folder / f"{name}.dcm" for name in structures):
        if path not in written:  # of an earlier prediction, in which the structure was there
            path.unlink(missing_ok=True)
    return written


def source_headers(series: Series, notes: list[str] | None = None) -> list[Dataset]:
    """Headers of all slices, in order, with what a segmentation object must repeat of them.

    What DICOM allows to be empty (name, birth date, …) is added empty where it is absent, and
    emptied where highdicom would refuse the value.

    Args:
        series: the slices.
        notes: takes a note of what was emptied.

    Raises:
        DataError: a slice names no study or frame of reference.
    """
    slices = list(headers(series))
    emptied = set()
    for header in slices:
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
            if not header.get(name):
                raise _not_enough(series, ValueError(f"a slice without {name}"))
        for name in (
            "PatientID",
            "PatientName",
            "PatientBirthDate",
            "PatientSex",
            "StudyID",
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "ReferringPhysicianName",
        ):
            if name not in header:
                setattr(header, name, "")
            elif not _is_allowed(name, header.get(name)):
                setattr(header, name, "")
                emptied.add(name)
    if emptied and notes is not None:
        # without the values: they would tell who the patient is
        notes.append(
            f"left empty in the segmentation objects: {', '.join(sorted(emptied))}, for the slices "
            "hold values there that DICOM does not allow"
        )
    return slices


def _is_allowed(name: str, value: Any) -> bool:
    """Whether highdicom takes the value of an attribute of a patient or study."""
    from pydicom.valuerep import DA, TM

    check = {
        "PatientSex": lambda sex: sex in (None, "") or highdicom().PatientSexValues(sex),
        "PatientBirthDate": DA,
        "StudyDate": DA,
        "StudyTime": TM,
    }.get(name)
    if check is None:
        return True
    try:
        check(value)
    except (TypeError, ValueError):
        return False
    return True


def _not_enough(series: Series, err: Exception) -> DataError:
    return DataError(
        "no segmentation object can be made for this series",
        where=series.where,
        expected="slices that name patient, study and frame of reference",
        got=first_line(err),
        next_step="export the original series from the archive (PACS), or leave out --dicom-seg",
    )


# ------------------------------------------------------------------------------------------- codes


def snomed(name: str) -> tuple[Any, Any]:
    """SNOMED code of a structure, and of its side where the code has none.

    Args:
        name: canonical name.

    Returns:
        (code or None, code of left or right or None).
    """
    from pydicom.sr.codedict import codes

    side, _, rest = name.partition("_")
    known = codes.SCT.dir()
    prompt = structure(name).prompt.split()
    keyword = _KEYWORDS.get(name, "".join(word.capitalize() for word in prompt))
    if keyword in known:
        return getattr(codes.SCT, keyword), None
    keyword = "".join(word.capitalize() for word in rest.split("_"))
    if side in _SIDES and keyword in known:
        return getattr(codes.SCT, keyword), getattr(codes.SCT, side.capitalize())
    return None, None


def _region(name: str, parent: str | None) -> Any:
    """SNOMED code of the organ that an abnormal structure lies in; None where there is none.

    Args:
        name: canonical name, such as kidney_tumor.
        parent: the structure that contains it; None: either organ of a pair.
    """
    from pydicom.sr.codedict import codes

    if parent is not None:
        return snomed(parent)[0]
    organ = name.rpartition("_")[0].capitalize()
    return getattr(codes.SCT, organ) if organ in codes.SCT.dir() else None


def segment_description(name: str) -> Any:
    """What a segment is: category, type and where it lies, in SNOMED codes where there are any.

    Args:
        name: canonical name.
    """
    library = highdicom()
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    about = structure(name)
    code, side = snomed(name)
    region = None
    category = codes.SCT.AnatomicalStructure
    if about.kind == "device":
        category = codes.SCT.PhysicalObject
    elif about.kind in _ABNORMAL:
        category = codes.SCT.MorphologicallyAbnormalStructure
        code, side = getattr(codes.SCT, _ABNORMAL[about.kind]), None
        region = _region(name, about.parent)
    if code is None:
        code = CodedConcept(value=name, scheme_designator=PRIVATE_SCHEME, meaning=about.prompt[:64])
    description = library.seg.SegmentDescription(
        segment_number=1,
        segment_label=about.prompt[:64],
        segmented_property_category=category,
        segmented_property_type=code,
        algorithm_type=library.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=library.AlgorithmIdentificationSequence(
            name="clbench", version=clbench.__version__, family=codes.DCM.ArtificialIntelligence
        ),
        tracking_uid=library.UID(),
        tracking_id=name,
        anatomic_regions=None if region is None else [region],
    )
    if side is not None:
        concept = CodedConcept(side.value, side.scheme_designator, side.meaning)
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [concept]
    return description


# ----------------------------------------------------------------------------------------- objects


def _segmentation(
    name: str,
    pixels: NDArray[np.uint8],
    slices: Sequence[Dataset],
    series_uid: str,
    *,
    number: int,
) -> Dataset:
    """The object of one structure.

    Args:
        name: canonical name.
        pixels: (slices, rows, columns), 0 or 1.
        slices: headers, in the same order.
        series_uid: of all objects of the case.
        number: of the object in its series.
    """
    library = highdicom()
    segmentation: Dataset = library.seg.Segmentation(
        source_images=slices,
        pixel_array=pixels,
        segmentation_type=library.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment_description(name)],
        series_instance_uid=series_uid,
        series_number=SERIES_NUMBER,
        sop_instance_uid=library.UID(),
        instance_number=number,
        manufacturer="clbench",
        manufacturer_model_name="clbench",
        software_versions=clbench.__version__,
        device_serial_number="none",
        series_description="clbench segmentation",
        omit_empty_frames=True,
    )
    return segmentation


def _write(path: Path, segmentation: Dataset) -> None:
    files.atomic_write(
        path,
        lambda file: segmentation.save_as(file, enforce_file_format=True),
        what="a segmentation object",
        next_step=GO_ON,
    )
