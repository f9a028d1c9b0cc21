"""Whom the sums of an explained run count once."""

from __future__ import annotations

import pytest

from clbench.evaluation.explained import (
    TOTAL,
    HeadBodyRow,
    LostDiceRow,
    summarize,
    summarize_head_body,
)
from clbench.evaluation.metrics import continual
from clbench.store.run_folder import Score

BEFORE = {"7": 0.9, "7b": 0.9, "8": 0.9}
AFTER = {"7": 0.1, "7b": 0.1, "8": 0.8}


def score(case: str, step: int, value: float) -> Score:
    return Score(
        bench="b", bench_version=1, strategy="s", seed=0, step=step, eval_set="lits", case=case,
        structure="liver", learned_at=1, scoring="strict", metric="dice", value=value, gt_vox=8,
        pred_vox=8, status="ok",
    )  # fmt: skip


def test_patients_are_those_of_every_table() -> None:
    """A record names the patients of cases that are called otherwise: that of 7 is 7."""
    patient_of = {"lits/7b": "7"}
    scores = [score(c, 1, v) for c, v in BEFORE.items()]
    scores += [score(c, 2, v) for c, v in AFTER.items()]
    r = continual.matrix(scores, ["lits", "x"], scoring="strict", patient_of=patient_of)
    lost = r[1, "liver"] - r[2, "liver"]
    assert lost == pytest.approx((0.8 + 0.1) / 2)
    rows = [
        LostDiceRow(
            step=2, eval_set="lits", case=case, structure="liver", learned_at=1, part=part,
            other="", truth_vox=8, voxels=1, dice=BEFORE[case] - AFTER[case],
        )
        for case in BEFORE for part in ("absorbed", TOTAL)
    ]  # fmt: skip
    assert summarize(rows, patient_of)[0].lost == pytest.approx(lost)
    heads = [
        HeadBodyRow(
            step=2, eval_set="lits", case=case, structure="liver", learned_at=1, old=BEFORE[case],
            new=AFTER[case], old_head_new_body=0, new_head_old_body=0, probe_old_body=0,
            probe_new_body=0,
        )
        for case in BEFORE
    ]  # fmt: skip
    assert summarize_head_body(heads, patient_of)[0].lost == pytest.approx(lost)


def test_patients_of_two_sources_are_two() -> None:
    def row(source: str) -> LostDiceRow:
        return LostDiceRow(
            step=2, eval_set=source, case="1", structure="liver", learned_at=1, part=TOTAL,
            other="", truth_vox=8, voxels=1, dice=0.5,
        )  # fmt: skip

    assert row("lits").patient({}) != row("btcv").patient({})
    assert row("lits").patient({"lits/1": "A"}) != row("btcv").patient({"btcv/1": "A"})
