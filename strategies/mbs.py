"""MBS: labels and distillation where the old model is sure, new classes away from all others.

From step 2 on: cross-entropy on labels that the old model fills in (sure old structure, left out,
or background); distillation of the feature map, weighted by how little a voxel concerns the new
structures; distillation of the old class vectors; distillation of the output, the old background
moved to the annotated new structure; and an angle of new class vectors to all others. A new class
starts as a copy of background's row. Between equal vectors the last term has no gradient, so the
other terms have to part them first. A step that teaches old structures again has no new class
vector, so there is no angle and no background to move; annotation goes before the old model, and
the distillations hold as everywhere.

Source: Park et al., ECCV 2024 (MBS), and their code. Differs: 3-D; a convolutional network, whose
class vectors are the rows of the output layer and whose patch features are the map it reads, at
full resolution; partial labels; no term on padding; Dice of the annotated structures is added as in
step 1 (`dice=false` takes it out); the profile's schedule (theirs: a constant rate, a tenth or half
of step 1's, and the checkpoint that is best on the new classes). Their weights are of 2-D images
and not tuned here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.nets.heads import ConvHead, Segmenter
from clbench.spec.settings import NotNegative, Share
from clbench.strategy import (
    UNKNOWN,
    Batch,
    Declaration,
    Kit,
    Lesson,
    Memory,
    Output,
    PhaseContext,
    Range,
    SearchSpace,
    Session,
    Strategy,
    Terms,
)
from clbench.strategy.distillation import feature_mse
from clbench.strategy.partial_labels import allowed_channels, mean_ce
from clbench.strategy.selective_distillation import (
    class_orthogonality,
    guided_distillation,
    selective_channels,
    selective_weights,
    weighted_feature_mse,
)

from .softmax_finetune import SoftmaxFinetune


class ClassVectorSession(Session):
    """The strategy's losses, and its terms on class vectors, which `losses` cannot see."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward passes and all terms."""
        context: Any = self.context
        new: Output = context.model(batch.image)
        with torch.no_grad():
            old: Output = context.teacher(batch.image)
        method = context.strategy
        known = tuple(batch.structures[k] for k in batch.old_index)
        vectors = method.class_vectors(context.model, new, batch.structures)
        with torch.no_grad():
            before = method.class_vectors(context.teacher, old, known)
        terms = method.losses(batch, new, old, context.memory)
        return {**terms, **method.class_terms(vectors, before)}


@dataclass(frozen=True, kw_only=True)
class SelectiveDistillation(Strategy):
    """What MBS' forms share: weights, the teacher, and the terms on class vectors."""

    search_space: ClassVar[SearchSpace] = {
        "threshold": Range(low=0.5, high=0.95),
        "weight_out": Range(low=1.0, high=250.0, log=True),
        "weight_feat": Range(low=0.05, high=20.0, log=True),
        "weight_orth": Range(low=0.05, high=20.0, log=True),
    }
    threshold: Share = 0.7
    """Least probability of a pseudo label."""
    weight_out: NotNegative = 25.0
    """Weight of the output's distillation, a mean over channels and voxels (theirs: 25 or 50)."""
    weight_feat: NotNegative = 1.0
    """Weight of the distillation of features and of class vectors."""
    weight_orth: NotNegative = 1.0
    """Weight of the angle between class vectors, times the share of new classes in all."""

    def declares(self) -> Declaration:
        """The distillation of output and of class vectors, where their weights are not 0.

        That of features is 0 on crops of which the old model is unsure everywhere.
        """
        weights = {"distill": self.weight_out, "classes": self.weight_feat}
        names = tuple(name for name, weight in weights.items() if weight)
        return replace(super().declares(), penalties=names)

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def session(self, context: PhaseContext) -> Session | None:
        """Adds the terms on class vectors, where there is an old model."""
        return None if context.teacher is None else ClassVectorSession(context)

    def class_vectors(self, model: nn.Module, output: Output, names: tuple[str, ...]) -> Tensor:
        """The vectors of each class, old ones first, (B, C, F); B is 1 where all images share them.

        Args:
            model: the model, or its teacher.
            output: what it says to the crops.
            names: the structures it answers for.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its class vectors are")

    def class_terms(self, vectors: Tensor, before: Tensor) -> dict[str, Tensor]:
        """Distillation of the old class vectors, and the angle of new ones to all others.

        Args:
            vectors: (B, C, F), old ones first.
            before: (B, C_old, F), the old model's.
        """
        count = before.shape[1]
        share = (vectors.shape[1] - count) / vectors.shape[1]
        terms = {"orthogonal": self.weight_orth * share * class_orthogonality(vectors, count)}
        if self.weight_feat:
            terms["classes"] = self.weight_feat * feature_mse(vectors[:, :count], before)
        return terms


@dataclass(frozen=True, kw_only=True)
class Mbs(SelectiveDistillation, SoftmaxFinetune):
    """MBS: selective pseudo labels and distillation; new class vectors away from all others."""

    unlabelled: Literal["ignore"] = "ignore"
    start: Literal["background", "split_background"] = "background"
    """New channels start as background's copy, or as equal shares of it, as in MiB."""

    @property
    def splits_background(self) -> bool:
        """As MiB does."""
        return self.start == "split_background"

    def declares(self) -> Declaration:
        """Background's logit moves where it is shared out."""
        return replace(super().declares(), keeps_old_logits=not self.splits_background)

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more channel per new structure, as background is."""
        super().grow(model, kit, step)
        if self.start == "background":
            assert isinstance(model, Segmenter)  # noqa: S101  # built by `SoftmaxFinetune`
            assert isinstance(model.head, ConvHead)  # noqa: S101  # built by `SoftmaxFinetune`
            with torch.no_grad():
                for name in step.learns:
                    model.head.weight[name].copy_(model.head.weight["background"])
                    model.head.bias[name].copy_(model.head.bias["background"])

    def class_vectors(self, model: nn.Module, output: Output, names: tuple[str, ...]) -> Tensor:
        """(1, 1 + K, F): the rows of the output layer, background first."""
        head: Any = model.head
        rows = [head.weight[name].flatten() for name in ("background", *names)]
        return torch.stack(rows)[None]

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy and Dice on selective labels; distillation of features and output.

        Source: Park et al., ECCV 2024, and their code. Differs: see the head of this file.
        """
        if old is None:
            return super().losses(batch, new, old, memory)
        batch = self.seen(batch)
        inside = (batch.label != UNKNOWN).any(dim=1, keepdim=True)
        allowed = allowed_channels(batch)
        channels, left_out = selective_channels(
            allowed, old.logits, inside, threshold=self.threshold
        )
        # the deepest new structure that is present is the only channel allowed, or holds others
        new_channel = torch.zeros_like(inside, dtype=torch.int64)
        for k in batch.new_index:
            here = (batch.label[:, k] == 1)[:, None] & allowed[:, 1 + k, None]
            new_channel = torch.where(here, 1 + k, new_channel)
        present = (batch.label == 1)[:, batch.new_index].any(dim=1, keepdim=True)
        terms = {
            "ce": mean_ce(new.logits, channels),
            **self.dice_of(batch, new, channels, range(len(batch.structures))),
        }
        if self.weight_feat:
            weight = selective_weights(channels, left_out, old.logits, present, inside)
            terms["features"] = self.weight_feat * weighted_feature_mse(
                new.features["final"], old.features["final"], weight
            )
        if self.weight_out:
            terms["distill"] = self.weight_out * guided_distillation(
                new.logits, old.logits, new_channel, inside
            )
        return terms
