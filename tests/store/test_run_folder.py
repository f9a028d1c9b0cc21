"""Run folders: equal bytes, exact values, no mixtures, and nothing half-written when a disk is full."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from clbench.errors import StoreError
from clbench.store import run_folder
from clbench.store.run_folder import EventLog, Score

ROW = Score(
    bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="btcv", case="2",
    structure="liver", learned_at=1, scoring="strict", metric="dice", value=0.1 + 0.2,
    gt_vox=10, pred_vox=12, status="ok",
)  # fmt: skip
EMPTY = replace(
    ROW, structure="spleen", value=math.nan, gt_vox=None, pred_vox=None, status="not_annotated"
)


def test_scores_come_back_to_the_bit_and_in_one_order(tmp_path: Path) -> None:
    rows = [replace(ROW, case=c) for c in ("10", "2", "x")] + [EMPTY]
    run_folder.write_scores(tmp_path / "a.csv", rows)
    run_folder.write_scores(tmp_path / "b.csv", reversed(rows))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    back = run_folder.read_scores(tmp_path / "a.csv")
    assert [r.case for r in back] == ["2", "2", "10", "x"]  # numbers in order of number
    assert back[0] == ROW
    assert math.isnan(back[1].value)
    assert back[1].gt_vox is None
    assert str(0.1 + 0.2) in (tmp_path / "a.csv").read_text()  # not rounded


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("bench,", "course,", "other columns"),
        ("0.30000000000000004", "much", "line 2"),
        ("strict", "lenient", "line 2"),
        (",ok", "", "line 2"),
    ],
)
def test_damaged_scores_are_refused(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    run_folder.write_scores(path, [ROW])
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(StoreError) as err:
        run_folder.read_scores(path)
    assert says in str(err.value)
    assert str(path) in str(err.value)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (b"\xff", "can't decode byte 0xff"),
        (b'"' + b"1,2\n" * 50_000, "field larger than field limit"),  # a quote that never ends
    ],
)
def test_scores_that_are_no_text_are_refused(damage: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    run_folder.write_scores(path, [ROW])
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(StoreError, match="cannot be read") as err:
        run_folder.read_scores(path)
    assert says in str(err.value)
    assert "--fresh" in str(err.value)


def test_events_are_read_up_to_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "note": "\xff"}\n{"step": 3}\n')
    assert run_folder.read_events(path) == [{"step": 1}]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.csv"
    run_folder.write_scores(path, [ROW])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="could not be written") as err:
        run_folder.write_scores(path, [ROW, EMPTY])
    assert "No space left" in str(err.value)
    assert "disk space" in str(err.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["scores.csv"]  # no part left behind


def test_run_id_depends_on_content_not_on_order() -> None:
    assert run_folder.run_id({"a": 1, "b": [2]}) == run_folder.run_id({"b": [2], "a": 1})
    assert run_folder.run_id({"a": 1}) != run_folder.run_id({"a": 2})


def test_another_schema_is_refused(tmp_path: Path) -> None:
    run_folder.write_record(tmp_path, {"schema": 999})
    with pytest.raises(StoreError, match="another version"):
        run_folder.read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": ')
    with pytest.raises(StoreError, match="cannot be read"):
        run_folder.read_record(tmp_path)


def test_runs_are_found_and_shared_steps_are_not_runs(tmp_path: Path) -> None:
    for place in ("b/s/1", "b/t/2", "c/s/3", "b/_shared/4"):
        (tmp_path / place).mkdir(parents=True)
        run_folder.write_record(tmp_path / place, {"schema": 1})
    assert [p.name for p in run_folder.find_runs(tmp_path)] == ["1", "2", "3"]
    assert [p.name for p in run_folder.find_runs(tmp_path, bench="c")] == ["3"]


def test_an_event_log_drops_what_a_broken_attempt_left(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, keep=lambda e: True) as log:
        log.write({"step": 1, "loss": 0.5})
        log.write({"step": 2, "loss": 0.25})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # cut off by a crash
    assert [e["step"] for e in run_folder.read_events(path)] == [1, 2]
    with EventLog(path, keep=lambda e: e["step"] < 2) as log:
        log.write({"step": 2, "loss": 0.125})
    assert [json.loads(x) for x in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.125},
    ]


def test_a_log_that_cannot_be_closed_hides_no_error_and_is_one_alone(tmp_path: Path) -> None:
    class Full(io.StringIO):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    log = EventLog(tmp_path / "events.jsonl", keep=lambda e: True)
    with pytest.raises(KeyError), log:  # noqa: PT012  # the block is the test
        log._file = Full()
        raise KeyError
    with pytest.raises(StoreError, match="event log could not be written"), log:
        log._file = Full()  # what it holds is lost


def test_a_folder_without_a_run_is_told_from_a_run_that_is_damaged(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "no", "no such run folder"), (tmp_path, "no run in this")):
        with pytest.raises(StoreError, match=says) as err:
            run_folder.read_record(folder)
        assert "--fresh" not in str(err.value)
        assert "Results:" in str(err.value)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be read"):
        run_folder.read_record(tmp_path)
