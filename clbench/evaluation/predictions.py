"""Predictions on disk: a file per test case, packed bits per structure, equal bytes if equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.volume import Volume
from clbench.errors import StoreError, first_line
from clbench.store import files
from clbench.store.arrays import MAX_VOXELS, read_npz
from clbench.types import Bits, bits_dtype, mask_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A prediction read from disk."""

    bits: Bits
    """(D, H, W), bit k = structures[k]."""
    structures: tuple[str, ...]
    """Names of the bits."""
    affine: NDArray[np.float64]
    """(4, 4) voxel → RAS mm."""
    source: str
    """Data set of the case; empty where not recorded."""
    case: str
    """Case id; empty where not recorded."""


def write_prediction(
    path: Path,
    bits: Bits,
    structures: Sequence[str],
    affine: NDArray[Any],
    *,
    source: str = "",
    case: str = "",
) -> None:
    """Write one case's masks as packed bits, one array per structure, in a compressed .npz.

    Equal predictions give equal bytes. The file appears whole or not at all.

    Args:
        path: target, ending in .npz.
        bits: (D, H, W), bit k = structures[k].
        structures: names of the bits.
        affine: (4, 4) voxel → RAS mm of this grid.
        source: data set of the case.
        case: case id.

    Raises:
        StoreError: the folder cannot be written or the disk is full.
    """
    arrays: dict[str, NDArray[Any]] = {
        "shape": np.array(bits.shape, dtype=np.int64),
        "affine": np.asarray(affine, dtype=np.float64),
        "structures": np.array(list(structures), dtype=np.str_),
        "source": np.array(source, dtype=np.str_),
        "case": np.array(case, dtype=np.str_),
    }
    for k, name in enumerate(structures):
        arrays[f"mask_{name}"] = np.packbits(mask_of(bits, k))
    files.atomic_write(
        path,
        lambda file: np.savez_compressed(file, allow_pickle=False, **arrays),
        what="a prediction",
        next_step="free some disk space, choose another --out, or --keep-predictions none",
    )


def read_prediction(path: Path) -> Prediction:
    """Read what `write_prediction` wrote.

    Raises:
        StoreError: missing or damaged.
    """
    try:
        file = read_npz(path, largest=MAX_VOXELS // 8)
        d, h, w = (int(n) for n in file["shape"])
        structures = tuple(str(s) for s in file["structures"])
        masks = [file[f"mask_{name}"] for name in structures]
        # before memory is taken for the shape: every mask holds its voxels
        if not masks or any(m.shape != (-(-d * h * w // 8),) or m.dtype != np.uint8 for m in masks):
            raise ValueError(f"masks that do not hold {d} x {h} x {w} voxels")
        dtype = bits_dtype(len(structures))
        bits = np.zeros(d * h * w, dtype=dtype)
        for k, mask in enumerate(masks):
            bits |= np.unpackbits(mask, count=d * h * w).astype(dtype) << dtype.type(k)
        return Prediction(
            bits=bits.reshape(d, h, w),
            structures=structures,
            affine=file["affine"],
            source=str(file["source"]),
            case=str(file["case"]),
        )
    except FileNotFoundError:
        raise StoreError(
            "a prediction is missing",
            where=path,
            next_step="examine the run again with --fresh and --keep-predictions test",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise StoreError(
            "a prediction cannot be read",
            where=path,
            expected="a file written by clbench",
            got=first_line(err),
            next_step="delete it and examine the run again with --fresh",
        ) from err


def refuse_other_grid(path: Path, prediction: Prediction, volume: Volume) -> None:
    """A stored prediction must be of its case, where it says of which, and lie on its grid.

    Args:
        path: where it is stored.
        prediction: it.
        volume: the case.

    Raises:
        StoreError: another case, another shape, or another place.
    """
    same_shape = prediction.bits.shape == volume.bits.shape
    own, said = (volume.source, volume.case), (prediction.source, prediction.case)
    if said not in (own, ("", "")):
        raise StoreError(
            "a stored prediction is not of this case",
            where=path,
            expected="/".join(own),
            got="/".join(said),
            next_step="put the right file back, or run again with --fresh",
        )
    if not same_shape or not np.allclose(prediction.affine, volume.affine, atol=1e-6):
        raise StoreError(
            "a stored prediction is not of this case",
            where=path,
            expected=f"shape {volume.bits.shape}, the grid of {volume.source}/{volume.case}",
            got=f"shape {prediction.bits.shape}" + (", in another place" if same_shape else ""),
            next_step="put the right file back, or run again with --fresh",
        )


def prediction_of(path: Path, volume: Volume, structures: Sequence[str]) -> Prediction:
    """Read the stored prediction of one case.

    Args:
        path: where it is stored.
        volume: the case.
        structures: what the model knew then.

    Raises:
        StoreError: missing, damaged, or of another case, step or grid.
    """
    pred = read_prediction(path)
    there = (pred.source, pred.case, pred.structures, pred.bits.shape)
    wanted = (volume.source, volume.case, tuple(structures), volume.bits.shape)
    near = np.allclose(pred.affine, volume.affine, atol=1e-6)
    if there != wanted or not near:
        said = "{}/{}, {} structures, shape {}"
        raise StoreError(
            "a stored prediction is not of this case",
            where=path,
            expected=said.format(*wanted[:2], len(wanted[2]), wanted[3]),
            got=said.format(*there[:2], len(there[2]), there[3])
            + ("" if near else ", in another place"),
            next_step="put the right file back, or run again with --fresh",
        )
    return pred
