"""The Universal Model: language-driven heads; old structures by pseudo labels of the old model.

Before a step, the model of the previous step predicts every new training case; these predictions
stand in for the missing annotation of the old structures. `pseudo=hard` thresholds and cleans them
up, as the authors ran it; `pseudo=soft` keeps probabilities, as the paper writes it: a byte per
voxel and structure, or, where a step would need more than `soft_limit_mib`, computed on line from
the crops themselves. An old structure that the new data annotates is taught from the annotation
(`annotated_old=pseudo` is the paper's Eq. 5 to the letter). Nothing is frozen.

Source: paper, section 3.2 (heads), section 3.3 and eq. 5 (new steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from clbench.data.postprocess import DEFAULT_RULES, clean, known
from clbench.spec.settings import NotNegativeInt
from clbench.strategy import (
    Batch,
    CaseTensors,
    Choice,
    Declaration,
    Lesson,
    Memory,
    Output,
    Predictor,
    SearchSpace,
    Terms,
    labelled_on_line,
    pseudo_labels,
)
from clbench.strategy.losses import dice_bce, targets

from .finetune import Finetune

if TYPE_CHECKING:
    from clbench.data.volume import Volume


@dataclass(frozen=True, kw_only=True)
class Universal(Finetune):
    """Language-driven heads; old structures taught by the previous model's predictions."""

    search_space: ClassVar[SearchSpace] = {"pseudo": Choice(("hard", "soft"))}
    unlabelled: Literal["ignore", "background"] = "ignore"
    pseudo: Literal["hard", "soft"] = "hard"
    """Pseudo labels: thresholded, or probabilities."""
    soft_limit_mib: NotNegativeInt = 16384
    """Soft pseudo labels of a step that take more space than this are not stored: the old model
    runs in the loop, once per batch, and labels the crops (how that differs:
    `clbench.strategy.teacher_labels.labelled_on_line`)."""
    postprocess: bool = True
    """Clean hard pseudo labels."""
    rules: tuple[str, ...] = DEFAULT_RULES
    """By which rules of `clbench.data.postprocess`; as it is, those of the authors' code."""
    annotated_old: Literal["annotation", "pseudo"] = "annotation"
    """What teaches an old structure that the new data annotates."""

    def __post_init__(self) -> None:
        known(self.rules, "strategy.rules")

    def declares(self) -> Declaration:
        """The old model's predictions stand in for missing annotation."""
        return replace(super().declares(), past="predictions")

    def labels_on_line(self, step: Lesson) -> bool:
        """Whether soft pseudo labels are too large to store."""
        bytes_ = len(step.old) * step.voxels
        return self.pseudo == "soft" and bytes_ > self.soft_limit_mib * 2**20

    def takes_teacher(self, step: Lesson) -> bool:
        """Where pseudo labels are computed on line."""
        return self.labels_on_line(step)

    def prepares(self, step: Lesson) -> bool:
        """From step 2 on, unless the pseudo labels are computed on line."""
        return bool(step.old) and not self.labels_on_line(step)

    def prepare_case(self, step: Lesson, volume: Volume, old: Predictor | None) -> CaseTensors:
        """The old model's view of one training case, as (K_old, D, H, W) uint8."""
        if old is None:
            return {}
        hard = self.pseudo == "hard"
        tidy = (
            partial(clean, rules=self.rules, volume=volume) if hard and self.postprocess else None
        )
        return {"pseudo": pseudo_labels(old, volume, hard=hard, clean=tidy)}

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice and binary cross-entropy, pseudo labels filling in for the old structures.

        Source: paper, section 3.3, eq. 5 (pseudo labels of the old structures beside the annotation
        of the new), in the loss of eq. 3 and 4. Differs: see `annotated_old` and
        `legacy_slice_dice`; a mean over known (case, structure) pairs where eq. 4 writes a sum.
        """
        if old is not None and batch.pseudo is None:
            names = tuple(batch.structures[k] for k in batch.old_index)
            batch = labelled_on_line(batch, self.decode(old.logits.float(), names))
        target, known = targets(batch, annotated_old=self.annotated_old, unlabelled=self.unlabelled)
        return dice_bce(new.logits, target, known, slicewise=self.legacy_slice_dice)
