"""Every layout in every naming, and folders in which something is missing."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.data.find_files import count_passed_over, nifti_stem
from clbench.data.labels import read_case
from clbench.data.layouts import (
    LAYOUTS,
    cases_in,
    find_cases,
    find_layout,
    label_names,
    named_folders,
    passed_over_lines,
    recognised,
    resolve_data,
)
from clbench.errors import DataError, SpecError, UnknownName
from clbench.spec import registry
from clbench.spec.benchmark import Source
from clbench.spec.names import need_case
from clbench.spec.toml import expand_ids

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
        ("jhh", ["img/FELIX0012.nii.gz", "label/FELIX0012.nii.gz"], ["FELIX0012"]),
        ("jhh", ["16_FELIX/img_small_4mm/F7.nii.gz", "16_FELIX/label_small_4mm/F7.nii.gz"], ["F7"]),
        ("nnunet", ["imagesTr/CT_010_0000.nii.gz", "labelsTr/CT_010.nii.gz",
                    "imagesTr/CT_2_0000.nii.gz", "labelsTr/CT_2.nii.gz"], ["CT_2", "CT_010"]),
        ("nnunet", ["imagesTr/a_0000.nii", "labelsTr/a.nii"], ["a"]),
        ("totalsegmentator", ["s0002/ct.nii.gz", "s0002/segmentations/liver.nii.gz",
                              "s0010/ct.nii.gz", "s0010/segmentations/liver.nii.gz",
                              "s0010/segmentations/aorta.nii.gz"], ["s0002", "s0010"]),
        ("amos", ["imagesTr/amos_0004.nii.gz", "labelsTr/amos_0004.nii.gz",
                  "imagesVa/amos_0013.nii.gz", "labelsVa/amos_0013.nii.gz"], ["4", "13"]),
        ("kits", ["case_00002/imaging.nii.gz", "case_00002/segmentation.nii.gz",
                  "case_00010/imaging.nii.gz", "case_00010/segmentation.nii.gz"], ["2", "10"]),
        ("kits", ["dataset/case_00010/imaging.nii.gz", "dataset/case_00010/segmentation.nii.gz"],
         ["10"]),
        ("kits", ["case_00299/imaging.nii.gz", "case_00299/aggregated_MAJ_seg.nii.gz",
                  "case_00299/aggregated_AND_seg.nii.gz"], ["299"]),
        ("amos_training", ["amos22/imagesTr/amos_0004.nii.gz", "amos22/labelsTr/amos_0004.nii.gz",
                           "amos22/imagesVa/amos_0013.nii.gz",
                           "amos22/labelsVa/amos_0013.nii.gz"], ["4"]),
        ("amos_validation", ["imagesTr/amos_0004.nii.gz", "labelsTr/amos_0004.nii.gz",
                             "imagesVa/amos_0013.nii.gz", "labelsVa/amos_0013.nii.gz"], ["13"]),
        ("abdomenatlas", ["BDMAP_00000001/ct.nii.gz", "BDMAP_00000001/segmentations/liver.nii.gz"],
         ["BDMAP_00000001"]),
    ],
)  # fmt: skip
def test_every_naming_is_found_in_order(
    layout: str, names: list[str], cases: list[str], tmp_path: Path
) -> None:
    # what downloads leave beside the data, and images without labels that nobody asks for
    touch(
        tmp_path, *names, "imagesTr/._img0001.nii.gz", "imagesTr/notes.txt", "meta.csv",
        "imagesTs/CT_099_0000.nii.gz", "BDMAP_00000001/combined_labels.nii.gz", "dataset.json",
    )  # fmt: skip
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


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_image_alone_and_a_label_alone_are_named(layout: str, tmp_path: Path) -> None:
    image, label = LAYOUTS[layout].paths(Path(), "12")
    if not label.suffix:
        label = label / "liver.nii.gz"
    for i, alone in enumerate((image, label)):
        folder = touch(tmp_path / str(i), str(alone))
        for name, text in LAYOUTS[layout].index(["12"]).items():
            (folder / name).write_text(text)
        with pytest.raises(DataError) as err:
            LAYOUTS[layout].find(folder)
        assert "12" in str(err.value)
        assert str(folder) in str(err.value)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_empty_and_a_foreign_folder(layout: str, tmp_path: Path) -> None:
    for folder, shows in ((tmp_path, "an empty folder"), (tmp_path / "x", "scan.dcm")):
        if shows == "scan.dcm":
            touch(folder, "scan.dcm")
        with pytest.raises(DataError, match=f"no case of the layout '{layout}'") as err:
            LAYOUTS[layout].find(folder)
        assert shows in str(err.value)
        assert "expected" in str(err.value)


def write_list(folder: Path, content: object, name: str = "dataset.json") -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_a_datalist_names_its_pairs(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{d}/liver_{i}.nii.gz" for d in ("imagesTr", "labelsTr") for i in (10, 2)))
    pairs = [
        {
            "image": f"./imagesTr/liver_{i}.nii.gz",
            "label": f"./labelsTr/liver_{i}.nii.gz",
            "fold": 0,
        }
        for i in (10, 2)
    ]
    decathlon = {"training": pairs, "test": ["./imagesTs/liver_3.nii.gz"], "numTraining": 2}
    monai = {"training": pairs[:1], "validation": pairs[1:], "test": []}
    unlabelled = {"training": pairs, "validation": ["./imagesTr/label_9.nii.gz", {"image": "x"}]}
    for content in (decathlon, monai, unlabelled):
        write_list(tmp_path, content)
        found = LAYOUTS["msd"].find(tmp_path)
        assert list(found) == ["liver_2", "liver_10"]
        assert found["liver_2"].image == tmp_path / "imagesTr/liver_2.nii.gz"
    other = write_list(tmp_path, monai, "dataset_fold0.json")
    assert resolve_data(f"lits={other}", SOURCES[1:]) == {"lits": other}
    assert list(LAYOUTS["msd"].find(other)) == ["liver_2", "liver_10"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ([], "cannot be read"),
        ({"training": ["imagesTr/a.nii.gz"]}, "cannot be read"),
        ({"training": [{"image": "imagesTr/a.nii.gz"}]}, "cannot be read"),
        ({"training": []}, "empty"),
        ({"training": [{"image": "a.nii.gz", "label": "absent.nii.gz"}]}, "not there"),
        ({"training": [{"image": "../a.nii.gz", "label": "l.nii.gz"}]}, "outside its folder"),
        (
            {"training": [{"image": "a.nii.gz", "label": "l.nii.gz"}] * 2},
            "two entries of the list name one label file",
        ),
    ],
)
def test_a_wrong_datalist_is_named(content: object, says: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "l.nii.gz")
    place = write_list(tmp_path, content)
    with pytest.raises(DataError) as err:
        LAYOUTS["msd"].find(tmp_path)
    assert says in str(err.value)
    assert str(place) in str(err.value)


GENERATIONS = Source(
    name="t", title="", layout="totalsegmentator",
    masks={"gallbladder": "gall_bladder", "gall_bladder": "gall_bladder", "liver": "liver"},
)  # fmt: skip


def test_two_generations_of_names_stand_for_one_structure(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "s1/ct.nii.gz", "s1/segmentations/gallbladder.nii.gz", "s1/segmentations/liver.nii.gz",
        "s2/ct.nii.gz", "s2/segmentations/gall_bladder.nii.gz", "s2/segmentations/face.nii.gz",
    )  # fmt: skip
    found = find_cases(tmp_path, GENERATIONS)
    assert found["s1"].annotated(GENERATIONS) == ("gall_bladder", "liver")
    assert found["s2"].annotated(GENERATIONS) == ("gall_bladder",)  # no liver mask: not annotated
    assert [name for name, _ in found["s2"].label] == ["gall_bladder"]  # type: ignore[misc, union-attr]
    touch(tmp_path, "s2/segmentations/gallbladder.nii.gz")
    with pytest.raises(DataError, match="two masks of a case stand for the same") as err:
        find_cases(tmp_path, GENERATIONS)
    assert "gallbladder.nii.gz" in str(err.value)


def test_the_same_case_twice(tmp_path: Path) -> None:
    for part in ("a", "b"):
        touch(tmp_path, f"{part}/s1/ct.nii.gz", f"{part}/s1/segmentations/liver.nii.gz")
    with pytest.raises(DataError, match="two folders claim to be case s1"):
        LAYOUTS["totalsegmentator"].find(tmp_path)


IMAGE = np.random.default_rng(0).integers(-900, 300, (9, 8, 7)).astype(np.int16)
LABEL = np.zeros(IMAGE.shape, np.uint8)
LABEL[1:6, 1:6, 1:5], LABEL[2:4, 2:4, 2:4], LABEL[7:, 6:, 5:] = 1, 2, 3


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_one_case_is_the_same_in_every_layout(layout: str, lay_out: Any, tmp_path: Path) -> None:
    masks = {"liver": (1, 2), "liver_tumor": (2,), "spleen": (3,)}
    source = Source(
        name="x", title="", layout=layout,
        **({"labels": {1: "liver", 2: "liver_tumor", 3: "spleen"}}
           if LAYOUTS[layout].paths(Path(), "1")[1].suffix else {"masks": {m: m for m in masks}}),
    )  # fmt: skip
    for case in ("3", "12"):
        lay_out(tmp_path, layout, case, IMAGE, LABEL, masks=masks if source.masks else None)
    found = find_cases(tmp_path, source)
    assert list(found) == ["3", "12"]
    raw = read_case(found["12"], source)
    np.testing.assert_array_equal(raw.image, IMAGE)
    for name, values in masks.items():
        bit = raw.bits.dtype.type(1 << source.structures.index(name))
        np.testing.assert_array_equal((raw.bits & bit) != 0, np.isin(LABEL, values), name)


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
        ("btcv={0}/BTCV,lits={0}/lits,btcv={0}/lits", "names btcv twice"),
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


NII = "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"


def test_links_to_folders_are_followed_and_loops_noticed(tmp_path: Path) -> None:
    other = touch(tmp_path / "disk2", *NII)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (data / name).symlink_to(other / name)
    (other / "imagesTr" / "up").symlink_to(other / "imagesTr")  # a loop
    assert list(LAYOUTS["nnunet"].find(data)) == ["a"]
    cases = touch(tmp_path / "ts", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz")
    far = touch(tmp_path / "far", "s2/ct.nii.gz", "s2/segmentations/liver.nii.gz")
    (cases / "s2").symlink_to(far / "s2")
    (cases / "again").mkdir()
    (cases / "again" / "s2").symlink_to(far / "s2")  # the same case by a second link
    assert list(LAYOUTS["totalsegmentator"].find(cases)) == ["s1", "s2"]


@pytest.mark.parametrize(
    "hidden",
    [
        ".snapshot/daily/{}",
        ".ipynb_checkpoints/{}",
        "__MACOSX/{}",
        "@eaDir/{}",
        "#snapshot/{}",
        "~snapshot/{}",
        "@Recently-Snapshot/{}",
    ],
)
def test_hidden_copies_are_no_cases_and_are_counted(hidden: str, tmp_path: Path) -> None:
    touch(tmp_path, "volume-1.nii", "segmentation-1.nii", "._volume-1.nii", "labels/.x.nii.gz")
    touch(tmp_path, *(hidden.format(n) for n in ("volume-1.nii", "segmentation-1.nii")))
    assert list(LAYOUTS["lits"].find(tmp_path)) == ["1"]
    assert count_passed_over(tmp_path)[0] == sorted(
        ["._volume-1.nii", "labels/.x.nii.gz", hidden.split("/")[0] + "/"]
    )


def test_links_back_to_a_folder_above_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, *NII)
    (tmp_path / "imagesTr" / "again").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert count_passed_over(tmp_path)[1] == ["imagesTr/again"]
    source = Source(name="a", title="", layout="nnunet", labels={1: "liver"})
    found = find_cases(tmp_path, source)
    (line,) = passed_over_lines(tmp_path, source, found)
    assert line == "a: 1 links back to a folder above them not followed (imagesTr/again)"


def test_a_list_follows_links_to_another_disk(tmp_path: Path) -> None:
    far = touch(tmp_path / "far", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    near = tmp_path / "near"
    near.mkdir()
    for name in ("imagesTr", "labelsTr"):
        (near / name).symlink_to(far / name)
    write_list(near, {"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]})
    assert list(LAYOUTS["msd"].find(near)) == ["a"]


@pytest.mark.parametrize(
    ("labels", "cases"),
    [
        (["p1/seg.nii.gz", "p2/seg.nii.gz"], ["p1", "p2"]),
        (["p1/labels/seg.nii.gz", "p2/labels/seg.nii.gz"], ["p1", "p2"]),
        (["x/p1/seg.nii.gz", "x/p1/b.nii.gz", "y/p1/seg.nii.gz"],
         ["x_p1_b", "x_p1_seg", "y_p1_seg"]),
        (["x/p1/seg.nii.gz", "y/p1/seg.nii.gz"], ["x", "y"]),
        (["x/p1/seg.nii.gz", "y/p1/seg.nii.gz", "y/p2/seg.nii.gz"], ["x_p1", "y_p1", "y_p2"]),
        (["p1/seg.nii.gz", "p1/other.nii.gz"], ["other", "seg"]),
    ],
)  # fmt: skip
def test_file_names_that_repeat_in_a_list_are_told_apart_by_their_folders(
    labels: list[str], cases: list[str], tmp_path: Path
) -> None:
    pairs = [{"image": f"i/{i}.nii.gz", "label": name} for i, name in enumerate(labels)]
    touch(tmp_path, *(name for pair in pairs for name in pair.values()))
    write_list(tmp_path, {"training": pairs})
    found = LAYOUTS["msd"].find(tmp_path)
    assert list(found) == cases
    assert {files.label for files in found.values()} == {tmp_path / name for name in labels}


def test_masks_are_named_in_any_unicode_form(tmp_path: Path) -> None:
    touch(tmp_path, "s1/ct.nii.gz", "s1/segmentations/Lo\u0308ber.nii.gz")
    for stem in ("Lo\u0308ber", "L\u00f6ber"):
        source = Source(name="a", title="", layout="totalsegmentator", masks={stem: "liver"})
        (files,) = find_cases(tmp_path, source).values()
        assert files.annotated(source) == ("liver",)


def test_a_case_called_like_a_range_is_refused(tmp_path: Path) -> None:
    """In a split `1..3` would stand for other cases."""
    names = ("1", "2", "3", "1..3")
    touch(tmp_path, *(f"{d}/{n}{e}.nii" for n in names
                      for d, e in (("imagesTr", "_0000"), ("labelsTr", ""))))  # fmt: skip
    with pytest.raises(DataError, match="form of a range"):
        cases_in(tmp_path, "nnunet")


def test_endings_ignore_case_and_a_case_may_be_packed_otherwise(tmp_path: Path) -> None:
    touch(tmp_path / "a", "VOLUME-1.NII.GZ", "segmentation-1.Nii")
    assert list(LAYOUTS["lits"].find(tmp_path / "a")) == ["1"]
    touch(tmp_path / "b", "s1/ct.nii", "s1/segmentations/Liver.NII")
    (files,) = LAYOUTS["totalsegmentator"].find(tmp_path / "b").values()
    assert files.image.name == "ct.nii"
    assert dict(files.label) == {"Liver": tmp_path / "b/s1/segmentations/Liver.NII"}  # type: ignore[arg-type]  # pairs
    touch(tmp_path / "b", "s1/ct.nii.gz")
    with pytest.raises(DataError, match="two files claim to be case s1"):
        LAYOUTS["totalsegmentator"].find(tmp_path / "b")


@given(st.text(st.characters(categories=("L", "N", "M"), include_characters="-_. "), min_size=1))
def test_a_case_has_one_name_however_a_disk_spells_it(name: str) -> None:
    try:
        need_case(name, "test")
    except SpecError:
        return
    spelt = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    stems = {nifti_stem(Path(f"{s}{e}")) for s in spelt for e in (".nii", ".NII.gz", ".nii.GZ")}
    assert stems == {unicodedata.normalize("NFC", name)}
    assert expand_ids(sorted(spelt), "test") == (unicodedata.normalize("NFC", name),) * len(spelt)


def test_composed_and_decomposed_names_are_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/Ju\u0308rgen_0000.nii.gz", "labelsTr/J\u00fcrgen.nii.gz")
    assert list(LAYOUTS["nnunet"].find(tmp_path)) == ["J\u00fcrgen"]


def test_one_label_name_in_a_folder_per_case(tmp_path: Path) -> None:
    names = [(f"{c}/ct.nii.gz", f"{c}/label.nii.gz") for c in ("p1", "p2")]
    touch(tmp_path, *(n for pair in names for n in pair))
    listed = {"training": [{"image": i, "label": k} for i, k in names]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    assert list(LAYOUTS["msd"].find(tmp_path)) == ["p1", "p2"]


def test_commas_and_equals_signs_in_paths(tmp_path: Path) -> None:
    one, two = tmp_path / "a,b=c", tmp_path / "d=e"
    for folder in (one, two):
        folder.mkdir()
    names = ("btcv", "lits")
    assert named_folders(f"btcv={one},lits={two}", names) == {"btcv": one, "lits": two}
    odd = tmp_path / "data,lits=2"
    odd.mkdir()
    assert named_folders(f"btcv={odd},lits={two}", names) == {"btcv": odd, "lits": two}
    assert named_folders(f"lits={two},btcv={odd}", names) == {"btcv": odd, "lits": two}
    assert named_folders(str(one), names) is None
    assert named_folders(f"btcv={one}", names) == {"btcv": one}
    with pytest.raises(DataError, match="does not have") as err:
        named_folders(f"btcv={two},liver={one}", names)
    assert f"liver={one}" in str(err.value)


def mixed(*pairs: str, kind: str = "training") -> str:
    listed = [dict(zip(("image", "label"), p.split(" "), strict=True)) for p in pairs]
    return json.dumps({kind: listed})


FOLDERS = {
    "totalsegmentator": (["s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz"], None),
    "abdomenatlas": (["BDMAP_1/ct.nii.gz", "BDMAP_1/segmentations/liver.nii.gz"], None),
    "nnunet": (["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"], '{"channel_names": {"0": "CT"}}'),
    "nnunet, version 1": (
        ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"],
        mixed("./imagesTr/a.nii.gz ./labelsTr/a.nii.gz"),
    ),
    "msd": (
        ["imagesTr/spleen_2.nii.gz", "labelsTr/spleen_2.nii.gz"],
        mixed("./imagesTr/spleen_2.nii.gz ./labelsTr/spleen_2.nii.gz"),
    ),
    "amos": (["imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz"], None),
    "kits": (["case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"], None),
    "btcv": (["img/img0001.nii.gz", "label/label0001.nii.gz"], None),
    "lits": (["volume-0.nii", "segmentation-0.nii"], None),
}


@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize("asked", list(LAYOUTS))
def test_the_error_names_the_layout_that_a_folder_has(
    asked: str, what: str, tmp_path: Path
) -> None:
    names, listed = FOLDERS[what]
    layout = what.partition(",")[0]
    touch(tmp_path, *names)
    if listed is not None:
        (tmp_path / "dataset.json").write_text(listed)
    assert next(iter(recognised(tmp_path))) == layout
    try:
        LAYOUTS[asked].find(tmp_path)
    except DataError:
        with pytest.raises(DataError) as err:
            cases_in(tmp_path, asked)
        assert f"say layout = {layout!r}" in str(err.value)
        assert len(LAYOUTS[layout].find(tmp_path)) == 1  # and the advice is right


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("series/0001.dcm", b"", ["1 DICOM", "dcm2niix"]),
        ("series/IM000001", b"\0" * 128 + b"DICM", ["1 DICOM", "dcm2niix"]),
        ("series/1.2.840.113", b"\0" * 128 + b"DICM", ["1 DICOM"]),
        ("a.nrrd", b"", ["1 NRRD", "SimpleITK"]),
        ("a.mha", b"", ["1 MetaImage", "SimpleITK"]),
        ("volume-1.mhd", b"", ["1 MetaImage"]),
    ],
)
def test_other_formats_are_named_with_the_way_out(
    name: str, content: bytes, says: list[str], tmp_path: Path
) -> None:
    (touch(tmp_path, name) / name).write_bytes(content)
    with pytest.raises(DataError) as err:
        cases_in(tmp_path, "lits")
    for words in says:
        assert words in str(err.value)
    touch(tmp_path, "volume-7.nii", "segmentation-7.nii")  # beside good ones: a line
    found = find_cases(tmp_path, SOURCES[1])
    assert any(says[0] in line for line in passed_over_lines(tmp_path, SOURCES[1], found))


def test_an_image_without_label_among_good_ones_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "volume-1.nii", "segmentation-1.nii", "volume-2.nii", "segmentation-3.nii")
    found = find_cases(tmp_path, SOURCES[1])
    assert list(found) == ["1"]
    (line,) = passed_over_lines(tmp_path, SOURCES[1], found)
    assert "2 cases left out" in line
    assert "case 2 has an image but no label" in line
    assert "case 3 has a label but no image" in line
    masks = touch(tmp_path / "m", "s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "s2/ct.nii.gz")
    assert list(LAYOUTS["totalsegmentator"].find(masks)) == ["s1"]
    assert list(LAYOUTS["totalsegmentator"].unpaired(masks)) == ["s2"]


def test_a_second_channel_is_said_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    source = Source(name="s", title="s", layout="nnunet", labels={1: "liver"})
    (line,) = passed_over_lines(tmp_path, source, find_cases(tmp_path, source))
    assert "1 images of further channels passed over" in line


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "spleen": 2},
        {"0": "background", "1": "liver", "2": "spleen"},
        {"liver": [1], "spleen": [2]},
    ],
)
def test_label_names_of_the_list_are_known(labels: object, tmp_path: Path) -> None:
    write_list(tmp_path, {"labels": labels})
    names = label_names(tmp_path)
    assert (names["1"], names["2"]) == ("liver", "spleen")
    write_list(tmp_path, "[1, 2")
    assert label_names(tmp_path) == {}


def test_masks_and_label_values_are_told_apart_by_the_layout(tmp_path: Path) -> None:
    touch(tmp_path, "volume-1.nii", "segmentation-1.nii")
    masks = Source(name="ward", title="", layout="lits", masks={"liver": "liver"})
    with pytest.raises(SpecError, match="map of label values") as err:
        find_cases(tmp_path, masks)
    assert "write [source.labels]" in str(err.value)
    assert find_cases(tmp_path, Source(name="ward", title="", layout="lits", labels={1: "liver"}))
