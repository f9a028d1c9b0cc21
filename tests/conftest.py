"""Shared, expensive things are made once: a phantom cache and one finished smoke course."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """The same number of threads on every machine, so that equal runs give equal bits."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preprocessed volumes and the phantom, shared by all tests of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smoke_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that holds finished smoke runs."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def smoke_run(cache_root: Path, smoke_out: Path) -> Path:
    """The run folder of `universal` on `tumor_ext`, profile `smoke`, seed 0."""
    from clbench.plan import RunSettings
    from clbench.run import run_course

    return run_course(
        RunSettings(
            bench="tumor_ext",
            strategy="universal",
            profile="smoke",
            out=smoke_out,
            cache=cache_root,
        )
    )


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Two real CTs beside the checkout; skips where they are absent."""
    folder = SHARED / "real_ct"
    if not folder.is_dir():
        pytest.skip("the two real CTs for pipeline checks are not on this machine")
    return folder
