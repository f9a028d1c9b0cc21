"""Plugins of Avalanche named by module: which settings are theirs, and which are refused."""

from __future__ import annotations

import pytest

from clbench.errors import SettingError
from clbench.run.plan import load_strategy

TEACHER = "avalanche_users:Teacher"


@pytest.mark.parametrize(
    ("overrides", "past"),
    [({}, "weights"), ({"past": "weights"}, "weights"), ({"past": "cases"}, "cases")],
)
def test_a_plugin_declares_what_it_is_told(overrides: dict[str, str], past: str) -> None:
    assert load_strategy(TEACHER, overrides).declaration.past == past


@pytest.mark.parametrize("past", ["case", "images", "nothing", ""])
def test_another_past_is_refused(past: str) -> None:
    with pytest.raises(SettingError) as err:
        load_strategy(TEACHER, {"past": past})
    assert err.value.fields()["where"] == "strategy.past"
    assert (err.value.expected, err.value.got) == ("one of weights, cases", past)
    if past == "case":
        assert "did you mean 'cases'" in str(err.value)
