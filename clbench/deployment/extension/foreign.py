"""Weights trained elsewhere as a model to extend: one given step with all their structures.

The network is told by the names of the tensors, its size by their shapes. Every parameter of the
backbone must be set, and the one output layer that is left becomes the head, a channel to a
structure, background first. What fits nowhere is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clbench.deployment.extension.learned import LearnedModel, one_given_step
from clbench.deployment.extension.own_data import new_structures, plain_name
from clbench.errors import SettingError, UnknownName
from clbench.nets.backbones import new_backbone
from clbench.nets.pretrained import set_weights, tensors_of
from clbench.run.plan import load_strategy
from clbench.spec.benchmark import Preprocessing
from clbench.spec.settings import Profile, apply_overrides, split_overrides
from clbench.spec.taxonomy import canonical
from clbench.store.files import sha256

SIGNS: tuple[tuple[str, str, str], ...] = (
    ("swin_unetr", r"(.*\.)?swinViT\.patch_embed\.proj\.weight", r"(.*\.)?encoder1\..*weight"),
    ("unet", r"(.*\.)?upcat_1\..*weight", r"(.*\.)?conv_0\.conv_0\.conv\.weight"),
    ("segresnet", r"(.*\.)?convInit\.conv\.weight", r"(.*\.)?convInit\.conv\.weight"),
    ("small_unet", r"(.*\.)?decoder\.narrow\.0\.weight", r"(.*\.)?encoder\.blocks\.0\.0\.weight"),
)
"""Backbone, a tensor only it has, and one whose first axis is its size."""
Head = Callable[[Mapping[str, Tensor], Sequence[str], int, Path], dict[str, Tensor]]
"""From tensors the backbone has no place for, structures, channels of the features, the file."""
PASSED_BY = r"(.*\.)?(num_batches_tracked|relative_position_index)"
"""Tensors that carry nothing learned."""


@dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """A file of weights, and what is known of the model it is of."""

    name: str
    """Of the model, for course and folder."""
    path: Path
    """The file."""
    tensors: Mapping[str, Tensor]
    """By name."""
    labels: tuple[str, ...]
    """Names of the structures, in the order of the output channels, without background."""
    backbone: str | None = None
    """Registered backbone; None: told by the names of the tensors."""
    size: int | None = None
    """Its size; None: told by the shapes."""
    architecture: str | None = None
    """Its stages, of a backbone that has several; see `BackboneSettings`."""
    data: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """`spacing_mm`, `window_hu`, `patch_vox` of the model, as far as they are known."""
    head: Head | None = None
    """Makes the parameters of the head; None: `softmax_head`."""
    strategy: str = "frozen_softmax"
    """What teaches a new step where the user names nothing."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


def learned_by_weights(
    weights: ForeignWeights,
    profile: Profile,
    *,
    overrides: Sequence[str] = (),
    strategy: str | None = None,
    seed: int = 0,
) -> LearnedModel:
    """The model of a file of weights.

    Args:
        weights: what was read.
        profile: settings to teach with, before `overrides`.
        overrides: `group.name=value` words of the command line.
        strategy: what teaches the new step; None: that of the weights.
        seed: of the new step.

    Raises:
        SettingError: a network clbench does not have, or tensors that fit nowhere.
    """
    names, declared = structure_names(weights.labels)
    backbone, size = network_of(weights)
    profile = replace(
        profile,
        data=replace(profile.data, **weights.data),  # type: ignore[arg-type]  # checked fields
        backbone=replace(
            profile.backbone,
            name=backbone,
            size=size,
            architecture=weights.architecture,
            weights=None,
        ),
    )
    profile = apply_overrides(profile, split_overrides(list(overrides)))
    network = new_backbone(profile.backbone)
    rest = set_backbone(network, weights)
    head = weights.head or softmax_head
    model = {f"backbone.{n}": t for n, t in network.state_dict().items()}
    model |= head(rest, names, network.final_channels, weights.path)
    state = {"model": model, "memory": {}, "strategy": "weights from elsewhere"}
    step, source = one_given_step(
        weights.name,
        title=f"what {weights.path.name} was trained on",
        step=f"learned by {weights.name}",
        structures=names,
        state=state,
    )
    taught_by = strategy or weights.strategy
    options = tuple(w for w in overrides if w.startswith("strategy."))
    return LearnedModel(
        name=weights.name,
        title=f"{len(names)} structures of {weights.path.name}",
        sources=(source,),
        steps=(step,),
        states=(state,),
        costs=({},),
        preprocessing=Preprocessing(),
        groups={},
        declares=tuple(declared),
        profile=profile,
        strategy=load_strategy(taught_by, split_overrides(list(options)).get("strategy", {})),
        strategy_name=taught_by,
        overrides=options,
        seed=seed,
        origin={
            "weights": str(weights.path.absolute()),
            "sha256": sha256(weights.path),
            "structures": list(names),
            "state": step.given,
        },
        notes=weights.notes,
    )


# ---------------------------------------------------------------------------------------- names


def structure_names(labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Canonical names of a model's labels; structures clbench does not have are declared.

    Raises:
        SettingError: no labels, or two that are one structure.
        SpecError: a label that can be no name.
    """
    if not labels:
        raise SettingError(
            "nothing says which structures the weights know",
            where="--structures",
            expected="their names in the order of the output channels, without background",
            next_step="name them: --structures spleen,liver",
        )
    names = []
    for label in labels:
        try:
            names.append(canonical(label))
        except UnknownName:
            plain = plain_name(label)
            names.append(plain if plain[:1].isalpha() else f"structure_{plain}")
    return new_structures(names)


# -------------------------------------------------------------------------------------- network


def network_of(weights: ForeignWeights) -> tuple[str, int]:
    """Backbone and size of a file of weights.

    Raises:
        SettingError: the names are those of no backbone.
    """
    if weights.backbone is not None and weights.size is not None:
        return weights.backbone, weights.size
    for name, sign, sized in SIGNS:
        if any(re.fullmatch(sign, n) for n in weights.tensors):
            first = next(t for n, t in weights.tensors.items() if re.fullmatch(sized, n))
            return name, first.shape[0]
    raise SettingError(
        "the weights are of a network that clbench does not have",
        where=weights.path,
        expected="the tensors of MONAI's SwinUNETR, BasicUNet or SegResNet, of nnU-Net v2 (the "
        "folder it trained), or of a backbone of clbench",
        got=", ".join(list(weights.tensors)[:4]) or "no tensors",
        next_step="extend a model with one of these networks",
    )


def set_backbone(network: nn.Module, weights: ForeignWeights) -> dict[str, Tensor]:
    """Set every parameter of a backbone; returns the tensors it has no place for.

    Raises:
        SettingError: a parameter that no tensor sets.
    """
    report = set_weights(network, dict(weights.tensors), weights.path)
    parameters = {n for n, _ in network.named_parameters()}
    if absent := [n for n in report.missing if n in parameters]:
        raise SettingError(
            f"the weights leave {len(absent)} of {len(parameters)} parameters of the network open",
            where=weights.path,
            expected=", ".join(absent[:3]) + (", …" if absent[3:] else ""),
            got=", ".join(report.skipped[:3]) or "no further tensors",
            next_step="name the whole model's file, and its size with --set backbone.size=…",
        )
    return {n: weights.tensors[n] for n in report.skipped if not re.fullmatch(PASSED_BY, n)}


def softmax_head(
    rest: Mapping[str, Tensor], names: Sequence[str], channels: int, where: Path
) -> dict[str, Tensor]:
    """The output layer among the tensors left over, as the parameters of `ConvHead`.

    Args:
        rest: what the backbone has no place for.
        names: structures of channels 1, 2, …; channel 0 is background.
        channels: what the output layer reads.
        where: the file.

    Raises:
        SettingError: none or several such layers, other tensors beside it, or another number of
            channels.
    """
    heads = [
        n.removesuffix("weight")
        for n, t in rest.items()
        if n.endswith("weight") and t.ndim == 5 and tuple(t.shape[1:]) == (channels, 1, 1, 1)
    ]
    others = [n for n in rest if not any(n in (f"{h}weight", f"{h}bias") for h in heads)]
    if len(heads) != 1 or others:
        raise SettingError(
            "the output of the weights is no single 1x1x1 convolution",
            where=where,
            expected=f"(structures + 1, {channels}, 1, 1, 1), and no further tensors",
            got=f"{len(heads)} such layers; "
            + (", ".join(f"{n} {tuple(rest[n].shape)}" for n in others[:4]) or "nothing else"),
            next_step="a network with other parts cannot be extended",
        )
    weight = rest[f"{heads[0]}weight"].float()
    bias = rest.get(f"{heads[0]}bias", torch.zeros(len(weight))).float()
    if len(weight) != len(names) + 1:
        raise SettingError(
            "the weights have another number of output channels than structures",
            where=where,
            expected=f"{len(names) + 1}: background, {', '.join(names)}",
            got=len(weight),
            next_step="name every structure with --structures, in the order of the channels; a "
            "network with one sigmoid per structure, without background, cannot be extended"
            if len(weight) == len(names)
            else "name every structure with --structures, in the order of the channels",
        )
    rows = ("background", *names)
    return {
        **{f"head.weight.{n}": weight[k].clone() for k, n in enumerate(rows)},
        **{f"head.bias.{n}": bias[k : k + 1].clone() for k, n in enumerate(rows)},
    }


# ------------------------------------------------------------------------------------ the readers


def weights_from_file(path: Path, content: Any, structures: Sequence[str]) -> ForeignWeights:
    """A state dict, alone or below `state_dict`, `model`, `net`, ….

    Args:
        path: where it was read.
        content: what was read.
        structures: in the order of the output channels, without background.
    """
    return ForeignWeights(
        name=plain_name(path.stem)[:40] or "weights",
        path=path,
        tensors=tensors_of(content),
        labels=tuple(structures),
        notes=(
            (
                "the file does not say how its images were prepared: spacing, window and patch are "
                "those of the profile, or of --set data.spacing_mm=…, data.window_hu=…, "
                "data.patch_vox=…"
            ),
        ),
    )
