"""The lottery-ticket schedule and the running average of a decoder, as phases and memory.

Everything it knows lies in `Memory`, so a stopped run goes on from there:
`prune/mask/…`, `prune/before/…` (the masks of the level before), `prune/stored/…` (the weights
before this level's pruning), `ema/<decoder>/…`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clbench.errors import TrainingError
from clbench.nets.growing_decoders import GrowingDecoders
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


# --------------------------------------------------------------------------------------------------
# Pruning by magnitude: which weights of a module go, how many are left.
# Masks are plain bool tensors by parameter name, so they fit in a checkpoint;
# a pruned weight is a real zero in the state dict.


Masks = dict[str, Tensor]
SPARSITIES = (80, 82, 84, 86, 88, 90, 92, 94, 96, 98, 99, 99.2, 99.4, 99.6, 99.8)
"""Cumulative percentages; source: the released code of Ji et al. (ICCV 2023)."""


def steps_of(cumulative: Sequence[float]) -> list[float]:
    """Cumulative percentages → fraction of the remaining weights that each step removes.

    `1 - (1 - p_i) / (1 - p_(i-1))`. Source: the released code of Ji et al.
    """
    left = [1.0, *(1 - p / 100 for p in cumulative)]
    return [1 - b / a for a, b in itertools.pairwise(left)]


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """Name → weight of every convolution and transposed convolution; no bias, no normalization."""
    kinds: Any = (nn.Conv3d, nn.ConvTranspose3d)
    return {
        f"{name}.weight": part.weight for name, part in module.named_modules()
        if isinstance(part, kinds)
    }  # fmt: skip


def magnitude_masks(module: nn.Module, before: Mapping[str, Tensor], fraction: float) -> Masks:
    """Masks without the smallest `fraction` of the weights that `before` left, over all layers.

    Args:
        module: its prunable weights are compared by absolute value.
        before: name → bool mask; a name that is missing is whole.
        fraction: share of the remaining weights to remove, rounded to a whole number of them.
    """
    weights = prunable(module)
    kept = {
        n: before.get(n, torch.ones_like(w, dtype=torch.bool)).to(w.device)
        for n, w in weights.items()
    }
    values = torch.cat([w.detach().abs()[kept[n]] for n, w in weights.items()])
    drop = round(fraction * values.numel())
    if drop == 0:
        return {n: m.clone() for n, m in kept.items()}
    gone = torch.zeros_like(values, dtype=torch.bool)
    gone[values.argsort(stable=True)[:drop]] = True
    found, at = {}, 0
    for n, mask in kept.items():
        count = int(mask.sum())
        left = mask.clone()
        left[mask] = ~gone[at : at + count]
        found[n], at = left, at + count
    return found


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
