"""Leagues: verified before compared, tie groups instead of places, refusals by the first difference."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import Method, make_runs
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import DataError, StoreError
from clbench.evaluation.predictions import read_prediction, write_prediction
from clbench.report.league import (
    AS_SUBMITTED,
    RECOMPUTED,
    League,
    Refusal,
    Submission,
    _averaged,
    league_of,
    read_submission,
    write_league,
)
from clbench.report.scores import Run, read_frame, scores_of
from clbench.report.significance.endpoints import FINAL, table
from clbench.report.study import Protocol
from clbench.store import checksums, run_folder

QUICK = Protocol(draws=500)


def submitted(home: Path, methods: dict[str, Method], **more: object) -> Submission:
    """Made-up runs as if they had been verified."""
    folders = make_runs(home, methods, **{"patients": {"btcv": 8, "lits": 8}, **more})  # type: ignore[arg-type]
    runs = tuple(Run.read(folder) for folder in folders)
    return Submission(name=home.name, runs=runs, recomputed=frozenset())


def compared(*submissions: Submission | Refusal) -> League:
    return league_of(submissions, scoring="strict", protocol=QUICK)


def test_equals_share_a_group_and_nobody_among_them_is_first(tmp_path: Path) -> None:
    near = {"universal": Method(seeds=(0, 1)), "mib": Method(seeds=(4,), own_step1=True)}
    league = compared(
        submitted(tmp_path / "anna", near),
        submitted(tmp_path / "ben", {"finetune": Method(kept=-0.4, seeds=(7,))}),
    )
    first, second, last = league.entries
    assert {first.submission, second.submission} == {"anna"}
    assert first.ranks == second.ranks == (1, 2)
    assert set(first.groups) & set(second.groups)
    assert (last.label, last.submission, last.ranks) == ("finetune", "ben", (3, 3))
    assert last.apart
    assert not second.apart
    assert {e.checked for e in league.entries} == {AS_SUBMITTED}
    assert "PHANTOM" in league.title


def test_a_method_with_a_hole_stands_last_without_a_rank(tmp_path: Path) -> None:
    holed = {"lwf": Method(drop=((2, "btcv/103"),), seeds=(0,)), "universal": Method(seeds=(0,))}
    league = compared(submitted(tmp_path / "anna", holed))
    assert [e.label for e in league.entries] == ["universal", "lwf"]
    assert league.entries[-1].ranks is None
    assert "btcv/103" in league.entries[-1].hole


def test_another_split_is_refused_and_the_others_stay(tmp_path: Path) -> None:
    league = compared(
        submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))}),
        submitted(tmp_path / "ben", {"mib": Method(seeds=(0,))}, patients={"btcv": 9, "lits": 8}),
    )
    assert [e.submission for e in league.entries] == ["anna"]
    (refusal,) = league.refused
    assert refusal.name == "ben"
    assert "do not belong in one table" in str(refusal.error)


def test_copies_and_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    own = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    league = compared(own, replace(own, name="ben"), own)
    assert [str(r.error).splitlines()[0] for r in league.refused] == [
        "two submissions have one name",
        "every run is a copy of another submission's",
    ]
    assert len(league.entries) == 1


def renamed(folder: Path, strategy: str, seed: int) -> Run:
    """Give a run's scores another strategy and seed, as somebody would who passes them off."""
    record = run_folder.read_record(folder)
    old = record["strategy"]
    record["strategy"], record["identity"]["seed"] = strategy, seed
    run_folder.write_record(folder, record)
    path = folder / "scores.csv"
    rows = [replace(r, strategy=strategy, seed=seed) for r in run_folder.read_scores(path)]
    assert old in path.read_text()
    path.write_bytes(run_folder.scores_bytes(rows))
    return Run.read(folder)


def test_a_run_of_others_is_shown_once_whatever_it_is_called(tmp_path: Path) -> None:
    """Its own runs stay: an equal run may as well be a repetition, which gives equal bits."""
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    ben = submitted(tmp_path / "ben", {"universal": Method(seeds=(0,)), "lwf": Method(seeds=(1,))})
    of = {run.record.strategy: run for run in ben.runs}
    ben = replace(ben, runs=(of["lwf"], renamed(of["universal"].folder, "my_method", 3)))
    league = compared(anna, ben)
    assert {(e.submission, e.label) for e in league.entries} == {
        ("anna", "universal"),
        ("ben", "lwf"),
    }
    assert not league.refused
    said = "shown once: ben: my_method, seed 3 has the scores of anna: universal, seed 0."
    assert said in league.notes
    computed_again = replace(ben, recomputed=frozenset({ben.runs[1].folder}))
    league = compared(anna, computed_again)
    assert {(e.submission, e.label) for e in league.entries} == {
        ("ben", "my_method"),
        ("ben", "lwf"),
    }
    assert [r.name for r in league.refused] == ["anna"]


@pytest.mark.parametrize("way", ["dropped", "added", "paper"])
def test_a_copy_is_known_by_the_scores_that_rank(tmp_path: Path, way: str) -> None:
    """Rows that rank nothing tell no copy from its original."""
    anna = submitted(tmp_path / "anna", {"lwf": Method(seeds=(0,))})
    rows = run_folder.read_scores(anna.runs[0].folder / "scores.csv")
    more = [replace(r, metric="nsd_2mm") for r in rows]
    if way == "dropped":
        run_folder.write_scores(anna.runs[0].folder / "scores.csv", [*rows, *more])
    ben = submitted(
        tmp_path / "ben", {"lwf": Method(seeds=(0,)), "mib": Method(kept=-0.1, seeds=(1,))}
    )
    changed = {
        "dropped": rows,
        "added": [*rows, *more],
        "paper": [r for r in rows if r.scoring == "strict"],
    }[way]
    run_folder.write_scores(ben.runs[0].folder / "scores.csv", changed)
    renamed(ben.runs[0].folder, "my_method", 3)
    ben = replace(ben, runs=tuple(Run.read(run.folder) for run in ben.runs))
    league = compared(anna, ben)
    assert [(e.submission, e.label) for e in league.entries] == [("anna", "lwf"), ("ben", "mib")]
    assert any("ben: my_method, seed 3 has the scores of anna: lwf" in n for n in league.notes)


def test_runs_without_rows_of_the_scoring_are_no_copies_of_each_other(tmp_path: Path) -> None:
    both = [
        submitted(tmp_path / name, {"lwf": Method(seeds=(0,))}, scorings=("strict",), data=data)
        for name, data in (("anna", 0), ("ben", 1))
    ]
    league = league_of(both, scoring="paper", protocol=QUICK)
    assert [e.submission for e in league.entries] == ["anna", "ben"]


def test_a_seed_that_is_there_twice_refuses_its_submission_alone(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    ben = submitted(tmp_path / "ben", {"lwf": Method(seeds=(1, 2))})
    renamed(ben.runs[1].folder, "lwf", 1)
    ben = replace(ben, runs=(ben.runs[0], Run.read(ben.runs[1].folder)))
    league = compared(anna, ben)
    assert [e.submission for e in league.entries] == ["anna"]
    (refusal,) = league.refused
    assert "the same seed" in str(refusal.error)


def test_scores_of_another_case_are_seen_by_its_mask(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    ben = submitted(tmp_path / "ben", {"lwf": Method(seeds=(1,))})
    path = ben.runs[0].folder / "scores.csv"
    rows = run_folder.read_scores(path)
    other = [replace(r, gt_vox=(r.gt_vox or 0) + 1) if r.case == "204" else r for r in rows]
    path.write_bytes(run_folder.scores_bytes(other))
    league = compared(anna, ben)
    assert [e.submission for e in league.entries] == ["anna"]
    (refusal,) = league.refused
    assert "another mask" in str(refusal.error)
    assert "lits/204" in str(refusal.error)


def test_of_one_method_no_pairs_are_spoken(tmp_path: Path) -> None:
    league = compared(submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))}))
    assert not any("pairs" in note for note in league.notes)
    assert "says its own record" in league.entries[0].past


def test_without_any_submission_there_is_no_league() -> None:
    refusal = Refusal(name="ben", error=StoreError("a score is not what it must be"))
    with pytest.raises(StoreError, match="no submission takes part"):
        compared(refusal)


def test_the_page_is_whole_and_the_csv_at_full_precision(tmp_path: Path) -> None:
    league = compared(submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))}))
    page, table = write_league(league, tmp_path / "league")
    text = page.read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text
    assert "PHANTOM: every score" in text
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    assert [r["measure"] for r in rows] == ["final", "kept", "new"]
    assert float(rows[0]["value"]) == league.entries[0].cells["final"].value


# --------------------------------------------------------------------------------- verified runs


@pytest.fixture
def folder(smoke_run: Path, tmp_path: Path) -> Path:
    """A submission with one real run that keeps its predictions."""
    bench = tmp_path / "anna" / smoke_run.parents[1].name
    shutil.copytree(smoke_run, bench / smoke_run.parent.name / smoke_run.name)
    return tmp_path / "anna"


def sealed_anew(folder: Path) -> None:
    """Give a changed run the checksums of its changed files, as a forger would."""
    (run,) = run_folder.find_runs(folder)
    record = run_folder.read_record(run)
    del record["files"], record["record_sha256"]
    checksums.seal(run, record)
    run_folder.write_record(run, record)


def swapped(folder: Path) -> None:
    """Exchange the predictions of two cases."""
    one, other = sorted(folder.glob("*/*/*/predictions/step2/*.npz"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def another_grid(folder: Path) -> None:
    """Predict a case on a grid of one slice less."""
    path = sorted(folder.glob("*/*/*/predictions/step2/*.npz"))[0]
    was = read_prediction(path)
    write_prediction(
        path, was.bits[:, :, 1:], was.structures, was.affine, source=was.source, case=was.case
    )


def a_digit(folder: Path) -> None:
    """Raise a Dice by one voxel in the table."""
    (path,) = folder.glob("*/*/*/scores.csv")
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if ",strict,dice,0." in line)
    cells = lines[at].split(",")
    cells[11] = repr(min(1.0, float(cells[11]) + 0.01))
    lines[at] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


def test_a_run_with_predictions_is_recomputed(folder: Path) -> None:
    submission = read_submission(folder, "tumor_ext")
    assert len(submission.recomputed) == 1
    league = league_of([submission], scoring="strict", protocol=QUICK)
    assert [e.checked for e in league.entries] == [RECOMPUTED]


@pytest.mark.parametrize(
    ("tamper", "difference"),
    [(swapped, "case"), (another_grid, "shape"), (a_digit, "dice")],
)
def test_a_tampered_run_is_refused_even_if_it_is_sealed_anew(
    folder: Path, tamper: Callable[[Path], None], difference: str
) -> None:
    tamper(folder)
    sealed_anew(folder)
    with pytest.raises((StoreError, DataError)) as err:
        read_submission(folder, "tumor_ext")
    assert "expected" in str(err.value)
    assert difference in str(err.value)


def test_a_run_with_the_id_of_another_is_refused(folder: Path) -> None:
    """Else one without predictions would count as computed again."""
    (run,) = run_folder.find_runs(folder)
    record = run_folder.read_record(run)
    record["identity"]["seed"] += 1
    run_folder.write_record(run, record)
    sealed_anew(folder)
    with pytest.raises(StoreError, match="does not belong to its identity"):
        read_submission(folder, "tumor_ext")


def test_a_record_whose_course_lost_a_case_is_refused(folder: Path) -> None:
    (run,) = run_folder.find_runs(folder)
    record = run_folder.read_record(run)
    record["course"]["test"][1].pop()
    run_folder.write_record(run, record)
    sealed_anew(folder)
    with pytest.raises(StoreError, match="does not belong to its identity") as err:
        read_submission(folder, "tumor_ext")
    assert "course.test, step 2" in str(err.value)


def test_the_command_names_the_refused_and_ends_with_1(folder: Path, tmp_path: Path) -> None:
    forged = tmp_path / "ben"
    shutil.copytree(folder, forged)
    a_digit(forged)
    words = ["league", str(folder), str(forged), str(tmp_path / "nobody"), "--bench", "tumor_ext"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "league")])
    assert done.exit_code == 1, done.output
    assert "REFUSED ben" in done.output
    assert "REFUSED nobody: a submission has no finished run of this course" in done.output
    page = (tmp_path / "league" / "index.html").read_text(encoding="utf-8")
    assert "<h2>Refused</h2>" in page
    assert RECOMPUTED in page


def test_a_method_of_which_one_run_was_not_computed_again_is_as_submitted(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0, 1))})
    one = replace(anna, recomputed=frozenset({anna.runs[0].folder}))
    assert [e.checked for e in compared(one).entries] == [AS_SUBMITTED]
    both = replace(anna, recomputed=frozenset(run.folder for run in anna.runs))
    (entry,) = compared(both).entries
    assert entry.checked == RECOMPUTED
    # the scores were computed again, which images were opened was not
    assert entry.past == "none (says its own record)"


def test_what_any_run_opened_stands_beside_the_method(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"replay": Method(seeds=(0, 1))})
    record = run_folder.read_record(anna.runs[1].folder)
    first = record["course"]["train"][0][0]
    record["ledger"]["2"]["train"].append(first)
    run_folder.write_record(anna.runs[1].folder, record)
    anna = replace(anna, runs=tuple(Run.read(run.folder) for run in anna.runs))
    (entry,) = compared(anna).entries
    assert entry.past == f"none (says its own record); 1 of 3 ({first})"


def test_groups_and_ranks_are_those_of_the_entry_whatever_the_order_of_folders(
    tmp_path: Path,
) -> None:
    league = compared(
        submitted(tmp_path / "anna", {"finetune": Method(kept=-0.4)}),
        submitted(tmp_path / "ben", {"lwf": Method(kept=-0.2), "mib": Method(kept=-0.2)}),
        submitted(tmp_path / "cora", {"universal": Method()}),
    )
    found = [(e.label, e.groups, e.ranks, e.apart) for e in league.entries]
    assert found[0] == ("universal", "a", (1, 1), False)
    assert {label for label, *_ in found[1:3]} == {"lwf", "mib"}
    assert [rest for _, *rest in found[1:3]] == [["b", (2, 3), True], ["b", (2, 3), False]]
    assert found[3] == ("finetune", "c", (4, 4), True)


def test_groups_rest_on_the_mean_over_seeds(tmp_path: Path) -> None:
    runs = submitted(tmp_path / "anna", {"universal": Method(seeds=(0, 1))}).runs
    scores = scores_of(read_frame(runs), runs, scoring="strict")
    (method,) = scores.strategies
    whole, got = table(scores, method, FINAL, (0, 1)), _averaged(scores, method)
    for name, values in whole.items():
        assert got[name].shape == (1, *values.shape[1:])
        np.testing.assert_allclose(got[name][0], (values[0] + values[1]) / 2)


def test_intervals_of_a_league_are_of_its_level(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    wide, plain = (
        league_of([anna], scoring="strict", protocol=replace(QUICK, alpha=alpha)).entries[0]
        for alpha in (0.01, 0.05)
    )
    assert wide.cells["final"].low < plain.cells["final"].low


def test_a_league_scores_as_it_is_asked_to(tmp_path: Path) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    path = anna.runs[0].folder / "scores.csv"
    rows = [
        replace(r, value=r.value / 2) if r.scoring == "paper" else r
        for r in run_folder.read_scores(path)
    ]
    path.write_bytes(run_folder.scores_bytes(rows))
    strict, paper = (
        league_of([anna], scoring=scoring, protocol=QUICK).entries[0].cells["final"].value
        for scoring in ("strict", "paper")
    )
    assert paper == pytest.approx(strict / 2)


@pytest.mark.parametrize("part", ["groups", "patient_of"])
def test_another_course_under_the_same_name_is_refused(tmp_path: Path, part: str) -> None:
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    ben = submitted(tmp_path / "ben", {"lwf": Method(seeds=(1,))})
    path = ben.runs[0].folder / "run.json"
    record = json.loads(path.read_text())
    record["course"][part] = {"Mean": ["liver"]} if part == "groups" else {"btcv/100": "x"}
    path.write_text(json.dumps(record))
    league = compared(anna, replace(ben, runs=(Run.read(path.parent),)))
    assert [e.submission for e in league.entries] == ["anna"]
    (refusal,) = league.refused
    assert f"course.{part}" in str(refusal.error)


def test_the_csv_of_a_league_holds_ranks_and_ends(tmp_path: Path) -> None:
    methods = {"universal": Method(), "mib": Method(own_step1=True), "finetune": Method(kept=-0.4)}
    league = compared(submitted(tmp_path / "anna", methods))
    _, path = write_league(league, tmp_path / "league")
    rows = list(csv.DictReader(path.open(newline="", encoding="utf-8")))
    final = {r["method"]: r for r in rows if r["measure"] == "final"}
    for e in league.entries:
        row, cell = final[e.label], e.cells["final"]
        assert (int(row["rank_best"]), int(row["rank_worst"])) == e.ranks
        assert (float(row["low"]), float(row["high"])) == (cell.low, cell.high)
        assert cell.low < cell.value < cell.high
    assert any(len(set(e.ranks or ())) == 2 for e in league.entries)
    assert "test cases: 8 btcv; 8 lits, of which 7 hold a structure" in league.notes[0]


def test_each_scoring_has_masks_of_its_own(tmp_path: Path) -> None:
    """The paper's is on the model's grid, with another number of voxels."""
    anna = submitted(tmp_path / "anna", {"universal": Method(seeds=(0,))})
    ben = submitted(tmp_path / "ben", {"lwf": Method(seeds=(1,))})
    for run in (*anna.runs, *ben.runs):
        path = run.folder / "scores.csv"
        rows = [
            replace(r, gt_vox=r.gt_vox and r.gt_vox - 100) if r.scoring == "paper" else r
            for r in run_folder.read_scores(path)
        ]
        path.write_bytes(run_folder.scores_bytes(rows))
    assert not compared(anna, ben).refused


def test_every_hole_of_a_league_has_its_own_reason(tmp_path: Path) -> None:
    early = {"universal": Method(drop=((1, "btcv/103"),))}
    late = {"lwf": Method(drop=((2, "btcv/104"),), own_step1=True)}
    league = compared(
        submitted(tmp_path / "anna", early), submitted(tmp_path / "ben", late),
        submitted(tmp_path / "cem", {"mib": Method(own_step1=True)}),
    )  # fmt: skip
    _, path = write_league(league, tmp_path / "league")
    why = {
        (r["method"], r["measure"]): r["why"]
        for r in csv.DictReader(path.open(newline="", encoding="utf-8"))
    }
    step_1 = "universal: spleen after step 1, seed 0: 1 of 8 test cases missing (btcv/103)"
    step_2 = "lwf: spleen after step 2, seed 0: 1 of 8 test cases missing (btcv/104)"
    assert {key: text for key, text in why.items() if text} == {
        ("universal", "kept"): step_1, ("lwf", "final"): step_2, ("lwf", "kept"): step_2,
    }  # fmt: skip
    lines = (f"no number of kept: {step_1} (anna)", f"not ranked: {step_2} (ben)")
    assert league.table().notes[-2:] == lines
    page = (tmp_path / "league" / "index.html").read_text()
    assert all(line in page for line in lines)
    assert "the test of the one pair (" in " ".join(league.notes)
