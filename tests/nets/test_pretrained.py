"""Weights from files: matched by name, reported, and never run as code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clbench.errors import SettingError
from clbench.nets.backbones import small_unet, swin_unetr
from clbench.nets.pretrained import load_weights


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return small_unet(8).state_dict()


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module", "safetensors"])
def test_every_wrapping_is_understood(
    wrap: str, source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pt")
    if wrap == "safetensors":
        save_file(source, path)
    elif wrap == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}, "epoch": 3}, path)
    else:
        torch.save({"state_dict": source} if wrap == "state_dict" else source, path)
    backbone = small_unet(8)
    report = load_weights(backbone, path)
    assert set(report.loaded) == set(source)
    assert report.skipped == report.missing == ()
    assert all(torch.equal(v, source[k]) for k, v in backbone.state_dict().items())


def test_what_does_not_fit_is_reported(source: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = list(source)
    part = {names[0]: source[names[0]], names[1]: torch.zeros(3), "out.conv.weight": torch.zeros(2)}
    torch.save(part, tmp_path / "w.pt")
    report = load_weights(small_unet(8), tmp_path / "w.pt")
    assert report.loaded == (names[0],)
    assert report.skipped == tuple(sorted([names[1], "out.conv.weight"]))
    assert set(report.missing) == set(names[1:])


def test_self_supervised_swin_weights_under_their_old_names(tmp_path: Path) -> None:
    backbone = swin_unetr(12)
    old = {
        f"module.{k.removeprefix('encoder.swinViT.')}".replace(
            ".mlp.linear1.", ".mlp.fc1."
        ).replace(".mlp.linear2.", ".mlp.fc2."): v + 1
        for k, v in backbone.state_dict().items()
        if "swinViT" in k and v.is_floating_point()
    }
    torch.save({"state_dict": old}, tmp_path / "w.pt")
    want = {
        k: v.clone() + 1
        for k, v in backbone.state_dict().items()
        if "swinViT" in k and v.is_floating_point()
    }
    report = load_weights(backbone, tmp_path / "w.pt")
    assert set(report.loaded) == set(want)
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in want.items())


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


def test_a_hostile_file_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(SettingError, match="cannot be read safely"):
        load_weights(small_unet(8), tmp_path / "w.pt")
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_broken_and_foreign_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not exist"):
        load_weights(small_unet(8), tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(SettingError, match="cannot be read safely") as err:
        load_weights(small_unet(8), tmp_path / name)
    assert name in str(err.value)


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(SettingError, match="no tensor") as err:
        load_weights(small_unet(8), tmp_path / "w.pt")
    assert "encoder.blocks.0" in str(err.value)
