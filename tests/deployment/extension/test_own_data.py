"""Annotated CTs of a user's own: what labels mean, and who trains and tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nifti_files import body

from clbench.data.cache import VolumeCache
from clbench.deployment.extension.own_data import (
    OwnData,
    new_structures,
    read_old_data,
    read_own_data,
    source_name,
)
from clbench.errors import DataError, SettingError, SpecError


@pytest.fixture
def folder(tmp_path: Path, lay_out) -> Path:
    """Ten cases in nnU-Net's layout, each with liver (1) and, but for two, liver tumor (2)."""
    image, label = body()
    for i in range(10):
        one = label.copy()
        if i < 2:
            one[one == 2] = 1
        lay_out(tmp_path / "My CTs", "nnunet", f"p{i // 2}_{i}", image + i, one)
    return tmp_path / "My CTs"


def read(folder: Path, learn: tuple[str, ...] = ("liver_tumor",), **more) -> OwnData:
    cache = VolumeCache(folder.parent / "cache")
    return read_own_data(folder, learn=learn, name="own", cache=cache, **more)


def listed(folder: Path, labels: dict[str, object]) -> Path:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_a_fifth_is_for_test_and_cases_without_the_structure_are_for_training(folder: Path) -> None:
    got = read(listed(folder, {"background": 0, "liver": 1, "liver_tumor": 2, "meal": 3}))
    parts = [len(p) for p in (got.split.train, got.split.validation, got.split.test)]
    assert parts == [7, 1, 2]
    assert {"p0_0", "p0_1"} <= set(got.split.train)
    assert got.source.labels == {1: "liver", 2: "liver_tumor"}
    assert got.source.ignored == (3,)
    assert got.notes == ("not used, no structure is called so: meal",)


def test_patients_are_not_divided(folder: Path) -> None:
    got = read(listed(folder, {"liver": 1, "liver_tumor": 2}), patient=r"(p\d+)_.*")
    of = [{c.split("_")[0] for c in p} for p in (got.split.train, got.split.test)]
    assert not of[0] & of[1]
    assert len(got.split.test) == 2


def test_one_value_needs_no_list_and_several_do(folder: Path) -> None:
    with pytest.raises(DataError, match="nothing says what the label values mean") as err:
        read(folder)
    assert err.match("values 0, 1, 2 in 10 cases")
    for path in (folder / "labelsTr").iterdir():
        import nibabel as nib

        file = nib.load(path)
        nib.save(nib.Nifti1Image((np.asarray(file.dataobj) == 2) * np.uint8(7), file.affine), path)
    assert read(folder).source.labels == {7: "liver_tumor"}


def test_one_value_for_two_structures_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="stands for several structures"):
        read(listed(folder, {"liver": [1, 2], "spleen": [2], "liver_tumor": 2}))


def test_masks_per_structure_are_named_by_their_files(tmp_path: Path, lay_out) -> None:
    image, label = body()
    for i in range(3):
        masks = {"liver": (1, 2), "liver_tumor": (2,), "table": (3,)}
        lay_out(tmp_path / "d", "totalsegmentator", f"s{i}", image + i, label, masks=masks)
    got = read(tmp_path / "d")
    assert got.source.layout == "totalsegmentator"
    assert got.source.masks == {"liver": "liver", "liver_tumor": "liver_tumor"}
    with pytest.raises(SettingError, match="no label values"):
        read(tmp_path / "d", labels=tmp_path / "l.json")
    assert got.notes == ("not used, no structure is called so: table",)


def test_old_data_tests_the_structures_it_annotates(folder: Path) -> None:
    listed(folder, {"background": 0, "liver": 1, "liver_tumor": 2, "meal": 3})
    old = read_old_data(folder, known=("spleen", "liver"), name="old")
    assert (old.annotated, len(old.cases)) == (("liver",), 10)
    assert old.notes == ("not used, no structure is called so: meal",)
    assert old.source_of(("liver",)) == old.source
    source = old.source_of(("spleen", "liver", "aorta"))  # what the step of the model learned
    assert source.labels == {1: "liver", 2: "liver_tumor", 4: "spleen", 5: "aorta"}
    assert set(source.annotated(old.cases[0])) == {"liver", "liver_tumor"}
    with pytest.raises(DataError, match="no structure that the model knows") as err:
        read_old_data(folder, known=("spleen",), name="old")
    assert err.match("liver, liver_tumor; not used")
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match="nothing says what the label values mean"):
        read_old_data(folder, known=("liver",), name="old")


def test_old_data_may_have_a_mask_per_structure(tmp_path: Path, lay_out) -> None:
    image, label = body()
    lay_out(tmp_path / "d", "totalsegmentator", "s1", image, label, masks={"liver": (1, 2)})
    old = read_old_data(tmp_path / "d", known=("spleen", "liver"), name="old")
    source = old.source_of(("spleen", "liver"))
    assert source.structures == ("liver", "spleen")
    assert source.annotated("s1") == ("liver",)


def test_new_structures_are_declared_with_what_their_name_says() -> None:
    names, declared = new_structures(["Spleen", "odd_vein", "odd_thing"])
    assert names == ("spleen", "odd_vein", "odd_thing")
    assert [(s.name, s.kind) for s in declared] == [("odd_vein", "vessel"), ("odd_thing", "organ")]
    assert new_structures(["odd_vein"], kind="vessel")[1] == declared[:1]  # said once more
    with pytest.raises(SettingError, match="declared already, and otherwise"):
        new_structures(["odd_vein"], kind="cyst")
    with pytest.raises(SettingError, match="named twice"):
        new_structures(["spleen", "spleen"])
    with pytest.raises(SpecError, match="snake case"):
        new_structures(["Strange Mass"])
    with pytest.raises(SpecError, match="kind"):
        new_structures(["odd_plant"], kind="plant")


def test_a_source_is_called_after_its_folder() -> None:
    assert source_name(Path("My CTs (2024)"), []) == "my_cts_2024"
    assert source_name(Path("btcv"), ["btcv", "btcv_2"]) == "btcv_3"
