"""From loaded crops to batches on the device: loader workers, copies ahead of time, augmentation.

On a CPU crops are cut, augmented and used where they lie. For a GPU the loader sends Hounsfield
units and bit patterns as the volume holds them (some 3 bytes per voxel, whatever the number of
structures) in pinned memory; they are copied while the update before is computed, and windowed,
shifted, turned and unpacked there, a batch at a time, by the draws that the host made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from clbench.data.labels import UNKNOWN
from clbench.reproducibility import cores
from clbench.strategy.contract import Batch, Lesson

MOST_WORKERS = 4
"""Loader processes of one GPU, at most; chosen, not measured: no GPU was at hand."""


def loader_workers(asked: int | None, device: torch.device, processes: int = 1) -> int:
    """Loader processes; their number changes no number of a run.

    Args:
        asked: as the user says; None: by the machine. On a CPU none, for the network has all cores;
            for a GPU up to `MOST_WORKERS` of the cores that this process of the run has.
        device: where the network computes.
        processes: of the run, which share the machine's cores.
    """
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0
    return max(1, min(MOST_WORKERS, cores() // processes - 1))


def to_batch(raw: dict[str, Any], lesson: Lesson, device: torch.device) -> Batch:
    """Loader output → `Batch` on the device.

    Args:
        raw: what `clbench.training.batches.collate` made of crops, augmented or not.
        lesson: the step: names and which are new.
        device: where to.
    """

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    if "hu" in raw:
        image, label = augmented(raw, device)
    else:
        image, label = there(raw["image"]), there(raw["label"])
    return Batch(
        image=image.float(),
        label=label,
        pseudo=None if raw["pseudo"] is None else there(raw["pseudo"]),
        structures=lesson.structures,
        new=lesson.new_flags,
        again=lesson.again,
        cases=tuple(raw["cases"]),  # pinning makes a list of it
    )


def augmented(raw: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and label of a batch of crops that were cut only, by the operations of `crop`.

    Each operation is one of IEEE arithmetic in float32 or a copy, so on a CPU the bits are those of
    `clbench.data.crops.crop`; a GPU may round a quotient otherwise, by 1e-7 of the window.

    Args:
        raw: `hu` (B, D, H, W) int16, `bits` (B, D, H, W) integers, `planes` (B, K) the bit of each
            structure or -1, `window` (B, 2) lower end and width in HU, `shift` (B,) in units of the
            window; `pad` and `turns`, per crop, as in `CropPlace`.
        device: where to compute.

    Returns:
        (B, 1, D, H, W) float32 and (B, K, D, H, W) uint8.
    """
    hu, bits, planes, window, shift = (
        raw[name].to(device, non_blocking=True)
        for name in ("hu", "bits", "planes", "window", "shift")
    )
    low, width = (each.view(-1, 1, 1, 1) for each in window.unbind(1))
    image = ((hu.float() - low) / width).clamp_(0, 1) + shift.view(-1, 1, 1, 1)
    label = torch.empty((*planes.shape, *bits.shape[1:]), dtype=torch.uint8, device=device)
    for k in range(planes.shape[1]):
        plane = planes[:, k].view(-1, 1, 1, 1)
        inside = (bits >> plane.clamp(min=0).to(bits.dtype)) & 1
        label[:, k] = torch.where(plane < 0, UNKNOWN, inside)
    for i, (pad, turns) in enumerate(zip(raw["pad"], raw["turns"], strict=True)):
        for axis, (before, after) in enumerate(pad):
            size = label.shape[2 + axis]
            label[i].narrow(1 + axis, 0, before).fill_(UNKNOWN)
            label[i].narrow(1 + axis, size - after, after).fill_(UNKNOWN)
        if turns:
            image[i] = torch.rot90(image[i], turns, (0, 1))
            label[i] = torch.rot90(label[i], turns, (1, 2))
    return image.unsqueeze(1), label


def batches_on_device(
    loaded: Iterable[dict[str, Any]], lesson: Lesson, device: torch.device
) -> Iterator[Batch]:
    """The loader's batches on the device; to a GPU each is copied ahead.

    Args:
        loaded: what the loader gives.
        lesson: the step.
        device: where to.
    """

    def move(raw: dict[str, Any]) -> Batch:
        return to_batch(raw, lesson, device)

    return map(move, loaded) if device.type == "cpu" else moved_ahead(loaded, move, device)


def moved_ahead(
    loaded: Iterable[dict[str, Any]], move: Callable[[dict[str, Any]], Batch], device: torch.device
) -> Iterator[Batch]:
    """Each batch is moved before the one before it is handed out, on a stream of its own.

    Args:
        loaded: what the loader gives.
        move: brings a batch to the device.
        device: its streams are used; those of a CPU do nothing.
    """
    streams = torch.get_device_module(device)
    side = streams.Stream()
    ahead: tuple[Batch, Any] | None = None
    for raw in loaded:
        with streams.stream(side):
            following = (move(raw), side.record_event())
        if ahead is not None:
            yield _ready(*ahead, streams.current_stream())
        ahead = following
    if ahead is not None:
        yield _ready(*ahead, streams.current_stream())


def _ready(batch: Batch, moved: Any, current: Any) -> Batch:
    """Let the computing stream wait for a batch, and its memory live until that has used it.

    Args:
        batch: on the device, or on its way there.
        moved: event behind its last operation.
        current: the stream that computes.
    """
    current.wait_event(moved)
    for tensor in (batch.image, batch.label, batch.pseudo):
        if tensor is not None and tensor.device.type != "cpu":
            tensor.record_stream(current)
    return batch
