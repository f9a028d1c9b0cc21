"""What a report says of tuning, from the records of its runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import Method, make_runs

from clbench.report.page.checklist import checklist
from clbench.report.page.limits import limits
from clbench.report.page.provenance import cards
from clbench.report.significance.analysis import Analysis
from clbench.report.study import Protocol

ROW = "Baselines tuned equally, without test data?"
TUNED: dict[str, Any] = {
    "rule": "first_step", "realistic": True, "steps": 2, "bench": "tumor_ext", "patients": False,
    "data_fingerprint": "synthetic-1", "profile": "smoke", "budget": 600.0, "unit": "updates",
    "search": "sobol", "seed": 1000, "trials": 4, "updates": 590, "seconds": 120.0,
    "settings": ["train.lr=0.0003"], "opened": {"train": ["btcv/t1"], "tuning": ["btcv/v1"]},
    "file": "0", "profile_before": {"name": "smoke", "examine": {"postprocess": False}},
}  # fmt: skip


def analysis(out: Path, **tuned: dict[str, Any] | None) -> Analysis:
    make_runs(
        out,
        {
            name: Method(seeds=(0,), record={} if how is None else {"tuned": TUNED | how})
            for name, how in tuned.items()
        },
        patients={"btcv": 3, "lits": 3},
    )
    protocol = Protocol(draws=100, rank_resamples=10)
    return Analysis(results=out, bench="tumor_ext", protocol=protocol, reference="universal")


@pytest.mark.parametrize(
    ("finetune", "universal", "answer"),
    [
        ({}, {}, "yes: rule first_step on tumor_ext, 600 updates each; no test case opened"),
        ({}, None, "**no**: not tuned: universal"),
        ({}, {"budget": 900.0}, "**no**: different budget: 600.0, 900.0"),
        ({}, {"rule": "transfer", "bench": "body_ext"}, "**no**: different rule"),
        (
            {"rule": "oracle", "realistic": False},
            {"rule": "oracle", "realistic": False},
            "**no**: tuned on the end of this course, UNREALISTIC",
        ),
        ({"opened": {"tuning": ["btcv/100"]}}, {}, "**no**: test cases seen in tuning: btcv/100"),
        (None, None, "**missing** (no run was made with `--tuned`)"),
    ],
)
def test_the_checklist_answers_from_the_records(
    finetune: dict[str, Any] | None, universal: dict[str, Any] | None, answer: str, tmp_path: Path
) -> None:
    a = analysis(tmp_path, finetune=finetune, universal=universal)
    assert dict(checklist(a))[ROW].startswith(answer)
    unequal = [text for text in limits(a) if "tuned alike" in text or "equal tuning" in text]
    assert bool(unequal) == (not answer.startswith("yes"))


def test_every_strategy_says_how_it_was_tuned_and_an_oracle_in_its_very_name(
    tmp_path: Path,
) -> None:
    oracle = {"rule": "oracle", "realistic": False}
    a = analysis(tmp_path, finetune=None, universal={}, lwf=oracle)
    said = {card.label: dict(card.rows)["settings chosen"] for card in cards(a)}
    assert said["finetune"] == "not by `clbench tune`"
    assert said["universal"].startswith(
        "rule first_step, on validation cases of steps 1 to 2 of tumor_ext (the phantom, profile "
        "smoke): train.lr=0.0003; 4 trials of seed 1000, 590 updates, 2.0 minutes"
    )
    assert "UNREALISTIC" in said["lwf [oracle, unrealistic]"]


def test_tuned_and_untuned_runs_of_one_strategy_are_two_rows(tmp_path: Path) -> None:
    analysis(tmp_path, universal=None)
    make_runs(
        tmp_path,
        {"universal": Method(seeds=(0,), record={"tuned": TUNED}, identity={"profile": {"x": 1}})},
        patients={"btcv": 3, "lits": 3},
    )
    study = Analysis(results=tmp_path, bench="tumor_ext", protocol=Protocol(draws=100))
    labels = {m.label for m in study.scores().strategies}
    assert labels == {
        "universal (not tuned)", "universal (tuned by first_step, train.lr=0.0003)",
    }  # fmt: skip
