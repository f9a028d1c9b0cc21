"""Weights from elsewhere: the outputs of the foreign network, and names for what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import NAMES, built, read
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR
from own_cts import write_own_cts
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench.deployment.extension.extend import ExtendSettings, extend
from clbench.deployment.trained import load_trained
from clbench.errors import SettingError, StoreError
from clbench.run.verify import verify_run
from clbench.spec.settings import load_profile
from clbench.store.record import RunRecord


def basic_unet(size: int = 8, outputs: int = 3) -> nn.Module:
    torch.manual_seed(3)
    features = (size, size, 2 * size, 4 * size, 8 * size, size)
    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=outputs, features=features)


def swin(outputs: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return SwinUNETR(in_channels=1, out_channels=outputs, feature_size=12)


def saved(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), path)
    return path


@pytest.mark.parametrize(
    ("make", "patch", "name", "size"),
    [(basic_unet, (32, 32, 32), "unet", 8), (swin, (64, 32, 32), "swin_unetr", 12)],
)
def test_the_model_answers_as_the_foreign_network_does(
    make: Any, patch: tuple[int, int, int], name: str, size: int, tmp_path: Path
) -> None:
    network = make().eval()
    wrapped = {f"module.{n}": t for n, t in network.state_dict().items()}
    learned = read(saved(tmp_path / "Best Model.pt", {"state_dict": wrapped, "epoch": 7}))
    assert (learned.profile.backbone.name, learned.profile.backbone.size) == (name, size)
    assert (learned.name, learned.structures) == ("best_model", NAMES)
    image = torch.rand(1, 1, *patch)
    with torch.no_grad():
        torch.testing.assert_close(built(learned)(image).logits, network(image))


def test_a_bundle_says_channels_spacing_and_window_and_no_expression_is_evaluated(
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "my_bundle"
    saved(bundle / "models" / "model.pt", basic_unet().state_dict())
    (bundle / "configs").mkdir()
    channels = {"0": "background", "2": "Liver", "1": "Spleen"}
    image = {"spatial_shape": [96, 96, 96]}
    formats = {"inputs": {"image": image}, "outputs": {"pred": {"channel_def": channels}}}
    about = {"name": "Two organs", "network_data_format": formats}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(about))
    trap = tmp_path / "executed"
    transforms: list[dict[str, Any]] = [
        {"_target_": "Spacingd", "pixdim": [2.0, 2.0, 3.0]},
        {"_target_": "ScaleIntensityRanged", "a_min": f"$open('{trap}', 'w')", "a_max": 250},
    ]
    inference = bundle / "configs" / "inference.json"
    inference.write_text(json.dumps({"preprocessing": {"transforms": transforms}}))
    learned = read(bundle, ())
    assert (learned.name, learned.structures) == ("two_organs", NAMES)
    assert learned.profile.data.spacing_mm == (2.0, 2.0, 3.0)
    assert learned.profile.data.patch_vox == (96, 96, 96)
    assert learned.profile.data.window_hu == load_profile("smoke").data.window_hu
    assert any("data.window_hu" in note for note in learned.notes)
    assert not trap.exists()
    literal = [transforms[0], {**transforms[1], "a_min": -100}]
    inference.write_text(json.dumps({"preprocessing": literal}))
    assert read(bundle, ()).profile.data.window_hu == (-100, 250)
    assert read(bundle, ("aorta", "colon")).structures == ("aorta", "colon")
    assert (
        read(bundle, (), overrides=("data.spacing_mm=4,4,4",)).profile.data.spacing_mm == (4,) * 3
    )


@pytest.mark.parametrize(
    ("transform", "got"),
    [
        ({"_target_": "NormalizeIntensityd", "nonzero": True}, "NormalizeIntensityd"),
        ({"_target_": "ScaleIntensityd", "minv": -1.0, "maxv": 1.0}, "ScaleIntensityd"),
        (
            {
                "_target_": "ScaleIntensityRanged",
                "a_min": -57,
                "a_max": 164,
                "b_min": -1.0,
                "b_max": 1,
            },
            "b_min, b_max = [-1.0, 1]",
        ),
    ],
)
def test_a_bundle_whose_network_saw_other_intensities_is_refused(
    transform: dict[str, Any], got: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    saved(bundle / "models" / "model.pt", basic_unet().state_dict())
    (bundle / "configs").mkdir()
    (bundle / "configs" / "metadata.json").write_text("{}")
    inference = bundle / "configs" / "inference.json"
    inference.write_text(json.dumps({"preprocessing": {"transforms": [transform]}}))
    with pytest.raises(SettingError, match="intensities that clbench does not make") as err:
        read(bundle, NAMES)
    assert err.value.got == got
    plain = {
        "_target_": "ScaleIntensityRanged",
        "a_min": -57,
        "a_max": 164,
        "b_min": 0.0,
        "b_max": 1,
    }
    off = {**transform, "_disabled_": True}
    of_masks = {"transforms": [{**transform, "keys": "pred"}]}
    whole = {"preprocessing": {"transforms": [off, plain]}, "postprocessing": of_masks}
    inference.write_text(json.dumps(whole))
    assert read(bundle, NAMES).profile.data.window_hu == (-57, 164)


def test_a_bundle_whose_network_saw_turned_images_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    saved(bundle / "models" / "model.pt", basic_unet().state_dict())
    (bundle / "configs").mkdir()
    (bundle / "configs" / "metadata.json").write_text("{}")
    inference = bundle / "configs" / "inference.json"

    def notes(**turned: object) -> list[str]:
        transform = {"_target_": "monai.transforms.Orientationd", "keys": ["image"], **turned}
        inference.write_text(json.dumps({"preprocessing": {"transforms": [transform]}}))
        return [note for note in read(bundle, NAMES).notes if "turned to RAS" in note]

    for axcodes in ("LPS", ["L", "P", "S"]):
        with pytest.raises(SettingError, match="taught on images turned") as err:
            notes(axcodes=axcodes)
        assert (err.value.expected, err.value.got) == ("axcodes RAS", "axcodes LPS")
        assert err.value.next_step
    assert notes(axcodes="RAS") == notes(as_closest_canonical=True) == []
    # another transform, one of the label alone, one that is off, one that is not evaluated
    for unknown in (
        {"_target_": "EnsureTyped"},
        {"axcodes": "LPS", "keys": "label"},
        {"axcodes": "LPS", "_disabled_": True},
        {"axcodes": "@axes"},
    ):
        assert len(notes(**unknown)) == 1


def test_safetensors_are_read_and_unknown_structures_declared(tmp_path: Path) -> None:
    save_file(basic_unet().state_dict(), tmp_path / "w.safetensors")
    learned = read(tmp_path / "w.safetensors", ("Spleen", "Odd Cyst"))
    assert learned.structures == ("spleen", "odd_cyst")
    assert [(s.name, s.kind) for s in learned.declares] == [("odd_cyst", "cyst")]


def altered(**changes: Tensor | None) -> dict[str, Any]:
    state = {**basic_unet().state_dict(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {n: t for n, t in state.items() if t is not None}


@pytest.mark.parametrize(
    ("content", "structures", "says"),
    [
        (altered(), (), "nothing says which structures"),
        (altered(), ("spleen",), "another number of output channels"),
        (altered(), ("spleen", "liver", "aorta"), "one sigmoid per structure"),
        (altered(), ("spleen", "Spleen"), "named twice"),
        (altered(extra__weight=torch.zeros(3)), NAMES, r"extra.weight \(3,\)"),
        (altered(final_conv__weight=None), NAMES, "no single 1x1x1 convolution"),
        (altered(conv_0__conv_1__conv__weight=None), NAMES, "open"),
        ({"conv.weight": torch.zeros(3, 3)}, NAMES, "a network that clbench does not have"),
        ({}, NAMES, "no tensors"),
        (SegResNet(init_filters=8, out_channels=3).state_dict(), NAMES, "conv_final.0"),
        ({"bench": "x", "structures": [], "model": {}}, NAMES, "without its run"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    content: dict[str, Any], structures: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=says):
        read(saved(tmp_path / "w.pt", content), structures)


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing that can be extended"):
        read(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(SettingError, match="no weights that can be read"):
        read(tmp_path)


def test_foreign_weights_are_extended_as_a_run(tmp_path: Path, cache_root: Path) -> None:
    path = saved(tmp_path / "two.pt", basic_unet().state_dict())
    settings = ExtendSettings(
        model=path,
        learn=("spleen_cyst",),
        inside="spleen",
        structures=NAMES,
        profile="smoke",
        data=write_own_cts(tmp_path / "cts", cache_root, 3),
        overrides=("data.patch_vox=32,32,32",),
        out=tmp_path / "results",
        cache=cache_root,
    )
    found = extend(settings)
    record = RunRecord.read(found)
    assert (record.strategy, record.course.structures) == (
        "frozen_softmax",
        (*NAMES, "spleen_cyst"),
    )
    assert record.extends is not None
    assert record.extends["weights"] == str(path)
    verify_run(found)
    old, new = (load_trained(found, step=step).server.model.state_dict() for step in (1, 2))
    assert all(torch.equal(old[n], new[n]) for n in old)
    for wrong in ({"step": 2}, {"strategy": "frozen"}):
        with pytest.raises(SettingError, match=r"no steps|do not fit"):
            extend(replace(settings, **wrong, out=tmp_path / "other"))
    with pytest.raises(SettingError, match="a run says itself"):
        extend(replace(settings, model=found))
