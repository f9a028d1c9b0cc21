"""Checkpoints of the CLIP-driven Universal Model as its authors publish them.

Swin UNETR (or another backbone of clbench) with one controller for all structures is the strategy
`universal_v1`; its tensors only have other names. Channels follow the paper's Table 2, and the text
vectors are those of the checkpoint.

Source: Liu et al., ICCV 2023; github.com/ljwztc/CLIP-Driven-Universal-Model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clbench.deployment.extension.foreign import ForeignWeights
from clbench.deployment.extension.own_data import plain_name
from clbench.errors import SettingError
from clbench.nets.heads import SIZES
from clbench.nets.pretrained import tensors_of
from clbench.nets.text_encodings import LENGTH
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


def weights_from_universal_model(
    path: Path, content: Any, structures: Sequence[str] = ()
) -> ForeignWeights:
    """What the authors' checkpoint holds.

    Args:
        path: the checkpoint.
        content: what was read of it.
        structures: names of its channels; none: the paper's Table 2, in its order.

    Raises:
        SettingError: another number of structures than text vectors.
    """
    tensors = {_bare(name): tensor for name, tensor in tensors_of(content).items()}
    vectors = tensors[VECTORS]
    labels = tuple(structures) or _table(len(vectors), path)
    if vectors.shape != (len(labels), LENGTH):
        raise SettingError(
            "the text vectors are not those of the structures",
            where=f"{path}, {VECTORS}",
            expected=f"({len(labels)}, {LENGTH})",
            got=tuple(vectors.shape),
            next_step="name every structure with --structures, in the order of the channels",
        )
    return ForeignWeights(
        name=plain_name(path.stem)[:40] or "universal_model",
        path=path,
        tensors=tensors,
        labels=labels,
        data=DATA,
        head=_head,
        strategy="universal_v1",
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


def _head(
    rest: Mapping[str, Tensor], names: Sequence[str], channels: int, path: Path
) -> dict[str, Tensor]:
    """The head's layers under clbench's names; the backbone's own output layer is not used."""
    layers: dict[str, Tensor] = {}
    others: list[str] = []
    for name, tensor in rest.items():
        start = next((s for s in HEAD if name.startswith(s)), None)
        if start is not None:
            convolution = start == "controller." and tensor.ndim == 5
            layer = tensor.flatten(1) if convolution else tensor
            layers[HEAD[start] + name[len(start) :]] = layer.float()
        elif name != VECTORS and not re.fullmatch(r"backbone\.out\..*", name):
            others.append(name)
    if others or tuple(layers["head.controller.weight"].shape)[:1] != (sum(SIZES),):
        raise SettingError(
            "the head is not that of the published Universal Model",
            where=path,
            expected=f"a controller with {sum(SIZES)} outputs, and no further tensors",
            got=", ".join(others[:4]) or f"{tuple(layers['head.controller.weight'].shape)}",
        )
    rows = rest[VECTORS].float()
    return layers | {f"head.vectors.of_{n}": rows[k].clone() for k, n in enumerate(names)}
