"""Checkpoints of the CLIP-driven Universal Model: its answers, under other names of the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import read
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional

from clbench.errors import SettingError
from clbench.nets.backbones import unet
from clbench.nets.heads import Segmenter, SharedHead

SIZE = 16
FEATURES = (SIZE, SIZE, 2 * SIZE, 4 * SIZE, 8 * SIZE, SIZE)


class AuthorsModel(nn.Module):
    """The layers of the authors' `Universal_model`, by their names, around another backbone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.backbone = BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=FEATURES)
        self.backbone.out = self.backbone.final_conv
        del self.backbone.final_conv
        self.precls_conv = nn.Sequential(
            nn.GroupNorm(16, SIZE), nn.ReLU(inplace=True), nn.Conv3d(SIZE, 8, kernel_size=1)
        )
        self.GAP = nn.Sequential(
            nn.GroupNorm(16, 8 * SIZE),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool3d((1, 1, 1)),
            nn.Conv3d(8 * SIZE, 256, kernel_size=1),
        )
        self.controller = nn.Conv3d(512, 153, kernel_size=1)
        self.register_buffer("organ_embedding", torch.randn(count, 512))
        self.text_to_vision = nn.Linear(512, 256)

    def forward(self, bottleneck: Tensor, final: Tensor) -> Tensor:
        """As `Universal_model.forward`, from the backbone's maps on, for one image."""
        task = functional.relu(self.text_to_vision(self.organ_embedding))[:, :, None, None, None]
        image = self.GAP(bottleneck).repeat(len(task), 1, 1, 1, 1)
        params = self.controller(torch.cat([image, task], 1)).flatten(1)
        w1, w2, w3, b1, b2, b3 = params.split([64, 64, 8, 8, 8, 1], dim=1)
        count, x = len(params), self.precls_conv(final).repeat(1, len(params), 1, 1, 1)
        for weight, bias, outputs in ((w1, b1, 8), (w2, b2, 8), (w3, b3, 1)):
            kernel = weight.reshape(count * outputs, -1, 1, 1, 1)
            x = functional.conv3d(x, kernel, bias.reshape(-1), groups=count)
            if outputs == 8:
                x = functional.relu(x)
        return x


def saved(path: Path, network: nn.Module, **more: Any) -> Path:
    state = {f"module.{n}": t for n, t in network.state_dict().items()}
    torch.save({"net": {**state, **more}, "optimizer": {"state": {}}, "epoch": 9}, path)
    return path


def test_it_answers_as_the_authors_code_does(tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = AuthorsModel(32).eval()
    learned = read(saved(tmp_path / "unet.pth", network), ())
    assert learned.structures[:3] == ("spleen", "right_kidney", "left_kidney")
    assert (len(learned.structures), learned.structures[-1]) == (32, "kidney_cyst")
    assert learned.strategy_name == "universal_v1"
    assert learned.profile.data.window_hu == (-175.0, 250.0)
    backbone = unet(SIZE)
    model = Segmenter(backbone, SharedHead(backbone.final_channels, backbone.bottleneck_channels))
    model.add(learned.structures, torch.zeros(32, 512))
    model.load_state_dict(dict(learned.states[0]["model"]))
    with torch.no_grad():
        answer = model.eval()(torch.rand(1, 1, 32, 32, 32))
        expected = network(answer.features["bottleneck"], answer.features["final"])
    torch.testing.assert_close(answer.logits, expected)


@pytest.mark.parametrize(
    ("count", "more", "structures", "says"),
    [
        (7, {}, (), "another number of structures"),
        (7, {}, ("spleen", "liver"), "text vectors are not those"),
        (32, {"module.extra.weight": torch.zeros(2)}, (), "extra.weight"),
    ],
)
def test_another_head_is_named(
    count: int, more: dict[str, Tensor], structures: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=says):
        read(saved(tmp_path / "w.pth", AuthorsModel(count), **more), structures)
