"""Tables of lost Dice: numbers of the rows, strategies that were explained, and no others."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from synthetic_runs import ORGANS, Method, make_runs

from clbench.evaluation.explained import (
    FILE,
    HEAD_BODY_FILE,
    TOTAL,
    HeadBodyRow,
    LostDiceRow,
    write_head_body,
    write_lost_dice,
)
from clbench.evaluation.metrics.lost_dice import CAUSES
from clbench.report.page.page import explained_figures, other_tables
from clbench.report.significance.analysis import Analysis
from clbench.report.tables.lost_dice import (
    explained_runs,
    lost_dice_table,
    lost_dice_tables,
)
from clbench.report.tables.render import EMPTY, render
from clbench.store.record import RunRecord


def rows(lost: float) -> list[LostDiceRow]:
    """Two cases: half of the spleen went to the liver, half to background; nothing of the liver."""

    def row(case: str, name: str, part: str, other: str, voxels: int, dice: float) -> LostDiceRow:
        return LostDiceRow(
            step=2, eval_set="btcv", case=case, structure=name, learned_at=1, part=part,
            other=other, truth_vox=100, voxels=voxels, dice=dice,
        )  # fmt: skip

    return [
        *(row(c, "liver", TOTAL, "", 0, 0.0) for c in ("100", "101")),
        row("100", "spleen", "confused", "liver", 40, lost),
        row("100", "spleen", TOTAL, "", 40, lost),
        row("101", "spleen", "missed_whole", "background", 20, lost / 2),
        row("101", "spleen", TOTAL, "", 20, lost / 2),
    ]


def parts(old: float, new: float) -> list[HeadBodyRow]:
    """The head alone forgot."""
    return [
        HeadBodyRow(
            step=2, eval_set="btcv", case="100", structure="spleen", learned_at=1, old=old,
            new=new, old_head_new_body=old, new_head_old_body=new, probe_old_body=0.7,
            probe_new_body=0.6,
        )
    ]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Analysis:
    methods = {"universal": Method(), "finetune": Method(kept=-0.3), "lwf": Method(kept=-0.1)}
    make_runs(tmp_path, methods)
    return Analysis(results=tmp_path, bench="tumor_ext", reference="universal", scoring="strict")


def explain(study: Analysis, strategy: str, losses: list[float]) -> None:
    for folder, lost in zip(
        sorted(run.folder for run in study.runs if run.record.strategy == strategy),
        losses,
        strict=False,
    ):
        write_lost_dice(folder / FILE, rows(lost))
        write_head_body(folder / HEAD_BODY_FILE, parts(0.9, 0.9 - lost))


def test_runs_that_were_not_explained_have_no_table(study: Analysis) -> None:
    tables, absent = other_tables(study)
    assert "lost_dice" not in tables
    assert not [text for text in absent if "lost_dice" in text]


def test_means_over_the_seeds_that_were_explained(study: Analysis) -> None:
    explain(study, "finetune", [0.2, 0.4])
    table = other_tables(study)[0]["lost_dice"]
    by_name = {row[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert {strategy for strategy, _ in by_name} == {"finetune"}
    assert {name for _, name in by_name} == {"spleen", "liver"} <= set(ORGANS)
    spleen = by_name["finetune", "spleen"]
    assert len(spleen["seeds"].split(", ")) == 2
    # per seed: (lost + lost / 2) / 2 over two cases; then the mean of 0.15 and 0.30
    assert spleen["lost"] == "0.225"
    assert (spleen["confused"], spleen["missed whole"]) == ("0.150", "0.075")
    assert spleen["main cause"] == "confused"
    assert (spleen["by the head"], spleen["by the body"]) == ("0.300", "0.000")
    assert spleen["lost by a probe"] == "0.100"
    liver = by_name["finetune", "liver"]
    assert (liver["lost"], liver["main cause"], liver["by the head"]) == ("0.000", EMPTY, EMPTY)
    assert "it was not for universal, lwf" in table.notes[-1]


def test_the_figures_of_each_strategys_first_seed_are_on_the_page(study: Analysis) -> None:
    explain(study, "finetune", [0.2, 0.4])
    (_, first), _ = explained_runs(study)
    (first.folder / "explain").mkdir()
    (first.folder / "explain" / "before_after.png").write_bytes(b"png")
    pictures, absent = explained_figures(study)
    assert [(p["name"], p["uri"]) for p in pictures] == [
        ("before-after-0", "data:image/png;base64,cG5n")
    ]
    assert pictures[0]["title"].startswith("Before and after: finetune, seed ")
    assert "slice where most structures lost voxels" in pictures[0]["caption"]
    (missing,) = absent
    assert "`lost_dice`" in missing
    assert f"`clbench explain {first.folder}` draws it" in missing


def test_a_damaged_file_is_a_hole_of_the_page(study: Analysis) -> None:
    explain(study, "finetune", [0.2])
    folder = next(r.folder for r in study.runs if (r.folder / FILE).exists())
    (folder / FILE).write_text("damaged\n")
    tables, absent = other_tables(study)
    assert "lost_dice" not in tables
    assert any("lost_dice" in text and "other columns" in text for text in absent)


def test_seeds_without_head_and_body_are_named(study: Analysis) -> None:
    explain(study, "finetune", [0.2, 0.4])
    first, second = (run for _, run in explained_runs(study))
    (second.folder / HEAD_BODY_FILE).unlink()
    table = lost_dice_table(study)
    spleen = next(row for row in table.rows if row[1] == "spleen")
    assert spleen[2] == f"{first.record.seed}, {second.record.seed}"
    assert table.notes[-1] == (
        "finetune, spleen: by the head, by the body and lost by a probe are of seed "
        f"{first.record.seed} alone; the others have no head_body.csv."
    )


def test_tables_of_one_run(study: Analysis) -> None:
    record = RunRecord.read(study.runs[0].folder)
    causes, instead, models = lost_dice_tables(record, rows(0.4), parts(0.9, 0.5))
    spleen = dict(zip(causes.columns, causes.rows[0], strict=True))
    assert (spleen["structure"], spleen["cases"], spleen["lost"]) == ("spleen", "2", "0.300")
    assert causes.rows[-1][0] == "mean of step 1"
    assert instead.rows[0] == ("spleen", "2", "60", "30.0%", "liver 67%, background 33%")
    assert models.rows[0][2:5] == ("0.400", "0.400", "0.000")
    assert render(causes, "csv").splitlines()[1].startswith("2,btcv,100,liver,1,total")
    assert len(lost_dice_tables(record, rows(0.4))) == 2


def test_the_table_alone(study: Analysis) -> None:
    explain(study, "lwf", [0.1, 0.1, 0.1])
    table = lost_dice_table(study)
    assert table.title.endswith("after step 2")
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert {x["seed"] for x in lines} == {"0", "1", "2"}
    whole = {
        x["measure"]: float(x["value"])
        for x in lines
        if (x["seed"], x["structure"]) == ("0", "spleen")
    }
    assert sum(whole[cause] for cause in CAUSES) == pytest.approx(whole["lost"], abs=1e-12)
