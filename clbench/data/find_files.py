"""Finding files in a user's folder, by one rule for data, predictions and lists.

Links are followed, to folders as well, and a link back to a folder above it is noticed. Hidden
files and folders (a name that starts with a dot: companions of macOS, snapshots of file servers,
checkpoints of notebooks) and the folders that file servers add are passed over. Endings ignore
case. Names are compared in Unicode's composed form (NFC), which macOS does not write.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

NIFTI = (".nii.gz", ".nii")
"""Endings of NIfTI files, in any case."""
ADDED = frozenset(
    {"__macosx", "lost+found", "$recycle.bin", "system volume information"}  # macOS, ext, Windows
    | {"@eadir", "#recycle", "#snapshot", "~snapshot"}  # Synology, NetApp
    | {"@recycle", "@recently-snapshot", "@recentlysnapshot"}  # QNAP
)
"""Folders that systems add beside data, in lower case."""


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is not data: hidden, or added by a system."""
    return name.startswith(".") or name.casefold() in ADDED


def composed(name: str) -> str:
    """A name in Unicode's composed form: `é` is one letter, however a disk spells it."""
    return unicodedata.normalize("NFC", name)


def nifti_stem(path: Path) -> str | None:
    """The name of a NIfTI file without its ending, composed; None where it is none.

    >>> nifti_stem(Path("a/Liver_01.NII.GZ"))
    'Liver_01'
    >>> nifti_stem(Path("notes.txt")) is None
    True
    """
    for ending in NIFTI:
        if path.name.lower().endswith(ending):
            return composed(path.name[: -len(ending)])
    return None


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without what is passed over."""
    return sorted(p for p in folder.iterdir() if not passed_over(p.name))


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in sorted order, links followed, without what is passed over.

    Args:
        folder: where; may itself be a link, and hidden.

    Raises:
        OSError: a folder cannot be read: what lies in it must not vanish without a word.
    """
    yield from (path for path, what in _walk(folder) if what == "file")


def _walk(
    folder: Path, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[Path, Literal["file", "hidden", "loop"]]]:
    """Every path below a folder that is no folder to look into, and what it is."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield folder, "loop"
        return
    for path in sorted(folder.iterdir()):
        if passed_over(path.name):
            yield path, "hidden"
        elif path.is_dir():
            yield from _walk(path, (*above, here))
        else:
            yield path, "file"


def count_passed_over(folder: Path) -> tuple[list[str], list[str]]:
    """What `walk` does not look into, relative to the folder.

    Returns:
        Hidden and added files and folders, not what lies in them; links back to a folder above.
    """
    found = [(path.relative_to(folder).as_posix(), path, what) for path, what in _walk(folder)]
    hidden = [name + "/" * path.is_dir() for name, path, what in found if what == "hidden"]
    return hidden, [name for name, _, what in found if what == "loop"]


def stored_file(folder: Path, name: str) -> Path:
    """The file that a list beside it names, however the disk spells and packs it.

    Args:
        folder: what the name is relative to.
        name: as the list has it.

    Returns:
        The path; where nothing or more than one thing fits, the name as it is.
    """
    asked = here = folder / name
    if asked.is_file() or not asked.is_relative_to(folder):
        return asked
    here = folder
    for part in asked.relative_to(folder).parts:
        if not (here / part).exists():
            stem = nifti_stem(Path(part))
            alike = [
                path
                for path in (entries(here) if here.is_dir() else ())
                if composed(path.name) == composed(part)
                or (stem is not None and nifti_stem(path) == stem)
            ]
            if len(alike) != 1:
                return asked
            part = alike[0].name
        here = here / part
    return here


def same_file(one: Path, two: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return one.samefile(two)
    except OSError:
        return False
