"""Low-rank experts (LoRA): small additions to the weights of a frozen backbone, one set per step.

An expert adds (alpha / rank) B A to the weight of a linear layer or a (transposed) convolution.
W + ΔW is computed once per forward pass, which then costs hardly more than the backbone alone. B
starts at 0, so a new expert changes nothing, exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.errors import SettingError
from clbench.nets.backbones import Backbone, Maps
from clbench.nets.step_networks import path_maps

Target = Literal["all", "linear", "conv", "attention"]

Layer = nn.Linear | nn.Conv3d | nn.ConvTranspose3d


class LowRankWeight(nn.Module):
    """ΔW of one layer, in the shape of its weight.

    Linear: B (out, r) A (r, in). Convolution: a convolution of the layer's kernel to r channels,
    then one of 1×1×1. Transposed convolution: 1×1×1 to r channels, then one of the layer's kernel.

    Args:
        layer: the layer; not kept.
        rank: r.
        alpha: the factor is alpha / rank.

    Raises:
        SettingError: a grouped convolution.

    Source: Hu et al., ICLR 2022 (LoRA). Differs: convolutions; the addition of the authors' code
    has up to r·k ranks, and their `Conv3d` fails at its first forward pass.
    """

    def __init__(self, layer: Layer, *, rank: int, alpha: float) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear) and layer.groups != 1:
            raise SettingError(
                "a grouped convolution has no low-rank form",
                where="strategy.target",
                expected="layers with groups=1",
                got=f"{type(layer).__name__} with groups={layer.groups}",
                next_step="--set strategy.target=linear",
            )
        shape, self.factor = layer.weight.shape, alpha / rank
        self.transposed = isinstance(layer, nn.ConvTranspose3d)
        if self.transposed:  # its weight is (in, out, k, k, k)
            self.down = nn.Parameter(torch.empty(rank, shape[0]))
            self.up = nn.Parameter(torch.zeros(rank, *shape[1:]))
        else:
            self.down = nn.Parameter(torch.empty(rank, *shape[1:]))
            self.up = nn.Parameter(torch.zeros(shape[0], rank))
        nn.init.kaiming_uniform_(self.down.view(rank, -1), a=math.sqrt(5))

    def forward(self) -> Tensor:
        """ΔW, in the shape of the layer's weight."""
        if self.transposed:
            product = self.down.t() @ self.up.flatten(1)
            return self.factor * product.view(-1, *self.up.shape[1:])
        product = self.up @ self.down.flatten(1)
        return self.factor * product.view(-1, *self.down.shape[1:])


def adapted_layers(backbone: nn.Module, target: Target) -> dict[str, Layer]:
    """Name → layer that an expert adapts.

    Args:
        backbone: any network.
        target: `linear` layers, `conv` for (transposed) convolutions, the linear layers of MONAI's
            window `attention`, or `all`.

    Raises:
        SettingError: no such layer in this network.
    """
    layers: dict[str, Layer] = {}
    for name, module in backbone.named_modules():
        if not isinstance(module, Layer):
            continue
        linear = isinstance(module, nn.Linear)
        attention = linear and ".attn." in name
        if {"all": True, "linear": linear, "conv": not linear, "attention": attention}[target]:
            layers[name] = module
    if not layers:
        raise SettingError(
            "this backbone has no layer that an expert could adapt",
            where="strategy.target",
            expected="a kind of layer that the backbone has",
            got=target,
            next_step="--set strategy.target=all",
        )
    return layers


class Expert(nn.Module):
    """The additions of one step.

    Args:
        backbone: what they are added to; not kept.
        rank: see `LowRankWeight`.
        alpha: the same.
        target: see `adapted_layers`.
    """

    def __init__(self, backbone: nn.Module, *, rank: int, alpha: float, target: Target) -> None:
        super().__init__()
        layers = adapted_layers(backbone, target)
        self.names = tuple(layers)
        self.additions = nn.ModuleList(
            LowRankWeight(layer, rank=rank, alpha=alpha) for layer in layers.values()
        )

    def generate(self) -> list[Tensor]:
        """ΔW of every layer, in the order of `names`."""
        return [addition() for addition in self.additions]


class ExpertBackbone(Backbone):
    """A backbone, and low-rank experts of later steps; the backbone keeps its parameters' names.

    Args:
        base: of step 1.
    """

    def __init__(self, base: Backbone) -> None:
        super().__init__(base.encoder, base.decoder, **base.sizes)
        self.experts = nn.ModuleList()

    def forward(self, image: Tensor) -> Maps:
        """(B, 1, D, H, W) → maps of the newest pass; `step<t>.…`, what heads of step t read."""
        self.check(tuple(image.shape[2:]), train=self.training)
        paths = [self._pass(image, {}, {})]
        for expert in self.experts:
            assert isinstance(expert, Expert)  # noqa: S101  # only these are appended
            weights = {
                f"{name}.weight": self.get_parameter(f"{name}.weight") + change
                for name, change in zip(expert.names, expert.generate(), strict=True)
            }
            encoder, decoder = (
                {n.removeprefix(part): w for n, w in weights.items() if n.startswith(part)}
                for part in ("encoder.", "decoder.")
            )
            paths.append(self._pass(image, encoder, decoder))
        return path_maps(paths)

    def _pass(self, image: Tensor, encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> Maps:
        """One pass with these weights in place of the backbone's."""
        encoded: Maps = functional_call(self.encoder, encoder, (image,))
        decoded: Maps = functional_call(self.decoder, decoder, (encoded,))
        return {**encoded, **decoded}

    def add_expert(self, *, rank: int, alpha: float, target: Target) -> None:
        """One more expert, which changes nothing yet.

        Args:
            rank: see `LowRankWeight`.
            alpha: the same.
            target: see `adapted_layers`.
        """
        base = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        expert = Expert(base, rank=rank, alpha=alpha, target=target)
        self.experts.append(expert.to(next(self.parameters()).device))
