"""Left and right of a body: its midline in a CT, and the pieces of a paired organ about it.

The midline needs no landmarks and no centered patient: where the field of view cuts the body, the
rows that it leaves whole say where the middle lies, and where it leaves none, the symmetry of what
is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TISSUE_HU = -300.0
"""Above: body, table and clothes; below: air and lung."""
OUTSIDE_HU = -850.0
"""Mean of what lies beside a body; a lung that the field of view cuts lies above."""
PADDING_HU = -1024.0
"""Padding beyond a scanner's circle counts as air."""
GRID_MM = 3.0
"""The outline is looked at in steps of about this size."""
MIN_ROWS = 0.1
"""Share of the body's rows that must lie within the field of view, for the outline to count."""
SYMMETRY_HU = (-200.0, 300.0)
"""Where the two halves of a body are compared: fat to bone."""
MIN_CORRELATION = 0.7
"""Of the two halves about the plane of symmetry, where no row is whole."""
MIN_OVERLAP = 0.35
"""Share of the field of view that each half must have."""

Mask = NDArray[np.bool_]
LARGE = 0.2
"""Share of a mask's voxels that makes a piece an organ of its own, or a good part of one."""
SMALL = 0.01
"""Share of a mask's voxels below which a piece across the midline is a crumb."""
NO_ORGAN = 0.05
"""Share of a mask's voxels below which what lies on a side is no organ, however many crumbs."""
CROSSING = 0.1
"""Share of a piece that may lie across the midline: the midline is known to a few mm only."""
CROSSING_FAR = 0.02
"""Share of a piece that may lie more than `FAR_MM` across it."""
FAR_MM = 10.0
"""Beyond what the midline is uncertain by."""


def midline(image: NDArray[Any], spacing_mm: Sequence[float] | NDArray[Any]) -> float | None:
    """The index along axis 0 of the plane between left and right; None where none is plain.

    Per row of an axial slice the body reaches from its left skin to its right one; the plane is the
    median of the middles, weighted by length, of the rows that have air on both sides.

    Args:
        image: (D, H, W) HU in RAS.
        spacing_mm: voxel size of the three axes.
    """
    steps = [max(1, round(GRID_MM / mm)) for mm in spacing_mm]
    coarse = np.clip(image[:: steps[0], :: steps[1], :: steps[2]], PADDING_HU, None)
    hu = coarse.astype(np.float32)
    middle = _middle_of_rows(hu)
    if middle is None:
        middle = _plane_of_symmetry(hu)
    return None if middle is None else middle * steps[0]


def body_outline(hu: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(D, H, W) per axial slice the largest piece of tissue and what it encloses; no table."""
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[:, :, [0, 2]] = False
    tissue = ndimage.binary_fill_holes(hu > TISSUE_HU, in_plane)  # lungs belong to the body
    opened = ndimage.binary_opening(tissue, in_plane, iterations=2)
    if not opened.any():
        opened = tissue
    pieces, count = ndimage.label(opened, in_plane)
    vox = np.bincount(pieces.ravel(), minlength=count + 1)
    vox[0] = 0
    largest = vox[pieces].max(axis=(0, 1))
    body: NDArray[np.bool_] = opened & (vox[pieces] == largest)
    return body


def _middle_of_rows(hu: NDArray[np.float32]) -> float | None:
    body = body_outline(hu)
    length = len(body)
    has_tissue = body.any(axis=0)
    first, last = body.argmax(axis=0), length - 1 - body[::-1].argmax(axis=0)
    total = np.zeros((length + 1, *has_tissue.shape), np.float64)  # of the voxels before an index
    np.cumsum(hu, axis=0, out=total[1:])
    at_first = np.take_along_axis(total, first[None], axis=0)[0]
    at_last = np.take_along_axis(total, last[None] + 1, axis=0)[0]
    before = at_first / np.maximum(first, 1)
    behind = (total[-1] - at_last) / np.maximum(length - 1 - last, 1)
    whole = has_tissue & (first > 0) & (last < length - 1)
    whole &= (before < OUTSIDE_HU) & (behind < OUTSIDE_HU)
    if not whole.any() or whole.sum() < MIN_ROWS * has_tissue.sum():
        return None
    middles, weights = (first + last)[whole] / 2, (last - first + 1)[whole]
    order = np.argsort(middles)
    cumulative = np.cumsum(weights[order])
    half = [np.searchsorted(cumulative, cumulative[-1] / 2, side) for side in ("left", "right")]
    return float(middles[order][half].mean())


def _plane_of_symmetry(hu: NDArray[np.float32]) -> float | None:
    """Where the two halves of a field of view that lies inside the body are most alike."""
    soft = ndimage.gaussian_filter(np.clip(hu, *SYMMETRY_HU), 1)
    length = len(soft)
    least = max(2, int(np.ceil(MIN_OVERLAP * length)))
    planes = np.arange(2 * least - 1, 2 * (length - least)) / 2
    if len(planes) < 3:
        return None
    alike = np.zeros(len(planes))
    for i, plane in enumerate(planes):
        low, high = int(np.ceil(plane)), int(np.floor(plane)) + 1
        width = min(low, length - high)
        left, right = soft[low - width : low][::-1], soft[high : high + width]
        left, right = left - left.mean(), right - right.mean()
        norm = float(np.sqrt((left * left).sum() * (right * right).sum()))
        alike[i] = float((left * right).sum()) / norm if norm else 0.0
    best = int(alike.argmax())
    at_end = best in (0, len(planes) - 1)  # it still grows where the search ends
    return None if at_end or alike[best] < MIN_CORRELATION else float(planes[best])


def split_left_right(mask: Mask, plane: float) -> tuple[Mask, Mask]:
    """(left, right) of a paired organ: each 26-connected piece on the side that holds most of it.

    Args:
        mask: (D, H, W), RAS.
        plane: index along axis 0 of the midline.

    Returns:
        Two masks that together are `mask`.

    Source: the authors' label conversion gives the two largest pieces to the two sides. Differs:
        here a piece's place decides, and no piece is lost.
    """
    pieces, _, right_share = _pieces(mask, plane)
    is_right = np.append(False, right_share > 0.5)
    right: Mask = is_right[pieces]
    return mask & ~right, right


def unclear_sides(mask: Mask, plane: float | None, spacing_mm: float) -> str | None:
    """Why the pieces of a paired organ do not say which is left and which right; None: they do.

    Args:
        mask: (D, H, W), RAS.
        plane: index along axis 0 of the midline; None where the image does not show it.
        spacing_mm: voxel size along axis 0.
    """
    if plane is None:
        return "an image that does not show where the body's midline lies"
    _, vox, right_share = _pieces(mask, plane)
    share = vox / max(1, vox.sum())
    across = np.minimum(right_share, 1 - right_share)
    far = FAR_MM / spacing_mm
    far_right, far_left = (_pieces(mask, plane + way)[2] for way in (far, -far))
    far_across = np.minimum(far_right, 1 - far_left)
    crossing = (share >= SMALL) & ((across > CROSSING) | (far_across > CROSSING_FAR))
    if crossing.any():
        worst = int((across * vox * crossing).argmax())
        return (
            f"a piece of {vox[worst]} voxels across the midline (index {plane:.1f} from the left), "
            f"{across[worst]:.0%} of it on the other side, {far_across[worst]:.0%} further than "
            f"{FAR_MM:g} mm"
        )
    for side, here in (("left", right_share <= 0.5), ("right", right_share > 0.5)):
        if (share[here] >= LARGE).sum() >= 2 and share[~here].sum() < NO_ORGAN:
            large = ", ".join(map(str, sorted(vox[here & (share >= LARGE)], reverse=True)))
            return f"pieces of {large} voxels, all on the patient's {side}"
    return None


def _pieces(
    mask: Mask, plane: float
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float64]]:
    """The 26-connected pieces, numbered from 1; their voxels; the share of each on the right."""
    pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
    vox = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    side = (np.sign(np.arange(len(mask)) - plane) + 1) / 2  # 0 left, 0.5 on the plane, 1 right
    at, *_ = np.nonzero(mask)
    right = np.bincount(pieces[mask], weights=side[at], minlength=count + 1)[1:]
    return pieces, vox, right / np.maximum(vox, 1)
