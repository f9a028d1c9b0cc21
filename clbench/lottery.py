"""The lottery-ticket schedule and the running average of a decoder, as phases and memory.

Room: row 2 (torch). Everything it knows lies in `Memory`, so a stopped run goes on from there:
`prune/mask/…`, `prune/before/…` (the masks of the level before), `prune/stored/…` (the weights
before this level's pruning), `ema/<decoder>/…`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.growth import GrowingDecoders
from clbench.pruning import (
    SPARSITIES,
    apply_masks,
    left_after,
    magnitude_masks,
    prunable,
    steps_of,
)
from clbench.strategy import Memory, Phase, PhaseResult

MEASURED = 10
"""Validations before pruning whose mean is the reference."""
RECOVER = "recover"
ROLLED_BACK = "recover, rolled back"
ALONE = "prune/alone"
"""Memory: pruning has begun."""


def next_phase(history: Sequence[PhaseResult], *, tolerance: float, attempts: int) -> Phase | None:
    """Train, prune level by level, recover.

    A level is retrained for one epoch and kept if its validation Dice is at least `1 - tolerance`
    of the reference; otherwise it is tried again, at most `attempts` times, and then taken back.

    Source: the released code of Ji et al. (ICCV 2023). Differs: the recovery is as long as the
    training (theirs: 50 epochs of 1,000); every validation case counts (theirs: those between the
    0.5th and the 99.5th percentile).
    """
    if not history:
        return Phase(validations=MEASURED)
    last = history[-1]
    if last.phase.name in (RECOVER, ROLLED_BACK):
        return None
    before = torch.tensor(history[0].validation).nanmean().item()
    if math.isnan(before):
        raise TrainingError(
            "pruning cannot be judged: no validation case holds a structure of this step",
            where="strategy.prune",
            expected="at least one validation case that annotates one of them",
            next_step="name other validation cases with --split, or --set strategy.prune=false",
        )
    if last.phase.name == "train":
        return _attempt(0, 0)
    level, attempt = _place(last.phase)
    if last.validation[-1] >= (1 - tolerance) * before:
        level, attempt = level + 1, 0
        return _attempt(level, 0) if level < len(SPARSITIES) else Phase(name=RECOVER)
    if attempt + 1 < attempts:
        return _attempt(level, attempt + 1)
    return Phase(name=ROLLED_BACK)


def _attempt(level: int, attempt: int) -> Phase:
    return Phase(name=f"prune {level}.{attempt}", epochs=1, constant=True, validations=1)


def _place(phase: Phase) -> tuple[int, int]:
    level, attempt = phase.name.removeprefix("prune ").split(".")
    return int(level), int(attempt)


def enter(phase: Phase, newest: Sequence[nn.Module], memory: Memory) -> None:
    """Bring a decoder, its output layer and memory to where the phase starts.

    From the first pruning on these two alone may be trained (`only_newest`): what is not stored
    here could not be taken back.
    """
    decoder = newest[0]
    if phase.name != "train":
        memory[ALONE] = 1
    if phase.name.startswith("prune "):
        level, attempt = _place(phase)
        if attempt == 0:
            for i, part in enumerate(newest):
                _write(memory, f"prune/stored/{i}/", part.state_dict())
            masks = _read(memory, "prune/mask/")
            _write(memory, "prune/before/", masks)
            _write(
                memory,
                "prune/mask/",
                magnitude_masks(decoder, masks, steps_of(SPARSITIES)[level]),
            )
        _take_back(newest, memory)  # survivors keep their weights
    elif phase.name == ROLLED_BACK:
        _take_back(newest, memory)
        masks = _read(memory, "prune/before/")
        for key in [k for k in memory if k.startswith("prune/mask/")]:
            del memory[key]
        _write(memory, "prune/mask/", masks)
    apply_masks(decoder, _read(memory, "prune/mask/"))
    memory["ema/updates"] = 0


def _take_back(newest: Sequence[nn.Module], memory: Memory) -> None:
    for i, part in enumerate(newest):
        part.load_state_dict(_read(memory, f"prune/stored/{i}/"))


def most(decoders: Iterable[nn.Module]) -> int:
    """Weights that are set to zero when every decoder passes every level."""
    sizes = [sum(w.numel() for w in prunable(d).values()) for d in decoders]
    return sum(n - left_after(n, SPARSITIES) for n in sizes)


def only_newest(memory: Memory) -> bool:
    """Whether pruning has begun in this step."""
    return ALONE in memory


def hold(decoder: nn.Module, memory: Memory) -> None:
    """After an update: pruned weights stay zero."""
    apply_masks(decoder, _read(memory, "prune/mask/"))


def end(memory: Memory, model: nn.Module | None = None) -> None:
    """After a step: the average becomes the weights of `model`; what was remembered goes."""
    if model is not None:
        _take_averages(model, memory)
    for key in [k for k in memory if k.startswith(("prune/", "ema/"))]:
        del memory[key]


def average(parts: Sequence[nn.Module], memory: Memory, number: int, *, decay: float) -> None:
    """Move the running average of decoder `number`; the first updates of a phase weigh more."""
    n = int(cast(int, memory.get("ema/updates", 0)))
    memory["ema/updates"] = n + 1
    weight = min(decay, (1 + n) / (10 + n)) if n else 0.0
    for i, part in enumerate(parts):
        for name, value in part.state_dict().items():
            key = f"ema/{number}/{i}/{name}"
            old = memory.get(key)
            new = value.detach().clone()
            if isinstance(old, Tensor):
                new = weight * old.to(new.device) + (1 - weight) * new
            memory[key] = new


def averaged(model: nn.Module, memory: Memory) -> nn.Module:
    """A copy of `model` in which every decoder with an average is that average."""
    copied = copy.deepcopy(model)
    _take_averages(copied, memory)
    return copied


def _take_averages(model: nn.Module, memory: Memory) -> None:
    grown = cast(GrowingDecoders, model)
    for number, parts in enumerate(zip(grown.decoders, grown.heads, strict=True), 1):
        for i, part in enumerate(parts):
            if kept := _read(memory, f"ema/{number}/{i}/"):
                part.load_state_dict(kept)


def _read(memory: Memory, prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}


def _write(memory: Memory, prefix: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        memory[prefix + name] = value.detach().clone()
