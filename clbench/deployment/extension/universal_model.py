"""Checkpoints of the CLIP-driven Universal Model as its authors publish them.

Swin UNETR (or another backbone of clbench) with one controller for all structures is the strategy
`universal_v1`; its tensors only have other names. Channels follow the paper's Table 2, and the text
vectors are those of the checkpoint.

Source: Liu et al., ICCV 2023; github.com/ljwztc/CLIP-Driven-Universal-Model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clbench.deployment.extension.foreign import (
    ForeignWeights,
    as_learned,
    network_of,
    plain_name,
    set_backbone,
    structure_names,
)
from clbench.deployment.extension.learned import LearnedModel
from clbench.errors import SettingError
from clbench.nets.backbones import new_backbone
from clbench.nets.heads import SIZES
from clbench.nets.pretrained import tensors_of
from clbench.nets.text_encodings import LENGTH
from clbench.spec.settings import Profile, apply_overrides, split_overrides
from clbench.spec.taxonomy import STRUCTURES

HEAD: Mapping[str, str] = {
    "GAP.0.": "head.gap.0.",
    "GAP.3.": "head.gap.3.",
    "precls_conv.0.": "head.pre.0.",
    "precls_conv.2.": "head.pre.2.",
    "text_to_vision.": "head.project.0.",
    "controller.": "head.controller.",
}
"""Start of a name in the authors' code → in `universal_v1`."""
VECTORS = "organ_embedding"
"""Text vectors, one row per structure."""
DATA: Mapping[str, tuple[float, ...]] = {
    "spacing_mm": (1.5, 1.5, 1.5),
    "window_hu": (-175.0, 250.0),
    "patch_vox": (96, 96, 96),
}
"""How the authors prepare images."""


def is_universal_model(content: Any) -> bool:
    """Whether a checkpoint holds the layers of the Universal Model's head."""
    names = {_bare(name) for name in tensors_of(content)}
    return {VECTORS, "controller.weight", "text_to_vision.weight"} <= names


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def learned_by_universal_model(
    path: Path,
    content: Any,
    profile: Profile,
    *,
    structures: Sequence[str] = (),
    overrides: Sequence[str] = (),
    strategy: str | None = None,
    seed: int = 0,
) -> LearnedModel:
    """The model of the authors' checkpoint.

    Args:
        path: the checkpoint.
        content: what was read of it.
        profile: settings to teach with, before `overrides`.
        structures: names of its channels; none: the paper's Table 2, in its order.
        overrides: `group.name=value` words of the command line.
        strategy: what teaches the new step; None: `universal_v1`.
        seed: of the new step.

    Raises:
        SettingError: layers of another shape, or tensors that fit nowhere.
    """
    tensors = {_bare(name): tensor for name, tensor in tensors_of(content).items()}
    vectors = tensors[VECTORS]
    labels = tuple(structures) or _table(len(vectors), path)
    names, declared = structure_names(labels)
    if vectors.shape != (len(names), LENGTH):
        raise SettingError(
            "the text vectors are not those of the structures",
            where=f"{path}, {VECTORS}",
            expected=f"({len(names)}, {LENGTH})",
            got=tuple(vectors.shape),
            next_step="name every structure with --structures, in the order of the channels",
        )
    weights = ForeignWeights(
        name=plain_name(path.stem)[:40] or "universal_model",
        path=path,
        tensors=tensors,
        labels=labels,
        data=DATA,
    )
    backbone, size = network_of(weights)
    profile = replace(
        profile,
        data=replace(profile.data, **DATA),  # type: ignore[arg-type]  # checked fields
        backbone=replace(profile.backbone, name=backbone, size=size, weights=None),
    )
    profile = apply_overrides(profile, split_overrides(list(overrides)))
    network = new_backbone(profile.backbone)
    rest = set_backbone(network, weights)
    state = {f"backbone.{n}": t for n, t in network.state_dict().items()}
    state |= _head(rest, path)
    state |= {f"head.vectors.of_{n}": vectors[k].float().clone() for k, n in enumerate(names)}
    return as_learned(
        weights,
        {"model": state, "memory": {}, "strategy": "weights from elsewhere"},
        names,
        declared,
        profile=profile,
        strategy=strategy or "universal_v1",
        overrides=overrides,
        seed=seed,
    )


def _table(count: int, path: Path) -> tuple[str, ...]:
    """The first structures of the paper's Table 2 and its extension."""
    table = sorted(
        (s for s in STRUCTURES.values() if s.template_id), key=lambda s: s.template_id or 0
    )
    if count not in (32, len(table)):
        raise SettingError(
            "the checkpoint has another number of structures than the paper's Table 2",
            where=path,
            expected=f"32 or {len(table)}",
            got=count,
            next_step="name them with --structures, in the order of the channels",
        )
    return tuple(s.name for s in table[:count])


def _head(rest: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The head's layers under clbench's names; the backbone's own output layer is not used."""
    found: dict[str, Tensor] = {}
    others: list[str] = []
    for name, tensor in rest.items():
        start = next((s for s in HEAD if name.startswith(s)), None)
        if start is not None:
            linear = start == "controller." and tensor.ndim == 5
            found[HEAD[start] + name[len(start) :]] = (
                tensor.flatten(1) if linear else tensor
            ).float()
        elif name != VECTORS and not re.fullmatch(r"backbone\.out\..*", name):
            others.append(name)
    if others or tuple(found["head.controller.weight"].shape)[:1] != (sum(SIZES),):
        raise SettingError(
            "the head is not that of the published Universal Model",
            where=path,
            expected=f"a controller with {sum(SIZES)} outputs, and no further tensors",
            got=", ".join(others[:4]) or f"{tuple(found['head.controller.weight'].shape)}",
        )
    return found
