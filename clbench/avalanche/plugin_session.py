"""Avalanche plugins in our training loop: callbacks around each update, and the proxy they see.

`AvalancheStrategyProxy` is Avalanche's own supervised template: attributes,
mini-batch and the order of the hooks are its own code. What it does not do is train: our loop does,
and calls it around every update. So network, loss, crops, optimizer and schedule are those of the
strategy without the plugin.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clbench.avalanche.cases import CropSource, Experience, dataset
from clbench.avalanche.lazy_import import load
from clbench.avalanche.plugin_state import KEY, pack, unpack
from clbench.avalanche.supported import REFUSED_ON_CPU, PluginStrategy, find_plugin, refuse
from clbench.errors import AvalancheError
from clbench.nets.output import Output
from clbench.reproducibility import seeded
from clbench.strategy.contract import Batch, PhaseContext, Session
from clbench.training.batches import CaseKey

_core = load("avalanche.core")
_templates = load("avalanche.training.templates")
_plugins = load("avalanche.training.plugins")
_helper: Any = type(load("avalanche.distributed").DistributedHelper)


PENALIZED = f"{KEY}.penalized"
"""Memory entry within a step: a penalty other than 0 was seen."""


class Logits(nn.Module):
    """The model as plugins expect one: an image in, a tensor out. Its parameters are the model's.

    Args:
        model: answers with `Output`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, D, H, W) → (B, C, D, H, W) logits."""
        answer: Output = self.model(image)
        return answer.logits


class AvalancheStrategyProxy(_templates.SupervisedTemplate):  # type: ignore[misc, name-defined]  # untyped
    """Avalanche's template, with everything that our loop owns taken out.

    Args:
        context: of the loop.
        plugin: the plugin.
        clock: counts on from the steps before.
    """

    def __init__(self, *, context: PhaseContext, plugin: Any, clock: Any) -> None:
        self.context = context
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No loggers specified")  # the loop's own log
            evaluator = _plugins.EvaluationPlugin()
        super().__init__(
            model=Logits(context.model), optimizer=context.optimizer, criterion=self.loss_of,
            train_mb_size=context.batch, train_epochs=context.epochs, eval_mb_size=context.batch,
            device=context.device, plugins=[plugin], evaluator=evaluator,
        )  # fmt: skip
        self.plugins[-1] = clock  # the last: it counts for the others
        self.clock: Any = clock
        self.named: dict[str, Tensor] = {}

    def loss_of(self, logits: Tensor, label: Tensor) -> Tensor:
        """The strategy's own loss of a mini-batch, plugins aside: what plugins call the criterion.

        Args:
            logits: (B, C, D, H, W).
            label: (B, K, D, H, W) uint8: 0, 1, 255 = not annotated.
        """
        return torch.stack([v.float() for v in self.terms_of(logits, label).values()]).sum()

    def terms_of(self, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The same by name."""
        d = self.context
        batch = Batch(
            image=logits.detach()[:, :1], label=label, pseudo=None,
            structures=d.lesson.structures, new=d.lesson.new_flags, again=d.lesson.again,
            cases=("?",) * len(label),
        )  # fmt: skip
        return d.strategy.losses(batch, Output(logits=logits), None, d.memory)

    def criterion(self) -> Tensor:
        """The loss of the current mini-batch."""
        self.named = self.terms_of(self.mb_output, self.mb_y)
        return torch.stack([v.float() for v in self.named.values()]).sum()

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Batches are our loop's, unless a plugin puts a loader here."""
        self.dataloader: Any = []

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Model and optimizer are the loop's: grown and made already."""

    def model_adaptation(self, model: Any = None) -> Any:
        """The model grew before the step; evaluation never lets it grow."""
        return self.model if model is None else model


class PluginSession(Session):
    """A plugin around the updates of one step.

    Args:
        context: of the loop.
        strategy: what the plugin is made from.

    Raises:
        AvalancheError: the plugin may not run here, or no checkpoint can hold its state.
    """

    def __init__(self, context: PhaseContext, strategy: PluginStrategy) -> None:
        super().__init__(context)
        if torch.distributed.is_initialized():
            # the loop divides each batch among the processes; Avalanche's loaders would once more
            _helper.is_distributed = property(lambda helper: False)
        self.strategy, self.crops = strategy, CropSource(context)
        kind = find_plugin(strategy.plugin)
        if context.device.type == "cpu":
            refuse(kind, REFUSED_ON_CPU)
        self.home, self.kind = kind.__module__, kind
        with self._moment("made"):
            if KEY in context.memory:
                plugin, clock = unpack(
                    context.memory, home=self.home, device=context.device, dataset=self._stored
                )
                strategy.mend(plugin)
            else:
                plugin, clock = kind(**strategy.arguments()), _plugins.clock.Clock()
                pack(self._state(plugin, clock), home=self.home)  # refused now, not after a step
        self.proxy = AvalancheStrategyProxy(context=context, plugin=plugin, clock=clock)
        self.penalized = kind.before_backward is not _core.BaseSGDPlugin.before_backward
        self.seen = PENALIZED in context.memory
        self.last: Batch | None = None

    # ------------------------------------------------------------------------------- the updates

    def batches(self, own: Iterator[Batch]) -> Iterator[Batch]:
        """The loop's own batches, or those of the loader that the plugin put in their place."""
        d, c = self.context, self.proxy
        c.is_training = True
        with self._moment("start"):
            c._before_training()
            c.experience = self._experience()
            c._before_training_exp()
        c.clock.train_exp_iterations = d.done
        c.clock.train_iterations += d.done
        c.clock.total_iterations += d.done
        first, rest = divmod(d.done, d.updates)
        for epoch in range(first, d.epochs):
            with self._moment("epoch starts", epoch):
                c._before_training_epoch()
            c.clock.train_exp_epochs, c.clock.train_epoch_iterations = epoch, rest
            source = self._drawn(epoch) if c.dataloader else own
            for iteration in range(rest, d.updates):
                batch = next(source)
                self._see(batch)
                self.last = batch
                with self._moment("before", epoch, iteration):
                    c._before_training_iteration()
                yield batch
                with self._moment("after", epoch, iteration):
                    c._after_training_iteration()
            rest = 0
            with self._moment("epoch ends", epoch):
                c._after_training_epoch()
        self._judge()
        # a phase that was stopped after its last update went through none of these epochs
        c.clock.train_exp_epochs, c.clock.train_epoch_iterations = d.epochs, d.updates
        with self._moment("end"), warnings.catch_warnings(record=True) as heard:
            c._after_training_exp()
            c._after_training()
        for warning in heard:  # Avalanche's own plugins call what Avalanche calls outdated
            if not str(warning.message).startswith("Call to deprecated function"):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        self._evaluate()
        self._remember()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The strategy's terms, and as `penalty` what the plugin added to their sum."""
        c = self.proxy
        self._see(batch)
        c.loss = c._make_empty_loss()
        now = (c.clock.train_exp_epochs, c.clock.train_epoch_iterations)
        with self._moment("before forward", *now):
            c._before_forward()
        c.mb_output = c.forward()
        with self._moment("after forward", *now):
            c._after_forward()
        base = c.criterion()
        c.loss = c.loss + base
        mark = (c.loss, c.loss._version)
        with self._moment("before backward", *now):
            c._before_backward()
        if c.loss is mark[0] and c.loss._version == mark[1]:
            return c.named  # to the bit the loss without plugin
        penalty = c.loss.float().sum() - base
        self.seen = self.seen or bool(penalty.detach() != 0)
        return {**c.named, "penalty": penalty}

    def count(self, batch: Batch) -> None:
        """The strategy's losses alone: a plugin's hooks are called once."""
        self.proxy.terms_of(self.context.model(batch.image).logits, batch.label)

    def _see(self, batch: Batch) -> None:
        """Make a batch the mini-batch that the plugin looks at."""
        c = self.proxy
        c.mbatch = [batch.image, batch.label, torch.zeros(len(batch.label)).long()]
        c._unpack_minibatch()

    def after_backward(self) -> None:
        """Where A-GEM projects."""
        super().after_backward()
        self.proxy._after_backward()

    def before_update(self) -> None:
        """Gradients are final."""
        self.proxy._before_update()

    def after_update(self) -> None:
        """The weights have changed."""
        super().after_update()
        if self.seen:  # kept where the step is stopped, and gone when it ends
            self.context.memory[PENALIZED] = 1
        self.proxy._after_update()

    def _drawn(self, epoch: int) -> Iterator[Batch]:
        """Batches of the plugin's loader, from its start as often as an epoch needs."""
        d, count = self.context, 0
        while True:
            with self._moment("loader", epoch, count):
                batches = iter(self.proxy.dataloader)
            before = count
            while True:
                with self._moment("draw", epoch, count):
                    raw = next(batches, None)
                    cases = tuple(self.crops.drawn)
                if raw is None:
                    break
                count += 1
                yield Batch(
                    image=raw[0].to(d.device), label=raw[1].to(d.device), pseudo=None,
                    structures=d.lesson.structures, new=d.lesson.new_flags, again=d.lesson.again,
                    cases=cases,
                )  # fmt: skip
            if count == before:
                raise AvalancheError(
                    "the plugin's loader gives no batch", where=self._where(), got="an empty loader"
                )

    # --------------------------------------------------------------------------------- data, state

    def _experience(self) -> Experience:
        number = self.context.lesson.number
        keys = [(number, case) for case in self.context.lesson.cases]
        return Experience(self._stored(keys), self.context, "train")

    def _stored(self, keys: Sequence[CaseKey]) -> Any:
        return dataset(self.crops, keys, [f"{step}/{case}" for step, case in keys])

    def _state(self, plugin: Any, clock: Any) -> list[Any]:
        for name in self.strategy.loose:
            vars(plugin).pop(name, None)
        return [plugin, clock]

    def _remember(self) -> None:
        """Put plugin and clock into memory: all that the next step finds."""
        memory, c = self.context.memory, self.proxy
        for key in [k for k in memory if k == KEY or k.startswith(f"{KEY}.")]:
            del memory[key]
        memory.update(pack(self._state(c.plugins[0], c.clock), home=self.home))

    # ---------------------------------------------------------------------------------- evaluation

    def _evaluate(self) -> None:
        """The hooks of evaluation, on this step's validation cases, for plugins that have any.

        A plugin never sees a test case: clbench examines them after the step.
        """
        hooks = [name for name in dir(_core.SupervisedPlugin) if "_eval" in name]
        base = _core.SupervisedPlugin
        if all(getattr(self.kind, name) is getattr(base, name) for name in hooks):
            return
        d, c = self.context, self.proxy
        cases = d.lesson.validation if d.validation is not None else ()
        volumes = [d.validation(case) for case in cases] if d.validation is not None else []
        data = dataset(self.crops, volumes, [f"validation/{case}" for case in cases])
        with self._moment("evaluation"):
            c.eval(Experience(data, d, "validation"), num_workers=0)

    # ---------------------------------------------------------------------------------------- rules

    @contextmanager
    def _moment(self, *place: object) -> Iterator[None]:
        """A plugin's random numbers depend on seed, step and place; the loop's stay as they are."""
        d = self.context
        rates = [group["lr"] for group in d.optimizer.param_groups]
        self.crops.at(*place)
        with seeded(d.seed, d.lesson.number, d.phase.name, "plugin", *place, device=d.device):
            yield
        if rates != [group["lr"] for group in d.optimizer.param_groups]:
            raise self._not_its_own("changes the learning rate", "train.lr and train.warmup")
        if hasattr(self, "proxy") and self.proxy._stop_training:
            raise self._not_its_own("stops training early", "train.epochs")

    def _not_its_own(self, what: str, setting: str) -> AvalancheError:
        return AvalancheError(
            f"the plugin {what}, which is the profile's to decide",
            where=self._where(),
            next_step=f"set {setting} instead, and leave the plugin out",
        )

    def _judge(self) -> None:
        """A penalty that is always 0 looks like a method and is fine-tuning."""
        d = self.context
        updates = d.epochs * d.updates
        if (
            self.penalized
            and not self.seen
            and updates >= 2  # before the first one no weight has moved
            and d.lesson.number > 1
            and self.strategy.zero_penalty == "fault"
            and self.last is not None  # stopped after the last update: no batch is left to ask
            and not self._has_gradient(self.last)
        ):
            raise AvalancheError(
                "the plugin's penalty is exactly 0, although the weights have moved",
                where=f"{self._where()}, after {updates} updates",
                expected="a loss that before_backward changes, from step 2 on",
                got="neither a value nor a gradient",
                next_step="the plugin protects nothing here; if it only looks, say so with "
                "--set strategy.zero_penalty=allowed",
            )

    def _has_gradient(self, batch: Batch) -> bool:
        """Whether what the plugin adds to the loss of a batch moves weights.

        A penalty below half a unit in the last place of the loss reads as 0 in their float32 sum;
        its gradient tells it from none. Asked for after the last update alone, and only where every
        value was 0, so that no other run is touched.
        """
        model = self.context.model
        weights = [p for p in model.parameters() if p.requires_grad]
        before = [buffer.clone() for buffer in model.buffers()]
        with self._moment("judged"), torch.enable_grad():
            penalty = self.terms(batch).get("penalty")
            grads: tuple[Tensor | None, ...] = ()
            if penalty is not None and penalty.requires_grad:
                grads = torch.autograd.grad(penalty, weights, allow_unused=True)
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
        return self.seen or any(g is not None and bool(g.any()) for g in grads)

    def _where(self) -> str:
        return f"{self.strategy.plugin}, step {self.context.lesson.number}"
