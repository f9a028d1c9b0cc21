"""Whether labels lie where a body has them, and whether the body lies the right way round.

Where structures lie to each other, to the midline and to the spine, and what HU they hold, shows
masks mirrored against their image, bodies mirrored or upside down, and labels on the wrong organ.
What is seen is said, never corrected: a patient may have organs on the other side.

Places and volumes are those of the phantom's table (30 label maps, 2 CTs; see `anatomy.csv`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.anatomy.midline import body_outline, midline
from clbench.data.phantom.anatomy import tissues
from clbench.spec.taxonomy import structure
from clbench.types import mask_of

GRID_MM = 4.0
"""The case is looked at in steps of about this size."""
MIN_VOX = 3
"""Voxels on that grid that a structure must have."""
SIDE_MM = 45.0
"""A structure lies on one side where its usual place is this far from the midline."""
WRONG_SIDE_MM = 15.0
"""How far beyond the midline a structure of the other side must lie."""
SPREAD_MM = 20.0
"""Standard deviation that places of structures along an axis must have, to say its direction."""
OPPOSITE = -0.5
"""Correlation of places with usual places below which an axis runs the other way."""
BONE_HU = 250.0
"""Above: bone, metal and dense contrast medium."""
SPINE_MM = 40.0
"""Half the width of the strip about the midline in which the spine lies."""
SPINE_IN_FRONT = 0.42
"""Mean depth of bone in that strip, from the front (0) to the back (1), below which the body lies
the wrong way round; a torso has 0.6 to 0.8, and a head about 0.5."""
LUNG_HU = (-950.0, -500.0)
"""Of lung; gas of the bowel lies below."""
END = 0.1
"""Share of the slices that is an end of the field of view."""
SOME_LUNG, NO_LUNG = 0.05, 0.01
"""Share of a slice's body that is lung, where lungs are, and where none are."""
TORSO = 0.8
"""Size of the upper end's slices to the lower end's below which the upper one is a neck."""
FAT_HU = -60.0
"""Below: fat, lung and air, which solid organs hold little of."""
MOST_FAT = {
    "liver": 0.1,
    "spleen": 0.1,
    "left_kidney": 0.3,
    "right_kidney": 0.3,
    "aorta": 0.25,
    "postcava": 0.25,
}
"""Solid structure → largest share of its voxels below `FAT_HU`; sinus fat belongs to many kidneys'
labels, and a border drawn generously takes fat along."""
LEAST_LUNG = 0.5
"""Share of a lung's voxels that must lie below -300 HU."""
TOO_LARGE = 3.0
"""Times the largest usual volume from which on a label is on another organ."""
DIRECTIONS = (("left", "right"), ("front", "back"), ("top", "bottom"))


def anatomy_notes(
    image: NDArray[np.generic],
    bits: NDArray[Any],
    names: Sequence[str],
    spacing_mm: NDArray[np.float64],
) -> list[str]:
    """What about the places of a case's structures cannot be, or seldom is; empty: nothing.

    Args:
        image: (D, H, W) HU in RAS.
        bits: (D, H, W) unsigned, bit k = names[k].
        names: the structures; none: the image alone is looked at.
        spacing_mm: (3,) voxel size of the three axes.
    """
    steps = [max(1, round(GRID_MM / mm)) for mm in spacing_mm]
    coarse = tuple(slice(None, None, step) for step in steps)
    mm = np.asarray(spacing_mm, dtype=np.float64) * steps
    hu = np.asarray(image[coarse], dtype=np.float32)
    masks = {name: mask_of(bits[coarse], k) for k, name in enumerate(names)}
    masks = {name: mask for name, mask in masks.items() if np.count_nonzero(mask) >= MIN_VOX}
    centers = {name: np.argwhere(mask).mean(axis=0) * mm for name, mask in masks.items()}
    plane = midline(hu, mm)
    notes = []
    misfit, of_body = _misfit(hu, masks), _body_exchanged(hu, plane, mm)
    for axis, (one, other) in enumerate(DIRECTIONS):
        fits = bool(of_body) or (axis != 1 and not misfit)  # the spine says where the back is
        cause = "the body is mirrored" if fits else "the masks are mirrored against their image"
        if wrong := _reversed(centers, axis):
            notes.append(
                f"{one} and {other} are exchanged in the places of {_listed(wrong)}: {cause}, or "
                "the header is wrong"
            )
        elif axis == 0 and plane is not None and (wrong := _wrong_side(centers, plane * mm[0])):
            notes.append(
                f"on the wrong side of the body's midline: {_listed(wrong)}; {cause}, a label is "
                "on another organ, or the patient is built that way"
            )
    return [*notes, *misfit, *_too_large(masks, float(np.prod(mm))), *of_body]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _reversed(centers: Mapping[str, NDArray[np.float64]], axis: int) -> list[str]:
    """The structures whose places along an axis are the usual ones, reversed."""
    usual = {
        name: (-1 if axis < 2 else 1) * tissues()[name].centre_mm[axis]  # the torso's axes are LPS
        for name in centers
        if name in tissues() and structure(name).parent is None
    }
    if len(usual) < 2:
        return []
    here = np.array([centers[name][axis] for name in usual])
    there = np.array(list(usual.values()))
    if min(here.std(), there.std()) < SPREAD_MM:
        return []
    return list(usual) if float(np.corrcoef(here, there)[0, 1]) < OPPOSITE else []


def _wrong_side(centers: Mapping[str, NDArray[np.float64]], plane_mm: float) -> list[str]:
    """The structures that lie on the other side of the midline than they should."""
    wrong = []
    for name, center in centers.items():
        tissue = tissues().get(name)
        usual = -tissue.centre_mm[0] if tissue is not None else 0.0
        if structure(name).mirror is not None:
            usual = -SIDE_MM if name.startswith("left_") else SIDE_MM
        if abs(usual) >= SIDE_MM and (center[0] - plane_mm) * np.sign(usual) < -WRONG_SIDE_MM:
            wrong.append(name)
    return wrong


def _misfit(hu: NDArray[np.float32], masks: Mapping[str, NDArray[np.bool_]]) -> list[str]:
    """Structures whose HU are not theirs."""
    notes = []
    for name, mask in masks.items():
        inside = hu[mask]
        low = float((inside < FAT_HU).mean())
        if low > MOST_FAT.get(name, 1.0):
            notes.append(
                f"{low:.0%} of {name} is fat, lung or air by its HU (mean {inside.mean():.0f}, sd "
                f"{inside.std():.0f}): the mask does not lie on the organ"
            )
        if "lung" in name.split("_") and (air := float((inside < -300).mean())) < LEAST_LUNG:
            notes.append(f"{air:.0%} of {name} is air by its HU: the mask does not lie on the lung")
    return notes


def _body_exchanged(
    hu: NDArray[np.float32], plane: float | None, mm: NDArray[np.float64]
) -> list[str]:
    """What the image alone says of front and back, top and bottom."""
    body = body_outline(hu)
    notes = []
    if plane is not None and (depth := _depth_of_spine(hu, body, plane, mm)) < SPINE_IN_FRONT:
        notes.append(
            f"bone near the midline lies at {depth:.2f} of the way from front to back, where a "
            "spine lies at 0.6 to 0.8: front and back of the body are exchanged"
        )
    area = body.sum(axis=(0, 1))
    lung = body & (hu > LUNG_HU[0]) & (hu < LUNG_HU[1])
    share = lung.sum(axis=(0, 1)) / np.maximum(area, 1)
    end = max(1, round(END * hu.shape[2]))
    if (
        share[:end].min() > SOME_LUNG
        and share[-end:].max() < NO_LUNG
        and area[-end:].mean() > TORSO * area[:end].mean()
    ):
        notes.append("lungs lie at the lower end and none above: top and bottom are exchanged")
    return notes


def _depth_of_spine(
    hu: NDArray[np.float32], body: NDArray[np.bool_], plane: float, mm: NDArray[np.float64]
) -> float:
    """Median over slices of the mean depth of bone near the midline, 0 front to 1 back."""
    rows = np.asarray(body.any(axis=0))
    back, front = rows.argmax(axis=0), rows.shape[0] - 1 - rows[::-1].argmax(axis=0)
    near = np.abs(np.arange(len(hu)) - plane) * mm[0] <= SPINE_MM
    bone = (hu > BONE_HU) & body & near[:, None, None]
    count = bone.sum(axis=(0, 1))
    row = np.arange(hu.shape[1])[None, :, None]
    mean_row = (bone * row).sum(axis=(0, 1)) / np.maximum(count, 1)
    depth = (front - mean_row) / np.maximum(front - back, 1)
    return float(np.median(depth[count > 0])) if count.any() else 1.0


def _too_large(masks: Mapping[str, NDArray[np.bool_]], voxel_mm3: float) -> list[str]:
    """Structures that no body has as large as that."""
    notes = []
    for name, mask in masks.items():
        most = tissues()[name].vol_ml[1] if name in tissues() else 0.0
        ml = np.count_nonzero(mask) * voxel_mm3 / 1000
        if most and ml > TOO_LARGE * most:
            notes.append(
                f"{name} takes {ml:.0f} ml, where bodies have up to about {most:g}: the label may "
                "be on another organ"
            )
    return notes
