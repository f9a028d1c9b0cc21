"""run.json: what a run was made of is what it recorded, whatever is registered today."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clbench.errors import StoreError
from clbench.report.figures import StripOptions
from clbench.report.figures.strip import Shown, open_volumes
from clbench.run.cost_table import recount
from clbench.run.record import catalog_of, profile_of, strategy_of
from clbench.spec import settings as settings_module
from clbench.spec.settings import load_profile
from clbench.store.record import RunRecord

SMOKE_MM = (12.0, 12.0, 12.0)


def change_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if another version of clbench came with another `smoke.toml`: a finer grid, a wider net.

    The phantom stays, so that its fingerprint does not give the change away.
    """
    folder = tmp_path / "profiles"
    shutil.copytree(Path(settings_module.__file__).parent / "profiles", folder)
    path = folder / "smoke.toml"
    text = path.read_text()
    changed = text.replace("spacing_mm = [12.0, 12.0, 12.0]", "spacing_mm = [8.0, 8.0, 8.0]")
    changed = changed.replace("size = 16", "size = 32")
    assert changed.count("8.0, 8.0, 8.0") == changed.count("size = 32") == 1
    path.write_text(changed)
    monkeypatch.setattr(
        settings_module,
        "resources",
        SimpleNamespace(files=lambda _: folder, as_file=contextlib.nullcontext),
    )
    assert load_profile("smoke").data.spacing_mm == (8.0, 8.0, 8.0)


def test_a_changed_profile_changes_neither_data_nor_pictures_nor_costs_of_a_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "results" / "tumor_ext"
    run = home / "universal" / smoke_run.name
    shutil.copytree(smoke_run, run)
    record = RunRecord.read(run)
    source, _, case = record.course.test[0][0].partition("/")
    shown = [Shown(eval_set=source, case=case, word="worst", score=0.0)]
    (before,) = open_volumes(StripOptions(), record, shown)
    recount(run)
    cost = (run / "cost.csv").read_bytes()

    change_profiles(monkeypatch, tmp_path)

    assert profile_of(record).data.spacing_mm == SMOKE_MM
    assert catalog_of(record).preprocessing.spacing_mm == SMOKE_MM
    (after,) = open_volumes(StripOptions(), record, shown)
    assert np.array_equal(after.image, before.image)
    assert np.array_equal(after.bits, before.bits)
    assert np.array_equal(after.affine, before.affine)
    recount(run)
    assert (run / "cost.csv").read_bytes() == cost


def test_other_data_are_refused(smoke_run: Path) -> None:
    record = RunRecord.read(smoke_run)
    with pytest.raises(StoreError, match="not what the run was made on"):
        catalog_of(replace(record, data_fingerprint="another"))


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("lwf/efe186f3dc1f", {"weight": 10.0, "new_classifier_lr": 1.0, "old_classifier_lr": 1.0}),
        ("plop/2393a529f35b", {"feature_factor": 0.001, "logit_factor": 0.0005, "pooled_axes": 1}),
    ],
)
def test_the_strategy_of_an_older_version_has_the_options_it_had(
    run: str, options: dict[str, object], phantom_2_runs: Path
) -> None:
    """Recorded at version 1, when the output layer learned no faster than the rest after step 1."""
    record = RunRecord.read(phantom_2_runs / "ablation" / "tumor_ext" / run)
    assert record.strategy_options["version"] == 1
    strategy = strategy_of(record)
    assert {name: getattr(strategy, name) for name in options} == options


def test_options_are_those_recorded_and_not_the_words_typed(smoke_run: Path) -> None:
    """A settings file of `clbench tune` sets options that no word on the command line names."""
    record = RunRecord.read(smoke_run)
    assert record.settings["overrides"] == []
    assert record.with_defaults is not None
    record.with_defaults["strategy"]["pseudo"] = "soft"
    assert strategy_of(record).pseudo == "soft"
    record.with_defaults["strategy"]["gone"] = 1
    with pytest.raises(StoreError, match="cannot be put together") as refused:
        strategy_of(record)
    assert "gone" in str(refused.value)
