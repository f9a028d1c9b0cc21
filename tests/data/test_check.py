"""`data check`: every case described, every problem listed, nothing stopped at the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.cache import VolumeCache
from clbench.data.check import (
    FolderReport,
    check_course,
    check_data,
    check_folder,
    check_layout,
)
from clbench.data.labels import read_bits
from clbench.data.layouts import LAYOUTS, resolve_data
from clbench.data.nifti import grid as read_grid
from clbench.errors import DataError, UnknownName
from clbench.spec import registry
from clbench.spec.splits import Draw, Split

SOURCES = registry.benchmark("tumor_ext").sources


def write(
    folder: Path, layout: str, case: str, value: int = 1, low: int = -1000
) -> tuple[Path, Path]:
    image = np.full((8, 9, 10), low, np.int16)
    image[2:6, 2:6, 2:6] = 40
    image[2, 2, 2] = int(case) % 40  # no two cases have one image
    label = np.zeros(image.shape, np.uint8)
    label[3:5, 3:5, 3:5] = value
    paths = LAYOUTS[layout].paths(folder, case)
    for path, array in zip(paths, (image, label), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([-2.0, -2.0, 3.0, 1.0])), path)
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "btcv", "btcv", "2", 6)
    write(tmp_path / "btcv", "btcv", "61", 1)
    write(tmp_path / "lits", "lits", "0", 2)
    return tmp_path


def test_two_spellings_of_one_sources_folder_are_refused(folder: Path) -> None:
    assert resolve_data(str(folder), SOURCES)["lits"] == folder / "lits"
    (folder / "LiTS").symlink_to("lits")  # one folder under two names
    assert resolve_data(str(folder), SOURCES)["lits"].samefile(folder / "lits")
    (folder / "LiTS").unlink()
    (folder / "LiTS").mkdir(exist_ok=True)
    if (folder / "LiTS").samefile(folder / "lits"):
        pytest.skip("the file system knows no capitals")
    with pytest.raises(DataError, match="two folders bear the name of one source") as err:
        resolve_data(str(folder), SOURCES)
    assert err.value.got == "LiTS, lits"
    (problem,) = check_folder(folder, SOURCES).problems
    assert "two folders bear the name of one source" in problem


def test_a_good_folder(folder: Path) -> None:
    report = check_folder(folder, SOURCES)
    text = "\n".join(report.lines())
    assert report.problems == []
    assert "btcv: 2 case(s)" in text
    assert "8x9x10 vox, 2 x 2 x 3 mm" in text
    assert "LPS" in text
    assert "HU -1000 to 40" in text
    assert "annotates 13; voxels: liver 8" in text
    assert "annotates 8; voxels: spleen 8" in text  # ids from 61 on
    assert "liver 8, liver_tumor 8" in text  # a tumor voxel is liver too
    assert "annotated, but without a voxel: spleen" in text
    assert text.endswith("no problems")


def test_a_list_of_partial_cases_that_are_not_there_is_remarked(folder: Path) -> None:
    assert not any("partial" in line for line in check_folder(folder, SOURCES).lines())
    for path in LAYOUTS["btcv"].paths(folder / "btcv", "61"):
        path.unlink()
    report = check_folder(folder, SOURCES)
    assert report.remarks == ["btcv: a [[source.partial]] names no case that is here (61, …)"]
    assert report.problems == []


def test_every_problem_is_listed(folder: Path) -> None:
    write(folder / "lits", "lits", "1", 9)
    image, _ = write(folder / "lits", "lits", "2")
    image.write_bytes(image.read_bytes()[:400])
    write(folder / "btcv", "btcv", "3", 6, low=-1000)
    air, _ = write(folder / "btcv", "btcv", "4", 6)
    nib.save(
        nib.Nifti1Image(np.full((8, 9, 10), -1000, np.int16), np.diag([-2.0, -2.0, 3.0, 1.0])), air
    )
    report = check_folder(folder, SOURCES)
    assert len(report.problems) == 3
    text = "\n".join(report.lines())
    for words in ("lits case 1", "9 (8 voxels)", "lits case 2", "volume-2.nii", "btcv case 4",
                  "no voxel above -175 HU", "3 problem(s)"):  # fmt: skip
        assert words in text


def test_a_folder_of_one_source(folder: Path) -> None:
    report = check_folder(folder / "lits", SOURCES)
    assert list(report.cases) == ["lits"]
    assert report.problems == []


def test_a_missing_label_is_a_problem(folder: Path) -> None:
    LAYOUTS["lits"].paths(folder / "lits", "0")[1].unlink()
    for place in (folder, folder / "lits"):
        report = check_folder(place, SOURCES)
        assert any("no label" in p for p in report.problems)


@pytest.mark.parametrize("name", ["absent", "."])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    report = check_folder(tmp_path / name, SOURCES)
    assert report.problems
    assert any("problem" in line for line in report.lines())


def test_values_that_are_no_hu_are_remarked(tmp_path: Path) -> None:
    write(tmp_path, "lits", "0", low=0)
    assert any("no air and no fat" in line for line in check_folder(tmp_path, SOURCES).lines())


@pytest.mark.parametrize("expect_hu", [False, True])
def test_images_that_rounding_would_ruin_are_a_problem_as_in_a_run(
    expect_hu: bool, tmp_path: Path
) -> None:
    for case in ("1", "2", "3"):
        path, _ = write(tmp_path, "btcv", case, 6)
        image = nib.load(path)
        values = (np.clip(image.get_fdata(), -175, 250) + 175) / 425
        nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), path)
    report = check_folder(tmp_path, SOURCES[:1])
    splits = {"btcv": Split(name="b", train=("1",), validation=("2",), test=("3",))}
    check_course(registry.benchmark("tumor_ext"), report, splits, expect_hu=expect_hu)
    rounded = [p for p in report.problems if "rounded to a few whole numbers" in p]
    assert len(rounded) == (not expect_hu)  # else they are no CTs, and the advice says this, too
    (said,) = rounded or [p for p in report.problems if "no CTs in HU" in p]
    assert "rescale = {slope = 1000}" in said
    assert "data.window_hu" in said


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_is_described_without_a_benchmark(
    layout: str, lay_out: Any, tmp_path: Path
) -> None:
    image = np.full((8, 9, 10), -1000, np.int16)
    image[2:6, 2:6, 2:6] = 40
    label = np.zeros(image.shape, np.uint8)
    label[3:5, 3:5, 3:5], label[5, 5, 5] = 1, 7
    masks = None
    if not LAYOUTS[layout].paths(Path(), "1")[1].suffix:
        masks = {"gallbladder": (1,), "face": (7,), "liver": (9,)}
    for case in ("1", "2"):
        lay_out(tmp_path, layout, case, image, label, masks=masks)
    report = check_layout(tmp_path, layout)
    text = "\n".join(report.lines())
    assert not report.problems
    assert f"{layout}: 2 case(s)" in text
    if masks:
        for words in (
            "masks: face (1 voxels), gallbladder (8 voxels), liver (0 voxels)",
            "mask gallbladder: in 2 of 2 case(s); clbench calls it 'gall_bladder'",
            "mask face: in 2 of 2 case(s); not in clbench's taxonomy",
        ):
            assert words in text
    else:
        assert "label values: 1 (8 voxels), 7 (1 voxels)" in text
        assert "label value 7: in 2 of 2 case(s)" in text
    LAYOUTS[layout].paths(tmp_path, "1")[0].write_bytes(b"no image")
    assert len(check_layout(tmp_path, layout).problems) == 1
    assert len(check_layout(tmp_path / "absent", layout).problems) == 1


def test_an_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'nnunet'"):
        check_layout(tmp_path, "nnunte")


def test_masks_say_what_each_case_annotates(lay_out: Any, tmp_path: Path) -> None:
    image = np.full((8, 9, 10), -1000, np.int16)
    image[2:6, 2:6, 2:6] = 40
    label = (image > 0).astype(np.uint8)
    every = registry.benchmark("body_ext_totalseg").sources[0].masks
    lay_out(tmp_path, "totalsegmentator", "s1", image, label, masks=dict.fromkeys(
        [n for n in every if n not in ("gall_bladder", "postcava", "intestine")], (1,)
    ))  # fmt: skip
    lay_out(tmp_path, "totalsegmentator", "s2", image, label, masks={"liver": (9,), "face": (1,)})
    lay_out(tmp_path, "totalsegmentator", "s3", image, label, masks={"face": (1,)})
    report = check_folder(tmp_path, registry.benchmark("body_ext_totalseg").sources)
    one, two, three = report.cases["totalseg"]
    assert "annotates 14; voxels:" in one.line
    assert "annotates 1; voxels: no structure" in two.line
    assert two.remarks == ("annotated, but without a voxel: liver",)
    assert "annotates no structure of the source" in three.remarks
    assert report.problems == []


def test_folders_by_name(folder: Path) -> None:
    report = check_data(f"lits={folder / 'lits'}", SOURCES)
    assert list(report.cases) == ["lits"]
    both = check_data(f"lits={folder / 'lits'},btcv={folder / 'btcv'}", SOURCES)
    assert set(both.cases) == {"lits", "btcv"}
    assert set(check_data(str(folder), SOURCES).cases) == {"lits", "btcv"}
    with pytest.raises(DataError, match="does not have"):
        check_data(f"lids={folder / 'lits'}", SOURCES)


def check_of(place: Path, **splits: Split) -> FolderReport:
    report = check_folder(place, SOURCES)
    check_course(registry.benchmark("tumor_ext"), report, splits)
    return report


def test_a_split_that_a_run_would_refuse_is_a_problem(folder: Path) -> None:
    organs, tumor = check_of(folder).problems
    assert "the split names 45 cases that the data folder does not hold" in organs
    assert "in the folder: 2, 61" in organs
    assert "missing: 1, 2, 3" in tumor
    mine = Split(name="mine", train=("2",), test=("61",))
    drawn = Split(name="drawn", draw=Draw(seed=0, train=2, test=1))
    report = check_of(folder, btcv=mine, lits=drawn)
    (problem,) = report.problems
    assert "too few patients for the drawn split" in problem
    assert any("its split of btcv: every case is here" in line for line in report.remarks)
    run = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert run.exit_code == 1
    assert "2 problem(s)" in run.output


def test_the_split_of_the_command_line_is_checked_and_other_sources_are_named(folder: Path) -> None:
    file = folder / "mine.toml"
    file.write_text('train = ["img0002"]\ntest = ["label0061.nii.gz"]\n')  # names of files
    words = ["data", "check", f"btcv={folder / 'btcv'}", "--split", f"btcv={file}"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "every case is here (1 train, 0 validation, 1 test)" in run.output
    assert "not looked at, and needed by a run: lits" in run.output
    file.write_text('train = ["2", "img0002"]\ntest = ["61"]\n')
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 1
    assert "a case is listed twice in train" in run.output


def test_one_image_twice_is_a_problem(folder: Path) -> None:
    one, _ = LAYOUTS["btcv"].paths(folder / "btcv", "2")
    twin, _ = write(folder / "btcv", "btcv", "3", 7)
    twin.write_bytes(one.read_bytes())
    splits = {"btcv": Split(name="b", train=("2",), test=("61", "3"))}
    report = check_folder(folder / "btcv", SOURCES)
    check_course(registry.benchmark("tumor_ext"), report, splits)
    (problem,) = report.problems
    assert "the same case is in train and in test" in problem
    assert "btcv case 3, test of step 'organs'" in problem


def test_a_folder_that_may_be_of_two_sources_is_asked_about(folder: Path) -> None:
    two = [SOURCES[1], replace(SOURCES[1], name="other")]
    (problem,) = check_folder(folder / "lits", two).problems
    assert "may be any of lits, other: write which, as lits=" in problem


def test_a_list_of_any_name_is_data_too(lay_out: Any, tmp_path: Path) -> None:
    image = np.full((8, 9, 10), -1000, np.int16)
    image[2:6, 2:6, 2:6] = 40
    lay_out(tmp_path, "msd", "liver_1", image, (image > 0).astype(np.uint8))
    (tmp_path / "dataset.json").rename(tmp_path / "fold0.json")
    source = replace(SOURCES[1], layout="msd")
    for report in (
        check_data(f"lits={tmp_path / 'fold0.json'}", [source]),
        check_folder(tmp_path / "fold0.json", [source]),
        check_layout(tmp_path / "fold0.json", "msd"),
    ):
        assert report.problems == []
        assert [[c.case for c in cases] for cases in report.cases.values()] == [["liver_1"]]


def test_the_command_takes_a_layout_or_a_benchmark(folder: Path) -> None:
    words = ["data", "check", str(folder / "lits"), "--layout", "lits"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "label value 2: in 1 of 1 case(s)" in run.output
    run = CliRunner().invoke(app, ["data", "check", str(folder), "--bench", "body_ext"])
    assert run.exit_code == 1
    assert "no case of the layout 'jhh'" in run.output


def test_label_names_of_dataset_json_and_a_lone_image_are_shown(
    lay_out: Any, tmp_path: Path
) -> None:
    image = np.full((8, 9, 10), -1000, np.int16)
    image[2:6, 2:6, 2:6] = 40
    lay_out(tmp_path, "nnunet", "a", image, (image > 0).astype(np.uint8))
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "hepar": 1}}')
    (tmp_path / "imagesTr" / "b_0000.nii.gz").touch()
    report = check_layout(tmp_path, "nnunet")
    assert "label value 1: in 1 of 1 case(s) ('hepar' in dataset.json)" in report.remarks
    assert any("case b has an image but no label" in line for line in report.remarks)
    assert not report.problems


def test_a_lone_image_is_a_problem_where_the_split_needs_it(folder: Path) -> None:
    LAYOUTS["btcv"].paths(folder / "btcv", "61")[1].unlink()
    fine = check_of(folder / "btcv", btcv=Split(name="s", train=("2",), test=("7",))).problems
    assert "missing: 7" in fine[0]
    (problem,) = check_of(
        folder / "btcv", btcv=Split(name="s", train=("2",), test=("61",))
    ).problems
    assert "the split names 1 case(s) of which one file is missing" in problem
    assert "case 61 has an image but no label" in problem


def test_what_a_draw_needs_is_asked_as_a_run_asks(lay_out: Any, tmp_path: Path) -> None:
    source = replace(
        SOURCES[1], layout="nnunet", labels={1: "liver_tumor"},
        sides={2: ("left_kidney", "right_kidney")},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    image = np.full((24, 24, 8), -1000, np.int16)
    image[2:22, 2:22] = rng.integers(-20, 60, (20, 20, 8))
    label = np.zeros(image.shape, np.uint8)
    label[4:6, 10:12, 3:5], label[18:20, 10:12, 3:5] = 1, 2  # one kidney, under the paired value
    lay_out(tmp_path, "nnunet", "a", image, label, np.diag([-2.0, -2.0, 3.0, 1.0]))
    report = check_folder(tmp_path, [source])
    files = report.files["lits"]["a"]
    assert not report.problems
    assert report.holds["lits", "a"] == VolumeCache(tmp_path / "c").holds(files, source)
    assert report.holds["lits", "a"] == {"liver", "liver_tumor", "left_kidney", "right_kidney"}


def test_values_of_one_pair_are_told_apart_together(lay_out: Any, tmp_path: Path) -> None:
    """Two tumors in one kidney, alone two large pieces on one side, lie in the kidney they touch."""
    pair = ("left_kidney", "right_kidney")
    source = replace(SOURCES[1], layout="nnunet", labels={}, sides={1: pair, 2: pair})
    rng = np.random.default_rng(0)
    image = np.full((24, 24, 12), -1000, np.int16)
    image[2:22, 2:22] = rng.integers(-20, 60, (20, 20, 12))
    label = np.zeros(image.shape, np.uint8)
    label[4:8, 8:14, 2:10], label[16:20, 8:14, 2:10] = 1, 1
    label[4:6, 8:10, 2:10], label[4:6, 12:14, 2:10] = 2, 2
    lay_out(tmp_path, "nnunet", "a", image, label, np.diag([-2.0, -2.0, 3.0, 1.0]))
    report = check_folder(tmp_path, [source])
    assert not report.problems
    case = report.files["lits"]["a"]
    volume, counts = read_bits(case, source, read_grid(case.image))
    assert counts == {0: label.size - 384, 1: 320, 2: 64}
    assert [int((volume & bit > 0).sum()) for bit in (1, 2)] == [192, 192]
