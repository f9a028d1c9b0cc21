"""Images of fractions: volumes are kept as whole numbers, of which a few must be left to see.

Of a CT in HU rounding takes half a unit of hundreds. Of an image scaled to 0 to 1, or of z-scores,
it leaves a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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


def is_narrow(window_hu: tuple[float, float]) -> bool:
    """Whether no image of fractions can fill a window."""
    return window_hu[1] - window_hu[0] < LEAST_LEVELS


def rounding_problems(
    source: Source,
    ranges: Iterable[tuple[str, Callable[[], Range]]],
    window_hu: tuple[float, float],
) -> Iterator[DataError]:
    """The first image of a source of which whole numbers leave a few gray levels.

    Args:
        source: the data set.
        ranges: case and what gives its range, of those to look at.
        window_hu: what the network sees of the values.
    """
    low, high = window_hu
    for case, values in ranges:
        found = values()
        if found is None or min(high, found[1]) - max(low, found[0]) >= LEAST_LEVELS:
            continue
        ends = window_hu if is_narrow(window_hu) else found
        window = f"{math.floor(SLOPE * ends[0])},{math.ceil(SLOPE * ends[1])}"
        now = source.rescale
        rescale = f"slope = {SLOPE * (now.slope if now else 1):g}"
        if now is not None and now.intercept:
            rescale += f", intercept = {SLOPE * now.intercept:g}"
        yield DataError(
            "an image of fractions would be rounded to a few whole numbers",
            where=f"source {source.name!r}, case {case}",
            expected=f"whole numbers, or values that fill {LEAST_LEVELS:g} units of the window",
            got=f"{found[0]:g} to {found[1]:g}, in a window from {low:g} to {high:g}",
            next_step=f"say rescale = {{{rescale}}} in the [[source]] {source.name!r} of the "
            f"course file, and the window in the new units: --set data.window_hu={window} "
            "--set data.expect_hu=false",
        )
        return
