"""Frozen features, softmax rows alone, specialists: old logits to the bit, and what may learn."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from locations import GOLDEN_FILES
from torch import Tensor, nn

from clbench.errors import SettingError, TrainingError
from clbench.nets.backbones import small_unet
from clbench.nets.heads import Segmenter
from clbench.nets.output import Output
from clbench.nets.stepwise_heads import StepwiseConvHead, StepwiseUniversalHead, compute_by_step
from clbench.run.course import run_course
from clbench.run.identity import described
from clbench.run.plan import RunSettings
from clbench.store import run_folder
from clbench.strategies.finetune import Finetune
from clbench.strategies.parameter_isolation.frozen import Frozen
from clbench.strategies.parameter_isolation.frozen_softmax import FrozenSoftmax
from clbench.strategies.parameter_isolation.independent import Independent
from clbench.strategies.softmax_finetune import SoftmaxFinetune
from clbench.strategy.contract import Batch, Kit, Lesson, Strategy
from clbench.training.loop import freeze

GOLDEN: dict[str, Any] = json.loads((GOLDEN_FILES / "recent_methods.json").read_text())
PARTS = (("liver", "spleen"), ("stomach",), ("aorta", "pancreas"))
STEPWISE: tuple[Strategy, ...] = (
    Frozen(), FrozenSoftmax(), FrozenSoftmax(preallocate=4), Independent(),
)  # fmt: skip


def lesson(number: int) -> Lesson:
    return Lesson(
        number=number,
        learns=PARTS[number - 1],
        structures=tuple(s for part in PARTS[:number] for s in part),
        source="btcv",
    )


def kit(prior: float | None = None) -> Kit:
    return Kit(
        backbone=lambda: small_unet(8),
        encode=lambda names: torch.stack([torch.full((512,), len(n) / 8) for n in names]),
        seed=0,
        prior=prior,
    )


def crops(step: Lesson, label: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(step.number)
    image = torch.rand(2, 1, 16, 16, 16, generator=generator)
    if label is None:
        label = (torch.rand(2, len(step.structures), 16, 16, 16, generator=generator) > 0.7).byte()
        label[:, : len(step.old)] = 255
    return Batch(
        image=image, label=label, pseudo=None, structures=step.structures,
        new=step.new_flags, cases=("1", "2"),
    )  # fmt: skip


def learn(method: Strategy, model: nn.Module, step: Lesson) -> None:
    """Two updates of what the step trains."""
    groups = method.groups(model, step, {})
    trained = [p for g in groups for p in g.parameters]
    model.zero_grad()
    freeze(model, trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        batch = crops(step)
        terms = method.losses(batch, model(batch.image), None, {})
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in trained}


@pytest.mark.parametrize("method", STEPWISE, ids=repr)
def test_old_logits_stay_equal_to_the_bit_through_three_steps(method: Strategy) -> None:
    image = torch.rand(1, 1, 16, 16, 16)
    first = method.first_step()
    model = first.build(kit(), lesson(1))  # as a run: the shared step 1, grown by the method
    learn(first, model, lesson(1))
    before: Tensor | None = None
    for number in (1, 2, 3):
        step = lesson(number)
        if number > 1:
            method.grow(model, kit(), step)
            learn(method, model, step)
        with torch.no_grad():
            after = model.eval()(image).logits
        background = int(isinstance(method, SoftmaxFinetune))
        known = background + len(step.old)
        if before is not None:
            assert torch.equal(after[:, :known], before[:, :known])
        assert after.shape[1] >= background + len(step.structures)
        before = after
        assert method.decode(after, step.structures).shape[1] == len(step.structures)


@pytest.mark.parametrize("method", STEPWISE, ids=repr)
def test_a_model_grown_the_same_way_takes_the_weights(method: Strategy) -> None:
    def grown(start: Strategy) -> nn.Module:
        model = start.build(kit(), lesson(1))
        for number in (2, 3):
            method.grow(model, kit(), lesson(number))
        return model.eval()

    shared, own = grown(method.first_step()), grown(method)
    own.load_state_dict(shared.state_dict())
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(own(image).logits, shared(image).logits)


def test_stepwise_heads_compute_what_the_plain_ones_do() -> None:
    image = torch.rand(2, 1, 16, 16, 16)
    plain: Strategy
    for plain, stepwise in ((Finetune(), Frozen()), (SoftmaxFinetune(), FrozenSoftmax())):
        models = []
        for method in (plain, stepwise):
            model = plain.build(kit(0.1), lesson(1))
            for number in (2, 3):
                method.grow(model, kit(0.1), lesson(number))
            models.append(model.eval())
        with torch.no_grad():
            torch.testing.assert_close(models[1](image).logits, models[0](image).logits)


def test_a_model_without_such_a_head_is_refused() -> None:
    model = SoftmaxFinetune().build(kit(), lesson(1))
    with pytest.raises(TrainingError, match="Segmenter with a UniversalHead"):
        compute_by_step(model, StepwiseUniversalHead, 2)


def test_what_learns_is_the_new_head_alone() -> None:
    sizes = {}
    for method in (Frozen(), FrozenSoftmax(), FrozenSoftmax(preallocate=4), Independent()):
        model = method.first_step().build(kit(), lesson(1))
        method.grow(model, kit(), lesson(2))
        groups = method.groups(model, lesson(2), {})
        sizes[repr(method)] = sum(p.numel() for g in groups for p in g.parameters)
        assert method.declaration.past == "weights"
    network = sum(p.numel() for p in Finetune().build(kit(), lesson(1)).parameters())
    # a controller: 768 → 512 → 153; a softmax row: 8 weights and a bias; a network without one
    # of its two controllers
    controller = 768 * 512 + 512 + 512 * 153 + 153
    assert list(sizes.values()) == [controller, 9, 4 * 9, network - controller]


def test_frozen_softmax_takes_the_step_of_dft_star() -> None:
    """The authors' update: rows of this and of later steps learn, and future ones are never true."""
    case = GOLDEN["dft_star_update"]
    features = torch.tensor(case["features"], dtype=torch.float64)
    head = StepwiseConvHead(4, background=True).double()
    head.add("liver")
    head.add("spleen")
    head.reserve(2)
    model = Segmenter(nn.Identity(), head.double())
    model.structures = ("liver", "spleen")
    compute_by_step(model, StepwiseConvHead, 2)
    head.add("stomach")  # takes a channel in reserve
    rows = ["background", "liver", "spleen", "stomach", *head.unused]
    with torch.no_grad():
        for name, weight, bias in zip(
            rows,
            [row for step in case["weights"] for row in step],
            [b for step in case["biases"] for b in step],
            strict=True,
        ):
            head.weight[name].copy_(torch.tensor(weight).view(4, 1, 1, 1))
            head.bias[name].fill_(bias)
    learned = ("liver", "spleen", "stomach")
    step = Lesson(number=2, learns=("stomach",), structures=learned, source="btcv")
    method = FrozenSoftmax(preallocate=2, dice=False)
    trained = [p for g in method.groups(model, step, {}) for p in g.parameters]
    freeze(head, trained)
    label = torch.full((1, 3, *features.shape[2:]), 255, dtype=torch.uint8)
    label[:, 2] = (torch.tensor(case["labels"]) == 3).byte()
    batch = Batch(
        image=features, label=label, pseudo=None, structures=learned,
        new=(False, False, True), cases=("1",),
    )  # fmt: skip
    terms = method.losses(batch, Output(logits=head({"final": features}, learned)), None, {})
    assert terms["ce"].item() == pytest.approx(case["loss"], rel=1e-6)
    terms["ce"].backward()
    for name, weight, bias in zip(
        rows, case["gradient_weights"], case["gradient_biases"], strict=True
    ):
        if name in ("stomach", *head.unused):
            grad: Any = head.weight[name].grad
            torch.testing.assert_close(
                grad.flatten(), torch.tensor(weight, dtype=torch.float64), rtol=1e-4, atol=1e-6
            )
            assert head.bias[name].grad.item() == pytest.approx(bias, rel=1e-4)  # type: ignore[union-attr]
        else:
            assert head.weight[name].grad is None
    assert sum(p.numel() for p in trained) == case["trainable_parameters"]


def test_channels_cannot_be_allocated_below_none() -> None:
    with pytest.raises(SettingError, match=r"strategy\.preallocate"):
        FrozenSoftmax(preallocate=-1)


def test_exclusive_specialists_share_no_voxel() -> None:
    logits = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1, 1)
    names = ("liver", "spleen")
    assert (Independent().decode(logits, names) > 0.5).all()
    chosen = Independent(exclusive=True).decode(logits, names) > 0.5
    assert chosen.flatten().tolist() == [False, True]


def test_a_course_forgets_exactly_nothing(tmp_path: Path, cache_root: Path) -> None:
    """With a softmax, whose structures score above 0 after so few updates."""
    folder = run_course(
        RunSettings(
            bench="tumor_ext", strategy="frozen_softmax", profile="smoke", out=tmp_path,
            cache=cache_root,
        )
    )  # fmt: skip
    rows = [r for r in run_folder.read_scores(folder / "scores.csv") if r.learned_at == 1]
    after = {
        step: {(r.eval_set, r.case, r.structure, r.scoring, r.metric): repr(r.value)
               for r in rows if r.step == step}
        for step in (1, 2)
    }  # fmt: skip
    assert max(r.value for r in rows if r.metric == "dice" and r.value == r.value) > 0.1
    assert after[1] == after[2]


def test_a_voxel_without_any_label_teaches_no_channel_in_reserve() -> None:
    """Padding and unannotated voxels count neither in the sum nor in the mean."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (1, 2, 4, 4, 4), generator=generator).byte()
    label[..., 2:] = 255
    step = lesson(1)
    batch = Batch(
        image=torch.zeros(1, 1, 4, 4, 4), label=label, pseudo=None, structures=step.structures,
        new=step.new_flags, cases=("1",),
    )  # fmt: skip
    logits = torch.randn(1, 5, 4, 4, 4, generator=generator).requires_grad_()
    method = FrozenSoftmax(preallocate=2, dice=False)
    loss = method.losses(batch, Output(logits=logits), None, {})["ce"]
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad[..., 2:].any()
    assert grad[:, 3:, ..., :2].any()  # elsewhere channels in reserve learn to be never true
    cut = Batch(
        image=batch.image[..., :2], label=label[..., :2], pseudo=None, structures=step.structures,
        new=step.new_flags, cases=("1",),
    )  # fmt: skip
    alone = method.losses(cut, Output(logits=logits[..., :2]), None, {})["ce"]
    assert loss.item() == pytest.approx(alone.item())


def test_only_runs_with_channels_in_reserve_are_of_another_version() -> None:
    plain, reserved = FrozenSoftmax(), FrozenSoftmax(preallocate=1)
    assert (plain.version, reserved.version, reserved.first_step().version) == (1, 2, 2)
    assert replace(reserved, preallocate=0).version == 1
    assert [FrozenSoftmax.serves(v) for v in (1, 2, 3)] == [True, True, False]
    assert described(plain, plain.version) == {"class": "FrozenSoftmax"}

    @dataclass(frozen=True, kw_only=True)
    class Own(FrozenSoftmax):
        version: ClassVar[int] = 4

    assert Own().version == 4


def test_step_1_with_channels_in_reserve_is_taught_once_for_all_decodings() -> None:
    one, other = (FrozenSoftmax(preallocate=1, legacy_exclusive=e) for e in (False, True))
    assert one.first_step() == other.first_step()


def test_a_rate_of_rows_that_never_learn_is_refused() -> None:
    with pytest.raises(SettingError, match=r"strategy\.old_classifier_lr"):
        FrozenSoftmax(old_classifier_lr=1.0)
    assert FrozenSoftmax(new_classifier_lr=1.0).new_classifier_lr == 1.0


@pytest.mark.parametrize(
    "strategy", ["frozen", "frozen_softmax", "lora", "independent", "decoder_growth"]
)
def test_a_course_with_nothing_to_train_is_refused_before_step_1(
    strategy: str, tmp_path: Path, cache_root: Path
) -> None:
    settings = RunSettings(
        bench="domain_ext", strategy=strategy, profile="smoke", out=tmp_path, cache=cache_root,
        overrides=("phantom.train=2", "phantom.test=1"),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"nothing to train[\s\S]*step 2"):
        run_course(settings)
    assert not list(tmp_path.iterdir())
