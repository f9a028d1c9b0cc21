"""Heads that compute the logits of each step's structures apart, so that growth changes no bit.

A library picks its kernel, and with it the order of a sum, by the shape of what it multiplies. One
product over the structures of all steps may therefore round old logits otherwise once there are new
ones. Here every step's structures are one product of their own, whose shape never changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.heads import ConvHead, Segmenter, UniversalHead, dynamic_head

Head = TypeVar("Head", "StepwiseUniversalHead", "StepwiseConvHead")


def _by_step(names: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    """The names, step by step; those of the newest step come last."""
    rest = iter(names)
    for size in (*sizes, len(names)):
        if chunk := list(itertools.islice(rest, size)):
            yield chunk


class StepwiseUniversalHead(UniversalHead):
    """`UniversalHead` whose generated layers are applied step by step.

    Image vector, normalization and narrowing of the features are computed once for all steps.
    """

    step_sizes: tuple[int, ...] = ()
    """Structures of every step before the newest."""

    def forward(self, maps: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Maps → (B, len(names), D, H, W) logits."""
        features = self.pre(maps["final"])
        generated = self.generate(maps["bottleneck"], names)
        logits, start = [], 0
        for chunk in _by_step(names, self.step_sizes):
            # memory of its own, so that not even its alignment depends on what was learned later
            own = generated[:, start : start + len(chunk)].clone(
                memory_format=torch.contiguous_format
            )
            logits.append(dynamic_head(features, own))
            start += len(chunk)
        return torch.cat(logits, dim=1)


class StepwiseConvHead(ConvHead):
    """`ConvHead` applied step by step, with channels allocated for structures to come.

    Args:
        final_channels: channels of `final`.
        background: whether channel 0 is background (softmax), or every channel a structure.
    """

    step_sizes: tuple[int, ...] = ()
    """Structures of every step before the newest."""
    unused: tuple[str, ...] = ()
    """Channels without a structure, after all others; `add` uses them up in order."""

    def reserve(self, count: int) -> None:
        """Allocate channels for structures to come."""
        names = tuple(f"reserved{i}" for i in range(count))
        for name in names:
            super().add(name)
        self.unused = names

    def add(self, name: str, vector: Tensor | None = None) -> None:
        """One more channel: the next reserved one, else a new one.

        Args:
            name: the structure.
            vector: not used; heads share this signature.

        Raises:
            TrainingError: it is there already.
        """
        super().add(name)
        if self.unused:
            reserved, *rest = self.unused
            self.unused = tuple(rest)
            self.weight[name] = self.weight.pop(reserved)
            self.bias[name] = self.bias.pop(reserved)

    def rows(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Weights and biases of some channels."""
        return [p for n in names for p in (self.weight[n], self.bias[n])]

    def forward(self, maps: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """Maps → (B, [background +] len(names) + reserved, D, H, W) logits."""
        first, *later = _by_step(names, self.step_sizes)
        if self.background:
            first = ["background", *first]
        parts = [first, *later, *([list(self.unused)] if self.unused else [])]
        return torch.cat([self.logits(maps["final"], part) for part in parts], dim=1)


def compute_by_step(model: nn.Module, kind: type[Head], old: int) -> Head:
    """Let the head of a model compute what it has learned since apart from what it learns next.

    Args:
        model: a `Segmenter` whose head is plain, or of this kind already; changes in place.
        kind: the stepwise form of its head; takes over the parameters, under the same names.
        old: structures learned so far.

    Returns:
        The head.

    Raises:
        TrainingError: a model with another head.
    """
    if not (isinstance(model, Segmenter) and isinstance(model.head, kind.__bases__[0])):
        raise TrainingError(
            "this model has no head that can be computed step by step",
            where=type(model).__name__,
            expected=f"a Segmenter with a {kind.__bases__[0].__name__}",
            got=type(getattr(model, "head", None)).__name__,
            next_step="grow a model that this strategy, or its first step, built",
        )
    if not isinstance(model.head, kind):
        stepwise = kind.__new__(kind)
        stepwise.__dict__.update(model.head.__dict__)  # parameters and submodules, none made anew
        model.head = stepwise
    head: Head = model.head
    head.step_sizes = (*head.step_sizes, old - sum(head.step_sizes))
    return head
