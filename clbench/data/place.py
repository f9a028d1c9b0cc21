"""Where the voxels of a file lie in space: refused where that cannot be, or is not said plainly.

Room: row 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import aff2axcodes, io_orientation
from numpy.typing import NDArray

from clbench.data.nifti import damaged, header, load
from clbench.errors import DataError

MAX_EXTENT_MM = 4000.0
"""Longest axis of a volume; no scanner's table is longer."""
MIN_SPACING_MM = 1e-3
"""Smallest voxel; a CT's are a hundred times larger."""
MAX_SHEAR = 0.02
"""Largest cosine between two axes of a grid, one degree: resampling takes axes as upright, and
rounding in headers gives a thousandth of it."""
MIN_COSINE = 0.5
"""Of the angle between an axis of the grid and the axis of the body it is called after."""
MAX_PLACE_MM = 1e6
"""Largest entry of an affine."""

Shape = tuple[int, int, int]


def grid(path: Path) -> tuple[Shape, NDArray[np.float64]]:
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
    _usable(affine, shape, path)
    return (shape[0], shape[1], shape[2]), affine


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
            "copy the right one over the other",
        )


def _usable(affine: NDArray[np.float64], shape: tuple[int, ...], path: Path) -> None:
    """Raise unless the affine is one of a body in a scanner."""

    def wrong(expected: str, got: object, next_step: str) -> DataError:
        return DataError(
            "the file has no usable position in space",
            where=path,
            expected=expected,
            got=got,
            next_step=next_step,
        )

    again = "convert the DICOM series again"
    turn = affine[:3, :3]
    if not np.isfinite(affine).all() or np.abs(affine).max() > MAX_PLACE_MM:
        raise wrong("an affine of millimeters", affine[:3].tolist(), again)
    spacing = np.linalg.norm(turn, axis=0)
    if spacing.min() < MIN_SPACING_MM:
        raise wrong("an affine that can be inverted", affine[:3].tolist(), again)
    if max(n * s for n, s in zip(shape, spacing, strict=True)) > MAX_EXTENT_MM:
        raise wrong(
            f"a volume of at most {MAX_EXTENT_MM:g} mm along each axis",
            f"{shape} voxels of {spacing.round(3).tolist()} mm",
            f"the spacing is wrong by a factor; {again}",
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
