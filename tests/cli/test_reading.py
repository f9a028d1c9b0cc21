"""Commands that read leave a results folder as it is, so that they work on a read-only one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clbench.cli.options import app


def stamps(folder: Path) -> dict[Path, int]:
    """When every file and folder was last changed; a folder changes with a file made in it."""
    return {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, phantom_2_runs: Path) -> Path:
    to = tmp_path_factory.mktemp("results") / "results"
    shutil.copytree(phantom_2_runs / "reference" / "tumor_ext", to / "tumor_ext")
    return to


@pytest.mark.parametrize(
    "words",
    [
        ["table", "summary", "--results", "RESULTS"],
        ["table", "cost", "--results", "RESULTS"],
        ["verify", "RUN"],
        ["excerpt", "RESULTS", "ELSEWHERE"],
    ],
    ids=lambda w: " ".join(w[:2]),
)
def test_a_reading_command_changes_nothing(words: list[str], results: Path, tmp_path: Path) -> None:
    run = next(p.parent for p in sorted(results.glob("*/finetune/*/run.json")))
    places = {
        "RESULTS": results,
        "RUN": run,
        "ELSEWHERE": tmp_path / "e",
    }
    before = stamps(results)
    done = CliRunner().invoke(app, [str(places.get(w, w)) for w in words])
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert stamps(results) == before
