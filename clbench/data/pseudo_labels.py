"""Pseudo labels on disk: predictions of the old model on training cases, until the step ends.

Hard labels take one bit per structure and voxel, soft ones one byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.labels import PSEUDO_SCALE, UNKNOWN
from clbench.data.volume import Index
from clbench.errors import StoreError
from clbench.store import files
from clbench.store.arrays import mapped
from clbench.types import bits_dtype, mask_of


def write_pseudo(path: Path, names: Sequence[str], array: NDArray[np.uint8]) -> None:
    """Write the map of one case; the folder `path` appears whole or not at all.

    Args:
        path: target folder.
        names: K structures.
        array: (K, D, H, W) uint8, round(254 p); only 0 and 254 are stored as bits.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    hard = bool(np.isin(array, (0, PSEUDO_SCALE)).all())

    def fill(folder: Path) -> None:
        if hard:
            kind = bits_dtype(len(names))
            bits = np.zeros(array.shape[1:], dtype=kind)
            for k in range(len(names)):
                bits |= (array[k] == PSEUDO_SCALE).astype(kind) << kind.type(k)
            np.save(folder / "map.npy", bits)
        else:
            np.save(folder / "map.npy", array)
        (folder / "meta.json").write_text(json.dumps({"names": list(names), "hard": hard}))

    files.atomic_folder(
        path,
        fill,
        what="a pseudo label",
        next_step="free some disk space and run the same command again",
    )


def digest(path: Path) -> str:
    """SHA-256 of what `write_pseudo` wrote.

    Raises:
        StoreError: it is not there.
    """
    both = hashlib.sha256()
    for name in ("meta.json", "map.npy"):
        both.update(bytes.fromhex(files.sha256(path / name)))
    return both.hexdigest()


class PseudoMap:
    """The pseudo labels of one case, memory-mapped.

    Args:
        names: K structures.
        hard: whether `map` holds bit patterns.
        array: (D, H, W) bit patterns, or (K, D, H, W) uint8.
    """

    def __init__(self, names: Sequence[str], hard: bool, array: NDArray[Any]) -> None:
        self.names, self.hard, self.array = tuple(names), hard, array

    @classmethod
    def open(cls, path: Path) -> PseudoMap:
        """Open what `write_pseudo` wrote.

        Raises:
            StoreError: missing or damaged.
        """
        try:
            meta = json.loads((path / "meta.json").read_text())
            array = mapped(path / "map.npy")
            names, hard = [str(n) for n in meta["names"]], bool(meta["hard"])
            if array.dtype != (bits_dtype(len(names)) if hard else np.uint8) or (
                array.ndim != 3 if hard else array.ndim != 4 or len(array) != len(names)
            ):
                raise ValueError(f"{array.dtype} {array.shape} for {len(names)} structures")
            return cls(names, hard, array)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as err:
            raise StoreError(
                "a pseudo label cannot be read",
                where=path,
                got=str(err),
                next_step="delete it and run the same command again; it is made anew",
            ) from err

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(self.array.nbytes)

    def read(self, structures: Sequence[str], index: Index) -> NDArray[np.uint8]:
        """(K, d, h, w) uint8: round(254 p), 255 for structures without pseudo label."""
        part = self.array[index] if self.hard else self.array[(slice(None), *index)]
        shape = part.shape if self.hard else part.shape[1:]
        out = np.full((len(structures), *shape), UNKNOWN, dtype=np.uint8)
        for k, name in enumerate(structures):
            if name not in self.names:
                continue
            i = self.names.index(name)
            if self.hard:
                out[k] = np.where(mask_of(part, i), PSEUDO_SCALE, 0)
            else:
                out[k] = part[i]
        return out
