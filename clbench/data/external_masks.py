"""External predictions of other tools: NIfTI files by case, label values by a stated map.

Three forms: a label map per case (`CASE.nii.gz`; nnU-Net's output folder as it is), or
a folder per case with a mask per structure (`CASE/liver.nii.gz`). Nothing is resampled: a file on
another grid than the case's image is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.data.find_files import composed, entries, nifti_stem
from clbench.data.labels import counted, read_label, read_mask
from clbench.data.layouts import CaseFiles, inner_folders
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
        DataError: not such a file, a value that is no whole number, 0 for a structure, one value
            for two structures, or regions whose `regions_class_order` is that of others.
    """
    raw, labels = _read_labels(file)
    structures: dict[int, list[str]] = {}
    plain: dict[int, str] = {}
    regions: list[list[int]] = []
    others: list[str] = []
    for key, value in labels.items():
        by_value = isinstance(value, str) and key.isdecimal()  # nnU-Net v1
        name, values = (value, int(key)) if by_value else (key, value)
        is_region = isinstance(values, list)
        members: list[Any] = values if isinstance(values, list) else [values]
        for v in members:
            if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v <= MAX_LABEL:
                raise _wrong(
                    file,
                    "a label value is not a whole number",
                    f"0 to {MAX_LABEL}",
                    f"{name}: {values!r}",
                )
            structures.setdefault(v, [])
        if name.lower() in ("background", "ignore"):
            continue
        regions.append(members)
        try:
            own = canonical(name)
        except UnknownName:
            if any(members):
                others.append(name)
            continue
        if 0 in members:
            raise _wrong(file, "a structure has the label value 0", "0 for background alone", name)
        if not is_region and plain.setdefault(members[0], own) != own:
            raise _wrong(
                file,
                "two structures have one label value",
                "a value each, or regions as lists of values",
                f"{values}: {plain[members[0]]} and {own}",
            )
        for v in members:
            structures[v] += [own] if is_region else _with_parents(own)
    _check_order(file, raw.get("regions_class_order"), regions)
    return LabelMap(
        structures={v: tuple(dict.fromkeys(names)) for v, names in structures.items()},
        origin=file.name,
        others=tuple(others),
    )


def _wrong(file: Path, what: str, expected: str, got: object) -> DataError:
    advice = "write what the values of the files mean into it"
    return DataError(what, where=file, expected=expected, got=got, next_step=advice)


def _read_labels(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole list, and its names and values."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
            raise _wrong(file, "the file of label values lists a key twice", "each once", twice[0])
        return dict(pairs)

    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
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
    return raw, labels


def _check_order(file: Path, order: Any, regions: list[list[int]]) -> None:
    """Refuse an order in which nnU-Net would write other values than the regions hold."""
    if order is not None and (
        len(order) != len(regions)
        or any(v not in region for v, region in zip(order, regions, strict=True))
    ):
        raise _wrong(
            file,
            "regions_class_order does not fit the regions",
            "for each region, in their order, a value of its own list: nnU-Net writes that value "
            "where the region is the last one to hold a voxel",
            f"{order} for {regions}",
        )


def same_meaning(folder: Path, source: Source) -> None:
    """Refuse data whose own `dataset.json` gives a label value another meaning than the source.

    Names in it that no structure has are passed over, and so is a list without labels.

    Args:
        folder: the data of the source, or its list.
        source: what the course says of its label values.

    Raises:
        DataError: names the values.
    """
    file = folder if folder.is_file() else folder / LISTS[0]
    try:
        listed = label_map(file).structures
    except DataError:  # absent, or a list of files alone
        return
    said = {**{v: (name,) for v, name in source.labels.items()}, **source.sides}
    differing = {v: n for v, n in said.items() if listed.get(v) and not set(n) & set(listed[v])}
    if differing:
        raise DataError(
            "the label values of the data mean something else than the course says",
            where=file,
            expected=", ".join(f"{v} {' and '.join(names)}" for v, names in differing.items()),
            got=", ".join(f"{v} {listed[v][0]}" for v in differing),
            next_step=f"correct `labels` of source {source.name!r}, or the list beside the data",
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
    folder: Path,
    wanted: Mapping[tuple[str, str], CaseFiles],
    at_hand: Mapping[tuple[str, str], CaseFiles] | None = None,
) -> dict[tuple[str, str], Path]:
    """The file or folder of every test case that has one.

    A case is looked for as `SOURCE/CASE` and `CASE` (a case id, the name of its image or label
    file without ending and without nnU-Net's `_0000`, `SOURCE_CASE`, or, where only one source can
    be meant, a name that ends with the case's number).

    Args:
        folder: what `--predictions` names.
        wanted: (source, case) → its files.
        at_hand: the same of every case of the data: a file called after one of them is no
            prediction of another, whatever number it ends with. None: those that are wanted.

    Returns:
        (source, case) → path; cases without prediction are left out.

    Raises:
        DataError: no folder, or two of one source; nothing in it belongs to a test case; two for
            one case, or one for two.
    """
    if not folder.is_dir():
        raise DataError(
            "the folder of predictions does not exist", where=folder, next_step="check the path"
        )
    inside = inner_folders(folder, dict.fromkeys(source for source, _ in wanted))
    one_source = len({source for source, _ in wanted}) == 1
    names = {key: _names(*key, files) for key, files in wanted.items()}
    bearers = Counter(name for of_case in names.values() for name in of_case)
    known = at_hand or wanted
    owners: dict[tuple[str, str], set[str]] = {}
    for key, files in known.items():
        for name in _names(*key, files):
            owners.setdefault((key[0], name), set()).add(key[1])
    listed = {place: _by_name(place) for place in (folder, *inside.values())}
    predictions: dict[tuple[str, str], Path] = {}
    for key, of_case in names.items():
        own = inside.get(key[0])
        there = listed[own or folder]
        mine = [n for n in of_case if n == key[1] or (key[0], n) not in known]  # an id is exact
        plain = [n for n in mine if own or one_source or bearers[n] == 1]
        hits = [path for n in plain for path in there.get(n, ())]
        if not hits and key[1].isdecimal() and (own or one_source):
            free = {n: p for n, p in there.items() if not owners.get((key[0], n), set()) - {key[1]}}
            hits = _numbered(free, int(key[1]))
        if len(hits) > 1:
            raise DataError(
                f"two predictions claim to be {key[0]} case {key[1]}",
                where=folder,
                got=", ".join(str(h.relative_to(folder)) for h in hits),
                next_step="move one of them elsewhere",
            )
        if hits:
            predictions[key] = hits[0]
    _refuse_shared(folder, predictions)
    if not predictions:
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
    return predictions


def _refuse_shared(folder: Path, predictions: Mapping[tuple[str, str], Path]) -> None:
    """Refuse a file that is taken for the prediction of two cases.

    Args:
        folder: of predictions.
        predictions: (source, case) → path.
    """
    first: dict[Path, tuple[str, str]] = {}
    for key, path in predictions.items():
        if (other := first.setdefault(path, key)) != key:
            raise DataError(
                "one prediction may be that of two cases",
                where=path,
                expected="a file or folder for every case",
                got=f"{' case '.join(other)} and {' case '.join(key)}",
                next_step="name it after its case, in a folder of its source's name below "
                f"{folder}",
            )


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Name of a NIfTI file without its ending, or of a folder → what has it."""
    named: dict[str, list[Path]] = {}
    for path in entries(folder):
        name = composed(path.name) if path.is_dir() else nifti_stem(path)
        if name is not None:
            named.setdefault(name, []).append(path)
    return named


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
            mask = read_mask(file, place, "prediction")
            bits |= mask.astype(kind) << kind.type(structures.index(name))
    else:
        raw = read_label(path, place, "prediction")
        values = counted(raw)
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
    masks: dict[str, Path] = {}
    others: list[str] = []
    for path in entries(place):
        if (stem := nifti_stem(path)) is None:
            continue
        try:
            name = canonical(stem)
        except UnknownName:  # a tool may write more than is asked for
            others.append(stem)
            continue
        if name in masks:
            raise DataError(
                "two masks stand for the same structure",
                where=place,
                got=f"{masks[name].name} and {path.name}",
                next_step="move one of them elsewhere",
            )
        masks[name] = path
    if absent := [s for s in structures if s not in masks]:
        raise DataError(
            f"{len(absent)} structures have no mask",
            where=place,
            expected="a mask per structure, empty where nothing was found",
            got=f"missing: {', '.join(absent[:20])}" + said_others(others),
            next_step=misspelt(absent, others)
            or "write empty masks for structures that were looked for and not found",
        )
    return {s: masks[s] for s in structures}
