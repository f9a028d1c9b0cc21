"""Training monitors: gradient norms, warm-up, structures never sampled, constant labels.

Nothing here changes a number of a run. A monitor stops it with an error, or
warns; a warning is an event of `events.jsonl`, stands in `run.json`, and is shown at the end. The
monitors of training see the events of the step alone, so a resumed step is monitored as if it had
never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.data.volume import Volume
from clbench.errors import DataError, DivergedError
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import Lesson, Phase

Event = dict[str, Any]
WINDOW = 50
"""Ordinary gradient norms remembered; judged from the 20th on."""
EXPLODES = 100.0
"""A norm so many times the median of those is no ordinary one: the first of a phase warns."""
IN_A_ROW = 10
"""So many of them without an ordinary one between stop a run that does not clip."""
SKIPPED_IN_A_ROW = 20
"""So many updates that the fp16 loss scaler skips halve its scale from 65536 to below 1."""

FAINT = 1e-4
"""Where the penalties of a step never reach this share of the rest of the loss, it warns."""

# ---------------------------------------------------------------------------------- of an update


def check_gradient(norm: float, where: str, *, scaled: bool) -> None:
    """Refuse a gradient that is not finite before it reaches the weights.

    Args:
        norm: total norm over all trained parameters, before clipping.
        where: step, phase, epoch, iteration, cases.
        scaled: an fp16 loss scaler is at work: it skips such an update and lowers its scale, which
            is ordinary; `StepMonitor` counts those in a row.

    Raises:
        TrainingError: not finite, and nothing would skip the update.
    """
    if not scaled and not math.isfinite(norm):
        raise DivergedError(
            "the gradient is not finite, though the loss is",
            where=where,
            expected="a finite gradient norm",
            got=norm,
            next_step="look at the cases of this batch; lower the learning rate "
            "(--set train.lr=…), or compute in float32 (--set train.amp=off)",
        )


def count_positives(label: Tensor) -> Tensor:
    """Annotated positive voxels of each of the K structures in a batch.

    Args:
        label: (B, K, D, H, W).

    Returns:
        (K,) int64, on the device of the label: the loop transfers it with its other numbers.
    """
    if label.device.type != "cpu" or not label.numel():
        return (label == 1).sum(dim=(0, 2, 3, 4))
    # a channel at a time stays in the cache; numpy counts several times as fast as torch
    counts = [[np.count_nonzero(channel == 1) for channel in crop] for crop in label.numpy()]
    return torch.tensor(counts).sum(0)


def unfinished_warmup(lesson: Lesson, phase: Phase, train: TrainSettings) -> Event | None:
    """A warning where a phase ends before its learning rate has reached its peak; else None.

    Short trials do this on purpose, so it is no error.

    Args:
        lesson: the step.
        phase: one of its phases.
        train: the schedule.
    """
    epochs = train.epochs if phase.epochs is None else phase.epochs
    peak = train.warmup - 1  # the epoch, from 1, in which `learning_rate` is there
    if phase.constant or epochs >= peak:
        return None
    return warning(
        lesson.number,
        "unfinished warm-up",
        f"step {lesson.number}, phase {phase.name}: the warm-up of {train.warmup} epochs is cut "
        f"off after {epochs}, so the learning rate never reaches its peak, but {epochs / peak:.0%} "
        f"of it at the most; for the peak, shorten the warm-up (--set train.warmup={epochs} or "
        "less), or train longer (--set train.epochs=…)",
    )


class StepMonitor:
    """Monitors the updates of one step.

    Args:
        lesson: the step.
        clips: whether the gradient norm is clipped; then an exploding one warns and never stops.
        penalties: names of the loss terms that tie the new model to the old one.
        past: events of this step from before it was interrupted.
    """

    def __init__(
        self,
        lesson: Lesson,
        *,
        clips: bool,
        penalties: Sequence[str] = (),
        past: Iterable[Event] = (),
    ) -> None:
        self.lesson, self.clips, self.penalties = lesson, clips, penalties
        self._penalty_share = 0.0
        self.voxels = [0] * len(lesson.structures)
        self._phase: str | None = None
        for event in past:
            self.see(event)

    def see(self, event: Event) -> list[Event]:
        """Take in one event; return the warnings it gives rise to.

        Raises:
            TrainingError: gradients that go on exploding, or that are never finite.
        """
        if event["event"] != "update":
            return []
        if event["phase"] != self._phase:
            self._phase = event["phase"]
            self._usual: deque[float] = deque(maxlen=WINDOW)
            self._high = self._skipped = 0
            self._warned = False
        self.voxels = [a + b for a, b in zip(self.voxels, event["voxels"], strict=True)]
        if self.penalties:
            penalty = sum(event["terms"].get(name, 0.0) for name in self.penalties)
            rest = max(event["loss"] - penalty, 1e-12)
            self._penalty_share = max(self._penalty_share, penalty / rest)
        return self._gradient(float(event["grad_norm"]), event)

    def _gradient(self, norm: float, event: Event) -> list[Event]:
        where = (
            f"step {event['step']}, phase {event['phase']}, epoch {event['epoch']}, "
            f"iteration {event['iteration']}, cases {', '.join(event['cases'])}"
        )
        if not math.isfinite(norm):
            self._skipped += 1
            if self._skipped >= SKIPPED_IN_A_ROW:
                raise DivergedError(
                    f"the gradient was not finite in {self._skipped} updates in a row",
                    where=where,
                    expected="a finite gradient once the fp16 loss scale has come down",
                    got=norm,
                    next_step="compute in bfloat16 or float32 (--set train.amp=bf16, or off), or "
                    "lower the learning rate (--set train.lr=…)",
                )
            return []
        self._skipped = 0
        usual = median(self._usual) if len(self._usual) >= 20 else 0.0
        if not usual or norm <= EXPLODES * usual:
            self._usual.append(norm)
            self._high = 0
            return []
        self._high += 1
        advice = (
            f"lower the learning rate (--set train.lr=…), clip (--set train.clip_norm="
            f"{4 * usual:.2g}), or look at these cases"
        )
        if self._high >= IN_A_ROW and not self.clips:
            raise DivergedError(
                f"the gradient explodes: {self._high} updates in a row",
                where=where,
                expected=f"a norm near {usual:.3g}, the median of the last {len(self._usual)} "
                "ordinary ones",
                got=f"{norm:.3g}",
                next_step=advice,
            )
        if self._warned:
            return []
        self._warned = True
        return [
            warning(
                event["step"],
                "exploding gradient",
                f"{where}: gradient norm {norm:.3g}, where {usual:.3g} is usual; {advice}",
            )
        ]

    def end(self, volumes: Iterable[Volume]) -> list[Event]:
        """Warnings once the step is taught: structures never shown, and penalties next to nothing.

        Args:
            volumes: what the loop cuts crops from; not what a session alone draws, which is not
                counted here.
        """
        held = set(self.lesson.taught)
        for volume in volumes:
            held |= {n for n, (inside, _) in annotated_voxels(volume).items() if inside}
        never = [
            warning(
                self.lesson.number,
                "never sampled",
                f"step {self.lesson.number}: no training crop showed a voxel of {name}; train "
                "longer, on larger patches (--set data.patch_vox=…), or with crops centered by "
                "class (--set data.sampling=class_ratio)",
            )
            for name, voxels in zip(self.lesson.structures, self.voxels, strict=True)
            if name in held and not voxels
        ]
        return [*never, *self._faint_penalty()]

    def _faint_penalty(self) -> list[Event]:
        """A warning where what ties to the past was far below the rest of the loss throughout."""
        if self.lesson.number == 1 or not self.penalties or self._penalty_share >= FAINT:
            return []
        return [
            warning(
                self.lesson.number,
                "faint penalty",
                f"step {self.lesson.number}: the terms that hold on to the past "
                f"({', '.join(self.penalties)}) were at the most {self._penalty_share:.1e} times "
                "the rest of the loss; where the run forgets as finetune does, raise their weight "
                "(--set strategy.…); where it learns nothing new, lower it",
            )
        ]


def warning(step: int, kind: str, message: str) -> Event:
    """A warning as an event.

    Args:
        step: 1-based step.
        kind: short name to filter by.
        message: what happened, as a sentence.
    """
    return {"event": "warning", "step": step, "kind": kind, "message": message}


# ------------------------------------------------------------------------------ of the training set


def annotated_voxels(volume: Volume) -> dict[str, tuple[int, int]]:
    """Annotated structure → (voxels inside it, all voxels) of one case."""
    size = int(volume.bits.size)
    return {
        name: (sum(n for pattern, n in volume.counts.items() if pattern >> i & 1), size)
        for i, name in enumerate(volume.names)
        if name in volume.annotated
    }


def _constant(
    structures: Sequence[str], volumes: Sequence[Volume]
) -> Iterator[tuple[str, int, str]]:
    """(structure, its one label value, where) of those annotated without any contrast."""
    counted = [(volume.source, annotated_voxels(volume)) for volume in volumes]
    for name in structures:
        held = [(source, *voxels[name]) for source, voxels in counted if name in voxels]
        inside = sum(hit for _, hit, _ in held)
        if held and inside in (0, sum(size for *_, size in held)):
            sources = ", ".join(sorted({source for source, *_ in held}))
            yield name, int(inside > 0), f"{name} in {sources}, {len(held)} training cases"


def lost_in_resampling(name: str, volumes: Sequence[Volume]) -> tuple[str, str] | None:
    """What a structure lost between files and model grid, and what keeps it; None: nothing.

    Args:
        name: a structure of which no volume holds a voxel.
        volumes: cases on the model grid.
    """
    losses = [v.lost_in_resampling(name) for v in volumes if name in v.annotated]
    lost = [loss for loss in losses if loss is not None]
    if not lost:
        return None
    spacing = [min(loss.kept_at_mm[axis] for loss in lost) for axis in range(3)]
    held = (
        f"{sum(loss.vox for loss in lost)} voxels inside in the files of {len(lost)} case(s), none "
        "after resampling to the course's spacing"
    )
    advice = (
        f"resample less coarsely: --set data.spacing_mm=[{','.join(f'{s:.4g}' for s in spacing)}] "
        "keeps a voxel of it in each of these cases"
    )
    return held, advice


def refuse_constant_labels(lesson: Lesson, volumes: Sequence[Volume]) -> None:
    """Refuse to teach a structure whose label says the same in every annotated voxel.

    One that a single training case does not hold is no fault of the labels, and only warned of.

    Args:
        lesson: the step.
        volumes: its own training cases, as it shows them.

    Raises:
        DataError: names the structure and its source.
    """
    for name, value, where in _constant(lesson.taught, volumes):
        if len(volumes) == 1 and not value:
            continue  # one patient may lack an organ: see `constant_labels`
        if not value and (lost := lost_in_resampling(name, volumes)):
            raise DataError(
                f"{name} is lost in resampling: nothing is left to learn",
                where=f"step {lesson.number}, {where}",
                expected="voxels of it on the grid of the model",
                got=lost[0],
                next_step=lost[1],
            )
        raise DataError(
            f"the label of {name} is {value} in every annotated voxel: nothing to learn",
            where=f"step {lesson.number}, {where}",
            expected="voxels inside and outside the structure",
            got=f"{'all' if value else 'no'} voxels inside",
            next_step="look at its label value or mask (`clbench data check PATH`), choose other "
            "training cases (--split), or take it out of `learns` or `again`",
        )


def refuse_lost_validation(lesson: Lesson, volumes: Sequence[Volume]) -> None:
    """Refuse validation cases that hold a structure in their files, and none on the model grid.

    Args:
        lesson: the step; none of its structures has a voxel in any of the volumes.
        volumes: its validation cases.

    Raises:
        DataError: names the structure and a spacing that keeps it.
    """
    for name in lesson.taught:
        if lost := lost_in_resampling(name, volumes):
            raise DataError(
                f"{name} is lost in resampling: nothing is left to validate on",
                where=f"step {lesson.number}, {volumes[0].source}, {len(volumes)} validation cases",
                expected="voxels of it on the grid of the model",
                got=lost[0],
                next_step=f"{lost[1]}; or name other validation cases with --split",
            )


def constant_labels(lesson: Lesson, volumes: Sequence[Volume]) -> list[Event]:
    """Warnings about structures the training set would unlearn, or its one case cannot teach.

    Args:
        lesson: the step.
        volumes: every case that may be drawn, as the step shows it.
    """
    events = []
    for name, value, where in _constant((*lesson.old, *lesson.learns), volumes):
        if name in lesson.old:
            consequence = (
                f"the label is {value} in every annotated voxel, so the step may unlearn the "
                "structure; look at its label value (`clbench data check PATH`), or declare that "
                "these cases do not annotate it ([[source.partial]])"
            )
        elif len(volumes) == 1 and not value:
            consequence = (
                "the one training case does not hold the structure, so nothing teaches it; name "
                "more training cases (--split)"
            )
        else:
            continue
        lost = None if value else lost_in_resampling(name, volumes)
        said = "; ".join(lost) if lost else consequence
        message = f"step {lesson.number}, {where}: {said}"
        events.append(warning(lesson.number, "constant label", message))
    return events


def lost_in_some_cases(
    lesson: Lesson, volumes: Sequence[Volume], holds: Callable[[Volume], Container[str]]
) -> list[Event]:
    """A warning per training case that, after resampling, teaches that a structure is absent.

    Args:
        lesson: the step.
        volumes: its own training cases, as it shows them; some of them hold each structure.
        holds: the structures of which the files of a case hold a voxel.
    """
    warnings = []
    for volume in volumes:
        here = annotated_voxels(volume)
        for name in lesson.taught:
            if name not in here or here[name][0] or name not in holds(volume):
                continue
            if lost := lost_in_resampling(name, [volume]):
                said = f"step {lesson.number}, {volume.source} case {volume.case}, {name}: "
                warnings.append(
                    warning(lesson.number, "lost in resampling", said + "; ".join(lost))
                )
    return warnings


def warnings_of(events: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The warnings among events, as `run.json` keeps them."""
    return [
        {k: e[k] for k in ("step", "kind", "message")} for e in events if e["event"] == "warning"
    ]
