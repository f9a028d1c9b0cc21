"""Backbones by name: an image in, named feature maps out, encoder and decoder apart.

Every backbone is an `encoder` (image → maps, finest first, `bottleneck` last) and a
`decoder` (those maps → dec…, `final`), so that a method may freeze the one and copy the other.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from clbench.errors import SettingError
from clbench.spec import registry
from clbench.spec.settings import BackboneSettings
from clbench.types import triple

if TYPE_CHECKING:  # MONAI takes longer to import than torch; only its own networks need it
    from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR

Maps = dict[str, Tensor]


class Backbone(nn.Module):
    """An encoder and a decoder.

    Args:
        encoder: image (B, 1, D, H, W) → maps, ordered from fine to coarse, `bottleneck` last.
        decoder: all encoder maps → maps from coarse to fine, `final` last.
        final_channels: channels of `final`.
        bottleneck_channels: channels of `bottleneck`.
        stride: spatial sizes must be multiples of it; one number, or one an axis.
        smallest: smallest spatial size it can be trained on; likewise.
        controller_width: hidden width of the controllers of a universal head on it; the published
            one, but for networks made to be fast.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        final_channels: int,
        bottleneck_channels: int,
        stride: int | Sequence[int],
        smallest: int | Sequence[int] = 0,
        controller_width: int = 512,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.final_channels = final_channels
        self.bottleneck_channels = bottleneck_channels
        self.stride = _per_axis(stride)
        self.smallest = triple(map(max, _per_axis(smallest), self.stride))
        self.controller_width = controller_width

    @property
    def sizes(self) -> dict[str, int]:
        """What `__init__` asks for beside encoder and decoder."""
        size = ("final_channels", "bottleneck_channels", "controller_width")
        names = (*size, "stride", "smallest")
        return {name: getattr(self, name) for name in names}

    def forward(self, image: Tensor) -> Maps:
        """(B, 1, D, H, W) → enc0…, bottleneck, dec…, final (at the resolution of the image).

        Raises:
            SettingError: a size the network cannot work on.
        """
        maps = self.encode(image)
        return {**maps, **self.decoder(maps)}

    def encode(self, image: Tensor) -> Maps:
        """The encoder's maps alone; checks the size."""
        self.check(tuple(image.shape[2:]), train=self.training)
        maps: Maps = self.encoder(image)
        return maps

    def check(self, shape: tuple[int, ...], *, train: bool) -> None:
        """Refuse a patch the network cannot work on, or cannot be trained on.

        Raises:
            SettingError: with the next size that it can.
        """
        fits = not any(n % s for n, s in zip(shape, self.stride, strict=True))
        if not fits or (train and any(n < s for n, s in zip(shape, self.smallest, strict=True))):
            raise SettingError(
                "the network cannot work on patches of this size",
                where="data.patch_vox",
                expected=f"multiples of {_said(self.stride)}, at least {_said(self.smallest)}",
                got=" x ".join(map(str, shape)),
                next_step=f"--set data.patch_vox={','.join(map(str, self.fitting(shape)))}",
            )

    def fitting(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The next patch the network can be trained on, of at least `shape` voxels."""
        return triple(
            max(-(-n // stride) * stride, smallest)
            for n, stride, smallest in zip(shape, self.stride, self.smallest, strict=True)
        )


def _per_axis(value: int | Sequence[int]) -> tuple[int, int, int]:
    return (value,) * 3 if isinstance(value, int) else triple(value)


def _said(sizes: tuple[int, int, int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else " x ".join(map(str, sizes))


def new_backbone(settings: BackboneSettings) -> Backbone:
    """The backbone that settings name, as it is initialised; no file of weights is read.

    Raises:
        UnknownName: nobody registered it.
        SettingError: a size or an architecture it cannot have.
    """
    make = registry.load("backbone", settings.name)
    network: Backbone
    if settings.architecture is None:
        network = make(settings.size)
    elif "architecture" in inspect.signature(make).parameters:
        network = make(settings.size, settings.architecture)
    else:
        raise SettingError(
            f"{settings.name} has one architecture alone",
            where="backbone.architecture",
            got=settings.architecture[:80],
            next_step="--set backbone.name=nnunet, or --set backbone.architecture=none",
        )
    return network


def maps_down(x: Tensor, layers: nn.ModuleList, maps: Maps) -> Maps:
    """Add what each layer makes of the map before it; the last is the bottleneck.

    Args:
        x: what the first layer takes.
        layers: from the finest to the coarsest.
        maps: maps of an encoder so far, enc0 and so on; changed in place.
    """
    for layer in layers:
        x = layer(x)
        maps[f"enc{len(maps)}"] = x
    maps["bottleneck"] = maps.pop(f"enc{len(maps) - 1}")
    return maps


# --------------------------------------------------------------------------------- Swin UNETR


class _SwinEncoder(nn.Module):
    def __init__(self, net: SwinUNETR) -> None:
        super().__init__()
        self.swinViT: nn.Module = net.swinViT
        self.encoder1: nn.Module = net.encoder1
        self.encoder2: nn.Module = net.encoder2
        self.encoder3: nn.Module = net.encoder3
        self.encoder4: nn.Module = net.encoder4
        self.encoder10: nn.Module = net.encoder10

    def forward(self, image: Tensor) -> Maps:
        hidden = self.swinViT(image, True)
        return {
            "enc0": self.encoder1(image),
            "enc1": self.encoder2(hidden[0]),
            "enc2": self.encoder3(hidden[1]),
            "enc3": self.encoder4(hidden[2]),
            "enc4": hidden[3],
            "bottleneck": self.encoder10(hidden[4]),
        }


class _SwinDecoder(nn.Module):
    def __init__(self, net: SwinUNETR) -> None:
        super().__init__()
        self.decoder5: nn.Module = net.decoder5
        self.decoder4: nn.Module = net.decoder4
        self.decoder3: nn.Module = net.decoder3
        self.decoder2: nn.Module = net.decoder2
        self.decoder1: nn.Module = net.decoder1

    def forward(self, maps: Mapping[str, Tensor]) -> Maps:
        dec3 = self.decoder5(maps["bottleneck"], maps["enc4"])
        dec2 = self.decoder4(dec3, maps["enc3"])
        dec1 = self.decoder3(dec2, maps["enc2"])
        dec0 = self.decoder2(dec1, maps["enc1"])
        final = self.decoder1(dec0, maps["enc0"])
        return {"dec3": dec3, "dec2": dec2, "dec1": dec1, "dec0": dec0, "final": final}


def swin_unetr(size: int = 48) -> Backbone:
    """Swin UNETR without its output layer (MONAI; Hatamizadeh et al., 2022).

    Args:
        size: feature size, a multiple of 12; the paper's is 48.

    Raises:
        SettingError: another size.
    """
    refuse_size(size, 12, "swin_unetr")
    from monai.networks.nets import SwinUNETR

    net = SwinUNETR(in_channels=1, out_channels=1, feature_size=size)
    # instance normalisation over a bottleneck of one voxel has no variance: 64 and up
    return Backbone(
        _SwinEncoder(net),
        _SwinDecoder(net),
        final_channels=size,
        bottleneck_channels=16 * size,
        stride=32,
        smallest=64,
    )


# -------------------------------------------------------------------------------------- U-Net


class _UNetEncoder(nn.Module):
    def __init__(self, net: BasicUNet) -> None:
        super().__init__()
        self.conv_0: nn.Module = net.conv_0
        self.down = nn.ModuleList([net.down_1, net.down_2, net.down_3, net.down_4])

    def forward(self, image: Tensor) -> Maps:
        x = self.conv_0(image)
        return maps_down(x, self.down, {"enc0": x})


class _UNetDecoder(nn.Module):
    def __init__(self, net: BasicUNet) -> None:
        super().__init__()
        self.up = nn.ModuleList([net.upcat_1, net.upcat_2, net.upcat_3, net.upcat_4])

    def forward(self, maps: Mapping[str, Tensor]) -> Maps:
        x, decoded = maps["bottleneck"], {}
        for i in reversed(range(len(self.up))):
            x = self.up[i](x, maps[f"enc{i}"])
            decoded[f"dec{i - 1}" if i else "final"] = x
        return decoded


def unet(size: int = 32) -> Backbone:
    """A U-Net of five levels (MONAI's BasicUNet), instance-normalised."""
    refuse_size(size, 1, "unet")
    from monai.networks.nets import BasicUNet

    net = BasicUNet(
        spatial_dims=3, in_channels=1, features=(size, size, 2 * size, 4 * size, 8 * size, size)
    )
    return Backbone(
        _UNetEncoder(net),
        _UNetDecoder(net),
        final_channels=size,
        bottleneck_channels=8 * size,
        stride=16,
        smallest=32,
    )


# ---------------------------------------------------------------------------------- SegResNet


class _ResEncoder(nn.Module):
    def __init__(self, net: SegResNet) -> None:
        super().__init__()
        self.convInit: nn.Module = net.convInit
        self.down_layers: nn.ModuleList = net.down_layers

    def forward(self, image: Tensor) -> Maps:
        return maps_down(self.convInit(image), self.down_layers, {})


class _ResDecoder(nn.Module):
    def __init__(self, net: SegResNet) -> None:
        super().__init__()
        self.up_samples: nn.ModuleList = net.up_samples
        self.up_layers: nn.ModuleList = net.up_layers

    def forward(self, maps: Mapping[str, Tensor]) -> Maps:
        x, decoded = maps["bottleneck"], {}
        last = len(self.up_layers) - 1
        for i, (up, layer) in enumerate(zip(self.up_samples, self.up_layers, strict=True)):
            x = layer(up(x) + maps[f"enc{last - i}"])
            decoded["final" if i == last else f"dec{last - 1 - i}"] = x
        return decoded


def segresnet(size: int = 16) -> Backbone:
    """SegResNet without its output layer (MONAI; Myronenko, 2018), group-normalised."""
    refuse_size(size, 8, "segresnet")
    from monai.networks.nets import SegResNet

    net = SegResNet(spatial_dims=3, init_filters=size, in_channels=1, out_channels=1)
    return Backbone(
        _ResEncoder(net),
        _ResDecoder(net),
        final_channels=size,
        bottleneck_channels=8 * size,
        stride=8,
    )


# ---------------------------------------------------------------------------------- small U-Net


def _convolutions(inside: int, outside: int, *strides: int) -> nn.Sequential:
    """A 3³ convolution per stride, each instance-normalised."""
    layers: list[nn.Module] = []
    for stride in strides:
        layers += [
            nn.Conv3d(inside, outside, 3, stride=stride, padding=1, bias=False),
            # one channel to a group is instance normalization; on a CPU torch's kernel for groups
            # is the faster one
            nn.GroupNorm(outside, outside),
            nn.LeakyReLU(0.01, inplace=True),
        ]
        inside = outside
    return nn.Sequential(*layers)


class _SmallEncoder(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        # strided, not pooled: on small maps torch takes a convolution eight times slower on a CPU
        # unless channels × depth × height passes 20480, and a strided one sees the larger map
        self.blocks = nn.ModuleList(
            _convolutions(a, b, *((2, 1) if i else (1,)))
            for i, (a, b) in enumerate(zip([1, *widths[:-1]], widths, strict=True))
        )

    def forward(self, image: Tensor) -> Maps:
        return maps_down(image, self.blocks, {})


class _SmallDecoder(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in itertools.pairwise(widths))
        # one convolution to a level: with a second one an update takes longer, and within a few
        # hundred updates small organs are learned later
        self.blocks = nn.ModuleList(_convolutions(a, a, 1) for a in widths[:-1])

    def forward(self, maps: Mapping[str, Tensor]) -> Maps:
        x, decoded = maps["bottleneck"], {}
        for i in reversed(range(len(self.blocks))):
            x = functional.interpolate(self.narrow[i](x), scale_factor=2.0, mode="nearest")
            # added, not concatenated: a third of the time of the finest level on a CPU
            x = self.blocks[i](x + maps[f"enc{i}"])
            decoded[f"dec{i - 1}" if i else "final"] = x
        return decoded


def small_unet(size: int = 16) -> Backbone:
    """A U-Net of four levels for two CPU cores: `size` × (1, 2, 6, 8) channels, added skips."""
    refuse_size(size, 8, "small_unet")
    widths = [size, 2 * size, 6 * size, 8 * size]
    return Backbone(
        _SmallEncoder(widths),
        _SmallDecoder(widths),
        final_channels=size,
        bottleneck_channels=widths[-1],
        stride=8,
        smallest=16,
    )


def refuse_size(size: int, multiple: int, name: str) -> None:
    """Refuse a feature size that is no multiple of what a network's norms and heads divide by.

    Args:
        size: the feature size that was asked for.
        multiple: what it must be a multiple of.
        name: of the network, for the error.

    Raises:
        SettingError: it is not.
    """
    if size < 1 or size % multiple:
        raise SettingError(
            f"{name} cannot be built with this feature size",
            where="backbone.size",
            expected=f"a positive multiple of {multiple}",
            got=size,
            next_step=f"--set backbone.size={max(multiple, size // multiple * multiple)}",
        )
