"""LoRA: a low-rank expert per step on a backbone that is frozen after step 1.

Step 1 trains everything. Each later step adds an expert, low-rank additions to the weights of the
backbone, and a head of its own; only these learn, on the annotation of the new structures alone.
Every structure is computed by the backbone with the expert of the step that learned it; no router
is needed, because structures, not images, choose the expert. Old logits stay equal to the bit for
images of equal shapes, so forgetting is 0 by construction. The cost: one pass per step learned.

Source: Hu et al., ICLR 2022 (LoRA: rank, alpha, initial A and B). One expert per step on a frozen
base: LoCo-PVT (arXiv 2410.04689), low-rank mixture of experts (arXiv 2406.13583). Differs: a 3-D
convolution is adapted by a convolution to `rank` channels and one of 1×1×1; the base is the network
of step 1, not a pre-trained one; biases, norms and position tables stay those of the base; nothing
is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from clbench.errors import SettingError
from clbench.nets.growing_decoders import one_winner
from clbench.nets.heads import Segmenter
from clbench.nets.low_rank import ExpertBackbone, Target
from clbench.nets.step_networks import StepHeads
from clbench.spec.settings import NotNegative
from clbench.strategies.parameter_isolation.new_structures import NewStructures
from clbench.strategy import Group, Kit, Lesson, Memory, Range, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Lora(NewStructures):
    """A frozen backbone, and per step a low-rank expert and heads of its own."""

    search_space: ClassVar[SearchSpace] = {
        "rank": Range(low=2, high=32, log=True, integer=True),
        "expert_lr": Range(low=0.1, high=100.0, log=True),
        "head_lr": Range(low=0.1, high=100.0, log=True),
    }
    rank: int = 8
    """Rank of every addition."""
    alpha: float = 16.0
    """An addition is multiplied by alpha / rank."""
    target: Target = "all"
    """Layers that an expert adapts."""
    expert_lr: NotNegative = 1.0
    """Factor on the learning rate of experts."""
    head_lr: NotNegative = 1.0
    """Factor on the learning rate of new heads from step 2 on."""
    exclusive: bool = False
    """Where experts disagree, the more probable structure has the voxel (old ones may lose it)."""

    def refuse_course(self, steps: Sequence[Lesson], kit: Kit) -> None:
        """Nor does an expert fit a network without such layers."""
        super().refuse_course(steps, kit)
        if any(step.number > 1 for step in steps):
            with kit.fresh(1, "trial"):
                trial: Any = kit.backbone()
                ExpertBackbone(trial).add_expert(
                    rank=self.rank, alpha=self.alpha, target=self.target
                )

    def __post_init__(self) -> None:
        for name, value, default in (("rank", self.rank, 8), ("alpha", self.alpha, 16)):
            if not value > 0:
                raise SettingError(
                    "an expert of this size adds nothing to the backbone",
                    where=f"strategy.{name}",
                    expected="a number above 0",
                    got=value,
                    next_step=f"--set strategy.{name}={default}",
                )

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more expert and head; nothing else changes."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built by `Finetune`
        if not isinstance(model.backbone, ExpertBackbone):
            base: Any = model.backbone
            model.backbone = ExpertBackbone(base)
            model.head = StepHeads(model.head, model.structures)
        assert isinstance(model.head, StepHeads)  # noqa: S101  # set together with the backbone
        with kit.fresh(step.number, "grow"):
            model.backbone.add_expert(rank=self.rank, alpha=self.alpha, target=self.target)
            head: Any = self.head(model.backbone)
            for name, vector in zip(step.learns, self.vectors(kit, step), strict=True):
                head.add(name, vector)
                if kit.prior is not None:
                    head.start(name, kit.prior)
        model.head.append(head, step.learns)
        model.structures = (*model.structures, *step.learns)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """All in step 1, then the newest expert and its head."""
        if step.number == 1:
            return super().groups(model, step, memory)
        if not step.learns:
            return []
        assert isinstance(model, Segmenter)  # noqa: S101  # built by `Finetune`
        assert isinstance(model.backbone, ExpertBackbone)  # noqa: S101  # grown above
        assert isinstance(model.head, StepHeads)  # noqa: S101  # grown above
        expert = list(model.backbone.experts[-1].parameters())
        head = Group(parameters=list(model.head.steps[-1].parameters()), lr=self.head_lr)
        return [Group(parameters=expert, lr=self.expert_lr), head]

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, K, D, H, W) logits → probabilities."""
        return one_winner(logits.sigmoid(), structures) if self.exclusive else logits.sigmoid()
