"""Array types: floats, and bit patterns that hold every structure of a voxel in one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from clbench.errors import SettingError

Floats: TypeAlias = NDArray[np.float64]
"""Double precision numbers."""
Bits: TypeAlias = NDArray[np.unsignedinteger[Any]]
"""Bit patterns: bit k set = the voxel belongs to structure k; of the type `bits_dtype` says."""
Rows: TypeAlias = Callable[[int, int], Bits]
"""Rows of a volume, along its first axis from the first index to before the second."""

T = TypeVar("T")


def triple(values: Iterable[T]) -> tuple[T, T, T]:
    """Return three values, one an axis, as a tuple whose length the type checker knows."""
    x, y, z = values
    return x, y, z


def mask_of(bits: NDArray[Any], place: int) -> NDArray[np.bool_]:
    """Voxels of the structure at a place of bit patterns."""
    mask: NDArray[np.bool_] = (bits >> bits.dtype.type(place) & bits.dtype.type(1)).astype(bool)
    return mask


def bits_dtype(count: int) -> np.dtype[Any]:
    """The smallest unsigned type with one bit per structure.

    Raises:
        SettingError: more than 64 structures.
    """
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        if count <= 8 * np.dtype(dtype).itemsize:
            return np.dtype(dtype)
    raise SettingError(
        "a bit pattern holds at most 64 structures",
        where="structures of one source or model",
        expected="64 or fewer",
        got=count,
        next_step="name fewer structures in the course",
    )
