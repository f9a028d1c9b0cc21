"""Dataset layouts on disk: folder in, cases out. Nothing is read but file names.

A layout knows names only; what label values mean is the benchmark's business
(`clbench.spec.benchmark.Source`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter

from clbench.data.find_files import (
    composed,
    count_passed_over,
    entries,
    nifti_stem,
    same_file,
    stored_file,
    walk,
)
from clbench.errors import DataError, SpecError, unknown_name
from clbench.spec.benchmark import Source
from clbench.spec.names import RANGE


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFiles:
    """Where one case lies."""

    case: str
    """Case id, unique within its source."""
    image: Path
    """NIfTI image in HU."""
    label: Path | tuple[tuple[str, Path], ...]
    """One label map, or (structure, binary mask) pairs."""

    def named(self, source: Source) -> CaseFiles:
        """These files with their masks called by structure; masks no structure uses are left out.

        Raises:
            DataError: two masks of one case stand for the same structure.
        """
        if isinstance(self.label, Path):
            return self
        means = {composed(stem): name for stem, name in source.masks.items()}
        pairs = [(means[stem], path) for stem, path in self.label if stem in means]
        if len({name for name, _ in pairs}) < len(pairs):
            raise DataError(
                "two masks of a case stand for the same structure",
                where=self.image.parent,
                got=", ".join(f"{path.name} = {name}" for name, path in pairs),
                next_step="move one of them elsewhere",
            )
        return replace(self, label=tuple(pairs))

    def annotated(self, source: Source) -> tuple[str, ...]:
        """The structures this case annotates: what the source says, and a mask exists for."""
        says = source.annotated(self.case)
        if isinstance(self.label, Path):
            return says
        return tuple(s for s in says if s in dict(self.label))

    @property
    def files(self) -> tuple[Path, ...]:
        """Image first, then every label file."""
        if isinstance(self.label, Path):
            return (self.image, self.label)
        return (self.image, *(path for _, path in self.label))


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts 2 before 10."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileNames:
    """Layouts in which image and label are told by their paths below the data folder.

    A label is a map of all structures, or a mask per structure; a structure without mask is not
    annotated in that case.
    """

    name: str
    """Name in a benchmark's `layout`."""
    image: tuple[str, ...]
    """Patterns of images: regular expressions with the group `case`."""
    label: tuple[str, ...]
    """Patterns of label maps; of masks, with the group `structure`."""
    writes: tuple[str, str]
    """Where a writer puts image and label; `{case}` is the number."""
    describes: str
    """The patterns in words, for errors."""
    strip_zeros: bool = True
    """Whether 0001 and 1 are the same case."""
    nested: tuple[str, ...] = ()
    """Sub-folders a download may wrap the data in."""

    @property
    def has_masks(self) -> bool:
        """Whether each structure has a file of its own."""
        return "?P<structure>" in self.label[0]

    def _files(self, folder: Path) -> tuple[dict[str, Path], dict[str, dict[Path, str]]]:
        """Images, and labels with the structure of each; of two links to one file the first."""
        images: dict[str, dict[Path, str]] = {}
        labels: dict[str, dict[Path, str]] = {}
        for path in walk(folder):
            inside = composed(path.relative_to(folder).as_posix())
            for wrap in self.nested:
                inside = inside.removeprefix(f"{wrap}/")
            if self.has_masks:  # the data folder may be that of a case
                inside = f"{composed(folder.name)}/{inside}"
            for of_case, patterns in ((labels, self.label), (images, self.image)):
                match = next(
                    filter(None, (re.fullmatch(p, inside, re.IGNORECASE) for p in patterns)), None
                )
                if match is not None:
                    files = of_case.setdefault(self._id(match["case"]), {})
                    structure = match.groupdict().get("structure", "")
                    if not any(s == structure and same_file(p, path) for p, s in files.items()):
                        files[path] = structure
                    break
        for of_case, several in ((images, False), (labels, self.has_masks)):
            for case, files in of_case.items():
                if len(files) > 1 and not several:
                    raise self._claimed_twice(folder, case, *files)
        return {case: next(iter(files)) for case, files in images.items()}, labels

    def _id(self, text: str) -> str:
        return str(int(text)) if self.strip_zeros and text.isdecimal() else text

    def _claimed_twice(self, folder: Path, case: str, one: Path, two: Path, *_: Path) -> DataError:
        what = "files"
        if self.has_masks and one.parent != two.parent:
            what, one, two = "folders", one.parent, two.parent
        return DataError(
            f"two {what} claim to be case {case}",
            where=folder,
            expected="one image and one label per case",
            got=f"{one} and {two}",
            next_step="move one of them elsewhere",
        )

    def find(self, folder: Path) -> dict[str, CaseFiles]:
        """Every case below `folder`, in numerical order of ids.

        Masks carry the stems of their files; `CaseFiles.named` maps them.

        Raises:
            DataError: no such folder, or no case with image and label in it.
        """
        need_folder(folder)
        images, labels = self._files(folder)
        if not images and not labels:
            raise DataError(
                f"no case of the layout {self.name!r} in this folder",
                where=folder,
                expected=self.describes,
                got=glimpse(folder),
                next_step="point --data at the folder that holds these names",
            )
        if not images.keys() & labels.keys():
            what, other = ("label", "an image") if images else ("image", "a label")
            have = images or {case: next(iter(files)) for case, files in labels.items()}
            alone = sorted(have, key=natural)
            there = ", ".join(sorted(labels, key=natural)[:20]) if images and labels else ""
            raise DataError(
                f"{len(alone)} case(s) have {other} but no {what}",
                where=have[alone[0]],
                expected=self.describes,
                got=f"no {what} for case {', '.join(alone[:20])}"
                + (f"; labels of {there}" if there else ""),
                next_step=f"add the {what} file, or move {other} without {what} elsewhere",
            )
        return {
            case: CaseFiles(
                case=case,
                image=images[case],
                label=tuple((structure, path) for path, structure in labels[case].items())
                if self.has_masks
                else next(iter(labels[case])),
            )
            for case in sorted(images.keys() & labels.keys(), key=natural)
        }

    def unpaired(self, folder: Path) -> dict[str, str]:
        """Cases that `find` leaves out because one of their files is missing: case → what."""
        images, labels = self._files(folder)
        said = {case: f"has an image but no label: {images[case]}" for case in images}
        said |= {c: f"has a label but no image: {next(iter(labels[c]))}" for c in labels}
        alone = sorted(images.keys() ^ labels.keys(), key=natural)
        return {case: said[case] for case in alone}

    def paths(self, folder: Path, case: str) -> tuple[Path, Path]:
        """Where a writer puts image and label of a case.

        A label without suffix is a folder that takes a mask per structure.
        """
        number: int | str = int(case) if self.strip_zeros and case.isdecimal() else case
        image, label = (text.format(case=number) for text in self.writes)
        return folder / image, folder / label

    def index(self, cases: Iterable[str]) -> dict[str, str]:
        """What else a writer must leave: file name → text, such as a list of the cases."""
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Datalist:
    """The Medical Segmentation Decathlon and MONAI: a JSON file lists pairs of image and label.

    The data "folder" is the one that holds `dataset.json`, or a list of another name itself.
    """

    name: str
    """Name in a benchmark's `layout`."""
    file: str
    """Name of the list."""

    def find(self, folder: Path) -> dict[str, CaseFiles]:
        """See `FileNames.find`. A case is called after its label file or that file's folder."""
        place = folder / self.file
        if folder.suffix == ".json" and folder.is_file():  # a list of any name
            folder, place = folder.parent, folder
        need_folder(folder)
        pairs = self._listed(folder, place)
        names = _case_names([label for _, label in pairs], place)
        cases: dict[str, CaseFiles] = {}
        for case, pair in sorted(zip(names, pairs, strict=True), key=lambda n: natural(n[0])):
            image, label = (stored_file(folder, name.as_posix()) for name in pair)
            for path in (image, label):
                _refuse_elsewhere(folder, place, path)
            cases[case] = CaseFiles(case=case, image=image, label=label)
        return cases

    def _listed(self, folder: Path, place: Path) -> list[tuple[Path, Path]]:
        """Image and label of each entry, as the list names them."""
        wrong = partial(DataError, where=place)
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
            entries = [
                e
                for part in ("training", "validation")
                for e in content.get(part, [])
                if part == "training" or (isinstance(e, dict) and "label" in e)
            ]
            pairs = [(Path(e["image"]), Path(e["label"])) for e in entries]
        except FileNotFoundError:
            raise DataError(
                f"no case of the layout {self.name!r} in this folder",
                where=folder,
                expected=f"{self.file} with a list 'training' of image and label",
                got=glimpse(folder),
                next_step="point --data at the folder that holds the list",
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
            raise wrong(
                "the list of cases cannot be read",
                expected='JSON: {"training": [{"image": "…", "label": "…"}]}',
                got=str(err) or type(err).__name__,
                next_step="repair the file or download it again",
            ) from err
        if not pairs:
            raise wrong(
                "the list of cases is empty",
                expected="'training' or 'validation': entries with image and label",
                got=f"keys {', '.join(content)}",
                next_step="add the entries, or name another layout",
            )
        return pairs

    def unpaired(self, folder: Path) -> dict[str, str]:
        """See `FileNames.unpaired`: a list names both or is refused."""
        return {}

    def paths(self, folder: Path, case: str) -> tuple[Path, Path]:
        """See `FileNames.paths`."""
        return folder / f"imagesTr/{case}.nii.gz", folder / f"labelsTr/{case}.nii.gz"

    def index(self, cases: Iterable[str]) -> dict[str, str]:
        """See `FileNames.index`."""
        pairs = [
            {"image": f"./{image.as_posix()}", "label": f"./{label.as_posix()}"}
            for image, label in (self.paths(Path(), case) for case in cases)
        ]
        return {self.file: json.dumps({"training": pairs}, indent=1)}


def _refuse_elsewhere(folder: Path, place: Path, path: Path) -> None:
    """A file that a list names must be there, below the list's folder."""
    if not _below(folder, path):
        raise DataError(
            "the list names a file outside its folder",
            where=place,
            expected=f"names of files below {folder}",
            got=path,
            next_step="link or move the files below the list, or put the list into "
            "the folder above both and name that with --data",
        )
    if not path.is_file():
        raise DataError(
            "the list names a file that is not there",
            where=place,
            expected=path,
            next_step="add the file, or take its entry out of the list",
        )


def _below(folder: Path, path: Path) -> bool:
    """Whether a path names what lies in a folder; links in there are followed, as everywhere."""
    written = Path(os.path.normpath(path.absolute()))
    if written.is_relative_to(os.path.normpath(folder.absolute())):
        return True
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _case_names(labels: Sequence[Path], place: Path) -> list[str]:
    """What the cases of a list are called: after the label file, or after what tells them apart.

    Where one file name stands in a folder per case, that folder names the case, whether it is the
    file's own or one further up; where no folder alone tells them apart, all of them together do.

    Args:
        labels: label files, relative to the list.
        place: the list, for the error.

    Raises:
        DataError: a label file is listed twice.
    """
    if twice := [str(p) for p, n in Counter(labels).items() if n > 1]:
        raise DataError(
            f"two entries of the list name one label file ({len(twice)} such files)",
            where=place,
            expected="every label file once",
            got=", ".join(twice[:5]),
            next_step="remove one of the two entries",
        )
    stems = [nifti_stem(label) or composed(label.name) for label in labels]
    folders = zip(*([composed(part.name) for part in p.parents] for p in labels), strict=False)
    paths = (
        [label.parent.parts for label in labels],
        [(*label.parent.parts, nifti_stem(label) or label.name) for label in labels],
    )
    joined = [[composed("_".join(p.strip("/") for p in parts)) for parts in way] for way in paths]
    ways = [stems, *map(list, folders), *joined]
    return next((names for names in ways if len(set(names)) == len(names)), ways[-1])


def need_folder(folder: Path, option: str = "--data") -> None:
    """Raise unless the folder, which an option names, is there."""
    if not folder.is_dir():
        raise DataError(
            "the data folder does not exist" if not folder.exists() else "this is not a folder",
            where=folder,
            next_step=f"check the path given with {option}",
        )


def glimpse(folder: Path) -> str:
    """A few names, so that a wrong path is seen at once."""
    names = [p.name + ("/" if p.is_dir() else "") for p in entries(folder)]
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"


Layout = FileNames | Datalist
"""A way to lay out a data set."""
LAYOUTS: dict[str, Layout] = {
    name: TypeAdapter(Layout).validate_python({"name": name, **fields})
    for name, fields in tomllib.loads(
        resources.files("clbench.data").joinpath("layouts.toml").read_text(encoding="utf-8")
    ).items()
}
"""Every layout, the most particular first; they stand in `layouts.toml`."""


def find_layout(name: str, where: object = None) -> Layout:
    """The layout called `name`.

    Raises:
        UnknownName: there is none; lists them.
    """
    if name not in LAYOUTS:
        raise unknown_name("layout", name, LAYOUTS, where)
    return LAYOUTS[name]


def find_cases(folder: Path, source: Source) -> dict[str, CaseFiles]:
    """Every case of a source below its folder, masks called by structure.

    Raises:
        DataError: see `Layout.find`.
        SpecError: the layout has masks and the source says what label values mean, or the other
            way round.
    """
    cases = cases_in(folder, source.layout, f"source {source.name!r}")
    has_masks = any(isinstance(files.label, tuple) for files in cases.values())
    if has_masks != bool(source.masks):
        table = "[source.masks]" if has_masks else "[source.labels]"
        raise SpecError(
            f"the layout {source.layout!r} has "
            + ("a mask per structure" if has_masks else "a map of label values"),
            where=f"source {source.name!r}",
            expected=table,
            got="[source.masks]" if source.masks else "[source.labels] or [source.sides]",
            next_step=f"write {table} in its place, or another layout of `clbench list layouts`",
        )
    return {case: files.named(source) for case, files in cases.items()}


def cases_in(folder: Path, layout: str, where: object = None) -> dict[str, CaseFiles]:
    """Every case of a layout below a folder.

    Args:
        folder: where; or a list of cases.
        layout: its name.
        where: what names the layout, for the error of an unknown one.

    Raises:
        DataError: see `Layout.find`; it names the layout that the folder does have, and files of
            formats that are not read.
    """
    try:
        cases = find_layout(layout, where).find(folder)
        for case in cases:
            if RANGE.fullmatch(case):
                raise DataError(
                    "a case id has the form of a range",
                    where=cases[case].image,
                    expected="a name without two dots between numbers: in a split 1..3 stands for "
                    "the cases 1, 2 and 3",
                    got=repr(case),
                    next_step="rename the case's files",
                )
        return cases
    except DataError as err:
        if hints := folder_hints(folder, without=layout):
            err.next_step = "; ".join([*hints, *([err.next_step] if err.next_step else [])])
        raise


def folder_hints(folder: Path, *, without: str = "") -> list[str]:
    """What a folder is, where it is not what was asked for: another layout, another format.

    Args:
        folder: where no case was found.
        without: the layout that was looked for.
    """
    if not folder.is_dir():
        return []
    hints = []
    if fitting := {n: c for n, c in recognised(folder).items() if n != without}:
        listed = " or ".join(f"{name!r} ({count} cases)" for name, count in fitting.items())
        hints.append(
            f"the folder has the layout {listed}: say layout = {next(iter(fitting))!r} in its "
            "[[source]], or --layout"
        )
    return [*hints, *other_formats(folder)]


def recognised(folder: Path) -> dict[str, int]:
    """Layouts of which a folder holds cases → how many; the most particular first."""
    counts: dict[str, int] = {}
    for name, layout in LAYOUTS.items():
        with contextlib.suppress(DataError, OSError):
            counts[name] = len(layout.find(folder))
    return counts


_CONVERT = {
    "DICOM": "dcm2niix -z y -o OUT FOLDER",
    "NRRD": "SimpleITK.WriteImage(SimpleITK.ReadImage('x.nrrd'), 'x.nii.gz') in Python",
    "MetaImage": "SimpleITK.WriteImage(SimpleITK.ReadImage('x.mha'), 'x.nii.gz') in Python",
}
_FORMATS = {
    ".dcm": "DICOM", ".ima": "DICOM", ".nrrd": "NRRD", ".nhdr": "NRRD",
    ".mha": "MetaImage", ".mhd": "MetaImage",
}  # fmt: skip


def other_formats(folder: Path) -> list[str]:
    """Images of formats that are not read, counted, with what makes NIfTI files of them."""
    counts: dict[str, list[Path]] = {}
    for path in walk(folder):
        kind = _FORMATS.get(path.suffix.lower())
        if kind is None and (not path.suffix or path.suffix[1:].isdecimal()) and _is_dicom(path):
            kind = "DICOM"
        if kind is not None:
            counts.setdefault(kind, []).append(path)
    return [
        f"{len(paths)} {kind} file(s), which are not read ({paths[0].relative_to(folder)}"
        f"{', …' if len(paths) > 1 else ''}): make NIfTI files of them with {_CONVERT[kind]}"
        for kind, paths in counts.items()
    ]


def _is_dicom(path: Path) -> bool:
    """Whether a file without ending carries the mark of DICOM."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def passed_over_lines(place: Path, source: Source, cases: Mapping[str, CaseFiles]) -> list[str]:
    """What lies in a folder of data and is no part of a case: each kind counted, three named.

    Args:
        place: the folder, or a list of cases.
        source: what was looked for there.
        cases: what was found.
    """
    if not place.is_dir():  # a list of cases
        return []
    layout = LAYOUTS[source.layout]
    alone = layout.unpaired(place)
    used = {p for files in cases.values() for p in files.files}
    others = [
        p.relative_to(place).as_posix()
        for p in walk(place)
        if nifti_stem(p) is not None
        and p not in used
        and not any(said.endswith(str(p)) for said in alone.values())
    ]
    channels = [n for n in others if source.layout == "nnunet" and _CHANNEL.fullmatch(n)]
    hidden, loops = count_passed_over(place)
    kinds = (
        (hidden, "hidden files or folders passed over"),
        (loops, "links back to a folder above them not followed"),
        ([f"case {c} {said}" for c, said in alone.items()], "cases left out"),
        (channels, "images of further channels passed over: a CT is channel 0000 alone"),
        (
            [n for n in others if n not in channels],
            "NIfTI files that belong to no case, or hold no structure of the source",
        ),
    )
    lines = [
        f"{source.name}: {len(names)} {what} ({', '.join(names[:3])}{', …' if names[3:] else ''})"
        for names, what in kinds
        if names
    ]
    return [*lines, *(f"{source.name}: {line}" for line in other_formats(place))]


_CHANNEL = re.compile(r"imagesT[rs]/.+_(?!0000)\d{4}\.nii(\.gz)?", re.IGNORECASE)
"""Further channels of nnU-Net."""


def label_names(folder: Path) -> dict[str, str]:
    """Label value → name, as the `dataset.json` beside the data says; empty where none does.

    nnU-Net writes {"liver": 1} (version 2), others {"1": "liver"}; a region of nnU-Net names each
    of its values.
    """
    names: dict[str, list[str]] = {}
    try:
        labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("labels")
        for key, value in labels.items():
            if str(key).isdecimal():
                names.setdefault(str(int(key)), []).append(str(value))
            else:
                for number in value if isinstance(value, list) else [value]:
                    names.setdefault(str(int(number)), []).append(str(key))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {value: " + ".join(listed) for value, listed in names.items()}


def resolve_data(text: str, sources: Sequence[Source]) -> dict[str, Path]:
    """`btcv=PATH,lits=PATH`, or one folder that holds a folder per source, → source → folder.

    Args:
        text: what stands after `--data`.
        sources: the sources that need a folder.

    Raises:
        DataError: a folder is missing, or a source has none.
    """
    names = [s.name for s in sources]
    if (named := named_folders(text, names)) is not None:
        folders = named
    else:
        folder = Path(text).expanduser()
        need_folder(folder)
        folders = inner_folders(folder, names)
        if not folders and len(names) == 1:
            folders = {names[0]: folder}
    if absent := [n for n in names if n not in folders]:
        raise DataError(
            f"no data folder for {', '.join(absent)}",
            where=f"--data {text}",
            expected=",".join(f"{n}=PATH" for n in names)
            + f", or one folder that holds {', '.join(n + '/' for n in names)}",
            next_step="name a folder for every source of the benchmark",
        )
    for folder in folders.values():
        if not (folder.suffix == ".json" and folder.is_file()):
            need_folder(folder)
    return folders


def inner_folders(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Name of a source → the folder of that name within another one, in whatever capitals.

    Args:
        folder: where; it need not be there.
        names: of sources; those without a folder are left out.

    Raises:
        DataError: two folders bear one name.
    """
    inside: dict[str, dict[Path, Path]] = {}
    for path in entries(folder) if folder.is_dir() else ():
        if path.is_dir():
            inside.setdefault(path.name.casefold(), {}).setdefault(path.resolve(), path)
    found = {name: list(inside.get(name.casefold(), {}).values()) for name in names}
    for name, paths in found.items():
        if len(paths) > 1:
            raise DataError(
                "two folders bear the name of one source",
                where=folder,
                expected=f"one folder called {name}, in whatever capitals",
                got=", ".join(path.name for path in paths),
                next_step="rename the one that is not meant",
            )
    return {name: paths[0] for name, paths in found.items() if paths}


def named_folders(text: str, names: Sequence[str]) -> dict[str, Path] | None:
    """`btcv=PATH,lits=PATH` → source → folder; None where the text is a path alone.

    A path may hold commas and equals signs: a comma parts two sources only where the name of a
    source and `=` follow it.

    Raises:
        DataError: it names a source that is not among `names`, or a source without path.
    """
    if "=" not in text or (Path(text).expanduser().exists() and not _names_a_path(text, names)):
        return None
    known = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True))
    parts = re.split(rf",(?=\s*(?:{known})\s*=)", text) if names else [text]
    parts = _whole_paths(parts)
    folders: dict[str, Path] = {}
    for part in parts:
        name, _, path = (piece.strip() for piece in part.partition("="))
        if "," in path and not Path(path).expanduser().exists():
            part = path.partition(",")[2]  # what is wrong stands behind the comma
            name, _, path = (piece.strip() for piece in part.partition("="))
        if name not in names or not path:
            raise DataError(
                "--data names a source the benchmark does not have"
                if path
                else "--data needs SOURCE=PATH",
                where=f"--data {text}",
                expected=",".join(f"{n}=PATH" for n in names),
                got=part,
            )
        if name in folders:
            raise DataError(
                f"--data names {name} twice",
                where=f"--data {text}",
                expected="each source once",
                got=f"{folders[name]} and {path}",
                next_step="keep one of the two; --data takes one folder a source",
            )
        folders[name] = Path(path).expanduser()
    return folders


def _whole_paths(parts: Sequence[str]) -> list[str]:
    """`SOURCE=PATH` parts, joined again where the comma between them belongs to a path."""
    whole: list[str] = []
    left = list(parts)
    while left:
        taken = next(
            (
                n
                for n in range(len(left), 1, -1)
                if Path(",".join(left[:n]).partition("=")[2].strip()).expanduser().exists()
            ),
            1,
        )
        whole.append(",".join(left[:taken]))
        left = left[taken:]
    return whole


def _names_a_path(text: str, names: Sequence[str]) -> bool:
    """Whether what stands before the first `=` is a source, and what follows is no less a path."""
    name, _, path = text.partition("=")
    if name.strip() not in names:
        return False
    first = re.split(r",", path)[0].strip()
    return any(Path(p).expanduser().exists() for p in (path.strip(), first) if p)
