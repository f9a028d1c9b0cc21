"""`clbench tune`: what it refuses, what it says of each trial, and the commands it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clbench.cli.options import app
from clbench.errors import SettingError
from clbench.strategy import Range
from clbench.tuning import outcome, study, summary
from clbench.tuning.study import TunedStrategy, TuneSettings
from clbench.tuning.trial import Trial

WORDS = ["tune", "--bench", "tumor_ext", "--strategy", "lwf", "--strategy", "mib"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "0"], "at least one trial"),
        (["--budget", "9", "--unit", "hours"], "unknown value"),
        (["--budget", "9", "--rule", "test"], "unknown value"),
        (["--budget", "9", "--search", "grid"], "unknown value"),
        (["--budget", "9", "--space", "train.lr=1e-4..1e-2", "--set", "train.lr=1e-3"], "at once"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*WORDS, *words])
    assert isinstance(done.exception, SettingError)
    assert message in str(done.exception)


def trial(number: int, score: float | None, **settings: Any) -> Trial:
    return Trial(
        number=number, settings=settings, score=score, dice={}, updates=4, seconds=30.0,
        first_step="a", opened={}, failure=None if score is not None else "the loss is not finite",
    )  # fmt: skip


def test_trials_are_told_and_the_chosen_settings_are_to_be_trained_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tuned(settings: TuneSettings, watch: Callable[[dict[str, Any]], None]) -> Any:
        trials = [trial(1, 0.25), trial(2, None, **{"train.lr": 0.01})]
        for one in trials:
            told = {"strategy": "lwf", "number": one.number, "settings": one.settings}
            watch({"event": "trial", **told})
            watch({"event": "tried", "strategy": "lwf", "trial": one})
        return [
            TunedStrategy(
                name=name, space={"train.lr": Range(low=0.001, high=0.1, log=True)},
                defaults={"train.lr": 0.002}, trials=trials, folder=tmp_path, facts={},
                patients=False,
            )
            for name in settings.strategies
        ]  # fmt: skip

    monkeypatch.setattr(study, "tune", tuned)
    monkeypatch.setattr(outcome, "write_outcome", lambda *_: [tmp_path / "tuned.toml"])
    words = [
        *WORDS,
        "--budget",
        "9",
        "--rule",
        "oracle",
        "--profile",
        "smoke",
        "--set",
        "train.epochs=2",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for line in (
        "lwf, trial 1: the defaults",
        "lwf, trial 1: validation Dice 0.250",
        "lwf, trial 2: train.lr=0.01",
        "lwf, trial 2: training diverged: the loss is not finite",
        "Chosen by rule oracle, UNREALISTIC, budget 9 updates each",
        f"clbench run --bench tumor_ext --strategy mib --tuned {tmp_path}/tuned.toml --seeds 0-2",
        "--seeds 0-2 --profile smoke --set train.epochs=2",
    ):
        assert line in done.output


def test_the_settings_file_is_written_before_anything_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A table that fails must not cost what the whole budget was spent on."""
    written: list[str] = []

    def write(*_: Any) -> list[Path]:
        written.append("outcome")
        return [tmp_path / "tuned.toml"]

    def fail(*_: Any) -> Any:
        raise ValueError("no table")

    monkeypatch.setattr(study, "tune", lambda *_: [])
    monkeypatch.setattr(outcome, "write_outcome", write)
    monkeypatch.setattr(summary, "tables", fail)
    done = CliRunner().invoke(app, [*WORDS, "--budget", "9"])
    assert isinstance(done.exception, ValueError)
    assert written == ["outcome"]
