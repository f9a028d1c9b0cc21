"""MBS, softmax and sigmoid: the numbers of the authors' functions, and what each term may move."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor
from torch.nn import functional

from clbench.nets.backbones import small_unet
from clbench.nets.output import Output
from clbench.strategies.finetune import Finetune
from clbench.strategies.mbs import Mbs
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategies.universal_variants.universal_mbs import UniversalMbs
from clbench.strategy.contract import Batch, Kit, Lesson
from clbench.strategy.partial_labels import allowed_channels, mean_ce
from clbench.strategy.selective_distillation import (
    class_orthogonality,
    guided_distillation,
    guided_distillation_sigmoid,
    selective_channels,
    selective_targets,
    selective_weights,
    weighted_feature_mse,
)

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
NAMES = ("liver", "spleen", "stomach")  # the first two are old


def numbers(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def softmax_batch(labels: Tensor, names: tuple[str, ...] = NAMES, old: int = 2) -> Batch:
    """Labels of a softmax: 0 open, 255 unknown, the others present; old structures unannotated."""
    label = torch.full((len(labels), len(names), *labels.shape[1:]), 255, dtype=torch.uint8)
    seen = labels != 255
    for k in range(len(names)):
        here = (labels == k + 1) & seen
        label[:, k][here] = 1
        if k >= old:
            label[:, k][seen & ~here] = 0
    return Batch(
        image=torch.zeros(len(labels), 1, *labels.shape[1:]), label=label, pseudo=None,
        structures=names, new=tuple(k >= old for k in range(len(names))),
        cases=tuple(map(str, range(len(labels)))),
    )  # fmt: skip


def as_labels(channels: Tensor) -> Tensor:
    """One channel: its number; several: 255."""
    single = channels.sum(dim=1) == 1
    return torch.where(single, channels.int().argmax(dim=1), 255)


def selected(case: dict[str, Any], names: tuple[str, ...], old: int) -> tuple[Tensor, Tensor]:
    """Labels after selection, and those before: the old model's logits have no new channel."""
    labels = torch.tensor(case["labels"])
    before = labels.clone()
    batch = softmax_batch(before, names, old)
    inside = (batch.label != 255).any(dim=1, keepdim=True)
    channels, _ = selective_channels(
        allowed_channels(batch), numbers(case["old_logits"]), inside, threshold=case["threshold"]
    )
    return as_labels(channels), labels


@pytest.mark.parametrize(
    ("key", "names", "old"),
    [("mbs_selective_pseudo", NAMES, 2), ("mbs_selective_edge", ("liver", "spleen"), 1)],
)
def test_selective_labels_are_the_authors(key: str, names: tuple[str, ...], old: int) -> None:
    case = GOLDEN[key]
    found, _ = selected(case, names, old)
    assert found.tolist() == case["new_labels"]


def test_labels_that_decide_are_never_touched() -> None:
    """An old structure annotated as absent is no pseudo label, however sure the old model is."""
    label = torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    batch = Batch(
        image=torch.zeros(1, 1, 1, 1, 1), label=label, pseudo=None, structures=NAMES,
        new=(False, False, True), cases=("1",),
    )  # fmt: skip
    inside = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    allowed = allowed_channels(batch)
    for logits, wanted in (([0.0, 9.0, 1.0], 2), ([3.0, 9.0, 0.0], 0), ([0.0, 0.0, 9.0], 2)):
        old = numbers(logits).view(1, 3, 1, 1, 1)
        channels, _ = selective_channels(allowed, old, inside, threshold=0.7)
        candidates = channels[0, :, 0, 0, 0]
        assert not candidates[1] or candidates.all()
        if wanted and candidates.sum() == 1:
            assert candidates[wanted]
    sure = selective_channels(
        allowed, numbers([0.0, 0.0, 9.0]).view(1, 3, 1, 1, 1), inside, threshold=0.7
    )[0]
    assert as_labels(sure).item() == 2


def test_a_new_structure_without_annotation_stays_open() -> None:
    label = torch.tensor([255, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    batch = Batch(
        image=torch.zeros(1, 1, 1, 1, 1), label=label, pseudo=None, structures=NAMES,
        new=(False, False, True), cases=("1",),
    )  # fmt: skip
    inside = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)
    old = numbers([9.0, 0.0, 0.0]).view(1, 3, 1, 1, 1)  # sure of background
    channels, left_out = selective_channels(allowed_channels(batch), old, inside, threshold=0.7)
    assert channels.flatten().tolist() == [True, False, False, True]
    assert not left_out.any()


def test_patch_weights_are_the_authors() -> None:
    case = GOLDEN["mbs_patch_weights"]
    labels = torch.tensor(case["labels_small"])
    old = numbers(case["old_small_logits"])
    count = old.shape[1]
    channels = functional.one_hot(labels.where(labels != 255, 0), count + 1).movedim(-1, 1).bool()
    left_out = (labels == 255)[:, None]
    new = (labels >= count)[:, None] & ~left_out
    found = selective_weights(channels | left_out, left_out, old, new, torch.ones_like(left_out))
    torch.testing.assert_close(found[:, 0], numbers(case["weights"]))


def test_feature_distillation_is_the_authors_and_0_where_theirs_is_nan() -> None:
    case = GOLDEN["mbs_feature_distillation"]
    new, old = (numbers(case[k]).movedim(-1, 1) for k in ("new_features", "old_features"))
    weight = numbers(case["weights"])[:, None]
    assert weighted_feature_mse(new, old, weight).item() == pytest.approx(case["value"], rel=1e-4)
    nothing = weighted_feature_mse(new.requires_grad_(True), old, weight * 0)
    nothing.backward()  # type: ignore[no-untyped-call]
    assert nothing.item() == case["all_weights_zero_port"]
    assert new.grad is not None
    assert torch.isfinite(new.grad).all()


def test_output_distillation_is_the_authors_with_its_gradient() -> None:
    case = GOLDEN["mbs_output_distillation"]
    new = numbers(case["new_logits"]).requires_grad_(True)
    labels = torch.tensor(case["original_labels"])
    channel = torch.where(labels == 3, 3, 0)[:, None]
    value = guided_distillation(new, numbers(case["old_logits"]), channel)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == pytest.approx(case["value"], rel=1e-4)
    torch.testing.assert_close(new.grad, numbers(case["gradient_of_value"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["mbs_orthogonal", "mbs_orthogonal_per_image"])
def test_class_vectors_are_kept_apart_as_the_authors_do(key: str) -> None:
    case = GOLDEN[key]
    vectors = numbers(case["class_vectors"])
    vectors = (vectors if vectors.ndim == 3 else vectors[None]).requires_grad_(True)
    value = class_orthogonality(vectors, case["first_new"])
    value.backward()  # type: ignore[no-untyped-call]
    assert value.item() == pytest.approx(case["value"], rel=1e-4)
    grad = case.get("gradient_of_value_summed_over_batch") or case["gradient_of_value"]
    wanted = numbers(grad)
    torch.testing.assert_close(
        vectors.grad, wanted if wanted.ndim == 3 else wanted[None], rtol=1e-4, atol=1e-6
    )
    assert vectors.grad is not None
    assert not vectors.grad[:, : case["first_new"]].any()  # old rows never learn from it


def test_equal_class_vectors_are_not_parted_by_their_angle() -> None:
    vectors = torch.ones(1, 3, 4, requires_grad=True)
    class_orthogonality(vectors, 2).backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    assert vectors.grad.abs().max() < 1e-6


def test_all_terms_of_one_update_are_the_authors() -> None:
    case = GOLDEN["mbs_total"]
    labels = torch.tensor(case["original_labels"])
    batch = softmax_batch(labels)
    shape = labels.shape
    new = Output(
        logits=numbers(case["new_logits"]),
        features={"final": numbers(case["patch_features_new"]).movedim(-1, 1).reshape(1, 4, *shape[1:])},
    )  # fmt: skip
    old = Output(
        logits=numbers(case["old_logits"]),
        features={"final": numbers(case["patch_features_old"]).movedim(-1, 1).reshape(1, 4, *shape[1:])},
    )  # fmt: skip
    method = Mbs(dice=False)
    terms = method.losses(batch, new, old, {})
    assert terms["ce"].item() == pytest.approx(case["ce"], rel=1e-4)
    assert terms["features"].item() == pytest.approx(case["feature_patches"], rel=1e-4)
    # theirs counts padding in the output's distillation; ours does not
    everywhere = guided_distillation(
        new.logits, old.logits, torch.where(labels == 3, 3, 0)[:, None]
    )
    assert everywhere.item() == pytest.approx(case["output_distillation"], rel=1e-4)
    inside = (labels != 255)[:, None]
    within = guided_distillation(
        new.logits, old.logits, torch.where(labels == 3, 3, 0)[:, None], inside
    )
    assert terms["distill"].item() == pytest.approx(25 * within.item(), rel=1e-5)
    vectors = numbers(case["class_vectors"])
    angle = method.class_terms(vectors, vectors[:, :3])["orthogonal"].item()
    assert angle == pytest.approx(case["orthogonal"] / 4, rel=1e-4)
    features = method.class_terms(
        numbers(case["class_features_new"]), numbers(case["class_features_old"])
    )["classes"].item()
    assert features == pytest.approx(case["feature_classes"], rel=1e-4)
    total = terms["ce"] + terms["features"] + features + case["factor"] * everywhere + angle
    assert total.item() == pytest.approx(case["total"], rel=1e-4)


def test_the_sigmoid_form_is_the_ports_number() -> None:
    case = GOLDEN["mbs_sigmoid_port"]
    label = torch.cat(
        [torch.tensor(case[k]).to(torch.uint8) for k in ("label_old", "label_new")], dim=1
    )
    names = ("spleen", "liver", "liver_tumor")  # the tumor excludes the spleen, not the liver
    batch = Batch(
        image=torch.zeros(1, 1, *label.shape[2:]), label=label, pseudo=None, structures=names,
        new=(False, False, True), cases=("1",),
    )  # fmt: skip
    old = numbers(case["old_logits"])
    target, known, weight = selective_targets(batch, old, threshold=case["threshold"])
    torch.testing.assert_close(target[:, :2], numbers(case["target_old"]))
    assert known[:, :2].int().tolist() == case["known_old"]
    torch.testing.assert_close(weight[:, 0], numbers(case["patch_weights"]), rtol=1e-4, atol=1e-6)
    features = weighted_feature_mse(
        numbers(case["features_new"]), numbers(case["features_old"]), weight
    )
    assert features.item() == pytest.approx(case["feature_distillation"], rel=1e-4)
    out = guided_distillation_sigmoid(numbers(case["new_logits"]), old, batch)
    assert out.item() == pytest.approx(case["output_distillation"], rel=1e-4)


def test_new_channels_start_as_background() -> None:
    kit = Kit(backbone=lambda: small_unet(8), encode=lambda n: torch.zeros(len(n), 512), seed=0,
              prior=0.01)  # fmt: skip
    first = Lesson(number=1, learns=NAMES[:2], structures=NAMES[:2], source="btcv")
    second = Lesson(number=2, learns=NAMES[2:], structures=NAMES, source="lits")
    model: Any = SoftmaxFinetune().build(kit, first)
    Mbs().grow(model, kit, second)
    weight, bias = model.head.weight, model.head.bias
    assert torch.equal(weight["stomach"], weight["background"])
    assert torch.equal(bias["stomach"], bias["background"])
    assert Mbs(start="split_background").declaration.keeps_old_logits is False


def test_without_weights_and_with_an_old_model_that_sees_nothing_it_is_plain_training() -> None:
    labels = torch.tensor([[[[0, 3], [0, 255]]]])
    batch = softmax_batch(labels)
    logits = torch.rand(1, 4, 1, 2, 2)
    nothing = numbers([5.0, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 2, 2)
    method = Mbs(weight_out=0, weight_feat=0, weight_orth=0, dice=False)
    terms = method.losses(batch, Output(logits=logits), Output(logits=nothing), {})
    plain = mean_ce(logits, allowed_channels(batch, unlabelled="background"))
    assert terms == {"ce": plain}
    assert method.declaration.penalties == ()


def test_step_1_is_the_familys() -> None:
    assert Mbs().first_step() == SoftmaxFinetune()
    assert UniversalMbs().first_step() == Finetune()
