"""Head or body: models put together from two steps, and injected failures found again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clbench.diagnosis.head_body import put_together, why_not_exchanged
from clbench.evaluation.explained import HeadBody, HeadBodyRow, main_of, summarize_head_body
from clbench.nets.backbones import small_unet
from clbench.nets.growing_decoders import GrowingDecoders
from clbench.nets.heads import ConvHead, Segmenter
from clbench.nets.step_networks import add_network

OLD = ("spleen", "liver", "stomach")
NEW = (*OLD, "liver_tumor")
SHADES = torch.tensor([0.2, 0.4, 0.6, 0.8])
"""Intensity of each structure in the images; 0 is background."""
SIDE = 16


class Bumps(nn.Module):
    """A body of one layer: each feature is high for images of one shade, low for others."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.linspace(0, 0.8, 5))

    def forward(self, image: Tensor) -> Mapping[str, Tensor]:
        final = torch.exp(-(((image - self.centers.view(1, -1, 1, 1, 1)) / 0.05) ** 2))
        return {"final": final, "bottleneck": final}


def model(structures: Sequence[str]) -> Segmenter:
    """Tells the shades apart."""
    made = Segmenter(Bumps(), ConvHead(5, background=False))
    made.add(structures)
    head = made.head
    assert isinstance(head, ConvHead)
    with torch.no_grad():
        for k, name in enumerate(structures):
            head.weight[name].fill_(-1.0)
            head.weight[name][k + 1] = 4.0
            head.bias[name].fill_(-2.0)
    return made.eval()


def image(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(1, 1, D, H, W) shades with noise, and (K, D, H, W) truth: a block per structure."""
    truth = torch.zeros(len(NEW), SIDE, SIDE, SIDE, dtype=torch.bool)
    for k in range(len(NEW)):
        low = torch.randint(0, 4, (2,), generator=generator)
        truth[k, 4 * k : 4 * k + 3, low[0] : low[0] + 10, low[1] : low[1] + 10] = True
    shade = (truth * SHADES.view(-1, 1, 1, 1)).sum(dim=0)
    noise = 0.02 * torch.randn(shade.shape, generator=generator)
    return (shade + noise)[None, None], truth


def dice(net: nn.Module, picture: Tensor, truth: Tensor) -> list[float]:
    with torch.no_grad():
        predicted = net(picture).logits[0, : len(OLD)] > 0
    return [
        float(2 * (p & t).sum() / (p.sum() + t.sum()))
        for p, t in zip(predicted, truth, strict=False)
    ]


def compared(
    old: nn.Module, new: nn.Module, pictures: Sequence[tuple[Tensor, Tensor]]
) -> list[HeadBody]:
    rows = []
    for case, (picture, truth) in enumerate(pictures):
        models = {
            "old": old,
            "new": new,
            "old_head_new_body": put_together(head=old, body=new),
            "new_head_old_body": put_together(head=new, body=old),
        }
        found = {kind: dice(net, picture, truth) for kind, net in models.items()}
        rows += [
            HeadBodyRow(
                step=2, eval_set="btcv", case=str(case), structure=name, learned_at=1,
                probe_old_body=float("nan"), probe_new_body=float("nan"),
                **{kind: values[k] for kind, values in found.items()},
            )
            for k, name in enumerate(OLD)
        ]  # fmt: skip
    return summarize_head_body(rows)


def grown(old: Segmenter, generator: torch.Generator) -> Segmenter:
    """The model after a later step that moved everything a little, and forgot nothing."""
    new = model(NEW)
    new.backbone.load_state_dict(old.backbone.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=generator)
    return new


def hurt(new: Segmenter, failure: str, generator: torch.Generator) -> None:
    assert isinstance(new.head, ConvHead)
    with torch.no_grad():
        if failure == "head reset":
            for name in OLD:
                fresh = nn.Conv3d(5, 1, 1)
                weight = torch.randn(fresh.weight[0].shape, generator=generator)
                new.head.weight[name].copy_(weight)
                new.head.bias[name].fill_(-3.0)
        elif failure == "head swapped":
            order = [OLD[1], OLD[2], OLD[0]]
            kept = {n: new.head.weight[n].clone() for n in OLD}
            for name, other in zip(OLD, order, strict=True):
                new.head.weight[name].copy_(kept[other])
        elif failure == "body perturbed":
            centers = new.get_parameter("backbone.centers")
            centers += 0.1 * torch.sign(torch.randn(5, generator=generator))
        else:  # the body's features change places
            centers = new.get_parameter("backbone.centers")
            centers.copy_(centers.roll(int(torch.randint(1, 5, (1,), generator=generator))))


@pytest.mark.parametrize(
    ("failure", "culprit"),
    [
        ("head reset", "head"),
        ("head swapped", "head"),
        ("body perturbed", "body"),
        ("body permuted", "body"),
    ],
)
def test_injected_failures_are_attributed_to_the_part(failure: str, culprit: str) -> None:
    """At least nine of ten structures, while all other weights move a little as well."""
    generator = torch.Generator().manual_seed(3)
    right = []
    for _ in range(15):
        pictures = [image(generator) for _ in range(2)]
        old = model(OLD)
        new = grown(old, generator)
        hurt(new, failure, generator)
        found = compared(old, new, pictures)
        right += [main_of({"head": one.head, "body": one.body}) == culprit for one in found]
    assert np.mean(right) >= 0.9, np.mean(right)


def test_nothing_forgotten_is_nobodys() -> None:
    generator = torch.Generator().manual_seed(4)
    old = model(OLD)
    (picture,) = [image(generator)]
    for one in compared(old, grown(old, generator), [picture]):
        assert one.dice["old"] > 0.9
        assert abs(one.lost) < 0.05
        assert one.head + one.body == pytest.approx(one.lost, abs=1e-12)


def test_shares_are_exact_where_one_part_alone_changed() -> None:
    generator = torch.Generator().manual_seed(5)
    old, new = model(OLD), model(NEW)
    hurt(new, "head reset", generator)
    for one in compared(old, new, [image(generator)]):
        assert one.lost > 0.1
        assert one.head == pytest.approx(one.lost, abs=1e-12)
        assert one.body == pytest.approx(0, abs=1e-12)


def test_putting_together_changes_neither_model() -> None:
    old, new = model(OLD), model(NEW)
    hurt(new, "body permuted", torch.Generator().manual_seed(0))
    before = [copy.deepcopy(m.state_dict()) for m in (old, new)]
    mixed = put_together(head=old, body=new)
    assert mixed is not old
    assert mixed.get_parameter("backbone.centers") is new.get_parameter("backbone.centers")
    assert old.backbone is not new.backbone
    for one, state in zip((old, new), before, strict=True):
        assert all(torch.equal(one.state_dict()[k], v) for k, v in state.items())


def small(names: Sequence[str]) -> Segmenter:
    backbone = small_unet(8)
    made = Segmenter(backbone, ConvHead(backbone.final_channels, background=False))
    made.add(names)
    return made


def test_models_that_cannot_be_exchanged_say_why() -> None:
    old, grown_head = small(OLD), small(NEW)
    assert why_not_exchanged(old, grown_head) == ""
    networks = small(OLD)
    add_network(networks, small(("liver_tumor",)))
    assert "a Backbone after the earlier step and a StepBackbones" in why_not_exchanged(
        old, networks
    )
    more = copy.deepcopy(networks)
    add_network(more, small(("kidney_tumor",)))
    assert "tensors of the body" in why_not_exchanged(networks, more)
    decoders = GrowingDecoders(small_unet(8), OLD, None)
    assert why_not_exchanged(old, decoders) == "GrowingDecoders is no single head on a single body"
