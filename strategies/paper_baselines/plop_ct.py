"""PLOP as the CT authors ran it: hard pseudo labels without a gate, and POD on all maps but one.

Cross-entropy on new labels and pseudo labels, Dice averaged over old and new structures together,
and pooled distillation of encoder, bottleneck and decoder maps; neither the final map nor the
logits are compared (nor is Swin UNETR's raw last hidden state), and no pseudo label is weighed by
its certainty. `plop` is the published method.

Source: paper, section 5.3 and Tables 10 and 11; the authors' CT code. Differs: as `lwf_ct`. For
one defect of that code there is no option: its label map takes every channel of a file, so where a
file also annotates structures of later steps, these enter the cross-entropy before they are taught.
In clbench labels of later steps never reach a strategy, so no option of one could use them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from clbench.spec.settings import NotNegative
from clbench.strategy import (
    Batch,
    Declaration,
    Lesson,
    Memory,
    Output,
    PhaseContext,
    Range,
    SearchSpace,
    Session,
    Terms,
)
from clbench.strategy.distillation import pod

from .lwf_ct import LwfCt


def raw_maps(model: nn.Module) -> tuple[str, ...]:
    """Encoder maps that are raw hidden states of a transformer, not among the nine compared.

    `enc4` of Swin UNETR, the last skip, which no convolution of the encoder has seen; of other
    networks it is a stage like the others.

    Args:
        model: a backbone below a head, as `build` makes it.
    """
    encoder = getattr(getattr(model, "backbone", None), "encoder", None)
    return ("enc4",) if hasattr(encoder, "swinViT") else ()


class WithoutRawMaps(Session):
    """The strategy's losses without raw hidden states: the network tells which maps are, no map."""

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward passes and all terms."""
        context = self.context
        assert context.teacher is not None  # noqa: S101  # else there is no such session
        raw = raw_maps(context.model)
        new = _without(context.model(batch.image), raw)
        with torch.no_grad():
            old = _without(context.teacher(batch.image), raw)
        return context.strategy.losses(batch, new, old, context.memory)


def _without(output: Output, names: Collection[str]) -> Output:
    """The output without these maps."""
    kept = {name: of for name, of in output.features.items() if name not in names}
    return replace(output, features=kept)


@dataclass(frozen=True, kw_only=True)
class PlopCt(LwfCt):
    """PLOP of Tables 10 and 11: pseudo labels, and pooled distillation of maps (Swin's: nine)."""

    search_space: ClassVar[SearchSpace] = {"factor": Range(low=1e-5, high=0.05, log=True)}
    factor: NotNegative = 0.0005
    """Factor of the distance of every map (the original's for logits alone)."""

    def declares(self) -> Declaration:
        """The old model itself, for the pooled distillation."""
        return replace(super().declares(), past="weights", penalties=("pod",))

    def takes_teacher(self, step: Lesson) -> bool:
        """From step 2 on."""
        return bool(step.old)

    def session(self, context: PhaseContext) -> Session | None:
        """Leaves out raw hidden states, where the network has any."""
        if context.teacher is None or not raw_maps(context.model):
            return super().session(context)
        return WithoutRawMaps(context)

    def losses(self, batch: Batch, new: Output, old: Output | None, memory: Memory) -> Terms:
        """Cross-entropy and Dice on labels and pseudo labels; POD over three planes per cell.

        Source: paper, section 5.3, with the Dice of eq. 3 and 4; the authors' CT code, PLOP (after
        the Local POD of Douillard et al., CVPR 2021, section 3.2). Differs: see the head of this
        file.
        """
        if old is None:
            return super().losses(batch, new, old, memory)
        batch = self.seen(batch)
        count = len(batch.structures)
        maps = [name for name in new.features if name != "final"]
        return {
            **self.supervised(batch, new, {"all": range(count)}),
            "pod": pod(
                new.features, old.features, factors=dict.fromkeys(maps, self.factor),
                current=count, learned=len(batch.taught_index), pooled_axes=1,
            ),
        }  # fmt: skip
