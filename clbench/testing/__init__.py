"""The honesty kit: `check_strategy` and `check_benchmark`, to run on your own plugin.

Each rule is a named function with a one-line reason; a declaration that is not true is
itself a failure. In a test: `report = check_strategy("mine"); assert report.ok, report`.
"""

from clbench.testing.benchmark_check import check_benchmark
from clbench.testing.report import Broken, Exempt, Finding, Limit, Report, Rule
from clbench.testing.strategy_check import check_strategy

__all__ = [
    "Broken",
    "Exempt",
    "Finding",
    "Limit",
    "Report",
    "Rule",
    "check_benchmark",
    "check_strategy",
]
