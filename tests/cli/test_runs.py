"""Lists, the version, and devices: what a user asks before the first run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import clbench
from clbench.cli.options import app
from clbench.errors import SettingError
from clbench.run.plan import pick_device
from clbench.spec.settings import GROUPS, Profile, apply_overrides, described, split_overrides
from clbench.spec.taxonomy import STRUCTURES


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def test_the_version_is_printed() -> None:
    assert said("--version") == f"clbench {clbench.__version__}\n"


def test_every_setting_is_listed_with_its_default_and_meaning() -> None:
    lines = {line.split()[0]: line for line in said("list", "settings").splitlines()}
    for group, kind in GROUPS.items():
        for name, default, meaning in described(kind):
            assert meaning, f"{group}.{name} has no docstring"
            assert meaning in lines[f"{group}.{name}={default}"]


def test_every_listed_default_can_be_typed_after_set() -> None:
    words = [
        f"{group}.{name}={default}"
        for group, kind in GROUPS.items()
        for name, default, _ in described(kind)
    ]
    assert apply_overrides(Profile(name="x"), split_overrides(words)) == Profile(name="x")


@pytest.mark.parametrize("text", ["3,3,3", "[3,3,3]", "[3, 3, 3]", "(3, 3, 3)", "3.0,3,3"])
def test_a_spacing_is_understood_as_people_write_it(text: str) -> None:
    words = split_overrides([f"data.spacing_mm={text}"])
    assert apply_overrides(Profile(name="x"), words).data.spacing_mm == (3.0, 3.0, 3.0)


def test_layouts_and_structures_are_listed() -> None:
    layouts = said("list", "layouts")
    assert "imagesTr/CASE_0000.nii.gz + labelsTr/CASE.nii.gz" in layouts
    assert "CASE/ct.nii.gz + CASE/segmentations/STRUCTURE.nii.gz" in layouts
    structures = said("list", "structures")
    assert [line.split()[0] for line in structures.splitlines()] == list(STRUCTURES)
    assert "inside liver" in structures


def test_an_unknown_list_is_refused_with_those_there_are() -> None:
    done = CliRunner().invoke(app, ["list", "setting"])
    assert isinstance(done.exception, SettingError)
    assert "settings, layouts, structures" in str(done.exception)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:63", "vulkan:0"])
def test_a_device_torch_lacks_is_refused_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match=f"cannot compute on {name}") as err:
        pick_device(name)
    assert "auto, cpu" in str(err.value)


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SettingError, match="cannot compute on cuda:2") as err:
        pick_device("cuda:2")
    assert "cuda:0, cuda:1" in str(err.value)
    with pytest.raises(SettingError, match="unknown device"):
        pick_device("gpu")


def test_another_run_than_the_one_planned_is_refused(cache_root: Path, tmp_path: Path) -> None:
    """What a job of a grid is told: a course or clbench itself may change while it waits."""
    words = [
        *("run", "--bench", "tumor_ext", "--strategy", "finetune", "--profile", "smoke"),
        *("--out", str(tmp_path / "out"), "--cache", str(cache_root), "--run-id", "0123456789ab"),
    ]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SettingError)
    assert done.exception.expected == "0123456789ab"
    assert "clbench grid" in str(done.exception.next_step)
    assert not (tmp_path / "out").exists()
