"""Trained folders of nnU-Net v2: the network's own answers, and what is no such network is named."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import built, read
from nnunet_folders import golden, image_hu, plans_of, write_trained

from clbench.deployment.extension.nnunet import weights_from_nnunet
from clbench.errors import SettingError
from clbench.nets.nnunet import read_architecture

CONFIG = "configurations/3d_fullres"
ARCH = f"{CONFIG}/architecture/arch_kwargs"
NETWORKS = ("plain", "residual")


def set_at(plans: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = path.split("/")
    for key in keys:
        plans = plans[key]
    plans[last] = value


def answers(folder: Path, axes: tuple[int, int, int]) -> torch.Tensor:
    """Logits of a window of HU, along the axes of nnU-Net's network.

    Args:
        folder: trained.
        axes: where x, y and z stand among them.
    """
    learned = read(folder, ())
    low, high = learned.profile.data.window_hu or (0.0, 1.0)
    hu = torch.from_numpy(image_hu((8, 16, 16))).clamp(low, high)
    window = ((hu - low) / (high - low)).permute(axes)[None, None]
    with torch.no_grad():
        logits = built(learned)(window).logits[0]
    return logits.permute(0, *(1 + a for a in np.argsort(axes)))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("forward", [[0, 1, 2], [1, 0, 2], [2, 0, 1]])
def test_it_answers_as_nnunets_own_network_does(
    network: str, forward: list[int], tmp_path: Path
) -> None:
    """Kernels of 1 x 3 x 3, strides of 1 x 2 x 2, edges of the window included."""
    folder = write_trained(tmp_path, network, plans_of(network, transpose_forward=forward))
    axes = (forward.index(2), forward.index(1), forward.index(0))
    logits = answers(folder, axes)
    expected = golden(network)
    every_97th = torch.tensor(expected["logits_every_97th"])
    torch.testing.assert_close(logits.flatten(1)[:, ::97], every_97th, rtol=0, atol=1e-5)
    sums = torch.tensor(expected["sums"], dtype=torch.float64)
    torch.testing.assert_close(logits.double().sum((1, 2, 3)), sums, rtol=0, atol=1e-2)


def test_the_plans_say_how_images_are_prepared(tmp_path: Path) -> None:
    plans = plans_of("plain", transpose_forward=[1, 0, 2])  # the network's axes are y, z, x
    set_at(plans, f"{CONFIG}/patch_size", [8, 12, 16])
    learned = read(write_trained(tmp_path, "plain", plans), ())
    assert (learned.name, learned.structures) == ("dataset007_two", ("spleen", "liver"))
    data, net = learned.profile.data, learned.profile.backbone
    assert (net.name, net.size) == ("nnunet", 4)
    assert (data.spacing_mm, data.window_hu) == ((1.0, 3.0, 2.0), (-100.0, 300.0))
    assert data.patch_vox == (16, 8, 12)
    assert read_architecture(net.architecture or "").kernel_sizes[0] == (3, 1, 3)
    assert learned.notes == ()


def old_style(plans: dict[str, Any]) -> None:
    """The keys of nnU-Net's plans before 2024."""
    config = plans["configurations"]["3d_fullres"]
    kind = config["architecture"]["network_class_name"].rpartition(".")[2]
    options = config.pop("architecture")["arch_kwargs"]
    config |= {
        "UNet_class_name": kind,
        "UNet_base_num_features": 4,
        "unet_max_num_features": 6,
        "n_conv_per_stage_encoder": options.get(
            "n_conv_per_stage", options.get("n_blocks_per_stage")
        ),
        "n_conv_per_stage_decoder": options["n_conv_per_stage_decoder"],
        "pool_op_kernel_sizes": options["strides"],
        "conv_kernel_sizes": options["kernel_sizes"],
        "num_pool_per_axis": [1, 2, 2],
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_plans_of_before_2024_say_the_same(network: str, tmp_path: Path) -> None:
    plans = plans_of(network)
    new = weights_from_nnunet(write_trained(tmp_path / "new", network, plans))
    old_style(plans)
    assert (
        weights_from_nnunet(write_trained(tmp_path / "old", network, plans)).architecture
        == new.architecture
    )


def test_the_checkpoint_says_which_configuration_it_is_of(tmp_path: Path) -> None:
    plans = plans_of("plain")
    every = plans["configurations"]
    every["3d_lowres"] = {"inherits_from": "3d_fullres", "spacing": [6.0, 4.0, 2.0]}
    every["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    every["2d"] = {"patch_size": [16, 16]}
    said = {"init_args": {"configuration": "3d_lowres"}}
    folder = write_trained(tmp_path / "lowres", "plain", plans, **said)
    assert weights_from_nnunet(folder).data["spacing_mm"] == (2.0, 4.0, 6.0)
    for name, says in (("3d_cascade_fullres", "cascade"), ("2d", "of slices")):
        said = {"init_args": {"configuration": name}}
        with pytest.raises(SettingError, match=says):
            weights_from_nnunet(write_trained(tmp_path / name, "plain", plans, **said))
    folder = write_trained(tmp_path / "silent", "plain", plans, init_args=None)
    assert weights_from_nnunet(folder).data["spacing_mm"] == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("reader", "mirrored", "notes"),
    [("SimpleITKIO", (0, 1, 2), 0), ("SimpleITKIO", None, 1), ("SimpleITKIO", (0, 2), 1),
     ("NibabelIOWithReorient", None, 0)],
)  # fmt: skip
def test_a_network_that_may_depend_on_the_direction_of_its_images_is_noted(
    reader: str, mirrored: tuple[int, ...] | None, notes: int, tmp_path: Path
) -> None:
    folder = write_trained(
        tmp_path,
        "plain",
        plans_of("plain", image_reader_writer=reader),
        inference_allowed_mirroring_axes=mirrored,
    )
    assert len(weights_from_nnunet(folder).notes) == notes


def test_of_several_folds_the_first_is_taken_and_said(tmp_path: Path) -> None:
    folder = write_trained(tmp_path, "plain", plans_of("plain"))
    (folder / "fold_0").rename(folder / "fold_all")
    (folder / "fold_3").mkdir()
    (folder / "fold_3" / "checkpoint_final.pth").write_bytes(b"")
    (folder / "fold_1").mkdir()  # not trained yet
    with pytest.raises(SettingError, match="cannot be read"):
        weights_from_nnunet(folder)
    (folder / "fold_all" / "checkpoint_final.pth").rename(
        folder / "fold_3" / "checkpoint_final.pth"
    )
    assert weights_from_nnunet(folder).path.parent.name == "fold_3"


def test_a_fold_or_its_checkpoint_chooses_the_fold(tmp_path: Path) -> None:
    folder = write_trained(tmp_path, "plain", plans_of("plain"))
    shutil.copytree(folder / "fold_0", folder / "fold_4")
    final = folder / "fold_4" / "checkpoint_final.pth"
    (note,) = weights_from_nnunet(folder).notes
    assert note.startswith("of 2 folds fold_0 is taken, 3d_fullres")
    shutil.copyfile(final, best := final.with_name("checkpoint_best.pth"))
    for chosen, path in ((final.parent, final), (final, final), (best, best)):
        weights = weights_from_nnunet(chosen)
        assert (weights.path, weights.notes) == (path, ())
        assert read(chosen, ()).structures == ("spleen", "liver")
    shutil.copyfile(final, alone := tmp_path / "checkpoint_final.pth")
    with pytest.raises(SettingError, match="without the folder it was trained in"):
        read(alone, ("spleen", "liver"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: set_at(p, f"{CONFIG}/architecture/network_class_name", "a.ResidualUNet"),
         "ResidualUNet"),
        (lambda p: set_at(p, f"{ARCH}/n_stages", 9), "for 9 stages"),
        (lambda p: set_at(p, f"{ARCH}/n_stages", 10**9), "for 1000000000 stages"),
        (lambda p: set_at(p, f"{ARCH}/kernel_sizes", [[2, 3, 3]] * 3), "kernel_sizes"),
        (lambda p: set_at(p, f"{ARCH}/kernel_sizes", [[3, 3]] * 3), "2 axes"),
        (lambda p: set_at(p, f"{ARCH}/features_per_stage", "$open('x')"), "features_per_stage"),
        (lambda p: set_at(p, f"{ARCH}/features_per_stage", [10**9] * 3), "features_per_stage"),
        (lambda p: set_at(p, f"{ARCH}/nonlin", "torch.nn.ReLU"), "nonlin torch.nn.ReLU"),
        (lambda p: set_at(p, f"{ARCH}/nonlin", None), "nonlin None"),
        (lambda p: set_at(p, f"{ARCH}/norm_op", "torch.nn.BatchNorm3d"), "BatchNorm3d"),
        (lambda p: set_at(p, f"{ARCH}/dropout_op", "os.system"), r"dropout_op os\.system"),
        (lambda p: p["configurations"]["3d_fullres"]["architecture"].pop("arch_kwargs"), "norm_op"),
        (lambda p: set_at(p, f"{CONFIG}/normalization_schemes", ["ZScoreNormalization"]), "ZScore"),
        (lambda p: set_at(p, f"{CONFIG}/spacing", [1.0]), "no size of three axes"),
        (lambda p: set_at(p, "transpose_forward", [2, 0, 0]), "transpose_forward"),
        (lambda p: set_at(p, "foreground_intensity_properties_per_channel", {}), "normalized"),
        (lambda p: p.pop("configurations"), "do not have the configuration"),
        (lambda p: set_at(p, f"{ARCH}/features_per_stage", [8, 8, 8]), "fits the backbone"),
        (lambda p: set_at(p, f"{ARCH}/n_conv_per_stage", [2, 2, 2]), "sets 20 of 24"),
        (lambda p: set_at(p, f"{ARCH}/n_conv_per_stage", [2, 1, 1]), "no further tensors"),
    ],
)  # fmt: skip
def test_what_is_no_such_network_is_named(
    change: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    plans = copy.deepcopy(plans_of("plain"))
    change(plans)
    with pytest.raises(SettingError, match=says):
        read(write_trained(tmp_path, "plain", plans), ())


def test_regions_missing_folds_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_trained(tmp_path, "plain", plans_of("plain"))
    regions = {"background": 0, "whole_liver": [1, 2], "liver_tumor": 2}
    dataset = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**dataset, "labels": regions}))
    with pytest.raises(SettingError, match="no plain list"):
        weights_from_nnunet(folder)
    (folder / "dataset.json").write_text(
        json.dumps({**dataset, "channel_names": {"0": "T1", "1": "T2"}})
    )
    with pytest.raises(SettingError, match="one channel"):
        weights_from_nnunet(folder)
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.save({"epoch": 3}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(SettingError, match="no weights of nnU-Net"):
        weights_from_nnunet(folder)
    (folder / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(SettingError, match="holds no weights of a fold"):
        weights_from_nnunet(folder)
