"""Trained folders as nnU-Net v2 leaves them, of networks whose parameters follow a rule.

Names, shapes and answers of nnU-Net's own networks are in `golden/nnunet_networks.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locations import GOLDEN_FILES
from torch import Tensor

LABELS = {"background": 0, "liver": 2, "spleen": 1}
INTENSITIES = {"percentile_00_5": -100.0, "percentile_99_5": 300.0, "mean": 50.0, "std": 80.0}
NETWORK = "dynamic_network_architectures.architectures.unet."
LAYERS = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def golden(network: str) -> dict[str, Any]:
    """`plain` or `residual`: its `arch_kwargs`, parameters and answers."""
    content: dict[str, Any] = json.loads((GOLDEN_FILES / "nnunet_networks.json").read_text())
    return content[network]  # type: ignore[no-any-return]


def filled(parameters: Iterable[tuple[str, Sequence[int], Sequence[str]]]) -> dict[str, Tensor]:
    """Tensors by a rule, under each of their names."""
    state = {}
    for k, (name, shape, aliases) in enumerate(parameters):
        count = int(np.prod(shape))
        values = np.sin(1.0 + 0.7 * k + 1.3 * np.arange(count) ** 1.1)
        scale = 1.6 / np.sqrt(count / shape[0]) if len(shape) > 1 else 0.2
        values = scale * values + (len(shape) == 1 and name.endswith("weight"))
        tensor = torch.from_numpy(values.reshape(shape).astype(np.float32))
        state.update(dict.fromkeys([name, *aliases], tensor))
    return state


def image_hu(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Whole HU from -400 to 600, inside and outside of the window."""
    count = int(np.prod(shape))
    values = 100 + 500 * np.sin(0.37 * np.arange(count)) * np.cos(0.011 * np.arange(count))
    return np.round(values).reshape(shape).astype(np.float32)


def plans_of(network: str, **changes: Any) -> dict[str, Any]:
    """`plans.json` of a golden network; spacing and patch along its own axes."""
    case = golden(network)
    return {
        "dataset_name": "Dataset007_Two",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
        "configurations": {
            "3d_fullres": {
                "spacing": [3.0, 2.0, 1.0],
                "patch_size": [8, 16, 16],
                "normalization_schemes": ["CTNormalization"],
                "architecture": {
                    "network_class_name": NETWORK + case["class"],
                    "arch_kwargs": {**case["arch_kwargs"], **LAYERS},
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
        **changes,
    }


def write_trained(
    folder: Path,
    network: str,
    plans: Mapping[str, Any],
    labels: Mapping[str, Any] = LABELS,
    **content: Any,
) -> Path:
    """A trained folder with one fold, as `nnUNetv2_train` leaves it.

    Args:
        folder: where it goes.
        network: `plain` or `residual`.
        plans: its `plans.json`.
        labels: of its `dataset.json`.
        content: other parts of the checkpoint.
    """
    folder = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    dataset = {"channel_names": {"0": "CT"}, "labels": dict(labels), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    arguments = {"plans": dict(plans), "configuration": "3d_fullres", "fold": 0}
    checkpoint = {
        "network_weights": filled(golden(network)["parameters"]),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"ema_fg_dice": [np.float64(0.9)], "train_losses": [np.float32(0.1)]},
        "_best_ema": np.float64(0.9),
        "current_epoch": 1000,
        "init_args": {**arguments, "dataset_json": dataset, "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **content,
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder
