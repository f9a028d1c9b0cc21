"""Weights from files: matched by name, reported, and never run as code."""

from __future__ import annotations

import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR
from safetensors.torch import save_file

from clbench.errors import SettingError
from clbench.nets.backbones import segresnet, small_unet, swin_unetr, unet
from clbench.nets.pretrained import load_weights
from clbench.spec import registry


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return small_unet(8).state_dict()


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module", "safetensors"])
def test_every_wrapping_is_understood(
    wrap: str, source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if wrap == "safetensors" else "w.pt")
    if wrap == "safetensors":
        save_file(source, path)
    elif wrap == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.items()}, "epoch": 3}, path)
    else:
        torch.save({"state_dict": source} if wrap == "state_dict" else source, path)
    backbone = small_unet(8)
    report = load_weights(backbone, path)
    assert set(report.loaded) == set(source)
    assert report.skipped == report.missing == ()
    assert all(torch.equal(v, source[k]) for k, v in backbone.state_dict().items())


def test_what_does_not_fit_is_reported(source: dict[str, torch.Tensor], tmp_path: Path) -> None:
    encoder = {n: t for n, t in source.items() if n.startswith("encoder.")}
    torch.save({**encoder, "out.conv.weight": torch.zeros(2)}, tmp_path / "w.pt")
    report = load_weights(small_unet(8), tmp_path / "w.pt")
    assert set(report.loaded) == set(encoder)
    assert report.skipped == ("out.conv.weight",)
    assert set(report.missing) == set(source) - set(encoder)
    done, of = report.parts["encoder"]
    assert done == of == len(encoder)
    assert report.parts["decoder"][0] == 0


def test_less_than_nine_tenths_of_a_part_is_refused_and_changes_nothing(
    source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    names = [n for n in source if n.startswith("encoder.")]
    for wrong in ("absent", "of another shape"):
        part = {n: source[n] for n in names}
        for n in names[: len(names) // 3]:
            if wrong == "absent":
                del part[n]
            else:
                part[n] = torch.zeros(3)
        torch.save(part, tmp_path / "w.pt")
        backbone = small_unet(8)
        before = {n: t.clone() for n, t in backbone.state_dict().items()}
        with pytest.raises(SettingError, match="of a part of the network") as err:
            load_weights(backbone, tmp_path / "w.pt")
        assert names[0] in str(err.value)
        assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())


def whole(name: str) -> torch.nn.Module:
    """A whole network of MONAI, with its output layer, of the size our backbone has."""
    if name == "swin_unetr":
        return SwinUNETR(in_channels=1, out_channels=14, feature_size=12)
    if name == "segresnet":
        return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=14)
    return BasicUNet(spatial_dims=3, in_channels=1, out_channels=14, features=(8, 8, 16, 32, 64, 8))


BUILT = {
    "swin_unetr": lambda: swin_unetr(12),
    "segresnet": lambda: segresnet(8),
    "unet": lambda: unet(8),
}
WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "module": lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    "a wrapper of any name": lambda s: {"model": {f"student.net.{n}": t for n, t in s.items()}},
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", BUILT)
def test_a_whole_network_in_monais_own_naming_arrives_whole(
    name: str, wrap: str, tmp_path: Path
) -> None:
    """Every parameter: two of one shape that change places would be seen."""
    net = whole(name)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    torch.save(WRAPPED[wrap](net.state_dict()), tmp_path / "w.pt")
    backbone = BUILT[name]()
    report = load_weights(backbone, tmp_path / "w.pt")
    assert report.missing == ()
    assert all(done == of for done, of in report.parts.values())
    theirs = net.state_dict()
    for place, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, theirs[of_monai(place)]), place


def of_monai(place: str) -> str:
    """Where a tensor of our backbone lies in MONAI's network: parts are ours, numbers from 1."""
    name = re.sub(r"^(encoder|decoder)\.", "", place)
    for ours, monai in (("down", "down"), ("up", "upcat")):
        if (layer := re.match(rf"{ours}\.(\d)\.", name)) is not None:
            return f"{monai}_{int(layer[1]) + 1}.{name[layer.end() :]}"
    return name


@pytest.mark.parametrize(
    "prefix", ["swinViT.", "module.", "module.swinViT.", "encoder.swinViT.", ""]
)
def test_the_encoder_of_a_swin_network_alone(prefix: str, tmp_path: Path) -> None:
    net = whole("swin_unetr")
    torch.save({f"{prefix}{n}": t for n, t in net.swinViT.state_dict().items()}, tmp_path / "w.pt")
    report = load_weights(swin_unetr(12), tmp_path / "w.pt")
    done, of = report.parts["encoder.swinViT"]
    assert done == of > 100
    assert report.parts["decoder"][0] == report.parts["encoder"][0] == 0
    assert report.skipped == ()


def test_a_network_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save(whole("swin_unetr").state_dict(), tmp_path / "w.pt")
    with pytest.raises(SettingError) as err:
        load_weights(swin_unetr(24), tmp_path / "w.pt")
    assert "size the file was made for" in str(err.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.to_sparse(), "torch.sparse_coo"),
        (lambda t: t.to("meta"), "strided"),
        (lambda t: t.to(torch.cfloat), "complex64"),
        (lambda t: torch.full_like(t, math.nan), "are not, as torch.float32"),
        (lambda t: torch.full_like(t, 1e300, dtype=torch.float64), "are not, as torch.float32"),
    ],
    ids=["sparse", "meta", "complex", "nan", "overflow"],
)
def test_tensors_without_finite_real_numbers_are_refused_and_change_nothing(
    spoil: Any, says: str, source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    last = [name for name, tensor in source.items() if tensor.is_floating_point()][-1]
    torch.save({**source, last: spoil(source[last])}, tmp_path / "w.pt")
    network = small_unet(8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(SettingError, match="cannot be used") as err:
        load_weights(network, tmp_path / "w.pt")
    assert says in str(err.value)
    assert last in str(err.value)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_declared_training_data_and_its_overlap(
    source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sources = registry.benchmark("tumor_ext").sources
    torch.save({"state_dict": source, "training_data": ["BTCV", "a ward"]}, tmp_path / "w.pt")
    report = load_weights(small_unet(8), tmp_path / "w.pt")
    assert report.trained_on == "BTCV, a ward"
    assert report.overlap(sources) == ("btcv",)
    save_file(source, tmp_path / "w.safetensors", metadata={"training_data": "LiTS"})
    assert load_weights(small_unet(8), tmp_path / "w.safetensors").overlap(sources) == ("lits",)
    bundle = tmp_path / "bundle"
    (bundle / "models").mkdir(parents=True)
    (bundle / "configs").mkdir()
    torch.save(source, bundle / "models" / "model.pt")
    plain = load_weights(small_unet(8), bundle / "models" / "model.pt")
    assert (plain.trained_on, plain.overlap(sources)) == ("", ())
    (bundle / "configs" / "metadata.json").write_text(
        '{"data_source": "https://www.synapse.org/#!Synapse:syn3193805/wiki/217789"}'
    )
    told = load_weights(small_unet(8), bundle / "models" / "model.pt")
    assert told.overlap(sources) == ("btcv",)


def test_self_supervised_swin_weights_under_their_old_names(tmp_path: Path) -> None:
    backbone = swin_unetr(12)
    old = {
        f"module.{k.removeprefix('encoder.swinViT.')}".replace(
            ".mlp.linear1.", ".mlp.fc1."
        ).replace(".mlp.linear2.", ".mlp.fc2."): v + 1
        for k, v in backbone.state_dict().items()
        if "swinViT" in k and v.is_floating_point()
    }
    torch.save({"state_dict": old}, tmp_path / "w.pt")
    want = {
        k: v.clone() + 1
        for k, v in backbone.state_dict().items()
        if "swinViT" in k and v.is_floating_point()
    }
    report = load_weights(backbone, tmp_path / "w.pt")
    assert set(report.loaded) == set(want)
    assert all(torch.equal(backbone.state_dict()[k], v) for k, v in want.items())


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


def test_a_hostile_file_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(SettingError, match="cannot be read safely"):
        load_weights(small_unet(8), tmp_path / "w.pt")
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_broken_and_foreign_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="does not exist"):
        load_weights(small_unet(8), tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(SettingError, match="cannot be read safely") as err:
        load_weights(small_unet(8), tmp_path / name)
    assert name in str(err.value)


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(SettingError, match="no tensor") as err:
        load_weights(small_unet(8), tmp_path / "w.pt")
    assert "encoder.blocks.0" in str(err.value)
