"""What is refused before anything is written; and a command that waits for a shared step 1."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from clbench.errors import ClbenchError, SettingError
from clbench.run import plan
from clbench.run.course import run_course
from clbench.run.plan import RunSettings
from clbench.store import run_folder

HANGS_S = 600.0
"""Who waits this long waits for nothing; a busy machine may need minutes for what takes seconds."""


def settings(out: Path, cache: Path, **more: Any) -> RunSettings:
    made = RunSettings(
        bench="tumor_ext", strategy="finetune", profile="smoke", out=out, cache=cache
    )
    return replace(made, **more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"overrides": ("data.patch_vox=20,16,16",)}, "data.patch_vox=24,16,16"),
        ({"overrides": ("train.lr=0",)}, "above 0"),
        ({"seed": -1}, "--seed"),
        ({"threads": 0}, "--threads"),
        ({"workers": -1}, "--workers"),
    ],
)
def test_what_cannot_be_is_refused_first(
    more: dict[str, Any], says: str, cache_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as err:
        run_course(settings(tmp_path / "out", cache_root, **more))
    assert says in str(err.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "word",
    [
        "train.epoch=1", "train.lr=-1", "data.spacing_mm=3,3", "data.patch_vox=20,16,16",
        "backbone.name=unet", "backbone.size=x", "backbone.weights=/nowhere/a.pt",
        "text.encoding=minlm", "strategy.nonsense=1", "trian.epochs=1", "train.epochs",
    ],
)  # fmt: skip
def test_a_wrong_set_is_refused_before_any_file_is_hashed(
    word: str, cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the data was opened")

    monkeypatch.setattr(plan, "build_catalog", opened)
    with pytest.raises(ClbenchError):
        run_course(settings(tmp_path / "out", cache_root, overrides=(word,)))


def test_too_many_processes_are_refused_before_any_file_is_hashed(
    cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("the data was opened")

    monkeypatch.setattr(plan, "build_catalog", opened)
    planned = plan.resolve(settings(tmp_path / "out", cache_root))
    planned.ranks.size = planned.profile.train.crops + 1
    with pytest.raises(SettingError, match="cannot be divided"):
        planned.open()


def test_a_command_waits_for_the_step_another_one_teaches(
    smoke_run: Path, cache_root: Path, tmp_path: Path
) -> None:
    """The lock of the shared folder is held while its checkpoint comes into being."""
    name = run_folder.read_record(smoke_run)["step_origins"]["1"]["identity"]
    made, here = (out / "_shared" / name for out in (smoke_run.parents[2], tmp_path))
    here.mkdir(parents=True)
    begun, events, folders = threading.Event(), list[dict[str, Any]](), list[Path]()

    def watch(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "note" and "waiting for another run" in event["what"]:
            begun.set()

    thread = threading.Thread(
        target=lambda: folders.append(run_course(settings(tmp_path, cache_root), watch))
    )
    with FileLock(here / ".lock"):
        thread.start()
        assert begun.wait(HANGS_S)
        for file in made.iterdir():
            if file.name != ".lock":
                shutil.copy(file, here)
    thread.join(HANGS_S)
    assert not thread.is_alive()
    assert len(folders) == 1
    assert {e["step"] for e in events if e["event"] == "update"} == {2}
    assert run_folder.read_record(folders[0])["cost"]["1"]["train"]["shared"] is True
