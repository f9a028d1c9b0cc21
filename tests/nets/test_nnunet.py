"""nnU-Net's networks by their plans: what an architecture may say, and what it is built as."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from networks import map_shapes
from nnunet_folders import golden
from torch import nn

from clbench.errors import SettingError
from clbench.nets.backbones import new_backbone
from clbench.nets.nnunet import Architecture, nnunet, read_architecture
from clbench.spec.settings import BackboneSettings

SHAPE: dict[str, Any] = {
    "network": "PlainConvUNet",
    "features_per_stage": [4, 6, 6],
    "kernel_sizes": [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
    "n_blocks_per_stage": [2, 2, 1],
    "n_conv_per_stage_decoder": [2, 1],
}


def with_changes(**changes: Any) -> str:
    return json.dumps({**SHAPE, **changes})


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_it_has_the_parameters_of_nnunets_own_network(network: str) -> None:
    case = golden(network)
    kind = {"network": case["class"]}
    if network == "residual":
        kind |= {"n_blocks_per_stage": [1, 2, 1], "n_conv_per_stage_decoder": [1, 1]}
    backbone = nnunet(4, with_changes(**kind))
    theirs = [shape for name, shape, _ in case["parameters"] if "seg_layers" not in name]
    ours = sorted(sorted(p.shape) for p in backbone.parameters())
    assert ours == sorted(sorted(shape) for shape in theirs)


def test_every_axis_has_a_stride_of_its_own() -> None:
    backbone = new_backbone(BackboneSettings(name="nnunet", size=4, architecture=with_changes()))
    assert (backbone.stride, backbone.smallest) == ((4, 4, 2), (8, 8, 4))
    shapes = map_shapes(backbone, (8, 12, 4))
    assert list(shapes) == ["enc0", "enc1", "bottleneck", "dec0", "final"]
    assert (shapes["bottleneck"], shapes["final"]) == ((6, 2, 3, 2), (4, 8, 12, 4))
    assert backbone.fitting((9, 1, 5)) == (12, 8, 6)
    with pytest.raises(SettingError, match=r"multiples of 4 x 4 x 2, .* 8 x 8 x 4") as refused:
        backbone(torch.zeros(1, 1, 8, 8, 5))
    assert "data.patch_vox=8,8,6" in str(refused.value)


def test_the_input_is_scaled_before_it_is_padded() -> None:
    plain, scaled = (
        nnunet(4, with_changes()),
        nnunet(4, with_changes(input_scale=5, input_shift=-2)),
    )
    scaled.load_state_dict(plain.state_dict())
    image = torch.rand(1, 1, 8, 8, 4)
    with torch.no_grad():
        assert torch.equal(scaled(image)["final"], plain(image * 5 - 2)["final"])


def test_without_an_architecture_it_is_the_default_planners_network() -> None:
    with torch.device("meta"):
        backbone = nnunet()
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv3d)]
    assert [m.out_channels for m in convolutions[:12:2]] == [32, 64, 128, 256, 320, 320]
    assert len(convolutions) == 2 * 6 + 2 * 5
    assert backbone.stride == (32, 32, 32)


def test_text_and_architecture_are_one() -> None:
    shape = read_architecture(with_changes(conv_bias=False, input_scale=0.1))
    assert read_architecture(shape.text()) == shape
    assert isinstance(shape, Architecture)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        (with_changes(strides=[[1, 1, 1], [2, 2, 2]]), "2 strides"),
        (with_changes(strides=[[2, 2, 2]] * 3), "from"),
        (with_changes(kernel_sizes=[[2, 3, 3]] * 3), "kernel_sizes must be"),
        (with_changes(features_per_stage=[4]), "features_per_stage must be"),
        (with_changes(network="ResidualUNet"), "network must be"),
        (with_changes(kernels=3), "unknown field 'kernels'"),
        (with_changes(features_per_stage=[8, 8, 8]), r"backbone\.size=8"),
    ],
)
def test_an_architecture_that_is_none_is_named(text: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        nnunet(4, text)


def test_other_backbones_take_no_architecture() -> None:
    with pytest.raises(SettingError, match="one architecture alone"):
        new_backbone(BackboneSettings(name="small_unet", size=8, architecture="{}"))
