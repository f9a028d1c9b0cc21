"""The contract of a continual-learning method, and the building blocks that methods share.

A whole method: fine-tuning that also keeps the logits of old structures where the old model had
them. Its hooks are explained in `clbench.strategy.contract.Strategy`.

>>> import copy
>>> import torch
>>> from dataclasses import dataclass, replace
>>> from clbench.nets.backbones import small_unet
>>> from clbench.nets.heads import ConvHead, Segmenter
>>> from clbench.strategy import Batch, Kit, Lesson, Strategy
>>> from clbench.strategy.losses import dice_bce, targets

>>> @dataclass(frozen=True, kw_only=True)
... class KeepLogits(Strategy):
...     weight: float = 0.1  # a hyperparameter: --set strategy.weight=0.2
...
...     def declares(self):
...         return replace(super().declares(), penalties=("keep",))
...
...     def build(self, kit, step):
...         with kit.fresh(step.number, "model"):
...             backbone = kit.backbone()
...             model = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
...             model.add(step.learns, None, kit.prior)
...         return model
...
...     def grow(self, model, kit, step):
...         with kit.fresh(step.number, "grow"):
...             model.add(step.learns, None, kit.prior)
...
...     def takes_teacher(self, step):
...         return bool(step.old)
...
...     def losses(self, batch, new, old, memory):
...         target, known = targets(batch, unlabelled=self.unlabelled)
...         terms = dice_bce(new.logits, target, known)
...         if old is not None:
...             moved = new.logits[:, batch.old_index] - old.logits
...             terms["keep"] = self.weight * moved.square().mean()
...         return terms

In a file `my_method.py` it runs by `clbench run --strategy my_method:KeepLogits …`, and `clbench
check strategy my_method:KeepLogits` tests it. By hand, two steps without the loop, of one update
each; the labels of step 2 know nothing of the liver:

>>> kit = Kit(backbone=lambda: small_unet(8), encode=lambda names: torch.zeros(len(names), 512),
...           seed=0)
>>> image = torch.rand(1, 1, 16, 16, 16, generator=kit.generator(1, "image"))
>>> liver = (image > 0.5).to(torch.uint8)
>>> first = Lesson(number=1, learns=("liver",), structures=("liver",), source="btcv")
>>> second = Lesson(
...     number=2, learns=("liver_tumor",), structures=("liver", "liver_tumor"), source="lits")
>>> labels = {1: liver, 2: torch.cat([torch.full_like(liver, 255), liver], dim=1)}

>>> method, memory, teacher = KeepLogits(), {}, None
>>> for step in (first, second):
...     if step.number == 1:
...         model = method.build(kit, step)
...     else:
...         teacher = copy.deepcopy(method.serve(model, memory)).requires_grad_(False)
...         method.grow(model, kit, step)
...     optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
...     batch = Batch(image=image, label=labels[step.number], pseudo=None, cases=("1/case",),
...                   structures=step.structures, new=step.new_flags)
...     old = teacher(image) if method.takes_teacher(step) else None
...     terms = method.losses(batch, model(image), old, memory)
...     print(step.number, tuple(model(image).logits.shape), list(terms))
...     sum(terms.values()).backward()
...     optimizer.step()
1 (1, 1, 16, 16, 16) ['dice', 'bce']
2 (1, 2, 16, 16, 16) ['dice', 'bce', 'keep']
>>> terms["keep"].item() < 1e-6  # growth alone moves no old logit, up to rounding
True
"""

from clbench.nets.output import Output
from clbench.reproducibility import derive_seed
from clbench.strategy.contract import (
    UNKNOWN,
    Batch,
    CaseTensors,
    CutCrop,
    Declaration,
    Desk,
    DrawBatches,
    Draws,
    Group,
    Kit,
    Lesson,
    Memory,
    Phase,
    PhaseContext,
    PhaseResult,
    Predictor,
    Session,
    Strategy,
    Terms,
)
from clbench.strategy.search_space import Choice, Range, SearchSpace
from clbench.strategy.teacher_labels import labelled_on_line, pseudo_labels

__all__ = [
    "UNKNOWN",
    "Batch",
    "CaseTensors",
    "Choice",
    "CutCrop",
    "Declaration",
    "Desk",
    "DrawBatches",
    "Draws",
    "Group",
    "Kit",
    "Lesson",
    "Memory",
    "Output",
    "Phase",
    "PhaseContext",
    "PhaseResult",
    "Predictor",
    "Range",
    "SearchSpace",
    "Session",
    "Strategy",
    "Terms",
    "derive_seed",
    "labelled_on_line",
    "pseudo_labels",
]
