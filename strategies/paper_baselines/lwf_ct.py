"""LwF as the CT authors ran it: the old model's hard pseudo labels, and no distillation at all.

The previous model predicts every new training case offline; thresholded and cleaned up, these
predictions stand in for the missing annotation of the old structures. Dice (and, with
`head=sigmoid`, cross-entropy) is averaged over new and over old structures apart, so a structure of
the smaller group weighs more. `lwf` is the published method.

Source: paper, section 5.3 and Tables 10 and 11 ("pseudo labeling (LwF)"); the authors' CT code.
Differs: whole-patch Dice (`legacy_slice_dice`), the liver contains its tumors when decoded
(`legacy_exclusive`), 1 + K channels where they have 38, unannotated structures left open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.data.postprocess import DEFAULT_RULES, clean, known
from clbench.errors import SettingError
from clbench.strategies.finetune import Finetune
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategy import (
    Batch,
    CaseTensors,
    Declaration,
    Group,
    Kit,
    Lesson,
    Memory,
    Output,
    Predictor,
    Terms,
    contract,
    pseudo_labels,
)
from clbench.strategy.losses import dice_bce, targets
from clbench.strategy.partial_labels import allowed_channels, mean_ce

if TYPE_CHECKING:
    from clbench.data.volume import Volume


@dataclass(frozen=True, kw_only=True)
class LwfCt(SoftmaxFinetune):
    """LwF of Tables 10 and 11: softmax head taught by hard pseudo labels."""

    version: ClassVar[int] = 1  # the rates of its output layer are the source's, as ever
    of_softmax: ClassVar[tuple[str, ...]] = (
        "dice",
        "classifier_lr",
        "new_classifier_lr",
        "old_classifier_lr",
        "legacy_unannotated_background",
        "legacy_exclusive",
    )
    """Options that only the softmax head reads."""
    new_classifier_lr: float = 1.0
    """Factor on the learning rate of new rows from step 2 on, as in the authors' CT code."""
    old_classifier_lr: float = 1.0
    """The same of old rows, as in the authors' CT code."""
    unlabelled: Literal["ignore", "background"] = "ignore"
    head: Literal["softmax", "sigmoid"] = "softmax"
    """Output layer with background, as in the tables, or the Universal Model's heads."""
    postprocess: bool = True
    """Clean pseudo labels."""
    rules: tuple[str, ...] = DEFAULT_RULES
    """By which rules of `clbench.data.postprocess`; as it is, those of the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known(self.rules, "strategy.rules")
        for option in self.idle_options():
            self.refuse_without_softmax(option)

    def idle_options(self) -> tuple[str, ...]:
        """Beside the head of sigmoids, those that only the softmax head reads."""
        return self.of_softmax if self.head == "sigmoid" else ()

    def refuse_without_softmax(self, option: str) -> None:
        """Refuse an option of the softmax head that is changed beside the head of sigmoids.

        Args:
            option: its name.

        Raises:
            SettingError: it is not the default.
        """
        default = next(f.default for f in fields(self) if f.name == option)
        if self.head == "sigmoid" and getattr(self, option) != default:
            raise SettingError(
                "this option is of the softmax head alone",
                where=f"strategy.{option}",
                expected="strategy.head=softmax",
                got="strategy.head=sigmoid",
                next_step=f"--set strategy.head=softmax, or leave strategy.{option} out",
            )

    def declares(self) -> Declaration:
        """The old model's predictions stand in for missing annotation."""
        return replace(super().declares(), past="predictions")

    def first_step(self) -> contract.Strategy:
        """Plain training with this head."""
        if self.head == "sigmoid":
            return Finetune(legacy_slice_dice=self.legacy_slice_dice)
        return super().first_step()

    def build(self, kit: Kit, step: Lesson) -> nn.Module:
        """As the plain strategy."""
        return self.first_step().build(kit, step)

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """As the plain strategy."""
        self.first_step().grow(model, kit, step)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """As the plain strategy."""
        if self.head == "sigmoid":
            return self.first_step().groups(model, step, memory)
        return super().groups(model, step, memory)

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, C, …) logits → (B, K, …): the argmax of the softmax, or each sigmoid."""
        if self.head == "sigmoid":
            return torch.sigmoid(logits)
        return super().decode(logits, structures)

    def prepares(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def prepare_case(self, step: Lesson, volume: Volume, old: Predictor | None) -> CaseTensors:
        """The old model's hard labels for one training case, as (K_old, D, H, W) uint8."""
        if old is None:
            return {}
        tidy = partial(clean, rules=self.rules, volume=volume) if self.postprocess else None
        return {"pseudo": pseudo_labels(old, volume, hard=True, clean=tidy)}

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy on labels and pseudo labels; Dice of new and of old structures apart.

        Source: paper, section 5.3 ("pseudo labeling (LwF)"), with the Dice of eq. 3 and 4; the
        authors' CT code, LwF. Differs: see the head of this file.
        """
        if not batch.old_index:
            return self.first_step().losses(batch, new, old, memory)
        parts = {"new": batch.new_index, "old": batch.old_index}
        # a step that only teaches again has no new structures
        return self.supervised(self.seen(batch), new, {n: k for n, k in parts.items() if k})

    def supervised(
        self, batch: Batch, new: Output, parts: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """The supervised terms; Dice (and binary cross-entropy) once per part of the structures."""
        slices, terms = self.legacy_slice_dice, {}
        if self.head == "sigmoid":
            target, known = targets(batch, unlabelled=self.unlabelled)
            for part, k in parts.items():
                both = dice_bce(new.logits[:, k], target[:, k], known[:, k], slicewise=slices)
                terms.update({f"{name}_{part}": value for name, value in both.items()})
            return terms
        allowed = allowed_channels(batch, unlabelled=self.unlabelled)
        terms["ce"] = mean_ce(new.logits, allowed)
        for part, k in parts.items():
            for name, value in self.dice_of(batch, new, allowed, k).items():
                terms[f"{name}_{part}"] = value
        return terms
