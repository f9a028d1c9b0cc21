"""A small CT series in DICOM, written by pydicom, and ways to spoil it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason='pip install "clbench[dicom]"')
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import UID, ExplicitVRLittleEndian  # noqa: E402

ROOT = "1.2.826.0.1.3680043.8.498."
SPACING_MM = (2.5, 2.0, 3.0)
"""Of rows, columns and slices."""


def body(slices: int = 6) -> np.ndarray:
    """(slices, rows, columns) HU of a small body without any symmetry."""
    hu = np.full((slices, 12, 10), -1000, dtype=np.int16)
    hu[:, 3:9, 2:9] = np.random.default_rng(7).integers(-150, 240, (slices, 6, 7))
    return hu


def series(hu: np.ndarray | None = None, *, number: int = 1) -> list[Dataset]:
    """Axial slices from the head to the feet, as scanners often number them."""
    hu = body() if hu is None else hu
    made = []
    for k, plane in enumerate(hu):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
        data.SOPInstanceUID = UID(f"{ROOT}{number}.1.{k + 1}")
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID = (
            UID(f"{ROOT}{number}.2"),
            UID(f"{ROOT}{number}.3"),
        )
        data.FrameOfReferenceUID = UID(f"{ROOT}{number}.4")
        data.Modality, data.SeriesDescription = "CT", f"abdomen {number}"
        data.PatientID, data.PatientName = "p1", "Test^Patient"
        data.PatientBirthDate = data.PatientSex = data.AccessionNumber = data.StudyID = ""
        data.StudyDate = data.StudyTime = ""
        data.SeriesNumber, data.InstanceNumber = number, len(hu) - k
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-9.0, -14.0, 50.0 + SPACING_MM[2] * k]
        data.PixelSpacing, data.SliceThickness = list(SPACING_MM[:2]), SPACING_MM[2]
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
        made.append(data)
    return made


def write(folder: Path, slices: Iterable[Dataset], ending: str = ".dcm") -> Path:
    """Into a folder, under names that say nothing of the order."""
    folder.mkdir(parents=True, exist_ok=True)
    slices = list(slices)
    for k in np.random.default_rng(len(slices)).permutation(len(slices)):
        name = folder / f"IM{(k * 7 + 3) % 101:03d}{ending}"
        while name.exists():
            name = name.with_name(f"x{name.name}")
        slices[k].save_as(name, enforce_file_format=True)
    return folder


def changed(
    slices: list[Dataset], which: int | None, change: Callable[[Dataset], None]
) -> list[Dataset]:
    """A copy in which one slice, or every one, is changed."""
    slices = copy.deepcopy(slices)
    for k, item in enumerate(slices):
        if which in (None, k):
            change(item)
    return slices
