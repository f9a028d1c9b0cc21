"""Trained folders of nnU-Net v2: plans, labels and one fold's weights; tensors only.

Its plain U-Net and its residual encoder presets are the backbone `nnunet`, with the stages, kernels
and strides of the plans. Three things differ between nnU-Net and clbench: the names of layers, the
order of axes (those of `transpose_forward` there, x, y, z here), and the intensities: both clip HU
to the window of the plans; nnU-Net then standardizes, clbench maps to 0 … 1, which the network's
`input_scale` and `input_shift` undo.

So a window's logits are nnU-Net's own. What a whole image gets differs where nnU-Net's prediction
does more: folds are averaged and images mirrored there, probabilities and not voxels are brought
back to the image's grid, and images are left as they are stored, where they are turned to RAS here.

Source: github.com/MIC-DKFZ/nnUNet, plans_handler.py, default_normalization_schemes.py,
predict_from_raw_data.py; dynamic_network_architectures, unet.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clbench.deployment.extension.foreign import ForeignWeights
from clbench.deployment.extension.own_data import plain_name
from clbench.deployment.extension.weights_file import nested, read_settings, read_weights
from clbench.errors import SettingError
from clbench.nets.nnunet import PLAIN, RESIDUAL, Architecture

PLANS, DATASET = "plans.json", "dataset.json"
"""What makes a folder a trained one, beside `fold_*/`."""
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Weights of a fold, the first that is there."""
DUPLICATES = r"(decoder\.encoder\..*|.*\.all_modules\..*|decoder\.seg_layers\.\d+\..*)"
"""Second names of layers, and output layers of deep supervision."""
FIXED: Mapping[str, tuple[object, ...]] = {
    "conv_op": ("torch.nn.modules.conv.Conv3d", "torch.nn.Conv3d"),
    "norm_op": ("torch.nn.modules.instancenorm.InstanceNorm3d", "torch.nn.InstanceNorm3d"),
    "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
    "dropout_op": (),
    "nonlin": ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    "nonlin_kwargs": ({"inplace": True}, {}),
    "nonlin_first": (False,),
    "bottleneck_channels": (),
    "block": (),
}
"""Parts of an architecture that `nnunet` has one way → how the plans may say so; or not at all."""
NEEDED = ("norm_op", "nonlin")
"""Of these, what must be said: without it a network has none."""
OTHERS = "; to take another one, name its folder"
"""End of the note that says which fold is taken."""
REORIENTED = "NibabelIOWithReorient"
"""The one reader of nnU-Net that turns images to RAS."""


def trained_folder(path: Path) -> Path | None:
    """The folder that nnU-Net v2 trained and that a path names, itself or one of its folds.

    Args:
        path: the folder, `fold_0` in it, or a checkpoint in that.
    """
    fold = path.absolute().parent if path.is_file() else path.absolute()
    places = (path, *([fold.parent] if fold.name.startswith("fold_") else []))
    whole = (p for p in places if (p / PLANS).is_file() and (p / DATASET).is_file())
    return next(whole, None)


def weights_from_nnunet(chosen: Path, structures: Sequence[str] = ()) -> ForeignWeights:
    """The weights of one fold of a trained folder.

    Args:
        chosen: `nnUNetTrainer__nnUNetPlans__3d_fullres`, say: its first fold is taken; or one of
            its folds, or a checkpoint of one.
        structures: names of the output channels; none: those of its `dataset.json`.

    Raises:
        SettingError: another network or normalization, several channels, regions, a cascade, or no
            fold.
    """
    folder = trained_folder(chosen) or chosen
    plans, dataset = read_settings(folder / PLANS), read_settings(folder / DATASET)
    path, folds = _checkpoint(chosen, [chosen] if chosen != folder else folder.glob("fold_*"))
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
    name, config = _configuration(plans, content, folder)
    axes = _axes(plans, folder / PLANS)
    low, high, mean, sd = _intensities(plans, dataset, config, folder)
    shape = _architecture(
        config, axes, folder / PLANS, scale=(high - low) / sd, shift=(low - mean) / sd
    )
    spacing = _triple(config, "spacing", axes, folder / PLANS)
    patch = _triple(config, "patch_size", axes, folder / PLANS)
    return ForeignWeights(
        name=plain_name(str(plans.get("dataset_name") or folder.absolute().name))[:40],
        path=path,
        tensors=renamed_tensors(tensors, shape, axes),
        labels=tuple(structures) or _labels(dataset, folder / DATASET),
        backbone="nnunet",
        size=shape.features_per_stage[0],
        architecture=shape.text(),
        data={
            "spacing_mm": spacing,
            "window_hu": (low, high),
            "patch_vox": tuple(map(int, patch)),
        },
        notes=(
            *([f"of {folds} folds {path.parent.name} is taken, {name}" + OTHERS] * (folds > 1)),
            *_orientation(plans, content, axes),
        ),
    )


# ---------------------------------------------------------------------------------- the settings


def _checkpoint(chosen: Path, folds: Iterable[Path]) -> tuple[Path, int]:
    """The chosen file, or weights of the first fold that has some; and how many folds have."""
    if chosen.is_file():
        return chosen, 1
    checkpoints = [
        path
        for fold in sorted(folds)
        if (path := next((fold / n for n in CHECKPOINTS if (fold / n).is_file()), None)) is not None
    ]
    if not checkpoints:
        raise SettingError(
            "the trained folder holds no weights of a fold",
            where=chosen,
            expected=f"fold_0/{CHECKPOINTS[0]}",
            got=", ".join(sorted(p.name for p in chosen.iterdir())[:8]) or "an empty folder",
            next_step="copy the whole folder of the trained model",
        )
    return checkpoints[0], len(checkpoints)


def _configuration(
    plans: Mapping[str, Any], content: Mapping[str, Any], folder: Path
) -> tuple[str, dict[str, Any]]:
    """The configuration a checkpoint was trained by, what it inherits included.

    The checkpoint says which, as nnU-Net reads it; where it does not, the name of the folder.
    """
    every = nested(plans, "configurations")
    said = nested(content, "init_args").get("configuration")
    name = str(said or folder.absolute().name.rpartition("__")[2])
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
    if config.get("previous_stage"):
        raise SettingError(
            "the second stage of a cascade reads the first one's masks beside the image",
            where=f"{folder / PLANS}, {name}",
            expected="3d_fullres or 3d_lowres",
            got=f"{name}, after {config['previous_stage']}",
            next_step="extend the folder of another configuration of this data set",
        )
    size = config.get("patch_size")
    if isinstance(size, list) and len(size) == 2:
        raise SettingError(
            "a network of slices, not of volumes",
            where=f"{folder / PLANS}, {name}",
            expected="3d_fullres or 3d_lowres",
            got=f"{name}, patches of {' x '.join(map(str, size))}",
            next_step="extend the folder of a 3-D configuration of this data set",
        )
    return name, config


def _axes(plans: Mapping[str, Any], where: Path) -> tuple[int, int, int]:
    """Where x, y and z stand among the network's axes.

    nnU-Net reads images along z, y, x and then puts them in the order of `transpose_forward`.
    """
    forward = plans.get("transpose_forward", [0, 1, 2])
    if not isinstance(forward, list) or sorted(map(str, forward)) != ["0", "1", "2"]:
        raise SettingError(
            "the order of axes is none",
            where=f"{where}, transpose_forward",
            expected="0, 1 and 2 in any order",
            got=forward,
        )
    return forward.index(2), forward.index(1), forward.index(0)


def _orientation(
    plans: Mapping[str, Any], content: Mapping[str, Any], axes: Sequence[int]
) -> list[str]:
    """A note where the network may depend on the direction in which its images were stored."""
    mirrored = content.get("inference_allowed_mirroring_axes")
    if plans.get("image_reader_writer") == REORIENTED or set(axes[:2]) <= set(
        mirrored if isinstance(mirrored, tuple | list) else ()
    ):
        return []
    note = "it was trained without mirroring from left to right or front to back: images are "
    return [note + "turned to RAS here, and must have been stored so there"]


def _architecture(
    config: Mapping[str, Any],
    axes: Sequence[int],
    where: Path,
    *,
    scale: float,
    shift: float,
) -> Architecture:
    """The network of a configuration, of either style of plans."""
    kind, options = _options(config)
    try:
        if kind not in (PLAIN, RESIDUAL):
            raise ValueError(f"network {kind}")
        for key, allowed in FIXED.items():
            absent = () if key in NEEDED else (None,)
            if options.get(key) not in (*absent, *allowed):
                raise ValueError(f"{key} {options.get(key)}")
        stages = int(options["n_stages"])
        widths = _listed(options["features_per_stage"], stages)
        if len(widths) != stages:
            raise ValueError(f"{len(widths)} features_per_stage for {stages} stages")
        if options.get("stem_channels") not in (None, widths[0]):
            raise ValueError(f"stem_channels {options['stem_channels']}")
        blocks = options["n_conv_per_stage" if kind == PLAIN else "n_blocks_per_stage"]
        return Architecture(
            network=kind,  # type: ignore[arg-type]  # one of both, see above
            features_per_stage=tuple(widths),
            kernel_sizes=tuple(_turned(k, axes) for k in _listed(options["kernel_sizes"], stages)),
            strides=tuple(_turned(s, axes) for s in _listed(options["strides"], stages)),
            n_blocks_per_stage=tuple(_listed(blocks, stages)),
            n_conv_per_stage_decoder=tuple(
                _listed(options["n_conv_per_stage_decoder"], stages - 1)
            ),
            conv_bias=options.get("conv_bias", False),
            input_scale=scale,
            input_shift=shift,
        )
    except (SettingError, ValueError, KeyError, TypeError, IndexError) as err:
        said = err.brief if isinstance(err, SettingError) else str(err)
        raise SettingError(
            "a network of nnU-Net that clbench does not have",
            where=where,
            expected=f"{PLAIN} or {RESIDUAL} of 3-D convolutions with odd kernels, instance norm "
            "and leaky ReLU, without dropout",
            got=f"no {said}" if isinstance(err, KeyError) else said,
            next_step="extend a model of the default planner (nnUNetPlans) or of a residual "
            "encoder preset (nnUNetResEncUNetMPlans)",
        ) from err


def _options(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name of the network and its `arch_kwargs`; plans of before 2024 use other keys."""
    architecture = config.get("architecture")
    if isinstance(architecture, dict):
        kind, options = architecture.get("network_class_name"), nested(architecture, "arch_kwargs")
        return str(kind).rpartition(".")[2], options
    kind = str(config.get("UNet_class_name", "unknown"))
    blocks = config.get("n_conv_per_stage_encoder")
    stages = len(blocks) if isinstance(blocks, list) else 0
    options = {
        **{key: allowed[0] for key, allowed in FIXED.items() if allowed},
        "n_stages": stages,
        "kernel_sizes": config.get("conv_kernel_sizes"),
        "strides": config.get("pool_op_kernel_sizes"),
        "n_conv_per_stage" if kind == PLAIN else "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": config.get("n_conv_per_stage_decoder"),
        "conv_bias": True,
    }
    first, most = config.get("UNet_base_num_features"), config.get("unet_max_num_features")
    if type(first) is int and type(most) is int:
        options["features_per_stage"] = [min(first * 2**i, most) for i in range(min(stages, 12))]
    return kind, options


def _listed(value: Any, count: int) -> list[Any]:
    """A value per stage; one number stands for all stages."""
    return list(value) if isinstance(value, list | tuple) else [value] * min(count, 99)


def _turned(value: Any, axes: Sequence[int]) -> tuple[Any, ...]:
    """A value per axis along x, y, z; one number stands for all axes."""
    if not isinstance(value, list | tuple):
        return (value,) * 3
    if len(value) != 3:
        raise ValueError(f"{len(value)} axes")
    return tuple(value[a] for a in axes)


def _labels(dataset: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Names in the order of their values, without background."""
    labels = nested(dataset, "labels")
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
    if not isinstance(channels, dict) or len(channels) != 1 or schemes != ["CTNormalization"]:
        raise SettingError(
            "images that clbench does not prepare so",
            where=folder / PLANS,
            expected="one channel, CTNormalization",
            got=f"channels {channels}, {schemes}",
            next_step="only a model of single CTs can be extended",
        )
    properties = plans.get(
        "foreground_intensity_properties_per_channel",
        plans.get("foreground_intensity_properties_by_modality"),
    )
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


def _triple(
    config: Mapping[str, Any], key: str, axes: Sequence[int], where: Path
) -> tuple[float, ...]:
    """Three positive numbers along x, y, z."""
    value = config.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(v) in (int, float) and v > 0 for v in value)
    ):
        raise SettingError(
            "the plans hold no size of three axes", where=f"{where}, {key}", got=value
        )
    return _turned(value, axes)


# ----------------------------------------------------------------------------------- the tensors


def renamed_tensors(
    tensors: Mapping[str, Tensor], shape: Architecture, axes: Sequence[int]
) -> dict[str, Tensor]:
    """Tensors under the names of `nnunet`, kernels in the order x, y, z.

    Args:
        tensors: of nnU-Net's `PlainConvUNet` or `ResidualEncoderUNet`, its second names included.
        shape: of the network.
        axes: where x, y and z stand among the axes of its kernels.

    Returns:
        Tensors; a name without a counterpart is kept, and the output layer is `output.…`.
    """
    last = len(shape.features_per_stage) - 2
    renamed = {}
    for full, tensor in tensors.items():
        name = re.sub(r"^(module\.|_orig_mod\.)*", "", full)  # of DDP, of torch.compile
        layer, _, kind = name.rpartition(".")
        if layer != f"decoder.seg_layers.{last}" and re.fullmatch(DUPLICATES, name):
            continue
        ours = f"{_renamed_layer(layer, last)}.{kind}"
        renamed[ours] = (
            tensor.permute(0, 1, *(2 + a for a in axes)).contiguous()
            if tensor.ndim == 5
            else tensor
        )
    return renamed


def _renamed_layer(layer: str, last: int) -> str:
    """A layer's name in `nnunet`; nnU-Net counts the decoder from the other end, up to `last`."""
    if layer == f"decoder.seg_layers.{last}":
        return "output"
    if (up := re.fullmatch(r"decoder\.transpconvs\.(\d+)", layer)) is not None:
        return f"decoder.up.{last - int(up[1])}"
    stacked = r"(encoder\.stem|encoder\.stages\.\d+\.0|decoder\.stages\.\d+)"
    if (conv := re.fullmatch(stacked + r"\.convs\.(\d+)\.(conv|norm)", layer)) is not None:
        start = conv[1].removesuffix(".0") if conv[1].startswith("encoder") else conv[1]
        if (stage := re.fullmatch(r"decoder\.stages\.(\d+)", start)) is not None:
            start = f"decoder.convolutions.{last - int(stage[1])}"
        return f"{start}.{3 * int(conv[2]) + (conv[3] == 'norm')}"
    block = r"(encoder\.stages\.\d+)\.blocks\.(\d+)\.(conv1|conv2|skip\.(\d))\.(conv|norm)"
    if (names := re.fullmatch(block, layer)) is not None:
        part = {"conv1": "first", "conv2": "second"}.get(names[3], "shortcut")
        place = int(names[4] or 0) + (names[5] == "norm")
        return f"{names[1]}.{names[2]}.{part}.{place}"
    return layer
