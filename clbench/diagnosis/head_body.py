"""Head or body: the head of one step on the body of another.

The body is everything that turns an image into feature maps, the head what turns these into logits
(`clbench.nets.heads.Segmenter`). A model with one head on one body, whose body has the same layers
after both steps, can be put together from two steps.
"""

from __future__ import annotations

import copy

from torch import nn

from clbench.deployment.trained import TrainedModel
from clbench.evaluation.sliding_window import VolumePredictor
from clbench.nets.heads import Segmenter


def why_not_exchanged(old: nn.Module, new: nn.Module) -> str:
    """Why head and body of two models cannot be exchanged; empty: they can.

    Args:
        old: the model that is served after an earlier step.
        new: the one after a later step.
    """
    for model in (old, new):
        if not isinstance(model, Segmenter):
            return f"{type(model).__name__} is no single head on a single body"
    assert isinstance(old, Segmenter)  # noqa: S101  # seen above; tells the type checker
    assert isinstance(new, Segmenter)  # noqa: S101
    kinds = [type(model.backbone).__name__ for model in (old, new)]
    if kinds[0] != kinds[1]:
        return f"the body is a {kinds[0]} after the earlier step and a {kinds[1]} after the later"
    shapes = [{n: t.shape for n, t in m.backbone.state_dict().items()} for m in (old, new)]
    if shapes[0] != shapes[1]:
        others = {n for n, _ in shapes[0].items() ^ shapes[1].items()}
        return f"{len(others)} tensors of the body have another name or shape after the later step"
    return ""


def put_together(*, head: nn.Module, body: nn.Module) -> nn.Module:
    """The model `head` with the body of another; it shares the weights of both.

    Args:
        head: gives everything but the body; not changed.
        body: gives the body.
    """
    mixed = copy.copy(head)
    mixed._modules = {**head._modules, "backbone": body._modules["backbone"]}
    return mixed


def exchanged(*, head: TrainedModel, body: TrainedModel) -> VolumePredictor:
    """Predicts with the head of one step on the body of another, decoded as the head's step is.

    Args:
        head: the step that gives the head, its structures and the strategy's memory.
        body: the step that gives the body.
    """
    server = copy.copy(head.server)
    server.model = put_together(head=head.server.model, body=body.server.model)
    return server
