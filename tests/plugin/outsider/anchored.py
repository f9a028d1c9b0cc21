"""Fine-tuning that is pulled back to the weights of the previous step, by an L2 penalty's gradient.

Source: the plainest relative of elastic weight consolidation (Kirkpatrick et al., PNAS 2017): all
weights count alike.
"""

from dataclasses import dataclass

from clbench.strategies.finetune import Finetune


@dataclass(frozen=True, kw_only=True)
class Anchored(Finetune):
    """Fine-tuning that is pulled back to the old weights."""

    weight: float = 0.01

    def first_step(self):
        """Step 1 leaves an anchor behind, so it is not plain training."""
        return self

    def finish(self, step, model, draws, memory):
        """Remember the weights as they are now."""
        memory["anchor"] = {name: p.detach().clone() for name, p in model.named_parameters()}

    def after_backward(self, model, memory):
        """Add the gradient of weight / 2 * |w - anchor|^2."""
        for name, p in model.named_parameters():
            if p.grad is not None and name in memory.get("anchor", {}):
                p.grad.add_(p.detach() - memory["anchor"][name], alpha=self.weight)
