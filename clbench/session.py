"""What happens around each update of a phase: by default, the hooks of the strategy.

Room: row 2 (torch). Most methods need no more than those hooks. One that must see the optimizer,
draw crops of its own or replace the batches brings a session of its own (`Strategy.session`); the
loop, its phases and its schedule stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.data.volumes import Volume
from clbench.strategy import Batch, Lesson, Memory, Output, Phase, Strategy

Draw = Callable[["Volume | tuple[int, str]", Sequence[object]], tuple[Tensor, Tensor]]
"""(case, place) → image (1, *patch) and label (K, *patch); the crop depends on the place alone. A
case is (step, name) as the step may draw it, or a volume at hand."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What the loop lays out for one phase."""

    strategy: Strategy
    """The method."""
    model: nn.Module
    """The model; its forward returns `Output`."""
    teacher: nn.Module | None
    """The model served after the previous step, where the strategy takes it."""
    optimizer: torch.optim.Optimizer
    """The loop sets its learning rates before every update."""
    lesson: Lesson
    """The step."""
    phase: Phase
    """The phase."""
    memory: Memory
    """What the strategy remembers."""
    epochs: int
    """Of the phase."""
    updates: int
    """Per epoch."""
    batch: int
    """Crops per update."""
    seed: int
    """Of the run."""
    device: torch.device
    """Where to compute."""
    draw: Draw
    """Cuts a crop of a case that this step may open."""
    validation: Callable[[str], Volume] | None = None
    """Opens a validation case of this step."""
    done: int = 0
    """Updates of the phase that an earlier attempt has done."""


class Session:
    """The plain one: batches as they come, losses and changes as the strategy says."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def batches(self, own: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of the phase, one per update that is still to do.

        Args:
            own: those the loop draws; not drawn where nobody asks for them.
        """
        return own

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Forward pass and named loss terms, inside the loop's autocast."""
        d = self.desk
        new: Output = d.model(batch.image)
        old: Output | None = None
        if d.teacher is not None:
            with torch.no_grad():
                old = d.teacher(batch.image)
        return d.strategy.losses(batch, new, old, d.memory)

    def after_backward(self) -> None:
        """Gradients are there, unscaled; they may be clipped next."""
        self.desk.strategy.after_backward(self.desk.model, self.desk.memory)

    def before_update(self) -> None:
        """Gradients are final."""

    def after_update(self) -> None:
        """The weights have changed."""
        self.desk.strategy.after_update(self.desk.model, self.desk.memory)
