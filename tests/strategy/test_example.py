"""The example in the docstring of `clbench.strategy`: it runs, and prints what it says."""

from __future__ import annotations

import doctest

from clbench import strategy


def test_the_example_of_a_whole_method_runs() -> None:
    result = doctest.testmod(strategy)
    assert result.attempted > 10
    assert result.failed == 0
