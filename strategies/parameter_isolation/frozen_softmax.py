"""A frozen backbone under a softmax: after step 1 only the new rows of the output layer learn.

Backbone, background's row and the rows of old structures are fixed, and there is neither teacher
nor pseudo label. Old logits stay equal to the bit for images of equal shapes; an old structure
loses the voxels that a new channel wins.

Source: DFT*, Zhang et al., arXiv 2508.04267 (2025), and their code. Theirs allocates the channels
of all steps in advance, which stand in the softmax of step 1 and learn to be never true:
`preallocate`, as many as the course will add, is DFT*; no other method here is told in step 1 how
many structures are to come, so the default is 0. Differs: 3-D; Dice of the new structures is added
(`dice=false` takes it out); one rate of new rows (`new_classifier_lr`), where theirs is set per
setting over a range of 200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.heads import Segmenter
from clbench.nets.stepwise_heads import StepwiseConvHead, compute_by_step
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategy import Batch, Group, Kit, Lesson, Memory, Output, Strategy, Terms
from clbench.strategy.course_checks import refuse_steps_without_new_structures
from clbench.strategy.partial_labels import allowed_channels, mean_ce


@dataclass(frozen=True, kw_only=True)
class FrozenSoftmax(SoftmaxFinetune):
    """Backbone, background and old channels of a softmax are fixed; only new channels learn."""

    version: ClassVar[int] = 2  # in version 1 padding counted where channels were in reserve
    serves_from: ClassVar[int | None] = 1
    earlier_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {}}
    unlabelled: Literal["ignore", "background"] = "background"
    preallocate: int = 0
    """Channels without a structure that step 1 trains along as never true; new structures take
    them over in order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preallocate < 0:
            raise SettingError(
                "channels cannot be taken away in advance",
                where="strategy.preallocate",
                expected="0, or the number of structures that later steps add",
                got=self.preallocate,
                next_step="--set strategy.preallocate=0",
            )
        self._refuse_rate_of_old_rows()
        raised = next(kind for kind in type(self).__mro__ if "version" in vars(kind))
        if self.preallocate == 0 and raised is FrozenSoftmax:
            object.__setattr__(self, "version", 1)  # without channels in reserve no number moved

    def _refuse_rate_of_old_rows(self) -> None:
        """Refuse a rate of rows that never learn.

        Raises:
            SettingError: it is not the default.
        """
        default = next(f.default for f in fields(self) if f.name == "old_classifier_lr")
        if self.old_classifier_lr != default:
            raise SettingError(
                "the rows of old structures are fixed here, so they have no rate",
                where="strategy.old_classifier_lr",
                expected=default,
                got=self.old_classifier_lr,
                next_step="leave strategy.old_classifier_lr out; strategy.new_classifier_lr is "
                "the rate of new rows",
            )

    def first_step(self) -> Strategy:
        """Plain training, unless further channels stand in the softmax."""
        if self.preallocate == 0:
            return super().first_step()
        plain = FrozenSoftmax()
        return replace(
            self,
            unlabelled="background",
            annotated_old="annotation",
            new_classifier_lr=plain.new_classifier_lr,
            legacy_exclusive=plain.legacy_exclusive,
        )

    def refuse_course(self, steps: Sequence[Lesson], kit: Kit) -> None:
        """A step without new structures has nothing to train."""
        refuse_steps_without_new_structures(self, steps)

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """Backbone and output layer: background, step 1's structures, channels in reserve."""
        with kit.fresh(step.number, "model"):
            backbone = kit.backbone()
            head = StepwiseConvHead(backbone.final_channels, background=True)
            model = Segmenter(backbone, head)
            model.add(step.learns, None, kit.prior)
            head.reserve(self.preallocate)
        return model

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more channel per new structure, computed apart from the old ones."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built above, or by the first step
        head = compute_by_step(model, StepwiseConvHead, len(step.old))
        with kit.fresh(step.number, "grow"):
            for name in step.learns:  # what a channel in reserve has learned is its start
                model.add([name], None, None if head.unused else kit.prior)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """All in step 1, then the channels of this step and those in reserve."""
        if step.number == 1:
            return super().groups(model, step, memory)
        if not step.learns:
            return []
        assert isinstance(model, Segmenter)  # noqa: S101  # built above
        assert isinstance(model.head, StepwiseConvHead)  # noqa: S101  # built above
        rows = model.head.rows([*step.learns, *model.head.unused])
        return [Group(parameters=rows, lr=self.new_classifier_lr)]

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy over all channels, those in reserve included, and Dice of the new ones.

        Source: Zhang et al., arXiv 2508.04267, and their code. Differs: which channels a voxel may
        be follows from its labels; the mean is over voxels whose labels say anything; Dice beside
        the cross-entropy.
        """
        batch = self.seen(batch)
        allowed = allowed_channels(batch, unlabelled=self.unlabelled)
        reserved = new.logits.shape[1] - allowed.shape[1]
        # a channel in reserve is never true, and of a voxel that says nothing it says nothing
        nothing = allowed.all(dim=1, keepdim=True).expand(-1, reserved, *allowed.shape[2:])
        terms = {"ce": mean_ce(new.logits, torch.cat([allowed, nothing], dim=1))}
        own = Output(logits=new.logits[:, : allowed.shape[1]])
        return {**terms, **self.dice_of(batch, own, allowed, batch.new_index)}

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, 1 + K + reserved, D, H, W) → (B, K, D, H, W); a channel in reserve never wins."""
        return super().decode(logits[:, : 1 + len(structures)], structures)
