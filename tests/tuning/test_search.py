"""Searches: the same points each time, within bounds; ranges of the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clbench.errors import SettingError
from clbench.run.plan import load_strategy
from clbench.spec import registry
from clbench.spec.settings import load_profile
from clbench.strategies.lwf import Lwf
from clbench.strategy import Choice, Range
from clbench.strategy.search_space import space_of
from clbench.tuning import search as search_module
from clbench.tuning.search import (
    MOST_SETTINGS,
    OptunaSearch,
    SobolSearch,
    default_values,
    read_space,
    settable,
    words,
)

SPACE: dict[str, Range | Choice] = {
    "train.lr": Range(low=1e-4, high=1e-2, log=True),
    "strategy.where": Choice(("here", "there")),
    "strategy.rank": Range(low=1, high=4, integer=True),
}


def test_sobol_points_are_repeatable_and_fill_the_range() -> None:
    search = SobolSearch(SPACE, 7)
    assert search.values(1) == {}  # the defaults
    made = [search.values(n) for n in range(2, 18)]  # 16 points: one in each sixteenth
    assert made == [SobolSearch(SPACE, 7).values(n) for n in range(2, 18)]
    assert made != [SobolSearch(SPACE, 8).values(n) for n in range(2, 18)]
    lows = sum(v["train.lr"] < 1e-3 for v in made)
    assert lows == 8
    assert {v["strategy.where"] for v in made} == {"here", "there"}
    assert sorted({v["strategy.rank"] for v in made}) == [1, 2, 3, 4]


def test_a_column_does_not_depend_on_how_many_follow() -> None:
    """So strategies that start with the learning rate get equal ones, and share first steps."""
    alone = SobolSearch({"train.lr": SPACE["train.lr"]}, 7)
    assert alone.values(5)["train.lr"] == SobolSearch(SPACE, 7).values(5)["train.lr"]


def test_more_settings_than_columns_are_refused() -> None:
    with pytest.raises(SettingError, match="too many settings"):
        SobolSearch({f"strategy.{i}": SPACE["train.lr"] for i in range(MOST_SETTINGS + 1)}, 0)


def test_words_are_those_of_set() -> None:
    values = {"train.lr": 0.0005, "strategy.pseudo": "soft", "strategy.rank": 4}
    assert words(values) == ("train.lr=0.0005", "strategy.pseudo=soft", "strategy.rank=4")


def test_ranges_of_the_command_line() -> None:
    read = read_space(
        [
            "strategy.weight=1..10:log",
            "train.batch=1..4:int",
            "strategy.unlabelled=ignore|background",
        ],
        Lwf,
    )
    assert read == {
        "strategy.weight": Range(low=1.0, high=10.0, log=True),
        "train.batch": Range(low=1, high=4, integer=True),
        "strategy.unlabelled": Choice(("ignore", "background")),
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("strategy.weight", r"needs NAME=LOW\.\.HIGH"),
        ("strategy.weight=1..", "no bound"),
        ("strategy.weight=1", "no bound"),
        ("strategy.weight=a..b", "no number"),
        ("strategy.weight=1..2:lgo", "did you mean log"),
        ("strategy.wieght=1..2", "did you mean strategy.weight"),
        ("strategy.weight=2..1", "contradict"),
        ("train.epochs=1..inf:int", "no whole number"),
        ("train.epochs=nan..3:int", "no whole number"),
        ("train.epochs=1.9..3.9:int", r"no whole number[\s\S]*1\.9, 3\.9"),
    ],
)
def test_wrong_ranges_are_refused(word: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_space([word], Lwf)


def test_a_range_given_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="given twice"):
        read_space(["train.lr=1e-4..1e-2:log", "train.lr=1e-5..1e-3:log"], Lwf)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("phantom.train=1..4:int", "other cases"),
        ("train.batch=1..4", "whole number"),
        ("train.lr=-1..1", "above 0"),
        ("strategy.unlabelled=ignore|bakground", "bakground"),
    ],
)
def test_values_that_a_setting_does_not_take_are_refused_before_a_trial(
    word: str, message: str
) -> None:
    space = read_space([word], Lwf)
    with pytest.raises(SettingError, match=r"other cases|does not take") as refused:
        settable(space, Lwf(), load_profile("smoke"))
    assert message in str(refused.value)


def test_options_are_of_the_types_of_their_settings() -> None:
    """As text, 2 would be another option than the default 2."""
    asked = ["train.batch=1|2", "train.compile=false|true", "train.clip_norm=none|1e0",
             "data.posneg=1, 1|2,1", "strategy.unlabelled=ignore|background"]  # fmt: skip
    strategy, profile = Lwf(), load_profile("smoke")
    space = settable(read_space(asked, Lwf), strategy, profile)
    assert [span.options for span in space.values() if isinstance(span, Choice)] == [
        (1, 2), (False, True), (None, 1.0), ("1.0,1.0", "2.0,1.0"), ("ignore", "background"),
    ]  # fmt: skip
    assert words({"a.b": None, "a.c": True, "a.d": (2, 1)}) == ("a.b=none", "a.c=true", "a.d=2,1")
    defaults = default_values(space, strategy, profile)
    assert isinstance(defaults["data.posneg"], str)
    with pytest.raises(SettingError, match="nothing to choose from"):
        settable(read_space(["train.lr=1e-3|0.001"], Lwf), strategy, profile)


def test_every_strategys_own_space_holds_values_that_it_takes() -> None:
    for name in registry.entries("strategy"):
        strategy = load_strategy(name, {})
        settable(space_of(type(strategy)), strategy, load_profile("paper"))


def optuna_search(journal: Path) -> OptunaSearch:
    defaults: dict[str, Any] = {"train.lr": 1e-3, "strategy.where": "here", "strategy.rank": 2}
    return OptunaSearch(SPACE, 3, journal, defaults)


@pytest.mark.skipif(
    find_spec("optuna") is None, reason="needs the extra: pip install clbench[tune]"
)
def test_optuna_goes_on_from_its_journal(tmp_path: Path) -> None:
    whole = optuna_search(tmp_path / "whole")
    told = []
    for number in range(1, 5):
        told.append(whole.values(number))
        whole.tell(number, None if number == 3 else 0.1 * number)
    assert told[0] == {}
    broken = optuna_search(tmp_path / "broken")
    assert broken.values(1) == {}
    broken.tell(1, 0.1)
    assert broken.values(2) == told[1]
    again = optuna_search(tmp_path / "broken")  # stopped within trial 2
    for number in range(1, 5):
        assert again.values(number) == told[number - 1]
        again.tell(number, None if number == 3 else 0.1 * number)
    assert len(again.study.trials) == 4


WITH_OPTUNA = pytest.mark.skipif(
    find_spec("optuna") is None, reason="needs the extra: pip install clbench[tune]"
)


@WITH_OPTUNA
@pytest.mark.parametrize(
    ("span", "default", "told"),
    [
        (Choice((1, 2)), 2, True),
        (Choice((1, 2)), 3, False),
        (Choice((False, True)), False, True),
        (Range(low=0.5, high=10.0), None, False),
        (Range(low=1e-3, high=1e-2, log=True), 1e-4, False),
        (Range(low=1, high=4, integer=True), 2, True),
    ],
)
def test_optuna_begins_with_defaults_wherever_they_lie(
    span: Range | Choice, default: Any, told: bool, tmp_path: Path
) -> None:
    """What the defaults scored is no score of another value."""
    search = OptunaSearch({"a.b": span}, 3, tmp_path / "journal", {"a.b": default})
    assert search.values(1) == {}
    search.tell(1, 0.5)
    first = search.study.trials[0]
    assert first.state.name == ("COMPLETE" if told else "FAIL")
    assert (first.params["a.b"] == default) == told
    assert search.values(2)["a.b"] in (
        span.options if isinstance(span, Choice) else {search.values(2)["a.b"]}
    )


@WITH_OPTUNA
@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 2, 13])
def test_optuna_takes_up_a_trial_that_was_killed_while_it_was_proposed(
    number: int, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def made(search: OptunaSearch, numbers: range) -> list[Any]:
        values = []
        for n in numbers:
            values.append(search.values(n))
            search.tell(n, 0.1 * n)
        return values

    whole = made(optuna_search(tmp_path / "whole"), range(1, number + 2))
    broken = optuna_search(tmp_path / "broken")
    made(broken, range(1, number))
    suggest, given = search_module._suggest, list[str]()

    def kill(trial: Any, name: str, span: Any) -> None:
        if len(given) == done:
            raise Killed
        given.append(name)
        suggest(trial, name, span)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "_suggest", kill)
        with pytest.raises(Killed):
            broken.values(number)
    again = optuna_search(tmp_path / "broken")
    assert made(again, range(1, number + 2)) == whole
    assert all(len(t.params) == len(SPACE) for t in again.study.trials)


@pytest.mark.skipif(find_spec("optuna") is not None, reason="optuna is installed")
def test_without_optuna_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"clbench\[tune\]"):
        optuna_search(tmp_path / "journal")
