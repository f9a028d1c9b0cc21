"""Checksums of a run's files, written into `run.json` when the run is finished.

A checksum finds what was damaged or changed by accident; it is no
signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clbench.errors import StoreError
from clbench.store.files import sha256

PATTERNS = (
    "*.csv",
    "*.pt",
    "*.safetensors",
    "*.jsonl",
    "step*.json",
    "predictions/**/*.npz",
    "course/**/*.toml",
)
"""What a finished run consists of, beside `run.json`."""
_SEAL = "record_sha256"


def sealed_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of a run, in order; half-written ones have names with a dot."""
    paths = {p for pattern in PATTERNS for p in folder.glob(pattern) if p.name[0] != "."}
    for path in sorted(paths):
        yield path.relative_to(folder).as_posix(), path


def seal(folder: Path, record: dict[str, Any], *, below: str = "") -> None:
    """Enter the checksum of every file, and of the record itself, into the record.

    Args:
        folder: the run.
        record: content of its `run.json`, about to be written; changed in place.
        below: what the names of the files begin with that were made anew; all others keep the
            checksum they have, so that damage to them is found as before.
    """
    kept = {n: d for n, d in (record.get("files") or {}).items() if not n.startswith(below)}
    made = {n: sha256(path) for n, path in sealed_files(folder) if n.startswith(below)}
    record["files"] = dict(sorted({**kept, **made}.items()))
    record[_SEAL] = record_sha256(record)


def record_sha256(record: Mapping[str, Any]) -> str:
    """Checksum of a record without its own seal, however its JSON is laid out."""
    content = {k: v for k, v in record.items() if k != _SEAL}
    content = json.loads(json.dumps(content, default=str))  # as it will be read back
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_record(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the record carries a seal; it must then be unbroken.

    Raises:
        StoreError: the record was changed after it was sealed, or its seal was taken off.
    """
    if _SEAL not in record:
        if "files" not in record:
            return False
        raise StoreError(
            "a run's record lists checksums of its files, but has none of its own",
            where=folder / "run.json",
            expected=f"{_SEAL}, entered when the run was finished",
            got="no such key",
            next_step="take the record from a copy, or run again with --fresh",
        )
    if (got := record_sha256(record)) != record[_SEAL]:
        raise StoreError(
            "a run's record was changed after the run was finished",
            where=folder / "run.json",
            expected=f"content with SHA-256 {record[_SEAL]}",
            got=got,
            next_step="take the record from a copy, or run again with --fresh",
        )
    return True


def check_files(folder: Path, record: Mapping[str, Any]) -> Iterator[StoreError]:
    """One error per file that is missing, changed, or new since the run was sealed, in order."""
    sealed: Mapping[str, str] = record["files"]
    there = dict(sealed_files(folder))
    for name in sorted({*sealed, *there}):
        if name not in there:
            what, got = "a file of the run is missing", "no such file"
        elif name not in sealed:
            what, got = "a file is no part of the run", "a file the record does not list"
        elif (got := sha256(there[name])) != sealed[name]:
            what = "a file was changed after the run was finished"
        else:
            continue
        yield StoreError(
            what,
            where=folder / name,
            expected=f"SHA-256 {sealed[name]}" if name in sealed else "no such file",
            got=got,
            next_step="take the file from a copy, or run again with --fresh",
        )
