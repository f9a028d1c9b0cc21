"""One specialist per step: a new network, trained on this step's structures and data alone.

The reference that tables of the field print as "organ-specific models". Each network has the full
budget of a step, so all steps together cost as many updates as any other method here; networks and
time of inference grow by a whole network per step. It bounds what each step can reach on its own
data, and forgets nothing: old networks are never touched.

Merge rule: every structure is answered by the network of the step that learned it first, and keeps
every voxel that its own sigmoid puts above 0.5 (a union: two structures may claim one voxel).
`exclusive=true`: of two structures that exclude each other only the more probable keeps the voxel;
probabilities of different networks are not calibrated against each other.

`starts_from` is declared as `previous` because the networks of earlier steps are kept and served;
the network that a step trains has fresh weights.

Source: "organ-specific models" of BSP (Boosting Stability and Plasticity, 2025), whose code trains
one network per data set. Differs: sigmoids, so that no two backgrounds have to be merged; the
Universal Model's head, as in `finetune` and `joint`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from clbench.nets.growing_decoders import one_winner
from clbench.nets.heads import Segmenter
from clbench.nets.step_networks import StepBackbones, StepHeads, add_network
from clbench.strategies.parameter_isolation.new_structures import NewStructures
from clbench.strategy import Group, Kit, Lesson, Memory


@dataclass(frozen=True, kw_only=True)
class Independent(NewStructures):
    """One specialist per step, with fresh weights: the reference for each step, no transfer."""

    exclusive: bool = False
    """Where specialists disagree, the more probable structure has the voxel."""

    def grow(self, model: nn.Module, kit: Kit, step: Lesson) -> None:
        """One more network; nothing else changes."""
        assert isinstance(model, Segmenter)  # noqa: S101  # built by `Finetune`
        network = self.build(kit, step)
        assert isinstance(network, Segmenter)  # noqa: S101  # built by `Finetune`
        add_network(model, network)

    def groups(self, model: nn.Module, step: Lesson, memory: Memory) -> list[Group]:
        """The newest network."""
        if step.number == 1:
            return super().groups(model, step, memory)
        if not step.learns:
            return []
        assert isinstance(model, Segmenter)  # noqa: S101  # built by `Finetune`
        assert isinstance(model.backbone, StepBackbones)  # noqa: S101  # grown above
        assert isinstance(model.head, StepHeads)  # noqa: S101  # grown above
        newest = (model.backbone.later[-1], model.head.steps[-1])
        return [Group(parameters=[p for part in newest for p in part.parameters()])]

    def decode(self, logits: Tensor, structures: tuple[str, ...]) -> Tensor:
        """(B, K, D, H, W) logits → probabilities, merged by the rule above."""
        return one_winner(logits.sigmoid(), structures) if self.exclusive else logits.sigmoid()
