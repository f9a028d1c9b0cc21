"""One path per step: every step's structures are answered by feature maps and a head of their own.

The model stays a `Segmenter`, whose backbone returns the maps of all paths and whose head gives
each path's maps to that path's head. So what an old path answers cannot depend on a new one, and is
computed in shapes that never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench.nets.backbones import Backbone, Maps
from clbench.nets.heads import Segmenter

READ = ("bottleneck", "final")
"""The maps that heads read."""


class StepBackbones(Backbone):
    """Backbones of separate networks, one per step; the first keeps its parameters' names.

    Args:
        first: of step 1.
    """

    def __init__(self, first: Backbone) -> None:
        super().__init__(first.encoder, first.decoder, **first.sizes)
        self.later = nn.ModuleList()

    def forward(self, image: Tensor) -> Maps:
        """(B, 1, D, H, W) → maps of the newest network; `step<t>.…`, what heads of step t read."""
        return path_maps([super().forward(image), *(network(image) for network in self.later)])


def path_maps(paths: Sequence[Mapping[str, Tensor]]) -> Maps:
    """The maps of several paths as one mapping: the last path's by their names, all by step."""
    by_step = {
        f"step{number}.{name}": maps[name] for number, maps in enumerate(paths, 1) for name in READ
    }
    return {**by_step, **paths[-1]}


class StepHeads(nn.Module):
    """Heads of separate paths, one per step.

    Args:
        first: of step 1.
        names: the structures it answers for.
    """

    def __init__(self, first: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.steps = nn.ModuleList([first])
        self.owned: list[tuple[str, ...]] = [tuple(names)]
        """Structures of every step."""

    def append(self, head: nn.Module, names: Sequence[str]) -> None:
        """The head of one more step, and the structures it answers for."""
        self.steps.append(head.to(next(self.parameters()).device))
        self.owned.append(tuple(names))

    def forward(self, maps: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Maps by step → (B, K, D, H, W) logits, in the order of learning."""
        logits: list[Tensor] = []
        for number, (head, owned) in enumerate(zip(self.steps, self.owned, strict=True), 1):
            part: Any = head({name: maps[f"step{number}.{name}"] for name in READ}, owned)
            logits.append(part)
        return torch.cat(logits, dim=1)


def add_network(model: Segmenter, network: Segmenter) -> None:
    """One more network beside those a model holds; nothing is shared.

    Args:
        model: of one network, or of several by this function; changes in place.
        network: the new one, with the structures it answers for.
    """
    if not isinstance(model.backbone, StepBackbones):
        first: Any = model.backbone
        model.backbone = StepBackbones(first)
        model.head = StepHeads(model.head, model.structures)
    assert isinstance(model.head, StepHeads)  # noqa: S101  # set together with the backbone
    at = next(model.parameters()).device
    model.backbone.later.append(network.backbone.to(at))
    model.head.append(network.head, network.structures)
    model.structures = (*model.structures, *network.structures)
