"""How public data sets lie on disk: folder in, cases out. Nothing is read but file names.

Room: row 2. A layout knows names only; what label values mean is the benchmark's business
(`clbench.spec.Source`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clbench.data.folders import CaseFiles as CaseFiles
from clbench.data.folders import Datalist, Layout, Masks, Pairs, need_folder
from clbench.errors import DataError, unknown_name
from clbench.spec import Source

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
        Pairs(
            name="jhh",
            image=(rf"(.*/)?(img|image|images|img_[a-z0-9_]+)/(?P<case>[^/]+?){_NII}",),
            label=(rf"(.*/)?(label|labels|label_[a-z0-9_]+)/(?P<case>[^/]+?){_NII}",),
            writes=("img/{case}.nii.gz", "label/{case}.nii.gz"),
            describes="img/CASE.nii.gz + label/CASE.nii.gz",
            strip_zeros=False,
        ),
        Pairs(
            name="nnunet",
            image=(rf"imagesTr/(?P<case>[^/]+?)_0000{_NII}",),
            label=(rf"labelsTr/(?P<case>[^/]+?){_NII}",),
            writes=("imagesTr/{case}_0000.nii.gz", "labelsTr/{case}.nii.gz"),
            describes="imagesTr/CASE_0000.nii.gz + labelsTr/CASE.nii.gz",
            strip_zeros=False,
        ),
        Datalist(name="msd"),
        Masks(name="totalsegmentator", case=r"s?\d+"),
        Masks(name="abdomenatlas", case=r".+"),
    )
}


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
    """
    found = find_layout(source.layout, f"source {source.name!r}").find(folder)
    return {case: files.named(source) for case, files in found.items()}


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
        need_folder(folder)
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
        if not (folder.suffix == ".json" and folder.is_file()):
            need_folder(folder)
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
