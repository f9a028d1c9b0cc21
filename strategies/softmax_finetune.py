"""Fine-tuning with a softmax head: the plain training that every softmax method's step 1 is.

One 1×1×1 output layer with a background channel; cross-entropy over channels plus the Dice of each
structure's own channel. From step 2 on it is the lower bound of this family: old structures that
the new data does not annotate count as background.

Source: the lower bound of class-incremental segmentation (Cermelli et al., CVPR 2020, "FT"); losses
of step 1, and the output layer's rate there (a hundred times the base), as in the authors' CT
baselines (paper, section 5.3), so that all softmax methods share one step 1. In later steps the
output layer keeps that rate, old rows and new ones alike: in the published codes of LwF, ILT, MiB,
PLOP and MBS one rate holds for the whole layer and no step changes its ratio to the rest. `lwf_ct`
and `plop_ct` have a source for another rule. Differs: where a structure is not annotated, the
cross-entropy leaves it open (`clbench.strategy.partial_labels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.heads import ConvHead, Segmenter
from clbench.strategy import (
    UNKNOWN,
    Batch,
    Group,
    Kit,
    Lesson,
    Memory,
    Output,
    Range,
    SearchSpace,
    Strategy,
    Terms,
)
from clbench.strategy.partial_labels import allowed_channels, decode_channels, mean_ce, sigmoid_dice


@dataclass(frozen=True, kw_only=True)
class SoftmaxFinetune(Strategy):
    """Softmax head with background, trained on the new data only: this family's lower bound."""

    version: ClassVar[int] = 2  # in version 1 the output layer learned at 1 from step 2 on
    step1_version: ClassVar[int | None] = 1
    serves_from: ClassVar[int | None] = 1
    earlier_defaults: ClassVar[Mapping[int, Mapping[str, Any]]] = {
        1: {"new_classifier_lr": 1.0, "old_classifier_lr": 1.0}
    }
    search_space: ClassVar[SearchSpace] = {
        "new_classifier_lr": Range(low=1.0, high=1000.0, log=True),
    }
    unlabelled: Literal["ignore", "background"] = "background"
    annotated_old: Literal["annotation", "pseudo"] = "annotation"
    """What teaches an old structure that the new data annotates; `pseudo`: the annotation is not
    used, the structure is treated like those without one, unless the step teaches it again."""
    dice: bool = True
    """Add the Dice of the annotated structures to the cross-entropy (2-D originals have none)."""
    classifier_lr: float = 100.0
    """Factor on the learning rate of the output layer in step 1, as in the authors' CT code."""
    new_classifier_lr: float = 100.0
    """The same factor from step 2 on, of the rows of new structures."""
    old_classifier_lr: float = 100.0
    """The same factor from step 2 on, of the rows of old structures and of background."""
    legacy_slice_dice: bool = False
    """Dice per slice along axis 0, as the authors' code computes it."""
    legacy_unannotated_background: bool = False
    """Softmax head: a new structure that a case does not annotate is background in it, as the
    authors taught the organs that BTCV's cases 61 to 80 lack. No declaration has a word for this
    defect, so `clbench check strategy` fails with it, and is meant to."""
    legacy_exclusive: bool = False
    """A structure is its own channel alone: a tumor in the liver is no liver, as the authors ran
    it."""

    def __post_init__(self) -> None:
        for name in ("classifier_lr", "new_classifier_lr", "old_classifier_lr"):
            if not (value := getattr(self, name)) >= 0:
                raise SettingError(
                    "a setting is out of range",
                    where=f"strategy.{name}",
                    expected="a factor of at least 0",
                    got=value,
                )

    def first_step(self) -> Strategy:
        """Plain training: in step 1 there is nothing old."""
        return SoftmaxFinetune(
            dice=self.dice,
            classifier_lr=self.classifier_lr,
            legacy_slice_dice=self.legacy_slice_dice,
            legacy_unannotated_background=self.legacy_unannotated_background,
        )

    @property
    def splits_background(self) -> bool:
        """Whether new channels start as equal shares of background; else as torch initialises.

        A subclass makes it an option, or sets it as a class attribute.
        """
        return False

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """Backbone and output layer: background, and one channel per structure of step 1."""
        with kit.fresh(step.number, "model"):
            backbone = kit.backbone()
            model = Segmenter(backbone, ConvHead(backbone.final_channels, background=True))
            model.add(step.learns, None, kit.prior)
        return model

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more channel per new structure; the old ones stay as they are."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built above; tells the type checker
        with kit.fresh(step.number, "grow"):
            model.add(step.learns, None, kit.prior)
        if self.splits_background:
            assert isinstance(model.head, ConvHead)  # noqa: S101  # built above
            model.head.split_background(step.learns)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """Everything is trained; the rows of the output layer at rates of their own."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built above; tells the type checker
        body, head = Group(parameters=list(model.backbone.parameters())), model.head
        old, new = self.old_classifier_lr, self.new_classifier_lr
        if step.number == 1 or old == new:
            rate = self.classifier_lr if step.number == 1 else new
            return [body, Group(parameters=list(head.parameters()), lr=rate)]
        assert isinstance(head, ConvHead)  # noqa: S101  # built above
        rows = {True: list[nn.Parameter](), False: list[nn.Parameter]()}
        for name, row in (*head.weight.items(), *head.bias.items()):
            rows[name in step.learns].append(row)
        return [body, Group(parameters=rows[False], lr=old), Group(parameters=rows[True], lr=new)]

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy over the channels the labels allow, and Dice.

        Source: the authors' CT code, softmax branch: cross-entropy beside the Dice of the paper's
        eq. 3 and 4. Differs: means over what is annotated; the channels a voxel may be follow from
        its labels (`partial_labels`); Dice over the whole patch (`legacy_slice_dice`).
        """
        batch = self.seen(batch)
        allowed = allowed_channels(batch, unlabelled=self.unlabelled)
        every = range(len(batch.structures))
        return {"ce": mean_ce(new.logits, allowed), **self.dice_of(batch, new, allowed, every)}

    def seen(self, batch: Batch) -> Batch:
        """The batch with the labels that options leave of it."""
        label, inside = batch.label.clone(), (batch.label != UNKNOWN).any(dim=1, keepdim=True)
        if self.annotated_old == "pseudo":
            label[:, batch.untaught_index] = UNKNOWN
        if self.legacy_unannotated_background:
            new = label[:, batch.new_index]
            label[:, batch.new_index] = new.masked_fill(inside & (new == UNKNOWN), 0)
        return replace(batch, label=label)

    def dice_of(
        self, batch: Batch, new: Output, allowed: Tensor, among: Sequence[int]
    ) -> dict[str, Tensor]:
        """`{"dice": …}` of some structures, or nothing without `dice`."""
        if not self.dice:
            return {}
        slices = self.legacy_slice_dice
        return {"dice": sigmoid_dice(new.logits, allowed, batch, among, slicewise=slices)}

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, 1 + K, D, H, W) logits → (B, K, D, H, W): above 0.5 where the argmax says so."""
        return decode_channels(logits, structures, exclusive=self.legacy_exclusive)
