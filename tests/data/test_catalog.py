"""Data against splits: what is missing, what is twice, and what the phantom may give."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from clbench.data.cache import Looks, VolumeCache
from clbench.data.catalog import Catalog, build_catalog, exam_cases
from clbench.data.checks.course_splits import chosen
from clbench.data.layouts import LAYOUTS
from clbench.data.phantom.generate import domain_of
from clbench.errors import (
    ClbenchError,
    DataError,
    SettingError,
    SpecError,
    TrainingError,
    UnknownName,
)
from clbench.spec import registry
from clbench.spec.benchmark import (
    Benchmark,
    ExternalTest,
    Preprocessing,
    Rescale,
    Source,
)
from clbench.spec.settings import load_profile
from clbench.spec.splits import Draw, Split

BENCH = registry.benchmark("tumor_ext")
SMOKE = load_profile("smoke")
BTCV = Split(name="b", train=("1", "2"), validation=(), test=("3",))
LITS = Split(name="l", train=("0",), validation=(), test=("1",))


def write(folder: Path, layout: str, case: str, *, seed: int, values: tuple[int, ...]) -> Path:
    """A box of tissue in air, with one small box per label value."""
    rng = np.random.default_rng(seed)
    image = np.full((20, 20, 20), -1000, dtype=np.int16)
    image[2:18, 2:18, 2:18] = rng.integers(0, 100, (16, 16, 16))
    label = np.zeros(image.shape, dtype=np.uint8)
    for i, value in enumerate(values):
        label[3 + i, 4:8, 4:8] = value
    image_path, label_path = LAYOUTS[layout].paths(folder, case)
    for path, array in ((image_path, image), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0])), path)
    return image_path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for case in ("1", "2", "3"):
        write(folder / "btcv", "btcv", case, seed=int(case), values=(1, 2, 6))
    for case in ("0", "1"):
        write(folder / "lits", "lits", case, seed=100 + int(case), values=(1, 2))
    return folder


def catalog(folder: Path, tmp_path: Path, /, bench: Benchmark = BENCH, **more: Any) -> Catalog:
    return build_catalog(
        bench,
        SMOKE.preprocessing(BENCH.preprocessing),
        cache_root=tmp_path / "cache",
        phantom=SMOKE.phantom,
        **{"data": str(folder), "splits": {"btcv": BTCV, "lits": LITS}, **more},
    )


def test_real_folders_are_found_and_opened_with_a_ledger(data: Path, tmp_path: Path) -> None:
    found = catalog(data, tmp_path)
    assert found.patients
    volume = found.open(1, "1", "train")
    assert (volume.source, volume.case) == ("btcv", "1")
    assert found.open(1, "1", "train") is volume
    found.step, found.past = 2, "images"
    found.open(1, "2", "train")
    found.open(2, "1", "test")
    assert found.opened() == {
        "1": {"train": ["btcv/1"]},
        "2": {"train": ["btcv/2"], "test": ["lits/1"]},
    }


def test_named_folders_and_one_folder_are_the_same_data(data: Path, tmp_path: Path) -> None:
    named = catalog(data, tmp_path, data=f"btcv={data / 'btcv'},lits={data / 'lits'}")
    assert named.fingerprint == catalog(data, tmp_path).fingerprint


def test_the_fingerprint_follows_the_files(data: Path, tmp_path: Path) -> None:
    before = catalog(data, tmp_path).fingerprint
    write(data / "btcv", "btcv", "2", seed=77, values=(1, 2, 6))
    assert catalog(data, tmp_path).fingerprint != before


def test_a_file_that_changes_while_a_run_goes_on_is_found(data: Path, tmp_path: Path) -> None:
    """Else strict scores would be of one truth, and scores on the model's grid of another."""
    made = catalog(data, tmp_path)
    case = made.splits[0].test[0]
    files = made.files["btcv"][case]
    assert isinstance(files.label, Path)
    made.open(1, case, "test")
    before = files.label.read_bytes()
    nib.save(nib.Nifti1Image(np.ones((20, 20, 20), np.uint8), np.diag([3, 3, 3, 1])), files.label)
    with pytest.raises(DataError, match="changed since the run began") as err:
        made.open(1, case, "test")
    assert str(files.label) in str(err.value)
    files.label.write_bytes(before)
    made.open(1, case, "test")


def test_cases_are_looked_at_ahead_of_the_questions(data: Path, tmp_path: Path) -> None:
    """Labels of those that a rule draws from, then all of every case of the course."""
    asked: list[tuple[str, list[str]]] = []

    def look(cache: VolumeCache, cases: Any, what: Looks) -> None:
        asked.append((what, sorted(f"{source.name}/{files.case}" for _, source, files in cases)))
        for _, source, files in cases:
            cache.look(files, source, what)

    drawn = Split(
        name="b",
        draw=Draw(seed=0, train=1, validation=0, test=1, needs=("spleen",), without=("2",)),
    )
    splits = {"btcv": drawn, "lits": LITS}
    made = catalog(data, tmp_path, splits=splits, look=look)
    of_all = ["btcv/1", "btcv/3", "lits/0", "lits/1"]
    assert asked == [("values", ["btcv/1", "btcv/3"]), ("notes", of_all)]
    assert made.fingerprint == catalog(data, tmp_path / "other", splits=splits).fingerprint
    catalog(data, tmp_path, splits=splits, look=look, expect_hu=None)
    assert asked[-1] == ("images", of_all)


def test_a_test_case_is_never_opened_for_training(data: Path, tmp_path: Path) -> None:
    found = catalog(data, tmp_path)
    with pytest.raises(TrainingError, match="a test case"):
        found.open(1, "3", "train")


def phantom_of(bench: Benchmark, tmp_path: Path) -> Catalog:
    """The smallest phantom of a course."""
    return build_catalog(
        bench,
        SMOKE.preprocessing(bench.preprocessing),
        data=None,
        cache_root=tmp_path,
        phantom=replace(SMOKE.phantom, train=1, validation=0, test=1),
    )


def with_clinic(split: Split) -> Benchmark:
    """The course, tested on a further source of another layout as well."""
    clinic = Source(name="clinic", title="c", layout="amos", labels={6: "liver"})
    return replace(
        BENCH,
        sources=(*BENCH.sources, clinic),
        external_tests=(ExternalTest(source="clinic", split=split),),
    )


@pytest.mark.parametrize("purpose", ["train", "validation", "pseudo", "trace", "diagnosis"])
def test_an_external_case_is_opened_to_be_tested_on_alone(
    data: Path, tmp_path: Path, purpose: Any
) -> None:
    write(data / "clinic", "amos", "5", seed=7, values=(6,))
    found = catalog(data, tmp_path, with_clinic(Split(name="e", test=("5",))))
    found.past = "images"
    with pytest.raises(TrainingError, match="a test case"):
        found.open(3, "5", purpose)
    assert found.open(3, "5", "test").source == "clinic"
    assert found.opened() == {"1": {"test": ["clinic/5"]}}
    assert [test[1:] for test in exam_cases(found)][-1] == ("clinic", "5")


def test_an_external_image_that_is_trained_on_elsewhere_is_refused(
    data: Path, tmp_path: Path
) -> None:
    write(data / "clinic", "amos", "5", seed=1, values=(6,))  # case 1 of the first source
    with pytest.raises(DataError, match="same case is in train and in test"):
        catalog(data, tmp_path, with_clinic(Split(name="e", test=("5",))))


def test_a_split_named_for_an_external_source_may_not_train(data: Path, tmp_path: Path) -> None:
    write(data / "clinic", "amos", "5", seed=7, values=(6,))
    course = with_clinic(Split(name="e", test=("5",)))
    splits = {"btcv": BTCV, "lits": LITS, "clinic": Split(name="x", train=("4",), test=("5",))}
    with pytest.raises(SpecError, match="cases to learn from"):
        catalog(data, tmp_path, course, splits=splits)


def test_phantoms_of_a_course_stay_as_they_are_beside_an_external_source(tmp_path: Path) -> None:
    course = with_clinic(Split(name="e", draw=Draw(seed=1, test=1)))
    plain, beside = (phantom_of(b, tmp_path) for b in (BENCH, course))
    assert beside.splits == plain.splits
    assert [split.test for split in beside.external_splits] == [("3000",)]
    assert domain_of(course.source("clinic")) not in map(domain_of, BENCH.sources)


def test_another_order_draws_the_same_phantom_cases(tmp_path: Path) -> None:
    bench = registry.benchmark("body_ext")
    ordered = bench.in_order((3, 1, 2))
    plain, other = (phantom_of(b, tmp_path) for b in (bench, ordered))
    assert other.splits == tuple(plain.splits[i] for i in (2, 0, 1))
    assert other.fingerprint == plain.fingerprint


def test_another_order_deals_a_users_split_as_before() -> None:
    bench = registry.benchmark("body_ext")
    rule = {"jhh": Split(name="r", draw=Draw(seed=1, train=1, test=1))}
    blocks = [split.draw.part for split in chosen(bench.in_order((3, 1, 2)), rule)]  # type: ignore[union-attr]
    assert blocks == [3, 1, 2]


def test_validation_opens_its_own_cases_and_no_others(data: Path, tmp_path: Path) -> None:
    split = replace(BTCV, train=("1",), validation=("2",))
    found = catalog(data, tmp_path, splits={"btcv": split, "lits": LITS})
    found.open(1, "2", "validation")
    assert found.opened() == {"1": {"validation": ["btcv/2"]}}
    with pytest.raises(TrainingError, match="without declaring"):
        found.open(1, "2", "train")  # never trained on
    with pytest.raises(TrainingError, match="without declaring"):
        found.open(1, "1", "validation")
    with pytest.raises(TrainingError, match="a test case"):
        found.open(1, "3", "validation")
    found.step = 2
    with pytest.raises(TrainingError, match="without declaring"):
        found.open(1, "2", "validation")


def test_past_data_is_refused_unless_declared(data: Path, tmp_path: Path) -> None:
    found = catalog(data, tmp_path)
    found.step = 2
    with pytest.raises(TrainingError, match="without declaring"):
        found.open(1, "1", "train")


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        (
            {"splits": {"btcv": replace(BTCV, train=("1", "7", "9")), "lits": LITS}},
            DataError,
            ["2 cases", "missing: 7, 9", "--split btcv="],
        ),
        ({"splits": {"btcv": BTCV, "lids": LITS}}, SettingError, ["'lids'", "btcv, lits"]),
        ({"data": "/absent/folder"}, DataError, ["/absent/folder"]),
    ],
)
def test_what_does_not_fit_is_refused(
    more: dict[str, Any], kind: type[ClbenchError], says: list[str], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as err:
        catalog(data, tmp_path, **more)
    for words in says:
        assert words in str(err.value)


def test_the_same_case_in_train_and_test_by_id() -> None:
    with pytest.raises(SpecError, match="the same case stands in train and test"):
        replace(BTCV, test=("1",))


@pytest.mark.parametrize("how", ["copied", "turned", "as float"])
def test_the_same_case_in_train_and_test_by_content(how: str, data: Path, tmp_path: Path) -> None:
    one = LAYOUTS["btcv"].paths(data / "btcv", "1")[0]
    three = LAYOUTS["btcv"].paths(data / "btcv", "3")[0]
    scan = nib.load(one)
    if how == "copied":
        three.write_bytes(one.read_bytes())
    elif how == "turned":
        codes = nib.orientations.axcodes2ornt(("L", "P", "S"))
        nib.save(scan.as_reoriented(codes), three)
        label = LAYOUTS["btcv"].paths(data / "btcv", "3")[1]
        nib.save(nib.load(label).as_reoriented(codes), label)
    else:
        nib.save(
            nib.Nifti1Image(np.asanyarray(scan.dataobj).astype(np.float32), scan.affine), three
        )
    with pytest.raises(DataError) as err:
        catalog(data, tmp_path)
    assert "the same case is in train and in test" in str(err.value)
    assert "btcv case 3" in str(err.value)
    assert "btcv case 1" in str(err.value)


def test_the_same_case_in_train_of_one_step_and_test_of_another(data: Path, tmp_path: Path) -> None:
    bench = replace(
        BENCH,
        steps=(
            replace(BENCH.steps[0], learns=("spleen",)),
            replace(BENCH.steps[0], name="more", learns=("right_kidney",)),
        ),
        groups={},
    )
    splits = {"organs": BTCV, "more": Split(name="m", train=("3",), test=("2",))}
    with pytest.raises(DataError, match="the same patient is in train and in test") as err:
        catalog(data, tmp_path, bench=bench, splits=splits)
    for words in ("btcv case 3, test of step 'organs'", "case 3 of step 'more'"):
        assert words in str(err.value)


def test_a_validation_case_of_one_step_is_no_test_case_of_another(
    data: Path, tmp_path: Path
) -> None:
    for case, seed in (("4", 4), ("5", 3)):  # 5 is 3 under another name
        write(data / "btcv", "btcv", case, seed=seed, values=(1, 2, 6))
    steps = tuple(replace(BENCH.steps[0], name=n, learns=(n,)) for n in ("spleen", "liver"))
    bench = replace(BENCH, steps=steps, groups={})
    for validation, says in (("3", "the same patient"), ("5", "the same case")):
        splits = {
            "spleen": Split(name="s", train=("1",), validation=(validation,), test=("2",)),
            "liver": Split(name="l", train=("4",), test=("3",)),
        }
        with pytest.raises(DataError, match=f"{says} is in validation and in test"):
            catalog(data, tmp_path, bench=bench, splits=splits)


@pytest.mark.parametrize("step", ["spleen", "liver"])
def test_a_patient_trained_on_validates_no_step(step: str, data: Path, tmp_path: Path) -> None:
    """Two scans of one patient: 1 is trained on in the first step, 11 validates a step."""
    for case, seed in (("4", 4), ("5", 5), ("11", 11)):
        write(data / "btcv", "btcv", case, seed=seed, values=(1, 2, 6))
    steps = tuple(replace(BENCH.steps[0], name=n, learns=(n,)) for n in ("spleen", "liver"))
    source = replace(BENCH.sources[0], patient=r"(\d)")
    bench = replace(BENCH, steps=steps, groups={}, sources=(source, BENCH.sources[1]))
    splits = {
        "spleen": Split(name="s", train=("1",), test=("2",)),
        "liver": Split(name="l", train=("4",), test=("3",)),
    }
    catalog(data, tmp_path, bench=bench, splits=splits)
    splits[step] = replace(splits[step], validation=("11",))
    with pytest.raises(DataError, match="the same patient is in train and in validation"):
        catalog(data, tmp_path, bench=bench, splits=splits)


def test_two_scans_of_a_patient_never_stand_in_train_and_test(data: Path, tmp_path: Path) -> None:
    source = replace(BENCH.sources[0], patient=r"(\d)")  # 1 and 11 are one patient
    bench = replace(BENCH, sources=(source, BENCH.sources[1]))
    write(data / "btcv", "btcv", "11", seed=11, values=(1, 2, 6))
    splits = {"btcv": replace(BTCV, test=("11",)), "lits": LITS}
    with pytest.raises(DataError, match="the same patient") as err:
        catalog(data, tmp_path, bench=bench, splits=splits)
    assert "patient 1 is trained on as case 1" in str(err.value)
    foreign = replace(bench, sources=(replace(source, patient=r"(P\d)"), BENCH.sources[1]))
    with pytest.raises(SpecError, match="does not match the source's `patient`"):
        catalog(data, tmp_path, bench=foreign)


def test_a_step_none_of_whose_cases_annotates_its_lesson(data: Path, tmp_path: Path) -> None:
    write(data / "btcv", "btcv", "61", seed=61, values=(1, 6))
    splits = {"btcv": replace(BTCV, train=("61",)), "lits": LITS}
    with pytest.raises(DataError, match="no training case of the step annotates") as err:
        catalog(data, tmp_path, splits=splits)
    assert "right_kidney" in str(err.value)
    assert "step 'organs'" in str(err.value)


def test_a_split_is_drawn_from_the_cases_that_hold_what_it_needs(
    data: Path, tmp_path: Path
) -> None:
    for case in range(4, 12):
        write(data / "btcv", "btcv", str(case), seed=case, values=(1, 6) if case % 2 else (1, 2, 6))
    rule = Draw(seed=0, train=2, test=1, needs=("right_kidney",))
    splits = {"btcv": Split(name="b", draw=rule), "lits": LITS}
    drawn = catalog(data, tmp_path, splits=splits).splits[0]
    assert drawn.draw is None
    assert set(drawn.cases) <= {"1", "2", "3", "4", "6", "8", "10"}
    assert catalog(data, tmp_path, splits=splits).splits[0] == drawn
    assert list((tmp_path / "cache" / "volumes" / "values").iterdir())  # looked at once
    for part, says in (({"needs": ("colon",)}, "does not have"), ({"test": 9}, "too few patients")):
        with pytest.raises(ClbenchError, match=says):
            catalog(
                data, tmp_path,
                splits={**splits, "btcv": Split(name="b", draw=replace(rule, **part))},  # type: ignore[arg-type]
            )  # fmt: skip


def test_steps_of_one_source_are_dealt_blocks_of_a_users_rule(data: Path, tmp_path: Path) -> None:
    for case in range(4, 8):
        write(data / "btcv", "btcv", str(case), seed=case, values=(1, 2, 6))
    bench = replace(
        BENCH,
        steps=tuple(
            replace(BENCH.steps[0], name=name, learns=(name,)) for name in ("spleen", "liver")
        ),
        groups={},
    )
    splits = {"btcv": Split(name="b", draw=Draw(seed=0, train=2, test=1))}
    one, two = catalog(data, tmp_path, bench=bench, splits=splits).splits
    assert len(one.cases) == len(two.cases) == 3
    assert not set(one.cases) & set(two.cases)


def test_an_unknown_layout_names_its_source(data: Path, tmp_path: Path) -> None:
    bad = replace(BENCH.sources[0], layout="btvc")
    with pytest.raises(UnknownName, match="no layout called 'btvc'") as err:
        catalog(data, tmp_path, bench=replace(BENCH, sources=(bad, BENCH.sources[1])))
    assert "source 'btcv'" in str(err.value)
    assert "did you mean 'btcv'" in str(err.value)
    with pytest.raises(UnknownName, match="no layout called 'btvc'"):  # on the phantom, too
        catalog(
            data, tmp_path / "p", data=None, splits=None,
            bench=replace(BENCH, sources=(bad, BENCH.sources[1])),
        )  # fmt: skip
    assert not (tmp_path / "p").exists()


def test_a_rule_needs_data_to_draw_from(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="needs data to draw from"):
        catalog(
            tmp_path, tmp_path, data=None,
            splits={"btcv": Split(name="b", draw=Draw(seed=0, train=2, test=1))},
        )  # fmt: skip


def test_a_label_without_any_structure_is_a_valid_case(data: Path, tmp_path: Path) -> None:
    write(data / "lits", "lits", "0", seed=10, values=())
    found = catalog(data, tmp_path)
    found.step = 2
    volume = found.open(2, "0", "train")
    assert volume.annotated == {"liver", "liver_tumor"}
    assert not volume.bits.any()


def test_a_phantom_split_cannot_give_more_than_it_has(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as err:
        build_catalog(
            BENCH,
            SMOKE.preprocessing(BENCH.preprocessing),
            data=None,
            cache_root=tmp_path,
            phantom=replace(SMOKE.phantom, test=99),
        )
    assert "phantom.test" in str(err.value)


def test_a_drawn_split_is_told_with_the_patients_it_is_drawn_from(
    data: Path, tmp_path: Path
) -> None:
    for case in range(4, 7):
        write(data / "btcv", "btcv", str(case), seed=case, values=(1, 2, 6))
    rule = Draw(seed=0, train=2, test=1, without=("img0004",))
    found = catalog(data, tmp_path, splits={"btcv": Split(name="b", draw=rule), "lits": LITS})
    (said,) = [w for w in found.warnings() if w["kind"] == "drawn split"]
    assert "step 'organs' is drawn from 5 patients of btcv" in str(said["message"])
    listed = catalog(data, tmp_path, splits={"btcv": found.splits[0], "lits": LITS})
    assert not [w for w in listed.warnings() if w["kind"] == "drawn split"]


def scaled(folder: Path, *, offset: float, divisor: float) -> None:
    """Turn every image of a folder into real numbers: (HU + offset) / divisor, as 32-bit floats."""
    for path in folder.rglob("*.nii*"):
        if not path.name.startswith(("label", "segmentation")):
            image = nib.load(path)
            values = (np.clip(image.get_fdata(), -175, 250) + offset) / divisor
            nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), path)


@pytest.mark.parametrize(
    ("offset", "divisor", "window"), [(175, 425, (0, 1)), (-40, 30, (-3, 3)), (175, 425, None)]
)
def test_images_of_fractions_are_not_rounded_to_a_mask(
    offset: float, divisor: float, window: tuple[float, float] | None, data: Path, tmp_path: Path
) -> None:
    """And what the error advises keeps their gray levels."""
    scaled(data / "btcv", offset=offset, divisor=divisor)
    pre = SMOKE.preprocessing(BENCH.preprocessing)
    narrow = pre if window is None else replace(pre, window_hu=window)

    def made(bench: Benchmark, preprocessing: Preprocessing) -> Catalog:
        return build_catalog(
            bench, preprocessing, data=f"btcv={data / 'btcv'}",
            cache_root=tmp_path / "cache", phantom=SMOKE.phantom, expect_hu=False,
            splits={"btcv": BTCV},
        )  # fmt: skip

    organs = replace(BENCH, sources=BENCH.sources[:1], steps=BENCH.steps[:1], groups={})
    with pytest.raises(DataError, match="rounded to a few whole numbers") as err:
        made(organs, narrow)
    advice = str(err.value.next_step)
    assert "rescale = {slope = 1000} in the [[source]] 'btcv'" in advice
    low, high = re.findall(r"data.window_hu=(-?\d+),(-?\d+)", advice)[0]
    thousandths = replace(organs.sources[0], rescale=Rescale(slope=1000))
    found = made(
        replace(organs, sources=(thousandths,)), replace(pre, window_hu=(int(low), int(high)))
    )
    volume = found.open(1, "1", "train")
    seen = np.unique(volume.windowed(np.s_[:, :, :]))
    assert len(seen) > 30
    assert np.ptp(seen) > 0.1


def test_real_numbers_that_fill_the_window_and_whole_ones_are_taken(
    data: Path, tmp_path: Path
) -> None:
    scaled(data / "btcv", offset=0, divisor=1)
    organs = replace(BENCH, sources=BENCH.sources[:1], steps=BENCH.steps[:1], groups={})
    pre = SMOKE.preprocessing(BENCH.preprocessing)
    more: dict[str, Any] = {
        "data": f"btcv={data / 'btcv'}", "cache_root": tmp_path / "cache",
        "phantom": SMOKE.phantom, "splits": {"btcv": BTCV},
    }  # fmt: skip
    build_catalog(organs, replace(pre, window_hu=(20, 30)), **more, expect_hu=False)
    scaled(data / "btcv", offset=0.3, divisor=1)
    build_catalog(organs, pre, **more, expect_hu=False)
    with pytest.raises(DataError, match="rounded to a few whole numbers"):
        build_catalog(organs, replace(pre, window_hu=(20, 30)), **more, expect_hu=False)
    build_catalog(organs, replace(pre, window_hu=(20, 30)), **more, expect_hu=None)  # of a run
