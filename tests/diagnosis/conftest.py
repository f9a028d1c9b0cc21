"""A run that forgot, for everybody who explains it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forgetful_runs import forget, predict


@pytest.fixture(scope="session")
def forgetful(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose predictions are perfect, but for what `forget` does."""
    folder = tmp_path_factory.mktemp("forgetful") / "tumor_ext" / "universal" / smoke_run.name
    shutil.copytree(smoke_run, folder)
    predict(folder, forget)
    return folder
