"""VISTA3D's recipe for a new class: all weights at a low constant rate, no loss on old classes.

From step 2 on all weights learn, by a loss of the structures it teaches alone. Others are neither
positive nor negative, and there is no teacher, pseudo label or replay: they drift through shared
weights only. `finetune` teaches old structures as background; this does not, so expect far less
forgetting than there. A structure that the step teaches again is a class of the loss like a new
one, as the recipe prompts every class that the new data's label mapping names.

Source: the continual-training recipe that NVIDIA ships for VISTA3D (He et al., CVPR 2025; MONAI
model zoo, `train_continual.json`): AdamW 5e-5 without a schedule, Dice of squared terms plus
cross-entropy, mean over prompted classes. Differs: network, crops and epochs are the profile's
(theirs: 5 epochs), and all training cases of the step are used (theirs: the first 10). There are no
prompts, so none is dropped, and class 0, which they prompt as a class of its own, has no
counterpart without a background channel. The last weights are served; theirs are the best on the
new classes, a selection that favours them over the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from clbench.errors import SettingError
from clbench.strategies.finetune import Finetune
from clbench.strategy import (
    Batch,
    Group,
    Lesson,
    Memory,
    Output,
    Phase,
    PhaseResult,
    Range,
    SearchSpace,
    Terms,
)
from clbench.strategy.losses import bce, squared_dice, targets


@dataclass(frozen=True, kw_only=True)
class VistaFinetune(Finetune):
    """VISTA3D's recipe: all weights at a constant low rate, loss of the new structures alone."""

    search_space: ClassVar[SearchSpace] = {"lr_factor": Range(low=0.02, high=1.0, log=True)}
    unlabelled: Literal["ignore"] = "ignore"  # it looks at no old label
    legacy_slice_dice: bool = False
    """Dice per slice along axis 0, as the authors' code computes it: in step 1 alone. Later steps
    have the recipe's Dice, of squared terms over the whole patch."""
    lr_factor: float = 0.5
    """Factor on the profile's learning rate from step 2 on; theirs is 5e-5, half of the 1e-4 of
    profile `paper`."""

    def __post_init__(self) -> None:
        if not self.lr_factor > 0:
            raise SettingError(
                "nothing is learned at this rate",
                where="strategy.lr_factor",
                expected="a number above 0",
                got=self.lr_factor,
                next_step="--set strategy.lr_factor=0.5",
            )

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        """One phase; from step 2 on at a constant rate."""
        phase = super().next_phase(step, memory, history)
        if phase is None or step.number == 1:
            return phase
        return replace(phase, constant=True)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """Everything learns, from step 2 on at the low rate."""
        groups = super().groups(model, step, memory)
        if step.number == 1:
            return groups
        return [replace(group, lr=group.lr * self.lr_factor) for group in groups]

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice of squared terms and binary cross-entropy of the new structures; plain in step 1.

        Source: the recipe above; step 1 as in `finetune`.
        """
        if not batch.old_index:
            return super().losses(batch, new, old, memory)
        target, known = targets(batch, unlabelled=self.unlabelled)
        k = batch.taught_index
        logits, target, known = new.logits[:, k], target[:, k], known[:, k]
        return {"dice": squared_dice(logits, target, known), "bce": bce(logits, target, known)}
