"""Structures taught again from other sources, measured domain by domain."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import Method, make_runs

from clbench.cli import main
from clbench.errors import StoreError, UnknownName
from clbench.report.figures import _figure, due, style
from clbench.report.league import Submission, league_of
from clbench.report.page.checklist import checklist
from clbench.report.page.limits import limits
from clbench.report.page.matrix import OWN, matrix_of
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.sentences import sentence
from clbench.report.study import Study
from clbench.report.tables.continual import learning_table
from clbench.report.tables.domains import domains_table
from clbench.report.tables.summary import run_report
from clbench.store import run_folder

STEPS = (("first", "btcv", ("spleen", "liver")), ("second", "lits", ()), ("third", "kits", ()))
DICE = {("btcv", 1): 0.8, ("btcv", 2): 0.7, ("btcv", 3): 0.5, ("lits", 1): 0.3, ("lits", 2): 0.6,
        ("lits", 3): 0.9, ("kits", 2): 0.2, ("kits", 3): 0.4}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The liver is taught again in steps 2 and 3; its Dice by source and step is `DICE`."""
    make_runs(tmp_path, {"finetune": Method(seeds=(0, 1))}, steps=STEPS)
    for folder in run_folder.find_runs(tmp_path):
        record = run_folder.read_record(folder)
        for step in record["course"]["steps"][1:]:
            step["again"] = ["liver"]
        run_folder.write_record(folder, record)
        rows = run_folder.read_scores(folder / "scores.csv")
        rows = [
            replace(r, value=DICE[at], status="ok", gt_vox=9, pred_vox=9)
            if (at := (r.eval_set, r.step)) in DICE and r.structure == "liver"
            else r
            for r in rows
        ]
        run_folder.write_scores(folder / "scores.csv", rows)
    return tmp_path


def test_forgetting_and_forward_transfer_per_domain(results: Path) -> None:
    table = domains_table(Study(results=results, bench="tumor_ext"))
    rows = {row[1]: row for row in table.rows}
    assert rows["lits"][3] == "liver"
    assert rows["lits"][4:] == ("0.300 ± 0.000", "0.600 ± 0.000", "0.900 ± 0.000", "+0.300 ± 0.000")
    assert rows["kits"][4:] == ("0.200 ± 0.000", "0.400 ± 0.000", "0.400 ± 0.000", "–")
    assert rows["btcv"][4] == "–"
    assert rows["mean of domains"][4] == "0.250 ± 0.000"
    own, last = (np.mean([float(rows[s][k][:5]) for s in ("btcv", "lits", "kits")]) for k in (5, 6))
    assert [rows["mean of domains"][k][:5] for k in (5, 6)] == [f"{own:.3f}", f"{last:.3f}"]
    assert rows["mean of domains"][7] == "–"
    before_last = rows["mean without the last"]
    own, last = (np.mean([float(rows[s][k][:5]) for s in ("btcv", "lits")]) for k in (5, 6))
    assert [float(before_last[k][:5]) for k in (5, 6)] == pytest.approx([own, last], abs=0.001)
    assert float(before_last[7][:6].replace("−", "-")) == pytest.approx(last - own, abs=0.001)


def test_figures_of_every_domain_that_a_later_step_teaches(results: Path) -> None:
    """The page shows them beside those of the internal test cases, which are the first domain's."""
    study = Analysis(results=results, bench="tumor_ext", reference="finetune")
    drawn = {key: (name, of) for key, name, of in due(study) if of.on}
    assert list(drawn) == ["heatmap-lits", "forgetting-lits", "heatmap-kits"]  # kits comes last
    with style.look():
        figures = {key: _figure(*asked, None) for key, asked in drawn.items()}
        figures["heatmap"] = _figure("heatmap", study, None)
    numbers = {
        key: [t.get_text() for t in figure.axes[0].texts if t.get_text()]
        for key, figure in figures.items()
    }
    assert numbers["heatmap-lits"] == [".30", ".60", ".90", "+.30"]  # before, own step, end, change
    assert numbers["heatmap-kits"] == [".20", ".40"]
    assert ".30" not in numbers["heatmap"]
    lines = figures["forgetting-lits"].axes[0].containers[0].lines[0]
    assert lines.get_ydata().tolist() == pytest.approx([0.6, 0.9])
    assert "domain lits" in figures["forgetting-lits"].get_suptitle()


def test_figures_elsewhere_are_asked_for_by_name(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    words = ["clbench", "figure", "forest", "--results", str(results), "--external", "lits"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "heatmap or forgetting" in capsys.readouterr().err
    with pytest.raises(UnknownName, match="external test set"):
        Analysis(results=results, bench="tumor_ext", on="absent").scores()


def test_a_course_whose_later_steps_teach_nothing_new_ends_with_its_tables(results: Path) -> None:
    folder = run_folder.find_runs(results)[0]
    kept = run_report(folder, scoring="strict")[1]
    assert dict(kept.rows)["new structures, each after its own step"] == "–"


def test_tests_and_rankings_are_of_eval_sets_on_which_a_structure_counts(results: Path) -> None:
    study = Analysis(results=results, bench="tumor_ext", reference="finetune")
    assert study.dice.homes == ("btcv",)
    assert [ranking.eval_set for ranking in study.rankings] == ["btcv"]
    two = {"joint": Method(seeds=(0, 1))}
    make_runs(results, two, steps=STEPS)
    assert [test.eval_set for test in replace(study, reference="joint").sets] == ["btcv"]
    assert matrix_of(replace(study, reference="joint")).rows


def test_an_endpoint_without_structures_is_not_asked(results: Path) -> None:
    """No later step teaches a new structure: nothing is learned there, and its cases do not count."""
    make_runs(results, {"joint": Method(seeds=(0, 1), own_step1=True)}, steps=STEPS)
    for folder in run_folder.find_runs(results):
        record = run_folder.read_record(folder)
        for step in record["course"]["steps"][1:]:
            step["again"] = ["liver"]
        run_folder.write_record(folder, record)
    study = Analysis(results=results, bench="tumor_ext", reference="finetune")
    assert {c.endpoint.name for c in study.comparisons} == {"final", "kept"}
    matrix = matrix_of(study)
    assert set(matrix.heads) == {"final", "kept", OWN}
    said = " ".join(
        [*matrix.notes, *limits(study), *(x for pair in checklist(study) for x in pair)]
    )
    assert "learned" not in matrix.notes[0]
    assert "test cases: 12 btcv" in matrix.notes[0]
    assert "12 lits" not in said
    assert "lits 12" not in said
    assert "too few patients: 0" not in " ".join(
        sentence(c, study.protocol) for c in study.comparisons
    )
    assert not any("12 lits" in note for note in learning_table(study).notes)
    submission = Submission(name="anna", runs=study.finished, recomputed=frozenset())
    league = league_of([submission], scoring="strict", protocol=study.protocol)
    assert set(league.entries[0].cells) == {"final", "kept"}
    assert "test cases: 12 btcv;" in league.notes[0]


def test_a_course_that_teaches_nothing_again_says_so(tmp_path: Path) -> None:
    make_runs(tmp_path, {"finetune": Method(seeds=(0,))})
    with pytest.raises(StoreError, match="teaches no structure again"):
        domains_table(Study(results=tmp_path, bench="tumor_ext"))
