"""DER++: DER, and the annotation of stored cases is trained on as well.

A second, independent draw of stored crops gives the loss of the plain method on their own labels:
what a case annotated in its step is known, whatever options say of the annotation of new cases, and
later structures are left out.

Source: Buzzega et al., NeurIPS 2020, and the authors' code (mammoth). Differs: as `der`; partial
labels. `alpha` and `beta` are the smallest buffer's of their CIFAR-10 runs; not tuned here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.spec.settings import NotNegative
from clbench.strategies.finetune import Finetune
from clbench.strategies.logit_replay.der import StoredLogits
from clbench.strategy import Batch, Declaration, Output, Range, SearchSpace

AS_STORED: Mapping[str, Any] = {
    "unlabelled": "ignore",
    "annotated_old": "annotation",
    "legacy_unannotated_background": False,
}
"""Options by which the labels of a stored case count as they are: to the step that draws it, all
its structures are old, and those learned since have no annotation."""


@dataclass(frozen=True, kw_only=True)
class StoredLogitsAndLabels(StoredLogits):
    """What DER++ adds to the method it stands before."""

    search_space: ClassVar[SearchSpace] = {"beta": Range(low=0.05, high=5.0, log=True)}
    alpha: NotNegative = 0.1
    """Weight of the mean squared difference to the stored logits."""
    beta: NotNegative = 0.5
    """Weight of the loss on the labels of stored cases."""

    def declares(self) -> Declaration:
        """The term `replay`, where it has a weight."""
        promised = super().declares()
        own = ("replay",) if self.beta else ()
        return replace(promised, penalties=(*promised.penalties, *own))

    def replayed(self) -> Mapping[str, Any]:
        """The stored logits, and on a draw of its own the labels."""
        own = {"replay": self.stored_labels_loss} if self.beta else {}
        return {**super().replayed(), **own}

    def stored_labels_loss(self, batch: Batch, new: Output, logits: Sequence[Tensor]) -> Tensor:
        """`beta` times the method's own loss on the labels, structures learned later left out.

        Options that take labels away or fill them in are for the cases of the step (`AS_STORED`).

        Args:
            batch: crops of stored cases.
            new: what the model says to them.
            logits: those stored with each crop; not looked at.

        Source: Buzzega et al., NeurIPS 2020, eq. 7; golden `der_segmentation_port`. Differs:
        partial labels.
        """
        method: Any = self
        options = {f.name: AS_STORED[f.name] for f in fields(method) if f.name in AS_STORED}
        terms = replace(method, **options).losses(batch, new, None, {})
        return self.beta * torch.stack(list(terms.values())).sum()


@dataclass(frozen=True, kw_only=True)
class Derpp(StoredLogitsAndLabels, Finetune):
    """Fine-tuning that keeps stored logits and trains on the stored cases' labels."""
