"""A CT of any origin on its own grid, and prepared for a model a few planes at a time.

Stored voxels are held once, as they lie in the file; what is computed from them is held for a few
planes and on the model's grid only. The result equals that of `clbench.data.volume.preprocess` to
the bit (a test holds it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from clbench.data.labels import in_hu, refuse_no_hu
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import Grid, raw_voxels, scaled, spacing_of
from clbench.data.nifti import grid as grid_of
from clbench.data.volume import (
    Volume,
    model_affine,
    model_shape,
    neighbors,
    no_tissue,
    resample_linear,
)
from clbench.errors import DataError
from clbench.spec.benchmark import Preprocessing, Rescale, Source

SLAB_VOX = 1 << 23
"""Voxels of the scan that are turned into real numbers at a time: 32 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """A CT as it is stored."""

    path: Path
    """Where it was read from; stands in errors."""
    stored: NDArray[Any]
    """Voxels on `grid`, without slope and intercept."""
    slope: float
    """HU = slope × stored + intercept; 1 for none."""
    intercept: float
    """0 for none."""
    rescale: Rescale | None = None
    """How its source's values become HU, see `Source.rescale`; None: they are HU."""
    grid: Grid
    """Shape and place of the voxels."""
    notes: tuple[str, ...] = ()
    """What a reader of its predictions should know."""

    def hu(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Voxels in HU, of the bits that training reads.

        Args:
            stored: all of `stored`, or a part of any shape.
        """
        values = scaled(stored, self.slope, self.intercept)
        return values if self.rescale is None else in_hu(values, self.rescale)

    def hu_range(self) -> tuple[float, float]:
        """Smallest and largest value in HU.

        Raises:
            DataError: NaN, infinite values, or values that are no HU.
        """
        ends = np.array([self.stored.min(), self.stored.max()])
        low, high = sorted(float(v) for v in self.hu(ends))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                "the image holds NaN or infinite voxels",
                where=self.path,
                expected="HU",
                next_step="convert the DICOM series again",
            )
        refuse_no_hu(self.path, low, high)
        return low, high


def read_nifti(path: Path) -> Scan:
    """A NIfTI file as a scan.

    Raises:
        DataError: damaged, not one 3-D volume, or in no usable place in space.
    """
    grid = grid_of(path)
    stored, slope, intercept = raw_voxels(path)
    return Scan(
        path=path,
        stored=stored.reshape(grid.shape, order="F"),
        slope=slope,
        intercept=intercept,
        grid=grid,
    )


def prepare(scan: Scan, *, case: str, source: Source, pre: Preprocessing) -> Volume:
    """The scan on the model's grid, cropped to the body, without annotation.

    Args:
        scan: the CT.
        case: its name.
        source: a data set of the course; stands for "no labels are read".
        pre: spacing and window.

    Returns:
        A volume that annotates nothing; its bits are all 0 and take no memory.

    Raises:
        DataError: values that are no HU, no voxel above the window's lower end, or a grid of
            absurd size.
    """
    low_hu, high_hu = scan.hu_range()
    grid = scan.grid
    stored = apply_orientation(scan.stored, io_orientation(grid.affine))  # a view
    affine = grid.ras_affine
    native_mm = spacing_of(affine).tolist()
    advice = "check the spacing in the file"
    shape = model_shape(stored.shape, native_mm, pre, scan.path, advice)
    image = np.empty(shape, dtype=np.int16)
    tissue = [np.zeros(n, dtype=bool) for n in shape]
    for first, stop, planes in _resampled_planes(scan, stored, native_mm, pre.spacing_mm):
        image[:, :, first:stop] = np.clip(np.round(planes), -32768, 32767).astype(np.int16)
        above = image[:, :, first:stop] > pre.window_hu[0]
        tissue[0] |= above.any(axis=(1, 2))
        tissue[1] |= above.any(axis=(0, 2))
        tissue[2][first:stop] = above.any(axis=(0, 1))
    if not tissue[0].any():
        raise no_tissue(scan.path, pre, f"{low_hu:g} to {high_hu:g}")
    ends = [np.flatnonzero(hit)[[0, -1]] for hit in tissue]
    a, b, c = (slice(int(first), int(last) + 1) for first, last in ends)
    image = np.ascontiguousarray(image[a, b, c])
    start = (a.start, b.start, c.start)
    nothing = np.broadcast_to(np.uint8(0), image.shape)
    return Volume(
        source="new",
        case=case,
        image=image,
        bits=nothing,
        names=(),
        annotated=frozenset(),
        affine=model_affine(affine, pre, start),
        native_affine=affine,
        native_shape=(stored.shape[0], stored.shape[1], stored.shape[2]),
        start=start,
        window_hu=pre.window_hu,
        files=CaseFiles(case=case, image=scan.path, label=()),
        table=source,
        where={},
        counts={},
    )


def _resampled_planes(
    scan: Scan, stored: NDArray[Any], native_mm: list[float], model_mm: tuple[float, ...]
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Planes of the model's grid along axis 2: (first, stop, (D, H, stop - first) float32 HU).

    The arithmetic is that of `resample_linear`, which interpolates along axis 2 last.
    """
    low, high, part = neighbors(stored.shape[2], native_mm[2], model_mm[2])
    count = len(part)
    native_planes = max(2, SLAB_VOX // max(1, stored.shape[0] * stored.shape[1]))
    first = 0
    while first < count:
        # as many planes as need no more than `native_planes` of the scan, and one at least
        stop = int(np.searchsorted(high, low[first] + native_planes, side="left"))
        stop = min(max(stop, first + 1), count)
        bottom, top = int(low[first]), int(high[stop - 1]) + 1
        hu = scan.hu(stored[:, :, bottom:top])
        in_plane = resample_linear(hu, native_mm, (model_mm[0], model_mm[1], native_mm[2]))
        below = np.take(in_plane, low[first:stop] - bottom, axis=2)
        above = np.take(in_plane, high[first:stop] - bottom, axis=2)
        yield first, stop, below + (above - below) * part[first:stop]
        first = stop
