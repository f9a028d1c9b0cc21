"""MONAI bundles: weights, and what `metadata.json` says of channels; no expression is evaluated.

`configs/inference.json` is Python in disguise (`$…`, `_target_`). Of it only numbers are read that
stand there as numbers: the spacing and the window of the transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clbench.deployment.extension.foreign import ForeignWeights, weights_from_file
from clbench.deployment.extension.own_data import plain_name
from clbench.deployment.extension.weights_file import nested, read_settings, read_weights
from clbench.errors import SettingError

METADATA = Path("configs") / "metadata.json"
"""What makes a folder a bundle."""
WEIGHTS = ("models/model.safetensors", "models/model.pt")
"""Where its weights may lie; a TorchScript file (`model.ts`) is code and is not read."""


def weights_from_bundle(folder: Path, structures: Sequence[str] = ()) -> ForeignWeights:
    """The weights of a bundle.

    Args:
        folder: of the bundle.
        structures: names of the output channels; none: those of its metadata.

    Raises:
        SettingError: no weights, several images in, or channels without names.
    """
    metadata = read_settings(folder / METADATA)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise SettingError(
            "the bundle holds no weights that can be read",
            where=folder / "models",
            expected=" or ".join(WEIGHTS),
            got=", ".join(sorted(p.name for p in (folder / "models").glob("*"))) or "nothing",
            next_step="fetch the bundle with its weights; a TorchScript file is code",
        )
    formats = nested(metadata, "network_data_format")
    labels = tuple(structures) or _labels(formats, folder / METADATA)
    weights = weights_from_file(path, read_weights(path), labels)
    name = plain_name(str(metadata.get("name") or folder.absolute().name))[:40] or weights.name
    data, notes = _transforms(folder / "configs" / "inference.json")
    patch = nested(formats, "inputs", "image").get("spatial_shape")
    if isinstance(patch, list) and len(patch) == 3 and all(type(n) is int for n in patch):
        data["patch_vox"] = tuple(patch)
    return replace(weights, name=name, data=data, notes=notes)


def _labels(formats: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    """Names of the output channels from 1 on."""
    channels = nested(formats, "outputs", "pred", "channel_def")
    if not channels or not all(str(k).isdecimal() for k in channels):
        raise SettingError(
            "the bundle's metadata does not name the output channels",
            where=where,
            expected='network_data_format.outputs.pred.channel_def {"0": "background", …}',
            next_step="name them with --structures",
        )
    ordered = [str(channels[k]) for k in sorted(channels, key=int)]
    if sorted(map(int, channels)) != list(range(len(ordered))):
        raise SettingError("the output channels have gaps", where=where, got=", ".join(channels))
    return tuple(ordered[1:])


OTHER_INTENSITIES = (
    "NormalizeIntensityd", "ScaleIntensityd", "ScaleIntensityRangePercentilesd",
    "ClipIntensityPercentilesd", "HistogramNormalized",
)  # fmt: skip
"""Transforms after which a network sees other numbers than a window in HU, scaled to [0, 1]."""


def _transforms(path: Path) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """Spacing and window as far as they stand there as numbers, and notes on what does not.

    Raises:
        SettingError: the network saw other intensities, or images turned to other axes than RAS.
    """
    data: dict[str, tuple[float, ...]] = {}
    is_ras = False
    if path.is_file():
        for item in _tables(read_settings(path)):
            if not _acts_on_the_image(item):
                continue
            kind = str(item.get("_target_", "")).rpartition(".")[2]
            if kind == "Orientationd":
                is_ras |= _turns_to_ras(item, path)
            if kind == "Spacingd" and (spacing := _numbers(item.get("pixdim"), 3)):
                data.setdefault("spacing_mm", spacing)
            ends = [item.get("a_min"), item.get("a_max")]
            if kind == "ScaleIntensityRanged" and (window := _numbers(ends, 2)):
                data.setdefault("window_hu", window)
            target = [item.get("b_min"), item.get("b_max")]
            if kind in OTHER_INTENSITIES or (
                kind == "ScaleIntensityRanged" and _numbers(target, 2) not in (None, (0, 1))
            ):
                raise SettingError(
                    "the bundle's network was taught on intensities that clbench does not make",
                    where=path,
                    expected="ScaleIntensityRanged from a window in HU to 0 and 1 alone",
                    got=kind if kind in OTHER_INTENSITIES else f"b_min, b_max = {target}",
                    next_step="name the file of weights alone, if it was taught as clbench does: "
                    "data.window_hu to [0, 1]",
                )
    notes = []
    if absent := [f"data.{n}" for n in ("spacing_mm", "window_hu") if n not in data]:
        notes.append(
            f"{' and '.join(absent)} do not stand in {path.name} as numbers (expressions are not "
            "evaluated): those of the profile hold, or what --set says"
        )
    if not is_ras:
        notes.append(
            f"no Orientationd in {path.name} says how images were turned for the network: they "
            "are turned to RAS here, and must have been there"
        )
    return data, tuple(notes)


def _turns_to_ras(transform: Mapping[str, Any], path: Path) -> bool:
    """Whether an `Orientationd` turns images as clbench does; False: an expression says how.

    Raises:
        SettingError: it turns them in another way.
    """
    if transform.get("as_closest_canonical") is True:  # RAS, whatever axcodes say
        return True
    axes = transform.get("axcodes", "$")
    axes = "".join(map(str, axes)) if isinstance(axes, list) else str(axes)
    if axes.startswith(("@", "$")):
        return False
    if axes != "RAS":
        raise SettingError(
            "the bundle's network was taught on images turned in a way that clbench does not turn",
            where=f"{path}, Orientationd",
            expected="axcodes RAS",
            got=f"axcodes {axes}",
            next_step="name the file of weights alone, if it was taught on images turned to RAS; "
            "otherwise teach the network with axcodes RAS",
        )
    return True


def _acts_on_the_image(transform: Mapping[str, Any]) -> bool:
    """Whether a transform may change the image: by its keys, where they stand there as words."""
    keys = transform.get("keys", "image")
    words = keys if isinstance(keys, list) else [keys]
    named = any(word == "image" or str(word).startswith(("@", "$")) for word in words)
    return named and transform.get("_disabled_") is not True


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object within a JSON value."""
    pending = [value]
    while pending:
        item = pending.pop(0)
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    return tuple(value) if all(type(v) in (int, float) for v in value) else None
