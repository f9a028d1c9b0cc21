"""A small CT and its label as the bytes of NIfTI files, for tests of the readers."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np

from clbench.spec.benchmark import Source

CODES = [
    "".join(c) for p in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*p)
]
LITS = Source(name="lits", title="", layout="lits", labels={1: "liver", 2: "liver_tumor"})
PLACE = np.diag([2.0, 3.0, 4.0, 1.0])


def body() -> tuple[np.ndarray, np.ndarray]:
    """HU and label of a small body without any symmetry."""
    image = np.full((7, 9, 8), -1000, dtype=np.int16)
    image[1:6, 2:8, 1:7] = np.random.default_rng(5).integers(-150, 240, (5, 6, 6))
    label = np.zeros(image.shape, dtype=np.uint8)
    label[2:5, 3:6, 2:5] = 1
    label[3, 4, 2:4] = 2
    return image, label


def packed(
    array: np.ndarray, affine: np.ndarray = PLACE, kind: type = nib.Nifti1Image
) -> bytearray:
    file = kind(array, affine, dtype=array.dtype)
    file.set_sform(affine, 1)
    file.set_qform(affine, 1)
    return bytearray(file.to_bytes())


def put(folder: Path, name: str, raw: bytes, suffix: str = ".nii") -> Path:
    path = folder / f"{name}{suffix}"
    path.write_bytes(gzip.compress(raw, 1) if suffix == ".nii.gz" else bytes(raw))
    return path
