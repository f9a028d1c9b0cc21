"""The tables of an extension count patients as all tables do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from clbench.deployment.extension.cost import patient_scores
from clbench.store.run_folder import Score


def test_a_patient_counts_once_also_where_a_case_has_its_name() -> None:
    record: Any = SimpleNamespace(course=SimpleNamespace(patient_of={"lits/7b": "7"}))
    scores = [
        Score(
            bench="b", bench_version=1, strategy="s", seed=0, step=1, eval_set="lits", case=case,
            structure="liver", learned_at=1, scoring="strict", metric="dice", value=value,
            gt_vox=8, pred_vox=8, status="ok",
        )
        for case, value in (("7", 0.2), ("7b", 0.4), ("8", 0.9))
    ]  # fmt: skip
    (patients,) = patient_scores(scores, record).values()
    assert sorted(patients.values()) == pytest.approx([0.3, 0.9])
