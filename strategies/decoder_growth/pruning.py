"""Magnitude pruning of a decoder level by level, and its exponential moving average (EMA).

All state lies in `Memory`, so a stopped run goes on from there. Its keys are part of checkpoints:

    prune/alone                        1 from the first pruning phase of a step on
    prune/mask/<weight>                bool masks of the current level, in the shape of the weight
    prune/before/<weight>              those of the level before
    prune/stored/<part>/<parameter>    decoder (part 0) and output layer (1) before this level
    ema/updates                        updates of this phase that the average has seen
    ema/<decoder>/<part>/<parameter>   averages; decoders count from 1
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.growing_decoders import GrowingDecoders
from clbench.strategy import Memory, Phase, PhaseResult

Masks = dict[str, Tensor]
"""Name of a weight → bool mask in its shape, False where it is pruned: then it is zero."""
SPARSITIES = (80, 82, 84, 86, 88, 90, 92, 94, 96, 98, 99, 99.2, 99.4, 99.6, 99.8)
"""Cumulative percentages; source: the released code of Ji et al. (ICCV 2023)."""
REFERENCE_VALIDATIONS = 10
"""Validations before pruning whose mean is the reference."""
RECOVER = "recover"
ROLLED_BACK = "recover, rolled back"
PRUNING_BEGUN = "prune/alone"


def next_prune_phase(
    history: Sequence[PhaseResult], *, tolerance: float, attempts: int
) -> Phase | None:
    """The phase that follows: train, prune level by level, recover.

    A level is retrained for one epoch and kept if its validation Dice is at least `1 - tolerance`
    of the reference; otherwise it is tried again, at most `attempts` times, and then taken back.

    Args:
        history: the phases of this step that have ended.
        tolerance: share of the reference that a level may cost.
        attempts: epochs of retraining that a level may take.

    Returns:
        The next phase; None after the recovery.

    Raises:
        TrainingError: no validation case holds a structure of this step.

    Source: the released code of Ji et al. (ICCV 2023). Differs: the recovery is as long as the
    training (theirs: 50 epochs of 1,000); every validation case counts (theirs: those between the
    0.5th and the 99.5th percentile).
    """
    if not history:
        return Phase(validations=REFERENCE_VALIDATIONS)
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
    level, attempt = prune_level(last.phase)
    if last.validation[-1] >= (1 - tolerance) * before:
        level, attempt = level + 1, 0
        return _attempt(level, 0) if level < len(SPARSITIES) else Phase(name=RECOVER)
    if attempt + 1 < attempts:
        return _attempt(level, attempt + 1)
    return Phase(name=ROLLED_BACK)


def _attempt(level: int, attempt: int) -> Phase:
    return Phase(name=f"prune {level}.{attempt}", epochs=1, constant=True, validations=1)


def prune_level(phase: Phase) -> tuple[int, int]:
    """(level, attempt), both from 0, of a pruning phase: its name is `prune LEVEL.ATTEMPT`."""
    level, attempt = phase.name.removeprefix("prune ").split(".")
    return int(level), int(attempt)


def enter_phase(phase: Phase, newest: Sequence[nn.Module], memory: Memory) -> None:
    """Bring a decoder, its output layer and memory to where the phase starts.

    From the first pruning on these two alone may be trained (`pruning_has_begun`): what is not
    stored here could not be taken back.

    Args:
        phase: training, a level's attempt, or the recovery.
        newest: the decoder, then its output layer; changed in place.
        memory: masks, stored weights and average; changed in place.
    """
    decoder = newest[0]
    if phase.name != "train":
        memory[PRUNING_BEGUN] = 1
    if phase.name.startswith("prune "):
        level, attempt = prune_level(phase)
        if attempt == 0:
            for i, part in enumerate(newest):
                _write(memory, f"prune/stored/{i}/", part.state_dict())
            masks = current_masks(memory)
            _write(memory, "prune/before/", masks)
            _write(
                memory,
                "prune/mask/",
                magnitude_masks(decoder, masks, steps_of(SPARSITIES)[level]),
            )
        restore_weights(newest, memory)  # survivors keep their weights
    elif phase.name == ROLLED_BACK:
        restore_weights(newest, memory)
        masks = _read(memory, "prune/before/")
        for key in [k for k in memory if k.startswith("prune/mask/")]:
            del memory[key]
        _write(memory, "prune/mask/", masks)
    apply_masks(decoder, current_masks(memory))
    memory["ema/updates"] = 0


def restore_weights(newest: Sequence[nn.Module], memory: Memory) -> None:
    """Give decoder and output layer the weights that they had before this level's pruning."""
    for i, part in enumerate(newest):
        part.load_state_dict(_read(memory, f"prune/stored/{i}/"))


def most_pruned_weights(decoders: Iterable[nn.Module]) -> int:
    """Number of weights that are zero when every decoder has passed every level."""
    sizes = [sum(w.numel() for w in prunable(d).values()) for d in decoders]
    return sum(n - left_after(n, SPARSITIES) for n in sizes)


def pruning_has_begun(memory: Memory) -> bool:
    """Whether pruning has begun in this step."""
    return PRUNING_BEGUN in memory


def current_masks(memory: Memory) -> Masks:
    """Name of a weight → bool mask of the current level, False where pruned; {} before pruning."""
    return _read(memory, "prune/mask/")


def finish_step(model: GrowingDecoders, memory: Memory) -> None:
    """After a step: averages become the weights of `model`, and memory of this module is empty."""
    _load_averages(model, memory)
    for key in [k for k in memory if k.startswith(("prune/", "ema/"))]:
        del memory[key]


def update_ema(parts: Sequence[nn.Module], memory: Memory, number: int, *, decay: float) -> None:
    """Move the average of a decoder after an update; the first updates of a phase weigh more.

    Args:
        parts: the decoder, then its output layer.
        memory: the averages; changed in place.
        number: of the decoder, from 1.
        decay: weight of the average so far, reached as updates go by: update n, from 0, has
            min(decay, (1 + n) / (10 + n)), the first 0.
    """
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


def ema_model(model: GrowingDecoders, memory: Memory) -> GrowingDecoders:
    """A copy of `model` in which every decoder with an average is that average."""
    copied = copy.deepcopy(model)
    _load_averages(copied, memory)
    return copied


def _load_averages(model: GrowingDecoders, memory: Memory) -> None:
    for number, parts in enumerate(zip(model.decoders, model.heads, strict=True), 1):
        for i, part in enumerate(parts):
            if average := _read(memory, f"ema/{number}/{i}/"):
                part.load_state_dict(average)


def _read(memory: Memory, prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in memory.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }


def _write(memory: Memory, prefix: str, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        memory[prefix + name] = value.detach().clone()


# --------------------------------------------------------------------------------------------------
# Pruning by magnitude: which weights of a module are removed, how many are left.


def steps_of(cumulative: Sequence[float]) -> list[float]:
    """Cumulative percentages → fraction of the remaining weights that each step removes.

    `1 - (1 - p_i) / (1 - p_(i-1))`. Source: the released code of Ji et al.
    """
    left = [1.0, *(1 - p / 100 for p in cumulative)]
    return [1 - b / a for a, b in itertools.pairwise(left)]


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """Name → weight of every convolution and transposed convolution; no bias, no normalization."""
    return {
        f"{name}.weight": part.weight
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d)
    }


def magnitude_masks(module: nn.Module, before: Mapping[str, Tensor], fraction: float) -> Masks:
    """Masks without the smallest `fraction` of the weights that `before` left, over all layers.

    Args:
        module: its prunable weights are compared by absolute value.
        before: name → bool mask; a name that is missing is whole.
        fraction: share of the remaining weights to remove, rounded to a whole number of them.

    Returns:
        Name → bool mask for every prunable weight.
    """
    weights = prunable(module)
    masks = {
        name: before.get(name, torch.ones_like(weight, dtype=torch.bool)).to(weight.device)
        for name, weight in weights.items()
    }
    values = torch.cat([weight.detach().abs()[masks[name]] for name, weight in weights.items()])
    count = round(fraction * values.numel())
    if count == 0:
        return {name: mask.clone() for name, mask in masks.items()}
    pruned = torch.zeros_like(values, dtype=torch.bool)
    pruned[values.argsort(stable=True)[:count]] = True
    smaller: Masks = {}
    start = 0
    for name, mask in masks.items():
        stop = start + int(mask.sum())
        smaller[name] = mask.clone()
        smaller[name][mask] = ~pruned[start:stop]
        start = stop
    return smaller


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights to zero, in place."""
    with torch.no_grad():
        for name, weight in prunable(module).items():
            if name in masks:
                weight.mul_(masks[name].to(weight.device))


def left_after(weights: int, percentages: Sequence[float]) -> int:
    """How many of so many weights are left when every pruning step is taken."""
    for fraction in steps_of(percentages):
        weights -= round(fraction * weights)
    return weights
