"""clbench verify: an honest run passes, and the first thing that was changed is named."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from locations import ROOT
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import ClbenchError, StoreError
from clbench.evaluation.metrics.overlap import Counts, dice
from clbench.evaluation.predictions import read_prediction, write_prediction
from clbench.report.study import Study
from clbench.report.tables.summary import summary
from clbench.run.rescore import score_run
from clbench.run.verify import verify_run
from clbench.store import run_folder
from clbench.store.checksums import seal
from clbench.store.publish import excerpt

RESULTS = ROOT / "results"


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    home = tmp_path / "results" / smoke_run.parents[1].name
    shutil.copytree(smoke_run, home / smoke_run.parent.name / smoke_run.name)
    return home / smoke_run.parent.name / smoke_run.name


def unseal(run: Path) -> None:
    """As runs were before they recorded checksums."""
    record = run_folder.read_record(run)
    del record["files"], record["record_sha256"]
    run_folder.write_record(run, record)


def alter(run: Path, change: Callable[[list[str], dict[str, int]], bool]) -> int:
    """Change the first line of scores.csv for which `change` says so; return its number."""
    path = run / "scores.csv"
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    column = {name: i for i, name in enumerate(lines[0])}
    number = next(n for n, cells in enumerate(lines[1:], 2) if change(cells, column))
    path.write_text("".join(",".join(cells) + "\n" for cells in lines))
    return number


def a_digit(cells: list[str], at: dict[str, int]) -> bool:
    """Change the sixth digit of a Dice between 0 and 1."""
    value = cells[at["value"]]
    if cells[at["metric"]] != "dice" or len(value) < 12 or "e" in value:
        return False
    cells[at["value"]] = repr(float(value[:7] + str((int(value[7]) + 3) % 10) + value[8:]))
    return True


def another_dice(cells: list[str], at: dict[str, int]) -> bool:
    """A Dice that the two volumes could have had, but did not."""
    if (cells[at["metric"]], cells[at["scoring"]], cells[at["status"]]) != ("dice", "strict", "ok"):
        return False
    gt, pred = int(cells[at["gt_vox"]]), int(cells[at["pred_vox"]])
    both = round(float(cells[at["value"]]) * (gt + pred) / 2)
    both = both - 1 if both else 1
    cells[at["value"]] = repr(dice(Counts(both_vox=both, pred_vox=pred, gt_vox=gt)))
    return True


def refused(run: Path) -> str:
    with pytest.raises(StoreError) as err:
        verify_run(run)
    return str(err.value)


def test_an_honest_run_passes_and_says_what_was_checked(run: Path) -> None:
    found = verify_run(run)
    said = "\n".join(found.lines())
    files = len(json.loads((run / "run.json").read_text())["files"])
    rows = len(run_folder.read_scores(run / "scores.csv"))
    for part in (
        f"checksums of run.json and {files} files",
        f"{rows} rows",
        f"{rows} scores against 8 predictions",
        "checkpoint of step 1",
        "checkpoint of step 2",
        "cost.csv: 2 steps",
        "what the steps depend on, against the course and the data: 2",
    ):
        assert part in said
    assert len(found.unchecked) == 1  # means: none is stored


def test_further_scores_are_sealed_and_verified_too(run: Path) -> None:
    score_run(run, metrics=("volume_error_ml",))
    rows = len(run_folder.read_scores(run / "scores.csv"))
    assert f"{rows} scores against 8 predictions" in "\n".join(verify_run(run).checked)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("change", [a_digit, another_dice])
def test_one_altered_score_is_named_by_row_and_column(
    run: Path, change: Callable[[list[str], dict[str, int]], bool], sealed: bool
) -> None:
    if not sealed:
        unseal(run)
    line = alter(run, change)
    said = refused(run)
    for part in ("scores.csv", f"line {line} ", "column value", "expected", "got"):
        assert part in said


@pytest.mark.parametrize(
    ("column", "value"),
    [("seed", "7"), ("learned_at", "2"), ("status", "fn_only"), ("strategy", "other")],
)
def test_a_row_that_contradicts_the_record_or_itself_is_named(
    run: Path, column: str, value: str
) -> None:
    unseal(run)

    def change(cells: list[str], at: dict[str, int]) -> bool:
        wrong = cells[at["status"]] == "ok" and cells[at[column]] != value
        if wrong:
            cells[at[column]] = value
        return wrong

    line = alter(run, change)
    said = refused(run)
    assert f"line {line} " in said
    assert f"column {column}" in said


def test_a_missing_and_a_doubled_row_are_named(run: Path) -> None:
    unseal(run)
    path = run / "scores.csv"
    rows = run_folder.read_scores(path)
    gone = next(r for r in rows if r.metric == "dice" and r.step == 2)
    run_folder.write_scores(path, [r for r in rows if r is not gone])
    said = refused(run)
    assert "row of the scores is missing" in said
    assert f"step 2, {gone.eval_set}/{gone.case}, {gone.structure}" in said
    run_folder.write_scores(path, [*rows, gone])
    assert "one such row" in refused(run)


def test_one_bit_of_a_prediction(run: Path) -> None:
    path = run / "predictions" / "step2" / "lits_20.npz"
    pred = read_prediction(path)
    bits = pred.bits.copy()
    bits[3, 3, 3] ^= 1 << pred.structures.index("liver")
    write_prediction(path, bits, pred.structures, pred.affine, source=pred.source, case=pred.case)
    said = refused(run)  # the checksum finds the file
    assert "lits_20.npz" in said
    assert "SHA-256" in said
    unseal(run)  # without checksums, the score that follows from it differs
    said = refused(run)
    for part in ("scores.csv, line", "step 2, lits/20, liver", "column"):
        assert part in said


def test_one_byte_of_a_checkpoint(run: Path) -> None:
    path = run / "step2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert "step2.pt" in refused(run)


@pytest.mark.parametrize(
    ("step", "field", "says"),
    [("1", "identity", "step_origins, step 1"), ("2", "before", "step2.pt")],
)
def test_a_step_that_is_not_the_one_the_course_asks_for(
    run: Path, step: str, field: str, says: str
) -> None:
    unseal(run)
    record = run_folder.read_record(run)
    record["step_origins"][step][field] = "0" * 12
    run_folder.write_record(run, record)
    assert says in refused(run)


@pytest.mark.parametrize("name", ["predictions/step1/btcv_21.npz", "events.jsonl", "cost.csv"])
def test_a_file_that_is_gone(run: Path, name: str) -> None:
    (run / name).unlink()
    said = refused(run)
    assert "missing" in said
    assert name in said


def test_a_file_that_was_added_and_a_record_that_was_edited(run: Path) -> None:
    (run / "extra.csv").write_text("a\n")
    assert "does not list" in refused(run)
    (run / "extra.csv").unlink()
    record = run_folder.read_record(run)
    record["identity"]["seed"] = 7
    run_folder.write_record(run, record)
    assert "record was changed" in refused(run)


def test_a_record_whose_own_checksum_was_taken_off(run: Path) -> None:
    record = run_folder.read_record(run)
    del record["record_sha256"]
    run_folder.write_record(run, record)
    assert "has none of its own" in refused(run)


def test_costs_that_are_no_text(run: Path) -> None:
    (run / "cost.csv").write_bytes(b"step\xff\n")
    unseal(run)
    assert "costs cannot be read" in refused(run)


def test_a_cost_that_the_record_does_not_hold(run: Path) -> None:
    unseal(run)
    record = run_folder.read_record(run)
    record["cost"]["2"]["examine_s"] = 1e6
    run_folder.write_record(run, record)
    assert "line 3, column examine_s" in refused(run)


def test_another_schema_and_the_exit_status(run: Path) -> None:
    record = run_folder.read_record(run)
    assert CliRunner().invoke(app, ["verify", str(run)]).exit_code == 0
    run_folder.write_record(run, {**record, "schema": 0})
    assert "schema 0" in refused(run)
    failed = CliRunner().invoke(app, ["verify", str(run)])
    assert failed.exit_code == 1
    assert isinstance(failed.exception, ClbenchError)


def test_data_that_is_not_there_leaves_the_scores_unchecked(run: Path, tmp_path: Path) -> None:
    record = run_folder.read_record(run)
    record["settings"]["data"] = str(tmp_path / "vanished")
    seal(run, record)
    run_folder.write_record(run, record)
    found = verify_run(run)
    assert any("no data to compare with" in line for line in found.unchecked)
    with pytest.raises(ClbenchError):
        verify_run(run, data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["reference", "ablation", "settling", "bf16"])
def test_the_runs_behind_the_readme_are_whole(name: str) -> None:
    folders = run_folder.find_runs(RESULTS / name)
    assert folders
    for folder in folders:
        said = "\n".join(verify_run(folder).unchecked)
        assert "keeps no predictions" in said


@pytest.mark.parametrize("name", ["decoder_growth", "frozen", "lora", "independent"])
def test_methods_that_keep_old_masks_forgot_exactly_nothing(name: str) -> None:
    folders = list(RESULTS.glob(f"reference/*/{name}/*"))
    assert {f.parents[1].name for f in folders} == {"tumor_ext", "body_ext"}
    for folder in folders:
        first: dict[tuple[str, ...], float] = {}
        later = 0
        for row in run_folder.read_scores(folder / "scores.csv"):
            what = (row.eval_set, row.case, row.structure, row.scoring, row.metric)
            if what in first:
                assert repr(row.value) == repr(first[what]), (folder, row)  # nan is nan
                later += 1
            else:
                first[what] = row.value
        assert later > 100


def test_an_excerpt_holds_the_tables_says_so_and_verifies(run: Path, tmp_path: Path) -> None:
    results, to = run.parents[2], tmp_path / "excerpt"
    result = CliRunner().invoke(app, ["excerpt", str(results), str(to)])
    assert result.exit_code == 0, result.output
    (made,) = run_folder.find_runs(to)
    assert result.output.split() == [str(made)]
    tables_of_run = {p.name for p in run.glob("*.csv")}
    assert {p.name for p in made.iterdir()} == {"run.json", "scores.csv", *tables_of_run}
    assert (made / "scores.csv").read_bytes() == (run / "scores.csv").read_bytes()
    record = run_folder.read_record(made)
    assert "sealed anew" in record["excerpt"]
    out = Path(run_folder.read_record(run)["settings"]["out"])
    assert out.is_absolute()
    assert record["settings"]["out"] == out.name
    assert str(out.parent) not in (made / "run.json").read_text()
    assert set(record["files"]) == {p.name for p in made.glob("*.csv")}
    assert any("scores.csv" in line for line in verify_run(made).lines())
    tables = [summary(Study(results=r, bench="tumor_ext")) for r in (results, to)]
    assert tables[0] == tables[1]
    assert excerpt(results, to) == []  # there already
    (made / "run.json").unlink()  # a copy that was broken off is made again
    assert excerpt(results, to) == [made]
    assert excerpt(to, tmp_path / "again") == [tmp_path / "again" / made.relative_to(to)]


def test_an_excerpt_is_made_of_whole_and_finished_runs_alone(run: Path, tmp_path: Path) -> None:
    results, to = run.parents[2], tmp_path / "excerpt"
    (made,) = excerpt(results, to)
    alter(made, a_digit)
    with pytest.raises(StoreError, match="another run of this name") as err:
        excerpt(results, to)
    assert str(made) in str(err.value)
    record = run_folder.read_record(run)
    run_folder.write_record(run, {**record, "status": "unfinished"})
    with pytest.raises(StoreError, match="no finished runs"):
        excerpt(results, tmp_path / "other")
    run_folder.write_record(run, record)
    alter(run, a_digit)
    with pytest.raises(StoreError, match=r"scores\.csv"):
        excerpt(results, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_from_before_checksums_and_without_predictions_passes(tmp_path: Path) -> None:
    folder = tmp_path / "tumor_ext" / "finetune" / "old"
    shutil.copytree(run_folder.find_runs(RESULTS / "reference")[0], folder)
    record = json.loads((folder / "run.json").read_text())
    del record["files"], record["record_sha256"]
    (folder / "run.json").write_text(json.dumps(record))
    said = "\n".join(verify_run(folder).unchecked)
    assert "the run recorded none" in said
    assert "keeps no predictions" in said
