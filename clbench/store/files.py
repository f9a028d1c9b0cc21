"""Files and folders written whole or not at all, and read with a check."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.errors import StoreError

# ----------------------------------------------------------------------------------------- writing


def make_folder(folder: Path) -> None:
    """Create a folder that must be writable.

    Raises:
        StoreError: it cannot be.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as err:
        raise StoreError(
            "the results folder cannot be written",
            where=folder,
            got=err.strerror or str(err),
            next_step="choose another folder with --out, or change its permissions",
        ) from err


def sync_folder(folder: Path) -> None:
    """Let a rename in the folder outlast a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing; call it only while the folder is held alone."""
    for part in folder.rglob(".*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename.

    Raises:
        StoreError: the disk is full, or the folder cannot be written; the old file is unharmed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as err:
        raise StoreError(
            "a file of the run could not be written",
            where=path,
            got=err.strerror or str(err),
            next_step="free some disk space, or choose another folder with --out; run the same "
            "command again and it goes on where it stopped",
        ) from err
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as sorted, indented JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, default=str)
    write_bytes(path, text.encode() + b"\n")


# ----------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: missing, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(
            "a file of the run is missing", where=path, next_step="run again with --fresh"
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise StoreError(
            "a file of the run cannot be read",
            where=path,
            expected="JSON written by clbench",
            got=err,
            next_step="run again with --fresh",
        ) from err
    if not isinstance(content, dict):
        raise StoreError(
            "a file of the run is not a JSON object", where=path, next_step="run again with --fresh"
        )
    return content
