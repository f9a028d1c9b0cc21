"""The layers of nnU-Net's residual encoder U-Net under nnU-Net's own names, for tests of its files.

Written after `dynamic_network_architectures` (ResidualEncoderUNet, BasicBlockD, UNetDecoder), with
the second names under which it keeps layers (`all_modules`, `decoder.encoder`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = (1, 3, 4, 6, 6, 6)


class ConvDropoutNormReLU(nn.Module):
    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int, *, act: bool, bias: bool
    ):
        super().__init__()
        self.conv = nn.Conv3d(inside, outside, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(outside, eps=1e-5, affine=True)
        ops: list[nn.Module] = [self.conv, self.norm]
        if act:
            self.nonlin = nn.LeakyReLU(0.01)
            ops.append(self.nonlin)
        self.all_modules = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class StackedConvBlocks(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.convs = nn.Sequential(ConvDropoutNormReLU(inside, outside, 3, 1, act=True, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class BasicBlockD(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = ConvDropoutNormReLU(inside, outside, 3, stride, act=True, bias=True)
        self.conv2 = ConvDropoutNormReLU(outside, outside, 3, 1, act=False, bias=True)
        self.nonlin2 = nn.LeakyReLU(0.01)
        ops: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
        if inside != outside:
            ops.append(ConvDropoutNormReLU(inside, outside, 1, 1, act=False, bias=False))
        self.skip = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class StackedResidualBlocks(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, count: int):
        super().__init__()
        blocks = [BasicBlockD(inside, outside, stride)]
        blocks += [BasicBlockD(outside, outside, 1) for _ in range(count - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResidualEncoder(nn.Module):
    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.stem = StackedConvBlocks(1, widths[0])
        inside, stages = widths[0], []
        for i, width in enumerate(widths):
            stages.append(StackedResidualBlocks(inside, width, 2 if i else 1, BLOCKS[i]))
            inside = width
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, skips = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class UNetDecoder(nn.Module):
    def __init__(self, encoder: ResidualEncoder, widths: Sequence[int], outputs: int):
        super().__init__()
        self.encoder = encoder
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.stages = nn.ModuleList(StackedConvBlocks(2 * b, b) for _, b in pairs)
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2) for a, b in pairs)
        self.seg_layers = nn.ModuleList(nn.Conv3d(b, outputs, 1) for _, b in pairs)

    def forward(self, skips: list[Tensor]) -> Tensor:
        x = skips[-1]
        for s, stage in enumerate(self.stages):
            x = stage(torch.cat((self.transpconvs[s](x), skips[-(s + 2)]), 1))
        return self.seg_layers[-1](x)


class ResidualEncoderUNet(nn.Module):
    def __init__(self, widths: Sequence[int], outputs: int):
        super().__init__()
        self.encoder = ResidualEncoder(widths)
        self.decoder = UNetDecoder(self.encoder, widths, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def plans_of(widths: Sequence[int], **intensities: float) -> dict[str, Any]:
    """`plans.json` of such a network; spacing and patch along z, y, x."""
    stages = len(widths)
    return {
        "dataset_name": "Dataset007_Two",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {
            "3d_fullres": {
                "spacing": [3.0, 2.0, 1.0],
                "patch_size": [64, 48, 40],
                "normalization_schemes": ["CTNormalization"],
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet."
                    "ResidualEncoderUNet",
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": list(widths),
                        "kernel_sizes": [[3, 3, 3]] * stages,
                        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
                        "n_blocks_per_stage": list(BLOCKS[:stages]),
                        "n_conv_per_stage_decoder": [1] * (stages - 1),
                    },
                },
            }
        },
    }


def write_trained(
    folder: Path, network: nn.Module, plans: Mapping[str, Any], labels: Mapping[str, Any]
) -> Path:
    """A trained folder with one fold, as `nnUNetv2_train` leaves it."""
    folder = folder / "nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    dataset = {"channel_names": {"0": "CT"}, "labels": dict(labels), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.9)], "train_losses": [np.float32(0.1)]},
        "_best_ema": np.float64(0.9),
        "current_epoch": 1000,
        "init_args": {"plans": dict(plans), "configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder
