"""The matrix of a report: signs that follow the tests, rows by tie groups, in print and a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sentence_audit import audit
from synthetic_runs import STEPS, Method, add_external, make_runs

from clbench.report.page.checklist import checklist
from clbench.report.page.limits import limits
from clbench.report.page.matrix import OWN, SYMBOLS, Cell, _cell, _leaders, _own_cell, matrix_of
from clbench.report.page.page import write_report
from clbench.report.page.provenance import provenance
from clbench.report.significance.analysis import Analysis
from clbench.report.significance.ranking import Tied
from clbench.report.significance.sentences import sentence
from clbench.report.significance.tables import confirmatory_table
from clbench.report.study import Protocol
from clbench.report.tables.render import render
from clbench.statistics.max_t import compare_family
from clbench.statistics.ranking import Ties, groups_of, tie_groups
from clbench.statistics.verdicts import THESE_RUNS
from clbench.store import run_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUICK = Protocol(draws=2000)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("runs")
    methods = {
        "universal": Method(), "joint": Method(new=0.1), "finetune": Method(kept=-0.4),
        "lwf_ct": Method(drop=((2, "btcv/103"),)),
    }  # fmt: skip
    make_runs(out, methods)
    return Analysis(results=out, bench="tumor_ext", protocol=QUICK)


def test_every_sign_is_that_of_the_test_seen_from_the_other_side(study: Analysis) -> None:
    rows = {row.label: row for row in matrix_of(study).rows}
    mirrored = {"better": "worse", "worse": "better"}
    for c in study.comparisons:
        cell = rows[c.b].cells[c.endpoint.name]
        assert cell.word == mirrored.get(c.word, c.word)
        if c.result is None:
            assert math.isnan(cell.value)
            assert cell.why == c.hole
            continue
        assert cell.value == c.mean_b
        assert cell.difference == pytest.approx(c.mean_b - c.mean_a, abs=1e-9)
        assert cell.low <= cell.difference <= cell.high
        assert (cell.low > 0 or cell.high < 0) == (cell.word in ("better", "worse"))
    for o in study.own:
        assert rows[o.method].cells[OWN].word == o.word
    assert rows["finetune"].cells["final"].word == "worse"
    assert rows["finetune"].cells[OWN].word == "forgets"


def test_rows_stand_by_tie_groups_and_holes_last(study: Analysis) -> None:
    rows = matrix_of(study).rows
    assert rows[-1].label == "lwf_ct"  # a case is missing: it cannot be ranked
    assert (rows[-1].groups, rows[-1].ranks_text) == ("", "–")
    assert rows[-2].label == "finetune"
    assert rows[-2].apart
    assert not set(rows[-2].groups) & set(rows[0].groups)
    (why,) = study.tied.left_out
    assert "1 of 12 test cases missing (btcv/103)" in why


def test_its_csv_holds_every_number(study: Analysis) -> None:
    matrix = matrix_of(study)
    rows = list(csv.DictReader(io.StringIO(render(matrix.table(), "csv"))))
    assert len(rows) == len(matrix.rows) * (len(matrix.heads) + 1)
    by_key = {(r["strategy"], r["measure"]): r for r in rows}
    cell = {row.label: row for row in matrix.rows}["finetune"].cells["kept"]
    assert float(by_key["finetune", "kept"]["low"]) == cell.low
    assert by_key["finetune", "kept"]["verdict"] == "worse"


def test_an_excluded_end_has_a_round_bracket() -> None:
    cell = Cell(
        value=0.826, difference=-0.004, low=-0.0081, high=0.0, open_ends=(False, True), word="worse"
    )
    assert cell.text == "0.826 ▼ −0.004 [−0.008, 0)"
    assert Cell(value=0.86, low=0.849, high=0.872).text == "0.860 [0.849, 0.872]"


def test_an_end_that_excludes_0_or_the_margin_is_not_printed_as_it() -> None:
    cell = Cell(value=0.8, difference=0.009, low=0.0004, high=0.0199999, word="better", margin=0.02)
    assert cell.text == "0.800 ▲ +0.009 [+0.0004, +0.0199999]"
    assert Cell(value=0.8, difference=-0.01, low=-0.02, high=0.0, margin=0.02).text == (
        "0.800 −0.010 [−0.020, +0.000]"
    )


def test_a_hole_of_the_reference_hides_no_number_and_no_rank_of_others(tmp_path: Path) -> None:
    methods = {
        "universal": Method(drop=((2, "btcv/103"),)),
        "mib": Method(),
        "finetune": Method(kept=-0.4),
    }
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    rows = {row.label: row for row in matrix.rows}
    assert math.isnan(rows["universal"].cells["final"].value)
    assert rows["mib"].cells["final"].value > rows["finetune"].cells["final"].value > 0.1
    assert rows["mib"].cells["final"].word == "hole"
    assert matrix.summary[0] == (
        "mib is better than the one other that could be ranked after the last step (1 pair tested "
        "together, for these training runs; not ranked: universal)."
    )


def test_the_seeds_of_a_row_are_those_its_difference_rests_on(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0, 1)), "finetune": Method(kept=-0.4)})
    table = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)).table()
    at = table.columns.index("seeds")
    assert [row[at] for row in table.rows] == ["2", "2 of 3"]
    lines = csv.DictReader(io.StringIO(render(table, "csv")))
    seeds = {x["measure"]: x["seeds"] for x in lines if x["strategy"] == "finetune"}
    assert (seeds["final"], seeds[OWN], seeds["train_min"]) == ("2", "3", "3")


def test_who_never_finished_is_not_among_those_that_were_beaten(tmp_path: Path) -> None:
    methods = {
        "universal": Method(),
        "finetune": Method(kept=-0.4),
        "lwf": Method(record={"status": "unfinished"}),
    }
    make_runs(tmp_path, methods)
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)
    matrix = matrix_of(study)
    assert matrix.summary[0] == (
        "universal is better than the one other that could be ranked after the last step (1 pair "
        "tested together, for these training runs; not ranked: lwf (no finished run))."
    )
    assert "lwf has no row: it has no finished run (3 unfinished)." in matrix.notes
    assert "lwf: no finished run" in study.tied.left_out
    assert any(line.startswith("lwf: no finished run (3 unfinished)") for line in limits(study))
    assert ("runs left out, unfinished", "3") in provenance(study)


def test_what_holds_for_these_runs_alone_has_a_sign_and_other_seeds_a_note(tmp_path: Path) -> None:
    methods = {
        "universal": Method(),
        "finetune": Method(kept=-0.4),
        "lwf": Method(kept=-0.4, seeds=(0,)),
    }
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    cells = {row.label: row.cells["final"] for row in matrix.rows}
    assert (cells["finetune"].symbol, cells["lwf"].symbol) == ("▼", "▼‡")
    assert any(note.startswith("‡ for these training runs alone") for note in matrix.notes)
    assert any("do not have the same seeds" in note for note in matrix.notes)


@pytest.mark.parametrize("first", ["universal", "joint"])
def test_the_leader_is_named_before_those_not_told_from_it(first: str, tmp_path: Path) -> None:
    ahead = {first: 0.012}
    methods = {
        "universal": Method(new=ahead.get("universal", 0.0)),
        "joint": Method(new=ahead.get("joint", 0.0), own_step1=True),
        "finetune": Method(kept=-0.4),
    }
    make_runs(tmp_path, methods)
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)
    (second,) = {"universal", "joint"} - {first}
    matrix = matrix_of(study)
    start = ""  # joint has a first step of its own, which may be why it leads
    if first == "joint":
        start = "; after step 1 it had 0.793, universal 0.797"
    assert matrix.summary[0] == (
        f"After the last step {first} has the largest mean, and is not told apart from {second} "
        f"(rank 1–2) (3 pairs tested together, for these training runs{start})."
    )
    assert [row.label for row in matrix.rows] == [first, second, "finetune"]


def test_what_is_shown_to_be_small_has_a_sign_and_a_count_of_its_own(tmp_path: Path) -> None:
    methods = {
        "universal": Method(noise=0.002),
        "lwf": Method(kept=-0.01, noise=0.002),
        "mib": Method(kept=-0.1, noise=0.002),
        "joint": Method(noise=0.002),
    }
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    cells = {row.label: row.cells for row in matrix.rows}
    assert [cells[m]["kept"].symbol for m in ("lwf", "mib", "joint")] == ["▽", "▼", "≈"]
    assert cells["lwf"]["kept"].word == "worse"
    assert "2 worse (1 by less than 0.02), 1 equivalent" in matrix.summary[1]
    assert "2 shown to forget (lwf, mib; 1 by less than 0.02)" in matrix.summary[2]
    assert any("▽ worse or forgets by less than 0.02" in note for note in matrix.notes)
    assert render(matrix.table(), "tex").isascii()


def test_the_undecided_have_no_sign_of_scope() -> None:
    assert Cell(word="undecided", scope=THESE_RUNS).symbol == "?"
    assert Cell(word="better", scope=THESE_RUNS).symbol == "▲‡"
    assert Cell(word="better", small=True, scope=THESE_RUNS).symbol == "△‡"


def test_test_cases_that_count_are_told_from_those_there_are(study: Analysis) -> None:
    # one patient of lits has no tumor
    assert "12 btcv; 12 lits, of which 11 hold a structure" in matrix_of(study).notes[0]


def ties(groups: Sequence[tuple[int, ...]], k: int) -> Tied:
    labels = tuple(f"s{i}" for i in range(k))
    made = Ties(
        order=tuple(range(k)), means=(0.5,) * k, p=np.ones((k, k)), groups=tuple(groups),
        ranks=((1, k),) * k, patients=8, m=k,
    )  # fmt: skip
    return Tied(ties=made, labels=labels)


def test_all_that_share_any_group_with_the_leader_are_named() -> None:
    tied = ties([(0, 1), (0, 2)], 3)
    strategies = [SimpleNamespace(label=label) for label in tied.labels]
    dice = SimpleNamespace(strategies=strategies, reference=strategies[0], never_finished={})
    study: Any = SimpleNamespace(tied=tied, dice=dice, comparisons=[])
    assert "not told apart from s1 (rank 1–3), s2 (rank 1–3) (" in _leaders(study, 3)


def test_a_line_divides_neighbors_without_a_common_group_beyond_z_too() -> None:
    tied = ties([(k,) for k in range(30)], 30)
    assert (tied.groups("s26"), tied.groups("s27")) == ("a1", "b1")
    assert not tied.together("s26", "s27")
    # letters alone would not tell: both hold a 1
    assert set(tied.groups("s26")) & set(tied.groups("s27"))
    assert ties([(0, 1), (1, 2)], 3).together("s1", "s2")


def test_a_course_of_one_step_has_no_column_of_forgetting(tmp_path: Path) -> None:
    methods = {"universal": Method(), "mib": Method(), "lwf": Method(step1=-0.3)}
    make_runs(tmp_path, methods, steps=STEPS[:1])
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)
    matrix = matrix_of(study)
    assert list(matrix.heads) == ["final"]
    # mib has the checkpoint of universal, so there is nothing to test
    words = {row.label: row.cells["final"].word for row in matrix.rows}
    assert words == {"universal": "", "mib": "shared", "lwf": "worse"}
    shared, other = (c for c in study.comparisons)
    assert (shared.m, other.m, shared.result is not None) == (1, 1, True)
    row, _ = csv.DictReader(io.StringIO(render(confirmatory_table(study), "csv")))
    audit(sentence(shared, QUICK), row, QUICK)


def test_all_pairs_are_tested_as_one_family_would_be() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0.8, 0.05, (9, 4))
    strategies = [base + shift + rng.normal(0, 0.01, (9, 4)) for shift in (0.0, 0.004, 0.1, -0.2)]
    ties = tie_groups([{"btcv": s} for s in strategies])
    assert ties.order == tuple(np.argsort([-s.mean() for s in strategies]))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    family = compare_family(
        [{"btcv": strategies[ties.order[i]] - strategies[ties.order[j]]} for i, j in pairs]
    )
    assert [ties.p[i, j] for i, j in pairs] == [c.p for c in family.comparisons]
    assert ties.ranks[0] == (1, 1)
    assert ties.ranks[3] == (4, 4)


def test_two_that_are_not_told_apart_share_a_group_across_one_that_differs() -> None:
    apart = np.zeros((4, 4), dtype=bool)
    for i, j in ((0, 1), (0, 3), (1, 2)):  # 0 and 2 tie although 1 stands between them
        apart[i, j] = apart[j, i] = True
    groups = groups_of(apart)
    assert groups == [(0, 2), (1, 3), (2, 3)]
    for i in range(4):
        for j in range(i):
            together = any({i, j} <= set(g) for g in groups)
            assert together == (not apart[i, j])


def test_of_equal_strategies_a_strict_winner_is_rarely_named() -> None:
    rng = np.random.default_rng(0)
    studies, winners = 60, 0
    for _ in range(studies):
        base = rng.normal(0, 1, (8, 1))
        tables = [{"a": 0.7 + 0.05 * base + rng.normal(0, 0.02, (8, 1))} for _ in range(10)]
        winners += tie_groups(tables).ranks[0] == (1, 1)
    # at most 5 %, as far as 60 studies can tell; 2,000 are in results/calibration: three standard errors above
    assert winners / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_too_few_patients_tell_nobody_apart() -> None:
    low, high = [[0.1]] * 4, [[0.9]] * 4
    ties = tie_groups([{"a": low}, {"a": high}])
    assert (ties.m, ties.groups, ties.ranks) == (0, ((0, 1),), ((1, 2), (1, 2)))


@pytest.fixture(scope="module")
def page(study: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    square = "<svg xmlns='http://www.w3.org/2000/svg' width='300' height='300'/>"
    uri = "data:image/svg+xml;base64," + base64.b64encode(square.encode()).decode()
    pictures = [
        {"name": name, "title": name, "caption": name, "uri": uri}
        for name in ("plane", "forgetting")
    ]
    out = tmp_path_factory.mktemp("report")
    matrix = matrix_of(study)
    return write_report(study, out, matrix=matrix, command="clbench report", pictures=pictures)[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_sorts_the_matrix_and_opens_the_fold_of_a_link(
    page: Path, tmp_path: Path
) -> None:
    probe = """<script>
    const table = document.getElementById('matrix'), seen = {};
    const names = () => [...table.tBodies[0].rows].map(r => r.cells[0].firstChild.textContent.trim());
    seen.first = names();
    table.tHead.rows[0].cells[3].querySelector('button').click(); seen.up = names();
    const shown = k => [...table.tBodies[0].rows].map(r => r.cells[k].querySelector('.value').textContent);
    seen.values = shown(3);
    table.tHead.rows[0].cells[4].querySelector('button').click(); seen.kept = shown(4);
    seen.closed = [...document.querySelectorAll('details')].every(d => !d.open);
    location.hash = '#table-confirmatory'; unfold();
    seen.open = document.querySelector('#tables details').open;
    dispatchEvent(new Event('beforeprint'));
    seen.paper = [...document.querySelectorAll('details')].every(d => d.open);
    seen.wide = document.documentElement.scrollWidth <= innerWidth;
    document.body.append(Object.assign(document.createElement('pre'),
      {id: 'seen', textContent: JSON.stringify(seen)}));
    </script></body>"""
    (tmp_path / "page.html").write_text(page.read_text("utf-8").replace("</body>", probe), "utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--window-size=400,900", f"--user-data-dir={tmp_path / 'profile'}",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert match is not None
    seen = json.loads(unescape(match[1]))
    assert seen["first"][-1] == "lwf_ct"
    for column in ("values", "kept"):  # a cell without a number stands last, and disturbs no order
        numbers = [float(v.replace("−", "-")) for v in seen[column] if v != "–"]
        assert numbers == sorted(numbers)
        assert seen[column][-1] == "–"
    assert seen["up"] != seen["first"]
    assert (seen["closed"], seen["open"], seen["paper"], seen["wide"]) == (True,) * 4


@pytest.mark.skipif(
    CHROMIUM is None or shutil.which("pdftotext") is None, reason="no Chromium or no pdftotext"
)
def test_on_paper_two_pages_answer_and_an_appendix_follows(page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
         f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}", page.as_uri()],
        capture_output=True, timeout=600, check=True,
    )  # fmt: skip
    text = subprocess.run(
        ["pdftotext", "-layout", str(pdf), "-"], capture_output=True, text=True, check=True
    ).stdout
    first, _, third, *_ = text.split("\f")
    assert "own forgetting" in first
    assert "Verdicts" in third
    assert "Each sentence is made from its test" in third  # the folds are open


def test_an_excluded_end_changes_sides_with_the_difference(study: Analysis) -> None:
    c = next(c for c in study.comparisons if c.result is not None)
    assert c.result is not None
    shown = replace(c.result, low=0.0, low_open=True, high=0.1, high_open=False)
    cell = _cell(replace(c, result=shown), QUICK)
    assert (cell.low, cell.high, cell.open_ends) == (-0.1, 0.0, (False, True))


def test_own_ends_stay_apart_from_the_margin(study: Analysis) -> None:
    o = next(o for o in study.own if o.result is not None)
    assert o.result is not None
    cell = _own_cell(replace(o, result=replace(o.result, low=-0.0199999)), QUICK)
    assert "[−0.0199999" in cell.interval_text


def test_own_forgetting_and_seeds_of_each_row(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "lwf": Method(kept=-0.4, seeds=(0,))})
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    rows = {row.label: row for row in matrix.rows}
    assert rows["lwf"].cells[OWN].symbol == "▼‡"
    assert {label: row.seeds for label, row in rows.items()} == {"universal": 3, "lwf": 1}


def test_the_reference_s_change_may_lie_below_0(tmp_path: Path) -> None:
    make_runs(tmp_path, {"finetune": Method(kept=-0.4), "joint": Method()})
    study = Analysis(results=tmp_path, bench="tumor_ext", reference="finetune", protocol=QUICK)
    kept = matrix_of(study).rows[-1].cells["kept"]
    assert kept.low < kept.value < kept.high < 0


def test_minutes_are_of_the_whole_course_and_multiples_of_the_reference(tmp_path: Path) -> None:
    def costs(train_s: float, prepare_s: float) -> dict[str, Any]:
        later = {"train_s": train_s, "prepare_s": prepare_s}
        return {"cost": {"1": {"train": {"train_s": 60.0}}, "2": {"train": later}}}

    methods = {
        "universal": Method(record=costs(60, 0)),
        "joint": Method(record=costs(120, 60) | {"device": "cuda"}),
    }
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    assert {row.label: row.cost_text for row in matrix.rows} == {
        "universal": "2.0 ±0.0", "joint": "4.0 ±0.0, 2.00×",
    }  # fmt: skip
    assert any("different devices are not comparable (cpu, cuda)" in n for n in matrix.notes)


def test_the_summary_counts_what_the_cells_say(study: Analysis) -> None:
    matrix = matrix_of(study)
    assert matrix.summary[1:] == (
        (
            "Against universal, of 3 other strategies after the last step: 1 worse, 1 better, 1 "
            "without a number."
        ),
        (
            "Old structures, of 4 strategies: 1 shown to forget (finetune); 2 shown to keep (joint, "
            "universal); 1 without a number (lwf_ct)."
        ),
    )
    assert (SYMBOLS["forgets"], SYMBOLS["gains"]) == (SYMBOLS["worse"], SYMBOLS["better"])


def test_the_note_on_keeping_has_the_margin(study: Analysis) -> None:
    wide = replace(study, protocol=replace(QUICK, margin=0.05))
    assert any("a loss of 0.05 is ruled out" in note for note in matrix_of(wide).notes)


def test_the_note_counts_scans_as_test_cases(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "mib": Method()}, scans=2)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    assert "24 btcv of 12 patients; 24 lits of 12 patients, of which 11 hold" in matrix.notes[0]


def test_every_column_of_its_csv_is_that_of_the_cell(study: Analysis) -> None:
    matrix = matrix_of(study)
    lines = {
        (r["strategy"], r["measure"]): r
        for r in csv.DictReader(io.StringIO(render(matrix.table(), "csv")))
    }
    for row in matrix.rows:
        for name, cell in row.cells.items():
            line = lines[row.label, name]
            ranks = tuple(int(line[k]) for k in ("rank_best", "rank_worst") if line[k])
            assert ranks == (row.ranks or ())
            for column in ("value", "difference", "low", "high"):
                value = float(line[column] or "nan")
                assert value == pytest.approx(getattr(cell, column), nan_ok=True), column
            assert (line["low_open"], line["high_open"]) == tuple(map(str, cell.open_ends))
            words = (cell.word, str(cell.small), cell.scope, cell.why)
            assert tuple(line[k] for k in ("verdict", "small", "scope", "why")) == words
            assert (line["seeds"], line["groups"]) == (str(row.seeds), row.groups)


def test_excluded_ends_stand_in_their_columns(study: Analysis) -> None:
    matrix = matrix_of(study)
    cell = replace(matrix.rows[0].cells["final"], open_ends=(False, True))
    row = replace(matrix.rows[0], cells={"final": cell}, ranks=(1, 3))
    first = next(csv.DictReader(io.StringIO(render(replace(matrix, rows=(row,))._long(), "csv"))))
    assert (first["low_open"], first["high_open"]) == ("False", "True")
    assert (first["rank_best"], first["rank_worst"]) == ("1", "3")


def test_behind_a_hole_of_the_reference_stands_the_number_of_that_column(tmp_path: Path) -> None:
    methods = {"universal": Method(drop=((2, "btcv/103"),)), "finetune": Method(kept=-0.4)}
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    cell = {row.label: row for row in matrix.rows}["finetune"].cells["kept"]
    assert cell.word == "hole"
    assert cell.value == pytest.approx(-0.4, abs=0.03)


@pytest.mark.parametrize("holed", ["universal", "finetune"])
def test_a_case_missing_at_its_own_step_alone_is_a_hole_of_the_page_too(
    holed: str, tmp_path: Path
) -> None:
    """`clbench report` and `clbench league` end with KeyError here."""
    missing = {holed: ((1, "btcv/103"),)}
    methods = {
        "universal": Method(drop=missing.get("universal", ())),
        "finetune": Method(kept=-0.4, drop=missing.get("finetune", ())),
    }
    make_runs(tmp_path, methods)
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    rows = {row.label: row for row in matrix.rows}
    assert math.isnan(rows[holed].cells["kept"].value)
    assert rows["finetune"].cells["kept"].word == "hole"
    assert rows["finetune"].cells["final"].word == "worse"


@pytest.mark.parametrize("holed", ["universal", "joint"])
def test_a_leader_whose_start_is_not_known_is_named_without_it(holed: str, tmp_path: Path) -> None:
    missing = {holed: ((1, "btcv/103"),)}
    methods = {
        "universal": Method(drop=missing.get("universal", ())),
        "joint": Method(new=0.1, own_step1=True, drop=missing.get("joint", ())),
    }
    make_runs(tmp_path, methods)
    first = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)).summary[0]
    assert first.startswith("joint is better than")
    assert "after step 1" not in first
    assert "nan" not in first


def test_notes_hold_for_the_matrix_above_them(tmp_path: Path) -> None:
    """Two strategies: one pair, one comparison, all signs hollow, nothing limited to these runs."""
    make_runs(tmp_path, {"universal": Method(noise=0.001), "lwf": Method(kept=-0.01, noise=0.001)})
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    signs = {c.symbol for row in matrix.rows for c in row.cells.values()}
    notes = "\n".join(matrix.notes)
    assert "▽" in "".join(signs)
    assert ("▼ " in notes) == any("▼" in sign for sign in signs)
    assert ("‡ for these" in notes) == any("‡" in sign for sign in signs)
    assert "which are fewer" not in notes
    assert "11 hold a structure" in notes


def test_one_strategy_has_the_number_of_cases_that_count(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()})
    matrix = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK))
    assert "12 lits, of which 11 hold" in matrix.notes[0]


def test_a_hole_of_the_reference_on_an_external_set_hides_nobody_elses_number(
    tmp_path: Path,
) -> None:
    make_runs(tmp_path, {"universal": Method(), "mib": Method()})
    add_external(tmp_path, "clinic", ["liver", "spleen"], {"universal": 0.0, "mib": 0.01})
    folder = next((tmp_path / "tumor_ext" / "universal").iterdir())
    rows = run_folder.read_scores(folder / "scores.csv")
    gone = ("clinic", "9003", 2)
    kept = [r for r in rows if (r.eval_set, r.case, r.step) != gone]
    run_folder.write_scores(folder / "scores.csv", kept)
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)
    cells = {row.label: row.cells["final, clinic"] for row in matrix_of(study).rows}
    assert {cell.word for cell in cells.values()} == {"hole"}
    assert math.isnan(cells["universal"].value)
    there = study.measured_on("clinic").dice
    mib = next(m for m in there.strategies if m.label == "mib")
    assert cells["mib"].value == pytest.approx(mib.over_seeds(2, ["spleen", "liver"])[0])
    assert "1 of 8 test cases missing (clinic/9003)" in cells["mib"].why


def test_one_strategy_with_a_missing_case_names_it(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,), drop=((2, "btcv/103"),))})
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)
    matrix = matrix_of(study)
    missing = "universal: spleen after step 2, seed 0: 1 of 12 test cases missing (btcv/103)"
    assert matrix.rows[0].cells["final"].why == missing
    assert any(missing in note for note in matrix.notes)
    assert limits(study)[0].startswith(f"Hole: {missing}.")
    said = dict(checklist(study))["Unit of analysis, and n?"]
    assert said == "patient; test cases: 12 btcv; 12 lits"  # a hole: nobody knows how many count
    assert matrix.summary[-1].startswith("Old structures, of 1 strategy: ")


def test_equal_means_share_the_first_place(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(noise=0), "zeta": Method(noise=0), "mib": Method()})
    said = matrix_of(Analysis(results=tmp_path, bench="tumor_ext", protocol=QUICK)).summary[0]
    assert "has the largest mean" not in said
    assert re.search(r"After the last step (universal and zeta|mib) ", said)
    assert "share the largest mean" in said


def test_the_page_says_on_how_many_seeds_a_difference_rests(tmp_path: Path) -> None:
    methods = {"universal": Method(seeds=(0, 1)), "mib": Method(), "lwf": Method(seeds=(0,))}
    make_runs(tmp_path / "runs", methods)
    study = Analysis(results=tmp_path / "runs", bench="tumor_ext", protocol=QUICK)
    page = write_report(study, tmp_path / "out", matrix=matrix_of(study), command="c")[0]
    said = re.findall(r"<small>([^<]* seeds?)</small>", page.read_text())
    assert sorted(said) == ["1 seed", "2 of 3 seeds", "2 seeds"]
