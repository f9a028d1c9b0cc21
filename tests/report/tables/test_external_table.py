"""External test sets in tables, tests and the report: what counts there, and which order turns."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import ORGANS, Method, add_external, make_runs

from clbench.errors import StoreError, UnknownName
from clbench.report.page.matrix import matrix_of
from clbench.report.significance.analysis import Analysis
from clbench.report.study import Protocol
from clbench.report.tables.continual import learning_table
from clbench.report.tables.external import external_table
from clbench.report.tables.render import render
from clbench.report.tables.summary import summary
from clbench.store import run_folder

METHODS = {"universal": Method(), "joint": Method(new=-0.2, kept=-0.2), "lwf": Method(kept=-0.4)}
SHIFTS = {"universal": 0.0, "joint": 0.1, "lwf": -0.1}
"""`joint` is worse internally and better externally, `lwf` is worse on both."""


def analysis(results: Path) -> Analysis:
    return Analysis(results=results, bench="tumor_ext", protocol=Protocol(draws=2000))


def test_seeds_that_do_not_count_are_not_counted(tmp_path: Path) -> None:
    make_runs(tmp_path, {**METHODS, "lwf": Method(kept=-0.4, seeds=(2,))})
    add_external(tmp_path, "clinic", ["spleen", "liver", "liver_tumor"], SHIFTS)
    table = external_table(analysis(tmp_path))
    assert {row[0]: row[1] for row in table.rows} == {"universal": "1", "joint": "1", "lwf": "1"}
    assert (
        "clinic: means of the seeds that all of them have (2); others do not count: universal 0, "
        "1; joint 0, 1."
    ) in table.notes


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    results = tmp_path_factory.mktemp("external")
    make_runs(results, METHODS)
    add_external(results, "clinic", ["spleen", "liver", "liver_tumor"], SHIFTS)
    return analysis(results)


def test_external_rows_move_no_internal_number(study: Analysis, tmp_path: Path) -> None:
    make_runs(tmp_path, METHODS)
    plain = analysis(tmp_path)
    for make in (summary, learning_table):
        assert render(make(study), "csv") == render(make(plain), "csv")
    assert plain.external == {}
    assert study.dice.external == ("clinic",)


def test_a_structure_counts_on_the_external_test_set(study: Analysis) -> None:
    there = study.external["clinic"].dice
    assert list(there.learned_at) == ["spleen", "liver", "liver_tumor"]
    run = next(r for r in study.finished if r.record.strategy == "joint")
    rows = run_folder.read_scores(run.folder / "scores.csv")
    mean = np.mean(
        [
            r.value
            for r in rows
            if (r.eval_set, r.structure, r.step, r.scoring) == ("clinic", "liver", 2, "strict")
        ]
    )
    joint = next(m for m in there.strategies if m.label == "joint")
    assert joint.r[joint.seeds.index(run.record.seed)][2, "liver"] == pytest.approx(mean, abs=1e-12)
    assert "external test on clinic" in summary(study.external["clinic"]).title
    assert there.means == {}  # no group is annotated whole


def test_the_table_names_the_order_that_turns(study: Analysis) -> None:
    table = external_table(study)
    rows = {row[0]: row for row in table.rows}
    assert rows["universal"][3] == "1"  # internally
    assert rows["joint"][5] == "1"  # externally
    assert [rows[name][6] for name in ("universal", "joint", "lwf")] == ["1", "1", "0"]
    text = render(table, "terminal")
    assert "universal is better than joint internally" in " ".join(text.split())
    assert table.long is not None
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    shown = {(x["first"], x["second"]): x["reversed"] for x in lines}
    assert sum(value == "True" for value in shown.values()) == 1
    ranking = study.external_rankings[0]
    internal = study.dice.strategies[0].table({"spleen": 2, "liver": 2, "liver_tumor": 2})
    assert ranking.patients == (sum(v.shape[1] for v in internal.values()) - 1, 8)


def test_the_matrix_has_a_column_for_it(study: Analysis) -> None:
    matrix = matrix_of(study)
    assert matrix.heads["final, clinic"] == "final, clinic"
    cells = {row.label: row.cells["final, clinic"] for row in matrix.rows}
    assert (cells["joint"].word, cells["lwf"].word) == ("better", "worse")
    assert "shown to be reversed: 1 (universal over joint)" in " ".join(matrix.summary)


def test_a_course_without_external_test_sets_says_so(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,))})
    with pytest.raises(StoreError, match="no external test sets"):
        external_table(analysis(tmp_path))
    with pytest.raises(StoreError, match="no external test sets"):
        _ = analysis(tmp_path).measured_on("clinic").dice
    add_external(tmp_path, "ward", ["liver_tumor"], {"universal": 0.0})
    with pytest.raises(UnknownName, match="no external test set called 'wart'"):
        _ = analysis(tmp_path).measured_on("wart").dice
    with pytest.raises(StoreError, match="annotates no structure of step 1"):
        summary(analysis(tmp_path).measured_on("ward"))
    assert set(ORGANS).isdisjoint(analysis(tmp_path).measured_on("ward").dice.learned_at)


def test_the_reference_s_cell_is_of_the_external_test_set(study: Analysis) -> None:
    ranking = study.external_rankings[0]
    rows = {row.label: row for row in matrix_of(study).rows}
    for label, there in zip(ranking.labels, ranking.external, strict=True):
        assert rows[label].cells["final, clinic"].value == pytest.approx(there)


def test_the_level_reaches_the_external_ranking(study: Analysis) -> None:
    strict = replace(study, protocol=Protocol(draws=2000, alpha=0.001))
    reversals = strict.external_rankings[0].reversals
    assert reversals.m == 3  # eight external patients cannot reach it
    assert study.external_rankings[0].reversals.m == 6
    ranking = study.external_rankings[0]
    assert (len(ranking.shown(0.05)), ranking.shown(1e-6)) == (1, ())


def test_a_hole_on_the_external_test_set_leaves_a_strategy_out(tmp_path: Path) -> None:
    make_runs(tmp_path, METHODS)
    add_external(tmp_path, "clinic", ["spleen", "liver", "liver_tumor"], SHIFTS)
    folder = next(f for f in run_folder.find_runs(tmp_path) if f.parent.name == "lwf")
    rows = run_folder.read_scores(folder / "scores.csv")
    kept = [r for r in rows if (r.eval_set, r.case) != ("clinic", "9003")]
    run_folder.write_scores(folder / "scores.csv", kept)
    ranking = analysis(tmp_path).external_rankings[0]
    assert ranking.labels == ("universal", "joint")
    (why,) = ranking.left_out
    assert why.startswith("lwf: ")
    assert "clinic/9003" in why
