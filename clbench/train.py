"""One step of teaching: phases, epochs, updates. Read it top to bottom.

Room: row 3. A crop is a pure function of (seed, step, phase, epoch, index), and the random state of
an update one of its number: nothing in a loader or worker has a state worth saving, the number of
workers changes nothing, and a stopped step goes on to the bit (`clbench.resume`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clbench import stop
from clbench.data.crops import crop
from clbench.data.pseudo import PseudoMap
from clbench.data.volumes import Volume
from clbench.errors import TrainingError
from clbench.headroom import noted
from clbench.nets.heads import UniversalHead
from clbench.resume import Keeper, Place, Watch, reseed
from clbench.session import Desk, Draw, Session
from clbench.settings import DataSettings, TrainSettings
from clbench.stop import leave_to_parent
from clbench.strategy import (
    Batch,
    Draws,
    Group,
    Lesson,
    Memory,
    Phase,
    PhaseResult,
    Strategy,
    derive_seed,
)
from clbench.taxonomy import DECLARED, declare
from clbench.watches import check_gradient, positives

CaseKey = tuple[int, str]
"""(step whose source holds it, case id)."""
"""Receives one event per update and per validation; never changes the run."""
Validate = Callable[[nn.Module], float]
"""Mean Dice of the model on this step's validation cases; draws no random number."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What one step is taught with."""

    volumes: Mapping[CaseKey, Volume]
    """Every case that may be drawn."""
    weights: Mapping[CaseKey, float]
    """How often a case is drawn; this step's own cases weigh 1 together."""
    pseudo: Mapping[CaseKey, PseudoMap]
    """Offline pseudo labels, where there are any."""
    patch_vox: tuple[int, int, int]
    data: DataSettings
    validation: Callable[[str], Volume] | None = None
    """Opens a validation case of this step, for sessions that ask for one."""


def learning_rate(epoch: int, *, epochs: int, warmup: int, base: float) -> float:
    """Linear warm-up, then a cosine that would reach 0 one epoch after the last.

    Source: the authors' schedule, stepped before each epoch (epochs here = their `max_epoch` - 1:
    their last epoch trains with a learning rate of 0 and changes nothing).
    """
    n = epoch + 1
    if n < warmup:
        return base * n / max(1, warmup - 1)
    return 0.5 * base * (1.0 + math.cos(math.pi * (n - warmup) / (epochs + 1 - warmup)))


def draw_cases(
    weights: Mapping[CaseKey, float], count: int, *, own: Sequence[CaseKey], seed: int
) -> list[CaseKey]:
    """`count` cases for one epoch.

    Without past cases every case comes once before any comes twice; with them, cases are drawn by
    weight, with replacement. Cases of weight 0 are as if they were not there.
    """
    weights = {key: weight for key, weight in weights.items() if weight > 0}
    rng = np.random.Generator(np.random.PCG64(seed))
    if set(weights) == set(own):
        order: list[CaseKey] = []
        while len(order) < count:
            order += [own[i] for i in rng.permutation(len(own))]
        return order[:count]
    keys = sorted(weights)
    p = np.array([weights[k] for k in keys], dtype=np.float64)
    return [keys[i] for i in rng.choice(len(keys), size=count, p=p / p.sum())]


class Crops(Dataset[dict[str, Any]]):
    """All crops of one phase, numbered; item i is a function of its number alone."""

    def __init__(
        self,
        lesson: Lesson,
        phase: Phase,
        material: Material,
        *,
        epochs: int,
        per_epoch: int,
        seed: int,
    ) -> None:
        self.lesson, self.phase, self.material = lesson, phase, material
        self.epochs, self.per_epoch, self.seed = epochs, per_epoch, seed
        self._own = [(lesson.number, c) for c in lesson.cases]
        self._orders: dict[int, list[CaseKey]] = {}
        self._declared = tuple(DECLARED.values())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that was not forked, tell the taxonomy what the course declares."""
        self.__dict__.update(state)
        declare(self._declared, "a loader worker")

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def _order(self, epoch: int) -> list[CaseKey]:
        if epoch not in self._orders:
            seed = derive_seed(self.seed, self.lesson.number, self.phase.name, "order", epoch)
            self._orders = {
                epoch: draw_cases(self.material.weights, self.per_epoch, own=self._own, seed=seed)
            }
        return self._orders[epoch]

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, self.per_epoch)
        key = self._order(epoch)[place]
        image, label, pseudo = crop(
            self.material.volumes[key],
            self.lesson.structures,
            patch_vox=self.material.patch_vox,
            data=self.material.data,
            seed=derive_seed(self.seed, self.lesson.number, self.phase.name, epoch, place),
            pseudo=self.material.pseudo.get(key),
        )
        return {"image": image, "label": label, "pseudo": pseudo, "case": f"{key[0]}/{key[1]}"}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack crops; where only some have pseudo labels, the others get 255 (none)."""
    pseudo = [i["pseudo"] for i in items]
    if any(p is not None for p in pseudo):
        pseudo = [
            p if p is not None else np.full_like(i["label"], 255)
            for p, i in zip(pseudo, items, strict=True)
        ]
    return {
        "image": torch.from_numpy(np.stack([i["image"] for i in items])),
        "label": torch.from_numpy(np.stack([i["label"] for i in items])),
        "pseudo": torch.from_numpy(np.stack(pseudo)) if pseudo[0] is not None else None,
        "cases": tuple(i["case"] for i in items),
    }


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
    """Updates per epoch of a phase."""
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
    """The optimizer's groups; what generates a head's weights has a factor of its own."""
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
        if strategy.resumes == "step":
            stop.check(f"{where}; this step starts anew")
        elif keeper is not None:
            place = Place(
                phase=phase, history=history, updates=number + 1, measured=tuple(measured),
                groups=groups, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            )  # fmt: skip
            keeper.offer(model, memory, place)
    return tuple(measured)


def draw_from(lesson: Lesson, phase: Phase, material: Material, *, seed: int) -> Draw:
    """Crops for a session, cut as the loop cuts its own, numbered by places of their own."""

    def draw(case: Volume | CaseKey, place: Sequence[object]) -> tuple[Tensor, Tensor]:
        image, label, _ = crop(
            case if isinstance(case, Volume) else material.volumes[case],
            lesson.structures,
            patch_vox=material.patch_vox,
            data=material.data,
            seed=derive_seed(seed, lesson.number, phase.name, *place),
        )
        return torch.from_numpy(image), torch.from_numpy(label)

    return draw


def _measure(validate: Validate | None, served: nn.Module, lesson: Lesson, where: str) -> float:
    if validate is None:
        raise TrainingError(
            "the strategy asks for validation, but this step has no validation cases",
            where=where,
            expected="cases under `validation` in the split of every step",
            next_step=f"name some with --split {lesson.source}=FILE.toml",
        )
    return validate(served)


def to_batch(raw: dict[str, Any], lesson: Lesson, device: torch.device) -> Batch:
    """Loader output → `Batch` on the device."""
    batch = Batch(
        image=raw["image"].to(device),
        label=raw["label"].to(device),
        pseudo=None if raw["pseudo"] is None else raw["pseudo"].to(device),
        structures=lesson.structures,
        new=lesson.new_flags,
        cases=raw["cases"],
    )
    if batch.image.dtype != torch.float32:
        return replace(batch, image=batch.image.float())
    return batch
