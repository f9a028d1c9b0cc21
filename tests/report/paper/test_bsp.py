"""BSP's printed tables: what is odd about them, and measured runs beside them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import Method, add_external, make_runs

from clbench.errors import SettingError
from clbench.report.paper.bsp import BESIDE, WHAT, bsp_table, printed_means_apart, published_rows
from clbench.report.significance.analysis import Analysis
from clbench.report.tables.render import render
from clbench.spec import registry
from clbench.store import run_folder

STEPS = (
    ("liver", "lits", ("liver",)),
    ("kidneys", "kits", ("right_kidney", "left_kidney")),
    ("gall bladder", "amos", ("gall_bladder",)),
)


def study(results: Path) -> Analysis:
    return Analysis(results=results, bench="public_ext")


def test_two_printed_means_are_not_those_of_their_cells() -> None:
    apart = printed_means_apart("dice")
    assert {key: (a, round(b, 3)) for key, (a, b) in apart.items()} == {
        ("II", "internal", "LwF"): (44.49, 44.497),
        ("III", "internal", "Universal+BSP"): (90.36, 90.192),
    }
    assert printed_means_apart("asd_bsp") == {}
    means = [r for r in published_rows() if r["structure"] == "mean"]
    assert len(means) == 30  # the missing ones of 210 rows stand in no cell
    assert {r["table"] for r in means} == set(WHAT)
    assert {r["method"] for r in means} == set(BESIDE)


@pytest.mark.parametrize("which", WHAT)
def test_printed_tables_mark_them_and_say_what_is_printed_only(tmp_path: Path, which: str) -> None:
    table = bsp_table(which, study(tmp_path), source="printed")
    marked = {row[0]: row[-1] for row in table.rows if "≠" in row[-1]}
    expected = {"II": {"LwF": "44.49 p ≠"}, "III": {"Universal+BSP": "90.36 p ≠"}}
    assert marked == expected.get(which, {})
    assert any("its loss is in no public code" in note for note in table.notes)
    assert "≠" not in render(table, "tex")  # pdflatex has no such letter


def test_runs_stand_beside_the_printed_method_on_each_test_set(tmp_path: Path) -> None:
    methods = {name: Method(seeds=(0,)) for name in ("plop", "universal", "der")}
    make_runs(tmp_path, methods, bench="public_ext", steps=STEPS)
    shifts = dict.fromkeys(methods, 0.0)
    add_external(tmp_path, "btcv", ["liver", "gall_bladder"], shifts)
    add_external(tmp_path, "amos_validation", ["liver"], shifts)
    table = bsp_table("IV", study(tmp_path))
    rows = [row[:2] for row in table.rows]
    assert rows[rows.index(("PLOP", "btcv")) + 1] == ("plop", "btcv")
    assert rows.count(("der", "amos")) == 1
    plop = table.rows[rows.index(("plop", "btcv"))]
    assert plop[2] == "1"  # seed
    assert plop[3].endswith(" m")
    assert plop[4] == "–"  # no step teaches it
    there = study(tmp_path).measured_on("btcv").dice.strategies
    mean, _ = next(m for m in there if m.label == "plop").over_seeds(3, ["liver"])
    assert plop[3] == f"{100 * mean:.2f} m"
    with pytest.raises(SettingError, match="no hd95_mm"):
        bsp_table("IV", study(tmp_path), metric="hd95_mm")
    with pytest.raises(SettingError, match="no numbers of this benchmark"):
        bsp_table("IV", Analysis(results=tmp_path, bench="tumor_ext"))


def test_other_seeds_are_said_and_carry_no_mark(tmp_path: Path) -> None:
    for name, seeds in (("same", (0, 1)), ("other", (0,))):
        methods = {"plop": Method(seeds=(0, 1)), "der": Method(seeds=seeds, kept=-0.1)}
        make_runs(tmp_path / name, methods, bench="public_ext", steps=STEPS)
    same, other = (
        bsp_table("II", study(tmp_path / name), source="both") for name in ("same", "other")
    )
    seeds = {row[0]: row[2] for row in other.rows}
    assert (seeds["plop"], seeds["der"], seeds["PLOP"]) == ("2", "1", "")
    measured = {i for i, row in enumerate(other.rows) if row[0] in ("plop", "der")}
    assert {i for i, _ in same.marks} & measured
    assert not {i for i, _ in other.marks} & measured
    assert {key for key in same.marks if key[0] not in measured} == set(other.marks)
    assert any(
        n.startswith("internal: not the same seeds everywhere (der: 0; plop: 0, 1)")
        for n in other.notes
    )
    lines = list(csv.DictReader(io.StringIO(render(other, "csv"))))
    assert {(x["method"], x["seeds"]) for x in lines} >= {("plop", "2"), ("der", "1"), ("PLOP", "")}
    assert "seeds" not in bsp_table("II", study(tmp_path / "same"), source="printed").columns


def test_a_missed_case_has_no_distance_and_is_no_hole(tmp_path: Path) -> None:
    """The first patient of the last source is missed by all: it drops out, and is counted."""
    folders = make_runs(
        tmp_path, {"plop": Method(seeds=(0,)), "der": Method(seeds=(0,))}, bench="public_ext",
        steps=STEPS,
    )  # fmt: skip
    for folder in folders:
        rows = run_folder.read_scores(folder / "scores.csv")
        rows += [
            replace(r, metric=name, value=2.0 if r.status == "ok" else math.nan)
            for r in rows
            for name in ("asd_bsp", "assd_mm")
            if r.metric == "dice" and r.scoring == "strict"
            and (r.strategy, r.case, r.structure) != ("der", "101", "liver")
        ]  # fmt: skip
        run_folder.write_scores(folder / "scores.csv", rows)
    for metric in ("asd_bsp", "assd_mm"):
        scores = study(tmp_path).need_scores(metric=metric)
        der, plop = scores.strategies
        assert plop.over_seeds(3, ["gall_bladder"])[0] == 2.0
        assert [line for line in scores.holes() if "plop" in line] == []
        assert f"left out: plop missed the structure in 1 of 46 cases after the last step, which have no {metric}" in scores.notes()  # fmt: skip
        assert "1 of 12 test cases missing (lits/101)" in der.hole(
            [("liver", 3)]
        )  # a row is not there
    rows = run_folder.read_scores(folders[0] / "scores.csv")
    gone = [replace(r, status="fn_only", value=math.nan) if r.metric == "assd_mm" and r.status == "ok"
            and r.structure == "gall_bladder" else r for r in rows]  # fmt: skip
    run_folder.write_scores(folders[0] / "scores.csv", gone)
    of_all = study(tmp_path).need_scores(metric="assd_mm").strategies[1]
    assert "missed in every test case of amos that holds it" in of_all.hole([("gall_bladder", 3)])


def test_the_course_has_the_printed_sizes() -> None:
    course = registry.benchmark("public_ext")
    sizes = [(s.split.draw.train, s.split.draw.test) for s in course.steps if s.split.draw]
    assert sizes == [(105, 26), (33, 8), (225, 56), (168, 42), (160, 40)]
    btcv, amos = (external.split for external in course.external_tests)
    assert len(btcv.test) == 30
    assert amos.draw is not None
    assert amos.draw.test == 100
    assert course.shown(5) == {"gall_bladder"}
