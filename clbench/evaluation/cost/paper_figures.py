"""The paper's printed FLOPs, counted anew: what 466.08 and 9.44e-4 GFLOPs stand for.

The one is a counter's convention, the other leaves out applying the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.evaluation.cost.multiply_adds import MACS, OTHER, Formula, Scope, aten, count
from clbench.nets.backbones import swin_unetr
from clbench.nets.heads import IMAGE_DIM, SIZES, WIDTH, UniversalHead, dynamic_head
from clbench.nets.text_encodings import LENGTH

SIZE = 48
PATCH_VOX = (96, 96, 96)


def _at_output(*args: Any, out_val: Any, **kwargs: Any) -> int:
    """A convolution's multiply-adds, transposed ones taken at the resolution of their output."""
    macs = MACS[aten.convolution](*args, **kwargs, out_val=out_val)
    if not args[6]:  # transposed
        return macs
    return int(macs * math.prod(out_val.shape[2:]) // math.prod(args[0].shape[2:]))


def _elements(*args: Any, out_val: Any, **kwargs: Any) -> int:
    out = out_val[0] if isinstance(out_val, tuple | list) else out_val
    return int(out.numel())


PTFLOPS: dict[Any, Formula] = {
    **MACS,
    aten.convolution: _at_output,
    aten.native_batch_norm: _elements,
    aten._native_batch_norm_legit: _elements,
    aten.leaky_relu: _elements,
    aten.leaky_relu_: _elements,
}
"""The convention of a widespread counter: transposed convolutions at the resolution of their output
(stride 2 in three axes: eight times too many), normalization and activation one per element.

For comparisons with printed figures only; as far as a decoder of Swin UNETR needs it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """The paper's two figures and what they count. One patch of 96 x 96 x 96, Swin UNETR 48."""

    decoder_macs: int
    """Multiply-adds of the decoder without output layer."""
    ptflops_compat: int
    """The decoder by the convention of `PTFLOPS`."""
    generator_macs: int
    """Multiply-adds of the network that generates one structure's head."""
    generator_biases: int
    """Its biases; parameters = multiply-adds + biases."""
    apply_macs: int
    """Multiply-adds of applying one generated head to every voxel of the patch."""

    @property
    def decoder_gflops(self) -> float:
        """The honest count, two operations per multiply-add: 423.68."""
        return 2 * self.decoder_macs / 1e9

    @property
    def printed_decoder_gflops(self) -> float:
        """What the paper prints, 466.08: the counter shows 233.04 GMac, and twice that is taken."""
        return 2 * round(self.ptflops_compat / 1e9, 2)

    @property
    def printed_head_gflops(self) -> float:
        """What the paper prints, 9.44e-4: multiply-adds and biases, twice."""
        return 2 * (self.generator_macs + self.generator_biases) / 1e9

    @property
    def apply_gflops(self) -> float:
        """What the paper leaves out, two operations per multiply-add: 0.2406."""
        return 2 * self.apply_macs / 1e9


class _Applied(nn.Module):
    """One generated head on the maps it works on."""

    def forward(self, features: Tensor, params: Tensor) -> Tensor:
        return dynamic_head(features, params)


def printed_figures() -> Printed:
    """Count anew what stands behind 466.08 and 9.44e-4 GFLOPs.

    Source: paper, the comparison of computational cost with Ji et al. Differs: the authors name no
    counter; that ptflops 0.6.9 gives exactly 233.04 GMac is an identification by number.
    """
    net = swin_unetr(SIZE)
    head = UniversalHead(net.final_channels, net.bottleneck_channels)
    head.add("liver", torch.zeros(LENGTH))
    shape = [(1, 1, *PATCH_VOX)]

    def decoder(model: nn.Module) -> dict[str, list[Scope]]:
        return {"decoder": [model.get_submodule("decoder")]}

    controller = head.controllers["liver"]
    return Printed(
        decoder_macs=count(net, shape, decoder)["decoder"],
        ptflops_compat=count(net, shape, decoder, formulas=PTFLOPS)["decoder"],
        generator_macs=count(controller, [(1, IMAGE_DIM + head.text_dim)])[OTHER],
        generator_biases=sum(p.numel() for p in controller.parameters() if p.ndim == 1),
        apply_macs=count(_Applied(), [(1, WIDTH, *PATCH_VOX), (1, 1, sum(SIZES))])[OTHER],
    )
