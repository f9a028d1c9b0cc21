"""Rules: which steps they look at, and which of them is realistic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clbench.errors import SettingError
from clbench.spec import registry
from clbench.tuning.rules import RULES


def test_steps_of_a_course_that_a_rule_looks_at() -> None:
    course = registry.benchmark("body_ext")
    assert len(course.steps) > 2
    steps = {name: rule.last_step(course) for name, rule in RULES.items()}
    assert steps == {
        "first_step": 2, "transfer": len(course.steps), "oracle": len(course.steps),
    }  # fmt: skip
    short = replace(course, steps=course.steps[:1], groups={})
    with pytest.raises(SettingError, match="one step"):
        RULES["first_step"].last_step(short)


def test_an_oracle_is_labelled_wherever_it_is_named() -> None:
    assert {name for name, rule in RULES.items() if "UNREALISTIC" in rule.label} == {"oracle"}
    assert "UNREALISTIC" in RULES["oracle"].summary
