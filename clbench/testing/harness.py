"""The test bed of a strategy: the tiny course, and the state at any point of it.

Steps are taught by the loop that teaches real runs. States are handed out as
copies, so that no rule sees another's work.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clbench.data.labels import spacing_of
from clbench.data.pseudo_labels import PseudoMap, write_pseudo
from clbench.data.volume import Volume
from clbench.errors import TrainingError
from clbench.evaluation.scoring import mean_dice
from clbench.evaluation.sliding_window import Server
from clbench.nets.output import Output
from clbench.run.plan import Plan, RunSettings, make_plan
from clbench.strategy.contract import (
    Batch,
    Desk,
    Group,
    Kit,
    Lesson,
    Memory,
    Phase,
    Session,
    Strategy,
)
from clbench.testing.fixtures import OVERRIDES, dice_thrown, tiny_backbone, tiny_course
from clbench.training.batches import CaseKey, Crops, Material, collate, draw_from, to_batch
from clbench.training.loop import freeze, teach

T = TypeVar("T")


@dataclass
class State:
    """A strategy in the middle of a course."""

    strategy: Strategy
    """The method that teaches this step (in step 1, `first_step()`)."""
    lesson: Lesson
    """The step."""
    model: nn.Module
    """The model, grown for the step."""
    memory: Memory
    """What the strategy remembers."""
    teacher: nn.Module | None = None
    """The model served after the previous step."""
    pseudo: dict[CaseKey, PseudoMap] = field(default_factory=dict)
    """Offline pseudo labels of this step's cases."""

    def copy(self) -> State:
        """Model and memory of its own; strategy, frozen teacher and pseudo labels are shared."""
        model, memory = copy.deepcopy((self.model, self.memory))
        return replace(self, model=model, memory=memory)


def tiny_kit(plan: Plan) -> None:
    """Let a planned run build from the tiny network."""
    kit = plan.kit
    plan.kit = Kit(backbone=tiny_backbone, encode=kit.encoding, seed=kit.seed, prior=kit.prior)


class Bed:
    """A strategy on the tiny course.

    Args:
        strategy: the method.
        name: what it is called.
        folder: an empty folder for what is written.
        cache: where the phantom and preprocessed volumes are kept.
    """

    def __init__(self, strategy: Strategy, *, name: str, folder: Path, cache: Path | None) -> None:
        self.strategy, self.name, self.folder, self.cache = strategy, name, folder, cache
        self.before = self.traits()
        self._starts: dict[int, State] = {}
        self._ends: dict[int, State] = {}
        self._voxels: dict[int, int] = {}

    def traits(self) -> dict[str, Any]:
        """Everything the strategy object and its classes hold that is not code."""
        found: dict[str, Any] = {f"self.{k}": v for k, v in vars(self.strategy).items()}
        for kind in type(self.strategy).__mro__:
            if kind in (Strategy, object):
                continue
            for key, value in vars(kind).items():
                plain = isinstance(value, bool | int | float | str | list | dict | set | tuple)
                if (plain or isinstance(value, Tensor)) and not key.startswith("__"):
                    found[f"{kind.__name__}.{key}"] = value
        return copy.deepcopy(found)

    def settings(self, out: str) -> RunSettings:
        """Settings of a run of this course into a folder of its own."""
        return RunSettings(
            bench="kit", strategy=self.name, profile="smoke", out=self.folder / out,
            overrides=OVERRIDES, cache=self.cache, device="cpu",
        )  # fmt: skip

    def plan(self, out: str) -> Plan:
        """A run of this course, planned."""
        plan = make_plan(self.settings(out), benchmark=tiny_course(), strategy=self.strategy)
        tiny_kit(plan)
        return plan

    @cached_property
    def rig(self) -> Plan:
        """Kit, lessons and volumes for the rules that call the hooks themselves."""
        return self.plan("rig")

    @cached_property
    def first(self) -> Strategy:
        """What teaches step 1."""
        return self.strategy.first_step()

    def teaches(self, number: int) -> Strategy:
        """What teaches a step."""
        return self.first if number == 1 else self.strategy

    # ----------------------------------------------------------------------------------- models

    def lesson(self, number: int) -> Lesson:
        """A step of the tiny course, as it is while it is taught."""
        if number not in self._voxels:
            catalog, step = self.rig.catalog, self.rig.catalog.step
            catalog.step = number
            self._voxels[number] = catalog.voxels(number)
            catalog.step = step
        return replace(self.rig.lesson(number), voxels=self._voxels[number])

    def blank(self, number: int) -> nn.Module:
        """A fresh model with the shape it has in a step, as a run makes one for a checkpoint."""
        model = self.strategy.build(self.rig.kit, self.lesson(1))
        for n in range(2, number + 1):
            self.strategy.grow(model, self.rig.kit, self.lesson(n))
        return model

    def start(self, number: int) -> State:
        """The state before the first update of a step, as the runner makes it."""
        if number not in self._starts:
            lesson, strategy = self.lesson(number), self.teaches(number)
            if number == 1:
                state = State(strategy, lesson, strategy.build(self.rig.kit, lesson), {})
            else:
                state = self.end(number - 1)
                served = strategy.serve(state.model, state.memory)
                state.teacher = copy.deepcopy(served).eval().requires_grad_(False)
                state.strategy, state.lesson = strategy, lesson
                if strategy.declaration.starts_from == "scratch":
                    state.model = self.blank(number)
                else:
                    strategy.grow(state.model, self.rig.kit, lesson)
            self._prepare(state)
            self._starts[number] = state
        return self._starts[number].copy()

    def end(self, number: int) -> State:
        """The state after a step, taught by the loop."""
        if number not in self._ends:
            state = self.start(number)
            self.teach(state)
            self._ends[number] = state
        return self._ends[number].copy()

    def predictor(self, state: State, model: nn.Module, structures: Sequence[str]) -> Server:
        """A model that answers for whole volumes.

        Args:
            state: strategy and memory after a step.
            model: a trained model.
            structures: names of its output channels, in order.
        """

        def ranges(volume: Volume) -> Mapping[str, tuple[int, int]]:
            x, y, z = map(float, spacing_of(volume.affine))
            return state.strategy.axial_ranges(
                volume.image, (x, y, z), tuple(structures), state.memory
            )

        return Server(
            model, state.strategy.decode, structures,
            patch_vox=self.rig.catalog.preprocessing.patch_vox, overlap=0.0, ranges=ranges,
        )  # fmt: skip

    def prepared(self, state: State, case: str) -> dict[str, Tensor]:
        """What `prepare_case` makes of one training case."""
        self.rig.catalog.step = state.lesson.number
        volume = self.rig.catalog.open(state.lesson.number, case, "pseudo")
        old = None
        if state.teacher is not None:
            old = self.predictor(state, state.teacher, state.lesson.old)
        return dict(state.strategy.prepare_case(state.lesson, volume, old))

    def _prepare(self, state: State) -> None:
        number, rest = state.lesson.number, {}
        if state.strategy.prepares(state.lesson):
            for case in state.lesson.cases:
                made = self.prepared(state, case)
                maps = made.pop("pseudo", None)
                if maps is not None:
                    target = self.folder / "pseudo" / f"{number}" / case
                    write_pseudo(target, state.lesson.old, maps.numpy())
                    state.pseudo[number, case] = PseudoMap.open(target)
                rest[case] = made
        state.strategy.prepare(state.lesson, rest, state.memory)

    # ---------------------------------------------------------------------------------- batches

    def material(self, state: State) -> Material:
        """What a step is taught with."""
        number, cases = state.lesson.number, state.lesson.cases
        weights: dict[CaseKey, float] = {(number, c): 1.0 / len(cases) for c in cases}
        catalog = self.rig.catalog
        catalog.step = number
        extra = state.strategy.extra_cases(state.lesson, state.memory)
        # a rule of its own complains of those that may not be opened
        weights.update({key: w for key, w in extra.items() if self._may_open(*key)})
        return Material(
            volumes={key: catalog.open(key[0], key[1], "train") for key in weights},
            weights=weights,
            pseudo=state.pseudo,
            patch_vox=catalog.preprocessing.patch_vox,
            data=self.rig.profile.data,
            validation=lambda case: catalog.open(number, case, "validation"),
        )

    def test_cases(self) -> set[tuple[str, str]]:
        """(source, case) of every test case of the course."""
        catalog = self.rig.catalog
        return {
            (catalog.source(i).name, case)
            for i, split in enumerate(catalog.splits, 1)
            for case in split.test
        }

    def _may_open(self, step: int, case: str) -> bool:
        try:
            self.rig.catalog.open(step, case, "train")
        except (TrainingError, KeyError, IndexError):
            return False
        return True

    def teach(self, state: State) -> None:
        """Teach the step of a state with the loop of real runs."""
        takes = state.strategy.takes_teacher(state.lesson)
        catalog, lesson = self.rig.catalog, state.lesson

        def validate(served: nn.Module) -> float:
            server = self.predictor(state, served, lesson.structures)
            volumes = [catalog.open(lesson.number, c, "validation") for c in lesson.validation]
            return mean_dice(server, volumes, lesson.learns)

        teach(
            state.strategy, state.model, state.teacher if takes else None, state.lesson,
            state.memory, self.material(state), train=self.rig.profile.train, seed=0,
            device=torch.device("cpu"), validate=validate,
        )  # fmt: skip

    def crops(self, state: State, index: int = 0) -> Batch:
        """A batch as the loop draws it."""
        crops = Crops(
            state.lesson, Phase(), self.material(state), epochs=index + 1, per_epoch=2, seed=0
        )
        raw = collate([crops[2 * index], crops[2 * index + 1]])
        return to_batch(raw, state.lesson, torch.device("cpu"))

    def terms(self, state: State, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of a batch, with those of the strategy's session where it has one."""
        desk = Desk(
            strategy=state.strategy, model=state.model, lesson=state.lesson, phase=Phase(),
            teacher=state.teacher if state.strategy.takes_teacher(state.lesson) else None,
            optimizer=torch.optim.AdamW(p for p in state.model.parameters() if p.requires_grad),
            memory=state.memory, epochs=1, updates=1, batch=len(batch.cases), seed=0,
            device=torch.device("cpu"),
            draw=draw_from(state.lesson, Phase(), self.material(state), seed=0),
        )  # fmt: skip
        session = state.strategy.session(desk) or Session(desk)
        return session.terms(next(session.batches(iter([batch]))))

    def enter(self, state: State) -> list[Group]:
        """Enter the first phase: the groups, everything else frozen."""
        phase = state.strategy.next_phase(state.lesson, state.memory, ())
        if phase is not None:
            state.strategy.enter_phase(phase, state.model, state.memory)
        groups = state.strategy.groups(state.model, state.lesson, state.memory)
        freeze(state.model, [p for g in groups for p in g.parameters])
        return groups

    def answers(self, state: State, batch: Batch) -> tuple[Output, Output | None]:
        """What model and teacher say to a batch; the teacher only where it is taken."""
        with dice_thrown(0):
            new: Output = state.model(batch.image)
            old: Output | None = None
            if state.teacher is not None and state.strategy.takes_teacher(state.lesson):
                with torch.no_grad():
                    old = state.teacher(batch.image)
        return new, old


def words(strategy: Strategy) -> str:
    """The strategy and its hyperparameters."""
    values = ", ".join(f"{f.name}={getattr(strategy, f.name)!r}" for f in fields(strategy))
    return f"{type(strategy).__name__}({values})"
