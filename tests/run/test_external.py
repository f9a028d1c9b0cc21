"""Predictions made by any tool: equal to native scoring bit for bit, in every table, or refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from numpy.typing import NDArray
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.catalog import exam_cases
from clbench.data.external_masks import find_predictions, label_map
from clbench.data.layouts import CaseFiles
from clbench.data.volume import Volume
from clbench.errors import ClbenchError, DataError, SettingError, SpecError, StoreError
from clbench.evaluation.metrics import case as case_module
from clbench.evaluation.predictions import read_prediction
from clbench.evaluation.scoring import to_native
from clbench.report.study import Study
from clbench.report.tables.summary import run_report, summary
from clbench.run.external import OutsideSettings, score_predictions
from clbench.run.record import catalog_of
from clbench.run.rescore import score_run
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score


def save(path: Path, array: NDArray[Any], volume: Volume) -> None:
    """An array on the RAS native grid, written as the case's own image lies."""
    image = nib.load(volume.files.image)
    back = ornt_transform(io_orientation(np.eye(4)), io_orientation(image.affine))
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = apply_orientation(array, back).astype(np.uint8)
    nib.save(nib.Nifti1Image(turned, image.affine), path)


@pytest.fixture(scope="module")
def volumes(smoke_run: Path) -> dict[tuple[str, str], Volume]:
    catalog = catalog_of(RunRecord.read(smoke_run))
    return {(s, c): catalog.open(n, c, "test") for n, s, c in exam_cases(catalog)}


@pytest.fixture(scope="module")
def exported(
    smoke_run: Path,
    volumes: dict[tuple[str, str], Volume],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """`step1/`, `step2/`: the smoke run's predictions as a mask per structure."""
    out = tmp_path_factory.mktemp("exported")
    for step in (1, 2):
        for (source, case), volume in volumes.items():
            pred = read_prediction(
                smoke_run / "predictions" / f"step{step}" / f"{source}_{case}.npz"
            )
            bits = to_native(pred.bits, volume.native_axes())
            for k, name in enumerate(pred.structures):
                path = out / f"step{step}" / source / case / f"{name}.nii.gz"
                save(path, bits >> k & 1, volume)
    return out


@pytest.fixture(scope="module")
def truths(
    volumes: dict[tuple[str, str], Volume], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The truth as a prediction: the label files of the test cases under their own names."""
    out = tmp_path_factory.mktemp("truths")
    for (source, _), volume in volumes.items():
        (out / source).mkdir(exist_ok=True)
        assert isinstance(volume.files.label, Path)
        shutil.copy(volume.files.label, out / source)
    return out


@pytest.fixture
def ask(cache_root: Path, truths: Path, tmp_path: Path) -> Callable[..., OutsideSettings]:
    plain = OutsideSettings(
        bench="tumor_ext", step=2, predictions=truths, name="other_tool", profile="smoke",
        out=tmp_path / "results", cache=cache_root, metrics=("hd95_mm",),
    )  # fmt: skip
    return lambda **more: replace(plain, **more)


def numbers(rows: list[Score]) -> dict[tuple[object, ...], tuple[str, object, object, str]]:
    return {
        (r.step, r.eval_set, r.case, r.structure, r.metric): (
            repr(r.value), r.gt_vox, r.pred_vox, r.status
        )
        for r in rows
        if r.scoring == "strict" and r.metric != "dice_ceiling"
    }  # fmt: skip


def written_labels(folder: Path) -> Path:
    path = folder / "values.json"
    path.write_text('{"labels": {"background": 0, "liver": 1}}', encoding="utf-8")
    return path


def test_strict_scores_equal_native_scoring_bit_for_bit(
    smoke_run: Path, exported: Path, ask: Callable[..., OutsideSettings], tmp_path: Path
) -> None:
    twin = tmp_path / "native" / smoke_run.name
    shutil.copytree(smoke_run, twin)
    score_run(twin)
    ours = numbers(run_folder.read_scores(twin / "scores.csv"))
    for step in (2, 1):  # in any order
        folder, holes = score_predictions(
            ask(step=step, predictions=exported / f"step{step}", metrics=case_module.DEFAULT)
        )
        assert holes == []
    theirs = numbers(run_folder.read_scores(folder / "scores.csv"))
    assert theirs == ours
    assert len({key[0] for key in theirs}) == 2
    before = (folder / "scores.csv").read_bytes()
    with pytest.raises(SettingError, match="hold no label values"):
        score_predictions(
            ask(step=1, predictions=exported / "step1", labels=written_labels(tmp_path))
        )
    score_predictions(ask(step=1, predictions=exported / "step1", metrics=case_module.DEFAULT))
    assert (folder / "scores.csv").read_bytes() == before


def test_it_joins_the_tables_of_native_runs(
    smoke_run: Path, exported: Path, ask: Callable[..., OutsideSettings], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    shutil.copytree(smoke_run, results / "tumor_ext" / "universal" / smoke_run.name)
    for step in (1, 2):
        folder, _ = score_predictions(ask(step=step, predictions=exported / f"step{step}"))
    mine, native_ = Study(results=results, bench="tumor_ext").need_scores().strategies
    assert (mine.label, native_.label) == ("other_tool", "universal")
    assert mine.cells.keys() == native_.cells.keys()
    assert repr(mine.cells) == repr(native_.cells)
    table = summary(Study(results=results, bench="tumor_ext"))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["strategy"] == "other_tool"
    scores = Study(results=results, bench="tumor_ext", reference="universal").dice
    assert [m.label for m in scores.strategies] == ["universal", "other_tool"]
    page, where = tmp_path / "page", ["--bench", "tumor_ext", "--results", str(results)]
    said = CliRunner().invoke(app, ["report", *where, "--ref", "universal", "--out", str(page)])
    assert said.exit_code == 0, said.exception
    assert any("other_tool" in line and "universal" in line for line in said.stdout.splitlines())
    html = (page / "index.html").read_text(encoding="utf-8")
    for figure in ("heatmap", "forgetting", "forest", "patients", "plane"):
        assert f'<figure id="figure-{figure}">' in html, figure
    said = CliRunner().invoke(
        app, ["table", "10", *where, "--source", "measured", "--format", "csv"]
    )
    rows = {line.split(",")[0] for line in said.stdout.splitlines()}
    assert rows >= {"universal [minilm]", "other_tool"}
    assert "not known" in run_report(folder, scoring="strict")[1].notes[0]
    assert run_report(folder, scoring="paper")  # resampled to the grid of the paper's scoring
    with pytest.raises(StoreError, match="made elsewhere"):
        score_run(folder)


def test_label_maps_of_the_benchmark_are_read_as_they_are(
    ask: Callable[..., OutsideSettings], truths: Path
) -> None:
    folder, _ = score_predictions(ask())
    rows = [r for r in run_folder.read_scores(folder / "scores.csv") if r.status == "ok"]
    assert {r.value for r in rows if r.scoring == "strict" and r.metric == "dice"} == {1.0}
    assert {r.value for r in rows if r.metric == "hd95_mm"} == {0.0}
    paper = [(r.value, r.gt_vox) for r in rows if r.scoring == "paper" and r.metric == "dice"]
    assert paper
    assert all(value == pytest.approx(2 * n / (2 * n + 1)) for value, n in paper)
    record = run_folder.read_record(folder)
    assert record["external"] is True
    assert record["predictions"]["2"] == {"folder": str(truths), "labels": None, "holes": []}


def test_an_nnunet_folder_as_it_is(
    ask: Callable[..., OutsideSettings], volumes: dict[tuple[str, str], Volume], tmp_path: Path
) -> None:
    """Other values, names of another tool, regions, and its own files beside the masks."""
    folder = tmp_path / "nnunet"
    names = ["spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver",
             "stomach", "aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas",
             "adrenal_gland_right", "adrenal_gland_left"]  # fmt: skip
    labels: dict[str, Any] = {"background": 0, **{n: i + 2 for i, n in enumerate(names)}}
    labels["liver"], labels["liver_tumor"] = [7, 1], [1]
    for (source, case), volume in volumes.items():
        raw = np.asarray(nib.load(volume.files.label).dataobj).astype(np.int64)
        moved = np.where(raw > 0, raw + 1, 0)
        if source == "lits":
            moved = np.array([0, 7, 1])[raw]
        elif 14 in raw:
            moved[raw == 14] = 0  # the duodenum is not in its list
        place = folder / f"{source}_{case}.nii.gz"
        place.parent.mkdir(exist_ok=True)
        image = nib.load(volume.files.image)
        nib.save(nib.Nifti1Image(moved.astype(np.uint8), image.affine), place)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    (folder / "plans.json").write_text("{}")
    (folder / "predict_from_raw_data_args.json").write_text("{}")
    out, _ = score_predictions(ask(predictions=folder))
    rows = [r for r in run_folder.read_scores(out / "scores.csv") if r.status == "ok"]
    assert {r.value for r in rows if r.scoring == "strict" and r.metric == "dice"} == {1.0}


def test_three_ways_to_write_a_list_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    for content in (
        {"labels": {"background": 0, "liver": 1, "Liver Tumor": 2, "ignore": 3}},
        {"labels": {"0": "background", "1": "Liver", "2": "liver_tumor", "3": "ignore"}},
        {"liver": 1, "liver_tumor": 2, "background": 0, "ignore": 3},
    ):
        path.write_text(json.dumps(content))
        found = label_map(path).structures
        assert found == {0: (), 1: ("liver",), 2: ("liver_tumor", "liver"), 3: ()}
    path.write_text(json.dumps({"labels": {"liver": [1], "liver_tumor": [2]}}))
    assert label_map(path).structures[2] == ("liver_tumor",)  # a region is taken as it is
    for text, kind, says in (
        ("{", DataError, "not JSON"),
        ("[1]", DataError, "has no labels"),
        ('{"labels": {"liver": 1.5}}', DataError, "not a whole number"),
        ('{"labels": {"1": "liver", "1": "spleen"}}', DataError, "a key twice"),
        ('{"labels": {"liver": 1, "spleen": 1}}', DataError, "two structures have one label value"),
        ('{"labels": {"liver": 0, "background": 1}}', DataError, "label value 0"),
        (
            '{"labels": {"liver": [1, 2], "liver_tumor": 2}, "regions_class_order": [2, 1]}',
            DataError,
            "does not fit the regions",
        ),
    ):
        path.write_text(text)
        with pytest.raises(kind) as err:
            label_map(path)
        assert says in str(err.value)
        assert str(path) in str(err.value)
    path.write_text(
        '{"labels": {"background": 0, "liver": [1, 2], "liver_tumor": 2},'
        ' "regions_class_order": [1, 2]}'
    )
    assert label_map(path).structures == {0: (), 1: ("liver",), 2: ("liver", "liver_tumor")}
    path.write_text('{"labels": {"livr": 1, "liver": 2, "bladder_wall": 3}}')
    found = label_map(path)  # more than is asked for is passed over, and listed
    assert found.structures == {1: (), 2: ("liver",), 3: ()}
    assert found.others == ("livr", "bladder_wall")
    with pytest.raises(DataError, match="does not exist"):
        label_map(tmp_path / "absent.json")


@pytest.fixture
def broken(truths: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(truths, tmp_path / "broken"))


def edit(path: Path, change: Callable[[NDArray[Any], NDArray[Any]], Any]) -> None:
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


def shifted(array: NDArray[Any], affine: NDArray[Any]) -> Any:
    affine[0, 3] += 7
    return array, affine


def with_value(value: int) -> Callable[[NDArray[Any], NDArray[Any]], Any]:
    def change(array: NDArray[Any], affine: NDArray[Any]) -> Any:
        array[2, 3, 4] = value
        return array, affine

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, m: (a[:-1], m), "different shapes"),
        (shifted, "different places"),
        (with_value(9), "label values without a meaning"),
        (lambda a, m: (a + 0.25, m), "not whole numbers"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named(
    change: Any, says: str, broken: Path, ask: Callable[..., OutsideSettings]
) -> None:
    path = next((broken / "lits").iterdir())
    edit(path, change)
    with pytest.raises(DataError, match=says) as err:
        score_predictions(ask(predictions=broken))
    assert str(path) in str(err.value)
    assert not (ask().out / "tumor_ext" / "other_tool").exists()


def test_a_missing_case_is_refused_or_a_hole(
    broken: Path, ask: Callable[..., OutsideSettings]
) -> None:
    (broken / "lits" / "segmentation-20.nii").unlink()
    with pytest.raises(DataError, match="1 of 4 test cases have no prediction") as err:
        score_predictions(ask(predictions=broken))
    assert "lits/20" in str(err.value)
    assert "--allow-missing" in str(err.value)
    folder, holes = score_predictions(ask(predictions=broken, allow_missing=True))
    assert holes == ["lits/20"]
    assert run_folder.read_record(folder)["predictions"]["2"]["holes"] == ["lits/20"]
    (tool,) = Study(results=ask().out, bench="tumor_ext").need_scores().strategies
    (reason,) = tool.cells[2, "lits", "liver_tumor"].reasons
    assert "1 of 2 test cases missing (lits/20)" in reason
    assert math.isnan(tool.r[0][2, "liver_tumor"])  # never the mean of the other case
    assert tool.cells[1, "btcv", "spleen"].reasons == ("not scored",)


def remove_all(folder: Path) -> None:
    for path in folder.rglob("*.nii*"):
        path.unlink()


def twice(folder: Path) -> None:
    shutil.copy(folder / "lits" / "segmentation-20.nii", folder / "lits" / "20.nii")


def no_pancreas(folder: Path) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": {"liver": 1, "liver_tumor": 2}}))


def masks(folder: Path, names: dict[str, int]) -> None:
    label = folder / "lits" / "segmentation-20.nii"
    image = nib.load(label)
    inner = folder / "lits" / "20"
    inner.mkdir()
    for name, value in names.items():
        array = np.full(image.shape, value, np.uint8)
        nib.save(nib.Nifti1Image(array, image.affine), inner / f"{name}.nii.gz")
    label.unlink()


def several_values_in_a_mask(folder: Path) -> None:
    masks(folder, {"liver": 1, "liver_tumor": 1})
    path = folder / "lits" / "20" / "liver_tumor.nii.gz"
    edit(path, lambda array, affine: (array + (np.arange(len(array)) > 3)[:, None, None], affine))


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (shutil.rmtree, DataError, "folder of predictions does not exist"),
        (remove_all, DataError, "no file in this folder is a prediction"),
        (twice, DataError, "two predictions claim to be lits case 20"),
        (no_pancreas, DataError, "label values have none for structures"),
        (lambda f: masks(f, {"liver": 1}), DataError, "1 structures have no mask"),
        (
            lambda f: masks(f, {"liver": 1, "livr_tumor": 1, "skull": 1}),
            DataError,
            "(?s)is called: livr_tumor, skull.*rename 'livr_tumor' to 'liver_tumor'",
        ),
        (
            several_values_in_a_mask,
            DataError,
            "(?s)holds several values.*1, 2",
        ),
        (lambda f: masks(f, {"liver": 1, "Liver": 1}), DataError, "two masks stand for"),
    ],
)
def test_a_folder_that_cannot_be_scored(
    damage: Any, kind: type[ClbenchError], says: str, broken: Path, ask: Callable[..., Any]
) -> None:
    damage(broken)
    with pytest.raises(kind, match=says) as err:
        score_predictions(ask(predictions=broken))
    assert "broken" in str(err.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"step": 3}, "does not have this step"),
        ({"step": 0}, "does not have this step"),
        ({"name": "universal"}, "a strategy of clbench has this name"),
        ({"name": "universal+plop"}, "a strategy of clbench has this name"),
        ({"name": "../x"}, "letters, digits"),
        ({"name": "_shared"}, "letters, digits"),
    ],
)
def test_wrong_words(more: dict[str, Any], says: str, ask: Callable[..., OutsideSettings]) -> None:
    with pytest.raises((SettingError, SpecError), match=says):
        score_predictions(ask(**more))


def test_numbers_at_the_end_of_names_will_do(
    broken: Path, ask: Callable[..., OutsideSettings]
) -> None:
    (broken / "lits" / "segmentation-20.nii").rename(broken / "lits" / "Case_0020.nii")
    _, holes = score_predictions(ask(predictions=broken))
    assert holes == []


def test_a_file_called_after_another_case_is_no_prediction_of_this_one(tmp_path: Path) -> None:
    """Cases 3 and 007 are not predicted by 1-3.nii.gz and 7.nii.gz, where such cases exist."""
    ids = ("3", "1-3", "7", "007", "9")
    for name in ("1-3", "7", "scan_9"):
        (tmp_path / f"{name}.nii.gz").touch()
    files = {
        ("w", c): CaseFiles(case=c, image=Path(f"{c}_0000.nii.gz"), label=Path(f"{c}.nii.gz"))
        for c in ids
    }
    wanted = {("w", c): files["w", c] for c in ("3", "007", "9")}
    assert find_predictions(tmp_path, wanted, files) == {("w", "9"): tmp_path / "scan_9.nii.gz"}


def test_a_file_called_exactly_as_a_case_is_that_cases_alone(tmp_path: Path) -> None:
    """Not also that of case x of source ward."""
    wanted = {
        ("ward", c): CaseFiles(case=c, image=Path(f"{c}_0000.nii.gz"), label=Path(f"{c}.nii.gz"))
        for c in ("x", "ward_x")
    }
    (tmp_path / "ward_x.nii.gz").touch()
    own = {("ward", "ward_x"): tmp_path / "ward_x.nii.gz"}
    assert find_predictions(tmp_path, wanted) == own
    assert find_predictions(tmp_path, {k: wanted[k] for k in own}, wanted) == own
    (tmp_path / "x.nii.gz").touch()
    assert find_predictions(tmp_path, wanted) == own | {("ward", "x"): tmp_path / "x.nii.gz"}


def test_a_file_is_the_prediction_of_one_case(tmp_path: Path) -> None:
    """Two cases whose label files have one name, which is no case's id."""
    wanted = {
        ("w", c): CaseFiles(case=c, image=Path(f"{c}/ct.nii.gz"), label=Path(f"{c}/seg.nii.gz"))
        for c in ("a", "b")
    }
    (tmp_path / "seg.nii.gz").touch()
    with pytest.raises(DataError, match="may be that of two cases"):
        find_predictions(tmp_path, wanted)


def test_folders_of_one_source_in_two_spellings_are_refused(tmp_path: Path) -> None:
    files = CaseFiles(case="a", image=Path("a_0000.nii.gz"), label=Path("a.nii.gz"))
    for name in ("ward", "Ward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii.gz").touch()
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("the file system knows no capitals")
    with pytest.raises(DataError, match="two folders bear the name"):
        find_predictions(tmp_path, {("ward", "a"): files})


def test_the_command(truths: Path, cache_root: Path, tmp_path: Path) -> None:
    words = ["score", "--bench", "tumor_ext", "--step", "2", "--predictions", str(truths),
             "--name", "other_tool", "--profile", "smoke", "--out", str(tmp_path),
             "--cache", str(cache_root), "--seed", "3", "--metrics", "nsd,patient,lesion"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "other_tool, seed 3" in done.output
    assert "2/2 = 1.000" in done.output  # both tumors found
    (folder,) = run_folder.find_runs(tmp_path)
    assert {r.seed for r in run_folder.read_scores(folder / "scores.csv")} == {3}
