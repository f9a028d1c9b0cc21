"""Plugins as an Avalanche user writes them: this file knows nothing of clbench."""

from __future__ import annotations

import copy

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import SynapticIntelligencePlugin

CALLS: list[str] = []
HOOKS = [name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_"))]


class Recorder(SupervisedPlugin):
    """Writes down every hook, and looks at everything a strategy has."""

    def saw(self, strategy, name):
        CALLS.append(name)
        assert strategy.experience is not None or name == "before_training" or "_eval" in name
        if name in ("before_forward", "after_update"):
            assert strategy.is_training
            assert strategy.mb_x.shape[0] == strategy.mb_y.shape[0] == strategy.train_mb_size
            assert strategy.mb_task_id.tolist() == [0] * strategy.train_mb_size
            trained = {id(p) for g in strategy.optimizer.param_groups for p in g["params"]}
            assert trained
            assert trained <= {id(p) for p in strategy.model.parameters()}
            done = CALLS[::-1][: CALLS[::-1].index("before_training_exp")].count("before_update")
            done -= name == "after_update"  # the clock ticks after it
            assert strategy.clock.train_exp_iterations == done
        if name == "before_backward":
            assert strategy.mb_output.shape[0] == strategy.train_mb_size
            assert float(strategy.loss) > 0
            with torch.no_grad():
                assert torch.equal(strategy.model(strategy.mb_x), strategy.mb_output)


def _hook(name):
    def hook(self, strategy, *args, **kwargs):
        self.saw(strategy, name)

    return hook


for _name in HOOKS:
    setattr(Recorder, _name, _hook(_name))


class Teacher(SupervisedPlugin):
    """Keeps a copy of the model after each step, and pulls the new logits towards its own."""

    def __init__(self, weight: float = 1.0, names=None, *, loud=False):
        super().__init__()
        self.weight, self.model, self.notes = weight, None, {"steps": [], "loud": loud}

    def before_backward(self, strategy, **kwargs):
        if self.model is None:
            return
        with torch.no_grad():
            old = self.model(strategy.mb_x)
        strategy.loss += self.weight * (strategy.mb_output[:, : old.shape[1]] - old).pow(2).mean()

    def after_training_exp(self, strategy, **kwargs):
        self.model = copy.deepcopy(strategy.model).eval().requires_grad_(False)
        self.notes["steps"].append(strategy.experience.current_experience)


class Needs(Teacher):
    """Has an argument without a default."""

    def __init__(self, weight):
        super().__init__(weight)


class Silent(SupervisedPlugin):
    """A penalty that is always 0."""

    def before_backward(self, strategy, **kwargs):
        strategy.loss += 0.0 * strategy.mb_output.sum()


class Hasty(SupervisedPlugin):
    """Stops in the first epoch."""

    def after_training_iteration(self, strategy, **kwargs):
        strategy.stop_training()


class Scheduler(SupervisedPlugin):
    """Halves the learning rate."""

    def before_training_epoch(self, strategy, **kwargs):
        for group in strategy.optimizer.param_groups:
            group["lr"] /= 2


class Unsaved(SupervisedPlugin):
    """Holds a generator from the start."""

    def __init__(self):
        super().__init__()
        self.stream = (n for n in range(3))


class Empty(SupervisedPlugin):
    """Puts an empty loader in the place of ours."""

    class Nothing:
        def __iter__(self):
            return iter(())

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = Empty.Nothing()


class Si(SynapticIntelligencePlugin):
    """A user's own, on top of one that is wrong on the CPU."""

    def __init__(self):
        super().__init__(si_lambda=1.0)


NotAPlugin = 3
