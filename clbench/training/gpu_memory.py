"""GPU out of memory: the error names the largest setting that fits, found by trying.

How much one update needs is not known before it has been made: activations,
loss terms and optimizer differ with network, method and card. So after the failure, smaller
settings are tried in a stated order, on this GPU and with this step's model, until one fits.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clbench.errors import ClbenchError, SettingError
from clbench.nets.output import Output
from clbench.spec.settings import Profile
from clbench.strategy.contract import Batch, Lesson, Memory, Strategy

Change = dict[str, Any]
"""Dotted name → value, as for `--set`."""
Attempt = Callable[[Mapping[str, Any]], None]
"""Does with a change what ran out of memory, or something as large; raises what it meets."""
SMALLEST = 64
"""No side of a patch is taken below it."""


@contextmanager
def noted(where: str) -> Iterator[None]:
    """Let an error of torch carry where it happened, for `enough_memory` to say."""
    try:
        yield
    except RuntimeError as err:
        err.add_note(where)
        raise


@contextmanager
def enough_memory(
    doing: str,
    profile: Profile,
    patch_vox: Sequence[int],
    *,
    teaching: bool = True,
    attempt: Attempt | None = None,
) -> Iterator[None]:
    """Turn a GPU that is out of memory into an error that names a setting that fits.

    Args:
        doing: what goes on, with its step.
        profile: the settings in force.
        patch_vox: training patch and sliding window.
        teaching: whether batch and precision matter, or windows.
        attempt: tries a setting; None: the error names one that was not tried.

    Raises:
        SettingError: out of memory inside.
    """
    try:
        yield
    except RuntimeError as err:
        if not _is_out_of_memory(err):
            raise
        text = str(err)
        where = "; ".join([doing, *getattr(err, "__notes__", ())])
        traceback.clear_frames(err.__traceback__)  # they hold what the update had allocated
        raise SettingError(
            "the GPU is out of memory",
            where=where,
            expected=_in_use(profile, patch_vox),
            got=text.splitlines()[0] if text else type(err).__name__,
            next_step=f"{_advice(list(smaller(profile, patch_vox, teaching=teaching)), attempt)}; "
            "or free the GPU of other processes",
        ) from err


def smaller(
    profile: Profile, patch_vox: Sequence[int], *, teaching: bool = True
) -> Iterator[Change]:
    """Smaller settings, each with all changes before it.

    Windows and batch are halved, for what a forward pass holds grows in proportion to them; then
    mixed precision; then the longest sides of the patch go down to a multiple of 32 (what five
    halvings need), not below 64.

    Args:
        profile: the settings that did not fit.
        patch_vox: (D, H, W) of crops and windows, in voxels.
        teaching: halve the batch; else the windows at a time.
    """
    change: Change = {}
    name, count = (
        ("train.batch", profile.train.batch)
        if teaching
        else ("examine.windows", profile.examine.windows)
    )
    while count > 1:
        count //= 2
        change[name] = count
        yield dict(change)
    if teaching and profile.train.amp == "off":
        change["train.amp"] = "bf16"
        yield dict(change)
    patch = tuple(patch_vox)
    while max(patch) > SMALLEST:
        longest = max(SMALLEST, (max(patch) - 1) // 32 * 32)
        patch = tuple(min(n, longest) for n in patch)
        change["data.patch_vox"] = patch
        yield dict(change)


def try_update(
    strategy: Strategy,
    model: nn.Module,
    teacher: nn.Module | None,
    lesson: Lesson,
    memory: Memory,
    profile: Profile,
    patch_vox: Sequence[int],
    change: Mapping[str, Any],
) -> None:
    """One update with a changed batch, precision and patch, on empty crops; the model is spent.

    Args:
        strategy: gives the losses.
        model: on its device; its weights are of no use afterwards.
        teacher: the model of the step before, or None.
        lesson: the step: names and which are new.
        memory: the strategy's memory.
        profile: the settings as asked for.
        patch_vox: (D, H, W) of a crop as asked for, in voxels.
        change: dotted setting → smaller value, see `smaller`.
    """
    place = next(model.parameters()).device
    batch = change.get("train.batch", profile.train.batch)
    patch = change.get("data.patch_vox", tuple(patch_vox))
    amp = change.get("train.amp", profile.train.amp)
    crops = Batch(
        image=torch.zeros(batch, 1, *patch, device=place),
        label=torch.zeros(
            batch, len(lesson.structures), *patch, dtype=torch.uint8, device=place
        ),
        pseudo=None, structures=lesson.structures, new=lesson.new_flags, cases=("empty",) * batch,
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    kind = torch.float16 if amp == "fp16" else torch.bfloat16
    with torch.autocast(place.type, dtype=kind, enabled=amp != "off" and place.type == "cuda"):
        new: Output = model(crops.image)
        old: Output | None = None
        if teacher is not None:
            with torch.no_grad():
                old = teacher.to(place)(crops.image)
        terms = strategy.losses(crops, new, old, memory)
    sum(terms.values(), torch.zeros((), device=place)).backward()  # type: ignore[no-untyped-call]  # torch
    optimizer.step()


def try_windows(
    model: nn.Module, profile: Profile, patch_vox: Sequence[int], change: Mapping[str, Any]
) -> None:
    """One forward pass of the sliding window with fewer or smaller windows.

    Args:
        model: on its device.
        profile: the settings as asked for.
        patch_vox: (D, H, W) of a window as asked for, in voxels.
        change: dotted setting → smaller value, see `smaller`.
    """
    count = change.get("examine.windows", profile.examine.windows)
    patch = change.get("data.patch_vox", tuple(patch_vox))
    with torch.no_grad():
        model.eval()(torch.zeros(count, 1, *patch, device=next(model.parameters()).device))


def _advice(changes: Sequence[Change], attempt: Attempt | None) -> str:
    last = "take a smaller network (--set backbone.size=…), a GPU with more memory or --device cpu"
    if not changes:
        return last
    if attempt is None:
        return f"try {_words(changes[0])}"
    for change in changes:
        if _fits(attempt, change):
            return f"what fits, tried here: {_words(change)}"
    return f"nothing tried fits, down to {_words(changes[-1])}: {last}"


def _fits(attempt: Attempt, change: Change) -> bool:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        attempt(change)
    except ClbenchError:  # a patch this network cannot work on
        return False
    except RuntimeError as err:
        if not _is_out_of_memory(err):
            raise
        traceback.clear_frames(err.__traceback__)
        return False
    return True


def _is_out_of_memory(err: RuntimeError) -> bool:
    """`torch.OutOfMemoryError` is a RuntimeError; cuBLAS raises the plain one."""
    text = str(err)
    return (
        isinstance(err, torch.OutOfMemoryError)
        or "CUDA out of memory" in text
        or "ALLOC_FAILED" in text
    )


def _words(change: Change) -> str:
    return " ".join(
        f"--set {name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in change.items()
    )


def _in_use(profile: Profile, patch_vox: Sequence[int]) -> str:
    patch = "x".join(map(str, patch_vox))
    return (
        f"room for train.batch = {profile.train.batch}, data.patch_vox = {patch}, "
        f"train.amp = {profile.train.amp}, examine.windows = {profile.examine.windows}, "
        f"backbone.size = {profile.backbone.size}"
    )
