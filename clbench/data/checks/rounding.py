"""Images of fractions: volumes are kept as whole numbers, of which a few must be left to see.

Of a CT in HU rounding takes half a unit of hundreds. Of an image scaled to 0 to 1, or of z-scores,
it leaves a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import DataError
from clbench.spec.benchmark import Source

LEAST_LEVELS = 30.0
"""Units of the window that an image of fractions must fill; the network would see fewer gray
levels. The narrowest windows in use on CT have 30 to 40 HU."""
WHOLE = 0.01
"""How far values may lie off whole numbers that were stored as real ones."""
SLOPE = 1000
"""What makes enough whole numbers of fractions."""
Range = tuple[float, float] | None
"""Smallest and largest value of an image of fractions; None: it holds whole numbers."""


def range_of_fractions(image: NDArray[Any]) -> Range:
    """What `rounding_problems` asks of an image, (D, H, W) and finite."""
    if image.dtype.kind in "iu" or all(np.abs(p - np.round(p)).max() <= WHOLE for p in image):
        return None
    return float(image.min()), float(image.max())


def rounding_problems(
    cases: Mapping[str, Sequence[str]],
    reads: Callable[[str], Source],
    range_of: Callable[[str, str], Range],
    window_hu: tuple[float, float],
    odd: Collection[tuple[str, str]],
) -> Iterator[DataError]:
    """The first image of each source of which whole numbers leave a few gray levels.

    Args:
        cases: source → cases.
        reads: name of a source → the source, as the course reads it.
        range_of: (source, case) → see `range_of_fractions`.
        window_hu: what the network sees of the values.
        odd: (source, case) of images that look like no CT in HU; the others are looked at only
            where no image of fractions could fill the window.
    """
    low, high = window_hu
    narrow = high - low < LEAST_LEVELS
    for name, of_source in cases.items():
        for case in of_source:
            found = range_of(name, case) if narrow or (name, case) in odd else None
            if found is not None and min(high, found[1]) - max(low, found[0]) < LEAST_LEVELS:
                yield _rounded(reads(name), case, found, window_hu, window_hu if narrow else found)
                break


def _rounded(
    source: Source,
    case: str,
    found: tuple[float, float],
    window_hu: tuple[float, float],
    wanted: tuple[float, float],
) -> DataError:
    """The error for an image of fractions.

    Args:
        source: of the image.
        case: its id.
        found: its smallest and largest value.
        window_hu: what the network sees of them.
        wanted: what it should see, in the same units.
    """
    window = f"{math.floor(SLOPE * wanted[0])},{math.ceil(SLOPE * wanted[1])}"
    now = source.rescale
    rescale = f"slope = {SLOPE * (now.slope if now else 1):g}"
    if now is not None and now.intercept:
        rescale += f", intercept = {SLOPE * now.intercept:g}"
    return DataError(
        "an image of fractions would be rounded to a few whole numbers",
        where=f"source {source.name!r}, case {case}",
        expected=f"whole numbers, or values that fill {LEAST_LEVELS:g} units of the window",
        got=f"{found[0]:g} to {found[1]:g}, in a window from {window_hu[0]:g} to {window_hu[1]:g}",
        next_step=f"say rescale = {{{rescale}}} in the [[source]] {source.name!r} of the "
        f"course file, and the window in the new units: --set data.window_hu={window} "
        "--set data.expect_hu=false",
    )
