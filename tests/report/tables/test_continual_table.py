"""The table of continual measures: means over seeds, reasons in notes, joint by seed, the trace."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_runs import THREE_STEPS, Method, add_external, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import SettingError, StoreError
from clbench.evaluation.metrics import continual
from clbench.evaluation.metrics.continual import NAMES
from clbench.evaluation.metrics.stability_gap import TraceRow, write_trace
from clbench.report.study import Study
from clbench.report.tables.continual import continual_table, learning_table
from clbench.report.tables.render import EMPTY, PERCENT, SHARE, Table, render
from clbench.store import run_folder

FEW = {"btcv": 4, "lits": 4}


def cell(table: Table, words: str, column: str) -> str:
    row = next(r for r in table.rows if r[0] == words)
    return row[table.columns.index(column)]


def test_every_measure_of_every_strategy(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(kept=-0.1), "joint": Method()}, patients=FEW)
    table = continual_table(Study(results=tmp_path, bench="tumor_ext"))
    assert {r[0] for r in table.rows} >= set(NAMES.values())
    bwt = [
        continual.mean(continual.backward_transfer(r, at, 2).values())
        for f in sorted(tmp_path.glob("tumor_ext/universal/*"))
        for rows in [run_folder.read_scores(f / "scores.csv")]
        for at in [{r.structure: r.learned_at for r in rows}]
        for r in [continual.matrix(rows, ("btcv", "lits"), scoring="strict")]
    ]
    text = f"{continual.mean(bwt):.3f} ± {continual.spread(bwt):.3f}"
    assert cell(table, NAMES["bwt"], "universal") == text
    assert cell(table, NAMES["delta_joint"], "joint") == "0.000 ± 0.000"
    assert cell(table, NAMES["forward"], "universal") == EMPTY
    notes = "\n".join(table.notes)
    assert "forward transfer: n/a, class-incremental" in notes
    assert "domain transfer: n/a, no structure is annotated both" in notes
    assert "stability gap: n/a, no trace.csv" in notes
    assert "bwt,backward transfer (GEM: last row),universal,0,-0" in render(table, "csv")
    percent = continual_table(Study(results=tmp_path, bench="tumor_ext"), scale=PERCENT)
    want = f"{100 * continual.mean(bwt):.1f} ± {100 * continual.spread(bwt):.1f}"
    assert cell(percent, NAMES["bwt"], "universal") == want
    assert percent.title.endswith("Dice, %")
    assert render(percent, "csv") == render(table, "csv")  # what is kept has one unit


def test_without_joint_with_two_and_with_a_hole(tmp_path: Path) -> None:
    method = Method(drop=[(2, "jhh_organ/100")])
    few = dict.fromkeys(("jhh_organ", "jhh_gastro", "jhh_cardiac"), 4)
    make_runs(
        tmp_path, {"universal": method, "lwf_ct": Method()}, bench="body_ext", steps=THREE_STEPS,
        patients=few,
    )  # fmt: skip
    table = continual_table(Study(results=tmp_path, bench="body_ext"))
    assert cell(table, NAMES["intransigence"], "lwf_ct") == EMPTY
    assert cell(table, NAMES["forgetting"], "universal") == EMPTY  # needs step 2
    assert cell(table, NAMES["bwt"], "universal") != EMPTY  # does not
    notes = "\n".join(table.notes)
    assert "there is no run of joint training" in notes
    assert "of universal: n/a" in notes
    assert "has no score after step 2" in notes
    for bound in ("a", "b"):
        make_runs(
            tmp_path, {"joint": Method(identity={"strategy": {"class": "Joint", "x": bound}})},
            bench="body_ext", steps=THREE_STEPS, patients=few,
        )  # fmt: skip
    notes = "\n".join(continual_table(Study(results=tmp_path, bench="body_ext")).notes)
    assert "several variants of joint training" in notes


def test_the_liver_on_lits_after_step_1(tmp_path: Path) -> None:
    """LiTS annotates the liver too: how the liver of BTCV does there before LiTS is taught."""
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))}, patients=FEW)
    rows = [
        replace(r, status="ok", value=v, gt_vox=9, pred_vox=9)
        if (r.eval_set, r.structure, r.step) == ("lits", "liver", 1)
        and not math.isnan(v := 0.1 * (1 + int(r.case) % 10))
        else r
        for r in run_folder.read_scores(folder / "scores.csv")
    ]
    run_folder.write_scores(folder / "scores.csv", rows)
    table = continual_table(Study(results=tmp_path, bench="tumor_ext"))
    assert cell(table, "domain transfer: liver on lits, after step 1", "universal") == "0.250"


def test_a_hole_is_no_domain_transfer_over_the_rest(tmp_path: Path) -> None:
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))}, patients=FEW)
    rows = [
        replace(r, status="ok", value=0.5, gt_vox=9, pred_vox=9)
        if (r.eval_set, r.structure, r.step) == ("lits", "liver", 1)
        else r
        for r in run_folder.read_scores(folder / "scores.csv")
    ]
    run_folder.write_scores(
        folder / "scores.csv",
        [
            r
            for r in rows
            if (r.eval_set, r.structure, r.step, r.case) != ("lits", "liver", 1, "201")
        ],
    )
    table = continual_table(Study(results=tmp_path, bench="tumor_ext"))
    name = "domain transfer: liver on lits, after step 1"
    assert cell(table, name, "universal") == EMPTY
    assert any(name in n and "1 of 4 test cases missing (lits/201)" in n for n in table.notes)


def test_a_distance_that_grows_is_a_loss_and_is_never_in_percent(tmp_path: Path) -> None:
    folders = make_runs(tmp_path, {"universal": Method(), "joint": Method()}, patients=FEW)
    for folder in folders:
        rows = run_folder.read_scores(folder / "scores.csv")
        mm = {1: 5.0, 2: 25.0}
        rows += [
            replace(r, metric=name, value=r.value if math.isnan(r.value) else mm[r.step])
            for r in rows
            for name in ("hd95_mm", "asd_bsp", "volume_error_ml")
            if r.scoring == "strict"
        ]
        run_folder.write_scores(folder / "scores.csv", rows)
    study = Study(results=tmp_path, bench="tumor_ext")
    table = continual_table(study, metric="hd95_mm")
    assert table.title.endswith("continual-learning measures, hd95_mm")
    assert cell(table, NAMES["old"], "universal") == "25.000 ± 0.000"
    assert cell(table, NAMES["bwt"], "universal") == "-20.000 ± 0.000"
    for name in ("forgetting", "forgetting_first_last", "forgetting_mammoth"):
        assert cell(table, NAMES[name], "universal") == "20.000 ± 0.000"
    assert any(n.startswith("smaller is better") for n in table.notes)
    assert "stability gap: n/a, trace.csv holds Dice alone" in "\n".join(table.notes)
    assert continual_table(study, metric="asd_bsp").title.endswith("asd_bsp, voxels")
    signed = continual_table(study, metric="volume_error_ml")
    assert cell(signed, NAMES["old"], "universal") == "25.000 ± 0.000"
    assert cell(signed, NAMES["bwt"], "universal") == EMPTY
    with pytest.raises(SettingError, match="hd95_mm is no share"):
        continual_table(study, metric="hd95_mm", scale=PERCENT)


def test_the_stability_gap_of_traced_runs(tmp_path: Path) -> None:
    make_runs(
        tmp_path, {"universal": Method(seeds=(0,)), "lwf_ct": Method(seeds=(0,))}, patients=FEW
    )
    folder = next(f for f in run_folder.find_runs(tmp_path) if f.parent.name == "universal")
    rows = [
        TraceRow(step=2, update=u, eval_set="btcv", case="7", structure=c, learned_at=at, value=v,
                 status="ok")
        for c, at, values in (("liver", 1, (0.9, 0.4, 0.8)), ("liver_tumor", 2, (0.0, 0.1, 0.3)))
        for u, v in zip((0, 10, 20), values, strict=True)
    ]  # fmt: skip
    write_trace(folder / "trace.csv", rows)
    table = continual_table(Study(results=tmp_path, bench="tumor_ext"))
    gap = {r[0].split(": ")[1].split(" ")[0]: r[0] for r in table.rows if r[0].startswith("stab")}
    assert cell(table, gap["depth"], "universal") == "0.500"
    assert cell(table, gap["transient"], "universal") == "0.400"
    assert cell(table, gap["persistent"], "universal") == "0.100"
    assert cell(table, gap["WC-ACC"], "universal") == "0.350"
    assert cell(table, gap["depth"], "lwf_ct") == EMPTY
    assert "stability gap of lwf_ct: n/a, no trace.csv" in "\n".join(table.notes)


def test_without_validation_cases_of_the_new_structure_wc_acc_alone_is_a_hole(
    tmp_path: Path,
) -> None:
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))}, patients=FEW)
    rows = [
        TraceRow(step=2, update=u, eval_set="btcv", case="7", structure=c, learned_at=at, value=v,
                 status=s)
        for c, at, values, s in (
            ("liver", 1, (0.9, 0.4, 0.8), "ok"), ("liver_tumor", 2, (math.nan,) * 3, "both_empty"),
        )
        for u, v in zip((0, 10, 20), values, strict=True)
    ]  # fmt: skip
    write_trace(folder / "trace.csv", rows)
    table = continual_table(Study(results=tmp_path, bench="tumor_ext"))
    gap = {r[0].split(": ")[1].split(" ")[0]: r[0] for r in table.rows if r[0].startswith("stab")}
    assert cell(table, gap["min-ACC"], "universal") == "0.400"
    assert cell(table, gap["WC-ACC"], "universal") == EMPTY
    said = "\n".join(table.notes)
    assert "no validation case holds a structure of this step" in said
    assert "not traced from update 0" not in said


def test_a_trace_is_of_validation_cases_and_of_no_external_set(tmp_path: Path) -> None:
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))}, patients=FEW)
    add_external(tmp_path, "clinic", ["spleen", "liver"], {"universal": 0.0})
    rows = [
        TraceRow(step=2, update=u, eval_set="btcv", case="7", structure=c, learned_at=at,
                 value=0.5 + u / 100, status="ok")
        for c, at in (("pancreas", 1), ("liver_tumor", 2))
        for u in (0, 10)
    ]  # fmt: skip
    write_trace(folder / "trace.csv", rows)
    own = Study(results=tmp_path, bench="tumor_ext", scoring="paper")
    (note,) = (n for n in continual_table(own).notes if n.startswith("stability gap"))
    assert "validation cases on the network's grid, whatever the scoring" in note
    there = continual_table(own.measured_on("clinic"))
    gaps = [row for row in there.rows if row[0].startswith("stability gap")]
    assert {row[1] for row in gaps} == {EMPTY}
    said = "\n".join(there.notes)
    assert "n/a, traced on validation cases of the course, not here" in said
    assert "on the network's grid" not in said


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished runs"):
        continual_table(Study(results=tmp_path, bench="tumor_ext"))


# ------------------------------------------------------------------------------------- in percent


def test_percent_is_the_same_number_in_every_table(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "lwf_ct": Method(kept=-0.1)}, patients=FEW)

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["table", *words, "--results", str(tmp_path)])
        assert done.exit_code == 0, done.output
        return done.output

    for words in (["10", "--source", "both"], ["summary"], ["learning"], ["continual"]):
        plain, percent = said(*words), said(*words, "--percent")
        assert "Dice, %" in percent
        assert "Dice, %" not in plain
        assert re.search(r"0\.[5-9]\d\d", plain)
    assert "95.5 p" in said("10", "--source", "printed", "--percent")
    assert "89.1 p" in said("11", "--source", "printed", "--percent")
    assert said("10", "--source", "both", "--percent", "--format", "csv") == said(
        "10", "--source", "both", "--format", "csv"
    )
    assert (SHARE.number(0.8174), PERCENT.number(0.8174)) == ("0.817", "81.7")
    assert (SHARE.signed(-0.0125), PERCENT.signed(-0.0125)) == ("−0.013", "−1.2")
    assert PERCENT.number(math.nan) == SHARE.over_seeds([math.nan]) == EMPTY


# ------------------------------------------------------------------------------ kept and learned


def test_a_difference_from_joint_rests_on_the_seeds_of_both(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "joint": Method(seeds=(0,))}, patients=FEW)
    table = learning_table(Study(results=tmp_path, bench="tumor_ext"))
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    seeds = {r["measure"]: r["seeds"] for r in rows if r["strategy"] == "universal"}
    assert {name: seeds[name] for name in ("Old", "BWT", "Forgetting")} == {
        "Old": "3", "BWT": "3", "Forgetting": "3",
    }  # fmt: skip
    assert (seeds["Intransigence"], seeds["Δ joint"]) == ("1", "1")
