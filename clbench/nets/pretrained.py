"""Pretrained weights for a backbone: loaded safely, with a report of what fitted.

Names are matched from their end, because files wrap them differently (`module.`,
`state_dict`, `swinViT.`).
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.store.checkpoint import unpack

_WRAPS = ("module.", "backbone.", "model.", "net.")
_PARTS = ("encoder.", "decoder.", "swinViT.")
"""Parts of our backbones that a file of the part alone does not name."""
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
"""Names of the first Swin code → MONAI's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReport:
    """What became of the tensors of a file."""

    loaded: tuple[str, ...]
    """Backbone tensors that were set."""
    skipped: tuple[str, ...]
    """Tensors of the file that fit nowhere (another name or shape)."""
    missing: tuple[str, ...]
    """Backbone tensors the file does not set."""


def load_weights(backbone: nn.Module, path: Path) -> WeightReport:
    """Set every tensor of the backbone that the file holds under a like name and equal shape.

    Args:
        backbone: changed in place.
        path: `.pt`, `.pth` or `.safetensors`; only tensors are read, never code.

    Raises:
        SettingError: the file cannot be read safely, or nothing in it fits.
    """
    found = {_strip(name, _WRAPS): (name, t) for name, t in _tensors(_read(path)).items()}
    own = backbone.state_dict()
    short = Counter(_strip(name, _WRAPS + _PARTS) for name in own)
    loaded, used = [], set()
    for name, tensor in own.items():
        bare = _strip(name, _WRAPS + _PARTS)
        for key in (_strip(name, _WRAPS), bare if short[bare] == 1 else None):
            origin, value = found.get(key or "", (None, None))
            if origin is not None and value is not None and value.shape == tensor.shape:
                tensor.copy_(value)
                loaded.append(name)
                used.add(origin)
                break
    if not loaded:
        raise SettingError(
            "no tensor of the weights file fits the backbone",
            where=f"backbone.weights={path}",
            expected=f"names such as {next(iter(own))} {tuple(next(iter(own.values())).shape)}",
            got=", ".join(f"{n} {tuple(t.shape)}" for n, t in list(found.values())[:3])
            or "no tensors",
            next_step="choose the backbone and size the file was made for",
        )
    return WeightReport(
        loaded=tuple(loaded),
        skipped=tuple(sorted(n for n, _ in found.values() if n not in used)),
        missing=tuple(n for n in own if n not in loaded),
    )


def _strip(name: str, wraps: tuple[str, ...]) -> str:
    """The name without leading wrappers, in today's spelling."""
    while wrap := next((w for w in wraps if name.startswith(w)), None):
        name = name[len(wrap) :]
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return unpack(path)
    except FileNotFoundError:
        raise SettingError(
            "the file of backbone weights does not exist", where="backbone.weights", got=path
        ) from None
    except (OSError, ValueError, pickle.UnpicklingError, SafetensorError) as err:
        raise SettingError(
            "the file of backbone weights cannot be read safely",
            where=f"backbone.weights={path}",
            expected="tensors and plain containers, in .pt, .pth or .safetensors",
            got=str(err).splitlines()[0] if str(err) else type(err).__name__,
            next_step="save its state_dict again with torch.save or safetensors",
        ) from err


def _tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dictionaries, such as {"state_dict": {…}}."""
    found: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            elif key in ("state_dict", "model", "net", "model_state_dict", "network_weights"):
                found.update(_tensors(value))
    return found
