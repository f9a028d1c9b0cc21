"""Predictions as NIfTI files on the grid of the scan: a label map, or a mask per structure.

Files are written some slices at a time, so memory depends on the model's grid and never on how fine
the scan is. Equal predictions give equal bytes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from clbench.data.labels import PSEUDO_SCALE, pattern_of
from clbench.data.nifti import Grid
from clbench.data.volume import Volume
from clbench.deployment.scan import SLAB_VOX
from clbench.evaluation.scoring import to_native
from clbench.spec.taxonomy import ancestors, depth, with_descendants
from clbench.store import files
from clbench.types import Bits

GO_ON = "free some disk space, or choose another --out; the same command goes on where it stopped"
"""What to do when an output could not be written."""
_COMPRESSION = 4
"""Of gzip: masks shrink a hundredfold at any level, and higher ones take longer."""
_DATA_OFFSET = 352
"""Bytes before the voxels of a NIfTI-1 file without extensions."""

Slabs = Iterator[NDArray[Any]]
"""Voxels of a file, some slices of its last axis at a time, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnScanGrid:
    """How the axes of the model's grid follow those of the scan."""

    order: tuple[int, int, int]
    """Axis of the model's grid for each axis of the file."""
    indices: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    """Per axis of the file the model's index of each voxel, -1 outside."""

    def slabs(self, array: NDArray[Any]) -> Slabs:
        """A (D, H, W) array of the model's grid on that of the scan, nearest neighbor."""
        turned = array.transpose(self.order)
        a, b, c = self.indices
        planes = max(1, SLAB_VOX // max(1, len(a) * len(b)))
        for first in range(0, len(c), planes):
            yield to_native(turned, (a, b, c[first : first + planes]))


def on_scan_grid(volume: Volume, grid: Grid) -> OnScanGrid:
    """The way back from a prepared volume to its scan.

    Args:
        volume: made from the scan.
        grid: the scan's.
    """
    turn = io_orientation(grid.affine)
    order = tuple(int(axis) for axis in turn[:, 0])
    ras = volume.native_axes()
    indices = [ras[axis][:: int(flip)] for axis, flip in zip(order, turn[:, 1], strict=True)]
    return OnScanGrid(
        order=(order[0], order[1], order[2]), indices=(indices[0], indices[1], indices[2])
    )


# ------------------------------------------------------------------------------------ label maps


def nested(structures: Sequence[str]) -> bool:
    """Whether one of the structures lies inside another: a label map then cannot hold both."""
    return any(set(ancestors(name)) & set(structures) for name in structures)


def label_values(structures: Sequence[str]) -> dict[str, int]:
    """Structure → label value: 1, 2, … in the order of the course."""
    return {name: value for value, name in enumerate(structures, 1)}


def paint_order(structures: Sequence[str]) -> list[str]:
    """Structures as a label map is drawn: inner ones over outer ones, then later over earlier.

    >>> paint_order(["liver_tumor", "liver", "spleen"])
    ['liver', 'spleen', 'liver_tumor']
    """
    return sorted(structures, key=lambda name: (depth(name), structures.index(name)))


def dataset_json(structures: Sequence[str], cases: int) -> dict[str, Any]:
    """What the values mean, as nnU-Net v2 writes it: a structure that holds others is a region.

    Args:
        structures: in the order of the course.
        cases: how many label maps there are.
    """
    value = label_values(structures)
    labels: dict[str, Any] = {"background": 0}
    for name in paint_order(structures):  # nnU-Net's values for regions go by the order of labels
        inside = [value[n] for n in with_descendants(name, structures)]
        labels[name] = inside if len(inside) > 1 else value[name]
    content: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        "labels": labels,
        "numTraining": 0,
        "numTest": cases,
        "file_ending": ".nii.gz",
    }
    if nested(structures):
        content["regions_class_order"] = [value[name] for name in paint_order(structures)]
    return content


def label_map(bits: Bits, structures: Sequence[str]) -> tuple[NDArray[np.uint8], int]:
    """One label value per voxel, and in how many voxels that says less or more than the bits.

    Args:
        bits: (D, H, W), bit k = structures[k].
        structures: names of the bits.

    Returns:
        (D, H, W) uint8, and the voxels in which two structures overlap that are not one inside the
        other, or an inner structure lies outside its outer one.
    """
    value = label_values(structures)
    one = bits.dtype.type(1)
    labels = np.zeros(bits.shape, dtype=np.uint8)
    for name in paint_order(structures):
        flag = one << bits.dtype.type(structures.index(name))
        np.copyto(labels, np.uint8(value[name]), where=(bits & flag) != 0)
    meaning = np.zeros(len(structures) + 1, dtype=bits.dtype)
    for name in structures:
        meaning[value[name]] = pattern_of(name, structures)
    return labels, int(np.count_nonzero(meaning[labels] != bits))


class Tally:
    """Counts voxels of a prediction on the grid of its scan, slab by slab.

    Args:
        structures: names of the bits.
    """

    def __init__(self, structures: Sequence[str]) -> None:
        self.structures = tuple(structures)
        self.voxels: dict[str, int] = dict.fromkeys(structures, 0)
        self.relabelled_vox = 0

    def count(self, slab: Bits) -> None:
        """Add the voxels of every structure in a slab of bit patterns."""
        patterns, counts = np.unique(slab[slab != 0], return_counts=True)
        for pattern, voxels in zip(patterns, counts, strict=True):
            for k, name in enumerate(self.structures):
                if int(pattern) >> k & 1:
                    self.voxels[name] += int(voxels)

    def label(self, slab: Bits) -> NDArray[np.uint8]:
        """Count a slab, and turn it into label values, see `label_map`."""
        self.count(slab)
        labels, relabelled_vox = label_map(slab, self.structures)
        self.relabelled_vox += relabelled_vox
        return labels


# ------------------------------------------------------------------------------------------ files


def write_nifti(path: Path, slabs: Slabs, grid: Grid, *, scale: float = 1.0) -> None:
    """Write an image of one byte per voxel, whole or not at all.

    Args:
        path: target, ending in .nii.gz.
        slabs: uint8, in the order of the last axis.
        grid: shape and place.
        scale: what a stored 1 stands for.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """

    def write(file: BinaryIO) -> None:
        with gzip.GzipFile(
            filename="", mode="wb", compresslevel=_COMPRESSION, fileobj=file, mtime=0
        ) as packed:
            packed.write(_header(grid, scale))
            for slab in slabs:
                packed.write(slab.tobytes(order="F"))

    files.atomic_write(path, write, what="a prediction", next_step=GO_ON)


def _header(grid: Grid, scale: float) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(grid.shape)
    header.set_xyzt_units("mm")
    header.set_qform(grid.affine, code="scanner")
    header.set_sform(grid.affine, code="scanner")
    header.set_slope_inter(scale, 0.0)
    header["vox_offset"] = _DATA_OFFSET
    content: bytes = header.binaryblock
    return content + bytes(_DATA_OFFSET - len(content))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a description of label values, its keys in the order given.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    files.write_bytes(path, text.encode())


# ---------------------------------------------------------------------------------- probabilities


class Probabilities:
    """Probabilities of a volume on the model's grid, one byte each, in a file that is mapped.

    Args:
        file: an open temporary file.
        count: number of structures.
        shape: (D, H, W) of the model's grid.
    """

    def __init__(self, file: IO[bytes], count: int, shape: tuple[int, ...]) -> None:
        self.array: NDArray[np.uint8] = np.memmap(
            cast(Any, file), dtype=np.uint8, mode="w+", shape=(count, *shape)
        )

    def put(self, rows: slice, columns: slice, slab: Any) -> None:
        """Store one slab, rounded to 1/254.

        Args:
            rows: of axis 0.
            columns: of axis 2.
            slab: (K, rows, H, columns) probabilities, a tensor on the CPU.
        """
        self.array[:, rows, :, columns] = np.round(slab.numpy() * PSEUDO_SCALE).astype(np.uint8)
