"""Teaching one step of a planned course, or going on where an attempt at it was stopped.

`teach_step` starts the model, makes pseudo labels, loads training data and trains; the honesty kit
calls the same four functions. Leaves `step<t>.pt`, `step<t>.json` (what the step took, all attempts
together) and the step's lines in `events.jsonl`. The loop over updates is `clbench.training.loop`.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clbench import reproducibility, signals
from clbench.data.catalog import Catalog
from clbench.data.pseudo_labels import PseudoMap
from clbench.data.volume import Volume
from clbench.evaluation.cost.meter import Meter
from clbench.evaluation.scoring import mean_dice, structure_dice
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.evaluation.trace import Tracer
from clbench.nets.output import count_parameters
from clbench.run.models import blank, predictor, save_step, windows_fit
from clbench.run.plan import Plan
from clbench.store import checkpoint, files, run_folder
from clbench.store.shared_steps import run_name
from clbench.strategy.contract import Lesson, Memory, Strategy
from clbench.strategy.course_checks import nothing_to_train
from clbench.training import past_data
from clbench.training.batches import CaseKey, Material
from clbench.training.gpu_memory import enough_memory
from clbench.training.loop import StepTraining, Validate, teach
from clbench.training.monitors import (
    StepMonitor,
    constant_labels,
    lost_in_some_cases,
    refuse_constant_labels,
    refuse_lost_validation,
)
from clbench.training.pseudo_labelling import prepare
from clbench.training.resume import StepCheckpointer, TrainingState, Watch


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a step begins with."""

    model: nn.Module | None
    """The model after the previous step; it grows, and is taught. None before step 1."""
    teacher: nn.Module | None
    """As it was served after the previous step."""
    memory: Memory
    """The strategy's; changes."""
    ledger: Mapping[str, Any]
    """Step → purpose → cases opened so far, of the run's record."""
    before: str | None = None
    """`state_digest` of model and memory; None before step 1, and where no run goes on with it."""


@dataclass(kw_only=True)
class StepState(TrainingState):
    """A step being taught: what resume saves (`TrainingState`), and what is made anew around it."""

    strategy: Strategy
    """The method that teaches the step (in step 1, the one it names by `first_step`)."""
    lesson: Lesson
    """The step."""
    teacher: nn.Module | None = None
    """The model served after the previous step, frozen. None in step 1."""
    pseudo: dict[CaseKey, PseudoMap] = field(default_factory=dict)
    """Offline pseudo labels of this step's cases."""
    pseudo_kept_s: float = 0.0
    """Seconds that stopped attempts took for the pseudo labels they finished."""

    def copy(self) -> StepState:
        """Model and memory of its own; strategy, frozen teacher and pseudo labels are shared."""
        # A module has a dozen empty collections, mostly of hooks, which deepcopy takes apart one by
        # one: told of their copies beforehand it needs half the time.
        empty = {
            id(value): type(value)()
            for module in self.model.modules()
            for value in vars(module).values()
            if type(value) in (OrderedDict, dict, set) and not value
        }
        model, memory = copy.deepcopy((self.model, self.memory), empty)
        return replace(self, model=model, memory=memory)


def start_model(
    plan: Plan,
    strategy: Strategy,
    lesson: Lesson,
    start: Start,
    watch: Watch = lambda event: None,
) -> StepState:
    """The model as the step finds it: new, or the old one grown.

    Args:
        plan: the run.
        strategy: the method (in step 1 the one it names by `first_step`).
        lesson: the step; `plan.catalog.step` is its number.
        start: what the step begins with.
        watch: is told of every case that is opened.

    Raises:
        DataError: the labels of a structure the step learns say the same everywhere.
    """
    own = _open(plan.catalog, [(lesson.number, c) for c in lesson.cases], watch)
    lesson = replace(lesson, voxels=plan.catalog.voxels(lesson.number))
    if lesson.number == 1 or strategy.declaration.starts_from == "scratch":
        model = blank(plan, strategy, lesson)
    else:
        assert start.model is not None  # noqa: S101  # step 1 went before
        model = start.model
        if lesson.learns:
            strategy.grow(model, plan.kit, lesson)
    _refuse_nothing_to_train(strategy, model, lesson, start.memory)
    model.to(plan.device)
    refuse_constant_labels(lesson, list(own.values()))
    return StepState(
        strategy=strategy, lesson=lesson, model=model, memory=start.memory, teacher=start.teacher
    )


def refuse_course(plan: Plan) -> None:
    """Let the strategy refuse the course, before a case is read or a step is taught.

    Args:
        plan: the run.

    Raises:
        ClbenchError: the strategy cannot teach the course to its end.
    """
    taught = [n for n, step in enumerate(plan.benchmark.steps, 1) if step.given is None]
    plan.strategy.refuse_course([plan.lesson(n) for n in taught], plan.kit)


def _refuse_nothing_to_train(
    strategy: Strategy, model: nn.Module, lesson: Lesson, memory: Memory
) -> None:
    """Refuse a step without new structures for a strategy that trains new parts alone.

    Raises:
        TrainingError: there is no parameter to train.
    """
    if lesson.learns:
        return
    groups = strategy.groups(model, lesson, memory)
    if not any(len(list(group.parameters)) for group in groups):
        raise nothing_to_train(strategy, lesson)


def make_pseudo_labels(plan: Plan, state: StepState, watch: Watch) -> None:
    """Let the strategy prepare its cases with the old model; fills `state.pseudo`.

    Args:
        plan: the run; finished cases lie in the step's folder under `pseudo/`.
        state: the step, its model started.
        watch: is told of every case.

    Raises:
        StoreError: finished cases of another model, or no room on the disk.
        Stopped: asked to, between two cases.
    """
    lesson, teacher, old = state.lesson, state.teacher, None
    stored: Sequence[CaseKey] = ()
    if lesson.number > 1:
        stored = state.strategy.store_cases(lesson, plan.kit, state.memory)
    if teacher is not None and (stored or state.strategy.prepares(lesson)):
        old = predictor(plan, state.strategy, teacher, lesson.old, state.memory)
    with windows_fit(plan, f"preparing step {lesson.number}"):
        prepared = prepare(
            state.strategy,
            lesson,
            state.memory,
            plan.catalog,
            old=old,
            mark="none" if old is None or teacher is None else checkpoint.digest(teacher),
            folder=plan.step_folder(lesson.number) / "pseudo" / f"step{lesson.number}",
            watch=watch,
            stored=stored,
            ranks=plan.ranks,
        )
    state.pseudo, state.pseudo_kept_s = prepared.maps, prepared.kept_s


def load_training_data(
    plan: Plan,
    state: StepState,
    ledger: Mapping[str, Any],
    *,
    may_open: Callable[[int, str], bool] | None = None,
) -> Material:
    """Volumes and weights of all cases the step may draw.

    Args:
        plan: the run.
        state: the step, with its pseudo labels.
        ledger: of the run's record: step → purpose → cases opened.
        may_open: leaves out the extra cases it says no to, where a case that may not be opened
            is examined elsewhere; None: such a case is an error.

    Raises:
        TrainingError: a case that the strategy did not declare, or had let go.
        Stopped: asked to, between two cases.
    """
    catalog, lesson = plan.catalog, state.lesson
    weights: dict[CaseKey, float] = {
        (lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases
    }
    extra = state.strategy.extra_cases(lesson, state.memory)
    if may_open is None:
        past_data.refuse_lost_cases(catalog, lesson, extra, ledger)
    else:
        extra = {key: weight for key, weight in extra.items() if may_open(*key)}
    weights.update(extra)
    return Material(
        volumes=_open(catalog, list(weights)),
        weights=weights,
        pseudo=state.pseudo,
        patch_vox=catalog.preprocessing.patch_vox,
        data=plan.profile.data,
        validation=lambda case: catalog.open(lesson.number, case, "validation"),
    )


def _open(
    catalog: Catalog, keys: Sequence[CaseKey], watch: Watch = lambda event: None
) -> dict[CaseKey, Volume]:
    """The volumes of training cases, preprocessed where they are not in the cache yet.

    Raises:
        Stopped: asked to, between two cases.
    """
    volumes = {}
    for done, (number, case) in enumerate(keys, 1):
        volumes[number, case] = catalog.open(number, case, "train")
        watch({"event": "opened", "done": done, "of": len(keys), "case": case})
        signals.check(f"step {catalog.step}, opening case {case}")
    return volumes


def train_step(
    plan: Plan,
    state: StepState,
    material: Material,
    watch: Watch,
    *,
    earlier: Sequence[dict[str, Any]] = (),
    checkpointer: StepCheckpointer | None = None,
) -> None:
    """Every update of the step, monitored; changes `state.model` and `state.memory`.

    Args:
        plan: the run.
        state: the step, ready to be trained.
        material: what `load_training_data` returned.
        watch: is told of every update, validation and warning.
        earlier: events of this step from before it was stopped.
        checkpointer: saves the place between two updates; None: nothing is saved.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal, where a checkpointer saves.
    """
    strategy, lesson, profile = state.strategy, state.lesson, plan.profile
    monitor = StepMonitor(
        lesson,
        clips=profile.train.clip_norm is not None,
        penalties=strategy.declaration.penalties,
        past=earlier,
    )
    # the first process looks; the others wait for it in the next update
    tracer = _tracer(plan, state, earlier) if plan.ranks.first else None

    def see(event: dict[str, Any]) -> None:
        watch(event)
        for each in monitor.see(event):
            see(each)
        if tracer is not None:
            tracer.see(event)

    catalog, source = plan.catalog, plan.catalog.source(lesson.number)
    odd = constant_labels(lesson, list(material.volumes.values()))
    if len(lesson.cases) > 1:  # of a single case the others say it
        odd += lost_in_some_cases(
            lesson,
            [catalog.open(lesson.number, case, "train") for case in lesson.cases],
            lambda volume: catalog.cache.holds(catalog.files[source.name][volume.case], source),
        )
    for event in odd:
        if event not in earlier:
            see(event)
    teacher = copy.deepcopy(state.teacher) if strategy.takes_teacher(lesson) else None
    patch = plan.catalog.preprocessing.patch_vox
    with enough_memory(f"teaching step {lesson.number}", profile, patch, processes=plan.ranks.size):
        teach(
            StepTraining(
                strategy=strategy,
                state=state,
                teacher=teacher,
                lesson=lesson,
                material=material,
                train=profile.train,
                seed=plan.settings.seed,
                device=plan.device,
                workers=plan.settings.workers,
                ranks=plan.ranks,
                watch=see,
                validate=_validate(plan, state),
                checkpointer=checkpointer,
            )
        )
    if tracer is not None:
        tracer.end()
    drawn = [material.volumes[key] for key, weight in material.weights.items() if weight > 0]
    for event in monitor.end(drawn):
        see(event)


def teach_step(
    plan: Plan, strategy: Strategy, lesson: Lesson, path: Path, start: Start, watch: Watch
) -> nn.Module:
    """Teach a step and write its checkpoint, or go on where an attempt at it was stopped.

    Args:
        plan: the run.
        strategy: the method (in step 1 the one it names by `first_step`).
        lesson: the step.
        path: the checkpoint to be written.
        start: what the step begins with.
        watch: hears of every update.

    Returns:
        The model taught.

    Raises:
        ClbenchError: anything the user can act on.
        Stopped: by a signal; what is saved beside `path` goes on from there.
    """
    log, meter = path.parent / "events.jsonl", Meter(plan.device)
    taught_by = "none" if start.teacher is None else checkpoint.digest(start.teacher)
    checkpointer = _open_checkpointer(plan, path, log, taught_by, watch)
    plan.ranks.gather(None)  # all have read what the first one is about to change
    before = checkpointer.found or {}
    hosts = list(before.get("hosts", ()))
    # equal bits need as many threads, and as many processes, or they cannot be had
    same = hosts and hosts[-1].get("processes", 1) == plan.ranks.size
    kept = same and plan.settings.threads is None
    with reproducibility.threads(hosts[-1]["threads"] if kept else None):
        begun = time.monotonic()
        past_data.refuse_undeclared(strategy, lesson, start.memory)
        opened = plan.catalog.ledger.setdefault(lesson.number, {})
        for purpose, cases in before.get("opened", {}).items():
            opened.setdefault(purpose, set()).update(cases)
        if (here := plan.host()) not in hosts:
            hosts.append(here)
        state = start_model(plan, strategy, lesson, start, watch)
        make_pseudo_labels(plan, state, watch)
        material = load_training_data(plan, state, start.ledger)
        prepared = time.monotonic()

        def cost() -> dict[str, Any]:
            """What the step took so far, all attempts together."""
            return {
                "prepare_s": before.get("prepare_s", state.pseudo_kept_s) + prepared - begun,
                "train_s": before.get("train_s", 0.0) + time.monotonic() - prepared,
                **{k: max(before.get(k, 0), v) for k, v in meter.peaks().items()},
                "opened": plan.catalog.opened().get(str(lesson.number), {}),
                "hosts": hosts,
            }

        with ExitStack() as stack:
            written: list[Watch] = []

            def open_log() -> list[dict[str, Any]]:
                """Open the event log; returns its events of this step."""
                # lines of an attempt broken off go: those of the step, or after its last place
                events = stack.enter_context(
                    run_folder.EventLog(
                        log,
                        keep=lambda e: int(e["step"]) < lesson.number,
                        size=before.get("events"),
                    )
                )
                written.append(events.write)
                checkpointer.facts = lambda: {
                    **cost(),
                    "teacher": taught_by,
                    "events": events.flushed(),
                }
                return [e for e in run_folder.read_events(log) if e["step"] == lesson.number]

            earlier = plan.ranks.by_first(open_log)

            def log_event(event: dict[str, Any]) -> None:
                for write in written:
                    write(event)
                watch(event)

            train_step(plan, state, material, log_event, earlier=earlier, checkpointer=checkpointer)
            total = cost()
    origin = {"identity": path.parent.name, "run": run_name(plan.folder), "before": start.before}

    def close() -> None:
        _write(plan, state, path, {**total, "origin": origin})
        checkpointer.close()
        shutil.rmtree(path.parent / "pseudo", ignore_errors=True)

    plan.ranks.by_first(close)
    return state.model


def _open_checkpointer(
    plan: Plan, path: Path, log: Path, taught_by: str, watch: Watch
) -> StepCheckpointer:
    """What a stopped attempt left, unless its log or the model it started from is another one."""
    checkpointer = StepCheckpointer(
        path, every_s=plan.settings.checkpoint_s, ranks=plan.ranks, watch=watch
    )
    before = checkpointer.found
    if before and not (log.exists() and log.stat().st_size >= before["events"]):
        checkpointer.forget("its event log was cut short")
    elif before and before["teacher"] != taught_by:
        checkpointer.forget("the model it started from is another one now")
    return checkpointer


def _tracer(plan: Plan, state: StepState, earlier: Sequence[dict[str, Any]]) -> Tracer:
    """Measures old structures while the model is taught."""
    strategy, lesson, examine = state.strategy, state.lesson, plan.profile.examine
    return Tracer(
        lesson,
        every=examine.trace_every,
        folder=plan.step_folder(lesson.number),
        catalog=plan.catalog,
        served=lambda: predictor(
            plan,
            strategy,
            strategy.serve(state.model, state.memory),
            lesson.structures,
            state.memory,
        ),
        scratch=strategy.declaration.starts_from == "scratch",
        past=earlier,
        postprocess=examine.postprocess,
    )


def _validate(plan: Plan, state: StepState) -> Validate | None:
    """Measures a model on this step's validation cases, opened when first asked for.

    Each process measures its share of them, and all get the mean over all: the Dice of each case
    comes out as in one process, and is averaged in the order of the cases, so its bits are equal.
    """
    catalog, lesson, ranks = plan.catalog, state.lesson, plan.ranks

    def dice_of(server: VolumePredictor, case: str) -> dict[str, list[float]]:
        volume = catalog.open(lesson.number, case, "validation")
        with windows_fit(plan, f"validating in step {lesson.number}, case {case}"):
            return structure_dice(server, [volume], lesson.taught)

    def validate(served: nn.Module) -> float:
        server = predictor(plan, state.strategy, served, lesson.structures, state.memory)
        own = lesson.validation[ranks.rank :: ranks.size]
        told = ranks.each(lambda: [dice_of(server, case) for case in own])
        values: dict[str, list[float]] = {}
        for i, case in enumerate(lesson.validation):
            catalog.enter(lesson.number, case, "validation")  # whichever process opened it
            for name, dice in told[i % ranks.size][i // ranks.size].items():
                values.setdefault(name, []).extend(dice)
        mean = mean_dice(values)
        if math.isnan(mean):
            cases = [catalog.open(lesson.number, c, "validation") for c in lesson.validation]
            refuse_lost_validation(lesson, cases)
        return mean

    return validate if lesson.validation else None


def _write(plan: Plan, state: StepState, path: Path, cost: dict[str, Any]) -> None:
    """What the step took, then its checkpoint."""
    model = state.model
    cost["parameters"], cost["nonzero_parameters"] = count_parameters(model)
    cost["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost["pseudo_bytes"] = sum(m.nbytes for m in state.pseudo.values())
    if state.strategy.declaration.past == "cases":  # what is stored with the cases, such as logits
        tensors = [t for t in state.memory.values() if isinstance(t, Tensor)]
        cost["pseudo_bytes"] += sum(t.nbytes for t in tensors)
    files.write_json(path.with_suffix(".json"), cost)
    save_step(
        plan,
        state.lesson.number,
        path,
        model=model.state_dict(),
        memory=state.memory,
        strategy=type(state.strategy).__name__,
    )
