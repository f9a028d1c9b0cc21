"""A package of somebody else's enters by entry point: installed as a user would, asked from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from locations import ROOT, TESTS

from clbench.testing.strategy_check import RULES

PLUGIN = TESTS / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with the plugin installed by pip."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source)  # building leaves traces in the folder
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "--target", str(target), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def outside(site: Path, cwd: Path) -> dict[str, str]:
    """An environment in which the plugin is found, and nothing is left behind."""
    more = {"PYTHONPATH": str(site), "CLBENCH_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more}


def test_the_plugin_is_one_file_of_content_each() -> None:
    files = {p.name for p in (PLUGIN / "outsider").iterdir() if p.is_file()}
    assert files == {"__init__.py", "anchored.py", "kidneys_first.toml"}
    assert len((PLUGIN / "outsider" / "anchored.py").read_text().splitlines()) <= 50


def test_the_readme_shows_the_plugin_as_it_is() -> None:
    readme = (ROOT / "strategies" / "README.md").read_text(encoding="utf-8")
    assert (PLUGIN / "outsider" / "anchored.py").read_text(encoding="utf-8") in readme
    assert f"{len(RULES)} rules of the contract" in readme


def test_both_enter_by_entry_point_are_honest_and_run_together(site: Path, tmp_path: Path) -> None:
    code = (
        "from clbench.cli import app\n"
        "for words in (['list'], ['check', 'strategy', 'anchored'], ['check', 'benchmark', 'kidneys_first'],\n"
        "    ['run', '--bench', 'kidneys_first', '--strategy', 'anchored', '--profile', 'smoke',\n"
        "     '--out', 'results', '--set', 'strategy.weight=0.1', '--set', 'backbone.size=8',\n"
        "     '--set', 'phantom.spacing_mm=16', '--set', 'phantom.train=1',\n"
        "     '--set', 'phantom.test=1', '--set', 'data.spacing_mm=22,22,22',\n"
        "     '--set', 'data.patch_vox=16,16,16']):\n"
        "    app(words, standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=outside(site, tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "anchored Fine-tuning that is pulled back to the old weights." in lines
    assert "kidneys_first both kidneys, then the liver with its tumors" in lines
    assert done.stdout.count(" 0 FAIL") == 2, done.stdout
    (table,) = tmp_path.glob("results/kidneys_first/anchored/*/scores.csv")
    assert "liver_tumor" in table.read_text()
