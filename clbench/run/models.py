"""The models of a planned course: blank, as a checkpoint holds them, and ready to predict.

Whoever teaches, examines or looks on gets its model here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from clbench.data.nifti import spacing_of
from clbench.data.volume import Volume
from clbench.errors import StoreError
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.run.plan import Plan
from clbench.store import checkpoint
from clbench.strategy.contract import Lesson, Memory, Strategy
from clbench.training.gpu_memory import enough_memory


def blank(plan: Plan, strategy: Strategy, lesson: Lesson) -> nn.Module:
    """A model with the shape it has in `lesson`, fresh weights.

    Args:
        plan: the run: kit and steps.
        strategy: builds the model and grows it.
        lesson: the step whose shape is wanted.
    """
    model = strategy.build(plan.kit, plan.lesson(1))
    for number in range(2, lesson.number + 1):
        if plan.benchmark.steps[number - 1].learns:
            strategy.grow(model, plan.kit, plan.lesson(number))
    return model


def loaded(plan: Plan, strategy: Strategy, lesson: Lesson, path: Path) -> tuple[nn.Module, Memory]:
    """A new model and memory as a checkpoint holds them.

    Args:
        plan: the run: kit, benchmark and steps.
        strategy: builds the model and grows it.
        lesson: the step after which the checkpoint was saved.
        path: the checkpoint.

    Raises:
        StoreError: it is missing or damaged, or was made for another step.
    """
    content = checkpoint.load(path)
    expected = (lesson.number, list(lesson.structures))
    got = (content["step"], content["structures"])
    if got != expected:
        raise StoreError(
            "a checkpoint of another step",
            where=path,
            expected="step {}: {}".format(*expected),
            got="step {}: {}".format(*got),
            next_step="run again with --fresh",
        )
    model = blank(plan, strategy, lesson)
    model.load_state_dict(content["model"])
    return model.to(plan.device), content["memory"]


def save_step(
    plan: Plan, number: int, path: Path, *, model: Mapping[str, Any], memory: Memory, strategy: str
) -> None:
    """Write the checkpoint of a step, as `loaded` reads it.

    Args:
        plan: the run.
        number: 1-based step.
        path: the checkpoint.
        model: state dict.
        memory: of the strategy.
        strategy: class that taught it.

    Raises:
        StoreError: the disk is full, or the folder cannot be written.
    """
    content = {
        "model": model,
        "memory": memory,
        "step": number,
        "structures": list(plan.benchmark.structures(number)),
        "bench": plan.benchmark.name,
        "bench_version": plan.benchmark.version,
        "strategy": strategy,
    }
    checkpoint.save(path, content)


def predictor(
    plan: Plan, strategy: Strategy, model: nn.Module, structures: tuple[str, ...], memory: Memory
) -> VolumePredictor:
    """`model`, answering for whole volumes as the profile examines.

    Args:
        plan: the run: window size, overlap and device.
        strategy: decodes outputs, and may name rows to leave out.
        model: a trained model.
        structures: names of its output channels, in order.
        memory: the strategy's memory after the step.
    """

    def ranges(volume: Volume) -> Mapping[str, tuple[int, int]]:
        x, y, z = map(float, spacing_of(volume.affine))
        return strategy.axial_ranges(volume.image, (x, y, z), structures, memory)

    return VolumePredictor(
        model,
        strategy.decode,
        structures,
        patch_vox=plan.catalog.preprocessing.patch_vox,
        overlap=plan.profile.examine.overlap,
        windows=plan.profile.examine.windows,
        device=plan.device,
        ranges=ranges,
    )


def windows_fit(plan: Plan, doing: str) -> AbstractContextManager[None]:
    """An error where sliding windows need more memory than there is; `doing` stands in it."""
    patch = plan.catalog.preprocessing.patch_vox
    return enough_memory(doing, plan.profile, patch, teaching=False)
