"""Which CTs a path holds: NIfTI files, and series in DICOM in folders or zip archives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from clbench.data.find_files import composed, nifti_stem, walk
from clbench.deployment.dicom import (
    DicomFile,
    Series,
    is_dicom,
    load_scan,
    read_series,
    zip_members,
)
from clbench.deployment.scan import Scan, read_nifti
from clbench.errors import DataError, SettingError, StoreError
from clbench.store import files


@dataclass(frozen=True, kw_only=True, slots=True)
class InputCase:
    """One CT to predict."""

    name: str
    """Names its outputs; the path below the input folder, without ending."""
    path: Path
    """File, folder or archive it is read from."""
    checksum: Callable[[], str]
    """SHA-256 of what is read; raises what `read` would."""
    read: Callable[[], Scan]
    """Reads it."""
    series: Callable[[], Series] | None = None
    """Its slices in DICOM; None: it is a NIfTI file."""


def find_inputs(path: Path, *, out: Path, uid: str | None = None) -> list[InputCase]:
    """The CTs at a path, sorted by name.

    A case is called after its file, without ending and without nnU-Net's `_0000`, and after the
    folders between: `INPUT/s01/ct.nii.gz` is `s01/ct`. The DICOM files of a folder are one case,
    called after the folder; those of a folder in an archive, after the archive and the folder.

    Args:
        path: a NIfTI file, a zip archive of DICOM files, or a folder in which both, and DICOM
            series, are looked for (`clbench.data.find_files`).
        out: where predictions go; what lies in there is no input.
        uid: SeriesInstanceUID of the series wanted where a folder holds several.

    Raises:
        DataError: nothing there, no CT in it, or two files for one case.
        SettingError: the outputs' folder is the input, or holds it.
    """
    if path.is_dir():
        base, outputs = path, out.resolve()
        if outputs in (path.resolve(), *path.resolve().parents):
            raise SettingError(
                "predictions would lie among the images they are made from",
                where="--out",
                expected="a folder of its own, beside or below the input",
                got=out,
            )
        paths = [p for p in _walk(path) if outputs not in Path(os.path.realpath(p)).parents]
    elif path.exists():
        base, paths = path.parent, [path]
    else:
        raise DataError(
            "the input does not exist",
            where=path,
            expected="a NIfTI file (.nii, .nii.gz), a folder, or a zip archive of a DICOM series",
            next_step="check the path",
        )
    cases: dict[str, InputCase] = {}
    slices: dict[Path, list[DicomFile]] = {}
    for file in paths:
        if (stem := nifti_stem(file)) is not None:
            name = (file.relative_to(base).parent / stem.removesuffix("_0000")).as_posix()
            case = InputCase(
                name=composed(name),
                path=file,
                checksum=partial(_checksum, file),
                read=partial(read_nifti, file),
            )
            _add(cases, case)
        elif file.suffix.lower() == ".zip":
            own = file.relative_to(base).with_suffix("")
            _add_archive(cases, file, own, uid, alone=file == path)
        elif file.is_file() or _is_lost_slice(file):
            slices.setdefault(file.parent, []).append(DicomFile(path=file))
    for folder, items in slices.items():
        name = folder.resolve().name if folder == base else folder.relative_to(base).as_posix()
        _add_series(cases, name, folder, items, uid)
    if not cases:
        seen = [p.name for p in paths[:5]]
        raise DataError(
            "no CT was found in the input",
            where=path,
            expected="files that end in .nii or .nii.gz, DICOM files, or zip archives of them",
            got=", ".join(seen) + (", …" if len(paths) > 5 else "") if seen else "no files",
            next_step="check the path; convert other formats to NIfTI",
        )
    return [cases[name] for name in sorted(cases)]


def _is_lost_slice(path: Path) -> bool:
    """Whether a path is a link to nowhere under the name of a slice.

    Like an empty file it is refused when the series is read: passed over, a slice less at either
    end would look like a shorter body.
    """
    return path.suffix.lower() == ".dcm" and path.is_symlink() and not path.exists()


def _checksum(path: Path) -> str:
    """SHA-256 of an image.

    Raises:
        DataError: it cannot be read; the other images of a batch are predicted all the same.
    """
    try:
        return files.sha256(path)
    except StoreError as err:
        raise DataError(
            "an image cannot be read",
            where=path,
            expected="a file that is there and that you may read",
            got=err.got,
            next_step="check where a link leads and the permissions, or remove the file",
        ) from err


def _add_archive(
    cases: dict[str, InputCase], path: Path, name: Path, uid: str | None, *, alone: bool
) -> None:
    """Add the series of an archive, one per folder in it.

    Raises:
        DataError: it is damaged, and nothing else was asked for.
    """
    folders: dict[str, list[DicomFile]] = {}
    try:
        members = zip_members(path)
    except DataError as err:
        if alone:
            raise
        _add(cases, _refused(name, path, err))
        return
    for item in members:
        folders.setdefault((item.member or "").rpartition("/")[0], []).append(item)
    for folder, items in folders.items():
        # one folder around everything adds nothing to the archive's name
        own = name if len(folders) == 1 else name / folder
        _add_series(cases, own.as_posix(), path, items, uid)


def _refused(name: Path, path: Path, error: DataError) -> InputCase:
    """A case that cannot be predicted, which is said when it is its turn.

    Args:
        name: of the case.
        path: what cannot be read.
        error: why.
    """

    def refuse() -> NoReturn:
        raise error

    return InputCase(name=composed(name.as_posix()), path=path, checksum=refuse, read=refuse)


def _add_series(
    cases: dict[str, InputCase],
    name: str,
    where: Path,
    items: Sequence[DicomFile],
    uid: str | None,
) -> None:
    """Add the series among the files of a folder, if there is DICOM among them.

    What is wrong with it is said when it is its turn to be read, so that it keeps no other case
    from being predicted.
    """
    chosen = []
    for item in items:
        try:
            if is_dicom(item):
                chosen.append(item)
        except DataError:
            chosen.append(item)  # reading it with the series says the same
    if not chosen:
        return
    series = partial(read_series, where, chosen, uid=uid)
    case = InputCase(
        name=composed(name),
        path=where,
        checksum=lambda: series().checksum(),
        read=lambda: load_scan(series()),
        series=series,
    )
    _add(cases, case)


def _walk(folder: Path) -> Sequence[Path]:
    try:
        return list(walk(folder))
    except OSError as err:
        raise DataError(
            "a folder of the input cannot be read",
            where=err.filename or folder,
            got=err.strerror,
            next_step="change its permissions, or name another folder",
        ) from err


def _add(cases: dict[str, InputCase], new: InputCase) -> None:
    """Add a case whose outputs no other case would write.

    Raises:
        DataError: another one has its name, or one that some file systems take for the same.
    """
    clash = next((c for c in cases.values() if c.name.casefold() == new.name.casefold()), None)
    if clash is not None:
        raise DataError(
            "two inputs would be one case",
            where=f"{clash.path} and {new.path}",
            expected="names that differ in more than their ending, _0000, and capital letters",
            got=f"case {new.name!r} twice",
            next_step="rename one of them, or move it to another folder",
        )
    cases[new.name] = new
