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
OTHERS = [
    (module_of(path), function.name)
    for path in sorted((ROOT / "clbench").rglob("*.py"))
    if path not in FILES
    for function in public_functions(path)
    if ">>>" in (ast.get_docstring(function) or "")
]
"""Examples where none is demanded."""


@pytest.mark.parametrize(("module", "name"), CASES)
def test_the_example_of_each_public_function_prints_what_it_says(module: str, name: str) -> None:
    """Each example imports what it needs: it starts from an empty namespace, as a reader does."""
    assert run_examples(module, name, {"__name__": "__main__"}), "no example that prints a number"


@pytest.mark.parametrize(("module", "name"), OTHERS)
def test_every_other_example_prints_what_it_says(module: str, name: str) -> None:
    run_examples(module, name, {**vars(importlib.import_module(module)), "Path": Path})


def run_examples(module: str, name: str, names: dict[str, object]) -> bool:
    """Run the examples of a function's docstring; whether one of them prints anything."""
    function = getattr(importlib.import_module(module), name)
    examples = PARSER.get_doctest(function.__doc__ or "", names, f"{module}.{name}", None, None)
    prints = any(example.want for example in examples.examples)
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert results.failed == 0, "".join(report)
    return prints


def test_the_functions_are_found() -> None:
    assert {module.rpartition(".")[0] for module, _ in CASES} == {
        "clbench.statistics", "clbench.evaluation.metrics", "clbench.strategy",
    }  # fmt: skip
    assert ("clbench.report.significance.sentences", "p_text") in OTHERS


def test_a_wrong_number_is_noticed() -> None:
    wrong = PARSER.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1
