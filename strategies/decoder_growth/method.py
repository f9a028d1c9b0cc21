"""Decoder growth: the encoder is frozen after step 1, and every step adds a decoder of its own.

Source: Ji et al., ICCV 2023; their released code (2025). Differs: the encoder learns in step 1, not
from a large base data set; the profile's backbone; sigmoids without background; no distillation,
deep supervision, architecture search or features of older decoders; `classifier_lr`, `body_range`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.growing_decoders import GrowingDecoders, one_winner
from clbench.spec.settings import Count, NotNegative, Share
from clbench.strategies.decoder_growth import axial_range, pruning
from clbench.strategy import (
    Batch,
    CaseTensors,
    Choice,
    DrawBatches,
    Group,
    Kit,
    Lesson,
    Memory,
    Output,
    Phase,
    PhaseResult,
    Predictor,
    Range,
    SearchSpace,
    Strategy,
    Terms,
)
from clbench.strategy.course_checks import refuse_steps_without_new_structures
from clbench.strategy.losses import dice_bce, targets

if TYPE_CHECKING:
    from clbench.data.volume import Volume


@dataclass(frozen=True, kw_only=True)
class DecoderGrowth(Strategy):
    """One frozen encoder, a new decoder per step: forgets nothing, and grows."""

    version: ClassVar[int] = 2  # in version 1 output layers learned at the rate of the rest
    search_space: ClassVar[SearchSpace] = {
        "start": Choice(("random", "copy")),
        "classifier_lr": Range(low=1.0, high=1000.0, log=True),
    }
    unlabelled: Literal["ignore"] = "ignore"  # it looks at no old label
    start: Literal["random", "copy"] = "random"
    """A new decoder's weights: fresh, or the previous decoder's as it was served."""
    classifier_lr: NotNegative = 100.0
    """Factor on the learning rate of a new output layer: that of the CT baselines' first step."""
    prune: bool = False
    """Prune each decoder after it was trained (needs validation cases)."""
    tolerance: Share = 0.02
    """Share of the validation Dice that a pruning step may cost."""
    attempts: Count = 8
    """Retrainings of one epoch that a pruning step may take."""
    ema: Share = 0.0
    """Decay of the served decoder's running average, which warms up; 0: none. Theirs: 0.99."""
    body_range: bool = False
    """Limit each structure to where along the body it was annotated (theirs: a network tells)."""
    exclusive: bool = False
    """Where decoders disagree, the more probable structure has the voxel (old ones may lose it)."""

    def first_step(self) -> Strategy:
        """Without what nothing reads in step 1: there is one decoder, and none before it."""
        plain = DecoderGrowth()
        if self.prune:  # its answers are validated, as they are decoded
            return replace(self, start=plain.start)
        return replace(
            self,
            start=plain.start,
            exclusive=plain.exclusive,
            tolerance=plain.tolerance,
            attempts=plain.attempts,
        )

    def refuse_course(self, steps: Sequence[Lesson], kit: Kit) -> None:
        """A step without new structures has nothing to train; pruning is judged by validation."""
        refuse_steps_without_new_structures(self, steps)
        for step in steps:
            if self.prune and not step.validation:
                raise TrainingError(
                    "pruning is judged by validation cases, and a step has none",
                    where=f"strategy.prune, step {step.number}",
                    expected="cases under `validation` in the split of every step",
                    next_step=f"name some with --split {step.source}=FILE.toml, or "
                    "--set strategy.prune=false",
                )

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """Backbone and one sigmoid channel per structure of step 1."""
        with kit.fresh(step.number, "model"):
            return GrowingDecoders(cast(Any, kit.backbone()), step.learns, kit.prior)

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more decoder; nothing else changes."""
        with kit.fresh(step.number, "grow"):
            fresh = cast(Any, kit.backbone()).decoder if self.start == "random" else None
            cast(GrowingDecoders, model).add(step.learns, kit.prior, fresh)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """All in step 1 until pruning, then the newest decoder; the encoder never learns again."""
        if not step.learns:
            return []
        growing = cast(GrowingDecoders, model)
        decoder, output = (list(part.parameters()) for part in growing.newest())
        if step.number == 1 and not pruning.pruning_has_begun(memory):
            decoder = [*growing.backbone.parameters(), *decoder]
        return [Group(parameters=decoder), Group(parameters=output, lr=self.classifier_lr)]

    def prepares(self, step: Lesson) -> bool:
        """Only to learn where along the body structures are."""
        return self.body_range

    def prepare_case(self, step: Lesson, volume: Volume, old: Predictor | None) -> CaseTensors:
        """Structure → (n,) heights of the slices that show it, as shares of the body."""
        return axial_range.slice_heights(volume, step.learns) if self.body_range else {}

    def prepare(self, step: Lesson, per_case: Mapping[str, CaseTensors], memory: Memory) -> None:
        """The range of each new structure."""
        axial_range.store_ranges(per_case.values(), memory)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Dice and binary cross-entropy of the new structures.

        Source: Ji et al., ICCV 2023, and their code. Differs: see the head of this file.
        """
        target, known = targets(batch, unlabelled=self.unlabelled)
        k = batch.new_index
        return dice_bce(new.logits[:, k], target[:, k], known[:, k])

    def next_phase(
        self, step: Lesson, memory: Memory, history: Sequence[PhaseResult]
    ) -> Phase | None:
        """Train; with `prune`, then prune as far as validation allows, and recover."""
        if self.prune:
            return pruning.next_prune_phase(
                history, tolerance=self.tolerance, attempts=self.attempts
            )
        return super().next_phase(step, memory, history)

    def enter_phase(self, phase: Phase, model: nn.Module, memory: Memory) -> None:
        """Prune, rewind or roll back the newest decoder; the average starts anew."""
        pruning.enter_phase(phase, cast(GrowingDecoders, model).newest(), memory)

    def after_update(self, model: nn.Module, memory: Memory) -> None:
        """Keep pruned weights at zero; move the average."""
        growing = cast(GrowingDecoders, model)
        pruning.apply_masks(growing.decoders[-1], pruning.current_masks(memory))
        if self.ema:
            number = len(growing.decoders)
            pruning.update_ema(growing.newest(), memory, number, decay=self.ema)

    def prunes(self, model: nn.Module) -> int:
        """The weights that are removed when every decoder passes every level."""
        decoders = cast(GrowingDecoders, model).decoders
        return pruning.most_pruned_weights(decoders) if self.prune else 0

    def finish(self, step: Lesson, model: nn.Module, draws: DrawBatches, memory: Memory) -> None:
        """The average becomes the decoder's weights (a copy starts there); zeros stay zero."""
        pruning.finish_step(cast(GrowingDecoders, model), memory)

    def serve(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The model, or a copy with every decoder's average."""
        return pruning.ema_model(cast(GrowingDecoders, model), memory) if self.ema else model

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, K, D, H, W) logits → probabilities."""
        return one_winner(logits.sigmoid(), structures) if self.exclusive else logits.sigmoid()

    def axial_ranges(
        self,
        image_hu: NDArray[np.int16],
        spacing_mm: tuple[float, float, float],
        structures: tuple[str, ...],
        memory: Memory,
    ) -> Mapping[str, tuple[int, int]]:
        """The slices of this body that the learned ranges stand for."""
        return axial_range.slice_ranges(image_hu, structures, memory) if self.body_range else {}
