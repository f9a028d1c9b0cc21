"""Names and paths of configuration files: none leads out of its folder, and honest ones go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clbench.data.external_masks import label_map
from clbench.data.layouts import LAYOUTS
from clbench.errors import ClbenchError, DataError, SpecError
from clbench.report.paper.build import build
from clbench.run.plan import RunSettings, resolve
from clbench.spec.benchmark import Partial, Source
from clbench.spec.names import need_case, need_inner, need_name
from clbench.spec.splits import Draw, Split
from clbench.spec.toml import expand_ids, load_benchmark, load_split

OUTSIDE = [
    "../../x", "/abs", "a/b", "a\\b", "..", ".", "", ".hidden", " 5", "5 ", "a\0b", "a\nb",
    "a\x1b[2Jb", "\u202egpj.exe", "x" * 121,
]  # fmt: skip


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_case_id_that_is_no_file_name_is_refused(case: str) -> None:
    makes: list[Callable[[], object]] = [
        lambda: Split(name="s", train=(case,), test=("1",)),
        lambda: Split(name="s", train=("1",), validation=(case,), test=("2",)),
        lambda: Split(name="s", train=("1",), test=(case,)),
        lambda: Split(name="s", draw=Draw(seed=0, train=1, test=1, without=(case,))),
        lambda: Source(name="a", title="", layout="msd", labels={1: "liver"},
                       partial=(Partial(cases=(case,), annotates=("liver",)),)),
        lambda: Source(name="a", title="", layout="totalsegmentator", masks={case: "liver"}),
    ]  # fmt: skip
    for make in makes:
        with pytest.raises(SpecError, match="no plain part of a file's name") as err:
            make()
        assert {"where", "expected", "got", "next_step"} <= set(err.value.fields())
        assert "\x1b" not in str(err.value)


@pytest.mark.parametrize(
    "case",
    ["0001", "img0001", "liver_12", "FELIX5105", "BDMAP_00000001", "s0864", "a.b", "Case 7 (art)",
     "1.2.840.113619.2.5", "Jürgen-3", "病例1", "~x", "-5", "x" * 120],
)  # fmt: skip
def test_the_ids_data_sets_use_are_allowed(case: str) -> None:
    assert Split(name="s", train=(case,), test=("t",)).cases == (case, "t")


@pytest.mark.parametrize("name", [*OUTSIDE, "_shared", "a b", "a=b", "a,b", "~", "-x", "ä"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(SpecError):
        Source(name=name, title="", layout="msd", labels={1: "liver"})
    with pytest.raises(SpecError, match="letters, digits"):
        resolve(RunSettings(bench="tumor_ext", strategy=name))
    need_name("lwf_ct-2.0+x", None)


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "~/x", "C:\\x", "C:x", "a\\..\\x", "", ".", "a\0", 3],
)
def test_a_path_of_a_configuration_file_stays_inside(path: object) -> None:
    with pytest.raises(SpecError, match="outside its folder"):
        need_inner(path, "file.toml")
    need_inner("splits/a.toml", "file.toml")
    need_inner("./a..b.toml", "file.toml")


BENCH = """
name = "mine"
version = 1
title = ""
[[source]]
name = "a"
title = ""
layout = "msd"
labels = {1 = "liver"}
[[step]]
name = "one"
source = "a"
learns = ["liver"]
split = "FILE"
"""
SPLIT = 'train = ["1"]\ntest = ["2"]\n'


def test_a_benchmark_reads_splits_below_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "outside.toml").write_text(SPLIT)
    inner = tmp_path / "inner"
    (inner / "splits").mkdir(parents=True)
    (inner / "splits" / "s.toml").write_text(SPLIT)
    (inner / "link.toml").symlink_to(tmp_path / "outside.toml")
    (inner / "own.toml").symlink_to("splits/s.toml")
    path = inner / "bench.toml"
    for good in ("splits/s.toml", "./splits/s.toml", "own.toml"):
        path.write_text(BENCH.replace("FILE", good))
        assert load_benchmark(path).steps[0].split.train == ("1",)
    for bad in ("../outside.toml", str(tmp_path / "outside.toml"), "link.toml"):
        path.write_text(BENCH.replace("FILE", bad))
        with pytest.raises(SpecError, match="outside"):
            load_benchmark(path)
    path.write_text(BENCH.replace('"FILE"', '{train = ["../../x"], test = ["2"]}'))
    with pytest.raises(SpecError, match="no plain part"):
        load_benchmark(path)


def test_a_split_file_of_the_user_is_checked_as_well(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('train = ["a/../../b"]\ntest = ["2"]\n')
    with pytest.raises(SpecError, match="no plain part"):
        load_split(path)
    with pytest.raises(SpecError, match="too long"):
        expand_ids(["1..99999999999"], path)
    with pytest.raises(SpecError, match="too long"):
        expand_ids(["1.." + "9" * 5000], path)
    assert expand_ids(["²..³"], path) == ("²..³",)  # digits to some, numbers to nobody
    assert expand_ids(["1-3", "12-1"], path) == ("1-3", "12-1")  # patient and visit
    assert expand_ids(["008..010", 7], path) == ("008", "009", "010", "7")
    with pytest.raises(SpecError, match="form of a range"):
        need_case("1..3", path)
    for no_id in (1.10, True, {"a": 1}):
        with pytest.raises(SpecError, match="neither text nor a whole number"):
            expand_ids([no_id], path)


@pytest.mark.parametrize("field", ["image", "label"])
@pytest.mark.parametrize("bad", ["../secret.nii", "/etc/passwd", "labelsTr/../../secret.nii"])
def test_a_list_of_images_names_files_below_its_folder(
    field: str, bad: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
        (folder / sub / "a.nii").touch()
    (tmp_path / "secret.nii").touch()
    entry = {"image": "./imagesTr/a.nii", "label": "./labelsTr/a.nii"}
    place = folder / "dataset.json"
    place.write_text(json.dumps({"training": [entry]}))
    assert list(LAYOUTS["msd"].find(folder)) == ["a"]
    place.write_text(json.dumps({"training": [{**entry, field: bad}]}))
    with pytest.raises(DataError, match="outside its folder") as err:
        LAYOUTS["msd"].find(folder)
    assert {"where", "expected", "got", "next_step"} <= set(err.value.fields())


@pytest.mark.parametrize("value", [-1, 70000, 1e3, True, "3", None, [70000]])
def test_label_values_of_a_list_are_small_whole_numbers(value: object, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, "liver": value}}))
    with pytest.raises(ClbenchError):
        label_map(path)
    with pytest.raises(SpecError, match="too large"):
        Source(name="a", title="", layout="msd", labels={70000: "liver"})


def test_a_list_of_tables_writes_and_deletes_in_its_folder_only(tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.touch()
    plan = tmp_path / "paper.toml"
    study = '[study]\nresults = "results"\nseeds = [0]\nref = "a"\nscoring = "strict"\n'
    table = '[[table]]\nfile = "{0}"\nnumber = 10\nbench = "tumor_ext"\nsource = "both"\n'
    for name in ("../keep", "*", str(tmp_path / "keep")):
        plan.write_text(study + table.format(name))
        with pytest.raises(SpecError, match="letters, digits"):
            list(build(plan, tmp_path / "out"))
    plan.write_text(study.replace('"results"', '"../elsewhere"') + table.format("t"))
    with pytest.raises(SpecError, match="outside its folder"):
        list(build(plan, tmp_path / "out"))
    assert keep.exists()


def test_any_text_is_allowed_or_refused_and_never_leaves_a_folder(tmp_path: Path) -> None:
    """The two answers agree with what the file system makes of a name."""
    for point in range(0x400):
        for text in (chr(point), f"a{chr(point)}b"):
            try:
                need_case(text, None)
            except SpecError:
                continue
            assert (tmp_path / text).parent == tmp_path
            assert Path(text).name == text
