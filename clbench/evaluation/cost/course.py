"""Cost of a course before anything is trained: parameters, multiply-adds, and their growth.

Needs a benchmark's structures and a network, no image and no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clbench.errors import SettingError
from clbench.evaluation.cost.model import StepCost, forward_macs, grown, lessons_of, step_cost
from clbench.nets.backbones import new_backbone
from clbench.nets.output import count_parameters
from clbench.nets.text_encodings import LENGTH
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


def blank_kit(profile: Profile) -> Kit:
    """A kit with a profile's network and text vectors of zeros: what they say changes no cost."""
    return Kit(
        backbone=lambda: new_backbone(profile.backbone),
        encode=lambda names: torch.zeros(len(names), LENGTH),
        seed=0,
        prior=profile.train.prior,
    )


def course_costs(
    benchmark: Benchmark, strategy: Strategy, profile: Profile, *, name: str, target: int = 143
) -> Costs:
    """Cost of every step of a course, and its growth. Trains nothing, opens no image.

    Args:
        benchmark: gives the structures of every step.
        strategy: with its hyperparameters.
        profile: names the network, and the patch that is counted on.
        name: of the strategy, for the record.
        target: structures to carry the growth on to; 143 is what Ji et al. (ICCV 2023) reach.

    Raises:
        SettingError: fewer structures than the course has.
        CostError: an operator cannot be counted.
    """
    kit, lessons = blank_kit(profile), lessons_of(benchmark)
    patch_vox = profile.preprocessing(benchmark.preprocessing).patch_vox
    known = len(lessons[-1].structures)
    if target < known:
        raise SettingError(
            "the growth cannot be carried on to fewer structures than the course has",
            where="--structures",
            expected=f"at least {known}",
            got=target,
        )
    steps: list[StepCost] = []
    for lesson, model, stored in grown(strategy, kit, lessons):
        steps.append(step_cost(strategy, lesson, model, stored, patch_vox))
    growth, notes = growth_of(strategy, kit, model, lessons[-1], patch_vox, target)
    return Costs(
        bench=benchmark.name,
        bench_version=benchmark.version,
        strategy=name,
        profile=profile.name,
        backbone=f"{profile.backbone.name} {profile.backbone.size}",
        patch_vox=patch_vox,
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
