"""Which CTs a path holds: one NIfTI file, or every one below a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clbench.data.find_files import nifti_stem, walk
from clbench.deployment.scan import Scan, read_nifti
from clbench.errors import DataError, SettingError


@dataclass(frozen=True, kw_only=True, slots=True)
class InputCase:
    """One CT to predict."""

    name: str
    """Names its outputs; the path below the input folder, without ending."""
    files: tuple[Path, ...]
    """What it is read from."""
    read: Callable[[], Scan]
    """Reads it."""


def find_inputs(path: Path, *, out: Path) -> list[InputCase]:
    """The CTs at a path, sorted by name.

    A case is called after its file, without ending and without nnU-Net's `_0000`, and after the
    folders between: `INPUT/s01/ct.nii.gz` is `s01/ct`.

    Args:
        path: a NIfTI file, or a folder in which they are looked for (`clbench.data.find_files`).
        out: where predictions go; what lies in there is no input.

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
        paths = [p for p in _walk(path) if outputs not in p.resolve().parents]
    elif path.exists():
        base, paths = path.parent, [path]
    else:
        raise DataError(
            "the input does not exist",
            where=path,
            expected="a NIfTI file (.nii, .nii.gz), or a folder of them",
            next_step="check the path",
        )
    cases: dict[str, InputCase] = {}
    for file in paths:
        if (stem := nifti_stem(file)) is None:
            continue
        name = (file.relative_to(base).parent / stem.removesuffix("_0000")).as_posix()
        case = InputCase(name=name, files=(file,), read=partial(read_nifti, file))
        _add(cases, case)
    if not cases:
        seen = [p.name for p in paths[:5]]
        raise DataError(
            "no CT was found in the input",
            where=path,
            expected="files that end in .nii or .nii.gz",
            got=", ".join(seen) + (", …" if len(paths) > 5 else "") if seen else "no files",
            next_step="convert other formats to NIfTI, for DICOM with dcm2niix",
        )
    return [cases[name] for name in sorted(cases)]


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
            "two files of the input would be one case",
            where=f"{clash.files[0]} and {new.files[0]}",
            expected="names that differ in more than their ending, _0000, and capital letters",
            got=f"case {new.name!r} twice",
            next_step="rename one of them, or move it to another folder",
        )
    cases[new.name] = new
