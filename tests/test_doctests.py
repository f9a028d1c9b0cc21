"""The examples in the docstrings of numbers run as printed, and every such function has one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
from locations import ROOT

FILES = sorted(
    [
        *(ROOT / "clbench" / "statistics").glob("*.py"),
        *(ROOT / "clbench" / "evaluation" / "metrics").glob("*.py"),
        *(ROOT / "clbench" / "strategy" / f"{name}.py" for name in ("distillation", "losses")),
        ROOT / "clbench" / "strategy" / "partial_labels.py",
    ]
)
PARSER = doctest.DocTestParser()


def public_functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def module_of(path: Path) -> str:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return module.removesuffix(".__init__")


CASES = [(module_of(path), function.name) for path in FILES for function in public_functions(path)]


@pytest.mark.parametrize(("module", "name"), CASES)
def test_the_example_of_each_public_function_prints_what_it_says(module: str, name: str) -> None:
    """Each example imports what it needs: it starts from an empty namespace, as a reader does."""
    function = getattr(importlib.import_module(module), name)
    examples = PARSER.get_doctest(
        function.__doc__ or "", {"__name__": "__main__"}, f"{module}.{name}", None, None
    )
    assert any(example.want for example in examples.examples), "no example that prints a number"
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    results = runner.run(examples, out=report.append)
    assert results.failed == 0, "".join(report)


def test_the_functions_are_found() -> None:
    assert {module.rpartition(".")[0] for module, _ in CASES} == {
        "clbench.statistics", "clbench.evaluation.metrics", "clbench.strategy",
    }  # fmt: skip


def test_a_wrong_number_is_noticed() -> None:
    wrong = PARSER.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1
