"""VISTA3D's recipe: its loss is the original's, and only the new structures are taught, slowly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES

from clbench.errors import SettingError, TrainingError
from clbench.nets.backbones import small_unet
from clbench.nets.output import Output
from clbench.strategies.finetune import Finetune
from clbench.strategies.vista_finetune import VistaFinetune
from clbench.strategy.contract import Batch, Kit, Lesson, Phase
from clbench.strategy.losses import bce, dice_bce, squared_dice

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
NAMES = ("liver", "spleen", "stomach")
FIRST = Lesson(number=1, learns=NAMES[:2], structures=NAMES[:2], source="btcv")
SECOND = Lesson(number=2, learns=NAMES[2:], structures=NAMES, source="btcv")


def batch(step: Lesson) -> Batch:
    label = torch.zeros(1, len(step.structures), 2, 2, 2, dtype=torch.uint8)
    label[:, -1, 0] = 1
    return Batch(
        image=torch.zeros(1, 1, 2, 2, 2),
        label=label,
        pseudo=None,
        structures=step.structures,
        new=step.new_flags,
        cases=("1",),
    )


def test_the_loss_is_that_of_the_recipe() -> None:
    case = GOLDEN["vista_finetune_loss"]
    label = torch.tensor(case["label"])
    losses = []
    for prompt, numbers in zip(case["prompts"], case["logits_per_prompt"], strict=True):
        logits = torch.tensor(numbers, dtype=torch.float64)
        logits = logits.reshape(1, 1, *logits.shape[-3:])
        target = (label == prompt).double().reshape(logits.shape)
        losses.append((squared_dice(logits, target) + bce(logits, target)).item())
    assert losses == pytest.approx(case["per_prompt"], rel=1e-6)
    assert sum(losses) / len(losses) == pytest.approx(case["value"], rel=1e-6)


def test_squared_dice_leaves_out_what_is_unknown() -> None:
    logits = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    target = torch.ones(1, 2, 2, 2, 2)
    known = torch.ones(1, 2, 2, 2, 2, dtype=torch.bool)
    known[:, 1] = False
    known[:, 0, 0] = False
    loss = squared_dice(logits, target, known)
    assert loss.item() == squared_dice(logits[:, :1, 1:], target[:, :1, 1:]).item()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert not grad[~known].any()
    assert grad[known].all()
    nothing = squared_dice(logits, target, torch.zeros_like(known))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, logits)[0].any()
    with pytest.raises(TrainingError, match="shapes"):
        squared_dice(logits, target[:, :1])


def test_step_1_is_that_of_finetune() -> None:
    method, crops = VistaFinetune(), batch(FIRST)
    logits = torch.randn(1, 2, 2, 2, 2)
    terms = method.losses(crops, Output(logits=logits), None, {})
    plain = dice_bce(logits, crops.label.float())
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in plain.items()}
    assert method.first_step() == Finetune()


def test_later_steps_teach_the_new_structures_alone() -> None:
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    terms = VistaFinetune().losses(batch(SECOND), Output(logits=logits), None, {})
    assert list(terms) == ["dice", "bce"]
    torch.stack([*terms.values()]).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[:, :2].any()
    assert logits.grad[:, 2].all()


def test_from_step_2_on_everything_learns_at_a_low_constant_rate() -> None:
    method = VistaFinetune()
    kit = Kit(
        backbone=lambda: small_unet(8),
        encode=lambda names: torch.zeros(len(names), 512),
        seed=0,
    )
    model = method.build(kit, FIRST)
    assert method.next_phase(FIRST, {}, ()) == Phase()
    assert method.next_phase(SECOND, {}, ()) == Phase(constant=True)
    assert [g.lr for g in method.groups(model, FIRST, {})] == [1.0]
    method.grow(model, kit, SECOND)
    (group,) = method.groups(model, SECOND, {})
    assert group.lr == 0.5
    assert [*map(id, group.parameters)] == [*map(id, model.parameters())]
    assert not method.takes_teacher(SECOND)
    assert not method.prepares(SECOND)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(SettingError, match=r"strategy\.lr_factor"):
        VistaFinetune(lr_factor=0)
