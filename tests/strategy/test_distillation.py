"""Distillation, pooling and pseudo labels: the published codes' numbers, and teachers as constants."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor

from clbench.strategy.distillation import (
    entropy_gate,
    entropy_histogram,
    feature_mse,
    gated_ce,
    kd_sigmoid,
    kd_softmax,
    kd_unbiased,
    legacy_thresholds,
    local_pod,
    logits_for_pod,
    median_thresholds,
    normalized_entropy,
    pod,
)
from clbench.strategy.partial_labels import marginal_ce

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "distillation.json").read_text())
KD = GOLDEN["kd_softmax"]
NEW, OLD = torch.tensor(KD["inputs"]), torch.tensor(KD["targets"])
LABELS = torch.tensor(KD["labels"])


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-5)


def test_softmax_distillation_equals_the_ports() -> None:
    assert kd_softmax(NEW, OLD).mean().item() == near(KD["plain_mean"])
    assert kd_softmax(NEW, OLD, alpha=0.5).mean().item() == near(KD["plain_alpha_0_5"])
    assert 100 * kd_softmax(NEW, OLD).mean().item() == pytest.approx(
        KD["plain_times_100"], rel=1e-6
    )
    torch.testing.assert_close(
        kd_softmax(NEW, OLD)[0], torch.tensor(KD["plain_none_00"]), atol=1e-5, rtol=0
    )


def test_softmax_distillation_equals_the_textbook_times_the_channels() -> None:
    """Li and Hoiem sum over channels where the ports take the mean."""
    for temperature, key in ((2.0, "lwf_paper_T2_numpy_not_from_repo"),
                             (1.0, "lwf_paper_T1_numpy_sum_over_classes")):  # fmt: skip
        mean = kd_softmax(NEW, OLD, temperature=temperature).mean().item()
        assert mean * OLD.shape[1] == near(KD[key])


def test_unbiased_distillation_equals_the_published_code() -> None:
    assert kd_unbiased(NEW, OLD).mean().item() == near(KD["unbiased_mean"])
    assert kd_unbiased(NEW, OLD, alpha=0.5).mean().item() == near(KD["unbiased_alpha_0_5"])


def test_cross_entropies_equal_the_published_code() -> None:
    seen = LABELS != 255
    one = torch.nn.functional.one_hot(LABELS.where(seen, 0), 5).movedim(-1, 1).bool()
    assert marginal_ce(NEW, one)[seen].mean().item() == near(KD["plain_ce_ignore255"])
    old = (LABELS < 3).unsqueeze(1) & (torch.arange(5) < 3).view(1, 5, 1, 1)
    loss = marginal_ce(NEW, one | old)[seen].mean().item()
    assert loss == near(KD["unbiased_ce_oldcl3"])


def test_sigmoid_distillation_equals_the_published_code() -> None:
    assert kd_sigmoid(NEW[:, :3], OLD).item() == near(KD["bce_sigmoid_trim"])


def test_feature_distance_equals_the_authors_number() -> None:
    g = GOLDEN["ct_ilt_sigmoid"]
    found = feature_mse(torch.tensor(g["feat_new"]), torch.tensor(g["feat_old"]))
    assert found.item() == near(g["feature_mse"])


def layers(values: list[Any]) -> dict[str, Tensor]:
    return {str(i): torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}


def test_pooled_distillation_equals_the_authors_3d_numbers() -> None:
    g = GOLDEN["ct_pod_3d"]
    new, old = layers(g["new_features"]), layers(g["old_features"])

    def value(names: list[str], current: int, learned: int) -> float:
        return pod(
            new, old, factors=dict.fromkeys(names, 0.0005), current=current, learned=learned
        ).item()

    assert value(list(new), 4, 1) == pytest.approx(g["value_float64_reimplementation"], rel=1e-5)
    assert value(["0"], 4, 1) == pytest.approx(g["layer0_only"], rel=1e-5)
    assert value(["1"], 4, 1) == pytest.approx(g["layer1_only_width3"], rel=1e-5)
    assert value(list(new), 14, 1) == pytest.approx(g["same_with_current14_new1"], rel=1e-5)
    assert value(list(new), 10, 3) == pytest.approx(g["same_with_current10_new3"], rel=1e-5)


def test_pooled_distillation_equals_the_original_2d_number() -> None:
    g = GOLDEN["plop_original_pod_2d"]
    new, old = layers(g["new_attentions"]), layers(g["old_attentions"])
    small_new, small_old = (torch.tensor(g[f"{k}_logits_small"]) for k in ("new", "old"))
    new["logits"], old["logits"] = logits_for_pod(small_new, small_old), small_old
    factors = dict.fromkeys(new, 0.01) | {"logits": 0.0005}
    found = pod(new, old, factors=factors, current=5, learned=2)
    assert found.item() == pytest.approx(g["value"], rel=1e-5)


def test_equal_maps_have_distance_and_gradient_zero() -> None:
    x = torch.randn(1, 2, 4, 4, 4).requires_grad_()
    loss = local_pod(x, x.detach()).sum()
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_pooling_over_two_axes_by_hand() -> None:
    """One cell of 2 x 2 x 2; the map is x along axis 0: strips differ along axis 0 alone."""
    new = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 2, 2)
    found = local_pod(new, torch.zeros_like(new), scales=(1,), pooled_axes=2)
    # over axes (0, 1) and (0, 2): strips of 2 with mean (1 + 9) / 2; over (1, 2): 1 and 9
    assert found.item() == pytest.approx(math.sqrt(2 * 5**2 + 2 * 5**2 + 1 + 81))


def test_entropy_gate_equals_the_published_code() -> None:
    g = GOLDEN["plop_entropy_pseudo"]
    old, labels = torch.tensor(g["old_logits"]), torch.tensor(g["labels"])
    count = old.shape[1]
    torch.testing.assert_close(
        normalized_entropy(old) / count, torch.tensor(g["entropy"]), atol=1e-5, rtol=0
    )
    scale = 1 / (count * math.log(g["nb_current_classes"]))
    winner, sure = entropy_gate(old, torch.tensor(g["thresholds"][:count]), scale=scale)
    assert winner.tolist() == g["argmax"]
    open_ = labels < g["old_classes"]
    assert sure.tolist() == g["valid"]
    share = (sure & open_).flatten(1).sum(1) / open_.flatten(1).sum(1)
    assert share.tolist() == pytest.approx(g["classif_adaptive_factor"], abs=1e-5)


def test_gated_cross_entropy_takes_sure_answers_and_leaves_out_the_rest() -> None:
    g = GOLDEN["plop_entropy_pseudo"]
    old, labels = torch.tensor(g["old_logits"]), torch.tensor(g["labels"])
    torch.manual_seed(0)
    new = torch.randn(2, 5, 3, 3)
    open_ = labels < 3
    one = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).bool()
    allowed = torch.where(open_.unsqueeze(1), (torch.arange(5) < 3).view(1, 5, 1, 1), one)
    found = gated_ce(
        new, allowed, old, torch.tensor(g["thresholds"][:3]), scale=1 / (3 * math.log(5))
    )
    ids = torch.tensor(g["new_labels"])
    ce = torch.nn.functional.cross_entropy(new, ids, ignore_index=255, reduction="none")
    factor = torch.tensor(g["classif_adaptive_factor"])
    assert found.item() == near((ce.flatten(1).sum(1) * factor).sum().item() / ids.numel())


def test_legacy_thresholds_are_those_of_the_published_code() -> None:
    g = GOLDEN["plop_find_median"]
    old = torch.tensor(
        np.round(np.random.default_rng(51).standard_normal((2, 3, 6, 6)) * 2.0, 4)
    ).float()
    where = torch.ones(2, 6, 6, dtype=torch.bool)
    where[0, 0, 0] = False
    histogram = entropy_histogram(old, where, bins=100, scale=1 / (3 * math.log(5)))
    assert legacy_thresholds(histogram, floor=0.001).tolist() == pytest.approx(g["thresholds"][:3])


def test_thresholds_are_medians() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 3, 16, 16, 16)
    where = torch.rand(1, 16, 16, 16) > 0.3
    entropy, winner = normalized_entropy(logits), logits.argmax(1)
    want = [np.median(entropy[where & (winner == c)].numpy()) for c in range(3)]
    parts = [entropy_histogram(logits[:, :, half], where[:, half])
             for half in (slice(0, 8), slice(8, 16))]  # fmt: skip
    found = median_thresholds(parts[0] + parts[1], floor=0.001)
    assert found.tolist() == pytest.approx(want, abs=2e-3)
    assert median_thresholds(torch.zeros(2, 10, dtype=torch.long), floor=0.25).tolist() == [
        0.25, 0.25,
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [kd_softmax, kd_unbiased, lambda a, b: kd_sigmoid(a[:, :3], b)])
def test_no_gradient_reaches_the_old_model(loss: Any) -> None:
    new, old = NEW.clone().requires_grad_(), OLD.clone().requires_grad_()
    loss(new, old).mean().backward()
    assert new.grad is not None
    assert new.grad.abs().sum() > 0
    assert old.grad is None


def gated(
    logits: list[float], allowed: list[bool], old: list[float], **more: Any
) -> tuple[float, list[float]]:
    """`gated_ce` of one voxel, and its gradient in the logits."""
    free = torch.tensor(logits).view(1, -1, 1).requires_grad_()
    loss = gated_ce(
        free, torch.tensor(allowed).view(1, -1, 1), torch.tensor(old).view(1, -1, 1),
        torch.full((len(old),), 0.5), **more,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, free)
    return loss.item(), grad.flatten().tolist()


def test_the_old_models_background_may_be_a_new_structure_that_nobody_annotated() -> None:
    """Channels: background, liver (old), spleen and pancreas (new); the case shows no spleen."""
    allowed, logits = [True, True, False, True], [0.0, 0.0, 0.0, 5.0]
    every = 3 + math.exp(5)
    loss, grad = gated(logits, allowed, [10.0, 0.0])  # sure of background, which it calls pancreas
    assert loss == near(-math.log((1 + math.exp(5)) / every))
    assert grad[3] < 0 < grad[1]
    loss, grad = gated(logits, allowed, [0.0, 10.0])  # sure of the liver, which it knows
    assert loss == near(-math.log(1 / every))
    assert grad[3] > 0
    assert gated(logits, allowed, [0.0, 0.0])[0] == 0  # not sure


def test_where_no_old_structure_can_be_the_old_model_is_not_asked() -> None:
    """Background or an unannotated new structure: the label says so, however sure the old model."""
    allowed, logits = [True, False, False, True], [0.0, 0.0, 0.0, 1.0]
    want = -math.log((1 + math.e) / (3 + math.e))
    for old in ([10.0, 0.0], [0.0, 10.0], [0.0, 0.0]):
        for adaptive in (False, True):
            assert gated(logits, allowed, old, adaptive=adaptive)[0] == near(want)
