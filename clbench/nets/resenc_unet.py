"""The residual encoder U-Net of nnU-Net (ResEnc M), by its published rules.

Widths `size` × 2^i up to ten times `size` (32: 320 channels), residual blocks 1, 3, 4, 6, 6, 6 in
the encoder and one convolution per stage in the decoder. M, L and XL differ in patch and batch,
never in widths or blocks. The output layers of nnU-Net's deep supervision are no part of a
backbone: heads are the strategy's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.nets.backbones import Backbone, Maps, refuse_size
from clbench.types import triple

Triple = tuple[int, int, int]

BLOCKS = (1, 3, 4, 6, 6, 6)
"""Residual blocks of the encoder's stages; of further ones, as of the last."""
SMALLEST_EDGE_VOX = 4
"""The rule for stages halves no axis below this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Stages of a network for one patch."""

    strides: tuple[Triple, ...]
    """Per stage; the first is 1."""
    kernels: tuple[Triple, ...]
    """Per stage: 3, or 1 along an axis that is still too coarse."""
    patch_vox: Triple
    """The patch, padded to multiples of the product of the strides."""


def topology(patch_vox: Sequence[int], spacing_mm: Sequence[float]) -> Topology:
    """Stages, strides and kernels by nnU-Net's rule.

    An axis may be halved while it has 8 voxels (so that 4 are left) and its spacing is within a
    factor of 2 of the smallest spacing among such axes; a single remaining axis needs 12. The
    kernel along an axis becomes 3, for good, once its spacing is within a factor of 2 of the
    smallest.

    Args:
        patch_vox: (D, H, W) of a training crop.
        spacing_mm: its voxel size.

    Example:
        >>> from clbench.nets.resenc_unet import topology
        >>> len(topology((96, 96, 96), (1.5, 1.5, 1.5)).strides)
        5
        >>> len(topology((128, 128, 128), (1.5, 1.5, 1.5)).strides)
        6

    Source: Isensee et al., Nature Methods 2021, and nnU-Net's code.
    """
    size, spacing = [int(n) for n in patch_vox], [float(s) for s in spacing_mm]
    halvings, kernel = [0, 0, 0], [1, 1, 1]
    strides, kernels = [(1, 1, 1)], []
    while True:
        large = [a for a in range(3) if size[a] >= 2 * SMALLEST_EDGE_VOX]
        if not large:
            break
        finest = min(spacing[a] for a in large)
        halved = [a for a in large if spacing[a] / finest < 2]
        if len(halved) == 1 and size[halved[0]] < 3 * SMALLEST_EDGE_VOX:
            break
        kernel = _kernel(kernel, spacing)
        kernels.append(triple(kernel))
        strides.append(triple(2 if a in halved else 1 for a in range(3)))
        for axis in halved:
            halvings[axis] += 1
            spacing[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    return Topology(
        strides=tuple(strides),
        kernels=(*kernels, (3, 3, 3)),
        patch_vox=triple(
            -(-int(n) // 2**k) * 2**k for n, k in zip(patch_vox, halvings, strict=True)
        ),
    )


def _kernel(before: Sequence[int], spacing: Sequence[float]) -> list[int]:
    finest = min(spacing)
    return [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(before, spacing, strict=True)]


def widths_of(size: int, stages: int) -> tuple[int, ...]:
    """Channels of every stage: doubled, up to ten times the first."""
    return tuple(min(size * 2**i, 10 * size) for i in range(stages))


class _Convolution(nn.Sequential):
    """Convolution with bias, instance normalization, and a leaky ReLU unless it ends a sum."""

    def __init__(
        self, inside: int, outside: int, kernel: Triple, stride: Triple = (1, 1, 1), *, act: bool
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        super().__init__(
            nn.Conv3d(inside, outside, kernel, stride, padding),
            nn.InstanceNorm3d(outside, eps=1e-5, affine=True),
            *([nn.LeakyReLU(0.01, inplace=True)] if act else []),
        )


class _Block(nn.Module):
    """Two convolutions beside a shortcut (ResNet-D): pooled where strided, 1³ where it widens."""

    def __init__(self, inside: int, outside: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.first = _Convolution(inside, outside, kernel, stride, act=True)
        self.second = _Convolution(outside, outside, kernel, act=False)
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
    def __init__(self, widths: Sequence[int], shape: Topology) -> None:
        super().__init__()
        self.stem = _Convolution(1, widths[0], shape.kernels[0], act=True)
        self.stages = nn.ModuleList()
        inside = widths[0]
        for i, (width, kernel, stride) in enumerate(
            zip(widths, shape.kernels, shape.strides, strict=True)
        ):
            count = BLOCKS[min(i, len(BLOCKS) - 1)]
            blocks = [_Block(inside, width, kernel, stride)]
            blocks += [_Block(width, width, kernel, (1, 1, 1)) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inside = width

    def forward(self, image: Tensor) -> Maps:
        x, maps = self.stem(image), {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps["bottleneck" if i == len(self.stages) - 1 else f"enc{i}"] = x
        return maps


class _Decoder(nn.Module):
    def __init__(self, widths: Sequence[int], shape: Topology) -> None:
        super().__init__()
        self.up = nn.ModuleList()
        self.convolutions = nn.ModuleList()
        for i in range(len(widths) - 1):  # by the resolution it reaches, finest first
            stride, wide, width = shape.strides[i + 1], widths[i + 1], widths[i]
            self.up.append(nn.ConvTranspose3d(wide, width, stride, stride))
            self.convolutions.append(_Convolution(2 * width, width, shape.kernels[i], act=True))

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


def build(size: int, shape: Topology) -> Backbone:
    """The network for a topology.

    Args:
        size: channels of the first stage; nnU-Net's is 32.
        shape: stages, strides and kernels.

    Raises:
        SettingError: a size that is no positive multiple of 8.
    """
    refuse_size(size, 8, "resenc_unet")
    widths = widths_of(size, len(shape.strides))
    encoder, decoder = _Encoder(widths, shape), _Decoder(widths, shape)
    for part in (encoder, decoder):
        part.apply(_start)
    stride = max(math.prod(s[a] for s in shape.strides) for a in range(3))
    # instance normalisation over a bottleneck of one voxel has no variance
    return Backbone(
        encoder,
        decoder,
        final_channels=size,
        bottleneck_channels=widths[-1],
        stride=stride,
        smallest=2 * stride,
    )


def _isotropic(stages: int) -> Topology:
    edge = SMALLEST_EDGE_VOX * 2 ** (stages - 1)
    return topology((edge,) * 3, (1.0,) * 3)


def resenc_unet(size: int = 32) -> Backbone:
    """nnU-Net's residual encoder U-Net (ResEnc M) of five stages, as for patches of 64³ to 96³.

    Source: Isensee et al., Nature Methods 2021 (nnU-Net) and MICCAI 2024 (ResEnc presets).
    """
    return build(size, _isotropic(5))


def resenc_unet_6(size: int = 32) -> Backbone:
    """The same of six stages, as nnU-Net's rule makes it for patches from 128³ on.

    Source: as `resenc_unet`.
    """
    return build(size, _isotropic(6))
