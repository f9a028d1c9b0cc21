"""Annotated CTs of a user's own: phantoms with a cyst in the spleen, in the layout of nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from clbench.data.phantom.generate import make_phantom
from clbench.spec.benchmark import Source
from clbench.spec.settings import PhantomSettings

SPLEEN, CYST = 1, 2
FIRST = 7001
"""Phantom subject of the first case: one that no course uses."""


def write_own_cts(
    folder: Path,
    cache: Path,
    count: int,
    *,
    without: Sequence[int] = (),
    old: bool = True,
    spacing_mm: float = 10.0,
    first: int = FIRST,
) -> Path:
    """Cases of which each has a spleen with a cyst.

    Args:
        folder: where to write.
        cache: where phantoms are kept.
        count: how many.
        without: places of the cases that have no cyst.
        old: whether the spleen around the cyst is annotated as well.
        spacing_mm: slice thickness of the phantom.
        first: phantom subject of the first case.
    """
    source = Source(name="own", title="Own", layout="nnunet", labels={SPLEEN: "spleen"})
    ids = [str(first + i) for i in range(count)]
    size = PhantomSettings(spacing_mm=spacing_mm)
    made = make_phantom(cache / "phantom", [source], {"own": ids}, size, needed=["spleen"])["own"]
    for i, case in enumerate(ids):
        image = nib.load(made / "imagesTr" / f"{case}_0000.nii.gz")
        label = nib.load(made / "labelsTr" / f"{case}.nii.gz")
        hu, values = np.asarray(image.dataobj).copy(), np.asarray(label.dataobj).copy()
        if i not in without:
            sizes = image.header.get_zooms()
            inside = np.argwhere(values == SPLEEN)
            middle = inside[len(inside) // 2]
            far = [(np.arange(n) - m) * s for n, m, s in zip(hu.shape, middle, sizes, strict=True)]
            x, y, z = np.meshgrid(*far, indexing="ij")
            cyst = (x**2 + y**2 + z**2 < 18.0**2) & (values == SPLEEN)
            hu[cyst], values[cyst] = -20, CYST
        if not old:
            values[values == SPLEEN] = 0
        for part, name, like, array in (
            ("imagesTr", f"{case}_0000.nii.gz", image, hu),
            ("labelsTr", f"{case}.nii.gz", label, values),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, like.affine), folder / part / name)
    labels = {"background": 0, **({"spleen": SPLEEN} if old else {}), "spleen_cyst": CYST}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder
