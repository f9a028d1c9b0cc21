"""nnU-Net's networks, the plain and the residual encoder U-Net, as its plans describe them.

The output layers of nnU-Net's deep supervision are no part of a backbone: heads are the strategy's.

Source: Isensee et al., Nature Methods 2021 (nnU-Net) and MICCAI 2024 (ResEnc presets); the layers
are those of `dynamic_network_architectures` (PlainConvUNet, ResidualEncoderUNet).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.backbones import Backbone, Maps, maps_down, refuse_size
from clbench.spec.validation import Predicate, checked, from_toml
from clbench.types import triple

Triple = tuple[int, int, int]
Odd = Annotated[int, Field(ge=1, le=9), Predicate(lambda n: n % 2 == 1)]
Stride = Annotated[int, Field(ge=1, le=4)]
Width = Annotated[int, Field(ge=1, le=2048)]
Repeats = Annotated[int, Field(ge=1, le=64)]

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
"""Names of the networks in nnU-Net's plans."""
MOST_STAGES = 12
"""More than any volume can be halved."""


@checked(SettingError)
class Architecture:
    """A network as the `arch_kwargs` of nnU-Net's plans describe it; axes are x, y, z."""

    network: Literal["PlainConvUNet", "ResidualEncoderUNet"]
    """Convolutions alone, or residual blocks (ResNet-D) behind a first convolution."""
    features_per_stage: Annotated[tuple[Width, ...], Field(min_length=2, max_length=MOST_STAGES)]
    """Channels of every stage, the finest first."""
    kernel_sizes: tuple[tuple[Odd, Odd, Odd], ...]
    """Of every stage: 3, or 1 along an axis that is still too coarse."""
    strides: tuple[tuple[Stride, Stride, Stride], ...]
    """Of every stage; the first is 1."""
    n_blocks_per_stage: tuple[Repeats, ...]
    """Residual blocks of every stage of the encoder; of the plain network, convolutions."""
    n_conv_per_stage_decoder: tuple[Repeats, ...]
    """Convolutions of every stage of the decoder, the coarsest first."""
    conv_bias: bool = True
    """Whether convolutions have a bias."""
    input_scale: float = 1.0
    """The network takes `input_scale` * image + `input_shift`, of an image in 0 … 1."""
    input_shift: float = 0.0
    """See `input_scale`."""

    def __post_init__(self) -> None:
        stages = len(self.features_per_stage)
        counts = [len(self.kernel_sizes), len(self.strides), len(self.n_blocks_per_stage)]
        if (
            counts != [stages] * 3
            or len(self.n_conv_per_stage_decoder) != stages - 1
            or max(self.strides[0]) > 1
        ):
            raise SettingError(
                "an architecture whose stages do not go together",
                where="backbone.architecture",
                expected=f"for {stages} features_per_stage as many kernel_sizes, strides (the "
                "first 1, 1, 1) and n_blocks_per_stage, and one n_conv_per_stage_decoder less",
                got=f"{counts[0]} kernel_sizes, {counts[1]} strides from {self.strides[:1]}, "
                f"{counts[2]} n_blocks_per_stage, {len(self.n_conv_per_stage_decoder)} "
                "n_conv_per_stage_decoder",
            )

    def text(self) -> str:
        """As `backbone.architecture` holds it: one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))


def read_architecture(text: str) -> Architecture:
    """An architecture out of its JSON text.

    Raises:
        SettingError: no JSON, an unknown or missing field, or a value out of range.
    """
    where = "backbone.architecture"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise SettingError("the architecture is not JSON", where=where, got=err) from err
    if not isinstance(values, dict):
        raise SettingError("the architecture is no JSON object", where=where, got=text[:80])
    return from_toml(Architecture, values, raised=SettingError, where=where)


# ------------------------------------------------------------------------------------ the layers


class _Convolutions(nn.Sequential):
    """Convolutions, each instance-normalised and followed by a leaky ReLU unless it ends a sum."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: Triple,
        stride: Triple = (1, 1, 1),
        *,
        count: int = 1,
        bias: bool = True,
        act: bool = True,
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        layers: list[nn.Module] = []
        for _ in range(count):
            layers.append(nn.Conv3d(inside, outside, kernel, stride, padding, bias=bias))
            layers.append(nn.InstanceNorm3d(outside, eps=1e-5, affine=True))
            if act:
                layers.append(nn.LeakyReLU(0.01, inplace=True))
            inside, stride = outside, (1, 1, 1)
        super().__init__(*layers)


class _Block(nn.Module):
    """Two convolutions beside a shortcut (ResNet-D): pooled where strided, 1³ where it widens."""

    def __init__(
        self, inside: int, outside: int, kernel: Triple, stride: Triple, *, bias: bool
    ) -> None:
        super().__init__()
        self.first = _Convolutions(inside, outside, kernel, stride, bias=bias)
        self.second = _Convolutions(outside, outside, kernel, bias=bias, act=False)
        shortcut: list[nn.Module] = []
        if max(stride) > 1:
            shortcut.append(nn.AvgPool3d(stride, stride))
        if inside != outside:
            shortcut.append(nn.Conv3d(inside, outside, 1, bias=False))
            shortcut.append(nn.InstanceNorm3d(outside, eps=1e-5, affine=True))
        self.shortcut = nn.Sequential(*shortcut)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.act(self.second(self.first(x)) + self.shortcut(x))
        return summed


class _Encoder(nn.Module):
    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.scale, self.shift = shape.input_scale, shape.input_shift
        inside, bias, residual = 1, shape.conv_bias, shape.network == RESIDUAL
        self.stem: nn.Module = nn.Identity()
        if residual:
            inside = shape.features_per_stage[0]
            self.stem = _Convolutions(1, inside, shape.kernel_sizes[0], bias=bias)
        self.stages = nn.ModuleList()
        for width, kernel, stride, count in zip(
            shape.features_per_stage,
            shape.kernel_sizes,
            shape.strides,
            shape.n_blocks_per_stage,
            strict=True,
        ):
            if residual:
                blocks = [_Block(inside, width, kernel, stride, bias=bias)]
                blocks += [
                    _Block(width, width, kernel, (1, 1, 1), bias=bias) for _ in range(count - 1)
                ]
                self.stages.append(nn.Sequential(*blocks))
            else:
                self.stages.append(
                    _Convolutions(inside, width, kernel, stride, count=count, bias=bias)
                )
            inside = width

    def forward(self, image: Tensor) -> Maps:
        if (self.scale, self.shift) != (1.0, 0.0):  # before padding, so that it holds at the edge
            image = image * self.scale + self.shift
        return maps_down(self.stem(image), self.stages, {})


class _Decoder(nn.Module):
    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.up = nn.ModuleList()
        self.convolutions = nn.ModuleList()
        widths, bias = shape.features_per_stage, shape.conv_bias
        for i in range(len(widths) - 1):  # by the resolution it reaches, finest first
            stride, wide, width = shape.strides[i + 1], widths[i + 1], widths[i]
            self.up.append(nn.ConvTranspose3d(wide, width, stride, stride, bias=bias))
            count = shape.n_conv_per_stage_decoder[-1 - i]
            self.convolutions.append(
                _Convolutions(2 * width, width, shape.kernel_sizes[i], count=count, bias=bias)
            )

    def forward(self, maps: Mapping[str, Tensor]) -> Maps:
        x, decoded = maps["bottleneck"], {}
        for i in reversed(range(len(self.up))):
            x = self.convolutions[i](torch.cat([self.up[i](x), maps[f"enc{i}"]], dim=1))
            decoded[f"dec{i - 1}" if i else "final"] = x
        return decoded


def _start(module: nn.Module) -> None:
    """Kaiming normal for all convolutions, no bias; a block starts as its shortcut."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _Block):
        norm = module.second[1]
        assert isinstance(norm, nn.InstanceNorm3d)  # noqa: S101  # made above
        nn.init.zeros_(norm.weight)


# ------------------------------------------------------------------------------------ the backbone


def build(shape: Architecture) -> Backbone:
    """The network of an architecture, as nnU-Net initialises it."""
    encoder, decoder = _Encoder(shape), _Decoder(shape)
    for part in (encoder, decoder):
        part.apply(_start)
    stride = triple(math.prod(s[a] for s in shape.strides) for a in range(3))
    # instance normalisation over a bottleneck of one voxel has no variance
    return Backbone(
        encoder,
        decoder,
        final_channels=shape.features_per_stage[0],
        bottleneck_channels=shape.features_per_stage[-1],
        stride=stride,
        smallest=triple(2 * n for n in stride),
    )


def widths_of(size: int, stages: int) -> tuple[int, ...]:
    """Channels of every stage: doubled, up to ten times the first."""
    return tuple(min(size * 2**i, 10 * size) for i in range(stages))


def isotropic(network: str, size: int, blocks: Sequence[int], decoder: int) -> Architecture:
    """An architecture of kernels of 3 and strides of 2 along all axes.

    Args:
        network: `PLAIN` or `RESIDUAL`.
        size: channels of the first stage; nnU-Net's is 32.
        blocks: `n_blocks_per_stage`.
        decoder: convolutions of a stage of the decoder.
    """
    stages = len(blocks)
    return Architecture(
        network=network,  # type: ignore[arg-type]  # checked
        features_per_stage=widths_of(size, stages),
        kernel_sizes=((3, 3, 3),) * stages,
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        n_blocks_per_stage=tuple(blocks),
        n_conv_per_stage_decoder=(decoder,) * (stages - 1),
    )


def nnunet(size: int = 32, architecture: str | None = None) -> Backbone:
    """nnU-Net's plain or residual encoder U-Net with the stages of its plans.

    Args:
        size: channels of the first stage.
        architecture: JSON of an `Architecture`; None: the plain U-Net of six isotropic stages, as
            nnU-Net's rule makes it for patches from 128³ on.

    Raises:
        SettingError: an architecture that is none, or of another size.
    """
    if architecture is None:
        refuse_size(size, 8, "nnunet")
        return build(isotropic(PLAIN, size, (2,) * 6, 2))
    shape = read_architecture(architecture)
    if shape.features_per_stage[0] != size:
        raise SettingError(
            "the size is not that of the architecture",
            where="backbone.size",
            expected=shape.features_per_stage[0],
            got=size,
            next_step=f"--set backbone.size={shape.features_per_stage[0]}",
        )
    return build(shape)
