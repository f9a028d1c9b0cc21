"""Backbones: what MONAI's network computes, named; sizes that do not fit are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.backbones import Backbone, segresnet, small_unet, swin_unetr, unet
from clbench.nets.resenc_unet import resenc_unet

Case = tuple[Callable[..., Backbone], int, tuple[int, int, int]]
# the least work that leaves an instance norm more than one voxel
SWIN: Case = (swin_unetr, 12, (64, 32, 32))
UNET: Case = (unet, 8, (32, 32, 32))
SEGRESNET: Case = (segresnet, 8, (16, 24, 16))
CASES = [SWIN, UNET, SEGRESNET, (small_unet, 8, (16, 16, 16)), (resenc_unet, 8, (32, 32, 32))]


@cache
def computed(
    make: Callable[..., Backbone], size: int, patch: tuple[int, int, int]
) -> tuple[Backbone, Tensor, dict[str, Tensor]]:
    """A backbone made from seed 0, an image of one patch, and its maps; computed once."""
    torch.manual_seed(0)
    backbone = make(size).eval()
    image = torch.rand(1, 1, *patch)
    with torch.no_grad():
        return backbone, image, dict(backbone(image))


@pytest.mark.parametrize(("make", "size", "patch"), CASES)
def test_maps_are_named_from_fine_to_coarse_and_back(
    make: Callable[..., Backbone], size: int, patch: tuple[int, int, int]
) -> None:
    backbone, _, maps = computed(make, size, patch)
    shapes = {name: tuple(m.shape[1:]) for name, m in maps.items()}
    names = list(shapes)
    middle = names.index("bottleneck")
    assert names[0] == "enc0"
    assert names[-1] == "final"
    encoder = [shapes[n][1] for n in names[: middle + 1]]
    decoder = [shapes[n][1] for n in names[middle:]]
    assert encoder == sorted(encoder, reverse=True)
    assert decoder == sorted(decoder)
    assert shapes["final"] == (backbone.final_channels, *patch)
    assert shapes["bottleneck"][0] == backbone.bottleneck_channels


def test_the_papers_swin_unetr_has_the_papers_maps() -> None:
    backbone = swin_unetr(48)
    assert (backbone.final_channels, backbone.bottleneck_channels) == (48, 768)
    without_output = sum(p.numel() for p in backbone.parameters())
    assert without_output == 62_186_610 - 0  # MONAI 1.6.1, 14-channel network less its 686
    assert sum(p.numel() for p in backbone.decoder.parameters()) == 19_597_824


@pytest.mark.parametrize(
    ("case", "published", "last"),
    [
        (SWIN, lambda: SwinUNETR(in_channels=1, out_channels=1, feature_size=12), "out"),
        (UNET, lambda: BasicUNet(spatial_dims=3, features=(8, 8, 16, 32, 64, 8)), "final_conv"),
        (
            SEGRESNET,
            lambda: SegResNet(spatial_dims=3, init_filters=8, out_channels=1),
            "conv_final",
        ),
    ],
)
def test_it_computes_what_monai_computes(
    case: Case, published: Callable[[], nn.Module], last: str
) -> None:
    _, image, maps = computed(*case)
    torch.manual_seed(0)
    net = published().eval()
    with torch.no_grad():
        torch.testing.assert_close(net.get_submodule(last)(maps["final"]), net(image))


@pytest.mark.parametrize(("make", "size", "patch"), CASES)
def test_the_decoder_can_be_copied_apart(
    make: Callable[..., Backbone], size: int, patch: tuple[int, int, int]
) -> None:
    backbone, image, maps = computed(make, size, patch)
    other = copy.deepcopy(backbone.decoder)
    with torch.no_grad():
        assert torch.equal(other(backbone.encode(image))["final"], maps["final"])


@pytest.mark.parametrize(
    ("make", "size", "shape", "training"),
    [
        (small_unet, 8, (16, 12, 16), False),
        (swin_unetr, 12, (64, 64, 48), False),
        (swin_unetr, 12, (32, 32, 32), True),  # instance norm over a single voxel
    ],
)
def test_a_patch_that_does_not_fit_is_refused_with_one_that_does(
    make: Callable[..., Backbone], size: int, shape: tuple[int, int, int], training: bool
) -> None:
    backbone = make(size).train(training)
    with pytest.raises(SettingError) as err:
        backbone(torch.zeros(1, 1, *shape))
    assert "data.patch_vox" in str(err.value)
    assert err.value.next_step is not None
    fits = tuple(int(n) for n in err.value.next_step.partition("=")[2].split(","))
    backbone.check(fits, train=training)
    if make is small_unet:  # the larger network computes at a multiple of its stride above
        with torch.no_grad():
            backbone(torch.zeros(1, 1, *fits))


@pytest.mark.parametrize(
    ("make", "size"), [(swin_unetr, 16), (small_unet, 4), (unet, 0), (segresnet, 12)]
)
def test_a_feature_size_that_does_not_fit_is_refused(
    make: Callable[..., Backbone], size: int
) -> None:
    with pytest.raises(SettingError, match=r"backbone\.size|feature size"):
        make(size)
