"""Checks of a course before its step 1, for methods that cannot teach every course to its end."""

from __future__ import annotations

from collections.abc import Sequence

from clbench.errors import TrainingError
from clbench.strategy.contract import Lesson, Strategy


def refuse_steps_without_new_structures(strategy: Strategy, steps: Sequence[Lesson]) -> None:
    """Refuse a course with a step that only teaches again, for methods that train new parts alone.

    Args:
        strategy: the method.
        steps: of the course, those that are taught.

    Raises:
        TrainingError: a step after the first has no new structure.
    """
    for step in steps:
        if step.number > 1 and not step.learns:
            raise nothing_to_train(strategy, step)


def nothing_to_train(strategy: Strategy, step: Lesson) -> TrainingError:
    """The error for a step without new structures in which a method trains no parameter."""
    return TrainingError(
        "the strategy has nothing to train in a step that teaches no new structure",
        where=f"{type(strategy).__name__}, step {step.number}",
        expected="a strategy that goes on training what it has",
        next_step="run this course with another strategy; this one trains the parts of new "
        "structures alone",
    )
