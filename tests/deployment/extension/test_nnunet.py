"""Trained folders of nnU-Net v2: the network's own answers, and what is no such network is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import built, read
from nnunet_network import ResidualEncoderUNet, plans_of, write_trained

from clbench.deployment.extension.nnunet import scaled_stem, weights_from_nnunet
from clbench.errors import SettingError

WIDTHS = (8, 16, 32, 64, 80)
LABELS = {"background": 0, "liver": 2, "spleen": 1}
INTENSITIES = {"percentile_00_5": -100.0, "percentile_99_5": 300.0, "mean": -100.0, "std": 50.0}


@pytest.fixture(scope="module")
def network() -> ResidualEncoderUNet:
    torch.manual_seed(2)
    return ResidualEncoderUNet(WIDTHS, 3).eval()


def test_it_answers_as_nnunet_does(network: ResidualEncoderUNet, tmp_path: Path) -> None:
    folder = write_trained(tmp_path, network, plans_of(WIDTHS, **INTENSITIES), LABELS)
    learned = read(folder, ())
    assert (learned.name, learned.structures) == ("dataset007_two", ("spleen", "liver"))
    data, net = learned.profile.data, learned.profile.backbone
    assert (net.name, net.size) == ("resenc_unet", 8)
    assert (data.spacing_mm, data.window_hu) == ((1.0, 2.0, 3.0), (-100.0, 300.0))
    assert data.patch_vox == (48, 48, 64)
    assert learned.notes == ()
    hu = torch.randint(-300, 500, (1, 1, 32, 48, 32)).float().clamp(-100, 300)  # x, y, z
    with torch.no_grad():
        theirs = network(((hu + 100) / 50).permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
        ours = built(learned)((hu + 100) / 400).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # 50 layers of float32


def test_the_first_convolution_takes_the_shift_away_from_edges() -> None:
    stem = torch.nn.Conv3d(1, 4, 3, padding=1)
    tensors = {f"encoder.stem.0.{n}": t.detach() for n, t in stem.named_parameters()}
    u = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = stem(7.0 * u - 3.0)
        scaled_stem(tensors, scale=7.0, shift=-3.0)
        stem.load_state_dict({n.rpartition(".")[2]: t for n, t in tensors.items()})
        got = stem(u)
    inner = (..., *[slice(1, -1)] * 3)
    torch.testing.assert_close(got[inner], expected[inner], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, expected)  # padding stands for another HU


def set_at(plans: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = path.split("/")
    for key in keys:
        plans = plans[key]
    plans[last] = value


CONFIG = "configurations/3d_fullres"
ARCH = f"{CONFIG}/architecture/arch_kwargs"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: set_at(p, f"{CONFIG}/architecture/network_class_name", "a.PlainConvUNet"),
         "PlainConvUNet"),
        (lambda p: set_at(p, f"{ARCH}/n_stages", 9), "9 stages"),
        (lambda p: set_at(p, f"{ARCH}/kernel_sizes", [[1, 3, 3]] * 5), "kernels"),
        (lambda p: set_at(p, f"{ARCH}/features_per_stage", "$open('x')"), "does not have"),
        (lambda p: set_at(p, f"{CONFIG}/normalization_schemes", ["ZScoreNormalization"]), "ZScore"),
        (lambda p: set_at(p, f"{CONFIG}/spacing", [1.0]), "no size of three axes"),
        (lambda p: set_at(p, "transpose_forward", [2, 0, 1]), "transpose_forward"),
        (lambda p: set_at(p, "foreground_intensity_properties_per_channel", {}), "normalized"),
        (lambda p: p.pop("configurations"), "do not have the configuration"),
        (lambda p: set_at(p, f"{ARCH}/features_per_stage", [16, 32, 64, 128, 160]), "fits the backbone"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_named(
    change: Callable[[dict[str, Any]], None],
    says: str,
    network: ResidualEncoderUNet,
    tmp_path: Path,
) -> None:
    plans = copy.deepcopy(plans_of(WIDTHS, **INTENSITIES))
    change(plans)
    with pytest.raises(SettingError, match=says):
        read(write_trained(tmp_path, network, plans, LABELS), ())


def test_regions_missing_folds_and_missing_files_are_named(
    network: ResidualEncoderUNet, tmp_path: Path
) -> None:
    folder = write_trained(tmp_path, network, plans_of(WIDTHS, **INTENSITIES), LABELS)
    regions = {"background": 0, "whole_liver": [1, 2], "liver_tumor": 2}
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**dataset, "labels": regions}))
    with pytest.raises(SettingError, match="no plain list"):
        weights_from_nnunet(folder)
    (folder / "dataset.json").write_text(
        json.dumps({**dataset, "channel_names": {"0": "T1", "1": "T2"}})
    )
    with pytest.raises(SettingError, match="one channel"):
        weights_from_nnunet(folder)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.save({"epoch": 3}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(SettingError, match="no weights of nnU-Net"):
        weights_from_nnunet(folder)
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(SettingError, match="holds no fold"):
        weights_from_nnunet(folder)
