"""The commands that publish a model, read it back and show a case, from word to file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import StoreError, UnknownName


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_export_import_and_view(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("export", smoke_run, "model")
    assert "model/step2.safetensors" in said
    assert "FILL IN" in said
    said = call("import", "model", "--out", "results")
    assert said.strip() == f"results/tumor_ext/universal/{smoke_run.name}"
    with pytest.raises(StoreError, match="there already"):
        call("import", "model", "--out", "results")
    said = call("view", smoke_run, "lits/20")
    page = tmp_path / f"{smoke_run.name}_lits_20.html"
    assert page.stat().st_size > 10_000
    assert page.name in said
    with pytest.raises(UnknownName, match="no test case"):
        call("view", smoke_run, "lits/9999")
    with pytest.raises(StoreError, match="keeps no prediction"):
        call("view", imported_run(tmp_path, smoke_run), "lits/20")


def imported_run(tmp_path: Path, smoke_run: Path) -> Path:
    """The imported run, which holds no predictions."""
    return tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
