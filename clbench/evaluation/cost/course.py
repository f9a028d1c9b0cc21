"""Cost of a course before anything is trained: parameters, multiply-adds, and their growth.

Needs a benchmark's structures and a network, no image and no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.evaluation.cost.model import StepCost, forward_macs, grown, lessons_of, step_cost
from clbench.nets.output import count_parameters
from clbench.nets.text_encodings import LENGTH
from clbench.spec import registry
from clbench.spec.benchmark import Benchmark
from clbench.spec.settings import Profile
from clbench.spec.taxonomy import STRUCTURES
from clbench.strategy.contract import Kit, Lesson, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Parameters and multiply-adds of one patch, or a difference of them."""

    parameters: int
    forward_macs: int
    fewest_parameters: int
    """Without those that pruning sets to zero at the most; all of them where nothing prunes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What more structures cost, from models grown beyond the course, and where that leads.

    `one_step` and `step_each` have the target number of structures: all further ones in one step,
    and each in a step of its own. What lies between is a line: twice the structures or steps cost
    twice as much (checked before it is claimed).
    """

    per_class: Size
    """One more structure in a step that there is anyway."""
    per_step: Size
    """One more step, its structures not counted."""
    target: int
    """Structures it is carried on to."""
    one_step: Size
    step_each: Size


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """A strategy on a benchmark."""

    bench: str
    bench_version: int
    strategy: str
    profile: str
    backbone: str
    """Name and size."""
    patch_vox: tuple[int, int, int]
    steps: tuple[StepCost, ...]
    growth: Growth | None
    """None where it could not be measured or is no line; `notes` says why."""
    notes: tuple[str, ...] = ()


def blank_kit(backbone: Any, size: int, prior: float | None) -> Kit:
    """A kit whose text vectors are zeros: what they say changes no cost.

    Args:
        backbone: function of the vector size that makes the network's trunk.
        size: length of a text vector the trunk is made for.
        prior: probability that a fresh output starts at; None leaves its bias as made.
    """

    def encode(names: Sequence[str]) -> Tensor:
        return torch.zeros(len(names), LENGTH)

    return Kit(backbone=lambda: backbone(size), encode=encode, seed=0, prior=prior)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is needed to build a strategy's models for a course, and nothing else."""

    bench: str
    bench_version: int
    strategy: Strategy
    kit: Kit
    lessons: list[Lesson]
    backbone: str
    patch_vox: tuple[int, int, int]


def method_for(benchmark: Benchmark, strategy: Strategy, profile: Profile) -> Method:
    """A strategy on a benchmark with the settings of a profile, ready to build its models.

    Args:
        benchmark: gives the structures of every step.
        strategy: with its hyperparameters.
        profile: names the network, and the patch that is counted on.
    """
    net = profile.backbone
    return Method(
        bench=benchmark.name,
        bench_version=benchmark.version,
        strategy=strategy,
        kit=blank_kit(registry.load("backbone", net.name), net.size, profile.train.prior),
        lessons=lessons_of(benchmark),
        backbone=f"{net.name} {net.size}",
        patch_vox=profile.preprocessing(benchmark.preprocessing).patch_vox,
    )


def course_costs(method: Method, *, strategy: str, profile: str, target: int = 143) -> Costs:
    """Cost of every step of a course, and its growth. Trains nothing, opens no image.

    Args:
        method: a strategy on a benchmark.
        strategy: the strategy's name, for the record.
        profile: the profile's name, for the record.
        target: structures to carry the growth on to; 143 is what Ji et al. (ICCV 2023) reach.

    Raises:
        SettingError: fewer structures than the course has.
        CostError: an operator cannot be counted.
    """
    m, known = method, len(method.lessons[-1].structures)
    if target < known:
        raise SettingError(
            "the growth cannot be carried on to fewer structures than the course has",
            where="--structures",
            expected=f"at least {known}",
            got=target,
        )
    steps: list[StepCost] = []
    for lesson, model, stored in grown(m.strategy, m.kit, m.lessons):
        steps.append(step_cost(m.strategy, lesson, model, stored, m.patch_vox))
    growth, notes = growth_of(m.strategy, m.kit, model, m.lessons[-1], m.patch_vox, target)
    return Costs(
        bench=m.bench,
        bench_version=m.bench_version,
        strategy=strategy,
        profile=profile,
        backbone=m.backbone,
        patch_vox=m.patch_vox,
        steps=tuple(steps),
        growth=growth,
        notes=notes,
    )


# ----------------------------------------------------------------------------------------- growth


def _grown(
    strategy: Strategy, kit: Kit, model: nn.Module, last: Lesson, patch: Sequence[int],
    *more: Sequence[str],
) -> Size:  # fmt: skip
    """A copy of the model after the course and further steps that learn `more`."""
    model = copy.deepcopy(model)
    for names in more:
        last = Lesson(
            number=last.number + 1,
            learns=tuple(names),
            structures=(*last.structures, *names),
            source=last.source,
        )
        strategy.grow(model, kit, last)
    every, _ = count_parameters(model)
    return Size(
        parameters=every,
        forward_macs=sum(forward_macs(model, patch).values()),
        fewest_parameters=every - strategy.prunes(model),
    )


def growth_of(
    strategy: Strategy,
    kit: Kit,
    model: nn.Module,
    last: Lesson,
    patch: Sequence[int],
    target: int,
) -> tuple[Growth | None, tuple[str, ...]]:
    """Growth from models with one and two more structures, in one step and in two.

    Args:
        strategy: grows the models.
        kit: what it grows them from.
        model: the model after the course; it stays as it is.
        last: the last lesson of the course.
        patch: what is counted on.
        target: structures to carry it on to.

    Returns:
        The growth, or None with the reason.
    """
    learned = last.structures
    spare = [name for name in STRUCTURES if name not in learned][:2]
    if len(spare) < 2:  # one of each would not tell steps from structures
        return None, ("growth is not measured: the course already learns all structures",)
    a, b = spare
    here, one, two, twice = (
        _grown(strategy, kit, model, last, patch, *more)
        for more in ([], [[a]], [[a, b]], [[a], [b]])
    )
    per_class, per_step = _total((1, two), (-1, one)), _total((1, twice), (-1, two))
    if _total((1, here), (1, per_class), (1, per_step)) != one:
        return None, ("growth is not carried on: the cost is no line in structures and steps",)
    more = target - len(learned)
    return (
        Growth(
            per_class=per_class,
            per_step=per_step,
            target=target,
            one_step=_total((1, here), (more, per_class), (min(more, 1), per_step)),
            step_each=_total((1, here), (more, per_class), (more, per_step)),
        ),
        (),
    )


def _total(*terms: tuple[int, Size]) -> Size:
    """The sum of some sizes, each so many times."""
    return Size(
        parameters=sum(n * size.parameters for n, size in terms),
        forward_macs=sum(n * size.forward_macs for n, size in terms),
        fewest_parameters=sum(n * size.fewest_parameters for n, size in terms),
    )
