"""The tiny course and the tiny network that the kit teaches.

Room: row 5 (torch).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from clbench.nets.backbones import Backbone
from clbench.spec import Benchmark, Partial, Preprocessing, Source, Split, Step
from clbench.testing.batches import PATCH

OVERRIDES = (
    "text.encoding=random",
    f"data.patch_vox={PATCH},{PATCH},{PATCH}", "data.spacing_mm=22,22,22", "examine.overlap=0",
    "phantom.spacing_mm=16", "phantom.train=2", "phantom.validation=1", "phantom.test=1",
    "train.epochs=1", "train.iterations=2", "train.batch=1", "train.warmup=1", "train.lr=1e-3",
)  # fmt: skip
"""What the tiny course changes in the profile `smoke`."""


def tiny_course() -> Benchmark:
    """Three steps of three, one and two structures; sources with gaps, of which one comes twice."""
    split = Split(name="none", train=("1",), test=("2",))  # the phantom draws its own
    with_tumor = Split(  # one that is still there at 22 mm, to validate on
        name="tumors", train=("2000", "2001"), validation=("2010",), test=("2003",)
    )
    return Benchmark(
        name="kit",
        version=1,
        title="three steps for the honesty kit",
        preprocessing=Preprocessing(),
        sources=(
            Source(
                name="first",
                title="five organs; one case lacks three of them",
                layout="btcv",
                labels={1: "spleen", 2: "liver", 3: "left_kidney", 4: "colon", 5: "right_kidney"},
                partial=(Partial(cases=("1001",), annotates=("liver", "left_kidney")),),
            ),
            Source(
                name="second",
                title="liver and its tumors",
                layout="lits",
                labels={1: "liver", 2: "liver_tumor"},
            ),
        ),
        steps=(
            Step(name="organs", source="first", split=split,
                 learns=("spleen", "liver", "left_kidney")),
            Step(name="tumor", source="second", split=split, learns=("liver_tumor",),
                 phantom_split=with_tumor),
            Step(name="more", source="first", split=split, learns=("colon", "right_kidney")),
        ),
    )  # fmt: skip


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, 8, 3, padding=1)
        self.middle = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.coarse = nn.Conv3d(8, 16, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        enc0 = functional.leaky_relu(self.fine(image))
        enc1 = functional.leaky_relu(self.middle(enc0))
        return {"enc0": enc0, "enc1": enc1, "bottleneck": functional.leaky_relu(self.coarse(enc1))}


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv3d(16, 8, 1)
        self.fine = nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        up = functional.interpolate(self.middle(maps["bottleneck"]), scale_factor=2.0)
        dec0 = functional.leaky_relu(up + maps["enc1"])
        up = functional.interpolate(dec0, scale_factor=2.0)
        return {"dec0": dec0, "final": functional.leaky_relu(self.fine(up + maps["enc0"]))}


def tiny_backbone() -> Backbone:
    """Five convolutions, with the maps every backbone has: a forward pass takes milliseconds."""
    return Backbone(
        _Encoder(), _Decoder(), final_channels=8, bottleneck_channels=16, stride=4, smallest=8
    )
