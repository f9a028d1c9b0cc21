"""PLOP: local pooled distillation of every map, and old structures by sure pseudo labels.

Source: Douillard et al., CVPR 2021. Differs: 3-D (`pooled_axes`); a tenth of their factor of the
logits (`logit_factor`); maps as the backbone names them, encoder to `final`, after their
activation; logits at full resolution; a structure that the step teaches again counts as learned in
the penalty's growing weight, and its annotation is the label; entropy thresholds from whole
training volumes; a voxel whose labels exclude every old structure needs no pseudo label, and a
pseudo label that contradicts the annotation is dropped; what the old model calls background may be
a new structure that the case does not annotate; Dice is added as in step 1 (`dice=false` takes it
out). `plop_ct` is what the paper's tables call PLOP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.spec.settings import NotNegative
from clbench.strategy import (
    Batch,
    CaseTensors,
    Declaration,
    Lesson,
    Memory,
    Output,
    Predictor,
    Range,
    SearchSpace,
    Terms,
    distillation,
)
from clbench.strategy.distillation import BINS, entropy_histogram, gated_ce, logits_for_pod, pod
from clbench.strategy.partial_labels import allowed_channels

from .softmax_finetune import SoftmaxFinetune

if TYPE_CHECKING:
    from clbench.data.volume import Volume

THRESHOLDS = "plop_thresholds"  # where memory keeps this step's (C_old,) entropy thresholds


@dataclass(frozen=True, kw_only=True)
class Plop(SoftmaxFinetune):
    """PLOP: local pooled distillation of features, entropy-gated pseudo labels."""

    version: ClassVar[int] = 3  # in version 2 planes were pooled, and logits weighed ten times more
    serves_from: ClassVar[int | None] = 1
    earlier_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {
        1: {
            "new_classifier_lr": 1.0,
            "old_classifier_lr": 1.0,
            "pooled_axes": 1,
            "logit_factor": 0.0005,
        },
        2: {"pooled_axes": 1, "logit_factor": 0.0005},
    }
    search_space: ClassVar[SearchSpace] = {
        "feature_factor": Range(low=1e-4, high=1.0, log=True),
        "logit_factor": Range(low=1e-5, high=0.05, log=True),
    }
    unlabelled: Literal["ignore", "background"] = "ignore"
    splits_background: bool = True
    """Start new channels as equal shares of background, as in MiB; false: as torch initialises."""
    feature_factor: NotNegative = 0.01
    """Factor of the distance of each feature map."""
    logit_factor: NotNegative = 0.00005
    """Factor of the distance of the logits, new ones summed into background; theirs: 0.0005. The
    distance grows with the square of the logits, which the output layer's rate makes large here: at
    theirs, logits that are a tenth larger than the old model's cost many times the loss."""
    pooled_axes: Literal[1, 2] = 2
    """Axes averaged over in each cell: 2 leaves a strip, as in the 2-D original, 1 a plane, as in
    the CT authors' code. Of a map of n voxels along each axis the original pools 14 n values per
    channel; strips are 63 n, planes 21 n², and the distance grows with the root of that."""
    floor: NotNegative = 0.001
    """Smallest entropy threshold."""
    adaptive: bool = True
    """Weigh each case's cross-entropy by the share of its pseudo labels that were sure."""
    legacy_median: bool = False
    """Thresholds as PLOP's code computes them, which are not medians."""

    def declares(self) -> Declaration:
        """The pooled distillation; background's logit moves where it is shared out."""
        return replace(
            super().declares(), penalties=("pod",), keeps_old_logits=not self.splits_background
        )

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def prepares(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def prepare_case(self, step: Lesson, volume: Volume, old: Predictor | None) -> CaseTensors:
        """Entropies of the old model where a case shows nothing: (C_old, bins) counts."""
        if old is None:
            return {}
        names = step.structures if self.annotated_old == "annotation" else step.taught
        scale = self._scale(1 + len(step.old), 1 + len(step.structures))
        bins = 100 if self.legacy_median else BINS
        counts = torch.zeros(1 + len(step.old), bins, dtype=torch.long)
        for start, stop, logits in old.logits(volume):
            label = volume.labels(names, (slice(start, stop), slice(None), slice(None)))
            nothing = torch.from_numpy(label != 1).all(dim=0)
            counts += entropy_histogram(logits[None], nothing[None], bins=bins, scale=scale)
        return {"entropy": counts}

    def prepare(self, step: Lesson, per_case: Mapping[str, CaseTensors], memory: Memory) -> None:
        """One threshold per old channel: its median over all training cases."""
        # of stored cases there may be other tensors, and no entropies
        counts = [made["entropy"] for made in per_case.values() if "entropy" in made]
        if counts:
            total = torch.stack(counts).sum(dim=0)
            median, legacy = distillation.median_thresholds, distillation.legacy_thresholds
            rule = legacy if self.legacy_median else median
            memory[THRESHOLDS] = rule(total, floor=self.floor)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Entropy-gated cross-entropy and Dice on the new labels; POD on features and logits.

        Source: Douillard et al., CVPR 2021, sections 3.2 (Local POD) and 3.3 (pseudo labels by
        entropy, adaptive factor). Differs: see the head of this file and `legacy_median`.
        """
        if old is None:
            return super().losses(batch, new, old, memory)
        batch = self.seen(batch)
        allowed = allowed_channels(batch, unlabelled=self.unlabelled)
        count = len(batch.structures)
        thresholds = memory[THRESHOLDS]
        assert isinstance(thresholds, Tensor)  # noqa: S101  # set in prepare
        maps = {**new.features, "logits": logits_for_pod(new.logits, old.logits)}
        factors = {**dict.fromkeys(new.features, self.feature_factor), "logits": self.logit_factor}
        return {
            "ce": gated_ce(
                new.logits, allowed, old.logits, thresholds,
                scale=self._scale(old.logits.shape[1], 1 + count), adaptive=self.adaptive,
            ),
            **self.dice_of(batch, new, allowed, range(count)),
            "pod": pod(
                maps, {**old.features, "logits": old.logits}, factors=factors,
                current=1 + count, learned=len(batch.taught_index), pooled_axes=self.pooled_axes,
            ),
        }  # fmt: skip

    def _scale(self, old_channels: int, channels: int) -> float:
        """Factor on the normalized entropy: 1, or what PLOP's code divides by."""
        return 1.0 / (old_channels * math.log(channels)) if self.legacy_median else 1.0
