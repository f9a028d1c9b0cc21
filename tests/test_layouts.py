"""Folders of BTCV and LiTS in every naming, and folders in which something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from clbench import registry
from clbench.data.layouts import LAYOUTS, find_layout, resolve_data
from clbench.errors import DataError, UnknownName

SOURCES = registry.benchmark("tumor_ext").sources


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("layout", "names", "cases"),
    [
        ("btcv", ["imagesTr/img0010.nii.gz", "labelsTr/label0010.nii.gz",
                  "imagesTr/img0002.nii.gz", "labelsTr/label0002.nii.gz"], ["2", "10"]),
        ("btcv", ["img/img0001.nii.gz", "label/label0001.nii.gz"], ["1"]),
        ("btcv", ["averaged-training-images/img0001_avg.nii.gz",
                  "averaged-training-labels/label0001_avg.nii.gz"], ["1"]),
        ("btcv", ["averaged-training-images/DET0000101_avg.nii.gz",
                  "averaged-training-labels/DET0000101_avg_seg.nii.gz"], ["101"]),
        ("btcv", ["RawData/Training/img/img0001.nii.gz",
                  "RawData/Training/label/label0001.nii.gz"], ["1"]),
        ("btcv", ["01_Multi-Atlas_Labeling/img/img0061.nii.gz",
                  "01_Multi-Atlas_Labeling/label/label0061.nii.gz"], ["61"]),
        ("lits", ["volume-10.nii", "segmentation-10.nii", "volume-2.nii", "segmentation-2.nii"],
         ["2", "10"]),
        ("lits", ["batch1/volume-0.nii.gz", "batch2/segmentation-0.nii.gz"], ["0"]),
        ("lits", ["img/liver_0.nii.gz", "label/liver_0.nii.gz"], ["0"]),
        ("lits", ["Task03_Liver/imagesTr/liver_7.nii.gz", "Task03_Liver/labelsTr/liver_7.nii.gz"],
         ["7"]),
    ],
)  # fmt: skip
def test_every_naming_is_found_in_order(
    layout: str, names: list[str], cases: list[str], tmp_path: Path
) -> None:
    touch(tmp_path, *names, "imagesTr/._img0001.nii.gz", "imagesTr/notes.txt")
    found = LAYOUTS[layout].find(tmp_path)
    assert list(found) == cases
    for files in found.values():
        assert {p.relative_to(tmp_path).as_posix() for p in files.files} <= set(names)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_is_written_is_found_again(layout: str, tmp_path: Path) -> None:
    image, label = LAYOUTS[layout].paths(tmp_path, "12")
    if not label.suffix:  # a folder of masks
        label = label / "liver.nii.gz"
    touch(tmp_path, str(image.relative_to(tmp_path)), str(label.relative_to(tmp_path)))
    for name, text in LAYOUTS[layout].index(["12"]).items():
        (tmp_path / name).write_text(text)
    found = LAYOUTS[layout].find(tmp_path)
    assert found["12"].files == (image, label)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], ["no case of the layout 'lits'", "volume-0.nii", "an empty folder"]),
        (["something.txt"], ["no case of the layout", "something.txt"]),
        (["volume-3.nii"], ["1 case(s) have an image but no label", "volume-3.nii", "case 3"]),
        (["segmentation-3.nii"], ["1 case(s) have a label but no image", "segmentation-3.nii"]),
        (
            ["volume-3.nii", "volume-3.nii.gz", "segmentation-3.nii"],
            ["two files claim to be case 3"],
        ),
    ],
)
def test_what_is_missing_is_named(names: list[str], says: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError) as err:
        LAYOUTS["lits"].find(tmp_path)
    for words in [*says, str(tmp_path)]:
        assert words in str(err.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        LAYOUTS["btcv"].find(tmp_path / "absent")


def test_an_unknown_layout_lists_the_known() -> None:
    with pytest.raises(UnknownName, match="btvc") as err:
        find_layout("btvc")
    assert "did you mean 'btcv'" in str(err.value)


def test_data_by_name_or_by_one_folder(tmp_path: Path) -> None:
    touch(tmp_path, "BTCV/x", "lits/x")
    both = {"btcv": tmp_path / "BTCV", "lits": tmp_path / "lits"}
    assert resolve_data(str(tmp_path), SOURCES) == both
    assert resolve_data(f"lits={both['lits']},btcv={both['btcv']}", SOURCES) == both
    assert resolve_data(str(tmp_path / "lits"), SOURCES[1:]) == {"lits": tmp_path / "lits"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("btcv={0}/BTCV", "no data folder for lits"),
        ("btcv={0}/BTCV,lids={0}/lits", "does not have"),
        ("btcv={0}/BTCV,lits", "SOURCE=PATH"),
        ("btcv={0}/BTCV,lits={0}/absent", "does not exist"),
        ("{0}/absent", "does not exist"),
        ("{0}/BTCV", "no data folder for btcv, lits"),
    ],
)
def test_wrong_data_words(text: str, says: str, tmp_path: Path) -> None:
    touch(tmp_path, "BTCV/x", "lits/x")
    with pytest.raises(DataError) as err:
        resolve_data(text.format(tmp_path), SOURCES)
    assert says in str(err.value)
