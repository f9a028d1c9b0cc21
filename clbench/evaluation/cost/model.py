"""Cost of a method's model after each step: parameters, multiply-adds of its parts, bytes.

Models are built and grown, not trained; no image is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from clbench.evaluation.cost.multiply_adds import OTHER, Scope, count
from clbench.nets.backbones import Backbone
from clbench.nets.growing_decoders import GrowingDecoders
from clbench.nets.heads import Segmenter
from clbench.nets.output import count_parameters
from clbench.spec.benchmark import Benchmark
from clbench.strategy.contract import Kit, Lesson, Strategy

PARTS = ("encoder", "decoder", "heads", "generator", OTHER)
"""Where a network's operations lie; `other`: in none of the four."""
GENERATE = "generate"
"""Heads with a method of this name make their parameters in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """The model after a step, as it is built: nothing trained."""

    step: int
    """1-based."""
    structures: int
    """Learned so far."""
    parameters: int
    """All of them."""
    trainable_parameters: int
    """Those this step trains, in its first phase."""
    nonzero_parameters: int
    """Those not zero, nothing pruned."""
    fewest_nonzero_parameters: int
    """The same if the strategy prunes as far as it may; how far it gets, a run records."""
    macs: dict[str, int]
    """Part → multiply-adds of one forward pass of one patch; parts as in `PARTS`."""
    teacher_bytes: int
    """Weights and buffers of the old model where this step needs it; else 0."""

    @property
    def forward_macs(self) -> int:
        """Multiply-adds of one patch, all parts."""
        return sum(self.macs.values())


def parts(model: nn.Module) -> dict[str, list[Scope]]:
    """Part → the modules and methods it runs in, for `multiply_adds.count`."""
    scopes: dict[str, list[Scope]] = {p: [] for p in PARTS if p != OTHER}
    for module in model.modules():
        if isinstance(module, Backbone):
            scopes["encoder"].append(module.encoder)
            scopes["decoder"].append(module.decoder)
        elif isinstance(module, GrowingDecoders):
            scopes["decoder"] += module.decoders
            scopes["heads"] += module.heads
        elif isinstance(module, Segmenter):
            scopes["heads"].append(module.head)
        if callable(getattr(module, GENERATE, None)):
            scopes["generator"].append((module, GENERATE))
    return scopes


def forward_macs(model: nn.Module, patch_vox: Sequence[int]) -> dict[str, int]:
    """Part → multiply-adds of one patch (1, 1, D, H, W); every part is there.

    Raises:
        CostError: an operator cannot be counted.
        SettingError: the network cannot work on patches of this size.
    """
    macs = count(model, [(1, 1, *patch_vox)], parts)
    return {part: macs.get(part, 0) for part in PARTS}


def lessons_of(benchmark: Benchmark) -> list[Lesson]:
    """The steps of a course without their cases."""
    return [
        Lesson(
            number=i,
            learns=step.learns,
            again=step.again,
            structures=benchmark.structures(i),
            source=step.source,
        )
        for i, step in enumerate(benchmark.steps, 1)
    ]


def grown(
    strategy: Strategy, kit: Kit, lessons: Sequence[Lesson]
) -> Iterator[tuple[Lesson, nn.Module, int]]:
    """Lesson, the model of that step, bytes of the old model where the step needs it (else 0).

    It is one model that grows: look at it before asking for the next.

    Args:
        strategy: builds the model and grows it.
        kit: trunk and text vectors to build from.
        lessons: the steps, in order.
    """
    model = strategy.build(kit, lessons[0])
    for lesson in lessons:
        stored = 0
        if lesson.number > 1:
            stored = stored_bytes(model) if needs_old_model(strategy, lesson) else 0
            if lesson.learns:
                strategy.grow(model, kit, lesson)
        yield lesson, model, stored


def step_cost(
    strategy: Strategy, lesson: Lesson, model: nn.Module, stored: int, patch_vox: Sequence[int]
) -> StepCost:
    """The cost of one step, from what `grown` gives.

    Args:
        strategy: says which parameters a step trains, and how many it may set to 0.
        lesson: the step.
        model: as it is in this step.
        stored: bytes of the old model that is kept beside it; 0 for none.
        patch_vox: (D, H, W) of a training crop, in voxels.

    Raises:
        CostError: an operator cannot be counted.
    """
    every, nonzero = count_parameters(model)
    trained = {
        id(p): p.numel()
        for group in strategy.groups(model, lesson, {})
        for p in group.parameters
    }  # fmt: skip
    return StepCost(
        step=lesson.number,
        structures=len(lesson.structures),
        parameters=every,
        trainable_parameters=sum(trained.values()),
        nonzero_parameters=nonzero,
        fewest_nonzero_parameters=nonzero - strategy.prunes(model),
        macs=forward_macs(model, patch_vox),
        teacher_bytes=stored,
    )


def needs_old_model(strategy: Strategy, lesson: Lesson) -> bool:
    """Whether the step needs the old model's answers, in the loop or for pseudo labels."""
    offline = strategy.declaration.past == "predictions" and strategy.prepares(lesson)
    return lesson.number > 1 and (strategy.takes_teacher(lesson) or offline)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
