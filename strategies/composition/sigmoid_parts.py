"""Parts of compositions for one sigmoid per structure: a plain head, and distillation terms.

Each term stands before a method and adds to its loss; the labels of old structures stay those of
the method it stands before.

Source: ports of this project. Terms of `Lwf` and `Ilt` are those that the CT authors' code has for
sigmoid heads; those of `Plop` are Douillard et al., CVPR 2021, with the factors of their code.
Differs: there is no background channel, so nothing is summed into it, and the gate of PLOP's pseudo
labels, an entropy over channels, has no counterpart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from clbench.nets.heads import ConvHead
from clbench.spec.settings import NotNegative
from clbench.strategies.finetune import Finetune
from clbench.strategies.universal import Universal
from clbench.strategy import (
    Batch,
    Declaration,
    Lesson,
    Memory,
    Output,
    Range,
    SearchSpace,
    Strategy,
)
from clbench.strategy.distillation import feature_mse, kd_sigmoid, pod


@dataclass(frozen=True, kw_only=True)
class SigmoidFinetune(Finetune):
    """Fine-tuning with a plain 1×1×1 output layer, one sigmoid per structure."""

    def first_step(self) -> Strategy:
        """Plain training with this head."""
        return SigmoidFinetune(legacy_slice_dice=self.legacy_slice_dice)

    def head(self, backbone: nn.Module) -> nn.Module:
        """The output layer; text vectors are not used."""
        channels: Any = backbone.final_channels
        return ConvHead(channels, background=False)


@dataclass(frozen=True, kw_only=True)
class SigmoidPseudo(SigmoidFinetune, Universal):
    """The same head, old structures taught by the previous model's predictions."""

    unlabelled: Literal["ignore", "background"] = "ignore"


class SigmoidTerms:
    """What terms on a teacher's answer share."""

    adds: ClassVar[tuple[str, ...]] = ()
    """Names of the terms that this class adds to those of the classes it inherits from."""

    def declares(self) -> Declaration:
        """The old model itself, and the terms."""
        promised = cast(Strategy, super()).declares()
        own = [name for kind in reversed(type(self).__mro__) for name in vars(kind).get("adds", ())]
        return replace(promised, past="weights", penalties=(*promised.penalties, *own))

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def losses(
        self, batch: Batch, new: Output, old: Output | None, memory: Memory
    ) -> dict[str, Tensor]:
        """The terms of the method this stands before, and those of `ties`."""
        terms = cast(Strategy, super()).losses(batch, new, old, memory)
        return terms if old is None else {**terms, **self.ties(batch, new, old)}

    def ties(self, batch: Batch, new: Output, old: Output) -> dict[str, Tensor]:
        """Terms that tie the new model to the old one; a subclass adds to those of `super()`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SigmoidLwf(SigmoidTerms):
    """Distillation of the old structures' sigmoids."""

    adds: ClassVar[tuple[str, ...]] = ("distill",)
    search_space: ClassVar[SearchSpace] = {"weight": Range(low=0.01, high=100.0, log=True)}
    weight: NotNegative = 1.0
    """Weight of the output distillation, a mean over channels and voxels."""

    def ties(self, batch: Batch, new: Output, old: Output) -> dict[str, Tensor]:
        """Binary cross-entropy to the old model's probabilities."""
        k = batch.old_index
        kd = kd_sigmoid(new.logits[:, k], old.logits[:, k])
        return {**super().ties(batch, new, old), "distill": self.weight * kd}


@dataclass(frozen=True, kw_only=True)
class SigmoidIlt(SigmoidLwf):
    """The same, and distillation of the encoder's features."""

    adds: ClassVar[tuple[str, ...]] = ("features",)
    search_space: ClassVar[SearchSpace] = {"feature_weight": Range(low=0.01, high=100.0, log=True)}
    feature_weight: NotNegative = 1.0
    """Weight of the mean squared difference at the bottleneck."""

    def ties(self, batch: Batch, new: Output, old: Output) -> dict[str, Tensor]:
        """Both distillations."""
        features = feature_mse(new.features["bottleneck"], old.features["bottleneck"])
        return {**super().ties(batch, new, old), "features": self.feature_weight * features}


@dataclass(frozen=True, kw_only=True)
class SigmoidPlop(SigmoidTerms):
    """Local pooled distillation of every map, and of the old structures' logits."""

    adds: ClassVar[tuple[str, ...]] = ("pod",)
    search_space: ClassVar[SearchSpace] = {
        "feature_factor": Range(low=1e-4, high=1.0, log=True),
        "logit_factor": Range(low=1e-5, high=0.05, log=True),
    }
    feature_factor: NotNegative = 0.01
    """Factor of the distance of each feature map."""
    logit_factor: NotNegative = 0.0005
    """Factor of the distance of the old structures' logits."""
    pooled_axes: Literal[1, 2] = 1
    """Axes averaged over in each cell."""

    def ties(self, batch: Batch, new: Output, old: Output) -> dict[str, Tensor]:
        """The pooled distillation."""
        factors = {**dict.fromkeys(new.features, self.feature_factor), "logits": self.logit_factor}
        term = pod(
            {**new.features, "logits": new.logits[:, batch.old_index]},
            {**old.features, "logits": old.logits[:, batch.old_index]},
            factors=factors,
            current=len(batch.structures),
            learned=len(batch.taught_index),
            pooled_axes=self.pooled_axes,
        )
        return {**super().ties(batch, new, old), "pod": term}
