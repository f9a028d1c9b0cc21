"""External predictions of other tools: NIfTI files by case, label values by a stated map.

Three forms: a label map per case (`CASE.nii.gz`; nnU-Net's output folder as it is), or
a folder per case with a mask per structure (`CASE/liver.nii.gz`). Nothing is resampled: a file on
another grid than the case's image is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.find_files import composed, entries, nifti_stem
from clbench.data.labels import read_label
from clbench.data.layouts import CaseFiles
from clbench.data.nifti import grid
from clbench.errors import DataError, UnknownName, closest
from clbench.spec.benchmark import MAX_LABEL, Source
from clbench.spec.taxonomy import ancestors, canonical
from clbench.types import bits_dtype

LISTS = ("dataset.json", "labels.json")
"""Files that say what label values mean, looked for in the folder of predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMap:
    """What the values of a label map mean."""

    structures: Mapping[int, tuple[str, ...]]
    """Value → structures a voxel of it belongs to; () = nothing clbench knows of."""
    origin: str
    """Where that stands, for the record."""
    others: tuple[str, ...] = ()
    """Names in the list that no structure of clbench has; their voxels belong to nothing."""


def label_map(file: Path) -> LabelMap:
    """Read nnU-Net's `dataset.json`, or any JSON object of names and values.

    `{"labels": {"background": 0, "liver": [1, 2], "liver_tumor": 2}}` (nnU-Net v2: a list is a
    region, taken as it is), `{"labels": {"0": "background", "1": "liver"}}` (v1), or the inner
    object alone. Names may be clbench's or those of public data sets. A plain value also belongs
    to the structures that contain its structure: a voxel of liver tumor is liver. Names that no
    structure has are passed over and listed: a tool may label more than is asked for.

    Raises:
        DataError: not such a file, or a value that is no whole number.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "the file of label values does not exist", where=file, next_step="check --labels"
        ) from None
    except (OSError, ValueError, RecursionError) as err:
        raise DataError("the file of label values is not JSON", where=file, got=err) from err
    labels = raw.get("labels", raw) if isinstance(raw, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise DataError(
            "the file of label values has no labels",
            where=file,
            expected='{"labels": {"background": 0, "liver": 1, …}}',
        )
    found: dict[int, list[str]] = {}
    others: list[str] = []
    for key, value in labels.items():
        by_value = isinstance(value, str) and key.isdecimal()  # nnU-Net v1
        name, values = (value, int(key)) if by_value else (key, value)
        regions = isinstance(values, list)
        for v in values if isinstance(values, list) else [values]:
            if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v <= MAX_LABEL:
                raise DataError(
                    "a label value is not a whole number",
                    where=file,
                    expected=f"0 to {MAX_LABEL}",
                    got=f"{name}: {values!r}",
                )
            here = found.setdefault(v, [])
            if v == 0 or name.lower() in ("background", "ignore"):
                continue
            try:
                own = canonical(name)
            except UnknownName:
                others.append(name)
                continue
            here += [own] if regions else _with_parents(own)
    return LabelMap(
        structures={v: tuple(dict.fromkeys(n)) for v, n in found.items()},
        origin=file.name,
        others=tuple(others),
    )


def source_map(source: Source) -> LabelMap:
    """The values of a source's own label maps.

    Raises:
        DataError: the source has masks instead, or a value that stands for a left-right pair.
    """
    if source.masks or source.sides:
        raise DataError(
            "the source's own label values cannot be used for predictions",
            where=f"source {source.name!r}",
            expected="one value per structure",
            got="masks per structure" if source.masks else "values that hold left and right",
            next_step="name a file of label values with --labels, or give a mask per structure",
        )
    named = {v: tuple(_with_parents(n)) for v, n in source.labels.items()}
    return LabelMap(
        structures={0: (), **named, **dict.fromkeys(source.ignored, ())},
        origin=f"source {source.name}",
    )


def _with_parents(name: str) -> list[str]:
    return [name, *ancestors(name)]


def said_others(names: Sequence[str]) -> str:
    """`; no structure is called: a, b` for an error; empty without names."""
    return f"; no structure is called: {', '.join(names[:20])}" if names else ""


def misspelt(absent: Sequence[str], others: Sequence[str]) -> str | None:
    """The advice to rename what looks like a missing structure, or None."""
    pairs = [(o, s) for s in absent if (o := closest(s, others)) is not None]
    return (
        ", ".join(f"rename {o!r} to {s!r}" for o, s in pairs) + ", if that is meant"
        if pairs
        else None
    )


# ---------------------------------------------------------------------------------------- finding


def find_predictions(
    folder: Path, wanted: Mapping[tuple[str, str], CaseFiles]
) -> dict[tuple[str, str], Path]:
    """The file or folder of every test case that has one.

    A case is looked for as `SOURCE/CASE` and `CASE` (a case id, the name of its image or label
    file without ending and without nnU-Net's `_0000`, `SOURCE_CASE`, or, where only one source can
    be meant, a name that ends with the case's number).

    Args:
        folder: what `--predictions` names.
        wanted: (source, case) → its files.

    Returns:
        (source, case) → path; cases without prediction are left out.

    Raises:
        DataError: no folder, nothing in it belongs to a test case, or two for one case.
    """
    if not folder.is_dir():
        raise DataError(
            "the folder of predictions does not exist", where=folder, next_step="check the path"
        )
    inside = {p.name.casefold(): p for p in entries(folder) if p.is_dir()}
    sources = {s for s, _ in wanted}
    shared: dict[str, set[tuple[str, str]]] = {}
    names: dict[tuple[str, str], tuple[str, ...]] = {}
    for key, files in wanted.items():
        names[key] = _names(*key, files)
        for name in names[key]:
            shared.setdefault(name, set()).add(key)
    listed = {place: _by_name(place) for place in (folder, *inside.values())}
    found: dict[tuple[str, str], Path] = {}
    for key in wanted:
        own = inside.get(key[0].casefold())
        # without a folder of its own, a name that two sources share names neither
        mine = [n for n in names[key] if own or len(shared[n]) == 1 or len(sources) == 1]
        there = listed[own or folder]
        hits = [path for n in mine for path in there.get(n, ())]
        if not hits and key[1].isdecimal() and (own is not None or len(sources) == 1):
            hits = _numbered(there, int(key[1]))
        if len(hits) > 1:
            raise DataError(
                f"two predictions claim to be {key[0]} case {key[1]}",
                where=folder,
                got=", ".join(str(h.relative_to(folder)) for h in hits),
                next_step="move one of them elsewhere",
            )
        if hits:
            found[key] = hits[0]
    if not found:
        seen = [p.name for p in entries(folder)][:5]
        key = next(iter(wanted))
        raise DataError(
            "no file in this folder is a prediction of a test case",
            where=folder,
            expected=f"for {key[0]} case {key[1]}: {key[0]}/"
            + f", {key[0]}/".join(n + ".nii.gz" for n in names[key][:3]),
            got=", ".join(seen) if seen else "an empty folder",
            next_step="rename the files, or put those of each source into a folder of its name",
        )
    return found


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Name of a NIfTI file without its ending, or of a folder → what has it."""
    found: dict[str, list[Path]] = {}
    for path in entries(folder):
        name = composed(path.name) if path.is_dir() else nifti_stem(path)
        if name is not None:
            found.setdefault(name, []).append(path)
    return found


def _numbered(there: Mapping[str, Sequence[Path]], number: int) -> list[Path]:
    """Label maps whose name ends with a case's number, such as `BTCV_0021.nii.gz` for 21."""
    pattern = rf"(.*\D)?0*{number}"
    hits = [p for name, paths in there.items() if re.fullmatch(pattern, name) for p in paths]
    return [p for p in hits if p.is_file()]


def _names(source: str, case: str, files: CaseFiles) -> tuple[str, ...]:
    paths = [files.image, *([files.label] if isinstance(files.label, Path) else [])]
    stems = [(nifti_stem(p) or composed(p.name)).removesuffix("_0000") for p in paths]
    if not isinstance(files.label, Path):
        stems = []  # every case's image has the same name
    return tuple(dict.fromkeys([case, *stems, f"{source}_{case}"]))


# ---------------------------------------------------------------------------------------- reading


def read_prediction_files(
    path: Path, image: Path, structures: Sequence[str], meaning: LabelMap
) -> NDArray[Any]:
    """One case's prediction on the grid of its image, turned to RAS.

    Args:
        path: a label map, or a folder with a mask per structure (or with `segmentations/` in it).
        image: the case's image, whose grid counts.
        structures: names of the bits of the result; others in the files are left out.
        meaning: what the values of a label map mean; masks are named by their files and taken as
            they are (the liver's mask alone says what is liver).

    Returns:
        (D, H, W), bit k = structures[k].

    Raises:
        DataError: another grid or place, a value without meaning, or a mask that is missing.
    """
    place = grid(image)
    kind = bits_dtype(len(structures))
    bits = np.zeros(place.shape, dtype=kind)
    if path.is_dir():
        for name, file in _masks(path, structures).items():
            mask = read_label(file, place, "prediction")
            if int(mask.max(initial=0)) > 1:
                raise DataError(
                    "a mask of one structure holds other values than 0 and 1",
                    where=file,
                    expected="0 and 1",
                    got=f"values up to {int(mask.max())}",
                )
            bits |= mask.astype(kind) << kind.type(structures.index(name))
    else:
        raw = read_label(path, place, "prediction")
        values = [int(v) for v in np.unique(raw)]
        unknown = [v for v in values if v and v not in meaning.structures]
        if unknown:
            raise DataError(
                "a prediction holds label values without a meaning",
                where=path,
                expected=f"{', '.join(_words(meaning))} (from {meaning.origin})",
                got=", ".join(map(str, unknown[:20])),
                next_step="name the file that defines them with --labels",
            )
        table = np.zeros(max(values) + 1, dtype=kind)
        for v in values:
            for name in meaning.structures.get(v, ()):
                if name in structures:
                    table[v] |= kind.type(1 << structures.index(name))
        bits = table[raw]
    return place.to_ras(bits)


def _words(meaning: LabelMap) -> Iterable[str]:
    return (f"{v} {names[0]}" for v, names in sorted(meaning.structures.items()) if names)


def _masks(folder: Path, structures: Sequence[str]) -> dict[str, Path]:
    inner = folder / "segmentations"
    place = inner if inner.is_dir() else folder
    found: dict[str, Path] = {}
    others: list[str] = []
    for path in entries(place):
        if (stem := nifti_stem(path)) is None:
            continue
        try:
            name = canonical(stem)
        except UnknownName:  # a tool may write more than is asked for
            others.append(stem)
            continue
        if name in found:
            raise DataError(
                "two masks stand for the same structure",
                where=place,
                got=f"{found[name].name} and {path.name}",
                next_step="move one of them elsewhere",
            )
        found[name] = path
    if absent := [s for s in structures if s not in found]:
        raise DataError(
            f"{len(absent)} structures have no mask",
            where=place,
            expected="a mask per structure, empty where nothing was found",
            got=f"missing: {', '.join(absent[:20])}" + said_others(others),
            next_step=misspelt(absent, others)
            or "write empty masks for structures that were looked for and not found",
        )
    return {s: found[s] for s in structures}
