"""nnU-Net's residual encoder U-Net: its stages, its parameters part by part, and how it starts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from networks import map_shapes
from torch import nn

from clbench.errors import SettingError
from clbench.evaluation.cost.model import forward_macs
from clbench.nets.backbones import Backbone
from clbench.nets.heads import ConvHead, Segmenter
from clbench.nets.resenc_unet import build, resenc_unet, resenc_unet_6, topology
from clbench.spec import registry

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
OUTPUTS = 14


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def segmenter(backbone: Backbone) -> Segmenter:
    model = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
    model.add([f"structure{i}" for i in range(OUTPUTS)])
    return model


@pytest.mark.parametrize("row", GOLDEN["resenc_topology"]["rows"], ids=lambda r: str(r["patch"]))
def test_stages_strides_and_kernels_follow_the_authors_rule(row: dict[str, Any]) -> None:
    found = topology(row["patch"], row["spacing_mm"])
    assert [list(s) for s in found.strides] == row["strides"]
    assert [list(k) for k in found.kernels] == row["kernels"]
    assert list(found.patch_vox) == row["padded_patch"]
    assert len(found.strides) == row["stages"]


def test_a_patch_of_odd_size_is_padded() -> None:
    assert topology((60, 96, 96), (1.5, 1.5, 1.5)).patch_vox == (64, 96, 96)


@pytest.mark.parametrize(("make", "key"), [(resenc_unet, "resenc_5_stages"), (resenc_unet_6, "resenc_6_stages")])  # fmt: skip
def test_every_part_has_the_parameters_of_the_original(make: Any, key: str) -> None:
    case = GOLDEN[key]
    with torch.device("meta"):
        backbone = make()
    encoder: Any = backbone.encoder
    decoder: Any = backbone.decoder
    assert size_of(encoder.stem) == case["stem"]
    assert [size_of(s) for s in encoder.stages] == case["encoder_stages"]
    assert [size_of(u) for u in decoder.up][::-1] == case["transposed"]
    assert [size_of(c) for c in decoder.convolutions][::-1] == case["decoder_convs"]
    assert size_of(encoder) == case["encoder"]
    assert size_of(backbone) == case["without_any_output_layer"]
    # the original has an output layer at every stage of the decoder, for deep supervision
    widths = case["features"][:-1]
    assert size_of(backbone) + sum(OUTPUTS * (w + 1) for w in widths) == case["total"]
    last = ConvHead(backbone.final_channels, background=False)
    for i in range(OUTPUTS):
        last.add(str(i))
    assert size_of(backbone) + size_of(last) == case["with_the_last_output_layer_only"]


def test_the_size_for_patches_of_96() -> None:
    assert GOLDEN["resenc_5_stages"]["total"] == 62_815_736


def test_it_does_the_work_of_the_original() -> None:
    case = GOLDEN["resenc_work"]
    for edge, key in ((96, "macs_96_6_stages_14_channels"), (64, "macs_64_6_stages_14_channels")):
        with torch.device("meta"):
            backbone = resenc_unet_6()
        macs = forward_macs(segmenter(backbone), (edge, edge, edge))
        assert sum(macs.values()) == case[key]


def test_a_block_starts_as_its_shortcut() -> None:
    torch.manual_seed(0)
    backbone = resenc_unet(8).eval()
    encoder: Any = backbone.encoder
    block = encoder.stages[1][1]
    x = torch.rand(1, 16, 4, 4, 4) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(block(x), nn.functional.leaky_relu(x, 0.01))
    strided = encoder.stages[1][0]
    assert [type(m).__name__ for m in strided.shortcut] == ["AvgPool3d", "Conv3d", "InstanceNorm3d"]
    assert strided.shortcut[1].bias is None
    biases = [m.bias for m in backbone.modules() if isinstance(m, nn.Conv3d) and m.bias is not None]
    assert all(not b.any() for b in biases)


def test_same_width_is_pooled_alone() -> None:
    encoder: Any = resenc_unet_6(8).encoder
    assert [type(m).__name__ for m in encoder.stages[5][0].shortcut] == ["AvgPool3d"]


def test_it_learns_in_every_parameter() -> None:
    torch.manual_seed(0)
    backbone = resenc_unet(8)
    final = backbone(torch.rand(2, 1, 32, 32, 32))["final"]
    (final * torch.rand_like(final)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone.parameters())


def test_anisotropic_stages_keep_the_grid() -> None:
    shape = topology((16, 32, 32), (3.0, 0.8, 0.8))
    backbone = build(8, shape)
    assert backbone.stride == (4, 8, 8)
    assert map_shapes(backbone, (8, 16, 16))["final"] == (8, 8, 16, 16)


def test_it_is_registered_and_refuses_sizes_it_cannot_have() -> None:
    assert registry.load("backbone", "resenc_unet") is resenc_unet
    with pytest.raises(SettingError, match=r"backbone\.size"):
        resenc_unet(12)
    backbone = resenc_unet(8)
    with pytest.raises(SettingError, match=r"data\.patch_vox"):
        backbone(torch.zeros(1, 1, 24, 32, 32))
