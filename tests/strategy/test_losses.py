"""Losses: the authors' numbers, hand-worked cases of what is known, and gradients that stay out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor

from clbench.errors import TrainingError
from clbench.strategy.contract import Batch
from clbench.strategy.losses import dice_bce, squared_dice, targets

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "losses.json").read_text())


def batch(label: list[int], pseudo: list[int] | None, new: tuple[bool, ...]) -> Batch:
    """One case of one voxel."""
    shape = (1, len(label), 1, 1, 1)
    return Batch(
        image=torch.zeros(1, 1, 1, 1, 1),
        label=torch.tensor(label, dtype=torch.uint8).view(shape),
        pseudo=None if pseudo is None else torch.tensor(pseudo, dtype=torch.uint8).view(shape),
        structures=tuple("abcdef"[: len(label)]),
        new=new,
        cases=("1",),
    )


def test_slicewise_dice_equals_the_authors_numbers() -> None:
    g = GOLDEN["ct_binary_dice"]
    p = torch.tensor(g["predict_prob"], dtype=torch.float64)[None, None]
    t = torch.tensor(g["target"], dtype=torch.float64)[None, None]
    logits = torch.logit(p)
    assert dice_bce(logits, t, slicewise=True)["dice"].item() == pytest.approx(g["value"], abs=1e-6)
    assert dice_bce(logits, t)["dice"].item() == pytest.approx(
        g["whole_volume_variant_not_original"], abs=1e-6
    )


@pytest.mark.parametrize(
    "case", GOLDEN["ct_masked_dice_bce"]["results"], ids=lambda c: str(c["organ_list"])
)
def test_masked_loss_equals_the_authors_numbers(case: dict[str, Any]) -> None:
    g = GOLDEN["ct_masked_dice_bce"]
    logits = torch.tensor(g["logits"]).requires_grad_()
    target = torch.tensor(g["target"])
    known = torch.zeros_like(target, dtype=torch.bool)
    known[:, [i - 1 for i in case["organ_list"]]] = True
    got = dice_bce(logits, target, known, slicewise=True)
    assert got["dice"].item() == pytest.approx(case["dice"], abs=1e-5)
    assert got["bce"].item() == pytest.approx(case["bce"], abs=1e-5)
    whole = dice_bce(logits, target, known)["dice"].item()
    assert whole == pytest.approx(
        g["whole_volume_dice_variant_not_original"][str(case["organ_list"])], abs=1e-5
    )
    if case["organ_list"] == [1, 3]:
        sum(got.values()).backward()  # type: ignore[union-attr]
        grad = logits.grad
        want = g["grad_of_total_for_organ_list_1_3"]
        assert grad is not None
        assert bool((grad[:, 1] == 0).all()) is want["grad_channel2_all_zero"]
        assert grad.sum().item() == pytest.approx(want["grad_sum"], abs=1e-5)
        assert grad.abs().sum().item() == pytest.approx(want["grad_abs_sum"], abs=1e-5)
        torch.testing.assert_close(grad[0, 0], torch.tensor(want["grad_0_0"]), atol=1e-6, rtol=0)


def test_unknown_voxels_neither_count_nor_move_anything() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 2, 3, 4, requires_grad=True)
    target = (torch.rand(1, 1, 2, 3, 4) > 0.5).float()
    known = torch.rand(1, 1, 2, 3, 4) > 0.4
    sum(dice_bce(logits, target, known).values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()
    assert (logits.grad[known] != 0).all()
    other = torch.where(known, target, 1 - target)  # what is unknown may be anything
    assert dice_bce(logits, other, known) == dice_bce(logits, target, known)


def test_nothing_known_is_a_loss_of_zero_not_a_nan() -> None:
    logits = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    for slicewise in (False, True):
        got = dice_bce(
            logits,
            torch.zeros(1, 2, 2, 2, 2),
            torch.zeros(1, 2, 2, 2, 2, dtype=torch.bool),
            slicewise=slicewise,
        )
        assert [v.item() for v in got.values()] == [0, 0]
        sum(got.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize(
    ("label", "pseudo", "new", "options", "target", "known"),
    [
        # a = old without annotation, b = new and annotated
        ([255, 1], None, (False, True), {}, [0, 1], [False, True]),
        ([255, 1], None, (False, True), {"unlabelled": "background"}, [0, 1], [True, True]),
        ([255, 1], [254, 255], (False, True), {}, [1, 1], [True, True]),
        ([255, 0], [127, 255], (False, True), {}, [0.5, 0], [True, True]),
        # annotated beats predicted; the letter of eq. 5 has it the other way round
        ([0, 1], [254, 255], (False, True), {}, [0, 1], [True, True]),
        ([0, 1], [254, 255], (False, True), {"annotated_old": "pseudo"}, [1, 1], [True, True]),
        # a new structure the case does not annotate is never background
        ([1, 255], None, (True, True), {"unlabelled": "background"}, [1, 0], [True, False]),
        # padding is unknown, whatever the treatment
        ([255, 255], [255, 255], (False, True), {"unlabelled": "background"}, [0, 0], [False, False]),
        # a prediction for a new channel is not used
        ([255, 1], [254, 0], (False, True), {}, [1, 1], [True, True]),
    ],
)  # fmt: skip
def test_targets(
    label: list[int],
    pseudo: list[int] | None,
    new: tuple[bool, ...],
    options: dict[str, Any],
    target: list[float],
    known: list[bool],
) -> None:
    t, k = targets(batch(label, pseudo, new), **options)
    assert k.flatten().tolist() == known
    assert t.flatten().tolist() == pytest.approx(target)


@pytest.mark.parametrize(
    ("label", "pseudo", "target", "known"),
    [
        # a is taught again beside b; c is an old structure
        ([255, 1, 255], None, [0, 1, 0], [False, True, True]),
        ([1, 255, 255], None, [1, 0, 0], [True, False, True]),
        ([255, 1, 255], [254, 255, 255], [1, 1, 0], [True, True, True]),  # its prediction stands in
    ],
)
def test_what_is_taught_again_is_never_background(
    label: list[int], pseudo: list[int] | None, target: list[float], known: list[bool]
) -> None:
    crops = replace(batch(label, pseudo, (False, True, False)), again=("a",))
    t, k = targets(crops, unlabelled="background")
    assert k.flatten().tolist() == known
    assert t.flatten().tolist() == target


def test_different_shapes_are_refused() -> None:
    with pytest.raises(TrainingError, match="different shapes"):
        dice_bce(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1))


def test_the_backward_pass_keeps_no_mask_as_large_as_the_logits() -> None:
    """Beside a network of 38 structures such maps are a tenth of the memory."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 8, 8, 8, generator=g).requires_grad_()
    target = (torch.rand(logits.shape, generator=g) > 0.5).float()
    known = torch.rand(logits.shape, generator=g) > 0.2
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dice_bce(logits, target, known)
    maps = sum(storage.nbytes() for storage in kept.values()) / (4 * logits.numel())
    # sigmoid, target and its complement as floats, and the mask as bytes
    assert 3.25 <= maps < 3.5


@pytest.mark.parametrize("slicewise", [False, True])
def test_a_mask_that_is_true_everywhere_is_no_mask(slicewise: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    target = (torch.rand(2, 3, 4, 5, 6, generator=draws) > 0.7).float()
    got = []
    for known in (None, torch.ones_like(target, dtype=torch.bool)):
        logits = torch.randn(target.shape, generator=draws.manual_seed(1)).requires_grad_()
        terms = dice_bce(logits, target, known, slicewise=slicewise)
        torch.stack([*terms.values(), squared_dice(logits, target, known)]).sum().backward()
        got.append([*terms.values(), logits.grad])
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
    hole = torch.ones_like(target, dtype=torch.bool)
    hole[0, 1] = False  # one pair of six
    whole = (
        dice_bce(logits[1:], target[1:])["bce"],
        dice_bce(logits[:1], target[:1], hole[:1])["bce"],
    )
    expected = (3 * whole[0] + 2 * whole[1]) / 5
    assert dice_bce(logits, target, hole)["bce"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_mask_of_another_shape_is_refused() -> None:
    target = torch.zeros(1, 3, 2, 2, 2)
    with pytest.raises(TrainingError, match="known voxels"):
        dice_bce(target, target, torch.ones(1, 1, 2, 2, 2, dtype=torch.bool))
