"""Learning, detection, distances, cost: by hand, and holes where nothing was scored."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import locations
import pandas as pd
import pytest
from locations import GOLDEN_FILES
from synthetic_runs import THREE_STEPS, Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.report.page.checklist import checklist
from clbench.report.paper.detection import distances, table6
from clbench.report.scores import count_patients
from clbench.report.significance.analysis import Analysis
from clbench.report.study import Protocol, Study
from clbench.report.tables.continual import NO_INTERVAL, learning_table, measures
from clbench.report.tables.costs import MACS, cost_table
from clbench.report.tables.render import EMPTY, FORMATS, Table, render
from clbench.statistics.intervals import wilson
from clbench.statistics.macro_estimate import ONE_RUN
from clbench.store import run_folder

SHARED = locations.SHARED / "paper"


def row(table: Table, label: str) -> list[str]:
    (found,) = [r for r in table.rows if r[0] == label]
    return list(found)


# --------------------------------------------------------------------------------------- learning


def test_measures_by_hand(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(kept=-0.1), "joint": Method(own_step1=True)},
              patients={"btcv": 5, "lits": 5})  # fmt: skip
    study = Study(results=tmp_path, bench="tumor_ext")
    e = study.dice
    found = measures(e, e.reference, Protocol())
    by_label = {s.label: s for s in e.strategies}
    g, j = by_label["universal"], by_label["joint"]
    old = [c for c, s in e.learned_at.items() if s == 1]
    assert found["Old"].value == pytest.approx(g.over_seeds(2, old)[0])
    assert found["Old"].sd == pytest.approx(g.over_seeds(2, old)[1])
    assert found["New"].value == pytest.approx(g.over_seeds(2, ["liver_tumor"])[0])
    assert found["All"].value == pytest.approx(g.over_seeds(2, [*old, "liver_tumor"])[0])
    bwt = [continual.mean(continual.backward_transfer(r, e.learned_at, 2).values()) for r in g.r]
    assert found["BWT"].value == pytest.approx(continual.mean(bwt))
    assert found["BWT"].low < found["BWT"].value < found["BWT"].high
    assert found["Forgetting"].value == pytest.approx(-found["BWT"].value)
    new = j.over_seeds(2, ["liver_tumor"])[0] - g.over_seeds(2, ["liver_tumor"])[0]
    assert found["Intransigence"].value == pytest.approx(new)
    assert found["Δ joint"].value == pytest.approx(
        g.over_seeds(2, list(e.learned_at))[0] - j.over_seeds(2, list(e.learned_at))[0]
    )
    table = learning_table(study)
    assert "PHANTOM" in table.title
    assert row(table, "joint")[-1].startswith("+0.000")
    long = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(long) == 14


def test_forgetting_takes_the_best_earlier_step(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(kept=0.05)}, bench="body_ext", steps=THREE_STEPS,
              patients=dict.fromkeys(("jhh_organ", "jhh_gastro", "jhh_cardiac"), 4))  # fmt: skip
    study = Study(results=tmp_path, bench="body_ext")
    e = study.dice
    found = measures(e, e.reference, Protocol())
    by_hand = [
        continual.mean(continual.forgetting(r, e.learned_at, 3).values()) for r in e.reference.r
    ]
    assert found["Forgetting"].value == pytest.approx(continual.mean(by_hand))
    assert math.isnan(found["Forgetting"].low)  # no interval: a maximum of means
    assert found["Intransigence"].why == "no run of joint"
    notes = learning_table(study).notes
    assert any("no run of joint" in n for n in notes)
    # there is a value, so nothing is missing; what it has not is an interval
    assert not any("Forgetting" in n and ("hole" in n or "missing" in n) for n in notes)
    assert any(NO_INTERVAL in n for n in notes)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ({"universal": (0,), "lwf": (0,)}, f"Old, New, All, BWT, Forgetting: {ONE_RUN}"),
        (
            {"universal": (0,), "lwf": (0, 1)},
            f"universal, Old, New, All, BWT, Forgetting: {ONE_RUN}",
        ),
        ({"universal": (0, 1), "lwf": (0, 1)}, None),
    ],
)
def test_what_to_know_of_intervals_stands_below_them(
    seeds: dict[str, tuple[int, ...]], said: str | None, tmp_path: Path
) -> None:
    make_runs(tmp_path, {name: Method(seeds=s) for name, s in seeds.items()},
              patients={"btcv": 6, "lits": 6})  # fmt: skip
    table = learning_table(Study(results=tmp_path, bench="tumor_ext"))
    warned = [n for n in table.notes if ONE_RUN in n]
    assert warned == ([said] if said else [])
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    for line in lines:
        alone = len(seeds[line["strategy"]]) == 1 and line["value"] not in ("", "nan")
        assert (ONE_RUN in line["warnings"]) == alone, line


def test_a_hole_is_a_hole(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method(), "joint": Method(drop=[(2, "btcv/101")])},
              patients={"btcv": 5, "lits": 5})  # fmt: skip
    table = learning_table(Study(results=tmp_path, bench="tumor_ext"))
    assert row(table, "joint")[2] == row(table, "universal")[-1] == EMPTY
    assert row(table, "joint")[3] != EMPTY  # the tumor's cases are all there


def test_patients_are_counted_not_their_scans(tmp_path: Path) -> None:
    make_runs(tmp_path, {"universal": Method()}, patients={"btcv": 5, "lits": 5}, scans=2)
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=100))
    said = (
        "test cases: 10 btcv of 5 patients; 10 lits of 5 patients, of which 4 hold a structure "
        "that counts there"
    )
    assert said in learning_table(study).notes
    assert said in dict(checklist(study))["Unit of analysis, and n?"]


# -------------------------------------------------------------------------------------- detection


def add(folder: Path, metric: str, values: dict[str, float], structure: str) -> None:
    """Rows of another metric beside the Dice rows of a structure after step 2."""
    rows = run_folder.read_scores(folder / "scores.csv")
    home = "lits" if structure == "liver_tumor" else "btcv"
    more = [
        replace(r, metric=metric, value=values[r.case])
        for r in rows
        if r.structure == structure
        and r.step == 2
        and r.scoring == "strict"
        and r.eval_set == home
        and r.metric == "dice"
    ]
    run_folder.write_scores(folder / "scores.csv", [*rows, *more])


def test_the_printed_half_of_table_6() -> None:
    table = table6(Study(results=Path("none"), bench="tumor_ext"), source="printed")
    assert row(table, "Universal Model")[2:5] == ["88.89 p", "95.0 p", "91.84 p"]
    assert row(table, "UNet++")[5] == EMPTY
    lines = list(csv.reader(io.StringIO(render(table, "csv"))))
    if not (SHARED / "table6.csv").exists():
        pytest.skip("the typed table of the paper is not on this machine")
    assert lines == list(csv.reader(io.StringIO((SHARED / "table6.csv").read_text())))


def test_detection_by_hand(tmp_path: Path) -> None:
    folders = make_runs(
        tmp_path, {"universal": Method(seeds=(0, 1))}, patients={"btcv": 4, "lits": 6}
    )
    empty = table6(Study(results=tmp_path, bench="tumor_ext"), source="measured")
    assert set(row(empty, "universal")[2:]) == {EMPTY}
    assert any("clbench score" in n for n in empty.notes)
    cases = [str(200 + i) for i in range(6)]  # the last has no tumor
    add(
        folders[0],
        "patient_positive",
        dict(zip(cases, [0, 1, 1, 1, 1, 1.0], strict=True)),
        "liver_tumor",
    )
    add(
        folders[1],
        "patient_positive",
        dict(zip(cases, [1, 1, 1, 1, 1, 0.0], strict=True)),
        "liver_tumor",
    )
    table = table6(Study(results=tmp_path, bench="tumor_ext"), source="both")
    sen, spec, harm = row(table, "universal (PHANTOM)")[2:5]
    i = wilson(4.5, 5)
    assert sen == f"90.00 m (4.5/5) [{100 * i.low:.1f}–{100 * i.high:.1f}]"
    assert spec.startswith("50.00 m (0.5/1)")
    assert harm == "64.29 m"
    assert row(table, "universal (PHANTOM)")[5] == EMPTY  # no kidney tumors here
    assert "PHANTOM" in table.title
    every = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    ours = [x for x in every if x["method"] == "Universal Model" and x["tumor"] == "liver"]
    assert [(x["origin"], x["sensitivity"], x["seed"]) for x in ours] == [("printed", "88.89", "")]
    long = [x for x in every if x["origin"] == "measured"]
    assert [(x["seed"], x["true_positive"], x["true_negative"]) for x in long] == [
        ("0", "4", "0"),
        ("1", "5", "1"),
    ]


def test_cases_without_a_call_are_a_hole_and_no_share_of_the_rest(tmp_path: Path) -> None:
    folders = make_runs(
        tmp_path,
        {"universal": Method(seeds=(0,)), "lwf": Method(seeds=(0,)), "mib": Method(seeds=(0,))},
        patients={"btcv": 4, "lits": 6},
    )
    calls = {str(200 + i): float(i < 5) for i in range(6)}
    for folder in folders[:2]:
        add(folder, "patient_positive", calls, "liver_tumor")
    rows = run_folder.read_scores(folders[1] / "scores.csv")
    gone = ("patient_positive", ("201", "203"))
    run_folder.write_scores(
        folders[1] / "scores.csv",
        [r for r in rows if not (r.metric == gone[0] and r.case in gone[1])],
    )
    table = table6(Study(results=tmp_path, bench="tumor_ext"), source="measured")
    assert row(table, "universal")[2].startswith("100.00 m (5/5)")
    assert set(row(table, "lwf")[2:]) == set(row(table, "mib")[2:]) == {EMPTY}
    assert "hole: lwf, liver tumor, seed 0: 2 of 6 test cases missing (lits/201, …)" in table.notes
    assert "hole: mib, liver tumor, seed 0: not scored" in table.notes
    assert "lwf" not in {x["method"] for x in csv.DictReader(io.StringIO(render(table, "csv")))}


def test_the_papers_patient_level_numbers() -> None:
    golden = json.loads((GOLDEN_FILES / "segmentation.json").read_text())["detection_ci"]
    liver, *_ = golden["expected"]  # Universal Model: 32 of 36, and 19 of 20
    called = [(1, i < liver["k"]) for i in range(liver["n"])] + [(0, i >= 19) for i in range(20)]
    called += [(1, False), (0, True)]  # two scans of one patient: any scan counts
    rows = pd.DataFrame(called, columns=["gt_vox", "value"])
    rows = rows.assign(group="all", patient=[*range(56), 0, 0])
    (counts,) = count_patients(rows, ["group"]).to_numpy().tolist()
    assert counts == [32, 36, 19, 20]
    assert 100 * continual.harmonic(32 / 36, 19 / 20) == pytest.approx(
        golden["harmonic"]["expected"], abs=0.01
    )
    assert [wilson(32, 36).low, wilson(32, 36).high] == pytest.approx(liver["wilson95"])


def test_distances_by_hand(tmp_path: Path) -> None:
    folders = make_runs(
        tmp_path, {"universal": Method(seeds=(0,))}, patients={"btcv": 3, "lits": 3}
    )
    none = distances(Study(results=tmp_path, bench="tumor_ext"))
    assert set(row(none, "universal")[2:]) == {EMPTY}
    assert any("clbench score" in n for n in none.notes)
    for c in ("spleen", "right_kidney", "liver", "pancreas"):
        cases = {"100": 0.5, "101": 0.7, "102": math.nan if c == "pancreas" else 0.9}
        add(folders[0], "nsd_2mm", cases, c)
        add(folders[0], "hd95_mm", {k: 10 * v for k, v in cases.items()}, c)
    table = distances(Study(results=tmp_path, bench="tumor_ext"))
    nsd, hd, missed = row(table, "universal")[2:5]
    assert nsd == f"{(3 * 0.7 + 0.6) / 4:.3f}"
    assert float(hd) == pytest.approx(6.75, abs=0.051)
    assert missed == "0/11"
    (line,) = [
        x for x in csv.DictReader(io.StringIO(render(table, "csv"))) if x["group"] == "Organ Mean"
    ]
    assert float(line["nsd"]) == pytest.approx((3 * 0.7 + 0.6) / 4, abs=1e-12)
    assert (line["seed"], line["missed"], line["cases"]) == ("0", "0", "11")
    assert row(table, "universal")[5] == EMPTY  # the tumor was not scored: no partial mean
    assert table.over[2] == "Organ Mean (4)"


def test_a_hole_of_one_distance_alone_is_named(tmp_path: Path) -> None:
    folders = make_runs(
        tmp_path, {"universal": Method(seeds=(0,))}, patients={"btcv": 3, "lits": 3}
    )
    for c in ("spleen", "right_kidney", "liver", "pancreas", "liver_tumor"):
        first = 200 if c == "liver_tumor" else 100
        cases = {str(first + i): 0.5 for i in range(3)}
        add(folders[0], "nsd_2mm", cases, c)
        add(folders[0], "hd95_mm", cases, c)
    rows = run_folder.read_scores(folders[0] / "scores.csv")
    for metric, name in (("hd95_mm", "HD95"), ("nsd_2mm", "NSD")):
        gone = (metric, "spleen", "101")
        kept = [r for r in rows if (r.metric, r.structure, r.case) != gone]
        run_folder.write_scores(folders[0] / "scores.csv", kept)
        notes = distances(Study(results=tmp_path, bench="tumor_ext")).notes
        missing = "spleen after step 2, seed 0: 1 of 3 test cases missing (btcv/101)"
        assert f"hole: {name} of universal, {missing}" in notes


def test_runs_of_different_settings_are_refused_by_the_settings(tmp_path: Path) -> None:
    profiles = {"universal": {"train": {"lr": 0.01}}, "joint": {"train": {"lr": 0.02, "batch": 3}}}
    make_runs(
        tmp_path,
        {name: Method(seeds=(0,), identity={"profile": p}) for name, p in profiles.items()},
        patients={"btcv": 3, "lits": 3},
    )
    with pytest.raises(StoreError, match="do not belong in one table") as err:
        distances(Study(results=tmp_path, bench="tumor_ext"))
    said = str(err.value)
    assert "train.lr: 0.02, 0.01" in said or "train.lr: 0.01, 0.02" in said
    assert "train.batch: 3, default" in said or "train.batch: default, 3" in said
    assert "of a study file `out`" in said


def test_two_versions_of_a_metric_are_refused(tmp_path: Path) -> None:
    make_runs(
        tmp_path,
        {name: Method(seeds=(0,), record={"metrics": {"nsd": {"implementation": "x", "version": v}}})
         for name, v in (("universal", 1), ("joint", 2))},
        patients={"btcv": 3, "lits": 3},
    )  # fmt: skip
    with pytest.raises(StoreError, match="do not belong in one table") as err:
        distances(Study(results=tmp_path, bench="tumor_ext"))
    assert "metric versions (nsd)" in str(err.value)


# ------------------------------------------------------------------------------------------- cost


def test_costs_of_the_record_and_of_the_file(tmp_path: Path) -> None:
    folders = make_runs(
        tmp_path, {"universal": Method(seeds=(0,))}, patients={"btcv": 3, "lits": 3}
    )
    table = cost_table(Study(results=tmp_path, bench="tumor_ext"))
    assert [r[:3] for r in table.rows] == [("universal", "1", "1"), ("universal", "2", "1")]
    at = {name: i for i, name in enumerate(table.columns)}
    assert table.rows[0][at["training, min"]] == "1.0"  # 60 s of training
    assert table.rows[0][at[MACS]] == EMPTY
    assert any("clbench cost" in n for n in table.notes)
    (folders[0] / "cost.csv").write_text("step,forward_macs\n1,5e9\n2,7e9\n")
    assert [r[at[MACS]] for r in cost_table(Study(results=tmp_path, bench="tumor_ext")).rows] == [
        "5.00",
        "7.00",
    ]
    lines = csv.DictReader(
        io.StringIO(render(cost_table(Study(results=tmp_path, bench="tumor_ext")), "csv"))
    )
    found = {(x["step"], x["measure"]): x["value"] for x in lines if x["seed"] == "0"}
    assert found["1", "forward_macs"] == "5000000000.0"
    assert found["1", "train_s"] == "60.0"
    record = run_folder.read_record(folders[0])
    run_folder.write_record(
        folders[0], {**record, "uncounted": "the operator x cannot be counted\n  got: x"}
    )
    assert "operations not counted, universal: the operator x cannot be counted" in (
        cost_table(Study(results=tmp_path, bench="tumor_ext")).notes
    )
    (folders[0] / "cost.csv").write_text("forward_macs\n5e9\n")
    with pytest.raises(StoreError, match="costs of a run") as err:
        cost_table(Study(results=tmp_path, bench="tumor_ext"))
    assert "cost.csv" in str(err.value)


@pytest.mark.parametrize("name", ["6", "learning", "continual", "distances", "cost"])
def test_every_table_in_every_format(tmp_path: Path, name: str) -> None:
    make_runs(tmp_path, {"universal": Method(seeds=(0,)), "joint": Method(seeds=(0,))},
              patients={"btcv": 3, "lits": 3})  # fmt: skip
    for format_ in FORMATS:
        done = CliRunner().invoke(
            app, ["table", name, "--results", str(tmp_path), "--format", format_]
        )
        assert done.exit_code == 0, done.output
        assert "universal" in done.output or (name, format_) == ("6", "csv")
