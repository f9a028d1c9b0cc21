"""Two real CTs through the whole pipeline: headers, orientations and statuses; never a score.

The labels are another network's output, so no Dice is asserted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.data.cache import VolumeCache
from clbench.data.check import check_layout
from clbench.data.labels import read_case
from clbench.data.layouts import LAYOUTS, CaseFiles, find_cases
from clbench.errors import DataError
from clbench.spec import registry
from clbench.spec.benchmark import Preprocessing, Source
from clbench.store import run_folder

BTCV_VALUES = range(1, 14)  # label_ids.json agrees with BTCV up to 13
LIVER = 6


def save(
    folder: Path, layout: str, case: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray
) -> None:
    image_path, label_path = LAYOUTS[layout].paths(folder, case)
    for path, array, kind in ((image_path, image, np.int16), (label_path, label, np.uint8)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array.astype(kind), affine), path)


def shifted_crop(
    image: np.ndarray, label: np.ndarray, affine: np.ndarray, corner: tuple[int, int, int]
) -> tuple[np.ndarray, ...]:
    """Another field of view of the same body; a test of the pipeline needs no second one.

    No two cases have one image: a course that says so is refused.
    """
    start = np.array(corner)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ start
    cut = tuple(slice(int(s), None) for s in start)
    return image[cut], label[cut], moved


@pytest.fixture(scope="module")
def laid_out(real_ct: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """case_A and its shifted crops as one training and one test case of BTCV and of LiTS."""
    folder = tmp_path_factory.mktemp("real")
    ct = nib.load(real_ct / "case_A" / "ct.nii.gz")
    image = np.asanyarray(ct.dataobj)
    raw = np.asanyarray(nib.load(real_ct / "case_A" / "label.nii.gz").dataobj)
    organs = np.where(np.isin(raw, BTCV_VALUES), raw, 0)
    liver = raw == LIVER
    center = np.argwhere(liver)[liver.sum() // 2]
    grid = np.indices(raw.shape).reshape(3, -1).T
    ball = (np.linalg.norm(grid - center, axis=1) <= 5).reshape(raw.shape) & liver
    tumor = liver.astype(np.uint8) + ball
    save(folder / "btcv", "btcv", "1", image, organs, ct.affine)
    save(folder / "btcv", "btcv", "2", *shifted_crop(image, organs, ct.affine, (6, 5, 4)))
    save(folder / "lits", "lits", "0", *shifted_crop(image, tumor, ct.affine, (1, 1, 1)))
    save(folder / "lits", "lits", "1", *shifted_crop(image, tumor, ct.affine, (5, 6, 4)))
    (folder / "btcv.toml").write_text('train = [1]\ntest = [2]\norigin = "a pipeline test"\n')
    (folder / "lits.toml").write_text('train = [0]\ntest = [1]\norigin = "a pipeline test"\n')
    return folder


def test_from_check_to_table(laid_out: Path, tmp_path: Path) -> None:
    splits = [w for s in ("btcv", "lits") for w in ("--split", f"{s}={laid_out / f'{s}.toml'}")]
    check = CliRunner().invoke(app, ["data", "check", str(laid_out), *splits])
    assert check.exit_code == 0, check.output
    assert "RAS" in check.output
    assert "no CT in HU" not in check.output

    data = f"btcv={laid_out / 'btcv'},lits={laid_out / 'lits'}"
    words = [
        "run", "--bench", "tumor_ext", "--strategy", "universal", "--profile", "smoke",
        "--data", data, *splits, "--out", str(tmp_path / "out"),
        "--cache", str(tmp_path / "cache"), "--device", "cpu", "--set", "train.epochs=1",
        "--set", "backbone.size=8",
    ]  # fmt: skip
    run = CliRunner().invoke(app, words, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "PHANTOM" not in run.output.upper()

    (folder,) = run_folder.find_runs(tmp_path / "out")
    assert run_folder.read_record(folder)["patients"] is True
    rows = run_folder.read_scores(folder / "scores.csv")
    last = {
        (r.eval_set, r.structure): r
        for r in rows
        if r.step == 2 and r.scoring == "strict" and r.metric == "dice"
    }
    assert len(last) == 2 * 14
    native = nib.load(LAYOUTS["btcv"].paths(laid_out / "btcv", "2")[1])
    truth = int((np.asanyarray(native.dataobj) == LIVER).sum())
    assert last["btcv", "liver"].gt_vox == truth  # every voxel of the file's own grid counts
    assert last["btcv", "esophagus"].status in ("both_empty", "fp_only")  # absent from this body
    assert last["btcv", "liver_tumor"].status == "not_annotated"
    assert last["lits", "spleen"].status == "not_annotated"
    assert (last["lits", "liver_tumor"].gt_vox or 0) > 100
    assert (last["lits", "liver"].gt_vox or 0) > (last["lits", "liver_tumor"].gt_vox or 0)
    ceiling = [
        r for r in rows if r.metric == "dice_ceiling" and r.structure == "liver" and r.step == 2
    ]
    assert all(r.value > 0.5 for r in ceiling)  # the truth itself comes back from the model grid

    table = CliRunner().invoke(
        app,
        [
            "table",
            "10",
            "--source",
            "measured",
            "--results",
            str(tmp_path / "out"),
            "--format",
            "csv",
        ],
    )
    assert table.exit_code == 0, table.output
    assert "universal" in table.output
    assert "phantom" not in table.output.lower()


def test_an_arterial_phase_scan_in_lps_is_read_and_prepared(real_ct: Path, tmp_path: Path) -> None:
    source = Source(
        name="c",
        title="case C",
        layout="btcv",
        labels={8: "aorta", 17: "celiac_trunk", 18: "superior_mesenteric_artery"},
    )
    folder = real_ct / "case_C"
    with pytest.raises(DataError) as err:  # bone, 22, is no structure of this source
        VolumeCache(tmp_path).get(
            CaseFiles(case="1", image=folder / "ct.nii.gz", label=folder / "label.nii.gz"),
            source,
            Preprocessing(),
        )
    assert "22" in str(err.value)

    native = nib.load(folder / "label.nii.gz")
    assert nib.aff2axcodes(native.affine) == ("L", "P", "S")
    raw = np.asanyarray(native.dataobj).copy()
    raw[raw == 22] = 0
    nib.save(nib.Nifti1Image(raw, native.affine), tmp_path / "label.nii.gz")
    files = CaseFiles(case="1", image=folder / "ct.nii.gz", label=tmp_path / "label.nii.gz")
    volume = VolumeCache(tmp_path).get(files, source, Preprocessing())
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), 1.5, atol=1e-6)
    truth = volume.native_bits()
    for value, name in source.labels.items():
        bit = 1 << volume.names.index(name)
        assert int(((truth & bit) != 0).sum()) == int((raw == value).sum())
    low, high = volume.windowed((slice(None),) * 3).min(), volume.windowed((slice(None),) * 3).max()
    assert (low, high) == (0, 1)


@pytest.mark.parametrize("layout", ["jhh", "nnunet", "msd", "totalsegmentator", "abdomenatlas"])
def test_a_real_scan_is_the_same_in_every_layout(
    layout: str, real_ct: Path, lay_out: Any, tmp_path: Path
) -> None:
    ct = nib.load(real_ct / "case_A" / "ct.nii.gz")
    image = np.asanyarray(ct.dataobj)
    raw = np.asanyarray(nib.load(real_ct / "case_A" / "label.nii.gz").dataobj)
    organs = np.where(np.isin(raw, BTCV_VALUES), raw, 0).astype(np.uint8)
    labels = {v: n for v, n in registry.benchmark("tumor_ext").source("btcv").labels.items()
              if v in BTCV_VALUES}  # fmt: skip
    by_mask = "atlas" in layout or layout == "totalsegmentator"
    meaning: dict[str, Any] = (
        {"masks": {n: n for n in labels.values()}} if by_mask else {"labels": labels}
    )
    source = Source(name="a", title="case A", layout=layout, **meaning)
    masks = {n: (v,) for v, n in labels.items()} if by_mask else None
    lay_out(tmp_path, layout, "7", image, organs, ct.affine, masks)
    found = read_case(find_cases(tmp_path, source)["7"], source)
    plain = lay_out(tmp_path / "btcv", "btcv", "7", image, organs, ct.affine)
    btcv = Source(name="a", title="case A", layout="btcv", labels=labels)
    want = read_case(find_cases(plain.parents[1], btcv)["7"], btcv)
    np.testing.assert_array_equal(found.bits, want.bits)
    np.testing.assert_array_equal(found.image, want.image)
    np.testing.assert_allclose(found.affine, want.affine)
    assert found.files.annotated(source) == btcv.structures
    report = check_layout(tmp_path, layout)
    assert report.problems == []
