"""Pretrained weights for a backbone: loaded safely, with a report of what fitted.

Names are matched with wrappers and parts stripped on both sides, because files wrap them
differently: a whole network in MONAI's own naming (`swinViT.…`, `encoder1.…`, `decoder5.…`), its
encoder alone, either of them below `state_dict`, `module.` or `swinViT.`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from clbench.errors import SettingError, first_line
from clbench.spec.benchmark import Source
from clbench.store.checkpoint import unpack

_WRAPS = ("module.", "backbone.", "model.", "net.", "network.", "swin_unetr.", "_orig_mod.")
_PARTS = ("encoder.", "decoder.", "swinViT.")
"""Parts of our backbones that a file of the part alone does not name."""
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
"""Names of the first Swin code → MONAI's."""
_LISTS = {"down": "down", "upcat": "up"}
"""Numbered layers of MONAI's BasicUNet, from 1 → lists of ours, from 0."""
_CONTAINERS = ("state_dict", "model", "net", "network", "model_state_dict", "network_weights")
"""Keys of a checkpoint below which the tensors lie."""
LEAST_SET = 0.9
"""Share of a part's parameters that a file must set once it names one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightReport:
    """What became of the tensors of a file."""

    loaded: tuple[str, ...]
    """Backbone tensors that were set."""
    skipped: tuple[str, ...]
    """Tensors of the file that fit nowhere (another name or shape)."""
    missing: tuple[str, ...]
    """Backbone tensors the file does not set."""
    parts: Mapping[str, tuple[int, int]]
    """Part of the backbone → parameters that were set, and how many it has."""
    trained_on: str = ""
    """What the weights declare to be trained on; empty: they do not say."""

    def overlap(self, sources: Iterable[Source]) -> tuple[str, ...]:
        """Sources that the declared training data names: by name, by title, or by address."""
        said = self.trained_on.casefold()
        return tuple(
            s.name
            for s in sources
            if any(
                word and word.casefold() in said
                for word in (s.name, s.title, s.url.rstrip("/").rpartition("/")[2].split(":")[-1])
            )
        )


def load_weights(backbone: nn.Module, path: Path) -> WeightReport:
    """Set every tensor of the backbone that the file holds under a like name and equal shape.

    Args:
        backbone: changed in place; not at all where an error is raised.
        path: `.pt`, `.pth` or `.safetensors`; only tensors are read, never code.

    Raises:
        SettingError: the file cannot be read safely, nothing in it fits, or it sets less than
            `LEAST_SET` of a part that it names.
    """
    return set_weights(backbone, _read(path), path)


def set_weights(backbone: nn.Module, content: Any, path: Path) -> WeightReport:
    """As `load_weights`, with what was read of a file.

    Args:
        backbone: changed in place; not at all where an error is raised.
        content: tensors by name, alone or below a key such as `state_dict`.
        path: where it was read; for errors, and for what a MONAI bundle says of its training data.

    Raises:
        SettingError: nothing in it fits, it sets less than `LEAST_SET` of a part that it names, or
            a tensor that fits holds no finite real numbers.
    """
    tensors = tensors_of(content)
    own = backbone.state_dict()
    named = _matched(own, tensors)
    fits = {n: origin for n, origin in named.items() if tensors[origin].shape == own[n].shape}
    if not fits:
        raise SettingError(
            "no tensor of the weights file fits the backbone",
            where=f"backbone.weights={path}",
            expected=f"names such as {next(iter(own))} {tuple(next(iter(own.values())).shape)}",
            got=", ".join(f"{n} {tuple(t.shape)}" for n, t in list(tensors.items())[:3])
            or "no tensors",
            next_step="choose the backbone and size the file was made for",
        )
    parts = _parts(backbone, named, fits)
    claimed = {_part(n) for n in named}
    if any("swinViT" in n.split(".") for n in tensors):
        claimed |= {part for part in parts if part.endswith("swinViT")}
    for part, (done, of) in parts.items():
        if part in claimed and done < LEAST_SET * of:
            wrong = [n for n in named if _part(n) == part and n not in fits]
            absent = [n for n, _ in backbone.named_parameters() if _part(n) == part]
            absent = [n for n in absent if n not in named]
            raise SettingError(
                f"the weights file sets {done} of {of} tensors of a part of the network it names",
                where=f"backbone.weights={path}, {part}",
                expected=f"at least {LEAST_SET:.0%} of each part that the file holds",
                got="; ".join(
                    [
                        f"{n} is {tuple(tensors[named[n]].shape)}, not {tuple(own[n].shape)}"
                        for n in wrong[:3]
                    ]
                    + ([f"no tensor for {', '.join(absent[:3])}"] if absent else [])
                ),
                next_step="choose the backbone and size the file was made for (--set "
                "backbone.size=…), or take this part out of the file",
            )
    usable = {
        name: _usable(tensors[origin], own[name], origin, path) for name, origin in fits.items()
    }
    for name, tensor in usable.items():
        own[name].copy_(tensor)
    return WeightReport(
        loaded=tuple(n for n in own if n in fits),
        skipped=tuple(sorted(tensors.keys() - set(fits.values()))),
        missing=tuple(n for n in own if n not in fits),
        parts=parts,
        trained_on=_trained_on(content, path),
    )


def _usable(tensor: Tensor, own: Tensor, name: str, path: Path) -> Tensor:
    """A tensor of the file as the network's own kind of number.

    Raises:
        SettingError: it holds no finite real numbers.
    """
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    odd = None if plain and not tensor.is_complex() else f"{tensor.dtype}, {tensor.layout}"
    if odd is None:
        made = tensor.to(own.dtype)
        if bool(made.isfinite().all()):
            return made
        odd = f"{int((~made.isfinite()).sum())} of {made.numel()} are not, as {own.dtype}"
    raise SettingError(
        "a tensor of the weights file cannot be used",
        where=f"backbone.weights={path}, {name}",
        expected="finite real numbers",
        got=odd,
        next_step="take another checkpoint, or save its plain tensors again",
    )


def _matched(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Backbone tensor → tensor of the file of a like name, whatever the shapes.

    The longest form of a name that both sides have decides; a form that two tensors of one side
    have decides nothing.
    """
    common = _common_start(tensors)  # a wrapper of whatever name
    theirs = {n: _forms(n) | _forms(n.removeprefix(common)) for n in tensors}
    ours = {n: _forms(n) for n in own}
    here, there = (
        Counter(form for forms in names.values() for form in forms) for names in (ours, theirs)
    )
    origin = {form: n for n, forms in theirs.items() for form in forms if there[form] == 1}
    named: dict[str, str] = {}
    taken: set[str] = set()
    pairs = [
        (len(form), n, origin[form])
        for n, forms in ours.items()
        for form in forms
        if form in origin and here[form] == 1
    ]
    for _, name, theirs_ in sorted(pairs, key=lambda p: (-p[0], p[1])):
        if name not in named and theirs_ not in taken:
            named[name] = theirs_
            taken.add(theirs_)
    return named


def _common_start(names: Iterable[str]) -> str:
    """The components that all names begin with, and a dot; empty where there are none."""
    columns = zip(*(n.split(".")[:-1] for n in names), strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(f"{column[0]}." for column in same)


def _forms(name: str) -> frozenset[str]:
    """A name, without its wrappers, and without one after the other of its parts."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    while wrap := next((w for w in _WRAPS if name.startswith(w)), None):
        name = name[len(wrap) :]
    if (layer := re.match(r"(down|upcat)_(\d)\.", name)) is not None:
        name = f"{_LISTS[layer[1]]}.{int(layer[2]) - 1}.{name[layer.end() :]}"
    forms = {name}
    while part := next((p for p in _PARTS if name.startswith(p)), None):
        name = name[len(part) :]
        forms.add(name)
    return frozenset(forms)


def _part(name: str) -> str:
    """The part a backbone tensor belongs to: the transformer, or else encoder or decoder."""
    first, _, rest = name.partition(".")
    return f"{first}.swinViT" if rest.startswith("swinViT.") else first


def _parts(
    backbone: nn.Module, named: Mapping[str, str], fits: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Part → parameters that fit, and all of them; buffers do not count."""
    counts: dict[str, tuple[int, int]] = {}
    for name, _ in backbone.named_parameters():
        done, of = counts.get(_part(name), (0, 0))
        counts[_part(name)] = (done + (name in fits), of + 1)
    return counts


def _trained_on(content: Any, path: Path) -> str:
    """What a file, its safetensors header, or the MONAI bundle around it says of training data."""
    said: list[object] = []
    if isinstance(content, Mapping):
        said.append(content.get("training_data"))
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            said.append((file.metadata() or {}).get("training_data"))
    bundle = path.parent.parent / "configs" / "metadata.json"  # of models/model.pt
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no bundle, or none that says
        about = json.loads(bundle.read_text(encoding="utf-8"))
        said += [about.get("data_source"), about.get("data_type"), about.get("description")]
    texts = [", ".join(map(str, s)) if isinstance(s, list | tuple) else s for s in said]
    return "; ".join(str(s) for s in texts if s)


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
            got=first_line(err),
            next_step="save its state_dict again with torch.save or safetensors",
        ) from err


def tensors_of(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dictionaries, such as {"state_dict": {…}}."""
    tensors: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = value
            elif key in _CONTAINERS:
                tensors.update(tensors_of(value))
    return tensors
