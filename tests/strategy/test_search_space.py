"""Search spaces: shipped ones name real settings, hold the defaults and are joined; bad ones fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from clbench.errors import SettingError
from clbench.run.plan import load_strategy
from clbench.spec import registry
from clbench.strategies.finetune import Finetune
from clbench.strategy import Choice, Range, SearchSpace
from clbench.strategy.search_space import space_of

COMPOSED = ("universal+plop", "softmax+lwf+plop", "sigmoid+ilt")


@pytest.mark.parametrize("name", [*sorted(registry.entries("strategy")), *COMPOSED])
def test_shipped_spaces_hold_the_defaults(name: str) -> None:
    strategy = load_strategy(name, {})
    space = space_of(type(strategy))
    assert next(iter(space)) == "train.lr"  # one column of the search for all strategies
    for setting, span in space.items():
        group, _, field = setting.partition(".")
        if group != "strategy":
            continue
        default = getattr(strategy, field)
        if isinstance(span, Choice):
            assert default in span.options
        else:
            low, high = span.bounds(setting)
            assert low <= default <= high
            assert span.integer == isinstance(default, int)


def test_a_composition_joins_the_spaces_of_its_parts() -> None:
    space = space_of(type(load_strategy("universal+plop", {})))
    assert {*space} == {
        "train.lr", "strategy.pseudo", "strategy.feature_factor", "strategy.logit_factor",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lwf_ct", "plop_ct", "ilt_ct"])
def test_what_is_refused_beside_other_options_is_not_tuned(name: str) -> None:
    both = [space_of(load_strategy(name, {"head": head})) for head in ("softmax", "sigmoid")]
    assert both[0].keys() - both[1].keys() == {"strategy.new_classifier_lr"}
    for setting, span in both[1].items():
        group, _, field = setting.partition(".")
        if group == "strategy":
            value = str(span.bounds(setting)[0])
            load_strategy(name, {"head": "sigmoid", field: value})


def made(space: SearchSpace) -> type[Any]:
    @dataclass(frozen=True, kw_only=True)
    class Made(Finetune):
        weight: float = 1.0
        search_space: ClassVar[SearchSpace] = space

    return Made


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"weight": Range(low=0.1)}, "no bound"),
        ({"weight": Range(low=0.1, high=math.inf)}, "no bound"),
        ({"weight": Range(low=2.0, high=1.0)}, "contradict"),
        ({"weight": Range(low=0.0, high=1.0, log=True)}, "contradict"),
        ({"weight": Choice((1.0, 1.0))}, "nothing to choose from"),
        ({"weight": (0.1, 1.0)}, "made of Range and Choice"),
        ({"wieght": Range(low=0.1, high=1.0)}, "did you mean strategy.weight"),
        ({"train.lrr": Range(low=0.1, high=1.0)}, "did you mean train.lr"),
    ],
)
def test_wrong_spaces_are_refused(space: SearchSpace, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        space_of(made(space))


def test_none_takes_a_setting_of_a_parent_away() -> None:
    assert [*space_of(made({"train.lr": None, "weight": Range(low=0.1, high=1.0)}))] == [
        "strategy.weight"
    ]


def test_values_span_the_range_evenly_in_its_scale() -> None:
    assert [Range(low=0.1, high=10.0, log=True).value_at(x) for x in (0, 0.5, 1)] == [0.1, 1.0, 10]
    assert [Range(low=1, high=3).value_at(x) for x in (0, 0.5, 1)] == [1.0, 2.0, 3.0]
    whole = Range(low=1, high=3, integer=True)
    assert [whole.value_at((i + 0.5) / 6) for i in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [whole.value_at(x) for x in (0, 1)] == [1, 3]
    assert [Choice(("a", "b")).value_at(x) for x in (0, 0.49, 0.5, 1)] == ["a", "a", "b", "b"]
