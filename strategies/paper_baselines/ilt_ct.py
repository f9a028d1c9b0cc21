"""ILT as the CT authors ran it: hard pseudo labels, and the bottleneck held to the old model's.

Softmax head (the tables'): cross-entropy on new labels and pseudo labels, Dice of the new
structures, mean squared difference of the bottleneck, all of weight 1. `head=sigmoid` uses no
pseudo labels and distills each old structure's logit instead. `ilt` is the published method.

Source: paper, section 5.3 and Tables 10 and 11; the authors' CT code. Differs: as `lwf_ct`; the
defects of that code are options that are off: `legacy_shifted_dice`, `legacy_fresh_classifier`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.nets.heads import Segmenter
from clbench.spec.taxonomy import structure
from clbench.strategy import UNKNOWN, Batch, Declaration, Kit, Lesson, Memory, Output, Terms
from clbench.strategy.distillation import feature_mse, kd_sigmoid
from clbench.strategy.losses import dice, targets

from .lwf_ct import LwfCt


@dataclass(frozen=True, kw_only=True)
class IltCt(LwfCt):
    """ILT of Tables 10 and 11: pseudo labels, and distillation of the bottleneck."""

    version: ClassVar[int] = 2  # in version 1 its output layer learned at 1 from step 2 on
    serves_from: ClassVar[int | None] = 1
    of_softmax: ClassVar[tuple[str, ...]] = (
        *LwfCt.of_softmax,
        "unlabelled",
        "annotated_old",
        "postprocess",
        "rules",
        "legacy_shifted_dice",
        "legacy_fresh_classifier",
    )
    new_classifier_lr: float = 100.0
    """Factor on the learning rate of new rows from step 2 on, as in the authors' ILT."""
    old_classifier_lr: float = 100.0
    """The same of old rows, as in the authors' ILT, with a fresh classifier or without."""
    legacy_shifted_dice: bool = False
    """Softmax head: the Dice of a structure that the step teaches takes the target of the next id
    of the paper's Table 2, as the authors' index is off by one (`y[:, 1:]` of labels that hold no
    background). The next structure's label or pseudo label where there is one; otherwise 255, which
    their files hold for what nobody annotated and their Dice takes for a number: such a structure,
    like the liver tumor, is pulled towards the whole patch. What their files know of later steps is
    not had."""
    legacy_fresh_classifier: bool = False
    """Start every step with a fresh output layer: the authors' loader drops every weight with "out"
    in its name."""

    def declares(self) -> Declaration:
        """The bottleneck's distance; for sigmoid heads old logits, too."""
        return replace(
            super().declares(),
            past="weights",
            penalties=("features", "distill") if self.head == "sigmoid" else ("features",),
            keeps_old_logits=not self._starts_anew,
        )

    @property
    def _starts_anew(self) -> bool:
        return self.legacy_fresh_classifier and self.head == "softmax"

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """As the plain strategy, or with a fresh output layer."""
        super().grow(model, kit, step)
        if self._starts_anew:
            assert isinstance(model, Segmenter)  # noqa: S101  # built by it; tells the type checker
            with kit.fresh(step.number, "classifier"), torch.no_grad():
                fresh = nn.Conv3d(model.backbone.final_channels, 1 + len(model.structures), 1)
                head: Any = model.head
                for i, name in enumerate(("background", *model.structures)):
                    head.weight[name].copy_(fresh.weight[i])
                    head.bias[name].copy_(fresh.bias[i : i + 1])

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def prepares(self, step: Lesson) -> bool:
        """From step 2 on, for the softmax head."""
        return bool(step.old) and self.head == "softmax"

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Supervised terms, the bottleneck's distance, and old logits for the sigmoid head.

        Source: paper, section 5.3, with the Dice of eq. 3 and 4; the authors' CT code, ILT (after
        the distillation on the intermediate feature space of Michieli and Zanuttigh, 2019).
        Differs: see the head of this file.
        """
        if old is None:
            return super().losses(batch, new, old, memory)
        batch = self.seen(batch)
        terms = self.supervised(batch, new, {"new": batch.taught_index})
        if self.legacy_shifted_dice and "dice_new" in terms:
            terms["dice_new"] = self._shifted(batch, new)
        terms["features"] = feature_mse(new.features["bottleneck"], old.features["bottleneck"])
        if self.head == "sigmoid":
            k = batch.old_index
            terms["distill"] = kd_sigmoid(new.logits[:, k], old.logits[:, k])
        return terms

    def _shifted(self, batch: Batch, new: Output) -> Tensor:
        """The Dice of each structure the step teaches against the target of the next id."""
        target, known = targets(batch)
        target = torch.where(known, target, float(UNKNOWN))
        k, ids = batch.taught_index, [structure(name).template_id for name in batch.structures]
        shifted = torch.full_like(target[:, k], float(UNKNOWN))
        for place, own in enumerate(ids[i] for i in k):
            if own is not None and own + 1 in ids:
                shifted[:, place] = target[:, ids.index(own + 1)]
        inside = known.any(dim=1, keepdim=True).expand_as(shifted)
        slices = self.legacy_slice_dice
        return dice(new.logits[:, 1:][:, k], shifted, inside, slicewise=slices)
