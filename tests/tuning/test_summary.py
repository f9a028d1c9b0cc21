"""Sensitivity and the curve, from trials made of numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from clbench.report.figures import style
from clbench.run.plan import RunSettings
from clbench.strategy import Choice, Range
from clbench.tuning import outcome
from clbench.tuning.figures import curve_figure, settings_figure
from clbench.tuning.study import TunedStrategy, TuneSettings
from clbench.tuning.summary import curve, explained, sensitivities, tables, write_csv
from clbench.tuning.trial import Trial

LR = {2: 0.0003, 3: 0.0006, 4: 0.001, 5: 0.002, 6: 0.003, 7: 0.006}


def tuned(scores: list[float | None], name: str = "lwf") -> TunedStrategy:
    """Trials whose learning rate alone matters: 10 updates and 2 s each."""
    trials = [
        Trial(
            number=i,
            settings={} if i == 1 else {"train.lr": LR[i], "strategy.pseudo": "soft"},
            score=score,
            dice={},
            updates=10,
            seconds=2.0,
            first_step="a",
            opened={"train": ["btcv/1"], "tuning": ["btcv/2"]},
            failure=None if score is not None else "the loss is not finite",
        )
        for i, score in enumerate(scores, 1)
    ]
    return TunedStrategy(
        name=name,
        space={
            "train.lr": Range(low=1e-4, high=1e-1, log=True),
            "strategy.pseudo": Choice(("hard", "soft")),
        },
        defaults={"train.lr": 1e-4, "strategy.pseudo": "hard"},
        trials=trials,
        folder=Path("results/_tuning/c/trials") / name / "0123",
        facts={"identity": {"bench": "tumor_ext", "strategy": {}}, "steps": 2},
        patients=False,
    )


SETTINGS = TuneSettings(
    strategies=("lwf", "mib"),
    base=RunSettings(bench="tumor_ext", strategy="lwf", seed=1000),
    rule="oracle",
    budget=70,
)
SCORES = [0.1, 0.1, 0.2, None, 0.5, 0.4, 0.3]


def test_best_so_far_passes_over_trials_that_diverged() -> None:
    rows = curve(tuned(SCORES))
    assert [r.best for r in rows] == [0.1, 0.1, 0.2, 0.2, 0.5, 0.5, 0.5]
    assert [r.spent_updates for r in rows] == [10, 20, 30, 40, 50, 60, 70]
    assert tuned(SCORES).best.number == 5
    assert tuned([0.3, 0.3]).best.number == 1  # of equal ones the first: the defaults


def test_share_of_variance_between_parts() -> None:
    assert explained("aabbcc", [1, 1, 2, 2, 3, 3]) == pytest.approx(1.0)
    assert explained("ababab", [1, 1, 2, 2, 3, 3]) == pytest.approx(0.0)
    # means 2 and 4, total 3: between 6 * 1, within 3 * 2 + ... by hand: 6 / (6 + 4)
    assert explained("aaabbb", [1, 2, 3, 3, 4, 5]) == pytest.approx(6 / 10)
    assert math.isnan(explained("aabb", [1, 2, 3, 4]))  # too few
    assert math.isnan(explained("aabbcc", [1.0] * 6))


def test_sensitivity_of_every_setting() -> None:
    lr, pseudo = sensitivities(tuned(SCORES))
    assert (lr.setting, lr.default, lr.trials) == ("train.lr", "0.0001", 6)
    # log thirds of 1e-4 to 1e-1: trials 1-3 | 5-7; trial 4 has no score
    assert lr.share == pytest.approx(_by_hand([[0.1, 0.1, 0.2], [0.5, 0.4, 0.3]]))
    assert pseudo.share == pytest.approx(_by_hand([[0.1], [0.1, 0.2, 0.5, 0.4, 0.3]]))
    assert lr.by_chance == pseudo.by_chance == pytest.approx(1 / 5)


def test_none_is_a_part_of_its_own_and_a_default_is_one_of_the_options() -> None:
    names = {2: "1", 3: 2, 4: "2", 5: 1, 6: "2", 7: 1}  # as text in trials of earlier versions
    values = {i: {"train.batch": names[i], "train.clip_norm": 2.0} for i in names}
    plain = tuned([0.3, 0.9, 0.3, 0.3, 0.9, 0.3, 0.9])
    one = dataclasses.replace(
        plain,
        space={"train.batch": Choice((1, 2)), "train.clip_norm": Range(low=0.5, high=10.0)},
        defaults={"train.batch": 2, "train.clip_norm": None},
        trials=[dataclasses.replace(t, settings=values.get(t.number, {})) for t in plain.trials],
    )
    batch, clip = sensitivities(one)
    assert batch.share == pytest.approx(1.0)
    assert batch.by_chance == clip.by_chance == pytest.approx(1 / 6)
    assert clip.share == pytest.approx(_by_hand([[0.3], [0.9, 0.3, 0.3, 0.9, 0.3, 0.9]]))
    assert (clip.default, clip.best) == ("none", "2.0")
    with style.look():
        figure = settings_figure(one, SETTINGS)
    batch_ax, clip_ax = figure.axes
    assert {*batch_ax.lines[0].get_xdata()} == {"1", "2"}
    drawn = clip_ax.lines[0].get_xdata()
    assert math.isnan(drawn[0])
    assert [*drawn[1:]] == [2.0] * 6
    assert "no train.clip_norm" in " ".join(" ".join(t.get_text().split()) for t in figure.texts)


def _by_hand(parts: list[list[float]]) -> float:
    scores = [x for part in parts for x in part]
    mean = sum(scores) / len(scores)
    within = sum((x - sum(p) / len(p)) ** 2 for p in parts for x in p)
    return 1 - within / sum((x - mean) ** 2 for x in scores)


def test_what_is_printed_and_written_says_rule_and_cost(tmp_path: Path) -> None:
    both = [tuned(SCORES), tuned([0.2, None, 0.1], "mib")]
    chosen, matters = tables(both, SETTINGS)
    assert "oracle, UNREALISTIC, budget 70 updates each" in chosen.title
    assert [row[:8] for row in chosen.rows] == [
        ("lwf", "train.lr=0.002 strategy.pseudo=soft",
         "0.500", "0.100", "7", "1", "70", "0.2"),
        ("mib", "the defaults", "0.200", "0.200", "3", "1", "30", "0.1"),
    ]  # fmt: skip
    assert len(matters.rows) == 4
    curve_csv, sensitivity_csv = write_csv(both, tmp_path)
    assert len(curve_csv.read_text().splitlines()) == 1 + 7 + 3
    assert sensitivity_csv.read_text().startswith(
        "strategy,setting,range,default,best,trials,share"
    )


def test_figures_show_every_trial_and_what_was_chosen() -> None:
    one = tuned(SCORES)
    with style.look():
        (ax,) = curve_figure([one], SETTINGS).axes
        best, trials, defaults = ax.lines
        lr, pseudo = settings_figure(one, SETTINGS).axes
    assert list(best.get_xdata()) == [10, 20, 30, 40, 50, 60, 70, 70]
    assert list(best.get_ydata()) == [0.1, 0.1, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5]
    assert list(trials.get_ydata()) == [0.1, 0.1, 0.2, 0.5, 0.4, 0.3]  # one diverged
    assert list(defaults.get_ydata()) == [0.1]
    assert (lr.get_xscale(), pseudo.get_xscale()) == ("log", "linear")
    assert [line.get_xdata()[0] for line in lr.lines[1:]] == [1e-4, 0.002]  # defaults, chosen
    assert list(pseudo.lines[0].get_xdata()) == ["hard", *["soft"] * 5]


def test_the_outcome_is_settings_file_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "write_tuned", lambda path, *_: path.touch())
    monkeypatch.setattr(style, "to_bytes", lambda figure, kind: kind.encode())
    written = outcome.write_outcome([tuned(SCORES)], SETTINGS, tmp_path)
    assert [p.name for p in written] == [
        "tuned.toml", "curve.csv", "sensitivity.csv", "curve.pdf", "curve.png",
        "settings_lwf.pdf", "settings_lwf.png",
    ]  # fmt: skip
    assert all(p.exists() for p in written)
