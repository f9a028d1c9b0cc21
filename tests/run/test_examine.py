"""An examination takes back the cases it finished, each as itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clbench.run.examine import Exam, Exams
from clbench.store import files
from clbench.store.run_folder import Score

ROW = Score(
    bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="ward", case="b_1",
    structure="liver", learned_at=1, scoring="strict", metric="dice", value=0.5, gt_vox=2, pred_vox=2,
    status="ok",
)  # fmt: skip


def test_rows_of_another_case_are_examined_anew(tmp_path: Path) -> None:
    exams = Exams(tmp_path, "model", {})
    exam = Exam([ROW], 2.0, 1.5)
    exams.put("ward", "b_1", exam)
    assert exams.get("ward", "b_1") == exam
    (kept,) = tmp_path.iterdir()
    files.write_json(tmp_path / "ward_2.json", files.read_json(kept))
    assert exams.get("ward", "2") is None
    assert exams.get("ward_b", "1") is None  # whose file has the same name
    exams.put("ward", "b_1", Exam([ROW, replace(ROW, eval_set="other")], 2.0, 1.5))
    assert exams.get("ward", "b_1") is None
