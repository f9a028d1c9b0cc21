"""A model of nnU-Net extended on the command line, and every command that takes the run it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nnunet_folders import plans_of, write_trained
from own_cts import write_own_cts
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import SettingError, UnknownName
from clbench.store.record import RunRecord


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def run_of(said: str) -> Path:
    return Path(said.split("Results: ")[1].splitlines()[0])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache_root: Path) -> Path:
    """New and old cases, and a folder that nnU-Net trained on a coarse grid."""
    folder = tmp_path_factory.mktemp("home")
    write_own_cts(folder / "cysts", cache_root, 3)
    write_own_cts(folder / "old", cache_root, 2, first=7101, without=(0, 1))
    plans = plans_of("plain")
    plans["configurations"]["3d_fullres"] |= {"spacing": [20.0, 20.0, 20.0]}
    write_trained(folder, "plain", plans)
    return folder


def test_every_command_takes_an_extended_run(
    home: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From foreign weights, and again from the run that they became."""
    monkeypatch.chdir(home)
    new = ("--inside", "spleen", "--data", "cysts", "--cache", cache_root)
    old = ("--old-data", "old", "--profile", "smoke")
    trained = "nnUNetTrainer__nnUNetPlans__3d_fullres"
    said = call("extend", trained, "--learn", "spleen_cyst", *new, *old)
    run = run_of(said)
    record = RunRecord.read(run)
    assert record.course.test[0] == ["old/7101", "old/7102"]
    row = next(line.split() for line in said.splitlines() if line.startswith("spleen "))
    assert (row[5], row[7]) == ("to", "3")  # the change with its interval, over 3 patients

    assert "no difference found" in call("verify", run)
    bench = record.identity.bench
    summary = call("table", "summary", "--bench", bench, "--ref", record.strategy)
    assert "(2 old, 1 cysts)" in summary
    assert "no test case of old holds it" in summary  # of liver: so the lowest is not known
    assert "head or body" in call("explain", run)
    with pytest.raises(UnknownName, match=f"one of: {record.strategy}\n.*\n.*with --ref"):
        call("table", "lost_dice", "--bench", bench)
    assert "spleen" in call("table", "lost_dice", "--bench", bench, "--ref", record.strategy)
    call("report", "--bench", bench, "--ref", record.strategy)
    page = (home / "report" / "index.html").read_text(encoding="utf-8")
    assert "where the lost Dice went" in page
    for stem in ("lost-dice", "before-after"):  # the figures themselves, drawn by explain
        assert f'<figure id="figure-{stem}-0">' in page
    assert page.count("data:image/png;base64,") == 2
    call("view", run, "old/7101", "--out", "case.html")
    assert (home / "case.html").stat().st_size > 10_000
    call("export", run, "model")
    imported = Path(call("import", "model", "--out", "imported").strip())
    scan = home / "cysts" / "imagesTr" / "7001_0000.nii.gz"
    for model, out in ((run, "predicted"), (imported, "predicted_by_import")):
        call("predict", model, scan, "--out", out)
    masks = sorted(p.relative_to("predicted") for p in Path("predicted").rglob("*.nii.gz"))
    assert [m.name for m in masks] == ["liver.nii.gz", "spleen.nii.gz", "spleen_cyst.nii.gz"]
    assert all(
        Path("predicted", m).read_bytes() == Path("predicted_by_import", m).read_bytes()
        for m in masks
    )

    shutil.copytree("cysts", "lesions")
    labels = {"background": 0, "spleen": 1, "big_lesion": 2}
    (home / "lesions" / "dataset.json").write_text(json.dumps({"labels": labels}))
    said = call("extend", run, "--learn", "big_lesion", "--data", "lesions", "--cache", cache_root)
    again = RunRecord.read(run_of(said))
    assert again.course.structures == ("spleen", "liver", "spleen_cyst", "big_lesion")
    assert "every old mask is equal to the bit." in said or "voxels of old structures" in said


def test_what_weights_know_already_cannot_be_taught_by_an_earlier_step(home: Path) -> None:
    trained = home / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    with pytest.raises(SettingError, match="has learned liver already") as err:
        call("extend", trained, "--learn", "liver", "--data", home / "cysts")
    assert "--step" not in str(err.value)
    assert "another name" in str(err.value)


@pytest.mark.parametrize("more", [["--series", "1.2.3"], ["--dicom-seg"]])
def test_options_of_dicom_are_refused_where_the_input_is_nifti(
    more: list[str], tmp_path: Path
) -> None:
    (tmp_path / "ct.nii.gz").touch()
    words = ["predict", str(tmp_path / "run"), str(tmp_path), "--out", str(tmp_path / "o"), *more]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SettingError)
    assert f"{more[0]} with a DICOM series" in str(done.exception)
