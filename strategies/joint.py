"""Joint training: at step t, all images of steps 1 to t, from fresh weights.

It breaks the rule of the game (no old images) on purpose. Data sets are drawn with equal
probability, and a step lasts t times as long as a step of the other methods, so that what it cannot
reach is not a matter of too little training. A reference to compare with, and no upper bound: a
case has the labels of its own step only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from clbench.strategy import Declaration, Lesson, Memory, Phase, PhaseResult, Strategy

from .finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Joint(Finetune):
    """Train on the images of all steps so far, from scratch: the joint reference."""

    unlabelled: Literal["ignore", "background"] = "ignore"

    def declares(self) -> Declaration:
        """All old images, and a new model in every step."""
        return replace(super().declares(), past="images", starts_from="scratch")

    def first_step(self) -> Strategy:
        """Step 1 is plain training."""
        return Finetune(legacy_slice_dice=self.legacy_slice_dice)

    def extra_cases(self, step: Lesson, memory: Memory) -> Mapping[tuple[int, str], float]:
        """Each earlier step's cases weigh as much together as this step's."""
        return {
            (number, case): 1.0 / len(cases)
            for number, cases in step.past.items()
            for case in cases
        }

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        """One phase, t times as long."""
        return None if history else Phase(effort=float(step.number))
