"""Trained folders of nnU-Net v2: plans, labels and one fold's weights; tensors only.

Its residual encoder networks (presets ResEnc M, L, XL) are `resenc_unet`. Three things differ
between nnU-Net and clbench, and are taken into the weights: the order of axes (z, y, x there),
the intensities (both clip HU to the window of the plans; nnU-Net then standardizes, clbench maps to
0 … 1), and the names of layers.

Exact but for what padding stands for at the edge of a window: the mean HU of the training data
there, the lower end of the window here. nnU-Net leaves images as they are stored; here they are
turned to RAS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clbench.deployment.extension.foreign import ForeignWeights, plain_name
from clbench.deployment.extension.weights_file import read_settings, read_weights
from clbench.errors import SettingError
from clbench.nets.resenc_unet import BLOCKS

PLANS, DATASET = "plans.json", "dataset.json"
"""What makes a folder a trained one, beside `fold_*/`."""
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Weights of a fold, the first that is there."""
BACKBONES = {5: "resenc_unet", 6: "resenc_unet_6"}
"""Stages → backbone."""
DUPLICATES = r"(decoder\.encoder\..*|.*\.all_modules\..*|decoder\.seg_layers\.\d+\..*)"
"""Second names of layers, and output layers of deep supervision."""
NAMES: tuple[tuple[str, str], ...] = (
    (r"encoder\.stem\.convs\.0\.conv\.", "encoder.stem.0."),
    (r"encoder\.stem\.convs\.0\.norm\.", "encoder.stem.1."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.conv1\.conv\.", r"\1.\2.first.0."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.conv1\.norm\.", r"\1.\2.first.1."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.conv2\.conv\.", r"\1.\2.second.0."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.conv2\.norm\.", r"\1.\2.second.1."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.skip\.0\.conv\.", r"\1.\2.shortcut.0."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.skip\.0\.norm\.", r"\1.\2.shortcut.1."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.skip\.1\.conv\.", r"\1.\2.shortcut.1."),
    (r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.skip\.1\.norm\.", r"\1.\2.shortcut.2."),
)
"""Name in nnU-Net → name in `resenc_unet`; the decoder is counted from the other end."""


def is_trained_folder(folder: Path) -> bool:
    """Whether a folder is one that nnU-Net v2 trained."""
    return (folder / PLANS).is_file() and (folder / DATASET).is_file()


def weights_from_nnunet(folder: Path, structures: Sequence[str] = ()) -> ForeignWeights:
    """The weights of the first fold of a trained folder.

    Args:
        folder: `nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres`, say.
        structures: names of the output channels; none: those of its `dataset.json`.

    Raises:
        SettingError: another network or normalization, several channels, regions, or no fold.
    """
    plans, dataset = read_settings(folder / PLANS), read_settings(folder / DATASET)
    path, of = _checkpoint(folder)
    content = read_weights(path)
    tensors = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise SettingError(
            "the checkpoint holds no weights of nnU-Net",
            where=path,
            expected="network_weights: tensors by name",
            got=", ".join(map(str, content))
            if isinstance(content, dict)
            else type(content).__name__,
        )
    name, config = _configuration(plans, folder)
    stages, size = _architecture(config, folder / PLANS)
    labels = tuple(structures) or _labels(dataset, folder / DATASET)
    low, high, mean, sd = _intensities(plans, dataset, config, folder)
    renamed = renamed_tensors({n.removeprefix("_orig_mod."): t for n, t in tensors.items()}, stages)
    scaled_stem(renamed, scale=(high - low) / sd, shift=(low - mean) / sd)
    spacing, patch = (_triple(config, key, folder / PLANS) for key in ("spacing", "patch_size"))
    notes = [f"of {of} folds {path.parent.name} is taken, {name}"] if of > 1 else []
    mirrored = content.get("inference_allowed_mirroring_axes")
    if not {1, 2} <= set(mirrored if isinstance(mirrored, tuple | list) else ()):
        notes.append(
            "it was trained without mirroring from left to right or front to back: images are "
            "turned to RAS here, and must have been stored so there"
        )
    return ForeignWeights(
        name=plain_name(str(plans.get("dataset_name") or folder.absolute().name))[:40],
        path=path,
        tensors=renamed,
        labels=labels,
        backbone=BACKBONES[stages],
        size=size,
        data={"spacing_mm": spacing, "window_hu": (low, high), "patch_vox": _whole(patch, stages)},
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------------------- the settings


def _checkpoint(folder: Path) -> tuple[Path, int]:
    """Weights of the first fold that has some, and how many folds have."""
    found = [
        path
        for fold in sorted(folder.glob("fold_*"))
        if (path := next((fold / n for n in CHECKPOINTS if (fold / n).is_file()), None)) is not None
    ]
    if not found:
        raise SettingError(
            "the trained folder holds no fold",
            where=folder,
            expected=f"fold_0/{CHECKPOINTS[0]}",
            got=", ".join(sorted(p.name for p in folder.iterdir())[:8]),
            next_step="copy the whole folder of the trained model",
        )
    return found[0], len(found)


def _configuration(plans: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """The configuration the folder is called after, what it inherits included."""
    every = plans.get("configurations")
    every = every if isinstance(every, dict) else {}
    said = folder.absolute().name.rpartition("__")[2]
    name = said if said in every else "3d_fullres"
    config: dict[str, Any] = {}
    parent: Any = name
    for _ in range(len(every)):  # a circle ends
        part = every.get(parent)
        if not isinstance(part, dict):
            break
        config = {**part, **config}
        parent = part.get("inherits_from")
    if not config:
        raise SettingError(
            "the plans do not have the configuration",
            where=folder / PLANS,
            expected=name,
            got=", ".join(every) or "none",
            next_step="keep the name of the folder as nnU-Net wrote it",
        )
    return name, config


def _architecture(config: Mapping[str, Any], where: Path) -> tuple[int, int]:
    """Stages and size of a residual encoder that `resenc_unet` can be."""
    architecture = config.get("architecture")
    architecture = architecture if isinstance(architecture, dict) else {}
    kind = str(architecture.get("network_class_name", config.get("UNet_class_name", "unknown")))
    options = architecture.get("arch_kwargs")
    options = options if isinstance(options, dict) else {}
    stages = options.get("n_stages")
    widths, blocks = options.get("features_per_stage"), options.get("n_blocks_per_stage")
    fits = (
        kind.rpartition(".")[2] == "ResidualEncoderUNet"
        and stages in BACKBONES
        and isinstance(widths, list)
        and len(widths) == stages
        and all(type(w) is int for w in widths)
        and blocks == list(BLOCKS[:stages])
        and options.get("n_conv_per_stage_decoder") == [1] * (stages - 1)
        and options.get("kernel_sizes") == [[3, 3, 3]] * stages
        and options.get("strides") == [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)]
    )
    if not fits:
        raise SettingError(
            "a network of nnU-Net that clbench does not have",
            where=where,
            expected=f"ResidualEncoderUNet of {' or '.join(map(str, BACKBONES))} stages, blocks "
            f"{', '.join(map(str, BLOCKS))}, kernels of 3 and strides of 2 along all axes",
            got=f"{kind}, {stages} stages, blocks {blocks}, kernels {options.get('kernel_sizes')}, "
            f"strides {options.get('strides')}",
            next_step="train with a residual encoder preset (-p nnUNetResEncUNetMPlans) and an "
            "isotropic spacing",
        )
    return int(stages), int(widths[0])  # type: ignore[arg-type, index]  # checked above


def _labels(dataset: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Names in the order of their values, without background."""
    labels = dataset.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    values = {
        str(n): v for n, v in labels.items() if str(n).lower() not in ("background", "ignore")
    }
    ordered = sorted(values, key=lambda n: values[n] if type(values[n]) is int else 0)
    if [values[n] for n in ordered] != list(range(1, len(ordered) + 1)) or not ordered:
        raise SettingError(
            "labels that are no plain list of structures",
            where=where,
            expected='{"labels": {"background": 0, "spleen": 1, "liver": 2}}; regions (several '
            "values to a name) are outputs of another kind",
            got=", ".join(f"{n}: {v}" for n, v in labels.items())[:200] or "no labels",
            next_step="a model of regions cannot be extended",
        )
    return tuple(ordered)


def _intensities(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> tuple[float, float, float, float]:
    """Lower and upper end of the window, mean and standard deviation, in HU."""
    channels = dataset.get("channel_names", dataset.get("modality"))
    schemes = config.get("normalization_schemes")
    axes = plans.get("transpose_forward")
    if (
        not isinstance(channels, dict)
        or len(channels) != 1
        or schemes != ["CTNormalization"]
        or axes not in (None, [0, 1, 2])
    ):
        raise SettingError(
            "images that clbench does not prepare so",
            where=folder / PLANS,
            expected="one channel, CTNormalization, axes not transposed",
            got=f"channels {channels}, {schemes}, transpose_forward {axes}",
            next_step="only a model of single CTs can be extended",
        )
    properties = plans.get("foreground_intensity_properties_per_channel")
    first = properties.get("0") if isinstance(properties, dict) else None
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    values = [first.get(k) for k in keys] if isinstance(first, dict) else []
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if len(numbers) != len(keys) or not numbers[0] < numbers[1] or numbers[3] <= 0:
        raise SettingError(
            "the plans do not say how intensities were normalized",
            where=folder / PLANS,
            expected=", ".join(keys),
            got=values or "nothing",
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _triple(config: Mapping[str, Any], key: str, where: Path) -> tuple[float, ...]:
    """Three positive numbers along x, y, z; nnU-Net has them along z, y, x."""
    value = config.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(v) in (int, float) and v > 0 for v in value)
    ):
        raise SettingError(
            "the plans hold no size of three axes", where=f"{where}, {key}", got=value
        )
    return tuple(reversed(value))


def _whole(patch: Sequence[float], stages: int) -> tuple[int, ...]:
    """The patch, each edge a multiple of the network's stride and twice as large at least."""
    stride = 2 ** (stages - 1)
    return tuple(max(2 * stride, -(-int(n) // stride) * stride) for n in patch)


# ----------------------------------------------------------------------------------- the tensors


def renamed_tensors(tensors: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Tensors under the names of `resenc_unet`, kernels in the order x, y, z.

    Args:
        tensors: of nnU-Net's `ResidualEncoderUNet`.
        stages: of its encoder.

    Returns:
        Tensors; a name without a counterpart is kept, and the output layer is `output.…`.
    """
    last = stages - 2
    found = {}
    for name, tensor in tensors.items():
        new = name
        if (
            output := re.fullmatch(rf"decoder\.seg_layers\.{last}\.(weight|bias)", name)
        ) is not None:
            new = f"output.{output[1]}"
        elif re.fullmatch(DUPLICATES, name):
            continue
        elif (up := re.fullmatch(r"decoder\.transpconvs\.(\d+)\.(.*)", name)) is not None:
            new = f"decoder.up.{last - int(up[1])}.{up[2]}"
        elif (
            block := re.fullmatch(r"decoder\.stages\.(\d+)\.convs\.0\.(conv|norm)\.(.*)", name)
        ) is not None:
            layer = {"conv": 0, "norm": 1}[block[2]]
            new = f"decoder.convolutions.{last - int(block[1])}.{layer}.{block[3]}"
        else:
            for old, ours in NAMES:
                new = re.sub(f"^{old}", ours, new)
        found[new] = tensor.permute(0, 1, 4, 3, 2).contiguous() if tensor.ndim == 5 else tensor
    return found


def scaled_stem(tensors: dict[str, Tensor], *, scale: float, shift: float) -> None:
    """Let the first convolution take u in 0 … 1 where it took `scale * u + shift`.

    Args:
        tensors: under the names of `resenc_unet`; changed in place.
        scale: of the input.
        shift: of the input.
    """
    weight = tensors.get("encoder.stem.0.weight")
    if weight is None:
        return  # named where parameters are missing
    bias = tensors.get("encoder.stem.0.bias", torch.zeros(len(weight)))
    tensors["encoder.stem.0.bias"] = bias + shift * weight.sum(dim=(1, 2, 3, 4))
    tensors["encoder.stem.0.weight"] = weight * scale
