"""The training loop: phases, epochs and updates of one step. Read it top to bottom.

A crop is a pure function of (seed, step, phase, epoch, index), and the random state of
an update one of its number: nothing in a loader or worker has a state worth saving, the number of
workers changes nothing, and a stopped step goes on to the bit (`clbench.training.resume`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clbench.errors import DivergedError, SettingError, TrainingError, first_line
from clbench.evaluation.cost.allocator import freed_memory
from clbench.nets.heads import UniversalHead
from clbench.reproducibility import reseed
from clbench.signals import leave_to_parent
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import (
    Batch,
    DrawBatches,
    Group,
    Lesson,
    Phase,
    PhaseContext,
    PhaseResult,
    Session,
    Strategy,
)
from clbench.training.batches import Crops, Material, collate, draw_from
from clbench.training.device_batches import batches_on_device, loader_workers
from clbench.training.gpu_memory import noted
from clbench.training.monitors import check_gradient, unfinished_warmup
from clbench.training.ranks import Ranks
from clbench.training.resume import StepCheckpointer, TrainingPosition, TrainingState, Watch
from clbench.training.update import (
    Gradients,
    UpdateWork,
    divide,
    refuse_batch_statistics,
    refuse_misses,
)

Validate = Callable[[nn.Module], float]
"""Mean Dice of the model on this step's validation cases; draws no random number. Of several
processes all call it, and all get the same."""


def learning_rate(epoch: int, *, epochs: int, warmup: int, base: float) -> float:
    """Linear warm-up, then a cosine that would reach 0 one epoch after the last.

    Args:
        epoch: 0-based epoch.
        epochs: epochs of the phase.
        warmup: epochs of linear warm-up.
        base: learning rate at the end of the warm-up.

    Source: the authors' schedule, stepped before each epoch (epochs here = their `max_epoch` - 1:
    their last epoch trains with a learning rate of 0 and changes nothing).
    """
    n = epoch + 1
    if n < warmup:
        return base * n / max(1, warmup - 1)
    return 0.5 * base * (1.0 + math.cos(math.pi * (n - warmup) / (epochs + 1 - warmup)))


def sum_terms(terms: Mapping[str, Tensor], where: str) -> Tensor:
    """The sum of the loss terms, on their device; whether it is finite is not looked at.

    Args:
        terms: name → a tensor of one element.
        where: step, phase, epoch, iteration, cases.

    Raises:
        TrainingError: there are none, or one has several elements.
    """
    if not terms:
        raise TrainingError("the strategy returned no loss term", where=where)
    for name, value in terms.items():
        if value.numel() != 1:
            raise TrainingError(
                f"the loss term {name!r} is not a single number",
                where=where,
                expected="a tensor of one element",
                got=f"shape {tuple(value.shape)}",
                next_step="reduce it in the strategy's losses, for example by .mean()",
            )
    return torch.stack([v.float() for v in terms.values()]).sum()


def check_terms(values: Mapping[str, float], where: str) -> None:
    """Refuse a loss term that is not finite.

    Args:
        values: name → value of the term.
        where: step, phase, epoch, iteration, cases.

    Raises:
        TrainingError: names the first such term, the step and the update.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss term {name!r} is not finite",
                where=where,
                got=value,
                next_step="lower the learning rate (--set train.lr=…), clip the gradient "
                "(--set train.clip_norm=12) or look at the cases of this batch in events.jsonl",
            )


def add_terms(terms: Mapping[str, Tensor], where: str) -> Tensor:
    """The sum of the loss terms, each looked at: `sum_terms` and `check_terms` in one.

    Args:
        terms: name → a tensor of one element.
        where: step, phase, epoch, iteration, cases.

    Raises:
        TrainingError: there are none, or one is not finite.
    """
    total = sum_terms(terms, where)
    check_terms(dict(zip(terms, to_host(terms.values()), strict=True)), where)
    return total


def to_host(tensors: Iterable[Tensor]) -> list[float]:
    """All elements of the tensors, one after the other, by a single transfer from the device.

    float64 holds every float32, float16 and bfloat16, and every count below 2^53, exactly.
    """
    values: list[float] = torch.cat([t.detach().double().reshape(-1) for t in tensors]).tolist()
    return values


def phase_length(phase: Phase, lesson: Lesson, train: TrainSettings) -> int:
    """Updates per epoch of a phase.

    Args:
        phase: its `effort` scales the length.
        lesson: the step; its cases count where no number of updates is set.
        train: updates per epoch (None: one pass over the cases), and crops per update.
    """
    one = train.iterations or math.ceil(len(lesson.cases) / train.crops)
    return max(1, round(one * phase.effort))


@dataclass(frozen=True, kw_only=True)
class StepTraining:
    """What one step is taught with."""

    strategy: Strategy
    """The method."""
    state: TrainingState
    """The model as built or grown for this step, and the strategy's memory; `teach` changes both
    in place."""
    teacher: nn.Module | None
    """The model served after the previous step; run only if the strategy takes it."""
    lesson: Lesson
    """What is taught."""
    material: Material
    """Volumes, weights and pseudo labels."""
    train: TrainSettings
    """Optimizer and schedule."""
    seed: int
    """Of the run."""
    device: torch.device
    """Where to compute."""
    workers: int | None = None
    """Loader processes; None: by the device."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that teach it together."""
    watch: Watch = lambda event: None
    """Called with one event per update and per validation."""
    validate: Validate | None = None
    """Measures the served model; None: there are no validation cases."""
    checkpointer: StepCheckpointer | None = None
    """Saves the place between two updates, and knows where a stopped attempt was."""


def teach(step: StepTraining) -> None:
    """Teach one step: change its model and memory in place.

    Raises:
        TrainingError: a loss that is not finite, a broken promise, or a phase that must be
            validated where there are no validation cases.
        Stopped: the checkpointer was asked to stop; everything is saved.
    """
    strategy, lesson, state = step.strategy, step.lesson, step.state
    model, memory = state.model, state.memory
    model.to(step.device)
    if step.teacher is not None:
        step.teacher.to(step.device).eval().requires_grad_(False)
    if not strategy.takes_teacher(lesson):
        step = replace(step, teacher=None)
    if step.checkpointer is not None:
        step.checkpointer.restore(state)
    at, state.position = state.position, None
    history: list[PhaseResult] = [] if at is None else list(at.history)
    while (
        phase := at.phase if at else strategy.next_phase(lesson, memory, tuple(history))
    ) is not None:
        if at is None:
            short = partial(unfinished_warmup, lesson, train=step.train)
            said = short(phase)
            if said is not None and not any(short(before.phase) for before in history):
                step.watch(said)  # once a step
            reseed(step.seed, lesson.number, phase.name, "enter")
            strategy.enter_phase(phase, model, memory)
        setup = _open_phase(step, phase, tuple(history), at)
        with compiled(model, on=step.train.compile):
            _teach_phase(step, setup)
        history.append(PhaseResult(phase=phase, validation=tuple(setup.measured)))
        at = None
    reseed(step.seed, lesson.number, "finish")
    strategy.finish(lesson, model, _draws(step), memory)


def _draws(step: StepTraining) -> DrawBatches:
    """Batches of the step's own cases, for what a strategy computes once it is taught."""
    lesson, train = step.lesson, step.train
    own = {(lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases}

    def draws(count: int) -> Iterator[Batch]:
        crops = Crops(
            lesson,
            Phase(name="finish"),
            replace(step.material, weights=own),
            epochs=1,
            per_epoch=count * train.crops,
            seed=step.seed,
            cut_only=step.device.type == "cuda",
        )
        size = train.crops
        whole = [range(i * size, (i + 1) * size) for i in range(count)]
        yield from batches_on_device(_loader(crops, step, whole), lesson, step.device)

    return draws


def _loader(
    crops: Crops, step: StepTraining, batches: Sequence[range]
) -> DataLoader[dict[str, Any]]:
    """Batches of the crops of these numbers."""
    return DataLoader(
        crops,
        batch_sampler=map(list, batches),
        num_workers=loader_workers(step.workers, step.device, step.ranks.size),
        collate_fn=collate,
        pin_memory=step.device.type == "cuda",
        worker_init_fn=leave_to_parent,
    )


def freeze(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Let gradients reach `trained` alone, and put what is frozen as a whole in evaluation mode.

    A frozen dropout would still be random, and a frozen batch normalization would still move its
    running statistics, if their modules stayed in training mode.
    """
    model.requires_grad_(False).train()
    for p in trained:
        p.requires_grad_(True)
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


@contextmanager
def compiled(model: nn.Module, *, on: bool) -> Iterator[None]:
    """In this block the model's forward pass is what torch.compile makes of it.

    A network grows between phases and keeps its shape within one, so each phase compiles anew. Its
    modules, parameters and state dict stay its own.

    Args:
        model: of the phase.
        on: whether to; else nothing happens.

    Raises:
        SettingError: torch cannot compile the network here.
    """
    if not on:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # costs seconds to import

    model.compile(dynamic=False)
    try:
        yield
    except TorchDynamoException as err:
        raise SettingError(
            "torch.compile cannot compile the network here",
            where=f"train.compile, {type(model).__name__}",
            got=f"{type(err).__name__}: {first_line(err)}",
            next_step="--set train.compile=false",
        ) from err
    finally:
        model._compiled_call_impl = None


def rates(model: nn.Module, groups: Sequence[Group], generator_lr: float) -> list[dict[str, Any]]:
    """The optimizer's groups; what generates a head's weights has a factor of its own.

    Args:
        model: holds the heads whose weights are generated.
        groups: parameters to train, each with its factor on the learning rate.
        generator_lr: further factor on parameters that generate a head's weights.
    """
    generators = {
        id(p)
        for module in model.modules()
        if isinstance(module, UniversalHead)
        for p in module.generator()
    }
    optimized = []
    for group in groups:
        for scale, inside in ((group.lr, False), (group.lr * generator_lr, True)):
            chosen = [p for p in group.parameters if (id(p) in generators) == inside]
            if chosen:
                optimized.append({"params": chosen, "scale": scale})
    return optimized


def adamw(
    groups: Sequence[dict[str, Any]], train: TrainSettings, device: torch.device
) -> torch.optim.AdamW:
    """The optimizer of a phase.

    Args:
        groups: what `rates` returns.
        train: learning rate, decay and the like.
        device: where the parameters lie.
    """
    return torch.optim.AdamW(
        groups,
        lr=train.lr,
        betas=(0.9, train.beta2),
        weight_decay=train.weight_decay,
        fused=device.type == "cpu",  # one pass over memory instead of five
    )


@dataclass(frozen=True, kw_only=True)
class _PhaseSetup:
    """One phase, ready for its next update."""

    phase: Phase
    history: tuple[PhaseResult, ...]
    """The phases before it."""
    groups: Sequence[Group]
    """What is trained, as the strategy said."""
    trained: Sequence[nn.Parameter]
    """The parameters of all groups; every other one is frozen."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Of the loss, under fp16; does nothing otherwise."""
    work: UpdateWork
    """Computes the gradients; by its session, the strategy's hooks or those around them."""
    batches: Iterator[Batch]
    """One per update that is still to do."""
    saves: bool
    """A stopped step goes on within this phase; else it starts anew."""
    epochs: int
    updates: int
    """Per epoch."""
    done: int
    """Updates that a stopped attempt made."""
    measured: list[float]
    """Validations so far; grows."""


def _refuse_groups(trained: Sequence[nn.Parameter], where: str) -> None:
    """Refuse groups that no optimizer takes.

    Raises:
        TrainingError: they hold no parameter, or one twice.
    """
    twice = len(trained) - len({id(p) for p in trained})
    if trained and not twice:
        return
    raise TrainingError(
        "the strategy trains nothing" if not trained else "the strategy trains a parameter twice",
        where=f"{where}, groups",
        expected="every parameter that is to be trained, in one group",
        got=f"{twice} of {len(trained)} once more" if trained else "no parameter",
        next_step="mend `groups` of the strategy",
    )


def _open_phase(
    step: StepTraining,
    phase: Phase,
    history: tuple[PhaseResult, ...],
    at: TrainingPosition | None,
) -> _PhaseSetup:
    """Freeze what is not trained, make the optimizer, and number the crops.

    Args:
        step: what is taught.
        phase: which of its phases.
        history: the phases before it.
        at: where a stopped attempt goes on, or None.

    Raises:
        TrainingError: it must be validated, and there are no validation cases; or its groups hold
            no parameter, or one twice.
    """
    strategy, model, train = step.strategy, step.state.model, step.train
    if phase.validations and step.validate is None:  # said before it costs a phase of training
        raise TrainingError(
            "the strategy asks for validation, but this step has no validation cases",
            where=f"step {step.lesson.number}, phase {phase.name}",
            expected="cases under `validation` in the split of every step",
            next_step=f"name some with --split {step.lesson.source}=FILE.toml",
        )
    groups = at.groups if at else strategy.groups(model, step.lesson, step.state.memory)
    trained = [p for g in groups for p in g.parameters]
    _refuse_groups(trained, f"step {step.lesson.number}, phase {phase.name}")
    freeze(model, trained)
    optimizer = adamw(rates(model, groups, train.generator_lr), train, step.device)
    fp16 = step.device.type == "cuda" and train.amp == "fp16"
    scaler = torch.amp.GradScaler("cuda", enabled=fp16)
    if at is not None:  # a stopped attempt goes on after its last saved update
        optimizer.load_state_dict(dict(at.optimizer))
        if at.scaler:
            scaler.load_state_dict(dict(at.scaler))
    done = 0 if at is None else at.updates

    # crops are numbered from 0, in order
    updates = phase_length(phase, step.lesson, train)
    epochs = train.epochs if phase.epochs is None else phase.epochs
    crops = Crops(
        step.lesson,
        phase,
        step.material,
        epochs=epochs,
        per_epoch=updates * train.crops,
        seed=step.seed,
        cut_only=step.device.type == "cuda",
    )
    division = divide(train, step.ranks)
    refuse_batch_statistics(model, division)
    context = PhaseContext(
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        lesson=step.lesson,
        phase=phase,
        teacher=step.teacher,
        memory=step.state.memory,
        epochs=epochs,
        updates=updates,
        batch=train.crops,
        seed=step.seed,
        device=step.device,
        draw=draw_from(step.lesson, phase, step.material, seed=step.seed),
        validation=step.material.validation,
        done=done,
    )
    session = strategy.session(context) or Session(context)
    whole = type(session).batches is not Session.batches
    cut = replace(division, ranks=Ranks()) if whole else division
    loader = _loader(crops, step, [cut.own(u) for u in range(done, epochs * updates)])
    return _PhaseSetup(
        phase=phase,
        history=history,
        groups=groups,
        trained=trained,
        optimizer=optimizer,
        scaler=scaler,
        work=UpdateWork(
            session=session,
            division=division,
            whole=whole,
            trained=trained,
            autocast=partial(
                torch.autocast,
                step.device.type,
                dtype=torch.float16 if fp16 else torch.bfloat16,
                enabled=fp16 or train.amp == "bf16",
            ),
            scaled=scaler.scale,
        ),
        batches=session.batches(batches_on_device(loader, step.lesson, step.device)),
        saves=strategy.declaration.resumes != "step",
        epochs=epochs,
        updates=updates,
        done=done,
        measured=[] if at is None else list(at.measured),
    )


def _teach_phase(step: StepTraining, setup: _PhaseSetup) -> None:
    """Every update of one phase."""
    phase = setup.phase
    work, optimizer, scaler = setup.work, setup.optimizer, setup.scaler
    session = work.session
    for number, batch in enumerate(setup.batches, setup.done):
        seeds = (step.seed, step.lesson.number, phase.name, "update", number)
        reseed(*seeds)
        epoch, iteration = divmod(number, setup.updates)
        place = (
            f"step {step.lesson.number}, phase {phase.name}, epoch {epoch}, iteration {iteration}"
        )
        where = f"{place}, cases {', '.join(batch.cases)}"
        rate = _set_learning_rate(step, setup, epoch)

        optimizer.zero_grad(set_to_none=True)
        with noted(where):
            of_update = work.gradients(
                batch, partial(sum_terms, where=where), partial(reseed, *seeds)
            )
        scaler.unscale_(optimizer)
        session.after_backward()
        norm = _gradient_norm(setup.trained, step.train.clip_norm)

        # the one time an update waits for the device, and before any weight changes
        numbers = _transfer(of_update, norm)
        refuse_misses(numbers["misses"], where)
        check_terms(numbers["terms"], where)
        check_gradient(numbers["grad_norm"], where, scaled=scaler.is_enabled())

        session.before_update()
        with noted(where):
            scaler.step(optimizer)
        scaler.update()
        session.after_update()
        if number == setup.done and step.device.type == "cpu":
            freed_memory().settle()  # after one update its memory is known

        step.watch(_update_event(step, setup, number, rate, of_update.cases, numbers))
        if iteration + 1 == setup.updates and epoch + phase.validations >= setup.epochs:
            setup.measured.append(_validate(step, phase, epoch))
        _save(step, setup, number + 1, place)


def _set_learning_rate(step: StepTraining, setup: _PhaseSetup, epoch: int) -> float:
    """Set every group's learning rate for an epoch; returns the one that is scaled by group."""
    train, phase = step.train, setup.phase
    rate = phase.lr * (
        train.lr
        if phase.constant
        else learning_rate(epoch, epochs=setup.epochs, warmup=train.warmup, base=train.lr)
    )
    for group in setup.optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    return rate


def _gradient_norm(trained: Sequence[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The total norm of the gradient, on its device; the gradient is clipped where asked."""
    if clip_norm is None:
        return nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    return nn.utils.clip_grad_norm_(trained, clip_norm)


class _Numbers(TypedDict):
    """The numbers of one update: checked, then logged."""

    terms: dict[str, float]
    loss: float
    grad_norm: float
    voxels: list[int]
    misses: float


def _transfer(of_update: Gradients, norm: Tensor) -> _Numbers:
    """The numbers of an update, by a single transfer from the device.

    Args:
        of_update: loss terms, their sum, voxels.
        norm: of the gradient; without any gradient torch makes it on the CPU.
    """
    terms, loss, misses = of_update.terms, of_update.loss, of_update.misses
    extra = [] if misses is None else [misses]
    numbers = to_host([*terms.values(), loss, norm.to(loss.device), *extra, of_update.voxels])
    count, voxels = len(terms), len(terms) + 2 + len(extra)
    return {
        "terms": dict(zip(terms, numbers[:count], strict=True)),
        "loss": numbers[count],
        "grad_norm": numbers[count + 1],
        "voxels": [int(n) for n in numbers[voxels:]],
        "misses": numbers[count + 2] if extra else 0.0,
    }


def _update_event(
    step: StepTraining,
    setup: _PhaseSetup,
    number: int,
    rate: float,
    cases: Sequence[str],
    numbers: _Numbers,
) -> dict[str, Any]:
    """An update as a line of `events.jsonl`.

    Args:
        step: what is taught.
        setup: the phase, and how long it is.
        number: of the update in the phase, from 0.
        rate: learning rate.
        cases: what the batch was cut from.
        numbers: losses, gradient norm and voxels.
    """
    epoch, iteration = divmod(number, setup.updates)
    return {
        "event": "update",
        "step": step.lesson.number,
        "phase": setup.phase.name,
        "epoch": epoch,
        "iteration": iteration,
        "of": setup.epochs * setup.updates,
        "lr": rate,
        "loss": numbers["loss"],
        "terms": numbers["terms"],
        "cases": list(cases),
        "grad_norm": numbers["grad_norm"],
        "voxels": numbers["voxels"],
    }


def _validate(step: StepTraining, phase: Phase, epoch: int) -> float:
    """Mean Dice of the model that would be served now, on the step's validation cases."""
    assert step.validate is not None  # noqa: S101  # looked at when the phase was opened
    dice = step.validate(step.strategy.serve(step.state.model, step.state.memory))
    step.watch(
        {
            "event": "validation",
            "step": step.lesson.number,
            "phase": phase.name,
            "epoch": epoch,
            "dice": dice,
            "last_epochs": phase.validations,
        }
    )
    return dice


def _save(step: StepTraining, setup: _PhaseSetup, updates: int, where: str) -> None:
    """Save between two updates where it is time to, and stop where that was asked for.

    Args:
        step: what is taught.
        setup: the phase, its optimizer and the like.
        updates: of the phase that are done.
        where: step, phase, epoch, iteration.

    Raises:
        Stopped: it was asked for.
    """
    if not setup.saves:
        step.ranks.check(f"{where}; this step starts anew")
    elif step.checkpointer is not None and step.checkpointer.due():
        # the optimizer's state is gathered only now: doing so costs as much as a small update
        step.state.position = TrainingPosition(
            phase=setup.phase,
            history=setup.history,
            updates=updates,
            measured=tuple(setup.measured),
            groups=setup.groups,
            optimizer=setup.optimizer.state_dict(),
            scaler=setup.scaler.state_dict(),
        )
        step.checkpointer.offer(step.state)
