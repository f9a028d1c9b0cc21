"""Tables of one scored run: no mean over what is left where test cases have no score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import Method, make_runs

from clbench.report.tables.render import EMPTY, Table
from clbench.report.tables.rescored import score_report
from clbench.store import run_folder

COUNTS = {"lesion_truth": 2.0, "lesion_found": 1.0, "lesion_pred": 1.0, "lesion_false": 0.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One run with a distance, and with lesions of the tumor."""
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))},
                          patients={"btcv": 4, "lits": 4})  # fmt: skip
    rows = run_folder.read_scores(folder / "scores.csv")
    strict = [r for r in rows if r.scoring == "strict"]
    rows += [replace(r, metric="hd95_mm", value=10 * r.value) for r in strict]
    rows += [
        replace(r, metric=metric, value=value)
        for r in strict
        if (r.structure, r.eval_set, r.step) == ("liver_tumor", "lits", 2)
        for metric, value in {**COUNTS, "patient_positive": 1.0}.items()
    ]
    run_folder.write_scores(folder / "scores.csv", rows)
    return folder


def without(folder: Path, metric: str, structure: str, case: str) -> list[Table]:
    """The report after the row of a metric is gone, of the last step."""
    rows = run_folder.read_scores(folder / "scores.csv")
    gone = (metric, structure, case, 2)
    kept = [r for r in rows if (r.metric, r.structure, r.case, r.step) != gone]
    assert len(kept) < len(rows)
    run_folder.write_scores(folder / "scores.csv", kept)
    return score_report(folder)


def row(table: Table, name: str) -> dict[str, str]:
    return dict(zip(table.columns, next(r for r in table.rows if r[0] == name), strict=True))


def test_whole_runs_have_no_hole(folder: Path) -> None:
    surfaces, detection = score_report(folder)
    assert not any("hole" in note for table in (surfaces, detection) for note in table.notes)
    assert EMPTY not in row(surfaces, "pancreas").values()  # one case does not annotate it
    tumor = row(detection, "liver_tumor")
    assert tumor["lesions: sensitivity"] == "4/8 = 0.500"
    assert tumor["patients: sensitivity"].startswith("3/3 = 1.000")


def test_a_mean_of_which_a_case_is_missing_is_a_hole(folder: Path) -> None:
    surfaces, _ = without(folder, "hd95_mm", "spleen", "101")
    assert row(surfaces, "spleen")["hd95_mm"] == EMPTY
    assert row(surfaces, "spleen")["dice"] != EMPTY
    assert row(surfaces, "liver")["hd95_mm"] != EMPTY
    assert surfaces.notes[-1] == "hole: spleen, hd95_mm: 1 of 4 test cases missing (btcv/101)"


def test_shares_of_which_a_case_is_missing_are_a_hole(folder: Path) -> None:
    surfaces, detection = without(folder, "patient_positive", "liver_tumor", "202")
    tumor = row(detection, "liver_tumor")
    assert (tumor["patients: sensitivity"], tumor["harmonic mean"]) == (EMPTY, EMPTY)
    assert tumor["lesions: sensitivity"] == "4/8 = 0.500"
    missing = "1 of 4 test cases missing (lits/202)"
    assert detection.notes[-1] == f"hole: liver_tumor, patient_positive: {missing}"
    assert not any("hole" in note for note in surfaces.notes)
    _, detection = without(folder, "lesion_pred", "liver_tumor", "202")
    tumor = row(detection, "liver_tumor")
    assert (tumor["lesions: sensitivity"], tumor["F1"]) == (EMPTY, EMPTY)
