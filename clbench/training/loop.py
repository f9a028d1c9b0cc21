"""One step of teaching: phases, epochs, updates. Read it top to bottom.

A crop is a pure function of (seed, step, phase, epoch, index), and the random state of
an update one of its number: nothing in a loader or worker has a state worth saving, the number of
workers changes nothing, and a stopped step goes on to the bit (`clbench.training.resume`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clbench import signals
from clbench.errors import TrainingError
from clbench.nets.heads import UniversalHead
from clbench.reproducibility import reseed
from clbench.signals import leave_to_parent
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import (
    Batch,
    Desk,
    Draws,
    Group,
    Lesson,
    Memory,
    Phase,
    PhaseResult,
    Session,
    Strategy,
)
from clbench.training.batches import Crops, Material, collate, draw_from, to_batch
from clbench.training.gpu_memory import noted
from clbench.training.monitors import check_gradient, positives
from clbench.training.resume import Keeper, Place, Watch

Validate = Callable[[nn.Module], float]
"""Mean Dice of the model on this step's validation cases; draws no random number."""


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


def add_terms(terms: Mapping[str, Tensor], where: str) -> Tensor:
    """The sum of the loss terms.

    Raises:
        TrainingError: a term is not finite; names it, the step and the update.
    """
    if not terms:
        raise TrainingError("the strategy returned no loss term", where=where)
    for name, value in terms.items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"the loss term {name!r} is not finite",
                where=where,
                got=float(value.detach()),
                next_step="lower the learning rate (--set train.lr=…), clip the gradient "
                "(--set train.clip_norm=12) or look at the cases of this batch in events.jsonl",
            )
    return torch.stack([v.float() for v in terms.values()]).sum()


def phase_length(phase: Phase, lesson: Lesson, train: TrainSettings) -> int:
    """Updates per epoch of a phase.

    Args:
        phase: its `effort` scales the length.
        lesson: the step; its cases count where no number of updates is set.
        train: updates per epoch (None: one pass over the cases), and the batch.
    """
    one = train.iterations or math.ceil(len(lesson.cases) / train.batch)
    return max(1, round(one * phase.effort))


def teach(
    strategy: Strategy,
    model: nn.Module,
    teacher: nn.Module | None,
    lesson: Lesson,
    memory: Memory,
    material: Material,
    *,
    train: TrainSettings,
    seed: int,
    device: torch.device,
    workers: int = 0,
    watch: Watch = lambda event: None,
    validate: Validate | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Teach one step: change `model` and `memory` in place.

    Args:
        strategy: the method.
        model: as built or grown for this step.
        teacher: the model served after the previous step; frozen, and run only if the strategy
            takes it.
        lesson: what is taught.
        memory: the strategy's memory.
        material: volumes, weights and pseudo labels.
        train: optimizer and schedule.
        seed: of the run.
        device: where to compute.
        workers: loader processes.
        watch: called with one event per update and per validation.
        validate: measures the served model; None: there are no validation cases.
        keeper: saves the place between two updates, and knows where a stopped attempt was.

    Raises:
        TrainingError: a loss that is not finite, a broken promise, or a phase that must be
            validated where there are no validation cases.
        Stopped: the keeper was asked to stop; everything is saved.
    """
    model.to(device)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    at = None if keeper is None else keeper.restore(model, memory)
    history: list[PhaseResult] = [] if at is None else list(at.history)
    while (
        phase := at.phase if at else strategy.next_phase(lesson, memory, tuple(history))
    ) is not None:
        if at is None:
            reseed(seed, lesson.number, phase.name, "enter")
            strategy.enter_phase(phase, model, memory)
        measured = _teach_phase(
            strategy, model, teacher, lesson, memory, material, phase, tuple(history), at,
            train=train, seed=seed, device=device, workers=workers, watch=watch,
            validate=validate, keeper=keeper,
        )  # fmt: skip
        history.append(PhaseResult(phase=phase, validation=measured))
        at = None
    reseed(seed, lesson.number, "finish")
    draws = _draws(lesson, material, train=train, seed=seed, device=device, workers=workers)
    strategy.finish(lesson, model, draws, memory)


def _draws(
    lesson: Lesson,
    material: Material,
    *,
    train: TrainSettings,
    seed: int,
    device: torch.device,
    workers: int,
) -> Draws:
    own = {(lesson.number, c): 1.0 / len(lesson.cases) for c in lesson.cases}

    def draws(count: int) -> Iterator[Batch]:
        crops = Crops(
            lesson, Phase(name="finish"), replace(material, weights=own),
            epochs=1, per_epoch=count * train.batch, seed=seed,
        )  # fmt: skip
        for raw in DataLoader(
            crops, batch_size=train.batch, num_workers=workers, collate_fn=collate,
            worker_init_fn=leave_to_parent,
        ):  # fmt: skip
            yield to_batch(raw, lesson, device)

    return draws


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
    found = []
    for group in groups:
        for scale, inside in ((group.lr, False), (group.lr * generator_lr, True)):
            chosen = [p for p in group.parameters if (id(p) in generators) == inside]
            if chosen:
                found.append({"params": chosen, "scale": scale})
    return found


def _teach_phase(
    strategy: Strategy,
    model: nn.Module,
    teacher: nn.Module | None,
    lesson: Lesson,
    memory: Memory,
    material: Material,
    phase: Phase,
    history: tuple[PhaseResult, ...],
    at: Place | None,
    *,
    train: TrainSettings,
    seed: int,
    device: torch.device,
    workers: int,
    watch: Watch,
    validate: Validate | None,
    keeper: Keeper | None,
) -> tuple[float, ...]:
    # 1. What is trained: the parameters of the strategy's groups; all others are frozen.
    groups = at.groups if at else strategy.groups(model, lesson, memory)
    chosen = [p for g in groups for p in g.parameters]
    freeze(model, chosen)
    optimizer = torch.optim.AdamW(
        rates(model, groups, train.generator_lr),
        lr=train.lr,
        betas=(0.9, train.beta2),
        weight_decay=train.weight_decay,
        fused=device.type == "cpu",  # one pass over memory instead of five
    )
    amp = torch.bfloat16 if train.amp == "bf16" else torch.float16
    autocast = device.type == "cuda" and train.amp != "off"
    scaler = torch.amp.GradScaler("cuda", enabled=autocast and train.amp == "fp16")
    done, measured = 0, list[float]()
    if at is not None:  # a stopped attempt goes on after its last saved update
        done, measured = at.updates, list(at.measured)
        optimizer.load_state_dict(dict(at.optimizer))
        if at.scaler:
            scaler.load_state_dict(dict(at.scaler))

    # 2. What is seen: crops numbered from 0, in order.
    updates = phase_length(phase, lesson, train)
    epochs = train.epochs if phase.epochs is None else phase.epochs
    crops = Crops(
        lesson, phase, material, epochs=epochs, per_epoch=updates * train.batch, seed=seed
    )
    loader = DataLoader(
        crops, batch_size=train.batch, sampler=range(done * train.batch, len(crops)),
        num_workers=workers, collate_fn=collate, worker_init_fn=leave_to_parent,
    )  # fmt: skip

    # 3. Who takes part: the strategy's hooks, or a session of its own around them.
    desk = Desk(
        strategy=strategy, model=model, optimizer=optimizer, lesson=lesson, phase=phase,
        teacher=teacher if strategy.takes_teacher(lesson) else None, memory=memory,
        epochs=epochs, updates=updates, batch=train.batch, seed=seed, device=device,
        draw=draw_from(lesson, phase, material, seed=seed), validation=material.validation,
        done=done,
    )  # fmt: skip
    session = strategy.session(desk) or Session(desk)
    batches = session.batches(to_batch(raw, lesson, device) for raw in loader)

    # 4. The updates.
    for number, batch in enumerate(batches, done):
        reseed(seed, lesson.number, phase.name, "update", number)
        epoch, iteration = divmod(number, updates)
        where = f"step {lesson.number}, phase {phase.name}, epoch {epoch}, iteration {iteration}"
        rate = phase.lr * (
            train.lr
            if phase.constant
            else learning_rate(epoch, epochs=epochs, warmup=train.warmup, base=train.lr)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        there = f"{where}, cases {', '.join(batch.cases)}"
        optimizer.zero_grad(set_to_none=True)
        with noted(there):
            with torch.autocast(device.type, dtype=amp, enabled=autocast):
                terms = session.terms(batch)
            total = add_terms(terms, there)
            scaler.scale(total).backward()  # type: ignore[no-untyped-call]  # torch
        scaler.unscale_(optimizer)
        session.after_backward()
        norm = float(
            nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])
            if train.clip_norm is None
            else nn.utils.clip_grad_norm_(chosen, train.clip_norm)
        )
        check_gradient(norm, there, scaled=scaler.is_enabled())
        session.before_update()
        with noted(there):
            scaler.step(optimizer)
        scaler.update()
        session.after_update()
        watch(
            {
                "event": "update",
                "step": lesson.number,
                "phase": phase.name,
                "epoch": epoch,
                "iteration": iteration,
                "of": epochs * updates,
                "lr": rate,
                "loss": float(total.detach()),
                "terms": {name: float(v.detach()) for name, v in terms.items()},
                "cases": list(batch.cases),
                "grad_norm": norm,
                "voxels": positives(batch.label),
            }
        )
        if iteration + 1 == updates and epoch + phase.validations >= epochs:
            measured.append(_measure(validate, strategy.serve(model, memory), lesson, where))
            watch(
                {
                    "event": "validation",
                    "step": lesson.number,
                    "phase": phase.name,
                    "epoch": epoch,
                    "dice": measured[-1],
                }
            )
        if strategy.declaration.resumes == "step":
            signals.check(f"{where}; this step starts anew")
        elif keeper is not None:
            place = Place(
                phase=phase, history=history, updates=number + 1, measured=tuple(measured),
                groups=groups, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            )  # fmt: skip
            keeper.offer(model, memory, place)
    return tuple(measured)


def _measure(validate: Validate | None, served: nn.Module, lesson: Lesson, where: str) -> float:
    if validate is None:
        raise TrainingError(
            "the strategy asks for validation, but this step has no validation cases",
            where=where,
            expected="cases under `validation` in the split of every step",
            next_step=f"name some with --split {lesson.source}=FILE.toml",
        )
    return validate(served)
