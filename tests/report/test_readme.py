"""The README is true: its tables are what the commands print, its example is a strategy that runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from locations import ROOT

from clbench.cli.options import app
from clbench.cli.reports import rewrite
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.spec import registry
from clbench.store import run_folder

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_numbers_are_made_by_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert README.count("<!-- $ clbench") >= 1
    assert rewrite(README, app) == README, "run `make readme`"


def test_its_strategy_runs_and_resists(
    smoke_run: Path, smoke_out: Path, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (code,) = [block for block in blocks if "class Anchored" in block]
    module = types.ModuleType("readme_example")
    monkeypatch.setitem(sys.modules, "readme_example", module)
    exec(compile(code, "README.md", "exec"), module.__dict__)  # noqa: S102  # our own page
    load = registry.load

    def with_example(kind: str, name: str) -> Any:
        return module.Anchored if name == "anchored" else load(kind, name)

    monkeypatch.setattr(registry, "load", with_example)
    folder = run_course(
        RunSettings(
            bench="tumor_ext", strategy="anchored", profile="smoke", out=smoke_out, cache=cache_root
        )
    )
    assert run_folder.read_record(folder)["status"] == "finished"


def test_its_table_of_folders_names_every_folder() -> None:
    table = README.split("## Folders")[1].split("\n## ")[0]
    for folder in sorted(p for p in (ROOT / "clbench").iterdir() if (p / "__init__.py").exists()):
        assert f"`clbench/{folder.name}/`" in table, folder.name


def test_links_inside_the_project_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
