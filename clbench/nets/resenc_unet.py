"""The residual encoder U-Net of nnU-Net (ResEnc M), by its published rules.

Widths `size` × 2^i up to ten times `size` (32: 320 channels), residual blocks 1, 3, 4, 6, 6, 6 in
the encoder and one convolution per stage in the decoder. M, L and XL differ in patch and batch,
never in widths or blocks. The layers are in `clbench.nets.nnunet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clbench.nets import nnunet
from clbench.nets.backbones import Backbone, refuse_size
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


def build(size: int, shape: Topology) -> Backbone:
    """The network for a topology.

    Args:
        size: channels of the first stage; nnU-Net's is 32.
        shape: stages, strides and kernels.

    Raises:
        SettingError: a size that is no positive multiple of 8.
    """
    refuse_size(size, 8, "resenc_unet")
    stages = len(shape.strides)
    return nnunet.build(
        nnunet.Architecture(
            network="ResidualEncoderUNet",
            features_per_stage=nnunet.widths_of(size, stages),
            kernel_sizes=shape.kernels,
            strides=shape.strides,
            n_blocks_per_stage=tuple(BLOCKS[min(i, len(BLOCKS) - 1)] for i in range(stages)),
            n_conv_per_stage_decoder=(1,) * (stages - 1),
        )
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
