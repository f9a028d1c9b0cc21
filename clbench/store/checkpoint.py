"""Checkpoints: one atomic file of tensors and primitives, nothing that runs code when read.

Written under a temporary name, flushed, renamed; read with `weights_only=True`. A
checksum over all it holds lies inside, for torch does not notice an altered bit.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from clbench.errors import StoreError, first_line
from clbench.store import files
from clbench.store.arrays import stored_only

CHECKPOINT_SCHEMA = 1
"""Raised when the content of a checkpoint changes."""


def _check(value: Any, where: str) -> None:
    """Refuse anything but tensors, primitives, and lists, tuples and dicts of them."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"{where}: key {key!r} is not text or a whole number")
            _check(item, f"{where}.{key}")
        return
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check(item, f"{where}[{i}]")
        return
    raise TypeError(f"{where}: {type(value).__name__} is neither a tensor nor a primitive")


def digest(model: nn.Module) -> str:
    """A short name of a model's exact weights: equal for equal bits, wherever they lie."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _sum(value: Any, sha: Any) -> None:
    """Take a value into a checksum: structure, types and bits."""
    if isinstance(value, Tensor):
        sha.update(f"{tuple(value.shape)} {value.dtype}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            sha.update(repr(key).encode())
            _sum(item, sha)
    elif isinstance(value, list | tuple):
        sha.update(f"list {len(value)}".encode())
        for item in value:
            _sum(item, sha)
    else:
        sha.update(repr(value).encode())


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 over all that a checkpoint holds: keys, types, shapes and bits."""
    sha = hashlib.sha256()
    _sum({k: v for k, v in content.items() if k != "sha256"}, sha)
    return sha.hexdigest()


def state_digest(content: Mapping[str, Any]) -> str:
    """A short name of what a checkpoint holds of a model and its memory, whatever course it is of.

    Args:
        content: with `model` and `memory`.
    """
    return checksum({name: content[name] for name in ("model", "memory")})[:16]


def save(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write `content` so that `path` holds either the old or the new file, never a part of one.

    Args:
        path: target.
        content: tensors, primitives, and dicts, lists and tuples of them.
        previous: where the old file goes when the new one is whole; None: it goes.

    Raises:
        TypeError: content holds something that is neither tensor nor primitive (the caller's bug).
        StoreError: the disk is full or the folder cannot be written.
    """
    _check(content, "checkpoint")
    whole = {"schema": CHECKPOINT_SCHEMA, **content}
    whole["sha256"] = checksum(whole)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(whole, file)
        except RuntimeError as err:  # how torch reports a full disk
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{first_line(err)}; {free / 1e6:.1f} MB free") from err

    files.atomic_write(
        path,
        write,
        what="a checkpoint",
        next_step="free some disk space or choose another --out; the earlier state is intact",
        previous=previous,
    )


def unpack(path: Path) -> Any:
    """What `torch.save` wrote, as tensors and primitives on the CPU; nothing is run.

    Raises:
        OSError: it cannot be opened.
        pickle.UnpicklingError: it holds more than tensors and primitives, or is damaged.
        ValueError: damaged in another way, or an archive that unpacks to more than it holds.
    """
    stored_only(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError):
        raise
    except Exception as err:  # a parser may raise anything on a hostile file
        raise ValueError(str(err) or type(err).__name__) from err


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        StoreError: missing, damaged, altered, of another schema, or holding objects other than
            tensors and primitives.
    """
    wrong = partial(StoreError, where=path)
    anew = "delete the file and repeat the run's command, which teaches the step anew (with "
    anew += "--fresh, if it says that the run is finished)"
    try:
        content: dict[str, Any] = unpack(path)
    except FileNotFoundError:
        raise wrong("a checkpoint is missing") from None
    except pickle.UnpicklingError as err:
        raise wrong(
            "a checkpoint holds more than tensors and primitives, or is damaged; it was not opened",
            got=first_line(err),
            next_step=anew,
        ) from err
    except (OSError, ValueError) as err:
        raise wrong(
            "a checkpoint cannot be read",
            got=first_line(err),
            next_step=anew,
        ) from err
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != CHECKPOINT_SCHEMA:
        raise wrong(
            "a checkpoint of another clbench",
            expected=f"schema {CHECKPOINT_SCHEMA}",
            got=f"schema {schema}",
            next_step="use the clbench that wrote it, or run again with --fresh",
        )
    said = content.pop("sha256", None)  # None: written before there was one
    if said is not None and said != (got := checksum(content)):
        raise wrong(
            "a checkpoint was altered",
            expected=f"checksum {said[:16]}",
            got=got[:16],
            next_step=anew,
        )
    return content
