"""Network and loss for Avalanche's strategies: outputs grow, unlabelled voxels are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.avalanche.lazy_import import load
from clbench.avalanche.scenario_streams import Scenario
from clbench.errors import SettingError, TrainingError
from clbench.nets.heads import ConvHead, Segmenter, UniversalHead
from clbench.spec.settings import TrainSettings
from clbench.strategy.contract import Batch, Group, Kit, Lesson
from clbench.strategy.losses import dice_bce, targets
from clbench.training.loop import adamw, add_terms, rates

_DynamicModule: Any = load("avalanche.models.dynamic_modules").DynamicModule

Head = Literal["universal", "conv"]


def model(scenario: Scenario, *, head: Head = "universal") -> Network:
    """The network of a course as it is before the first step, with its profile's backbone.

    With the universal head it is, to the bit, the network that `clbench run` starts from with the
    same seed, so weights go both ways.

    Args:
        scenario: the course.
        head: `universal` generates each structure's output layer from text and image; `conv` is a
            plain output layer.

    Raises:
        SettingError: another head.
    """
    if head not in ("universal", "conv"):
        raise SettingError(
            "there is no such head", where="head", expected="universal, conv", got=head
        )
    plan = scenario.plan
    lessons = tuple(plan.lesson(n) for n in range(1, scenario.n_experiences + 1))
    train = plan.profile.train
    return Network(_Blueprint(kit=plan.kit, lessons=lessons, head=head, train=train))


@dataclass(frozen=True, kw_only=True)
class _Blueprint:
    """How the network grows. A copy of a network shares it: there is nothing in it to change."""

    kit: Kit
    lessons: tuple[Lesson, ...]
    head: Head
    train: TrainSettings

    def __deepcopy__(self, memo: Mapping[int, Any]) -> _Blueprint:
        return self


class Network(_DynamicModule):  # type: ignore[misc]  # Avalanche has no types
    """A segmentation network that gets an output for each structure when its experience begins.

    Growth changes no old output, draws nothing from the global random state, and happens in
    training alone: Avalanche adapts a model before it evaluates an experience too, also one that
    was never taught.
    """

    def __init__(self, blueprint: _Blueprint) -> None:
        super().__init__()
        self._blueprint, self._step = blueprint, 1
        first, kit = blueprint.lessons[0], blueprint.kit
        with kit.fresh(first.number, "model"):
            backbone: Any = kit.backbone()
            head = (
                UniversalHead(
                    backbone.final_channels,
                    backbone.bottleneck_channels,
                    hidden=backbone.controller_width,
                )
                if blueprint.head == "universal"
                else ConvHead(backbone.final_channels, background=False)
            )
            self.segmenter = Segmenter(backbone, head)
            self.segmenter.add(first.learns, kit.encoding(first.learns), kit.prior)

    @property
    def structures(self) -> tuple[str, ...]:
        """Structures of the output channels."""
        return self.segmenter.structures

    def grow(self, step: int) -> None:
        """Add outputs until those of 1-based `step` are there; to load weights of that step.

        Raises:
            SettingError: the course has no such step.
        """
        if not 1 <= step <= len(self._blueprint.lessons):
            raise SettingError(
                "the course has no such step",
                where="grow",
                expected=f"1 to {len(self._blueprint.lessons)}",
                got=step,
            )
        kit = self._blueprint.kit
        for lesson in self._blueprint.lessons[self._step : step]:
            with kit.fresh(lesson.number, "grow"):
                self.segmenter.add(lesson.learns, kit.encoding(lesson.learns), kit.prior)
            self._step = lesson.number

    def adaptation(self, experience: Any) -> None:
        """Grow for the classes of an experience, while training."""
        if self.training:
            last = max(experience.classes_in_this_experience)
            steps = self._blueprint.lessons
            self.grow(next(s.number for s in steps if last < len(s.structures)))

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW as `clbench run` has it, at the profile's peak rate. Avalanche adds what grows."""
        train = self._blueprint.train
        every = Group(parameters=list(self.parameters()))
        groups = rates(self, [every], train.generator_lr)
        scaled = [{"params": g["params"], "lr": train.lr * g["scale"]} for g in groups]
        return adamw(scaled, train, next(self.parameters()).device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, *patch) → (B, structures so far, *patch) logits."""
        logits: Tensor = self.segmenter(x).logits
        return logits


class Criterion(nn.Module):
    """Dice plus binary cross-entropy over the annotated voxels of the structures taught so far.

    Args:
        unlabelled: what a voxel is for a structure that its case does not annotate: `ignore` leaves
            it out of the loss; `background` is what fine-tuning does without thinking of the past.

    Source: Liu et al., Medical Image Analysis 2024, eq. 3 and 4; see `clbench.strategy.losses`.
    Differs: from the strategy `finetune` in that `background` also holds for a structure of this
        very step, since a batch does not say which structures are new.
    """

    def __init__(self, unlabelled: Literal["ignore", "background"] = "ignore") -> None:
        super().__init__()
        if unlabelled not in ("ignore", "background"):
            raise SettingError(
                "there is no such treatment of unlabelled voxels",
                where="unlabelled",
                expected="ignore, background",
                got=unlabelled,
            )
        self.unlabelled = unlabelled

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (B, K, *patch); K structures, those the model answers for.
            y: (B, all structures of the course, *patch) uint8: 0, 1, 255 = not annotated.

        Raises:
            TrainingError: logits and labels that do not fit, or a loss that is not finite.
        """
        count = logits.shape[1]
        if count > y.shape[1] or logits.shape[2:] != y.shape[2:]:
            raise TrainingError(
                "the model's answer and the labels do not fit",
                where="clbench.avalanche.Criterion",
                expected=f"(B, at most {y.shape[1]}, {', '.join(map(str, y.shape[2:]))})",
                got=tuple(logits.shape),
            )
        batch = Batch(
            image=logits,  # not read
            label=y[:, :count],
            pseudo=None,
            structures=tuple(str(c) for c in range(count)),
            new=(False,) * count,
            cases=(),
        )
        target, known = targets(batch, unlabelled=self.unlabelled)
        return add_terms(dice_bce(logits, target, known), "Avalanche")


criterion = Criterion()
"""The loss that leaves out what nobody annotated."""
