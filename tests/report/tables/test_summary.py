"""The report of a run and the summary of several, by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import Method, make_runs

from clbench.errors import StoreError
from clbench.evaluation.metrics import continual
from clbench.report.study import Study
from clbench.report.tables.render import EMPTY, SHARE, Table, render
from clbench.report.tables.summary import run_report, summary
from clbench.store import run_folder
from clbench.store.record import RunRecord
from clbench.store.run_folder import Score

STEPS = [
    {"name": "organs", "source": "btcv", "learns": ["spleen", "liver"]},
    {"name": "tumor", "source": "lits", "learns": ["liver_tumor"]},
]


def score(step: int, structure: str, value: float, case: str = "1", **more: Any) -> Score:
    at = 2 if structure == "liver_tumor" else 1
    return replace(
        Score(
            bench="tumor_ext", bench_version=1, strategy="s", seed=0, step=step,
            eval_set="lits" if at == 2 else "btcv", case=case, structure=structure, learned_at=at,
            scoring="strict", metric="dice", value=value, gt_vox=9, pred_vox=9, status="ok",
        ),
        **more,
    )  # fmt: skip


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a finished run by hand."""

    def run(
        strategy: str = "universal", seed: int = 0, rows: list[Score] | None = None, **more: Any
    ) -> Path:
        rows = rows if rows is not None else [
            score(1, "spleen", 0.9), score(1, "spleen", 0.7, "2"),
            score(1, "liver", 0.6), score(1, "liver", math.nan, "2", status="both_empty"),
            score(2, "spleen", 0.5), score(2, "spleen", 0.1, "2", status="fn_only"),
            score(2, "liver", 0.8), score(2, "liver", math.nan, "2", status="both_empty"),
            score(2, "liver", 0.1, "7", eval_set="lits"),  # another set: never pooled
            score(2, "liver_tumor", 0.4, "7"),
            score(2, "liver_tumor", 0.99, "7", scoring="paper"),
        ]  # fmt: skip
        cases = dict.fromkeys(r.case for r in rows if r.eval_set == "btcv")
        identity = {
            "bench": "tumor_ext", "bench_version": 1, "numerics": 1, "data_fingerprint": "d",
            "splits": {}, "profile": {"name": "smoke"}, "seed": seed, "vectors": "v", "weights": None,
            "strategy": {"class": strategy, **more.pop("hyper", {})},
        }  # fmt: skip
        record = {
            "schema": run_folder.SCHEMA, "status": "finished", "steps_done": 2, "patients": False, "strategy": strategy,
            "run_id": run_folder.run_id(identity), "identity": identity, "data_fingerprint": "d",
            "text_encoding": {"encoding": "minilm"},
            "course": {
                "steps": STEPS,
                "groups": {"Organ Mean": ["spleen", "liver"], "Mean": ["spleen", "liver", "liver_tumor"]},
                "train": [["btcv/3"], ["lits/4"]], "test": [[f"btcv/{c}" for c in cases], ["lits/7"]],
            },
            "ledger": {"1": {"train": ["btcv/3"]}, "2": {"train": ["lits/4"], "test": ["btcv/1"]}},
            "cost": {"1": {"train": {"train_s": 60.0, "prepare_s": 0.0}},
                     "2": {"train": {"train_s": 30.0, "prepare_s": 30.0}}},
            **more,
        }  # fmt: skip
        rows = [replace(row, strategy=strategy, seed=seed) for row in rows]
        folder = tmp_path / "tumor_ext" / strategy / str(record["run_id"])
        folder.mkdir(parents=True)
        run_folder.write_record(folder, record)
        run_folder.write_scores(folder / "scores.csv", rows)
        return folder

    return run


def cell(table: Table, row: str, column: str) -> str:
    (line,) = [r for r in table.rows if r[0] == row]
    return line[table.columns.index(column)]


# ----------------------------------------------------------------------------------- one run


def test_a_run_report_by_hand(make: Make) -> None:
    scores, kept = run_report(make(), scoring="strict")
    assert cell(scores, "spleen", "after step 1") == "0.800"
    assert cell(scores, "spleen", "after step 2") == "0.300"
    assert cell(scores, "spleen", "forgetting") == "0.500"
    assert cell(scores, "spleen", "missed") == "1"
    assert cell(scores, "liver", "after step 1") == "0.600"  # the empty case does not count
    assert cell(scores, "liver", "forgetting") == "-0.200"
    assert cell(scores, "liver_tumor", "after step 1") == EMPTY
    assert cell(scores, "liver_tumor", "after step 2") == "0.400"
    assert cell(scores, "Organ Mean", "after step 1") == "0.700"
    assert cell(scores, "Mean", "after step 1") == EMPTY  # never a partial mean
    assert cell(scores, "Mean", "after step 2") == "0.500"
    assert "PHANTOM" in scores.title
    assert cell(kept, "forgetting (mean over old structures)", "value") == "0.150"
    assert cell(kept, "backward transfer (mean over old structures)", "value") == "-0.150"
    assert kept.notes[0] == "past images opened: none (enforced)"


def test_a_run_that_opened_the_past_says_so(make: Make) -> None:
    ledger = {"1": {"train": ["btcv/3"]}, "2": {"train": ["btcv/3", "lits/4"]}}
    _, kept = run_report(make(ledger=ledger), scoring="strict")
    assert kept.notes[0] == "past images opened: all 1"


def test_the_other_scoring_is_another_table(make: Make) -> None:
    scores, _ = run_report(make(), scoring="paper")
    assert cell(scores, "liver_tumor", "after step 2") == "0.990"
    assert cell(scores, "spleen", "after step 2") == EMPTY
    assert "paper scoring" in scores.title


# -------------------------------------------------------------------------------------- summary


def test_a_summary_over_seeds(make: Make, tmp_path: Path) -> None:
    make()
    values = {(1, "spleen"): 0.9, (1, "liver"): 0.9, (2, "spleen"): 0.5, (2, "liver"): 0.5}
    rows = [score(*key, value, case) for key, value in values.items() for case in ("1", "2")]
    make(seed=1, rows=[*rows, score(2, "liver_tumor", 0.2, "7")])
    table = summary(Study(results=tmp_path, bench="tumor_ext"))
    assert cell(table, "universal", "seeds") == "0, 1"
    assert cell(table, "universal", "step 1 structures, after step 1") == "0.800 ± 0.141"
    assert cell(table, "universal", "lowest of them, any seed") == "0.600 (liver, seed 0)"
    assert cell(table, "universal", "lost") == "0.275 ± 0.177"
    assert cell(table, "universal", "new structures") == "0.300 ± 0.141"
    assert "PHANTOM" in table.title
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    found = {(x["measure"], x["structure"], x["seed"]): float(x["value"]) for x in lines}
    assert found["before", "", "0"] == 0.7  # not rounded, one line per number
    assert found["lost", "", "1"] == 0.4
    assert found["new", "", "1"] == 0.2
    assert found["all", "", "1"] == (0.5 + 0.5 + 0.2) / 3
    assert found["before", "liver", "0"] == 0.6


def test_variants_of_a_strategy_are_told_apart(make: Make, tmp_path: Path) -> None:
    make(hyper={"pseudo": "hard", "x": 1})
    make(hyper={"pseudo": "soft", "x": 1})
    labels = {r[0] for r in summary(Study(results=tmp_path, bench="tumor_ext")).rows}
    assert labels == {"universal (pseudo=hard)", "universal (pseudo=soft)"}


def test_versions_of_a_strategy_are_told_apart(make: Make, tmp_path: Path) -> None:
    make()
    make(hyper={"version": 2})
    labels = {r[0] for r in summary(Study(results=tmp_path, bench="tumor_ext")).rows}
    assert labels == {"universal (version=1)", "universal (version=2)"}


def test_each_loss_is_set_beside_the_lower_bounds_on_the_seeds_they_share(
    make: Make, tmp_path: Path
) -> None:
    def run(strategy: str, seed: int, lost: float) -> None:
        make(strategy, seed, [score(1, "spleen", 0.9), score(1, "liver", 0.9),
                              score(2, "spleen", 0.9 - lost), score(2, "liver", 0.9 - lost),
                              score(2, "liver_tumor", 0.2, "7")])  # fmt: skip

    def notes() -> list[str]:
        found = summary(Study(results=tmp_path, bench="tumor_ext")).notes
        return [n for n in found if "finetune" in n]

    run("lwf_ct", 0, 0.1)
    assert notes() == []  # nothing to set it beside
    run("finetune", 0, 0.8)
    run("finetune", 1, 0.4)
    run("lwf_ct", 1, 0.2)
    run("lwf_ct", 2, 0.9)  # finetune has no seed 2
    run("ilt", 1, 0.2)
    run("plop", 3, 0.0)
    run("universal", 0, -0.08)
    run("mib", 0, -0.0001)
    assert notes() == [
        (
            "lost less than half of what finetune lost, same seeds: universal (-10%), "
            "mib (0%), lwf_ct (25%)."
        ),
        "lost half or more of what finetune lost, same seeds: ilt (50%).",
        "no seed in common with finetune, or no score: plop.",
    ]


def test_an_unfinished_run_is_left_out_and_mentioned(make: Make, tmp_path: Path) -> None:
    make()
    make(seed=1, status="unfinished")
    table = summary(Study(results=tmp_path, bench="tumor_ext"))
    assert cell(table, "universal", "seeds") == "0 (one seed)"
    assert any("1 unfinished" in note for note in table.notes)


def test_a_strategy_without_a_finished_run_is_named_and_a_variant_counts_its_own(
    make: Make, tmp_path: Path
) -> None:
    make(strategy="lwf", hyper={"alpha": 1.0})
    make(strategy="lwf", hyper={"alpha": 2.0})
    make(strategy="lwf", hyper={"alpha": 2.0}, seed=1, status="unfinished")
    make(strategy="lwf", hyper={"alpha": 3.0}, status="unfinished")
    for seed in (0, 1):
        make(strategy="ewc", seed=seed, status="unfinished")
    scores = Study(results=tmp_path, bench="tumor_ext").need_scores()
    assert [(m.label, m.unfinished) for m in scores.strategies] == [
        ("lwf (alpha=1.0)", 0), ("lwf (alpha=2.0)", 1),
    ]  # fmt: skip
    assert scores.never_finished == {"ewc": 2, "lwf with other settings": 1}
    for lines in (
        scores.holes(),
        scores.notes(),
        summary(Study(results=tmp_path, bench="tumor_ext")).notes,
    ):
        assert "hole: ewc has no finished run (2 unfinished)" in lines
        assert "hole: lwf with other settings has no finished run (1 unfinished)" in lines


def test_phantom_and_patients_are_never_in_one_table(make: Make, tmp_path: Path) -> None:
    make()
    make(seed=1, patients=True)
    with pytest.raises(StoreError, match="one table"):
        summary(Study(results=tmp_path, bench="tumor_ext"))


def test_no_runs_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no finished runs") as err:
        summary(Study(results=tmp_path, bench="tumor_ext"))
    assert "clbench run" in str(err.value)


def test_over_seeds() -> None:
    assert SHARE.over_seeds([0.5]) == "0.500"
    assert SHARE.over_seeds([0.4, 0.6]) == "0.500 ± 0.141"
    assert SHARE.over_seeds([0.4, math.nan]) == EMPTY


def test_a_report_of_a_real_run(smoke_run: Path) -> None:
    record = json.loads((smoke_run / "run.json").read_text())
    scores, kept = run_report(smoke_run, scoring="strict")
    assert len(scores.rows) == 14 + len(record["course"]["groups"])
    assert "none" in kept.notes[0]
    rows = run_folder.read_scores(smoke_run / "scores.csv")
    values = [r.value for r in rows if r.step == 2 and r.structure == "liver" and r.eval_set == "btcv"
              and r.scoring == "strict" and r.metric == "dice"]  # fmt: skip
    assert cell(scores, "liver", "after step 2") == f"{continual.mean(values):.3f}"


def test_a_strip_of_a_real_run(smoke_run: Path, smoke_out: Path, cache_root: Path) -> None:
    from clbench.report.figures import StripOptions, draw
    from clbench.report.figures.strip import Shown, open_volumes
    from clbench.report.significance.analysis import Analysis

    study = Analysis(results=smoke_out, bench="tumor_ext")
    here = StripOptions(cache=cache_root)
    record = RunRecord.read(smoke_run)
    case = record.course.test[0][0].split("/")[1]
    (volume,) = open_volumes(here, record, [Shown(eval_set="btcv", case=case, word="", score=0)])
    assert (volume.source, volume.case) == ("btcv", case)
    with pytest.raises(StoreError, match="not what the run was made on"):
        open_volumes(here, replace(record, data_fingerprint="other"), [])
    if not any(f.parent.name != "universal" for f in run_folder.find_runs(smoke_out)):
        assert draw("strip", study, strip=here).startswith(b"<?xml")


def test_a_hole_of_the_summary_has_its_reason(tmp_path: Path) -> None:
    """No test case holds the spleen: no mean leaves it out, and the table says why it is absent."""
    made = make_runs(tmp_path, {"a": Method(seeds=(0,)), "b": Method(seeds=(0,))})
    assert not [n for n in summary(Study(results=tmp_path, bench="tumor_ext")).notes if "hole" in n]
    for folder in made:
        rows = [
            replace(r, value=math.nan, status="both_empty", gt_vox=0)
            if r.structure == "spleen" and r.status == "ok"
            else r
            for r in run_folder.read_scores(folder / "scores.csv")
        ]
        run_folder.write_scores(folder / "scores.csv", rows)
    table = summary(Study(results=tmp_path, bench="tumor_ext"))
    assert table.rows[0][-1] == "–"
    holes = [note for note in table.notes if note.startswith("hole: ")]
    assert holes == [
        f"hole: {name}, spleen after step 1, 2, seed 0: no test case of btcv holds it"
        for name in "ab"
    ]


@pytest.mark.parametrize("structure", ["spleen", "pancreas"])
def test_the_lowest_of_scores_of_which_one_is_missing_is_not_known(
    tmp_path: Path, structure: str
) -> None:
    """Whichever place the missing one has among the others."""
    (folder,) = make_runs(tmp_path, {"universal": Method(seeds=(0,))})
    rows = run_folder.read_scores(folder / "scores.csv")
    gone = (1, structure, "103")
    kept = [r for r in rows if (r.step, r.structure, r.case) != gone]
    run_folder.write_scores(folder / "scores.csv", kept)
    table = summary(Study(results=tmp_path, bench="tumor_ext"))
    (row,) = table.rows
    assert row[table.columns.index("lowest of them, any seed")] == EMPTY
