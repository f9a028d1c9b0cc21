"""Is an image a CT in HU? What `data check`, run, score and predict note by the values alone.

In HU air is -1000, fat about -100, soft tissue 0 to 100 (with contrast 200 and more) and dense bone
above 700 (Hounsfield 1973). An image whose offset was lost, that was scaled to 0 to 1 or 0 to 255,
or that is an MR has nothing below 0, or its body elsewhere. The limits are wide: a head alone, a
cropped field of view, padding and metal pass.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

BODY_HU = (-200.0, 300.0)
"""Fat and soft tissue, with and without contrast."""
AIR_HU = -500.0
"""Below it lie air, lung and padding."""
LEAST_AIR = 0.001
"""Share of voxels below `AIR_HU` that shows that the scale reaches to air."""
LEAST_NEGATIVE = 0.01
"""Share of voxels from -200 to -5 HU (fat, and noise of water) that a scan without any air has."""
LEAST_RANGE = 25.0
"""HU between the 0.5th and the 99.5th percentile of a scan without any air."""
LEAST_BODY = 0.3
"""Share of what is neither air nor padding that is fat or soft tissue."""
MOST_BONE = 0.2
"""Share of it from 700 to 1400 HU in an image without fat: there lies soft tissue with 1024 added.
Dense bone takes a tenth to a fifth of a head, whose scalp holds fat."""
LEAST_FAT = 0.01
"""Share of it from -200 to -30 HU by which fat is seen."""
MOST_DENSE = 0.5
"""Share of it from 700 to 1400 HU that no body has, with or without fat."""
MOST_METAL = 0.02
"""Share of it above 3500 HU."""
MOST_LOWEST = 0.02
"""Share of it that has the lowest value, 0, where a scale of 0 to 1 or to 255 cut air off."""
PADDING_HU = -1200.0
"""No air lies below."""
CORNER = 16
"""A corner is this part of each axis, and two voxels at least."""
CORNER_RANGE = 30.0
"""From the 5th to the 95th percentile, in HU, within a corner of nothing but background."""
WATER_NOISE = 5.0
"""HU by which noise of water goes below and above 0."""
CORNERS_DIFFER = 5.0
"""HU between the medians of corners of one background."""
MOST_ALIKE = (4, 2)
"""Corners of one background that a crop within the body does not have; the second number where
neighbors differ by less than `LEAST_NOISE`. In 600 random crops of two CTs at most two were."""
LEAST_NOISE = 5.0
"""Median difference in HU between neighbors; at least 12 in these crops."""
REVERSED_AIR = 0.25
"""Share of voxels from 900 to 1100 HU that no crop of bone has."""
OFFSETS = (1024, 1000)
"""What programs add to HU to store them without a sign."""
SAMPLED = 1 << 20
"""Voxels that are looked at, evenly spaced."""


def hounsfield_notes(image: NDArray[Any]) -> tuple[str, ...]:
    """What speaks against an image being a CT in HU; nothing where nothing does.

    Args:
        image: (D, H, W), finite; a head, a crop and a padded scan are CTs, too.

    Returns:
        One sentence at most, with the values that are odd and, where an offset would explain them,
        the `rescale` of a course file that takes it away.
    """
    values = image.ravel()[:: max(1, image.size // SAMPLED)].astype(np.float64)
    oddity = _oddity(values) or _background_above_air(image) or _reversed_sign(values)
    if oddity is None:
        return ()
    air = float(((values <= AIR_HU) & (values >= PADDING_HU)).mean())
    for offset in OFFSETS:
        if air < LEAST_AIR and _oddity(values - offset) is None:
            advice = f"rescale = {{intercept = -{offset}}} in its [[source]] takes it away"
            return (f"{oddity}; if it is a CT to which {offset} was added, {advice}",)
    return (oddity,)


def _oddity(values: NDArray[np.float64]) -> str | None:
    low, high = float(values.min()), float(values.max())
    said = f"values from {low:g} to {high:g}"
    if low == high:
        return f"no CT in HU: every voxel is {low:g}"
    inside = values[values > AIR_HU]
    if not inside.size:
        return f"no CT in HU: no voxel above {AIR_HU:g} HU ({said})"
    air = 1 - inside.size / values.size
    if air < LEAST_AIR:  # a crop within the body: what is commonest may be padding
        seen, count = np.unique(inside, return_counts=True)
        if count.max() > 0.1 * inside.size and seen.size > 1:
            inside = inside[inside != seen[count.argmax()]]
        negative = float(((inside >= BODY_HU[0]) & (inside <= -5)).mean())
        spread = float(np.subtract(*np.percentile(inside, [99.5, 0.5])))
        if negative < LEAST_NEGATIVE or spread < LEAST_RANGE:
            return f"no CT in HU: no air and no fat ({said})"
    elif inside.min() == 0 and high <= 255 and float((inside == 0).mean()) > MOST_LOWEST:
        return f"no CT in HU: a scale that starts at 0, and padding below it ({said})"
    bone = float(((inside >= 700) & (inside <= 1400)).mean())
    fat = float(((inside >= BODY_HU[0]) & (inside <= -30)).mean())
    if bone > MOST_DENSE or (bone > MOST_BONE and fat < LEAST_FAT):
        little = "" if bone > MOST_DENSE else "no fat, and "
        return f"no CT in HU: {little}{bone:.0%} of the body lies from 700 to 1400 HU ({said})"
    if (metal := float((inside > 3500).mean())) > MOST_METAL:
        return f"no CT in HU: {metal:.0%} of the body lies above 3500 HU ({said})"
    body = float(((inside >= BODY_HU[0]) & (inside <= BODY_HU[1])).mean())
    if body < LEAST_BODY:
        return f"no CT in HU: {body:.0%} of the body is fat or soft tissue ({said})"
    return None


def _reversed_sign(values: NDArray[np.float64]) -> str | None:
    """An image whose air lies at 1000, and which is a CT once its sign is turned."""
    reversed_air = float(((values >= 900) & (values <= 1100)).mean())
    low = float((values <= AIR_HU).mean())  # dense bone, once its sign is turned
    if low > MOST_BONE or reversed_air < REVERSED_AIR or _oddity(-values) is not None:
        return None
    return (
        f"no CT in HU: {reversed_air:.0%} of the voxels from 900 to 1100 HU (values from "
        f"{values.min():g} to {values.max():g}); if its sign was reversed, rescale = "
        "{slope = -1} in its [[source]] turns it back"
    )


def _background_above_air(image: NDArray[Any]) -> str | None:
    """The background of an image without air: an MR, or HU in another unit (divided by 10).

    A CT without air is a crop within the body: what lies in its corners is tissue, and differs.
    """
    if float((image <= AIR_HU).mean()) >= LEAST_AIR:
        return None
    ends = [max(2, n // CORNER) for n in image.shape]
    corners = [
        image[
            tuple(
                slice(0, n) if first else slice(-n, None) for n, first in zip(ends, at, strict=True)
            )
        ]
        for at in itertools.product((True, False), repeat=image.ndim)
    ]
    spread = np.array([np.subtract(*np.percentile(c, [95, 5])) for c in corners])
    plain = [c for c, s in zip(corners, spread, strict=True) if 0 < s < CORNER_RANGE]  # no padding
    if (
        np.percentile(image, 99) < BODY_HU[1]
    ):  # soft tissue like water, about 0 HU, is no background
        plain = [
            c
            for c in plain
            if not np.percentile(c, 5) < -WATER_NOISE < WATER_NOISE < np.percentile(c, 95)
        ]
    if not plain:
        return None
    medians = np.array([float(np.median(c)) for c in plain])
    middle = float(np.median(medians))
    alike = int((np.abs(medians - middle) <= CORNERS_DIFFER).sum())
    noise = float(np.median(np.abs(np.diff(image.astype(np.float32), axis=0))))
    if alike < MOST_ALIKE[noise < LEAST_NOISE]:
        return None
    return (
        f"no CT in HU: no air, and a background of {middle:.3g} in {alike} of {len(corners)} "
        f"corners (values from {float(image.min()):g} to {float(image.max()):g})"
    )
