"""NumPy arrays from untrusted files: no pickles, and no more memory than the file can hold.

numpy takes the memory a header asks for before it looks for the data; here
the claim is compared with the file first.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MAX_VOXELS = 1 << 30
"""Voxels of the largest volume that is read or made: 512 x 512 in 4096 slices."""
DEFLATE = 1032
"""Bytes one byte of a packed stream can unpack to (RFC 1951: 258 bytes for 2 bits)."""
MEMBERS = 1024
"""Arrays a file may hold."""
_HEADER = 1 << 16
"""Bytes of an array's header in numpy's format, at most."""


def memory_bytes() -> int:
    """Bytes of memory this machine has; where it does not say, more than any volume takes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system has them
        return 1 << 62


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file.

    Raises:
        OSError: it cannot be opened.
        ValueError: damaged, an array of objects, or another length than its header says.
    """
    with path.open("rb") as file:
        return _array(file, path.stat().st_size)


def mapped(path: Path) -> NDArray[Any]:
    """The array of a `.npy` file, left on disk; never an archive or a pickle of that name.

    Raises:
        OSError: it cannot be opened.
        ValueError: damaged, an array of objects, or shorter than its header says.
    """
    array: NDArray[Any] = npy.open_memmap(path, mode="r")
    return array


def read_npz(path: Path, largest: int) -> dict[str, NDArray[Any]]:
    """Every array of an `.npz` file, by name.

    Args:
        path: packed or not.
        largest: bytes that its largest array may take.

    Raises:
        OSError: it cannot be opened.
        ValueError: damaged, an array of objects, or a member that claims more than it can hold.
    """
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            if len(members) > MEMBERS:
                raise ValueError(f"{len(members)} arrays in one file")
            if no_zip := [m.filename for m in members if m.flag_bits & 1]:
                raise ValueError(f"{no_zip[0]} is encrypted")
            if wide := [m for m in members if m.file_size > largest + _HEADER]:
                raise ValueError(f"{wide[0].filename} claims {wide[0].file_size} bytes")
            # overlapping members would each pass alone
            whole = sum(m.file_size for m in members)
            if whole > min(DEFLATE * path.stat().st_size, memory_bytes()):
                raise ValueError(f"it claims to unpack to {whole} bytes")
            arrays = {}
            for member in members:
                with file.open(member) as stream:
                    arrays[member.filename.removesuffix(".npy")] = _array(stream, member.file_size)
            return arrays
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
        raise ValueError(str(err) or type(err).__name__) from err


def stored_only(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than it holds; torch writes its own unpacked.

    Raises:
        OSError: it cannot be opened.
        ValueError: it would.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            whole = sum(m.file_size for m in file.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as err:
        raise ValueError(str(err)) from err
    if whole > path.stat().st_size:
        raise ValueError(f"it unpacks to {whole} bytes, more than it holds")


def _array(stream: IO[bytes], size: int) -> NDArray[Any]:
    """The array of a stream of `size` bytes in numpy's format, version 1 or 2."""
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"numpy's format {version}")
    shape, by_column, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("an array of objects, which runs code when it is read")
    need = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or need != size - stream.tell():
        raise ValueError(f"{size - stream.tell()} bytes for the shape {shape} of {dtype}")
    raw = bytearray(stream.read(need))
    if len(raw) != need:
        raise ValueError(f"{len(raw)} of {need} bytes")
    array: NDArray[Any] = np.frombuffer(raw, dtype=dtype) if need else np.empty(0, dtype)
    return array.reshape(shape, order="F" if by_column else "C")
