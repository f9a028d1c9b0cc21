"""How public data sets lie on disk: folder in, cases out. Nothing is read but file names.

Room: row 2. A layout knows names only; what label values mean is the benchmark's business
(`clbench.spec.Source`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from clbench.errors import DataError, unknown_name
from clbench.spec import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFiles:
    """Where one case lies."""

    case: str
    """Case id, unique within its source."""
    image: Path
    """NIfTI image in HU."""
    label: Path | tuple[tuple[str, Path], ...]
    """One label map, or (structure, binary mask) pairs."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Image first, then every label file."""
        if isinstance(self.label, Path):
            return (self.image, self.label)
        return (self.image, *(path for _, path in self.label))


class Layout(Protocol):
    """A way to lay out a data set."""

    @property
    def name(self) -> str:
        """Name in a benchmark's `layout`."""
        ...

    def find(self, folder: Path) -> dict[str, CaseFiles]:
        """Every case below `folder`, in numerical order of ids.

        Raises:
            DataError: no such folder, nothing in it, or an image without label (or the reverse).
        """
        ...

    def paths(self, folder: Path, case: str) -> tuple[Path, Path]:
        """Where a writer puts image and label of a case."""
        ...


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts 2 before 10."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Layouts in which an image and a label map are told by their names.

    `image` and `label` are regular expressions on the path relative to the data folder, with the
    case number in the group `case`.
    """

    name: str
    """Name in a benchmark's `layout`."""
    image: tuple[str, ...]
    """Patterns of images."""
    label: tuple[str, ...]
    """Patterns of label maps."""
    writes: tuple[str, str]
    """Where a writer puts image and label; `{case}` is the number."""
    describes: str
    """The patterns in words, for errors."""
    strip_zeros: bool = True
    """Whether 0001 and 1 are the same case."""
    nested: tuple[str, ...] = field(default=())
    """Sub-folders a download may wrap the data in."""

    def _id(self, text: str) -> str:
        return str(int(text)) if self.strip_zeros and text.isdigit() else text

    def _match(self, patterns: Iterable[str], path: str) -> str | None:
        for pattern in patterns:
            if found := re.fullmatch(pattern, path, flags=re.IGNORECASE):
                return self._id(found["case"])
        return None

    def _files(self, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
        images: dict[str, Path] = {}
        labels: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            # macOS leaves a ._ companion beside every file it copies to a foreign disk
            if path.name.startswith(".") or not inside.lower().endswith((".nii", ".nii.gz")):
                continue
            for wrap in self.nested:
                if inside.startswith(f"{wrap}/"):
                    inside = inside[len(wrap) + 1 :]
            for found, patterns in ((labels, self.label), (images, self.image)):
                case = self._match(patterns, inside)
                if case is None:
                    continue
                if case in found:
                    raise DataError(
                        f"two files claim to be case {case}",
                        where=folder,
                        expected="one image and one label per case",
                        got=f"{found[case]} and {path}",
                        next_step="move one of them elsewhere",
                    )
                found[case] = path
                break
        return images, labels

    def find(self, folder: Path) -> dict[str, CaseFiles]:
        """See `Layout.find`."""
        _need_folder(folder)
        images, labels = self._files(folder)
        if not images and not labels:
            raise DataError(
                f"no case of the layout {self.name!r} in this folder",
                where=folder,
                expected=self.describes,
                got=_glimpse(folder),
                next_step="point --data at the folder that holds these names",
            )
        for what, have, need in (("label", images, labels), ("image", labels, images)):
            if alone := sorted(have.keys() - need.keys(), key=natural):
                other = "an image" if what == "label" else "a label"
                raise DataError(
                    f"{len(alone)} case(s) have {other} but no {what}",
                    where=have[alone[0]],
                    expected=self.describes,
                    got=f"no {what} for case {', '.join(alone[:20])}",
                    next_step=f"add the {what} file, or move {other} without {what} elsewhere",
                )
        return {
            case: CaseFiles(case=case, image=images[case], label=labels[case])
            for case in sorted(images, key=natural)
        }

    def paths(self, folder: Path, case: str) -> tuple[Path, Path]:
        """See `Layout.paths`."""
        number: int | str = int(case) if case.isdigit() else case
        image, label = (text.format(case=number) for text in self.writes)
        return folder / image, folder / label


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            "the data folder does not exist" if not folder.exists() else "this is not a folder",
            where=folder,
            next_step="check the path given with --data",
        )


def _glimpse(folder: Path) -> str:
    """A few names, so that a wrong path is seen at once."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"


_NII = r"\.nii(\.gz)?"
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Pairs(
            name="btcv",
            image=(
                rf"(imagesTr|img|images|averaged-training-images)/img(?P<case>\d+)(_avg)?{_NII}",
                rf"averaged-training-images/DET(?P<case>\d+)_avg{_NII}",
            ),
            label=(
                rf"(labelsTr|label|labels|averaged-training-labels)/(label|img)(?P<case>\d+)(_avg)?{_NII}",
                rf"averaged-training-labels/DET(?P<case>\d+)_avg_seg{_NII}",
            ),
            writes=("imagesTr/img{case:04d}.nii.gz", "labelsTr/label{case:04d}.nii.gz"),
            describes="imagesTr/img0001.nii.gz + labelsTr/label0001.nii.gz, img/ + label/, or "
            "averaged-training-images/ + averaged-training-labels/",
            nested=("RawData/Training", "Training", "01_Multi-Atlas_Labeling"),
        ),
        Pairs(
            name="lits",
            image=(
                rf"(.*/)?volume-(?P<case>\d+){_NII}",
                rf"(img|imagesTr)/liver_(?P<case>\d+){_NII}",
            ),
            label=(
                rf"(.*/)?segmentation-(?P<case>\d+){_NII}",
                rf"(label|labelsTr)/liver_(?P<case>\d+){_NII}",
            ),
            writes=("volume-{case}.nii", "segmentation-{case}.nii"),
            describes="volume-0.nii + segmentation-0.nii, img/liver_0.nii.gz + "
            "label/liver_0.nii.gz, or imagesTr/ + labelsTr/",
            nested=("04_LiTS", "Task03_Liver"),
        ),
    )
}


def find_layout(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        UnknownName: there is none; lists them.
    """
    if name not in LAYOUTS:
        raise unknown_name("layout", name, LAYOUTS)
    return LAYOUTS[name]


def resolve_data(text: str, sources: Sequence[Source]) -> dict[str, Path]:
    """`btcv=PATH,lits=PATH`, or one folder that holds a folder per source, → source → folder.

    Args:
        text: what stands after `--data`.
        sources: the sources that need a folder.

    Raises:
        DataError: a folder is missing, or a source has none.
    """
    names = [s.name for s in sources]
    if "=" in text:
        found = _named(text, names)
    else:
        folder = Path(text).expanduser()
        _need_folder(folder)
        inside = {p.name.casefold(): p for p in folder.iterdir() if p.is_dir()}
        found = {n: inside[n.casefold()] for n in names if n.casefold() in inside}
        if not found and len(names) == 1:
            found = {names[0]: folder}
    if absent := [n for n in names if n not in found]:
        raise DataError(
            f"no data folder for {', '.join(absent)}",
            where=f"--data {text}",
            expected=",".join(f"{n}=PATH" for n in names)
            + f", or one folder that holds {', '.join(n + '/' for n in names)}",
            next_step="name a folder for every source of the benchmark",
        )
    for folder in found.values():
        _need_folder(folder)
    return found


def _named(text: str, names: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, _, path = part.partition("=")
        if name.strip() not in names or not path:
            raise DataError(
                "--data names a source the benchmark does not have"
                if path
                else "--data needs SOURCE=PATH",
                where=f"--data {text}",
                expected=",".join(f"{n}=PATH" for n in names),
                got=part,
            )
        found[name.strip()] = Path(path).expanduser()
    return found
