"""The commands that publish a model, read it back and show a case, from word to file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from locations import ROOT
from typer.testing import CliRunner

from clbench.cli import app
from clbench.errors import SettingError, StoreError, UnknownName


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


@pytest.mark.parametrize(
    "words",
    [
        ("report", "--bench", "tumor_ext", "--ref", "universal"),
        ("paper", ROOT / "paper_figs" / "paper.toml"),
        ("league",),
    ],
)
@pytest.mark.parametrize("inner", [".", "figures"])
def test_nothing_is_written_into_a_run(
    words: tuple[object, ...], inner: str, tmp_path: Path, smoke_run: Path
) -> None:
    """A report has a `cost.csv`, too."""
    run = tmp_path / "results" / "tumor_ext" / "universal" / "a"
    run.mkdir(parents=True)
    shutil.copy(smoke_run / "run.json", run)
    with pytest.raises(StoreError, match="no part of a run's folder"):
        call(
            *words, *([tmp_path / "results"] if words == ("league",) else []), "--out", run / inner
        )
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_a_page_is_a_file(smoke_run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, "./"):
        with pytest.raises(SettingError, match="one page"):
            call("view", smoke_run, "lits/20", "--out", folder)


def imported_run(tmp_path: Path, smoke_run: Path) -> Path:
    """The imported run, which holds no predictions."""
    return tmp_path / "results" / "tumor_ext" / "universal" / smoke_run.name
