"""The test harness of a strategy: the tiny course, and the state at any point of it.

Steps are taught by the loop that teaches real runs. States are handed out as
copies, so that no rule sees another's work.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.output import Output
from clbench.reproducibility import seeded
from clbench.run import teach as runner
from clbench.run.models import blank, predictor
from clbench.run.plan import Plan, RunSettings, resolve
from clbench.run.teach import StepState
from clbench.strategy.contract import (
    Batch,
    Group,
    Kit,
    Lesson,
    Memory,
    Phase,
    PhaseContext,
    Session,
    Strategy,
)
from clbench.testing.fixtures import OVERRIDES, tiny_backbone, tiny_course
from clbench.testing.module_state import ModuleState, own_modules
from clbench.training.batches import Crops, Material, collate, draw_from
from clbench.training.device_batches import to_batch
from clbench.training.loop import freeze

T = TypeVar("T")


def tiny_kit(plan: Plan) -> None:
    """Let a planned run build from the tiny network."""
    kit = plan.kit
    plan.kit = Kit(backbone=tiny_backbone, encode=kit.encoding, seed=kit.seed, prior=kit.prior)


class StrategyHarness:
    """A strategy on the tiny course.

    Args:
        strategy: the method.
        name: what it is called.
        folder: an empty folder for what is written.
        cache: where the phantom and preprocessed volumes are kept.
        overrides: of the tiny course's settings, as with `--set`.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        name: str,
        folder: Path,
        cache: Path | None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.strategy, self.name, self.folder, self.cache = strategy, name, folder, cache
        by_setting = {word.partition("=")[0]: word for word in (*OVERRIDES, *overrides)}
        self.overrides = tuple(by_setting.values())
        self.before = self.traits()
        self.modules_before = ModuleState(own_modules(strategy))
        self._starts: dict[int, StepState] = {}
        self._ends: dict[int, StepState] = {}
        self._voxels: dict[int, int] = {}
        self.events: dict[int, list[dict[str, Any]]] = {}
        """Step → what happened while it was taught."""

    def traits(self) -> dict[str, Any]:
        """Everything the strategy object and its classes hold that is not code."""
        traits: dict[str, Any] = {f"self.{k}": v for k, v in vars(self.strategy).items()}
        for kind in type(self.strategy).__mro__:
            if kind in (Strategy, object):
                continue
            for key, value in vars(kind).items():
                plain = isinstance(value, bool | int | float | str | list | dict | set | tuple)
                if (plain or isinstance(value, Tensor)) and not key.startswith("__"):
                    traits[f"{kind.__name__}.{key}"] = value
        return copy.deepcopy(traits)

    def settings(self, out: str) -> RunSettings:
        """Settings of a run of this course into a folder of its own."""
        return RunSettings(
            bench="kit", strategy=self.name, profile="smoke", out=self.folder / out,
            overrides=self.overrides, cache=self.cache, device="cpu",
        )  # fmt: skip

    def plan_run(self, out: str) -> Plan:
        """A run of this course, planned."""
        plan = resolve(self.settings(out), benchmark=tiny_course(), strategy=self.strategy).open()
        tiny_kit(plan)
        return plan

    @cached_property
    def plan(self) -> Plan:
        """Kit, lessons and volumes for the rules that call the hooks themselves."""
        return self.plan_run("rig")

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
            catalog, step = self.plan.catalog, self.plan.catalog.step
            catalog.step = number
            self._voxels[number] = catalog.voxels(number)
            catalog.step = step
        return replace(self.plan.lesson(number), voxels=self._voxels[number])

    def blank(self, number: int) -> nn.Module:
        """A fresh model with the shape it has in a step, as a run makes one for a checkpoint."""
        return blank(self.plan, self.strategy, self.plan.lesson(number))

    def _started(self, number: int) -> StepState:
        if number not in self._starts:
            strategy = self.teaches(number)
            model: nn.Module | None = None
            teacher: nn.Module | None = None
            memory: Memory = {}
            if number > 1:
                before = self.end(number - 1)
                model, memory = before.model, before.memory
                served = strategy.serve(model, memory)
                teacher = copy.deepcopy(served).eval().requires_grad_(False)
            self.plan.catalog.step = number
            start = runner.Start(model=model, teacher=teacher, memory=memory, ledger={})
            state = runner.start_model(self.plan, strategy, self.plan.lesson(number), start)
            runner.make_pseudo_labels(self.plan, state, lambda event: None)
            self._starts[number] = state
        return self._starts[number]

    def start(self, number: int) -> StepState:
        """The state before the first update of a step, as the runner makes it."""
        return self._started(number).copy()

    def _ended(self, number: int) -> StepState:
        if number not in self._ends:
            state = self.start(number)
            self.events[number] = self.teach(state)
            self._ends[number] = state
        return self._ends[number]

    def end(self, number: int) -> StepState:
        """The state after a step, taught by the loop."""
        return self._ended(number).copy()

    def memory_before(self, number: int) -> Memory:
        """The strategy's memory before the first update of a step."""
        return copy.deepcopy(self._started(number).memory)

    def memory_after(self, number: int) -> Memory:
        """The strategy's memory after a step."""
        return copy.deepcopy(self._ended(number).memory)

    def predictor(
        self, state: StepState, model: nn.Module, structures: Sequence[str]
    ) -> VolumePredictor:
        """A model that answers for whole volumes, as a run examines it.

        Args:
            state: of the step; gives strategy and memory.
            model: to predict with.
            structures: names of its outputs, in order.
        """
        return predictor(self.plan, state.strategy, model, tuple(structures), state.memory)

    def prepared(self, state: StepState, case: str) -> dict[str, Tensor]:
        """What `prepare_case` makes of one training case."""
        self.plan.catalog.step = state.lesson.number
        volume = self.plan.catalog.open(state.lesson.number, case, "pseudo")
        old = None
        if state.teacher is not None:
            old = self.predictor(state, state.teacher, state.lesson.old)
        return dict(state.strategy.prepare_case(state.lesson, volume, old))

    # ---------------------------------------------------------------------------------- batches

    def material(self, state: StepState) -> Material:
        """What a step is taught with."""
        self.plan.catalog.step = state.lesson.number
        # a rule of its own complains of cases that may not be opened
        return runner.load_training_data(self.plan, state, {}, may_open=self._may_open)

    def _may_open(self, step: int, case: str) -> bool:
        try:
            self.plan.catalog.open(step, case, "train")
        except (TrainingError, KeyError, IndexError):
            return False
        return True

    def teach(self, state: StepState) -> list[dict[str, Any]]:
        """Train the step of a state as real runs do; returns its events."""
        events: list[dict[str, Any]] = []
        runner.train_step(self.plan, state, self.material(state), events.append)
        return events

    def crops(self, state: StepState, index: int = 0) -> Batch:
        """A batch as the loop draws it."""
        crops = Crops(
            state.lesson, Phase(), self.material(state), epochs=index + 1, per_epoch=2, seed=0
        )
        raw = collate([crops[2 * index], crops[2 * index + 1]])
        return to_batch(raw, state.lesson, torch.device("cpu"))

    def session(self, state: StepState, batch: Batch) -> Session:
        """The strategy's session of a phase of one update, or the one that calls its hooks.

        Args:
            state: of the step.
            batch: gives the number of crops.
        """
        context = PhaseContext(
            strategy=state.strategy, model=state.model, lesson=state.lesson, phase=Phase(),
            teacher=state.teacher if state.strategy.takes_teacher(state.lesson) else None,
            optimizer=torch.optim.AdamW(p for p in state.model.parameters() if p.requires_grad),
            memory=state.memory, epochs=1, updates=1, batch=len(batch.cases), seed=0,
            device=torch.device("cpu"),
            draw=draw_from(state.lesson, Phase(), self.material(state), seed=0),
        )  # fmt: skip
        return state.strategy.session(context) or Session(context)

    def terms(self, state: StepState, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of a batch, with those of the strategy's session where it has one."""
        session = self.session(state, batch)
        return session.terms(next(session.batches(iter([batch]))))

    def enter(self, state: StepState) -> list[Group]:
        """Enter the first phase: the groups, everything else frozen."""
        phase = state.strategy.next_phase(state.lesson, state.memory, ())
        if phase is not None:
            state.strategy.enter_phase(phase, state.model, state.memory)
        groups = state.strategy.groups(state.model, state.lesson, state.memory)
        freeze(state.model, [p for g in groups for p in g.parameters])
        return groups

    def answers(self, state: StepState, batch: Batch) -> tuple[Output, Output | None]:
        """What model and teacher say to a batch; the teacher only where it is taken."""
        with seeded(0):
            new: Output = state.model(batch.image)
            old: Output | None = None
            if state.teacher is not None and state.strategy.takes_teacher(state.lesson):
                with torch.no_grad():
                    old = state.teacher(batch.image)
        return new, old


def describe(strategy: Strategy) -> str:
    """The strategy and its hyperparameters."""
    values = ", ".join(f"{f.name}={getattr(strategy, f.name)!r}" for f in fields(strategy))
    return f"{type(strategy).__name__}({values})"
