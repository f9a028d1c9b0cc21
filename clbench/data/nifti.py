"""NIfTI files, read with suspicion: a header's claims are checked before memory is taken for them.

Room: row 2. A file must hold what its header says, neither less nor more, and carry numbers;
whatever a parser makes of a hostile file ends as a `DataError` that names it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from clbench.archive import DEFLATE, MAX_VOXELS, memory_bytes
from clbench.errors import DataError

_EXTENSIONS = 1 << 24
"""Bytes a header's extensions may take."""
_TAIL = 4096
"""Bytes that may follow the voxels: some writers fill a block."""
_CHUNK = 1 << 22


def damaged(path: Path, err: BaseException) -> DataError:
    """The error for a file that no reader can make sense of."""
    text = str(err).splitlines()
    return DataError(
        "the file is damaged or is not NIfTI",
        where=path,
        expected="a whole .nii or .nii.gz file",
        got=text[0] if text else type(err).__name__,
        next_step="download or convert it again, or leave the case out of the split "
        "(`without` of a drawn one)",
    )


def load(path: Path) -> Any:
    """The nibabel image of a file whose header claims no more than the file can hold; no voxels.

    Raises:
        DataError: absent, damaged, no numbers, or claiming an absurd size.
    """
    if not path.is_file():
        raise DataError(
            "the file does not exist", where=path, next_step="check the folder given with --data"
        )
    try:
        header(path)
        file = nib.load(path)
        if not isinstance(file, nib.Nifti1Image):  # nibabel reads a dozen formats
            raise TypeError(f"it is {type(file).__name__}")
        claimed = _claimed(file, path)
        size = path.stat().st_size
    except DataError:
        raise
    except Exception as err:  # a parser may raise anything on a hostile file
        raise damaged(path, err) from err
    packed = path.suffix == ".gz"
    holds = size * DEFLATE if packed else size
    if claimed > holds:
        raise DataError(
            "the header claims more voxels than the file can hold",
            where=path,
            expected=f"at most {holds} bytes of voxels in a file of {size} bytes",
            got=f"shape {tuple(file.shape)}, {claimed} bytes",
            next_step="the file is cut short (damaged) or its header is wrong; download it again",
        )
    if not packed and size > claimed + _TAIL:
        raise _longer(path, file, claimed)
    return file


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _longer(path: Path, file: Any, claimed: int) -> DataError:
    return DataError(
        "the file holds more than its header says",
        where=path,
        expected=f"{claimed} bytes for the shape {tuple(file.shape)} of {file.get_data_dtype()}",
        got="more",
        next_step="its header is wrong, or something was appended; convert it again",
    )


def header(path: Path) -> Any:
    """The header as it stands in the file; nibabel mends what it reads, zero voxel sizes say.

    Raises:
        DataError: extensions larger than any, which are read with the header; a slope no number.
    """
    with _opened(path) as file:
        head = file.read(540)
    sizes = {struct.unpack_from(f"{order}i", head)[0] for order in "<>"}
    if not sizes & {348, 540}:
        raise ValueError("it does not start with a NIfTI header")
    second = 540 in sizes  # NIfTI-2
    found: Any = (nib.Nifti2Header if second else nib.Nifti1Header)(
        head if second else head[:348], check=False
    )
    offset = float(found["vox_offset"])
    if not 0 <= offset <= _EXTENSIONS:
        raise DataError(
            "the header claims an absurd size",
            where=path,
            expected=f"voxels that start within the first {_EXTENSIONS} bytes",
            got=f"byte {offset:g}",
            next_step="download or convert the file again",
        )
    if np.isinf(slope := float(found["scl_slope"])):  # nibabel would read it as none
        raise DataError(
            "the header's scl_slope is no number",
            where=path,
            expected="a finite number",
            got=slope,
            next_step="convert the file again",
        )
    return found


def _claimed(file: Any, path: Path) -> int:
    """Bytes the header claims, from the file's start to the last voxel."""
    shape = [int(n) for n in file.shape]
    count = math.prod(shape)
    if min(shape, default=0) < 1 or count > MAX_VOXELS:
        raise DataError(
            "the header claims an absurd size",
            where=path,
            expected=f"at least one voxel and at most {MAX_VOXELS}",
            got=f"shape {tuple(shape)}",
            next_step="download or convert the file again, or crop the volume",
        )
    kind = np.dtype(file.get_data_dtype())
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise DataError(
            "the voxels are not plain numbers",
            where=path,
            expected="whole or real numbers of at most 64 bits",
            got=str(kind),
            next_step="convert the file to int16 or float32",
        )
    need = count * int(kind.itemsize)
    if need > (memory := memory_bytes()):
        raise DataError(
            "the volume does not fit this machine's memory",
            where=path,
            expected=f"at most {memory} bytes",
            got=f"{need} bytes, shape {tuple(shape)} of {kind}",
            next_step="crop the volume, or use a larger machine",
        )
    return int(file.dataobj.offset) + need


def content(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked, chunk by chunk; stops where it holds more than its header says.

    Raises:
        DataError: see `load`; or damaged, shorter than its header says, or longer (a bomb).
    """
    file = load(path)
    claimed, seen = _claimed(file, path), 0
    try:
        with _opened(path) as stream:
            while chunk := stream.read(_CHUNK):
                seen += len(chunk)
                if seen > claimed + _TAIL:
                    raise _longer(path, file, claimed)
                yield chunk
    except (OSError, EOFError, zlib.error) as err:
        raise damaged(path, err) from err
    if seen < claimed:
        raise damaged(path, EOFError(f"{seen} of {claimed} bytes"))


def voxels(path: Path) -> NDArray[Any]:
    """All voxels, the header's slope and intercept applied; the whole file is read and checked.

    A slope of 0 or NaN means none, as the standard has it.

    Raises:
        DataError: see `load`; shorter or longer than its header says, a checksum that does not fit,
            a slope or intercept that is no number, or one that leaves nothing of the voxels.
    """
    file = load(path)
    proxy = file.dataobj
    start, kind = int(proxy.offset), np.dtype(proxy.dtype)
    raw, got = bytearray(math.prod(file.shape) * kind.itemsize), 0
    try:
        with _opened(path) as stream:
            stream.read(start)
            while got < len(raw) and (part := stream.read(min(_CHUNK, len(raw) - got))):
                raw[got : got + len(part)] = part
                got += len(part)
            tail = stream.read(_TAIL + 1)  # the end of a gzip stream, where its checksum stands
    except (OSError, EOFError, zlib.error) as err:
        raise damaged(path, err) from err
    if got < len(raw):
        raise damaged(path, EOFError(f"{got} of {len(raw)} bytes of voxels"))
    if len(tail) > _TAIL:
        raise _longer(path, file, start + len(raw))
    array: NDArray[Any] = np.frombuffer(raw, dtype=kind).reshape(file.shape, order="F")
    array = array.astype(kind.newbyteorder("="), copy=False)
    slope, inter = float(proxy.slope), float(proxy.inter)
    if (slope, inter) == (1.0, 0.0):
        return array
    with np.errstate(all="ignore"):  # an overflow shows as infinity, and is refused as that
        scaled: NDArray[Any] = apply_read_scaling(array, slope, inter)
        left = float(scaled.max()) - float(scaled.min())
    if left < 1 and array.min() != array.max():
        raise DataError(
            "the header's scl_slope leaves nothing of the voxels",
            where=path,
            expected="HU or label values at least 1 apart",
            got=f"slope {slope:g}, values {left:g} apart",
            next_step="convert the file again",
        )
    return scaled
